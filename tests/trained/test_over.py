"""Views of an image and frames of a video as one set (AttSets): the rule place by place, no order, and models that have none."""

from __future__ import annotations

import copy

import pytest
import torch

import mllm_efficient as me
from mllm_efficient.measure.counter import count
from mllm_efficient.measure.flops import cost
from mllm_efficient.measure.shapes import shape_of
from mllm_efficient.patches import adapter_for
from mllm_efficient.patches.vllm.settings import require_served
from mllm_efficient.train.model import TrainingModel
from mllm_efficient.trained import folder as trained
from mllm_efficient.trained.base_model import base_of
from mllm_efficient.trained.install import installed
from mllm_efficient.trained.projector import TokenFlexProjector

from ..families import make, tiny
from .test_mixers import D, projector

SIDE = 2


def slow_joined(across, views):
    """(n, D) of views (views, n, D): at each place, channel by channel, a mean weighted by the softmax over the views."""
    out = torch.zeros_like(views[0])
    for place in range(views.shape[1]):
        scores = torch.stack([across.score.weight @ view[place] for view in views])
        for channel in range(views.shape[2]):
            weights = scores[:, channel].softmax(0)
            out[place, channel] = sum(weight * view[place, channel] for weight, view in zip(weights, views))
    return out


@torch.no_grad()
def test_sets_of_views_equal_the_rule_in_any_order_and_number():
    module = projector(over="views")
    torch.nn.init.normal_(module.across.score.weight)
    x = torch.randn(6, 35, D, dtype=torch.float64)
    out, pooled = module(x, side=SIDE, grid=(5, 7), sets=[3, 1, 2]), module.pool(x, SIDE, (5, 7))
    joined = module.joined(pooled, [3, 1, 2])
    for one, views in zip(joined, pooled.split([3, 1, 2])):
        torch.testing.assert_close(one, slow_joined(module.across, views), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(joined[1], pooled[3])  # a set of one is itself
    order = torch.tensor([2, 0, 1, 3, 5, 4])
    torch.testing.assert_close(module(x[order], side=SIDE, grid=(5, 7), sets=[3, 1, 2]), out)
    torch.testing.assert_close(module(x, side=SIDE, grid=(5, 7), sets=[1] * 6), module(x, side=SIDE, grid=(5, 7)))
    fresh = TokenFlexProjector(D, 12, over="frames")
    torch.testing.assert_close(fresh.joined(pooled.float(), [6])[0], pooled.float().mean(0))  # begins as the mean


@pytest.mark.parametrize("settings, sets, message", [
    ({}, [2], "are for views by themselves: train some with settings.over=views"), ({"over": "views"}, [1], r"sets=\[1\] are not 2 views"),
    ({"over": "view"}, [2], "over='view' of a TokenFLEX projector: image, views, frames .*views"),
])  # fmt: skip
def test_sets_that_cannot_be_are_one_line(settings, sets, message):
    with pytest.raises(me.MllmEfficientError, match=message) as caught:
        TokenFlexProjector(D, 12, **settings)(torch.randn(2, 36, D), side=SIDE, sets=sets)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ in models


def folder_of(path, model, over):
    """A trained folder whose weights are drawn, those of the sets too."""
    torch.manual_seed(3)
    module = TokenFlexProjector(*adapter_for(model).projector_widths, over=over)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    trained.save(path, me.TokenFlex(tokens=SIDE * SIDE, over=over), module, base_of(model))
    return module.eval()


def tokens_of(prepared, modality):
    features = prepared.model_kwargs["mm_encoder_outputs"][modality].pooler_output
    return [f.flatten(0, -2) for f in features]


def by_hand(model, module, pixels):
    """(side * side, D) of views (views, C, H, W): tower, pooling of each, the slow sets, and the layers."""
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[model.config.vision_feature_layer]
    hidden = hidden[:, 1:] if model.config.vision_feature_select_strategy == "default" else hidden
    joined = slow_joined(module.across, module.pool(hidden, SIDE))
    x = module.norm(joined)
    return module.down(torch.nn.functional.silu(module.gate(x)) * module.up(x))


@pytest.mark.parametrize("name", ["llava_onevision", "llava_next_video"])
@torch.no_grad()
def test_frames_of_a_video_become_as_many_tokens_as_an_image_has_whatever_their_order(name, tmp_path):
    model = copy.deepcopy(tiny(name))
    module, batch = folder_of(tmp_path, model, "views"), make(name, "video")
    method, frames = me.load(tmp_path, over="frames"), batch["pixel_values_videos"]
    assert me.load(tmp_path).over == "views" and frames.shape[1] > 1
    prepared = me.prepare(model, method, **batch)
    (made,) = tokens_of(prepared, "video")
    torch.testing.assert_close(made, by_hand(model, module, frames[0]), atol=1e-4, rtol=1e-4)
    (report,) = prepared.report.images
    assert (report.modality, report.kept, report.grid) == ("video", SIDE * SIDE, (SIDE, SIDE)) and report.full > report.kept
    turned = {**batch, "pixel_values_videos": frames.flip(1)}
    torch.testing.assert_close(tokens_of(me.prepare(model, method, **turned), "video")[0], made, atol=1e-5, rtol=1e-5)
    shape = shape_of(model.config)
    if name == "llava_next_video":  # whose usual picture is a video
        with installed(model, method):
            found, counted = cost(shape, method=method), count(model, shape, method)
        assert (found.vision, found.compress, found.prefill) == (counted.vision, counted.compress, counted.prefill)
    me.wrap(model, method)
    answers = [model.generate(**b, max_new_tokens=4, do_sample=False) for b in (batch, turned)]
    assert torch.equal(*answers)
    both = model.generate(**make(name, "video", "one image"), max_new_tokens=4, do_sample=False)
    alone = model.generate(**make(name, "one image"), max_new_tokens=4, do_sample=False)
    assert torch.equal(both[:, -4:], torch.cat([answers[0][:, -4:], alone[:, -4:]]))


@torch.no_grad()
def test_views_of_an_image_become_one_set_and_are_counted(tmp_path):
    model, name = copy.deepcopy(tiny("llava_next")), "llava_next"
    module, batch = folder_of(tmp_path, model, "views"), make(name, "one image")
    method, pixels = me.load(tmp_path), batch["pixel_values"].flatten(0, 1)
    prepared = me.prepare(model, method, **batch)
    assert len(pixels) > 1 and [i.kept for i in prepared.report.images] == [SIDE * SIDE]
    torch.testing.assert_close(tokens_of(prepared, "image")[0], by_hand(model, module, pixels), atol=1e-4, rtol=1e-4)
    apart = me.prepare(model, f"tokenflex:tokens={SIDE * SIDE},weights={tmp_path}", **batch)  # the same weights, views by themselves
    assert apart.report.images[0].kept == SIDE * SIDE * len(pixels)
    shape = shape_of(model.config)
    with installed(model, method):
        found, counted = cost(shape, method=method), count(model, shape, method)
    assert (found.vision, found.compress, found.prefill) == (counted.vision, counted.compress, counted.prefill)
    with pytest.raises(me.UnsupportedModelError, match="with over= joins views or frames"):
        require_served(method)


@torch.no_grad()
def test_distilling_a_set_fits_the_mean_of_its_views():
    model = copy.deepcopy(tiny("llava_next"))
    adapter, own = adapter_for(model), model.model.multi_modal_projector
    module = TokenFlexProjector(*adapter.projector_widths, layers="mlp", over="views")
    missing, unknown = module.load_state_dict(own.state_dict(), strict=False)
    assert not unknown and all(name.startswith("across.") for name in missing)
    method, batch = me.TokenFlex(tokens=SIDE * SIDE, weights="random", over="views"), make("llava_next", "one image")
    model.model.multi_modal_projector = module
    found = TrainingModel(model, adapter, method, own).distil(method, {**batch, "labels": batch["input_ids"]})["loss"]
    features = adapter.before_projector(adapter.items(batch))
    made, wanted = module(features, side=SIDE, sets=[len(features)]), TokenFlexProjector.pool(module, own(features), SIDE).mean(0)
    torch.testing.assert_close(found, (made[0] - wanted).square().mean() / wanted.var())


@pytest.mark.parametrize("name, over, message", [
    ("llava", "views", "over=views has no effect on LlavaForConditionalGeneration, whose images have no views"),
    ("llava", "frames", "whose images have no frames"), ("llava_next", "frames", "whose images have no frames"),
    ("llava", "tiles", "over='tiles' is not one of image, views, frames"), ("llava_onevision", "views", "this call has a video"),
    ("llava_onevision", "image", "this call has a video"),
])  # fmt: skip
def test_models_without_frames_or_views_are_one_line(name, over, message, tiny_llava, make_batch):
    model, batch = (tiny_llava, make_batch("one image")) if name == "llava" else (tiny(name), {})
    with pytest.raises(me.MllmEfficientError, match=message) as caught:
        method = me.build(f"tokenflex:tokens=4,weights=random,over={over}")
        me.prepare(model, method, **(batch or make(name, "video" if name == "llava_onevision" else "one image")))
    assert "\n" not in str(caught.value)


def test_weights_for_views_by_themselves_cannot_join_them(tmp_path):
    model = tiny("llava_next")
    folder_of(tmp_path, model, "image")
    with pytest.raises(me.CountMismatchError, match="are for views by themselves"):
        me.prepare(model, f"tokenflex:tokens=4,over=views,weights={tmp_path}", **make("llava_next", "one image"))
