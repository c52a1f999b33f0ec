"""builtin-video as it is shipped: small, stock, loaded by name, and an instrument of budgets over a video and over each frame."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch
from safetensors import safe_open

import mllm_efficient as me
from mllm_efficient.embedded import FOLDERS, embedded
from mllm_efficient.eval.builtin.suites import embedded_suite
from mllm_efficient.eval.runner import Run
from mllm_efficient.loading.models import ModelOptions, load
from mllm_efficient.loading.processor import NEEDS_VIDEO
from mllm_efficient.measure.shapes import load_shape
from mllm_efficient.registry import build

NAME, SUITE = "builtin-video", embedded_suite("builtin-hard")
FLOOR = 0.55  # a share right far under what it answers and far above what it answers without frames
FRAMES, EACH = 8, 16
needs_torchvision = pytest.mark.skipif(find_spec("torchvision") is None, reason="transformers' video processors need torchvision")


@pytest.fixture(scope="module")
def video():
    return load(ModelOptions(model=NAME, device="cpu"))


def answered(loaded, specs, limit, **settings):
    """The records of every method on validation questions, by method."""
    asked = SUITE.samples("val", limit, ["video"])
    records = Run(loaded, asked, [build(s) for s in specs], suite=SUITE, **settings).answer_all()
    assert not [r["error"] for r in records if r["error"]]
    return {name: [r for r in records if r["method"] == name] for name in dict.fromkeys(r["method"] for r in records)}


def share(records):
    return sum(r["correct"] for r in records) / len(records)


def test_it_is_small_safe_and_stock(video):
    folder = embedded(FOLDERS[NAME])
    assert not [f for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pkl", ".py")]
    assert (folder / "model.safetensors").stat().st_size <= 5e6
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118
    assert type(video.model).__module__ == "transformers.models.llava_onevision.modeling_llava_onevision"
    assert sum(p.numel() for p in video.model.parameters()) <= 2.5e6 and video.model.dtype == torch.float32


def test_it_is_had_in_python_and_its_shape_without_weights():
    model, processor = me.builtin("video", device="cpu")
    assert type(processor).__name__ == "LlavaOnevisionProcessor"
    shape = load_shape(NAME)
    assert (shape.family, shape.decoder.layers) == ("llava_onevision", model.config.text_config.num_hidden_layers)


@needs_torchvision
def test_it_answers(video):
    """A floor far under the published accuracy and far above what is answered without frames."""
    found = answered(video, ["none"], 140)
    assert {r["visual_tokens_full"] for r in found["none"]} == {FRAMES * EACH}
    assert share(found["none"]) > FLOOR > share(found["no-image"])


@needs_torchvision
def test_a_budget_of_each_frame_is_another_choice_than_one_of_the_video(video):
    whole, each = answered(video, ["divprune:keep=0.25", "divprune:keep=0.25,per=frame"], 40, floor=False).values()
    assert {r["visual_tokens_kept"] for r in (*whole, *each)} == {FRAMES * EACH // 4}
    assert [r["confidence"] for r in whole] != [r["confidence"] for r in each]


def test_without_torchvision_videos_are_asked_for_with_what_to_install(video, monkeypatch):
    monkeypatch.setattr(video.processor, "video_processor", None, raising=False)
    assert SUITE.chosen(None, video.processor)[1] == f"without the category video: {NEEDS_VIDEO}"
    with pytest.raises(me.MllmEfficientError, match="torchvision"):
        SUITE.chosen("video", video.processor)


def test_the_log_tells_what_was_spent_and_found():
    lines = [json.loads(line) for line in (embedded(FOLDERS[NAME]) / "training_log.jsonl").read_text().splitlines()]
    assert lines[-1]["cpu_seconds"] <= 7200 and any("val" in line for line in lines)
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
