"""builtin-qwen as it is shipped: an instrument of positions and deepstack."""

from __future__ import annotations

import pytest
import torch

import mllm_efficient as me
from mllm_efficient.embedded import is_embedded, model_source
from mllm_efficient.errors import MllmEfficientError
from mllm_efficient.eval.builtin.chat import IMAGE_SIZE
from mllm_efficient.loading.models import ModelOptions, load

from .embedded_answers import answered, share

NAME = "builtin-qwen"
FLOOR = {"builtin": 0.5, "builtin-hard": 0.4}  # shares right: far under what it answers, far above what it answers without pictures


@pytest.fixture(scope="module")
def qwen():
    return load(ModelOptions(model=NAME, device="cpu"))


def test_a_name_of_their_kind_that_no_model_has_says_which_there_are():
    assert is_embedded(NAME) and not is_embedded("builtin-qwn")
    with pytest.raises(
        MllmEfficientError,
        match=r"no embedded model 'builtin-qwn' - did you mean 'builtin-qwen'.*\(there are builtin, builtin-qwen, builtin-v",
    ):
        model_source("builtin-qwn")
    with pytest.raises(MllmEfficientError, match="no embedded model 'builtin-tile'"):
        me.builtin("tile")


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
