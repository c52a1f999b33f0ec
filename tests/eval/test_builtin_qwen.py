"""builtin-qwen as it is shipped: small, stock, loaded by name, and an instrument of positions and deepstack."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

import mllm_efficient as me
from mllm_efficient.embedded import FOLDERS, embedded, is_embedded, model_source
from mllm_efficient.errors import MllmEfficientError
from mllm_efficient.eval.builtin.chat import IMAGE_SIZE
from mllm_efficient.eval.builtin.suites import embedded_suite
from mllm_efficient.eval.runner import Run
from mllm_efficient.loading.models import ModelOptions, load
from mllm_efficient.measure.shapes import load_shape
from mllm_efficient.registry import build

NAME = "builtin-qwen"
FLOOR = {"builtin": 0.5, "builtin-hard": 0.4}  # shares right: far under what it answers, far above what it answers without pictures


@pytest.fixture(scope="module")
def qwen():
    return load(ModelOptions(model=NAME, device="cpu"))


def answered(loaded, specs, limit, suite="builtin", categories=None, **settings):
    """The records of every method on validation questions, by method."""
    chosen = embedded_suite(suite)
    asked = chosen.samples("val", limit, categories or chosen.categories)
    records = Run(loaded, asked, [build(s) for s in specs], suite=chosen, **settings).answer_all()
    assert not [r["error"] for r in records if r["error"]]
    return {name: [r for r in records if r["method"] == name] for name in dict.fromkeys(r["method"] for r in records)}


def share(records):
    return sum(r["correct"] for r in records) / len(records)


def test_it_is_small_safe_and_stock(qwen):
    folder = embedded(FOLDERS[NAME])
    assert not [f for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pkl", ".py")]
    assert (folder / "model.safetensors").stat().st_size <= 5e6
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118
    assert type(qwen.model).__module__ == "transformers.models.qwen3_vl.modeling_qwen3_vl"
    assert sum(p.numel() for p in qwen.model.parameters()) <= 2.5e6 and qwen.model.dtype == torch.float32


def test_a_name_of_their_kind_that_no_model_has_says_which_there_are():
    assert is_embedded(NAME) and not is_embedded("builtin-qwn")
    with pytest.raises(
        MllmEfficientError,
        match=r"no embedded model 'builtin-qwn' - did you mean 'builtin-qwen'.*\(there are builtin, builtin-qwen, builtin-v",
    ):
        model_source("builtin-qwn")
    with pytest.raises(MllmEfficientError, match="no embedded model 'builtin-tile'"):
        me.builtin("tile")


def test_it_is_had_in_python_and_its_shape_without_weights():
    model, processor = me.builtin("qwen", device="cpu")
    assert type(model).__name__ == "Qwen3VLForConditionalGeneration" and type(processor).__name__ == "Qwen3VLProcessor"
    shape = load_shape(NAME)
    assert (shape.family, shape.decoder.layers) == ("qwen3_vl", model.config.text_config.num_hidden_layers)


def test_it_answers(qwen):
    """A floor far under the published accuracy and far above what is answered without a picture."""
    found = answered(qwen, ["none"], 140)
    assert {r["visual_tokens_full"] for r in found["none"]} == {(IMAGE_SIZE // 28) ** 2}
    assert share(found["none"]) > FLOOR["builtin"] > share(found["no-image"])


def test_it_answers_the_harder_questions(qwen):
    asked = ("document", "chart", "scene", "images", "screens")
    found = answered(qwen, ["none"], 150, "builtin-hard", asked)
    assert share(found["none"]) > FLOOR["builtin-hard"] > share(found["no-image"])


def test_positions_of_kept_tokens_matter(qwen):
    """Renumbered tokens are asked for by another rule, which is said in the records, and their answers change."""
    kept, moved = answered(qwen, ["divprune:keep=0.25", "divprune:keep=0.25,positions=renumber"], 70, floor=False).values()
    assert {r["positions"] for r in kept} == {"keep"} and {r["positions"] for r in moved} == {"renumber"}
    assert [r["answer"] for r in kept] != [r["answer"] for r in moved]


def test_deepstack_is_used(qwen):
    """Without what its first layers add, the model answers worse: an instrument of methods that lose it."""
    whole = answered(qwen, ["none"], 70, floor=False)["none"]
    model, tower = qwen.model, qwen.model.model.visual
    handles = [m.register_forward_hook(lambda module, args, out: torch.zeros_like(out)) for m in tower.deepstack_merger_list]
    try:
        without = answered(qwen, ["none"], 70, floor=False)["none"]
    finally:
        for handle in handles:
            handle.remove()
    assert model.config.vision_config.deepstack_visual_indexes and share(without) < share(whole)


def test_the_log_tells_what_was_spent_and_found():
    lines = [json.loads(line) for line in (embedded(FOLDERS[NAME]) / "training_log.jsonl").read_text().splitlines()]
    assert lines[-1]["cpu_seconds"] <= 7200 and any("val" in line for line in lines)
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
