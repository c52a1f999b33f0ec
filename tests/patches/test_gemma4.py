"""Gemma 4: images padded to ``max_soft_tokens``, seen both ways in layers with a window alone, inputs of their own in every layer."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn.functional import interpolate
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size

import mllm_efficient as me
from mllm_efficient.measure import counter
from mllm_efficient.measure.flops import cost, kv_cache_bytes, load_shape, prefill_flops, shape_of
from mllm_efficient.patches import adapter_for, transformers_version
from mllm_efficient.patches.facts import FACTS
from mllm_efficient.patches.families.gemma4 import COUNTS

from ..families import VOCABULARY, gemma4, make, tiny
from ..families_reference import logits, visuals
from .test_families import sequence

REFUSAL = FACTS["gemma4"].refusal(transformers_version())
pytestmark = pytest.mark.skipif(bool(REFUSAL), reason=REFUSAL or "it runs here")
IMAGE, VIDEO = VOCABULARY["<IMG_CONTEXT>"], VOCABULARY["<video>"]
SPEC = "divprune:keep=0.3"


def built(**settings):
    """The tiny model with other settings of its language model, random weights of its own."""
    torch.manual_seed(0)
    model = gemma4(**settings).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += torch.randn_like(weight) * 0.1
    return model


# ------------------------------------------------------------------------------------------------ who sees whom


@pytest.mark.parametrize("window", [4096, 8])
@pytest.mark.parametrize("row", ["one image", "two images"])
@torch.no_grad()
def test_logits_of_a_shortened_prompt_are_those_of_the_slow_reference(row, window):
    model, inputs = built(sliding_window=window), make("gemma4", row)
    short = me.prepare(model, SPEC, **inputs).model_kwargs
    assert torch.equal(short["mm_token_type_ids"], (short["input_ids"] == IMAGE).long())
    wanted = logits(model, sequence("gemma4", model, SPEC, inputs))
    torch.testing.assert_close(model(**short).logits[0], wanted, atol=1e-4, rtol=1e-4)
    without = {**short, "mm_encoder_outputs": dict(short["mm_encoder_outputs"]), "mm_token_type_ids": None}
    assert (model(**without).logits[0] - wanted).abs().max() > 0.01  # taken without a word
    with pytest.raises(me.CountMismatchError, match="mm_token_type_ids"):
        me.wrap(model, SPEC)(**{**short, "mm_token_type_ids": inputs["mm_token_type_ids"]})


@torch.no_grad()
def test_a_model_that_sees_images_one_way_needs_no_token_types(recwarn):
    model, inputs = built(use_bidirectional_attention=None), make("gemma4", "one image")
    short = me.prepare(model, SPEC, **inputs).model_kwargs
    del inputs["mm_token_type_ids"]
    with_none = me.prepare(model, SPEC, **inputs).model_kwargs
    assert torch.equal(model(**short).logits, model(**with_none).logits)
    assert not [w for w in recwarn if "token_type_ids" in str(w.message)]
    with pytest.warns(UserWarning, match="images without mm_token_type_ids"):
        me.prepare(built(), SPEC, **inputs)


# ------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize("most", COUNTS)
@pytest.mark.parametrize("size", [(672, 672), (1000, 701), (3000, 40), (20, 30), (60, 6000), (1920, 1080)], ids=str)
def test_a_picture_has_the_size_that_its_processor_gives(size, most):
    rules = load_shape("gemma-4-e4b", processor={"max_soft_tokens": most}).rules
    try:
        high, wide = get_aspect_ratio_preserving_size(size[1], size[0], 16, 9 * most, 3)
    except ValueError:
        pytest.fail("a size that the processor refuses")
    assert rules.of_size(size).shape.grid == (high // 48, wide // 48)
    assert rules.of_size(size).patches == (3 * most, 3)  # the tower runs on the padding too


def test_counts_that_its_processor_does_not_take_are_one_line():
    with pytest.raises(me.MllmEfficientError, match="max_soft_tokens=100: .* takes one of 70, 140, 280, 560, 1120"):
        load_shape("gemma-4-e4b", processor={"max_soft_tokens": 100}).rules.typical()


def test_an_image_has_the_tokens_that_its_placeholders_say():
    model, inputs = tiny("gemma4"), make("gemma4", "two images")
    items = adapter_for(model).items(inputs)
    assert [i.shape.grid for i in items] == [v.planes[0] for v in visuals("gemma4", model, inputs)]
    rules = shape_of(model.config, "gemma4", {"max_soft_tokens": 70}).rules
    assert [i.shape.grid for i in items] == [rules.of_size(size).shape.grid for size in ((40, 20), (20, 60))]


@torch.no_grad()
def test_resize_is_the_model_on_the_smaller_picture():
    model, inputs = tiny("gemma4"), make("gemma4", "one image")
    prepared = me.prepare(model, "resize:keep=0.5", **inputs)
    full = visuals("gemma4", model, inputs)[0].planes[0]
    scaled = {tuple(max(1, int(side * s / 2000 + 0.5)) for side in full) for s in range(1, 2001)}  # every picture of its shape
    rows, columns = max((g for g in scaled if g[0] * g[1] <= round(0.5 * full[0] * full[1])), key=lambda g: g[0] * g[1])
    assert prepared.report.images[0].grid == (rows, columns) != full
    places = inputs["image_position_ids"][0]
    wide, high = (int(side) + 1 for side in places.amax(0))
    patches = inputs["pixel_values"][0, : wide * high]
    picture = torch.zeros(3, 4 * high, 4 * wide)
    for patch, (x, y) in zip(patches, places.tolist()):
        picture[:, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] = patch.view(4, 4, 3).permute(2, 0, 1)
    small = interpolate(picture[None], (rows * 8, columns * 8), mode="bicubic", antialias=True)[0]
    at = [(x, y) for y in range(2 * rows) for x in range(2 * columns)]
    cut = torch.stack([small[:, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].permute(1, 2, 0).flatten() for x, y in at])
    wanted = model.model.get_image_features(cut[None], torch.tensor([at]), return_dict=True).pooler_output[0]
    found = prepared.model_kwargs["mm_encoder_outputs"]["image"].pooler_output[0]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------ videos


def with_video(frames: int):
    """A prompt with a video of so many frames of 3 x 4 tokens, text between them."""
    places = torch.tensor([(x, y) for y in range(6) for x in range(8)]).expand(frames, -1, -1)
    pixels = torch.rand(frames, 48, 48, generator=torch.Generator().manual_seed(frames))
    ids = [1, 20]
    for frame in range(frames):
        ids += [21 + frame, *[VIDEO] * 12]
    ids = torch.tensor([[*ids, 30, 31]])
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": 2 * (ids == VIDEO).long(),
        "pixel_values_videos": pixels, "video_position_ids": places, "num_frames_per_video": torch.tensor([frames]),
    }  # fmt: skip


@pytest.mark.parametrize("spec", ["divprune:keep=0.3", "uniform:tokens=5,per=frame"])
@torch.no_grad()
def test_a_pruned_video_is_the_whole_prompt_with_the_other_columns_masked(spec):
    model, inputs = built(use_bidirectional_attention=None), with_video(3)
    prepared = me.prepare(model, spec, **inputs)
    keep = prepared.visual_keep_mask[0]
    visual = (inputs["input_ids"][0] == VIDEO).nonzero()[:, 0]
    by_report = torch.ones_like(keep)
    by_report[visual] = False
    by_report[visual[prepared.report.images[0].indices]] = True
    assert torch.equal(keep, by_report) and not keep.all()
    places = (keep.long().cumsum(0) - 1).clamp(min=0)[None]
    whole = model(**{**inputs, "attention_mask": keep[None].long(), "position_ids": places}).logits[0, keep]
    torch.testing.assert_close(model(**prepared.model_kwargs).logits[0], whole, atol=1e-4, rtol=1e-4)


def test_frames_that_do_not_add_up_are_refused():
    inputs = {**with_video(3), "num_frames_per_video": torch.tensor([2])}
    with pytest.raises(me.CountMismatchError, match="num_frames_per_video"):
        me.prepare(tiny("gemma4"), SPEC, **inputs)


# ------------------------------------------------------------------------------------------------ cost

ALIKE = dict(attention_k_eq_v=True, num_global_key_value_heads=2)
KINDS = {
    "keys shared": {},
    "wide MLPs": {"use_double_wide_mlp": True},
    "keys that are values": {**ALIKE, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0},
    "experts": {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_decoder_costs_what_torch_counts(kind):
    model = built(**KINDS[kind])
    shape, call = shape_of(model.config, "gemma4"), dict(text_tokens=9, image_size=(96, 60), new_tokens=3)
    found, closed = counter.count(model, shape, me.build(SPEC), **call), cost(shape, method=SPEC, **call)
    for phase in ("vision", "compress", "prefill", "decode", "total"):
        assert getattr(found, phase) == getattr(closed, phase), phase
    with torch.no_grad():
        out = model(torch.tensor([[1, 20, 21, 22]]), use_cache=True)
    tensors = [t for layer in out.past_key_values.layers for t in (layer.keys, layer.values) if t is not None]
    held = sum(t.numel() * t.element_size() for t in tensors)
    assert kv_cache_bytes(shape.decoder, [4] * 4) * 2 == held  # a configuration without a dtype counts as float16


def test_the_shipped_shape_costs_what_torch_counts():
    shape = load_shape("gemma-4-e4b")
    model = counter.build_on_meta(shape)
    n, width = 100, shape.decoder.width
    states = torch.empty(1, n, width, device="meta", dtype=model.dtype)
    own = torch.empty(1, n, 42, 256, device="meta", dtype=model.dtype)
    run = functools.partial(model.model.language_model, inputs_embeds=states, per_layer_inputs=own, use_cache=True, logits_to_keep=1)
    with torch.no_grad(), FlopCounterMode(display=False) as mode:
        model.lm_head(run().last_hidden_state[:, -1:])
    assert mode.get_total_flops() == prefill_flops(shape.decoder, [n] * 42)
    with pytest.raises(me.MllmEfficientError, match="reads values"):
        counter.count(model, shape, me.build("none"))
