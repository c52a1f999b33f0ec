"""builtin-video as it is shipped: an instrument of budgets over a video and over each frame."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

import mllm_efficient as me
from mllm_efficient.eval.builtin.suites import embedded_suite
from mllm_efficient.loading.models import ModelOptions, load
from mllm_efficient.loading.processor import NEEDS_VIDEO

from .embedded_answers import answered, share

ASKED = ("builtin-hard", ["video"])
SUITE = embedded_suite(ASKED[0])
FLOOR = 0.55  # a share right far under what it answers and far above what it answers without frames
FRAMES, EACH = 8, 16
needs_torchvision = pytest.mark.skipif(find_spec("torchvision") is None, reason="transformers' video processors need torchvision")


@pytest.fixture(scope="module")
def video():
    return load(ModelOptions(model="builtin-video", device="cpu"))


@needs_torchvision
def test_it_answers(video):
    """A floor far under the published accuracy and far above what is answered without frames."""
    found = answered(video, ["none"], 140, *ASKED)
    assert {r["visual_tokens_full"] for r in found["none"]} == {FRAMES * EACH}
    assert share(found["none"]) > FLOOR > share(found["no-image"])


@needs_torchvision
def test_a_budget_of_each_frame_is_another_choice_than_one_of_the_video(video):
    whole, each = answered(video, ["divprune:keep=0.25", "divprune:keep=0.25,per=frame"], 40, *ASKED, floor=False).values()
    assert {r["visual_tokens_kept"] for r in (*whole, *each)} == {FRAMES * EACH // 4}
    assert [r["confidence"] for r in whole] != [r["confidence"] for r in each]


def test_without_torchvision_videos_are_asked_for_with_what_to_install(video, monkeypatch):
    monkeypatch.setattr(video.processor, "video_processor", None, raising=False)
    assert SUITE.chosen(None, video.processor)[1] == f"without the category video: {NEEDS_VIDEO}"
    with pytest.raises(me.MllmEfficientError, match="torchvision"):
        SUITE.chosen("video", video.processor)
