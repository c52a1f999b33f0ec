"""GLM-4.6V: videos, whose time steps stand apart in the prompt and share the placeholder of images; sizes of pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.models.glm46v.image_processing_pil_glm46v import smart_resize

import mllm_efficient as me
from mllm_efficient.apply.prepare import encode
from mllm_efficient.measure.flops import load_shape

from ..families import VOCABULARY, make, process, tiny

IMAGE = VOCABULARY["<|image_pad|>"]
TEXT = "user : <img> <|video_pad|> </img> how many rings are in the video ? assistant :"
TYPES = ("glm46v", "glm4v", "glm_ocr")


def with_video(*counts: int) -> dict[str, torch.Tensor]:
    """A batch of prompts with a video each, of so many frames."""
    videos = [np.random.default_rng(count).integers(0, 256, (count, 24, 40, 3), dtype=np.uint8) for count in counts]
    return process("glm46v", [TEXT] * len(counts), [[] for _ in counts], videos)


def test_every_time_step_of_a_video_stands_apart():
    ids = with_video(6)["input_ids"][0] == IMAGE
    assert int((ids[1:] & ~ids[:-1]).sum()) == 3  # three steps of two frames


@pytest.mark.parametrize("name", TYPES)
@torch.no_grad()
def test_a_video_kept_whole_is_bit_equal(name):
    model, inputs = tiny(name), with_video(4, 6)
    prepared = me.prepare(model, "divprune:keep=1", encoded=encode(model, "divprune:keep=1", **inputs), **inputs)
    assert "video" in prepared.model_kwargs["mm_encoder_outputs"]
    assert torch.equal(model(**prepared.model_kwargs).logits, model(**inputs).logits)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("spec", ["divprune:keep=0.3", "uniform:tokens=3,per=frame", "random:keep=0.3"])
@torch.no_grad()
def test_a_pruned_video_is_the_whole_prompt_with_the_other_columns_masked(name, spec):
    model, inputs = tiny(name), with_video(6)
    prepared = me.prepare(model, spec, **inputs)
    keep = prepared.visual_keep_mask[0]
    visual = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
    by_report = torch.ones_like(keep)
    by_report[visual] = False
    by_report[visual[prepared.report.images[0].indices]] = True
    assert torch.equal(keep, by_report) and not keep.all()
    places, _ = model.model.get_rope_index(inputs["input_ids"], inputs["mm_token_type_ids"], video_grid_thw=inputs["video_grid_thw"])
    whole = model(**{**inputs, "attention_mask": keep[None].long(), "position_ids": places}).logits[0, keep]
    torch.testing.assert_close(model(**prepared.model_kwargs).logits[0], whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spec", ["divprune:keep=0.3", "resize:keep=0.5", "pool:keep=0.5"])
def test_videos_in_a_batch_are_answered_as_one_by_one(spec):
    model, new = me.wrap(tiny("glm46v"), spec), dict(max_new_tokens=5)
    together = model.generate(**with_video(4, 6), **new)[:, -5:]
    assert torch.equal(together, torch.cat([model.generate(**with_video(count), **new)[:, -5:] for count in (4, 6)]))
    assert me.last_report(model).visual_tokens_kept < me.last_report(model).visual_tokens_full


def test_images_and_videos_in_one_call_are_refused_as_transformers_refuses_them():
    model, image, video = tiny("glm46v"), make("glm46v", "one image"), with_video(4)
    both = {**video, "pixel_values": image["pixel_values"], "image_grid_thw": image["image_grid_thw"]}
    both |= {name: torch.cat([image[name], video[name]], 1) for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    with pytest.raises(ValueError, match="tokens do not match"):
        model(**both)
    with pytest.raises(me.CountMismatchError, match="a call each"):
        me.prepare(model, "divprune:keep=0.3", **both)


@pytest.mark.parametrize("size", [(672, 672), (1000, 701), (20, 30), (9000, 8000), (60, 6000), (5, 400), (300, 200)], ids=str)
def test_a_picture_has_the_size_that_its_processor_gives(size):
    rules = load_shape("glm-4.6v-flash").rules
    high, wide = smart_resize(2, size[1], size[0], factor=28, min_pixels=112 * 112, max_pixels=28 * 28 * 12288)
    assert rules.of_size(size).shape.grid == (high // 28, wide // 28)
