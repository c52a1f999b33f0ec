"""Gemma 3: tokens of an image see each other, shortened or not; pan-and-scan; pictures made smaller."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.nn.functional import avg_pool2d, interpolate

import mllm_efficient as me
from mllm_efficient.measure.flops import load_shape, shape_of
from mllm_efficient.patches.families.gemma3 import crops

from ..families import FAMILIES, VOCABULARY, gemma3, gemma3_processor, make, noise, tiny
from ..families_reference import greedy, logits, visuals
from .test_families import answer, sequence

IMAGE = VOCABULARY["<IMG_CONTEXT>"]
SPEC = "divprune:keep=0.5"


def windowed(window: int):
    model = gemma3(window).eval()
    model.load_state_dict(tiny("gemma3").state_dict())
    model.generation_config = tiny("gemma3").generation_config
    return model


# ------------------------------------------------------------------------------------------------ who sees whom


@pytest.mark.parametrize("window", [4096, 8])
@pytest.mark.parametrize("row", ["one image", "two images", "touching images"])
@torch.no_grad()
def test_logits_of_a_shortened_prompt_are_those_of_the_slow_reference_with_images_seen_both_ways(row, window):
    model, inputs = windowed(window), make("gemma3", row)
    prepared = me.prepare(model, SPEC, **inputs)
    short = prepared.model_kwargs
    assert short["token_type_ids"].shape == short["input_ids"].shape
    assert torch.equal(short["token_type_ids"], (short["input_ids"] == IMAGE).long())
    wanted = logits(model, sequence("gemma3", model, SPEC, inputs))
    torch.testing.assert_close(model(**short).logits[0], wanted, atol=1e-4, rtol=1e-4)
    # The plain model takes token types that are too long, or none, without a word, and its logits are others.
    plain = {**short, "mm_encoder_outputs": dict(short["mm_encoder_outputs"])}
    for types in (inputs["token_type_ids"], None):
        assert (model(**{**plain, "token_type_ids": types}).logits[0] - wanted).abs().max() > 0.01
    with pytest.raises(me.CountMismatchError, match="token_type_ids"):
        me.wrap(model, SPEC)(**{**short, "token_type_ids": inputs["token_type_ids"]})


@pytest.mark.parametrize("row", ["one image", "two images"])
def test_generation_with_a_window_equals_the_slow_reference(row):
    model, inputs = windowed(8), make("gemma3", row)
    wanted = greedy(model, sequence("gemma3", model, SPEC, inputs))
    assert answer(me.wrap(model, SPEC), inputs)[0].tolist() == wanted


@torch.no_grad()
def test_images_without_token_types_are_warned_of_and_stay_as_transformers_has_them():
    model, inputs = tiny("gemma3"), make("gemma3", "one image")
    types = inputs.pop("token_type_ids")
    causal = model(**inputs).logits
    me.wrap(model, "none")
    with pytest.warns(UserWarning, match="images without token_type_ids: tokens of an image see only those before them"):
        assert torch.equal(model(**inputs).logits, causal)
    with pytest.warns(UserWarning, match="pass everything that the processor returned") as seen:
        model.generate(**inputs, max_new_tokens=3)
    assert sum("token_type_ids" in str(w.message) for w in seen) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="images without")
        assert not torch.equal(model(**inputs, token_type_ids=types).logits, causal)
        model(input_ids=torch.tensor([[1, 20, 21]]))


# ------------------------------------------------------------------------------------------------ views

SIZES = [(600, 600), (700, 600), (1200, 500), (500, 1200), (3000, 500), (200, 2000), (520, 256), (900, 300), (400, 255), (2560, 320)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_crops_are_those_of_its_processor(size):
    usual = {"pan_and_scan_min_crop_size": 256, "pan_and_scan_max_num_crops": 4, "pan_and_scan_min_ratio_to_activate": 1.2}
    pixels = torch.zeros(3, size[1], size[0]).numpy()
    for settings in (usual, {**usual, "pan_and_scan_min_crop_size": 100, "pan_and_scan_max_num_crops": 6}):
        found = gemma3_processor("left").image_processor.pan_and_scan(pixels, *settings.values())
        assert crops(size, settings) == len(found)
    rules = load_shape("gemma-3-4b", processor={"do_pan_and_scan": True}).rules
    assert [p.shape.n for p in rules.prompt(None, size, True)] == [256] * (1 + crops(size, usual))


def test_every_crop_has_a_budget_of_its_own():
    model, processor = tiny("gemma3"), FAMILIES["gemma3"].processor("left")
    settings = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 10, "pan_and_scan_max_num_crops": 3,
                "pan_and_scan_min_ratio_to_activate": 1.2}  # fmt: skip
    inputs = processor(text=["user : <img> what ?"], images=[[noise(0, 70, 20)]], return_tensors="pt", images_kwargs=settings)
    assert len(inputs["pixel_values"]) == 4
    prepared = me.prepare(model, "divprune:tokens=4", **inputs)
    assert [(i.full, i.kept) for i in prepared.report.images] == [(9, 4)] * 4
    assert answer(me.wrap(model, "divprune:tokens=4"), dict(inputs))[0].tolist() == greedy(
        tiny("gemma3"), sequence("gemma3", tiny("gemma3"), "divprune:tokens=4", dict(inputs))
    )
    rules = shape_of(model.config, "gemma3", settings).rules
    assert [p.shape.n for p in rules.prompt(None, (70, 20), True)] == [9] * 4


@torch.no_grad()
def test_resize_is_the_tower_and_the_projector_on_the_smaller_picture():
    model, inputs = tiny("gemma3"), make("gemma3", "two images")
    prepared = me.prepare(model, "resize:tokens=4", **inputs)
    base, projector = model.model, model.model.multi_modal_projector
    pixels = interpolate(inputs["pixel_values"], (16, 16), mode="bicubic", antialias=True)
    states = base.vision_tower(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
    pooled = avg_pool2d(states.transpose(1, 2).reshape(2, -1, 4, 4), 2).flatten(2).transpose(1, 2)
    wanted = projector.mm_soft_emb_norm(pooled) @ projector.mm_input_projection_weight
    found = torch.stack(list(prepared.model_kwargs["mm_encoder_outputs"]["image"].pooler_output))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)  # pooled in another layout
    assert projector.patches_per_image == 6
    assert [v.n for v in visuals("gemma3", model, inputs)] == [9, 9]
