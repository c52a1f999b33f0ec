"""TokenFLEX: the projector against its formulas, the method in every host against the model with that projector put in by hand."""

from __future__ import annotations

import copy
import math
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import mllm_efficient as me
from mllm_efficient.patches import adapter_for
from mllm_efficient.trained import folder as trained
from mllm_efficient.trained.base_model import base_of
from mllm_efficient.trained.projector import TokenFlexProjector

from ..families import FAMILIES, make, tiny
from ..families_reference import Kept, greedy, splice, visuals

NEW = dict(max_new_tokens=6)
HOSTS = ("llava_next", "llava_next_video", "llava_onevision")


# ------------------------------------------------------------------------------------------------ the projector


def slow_pool(features, grid, side, pooling):
    """(side * side, D) of (rows * columns, D), cell by cell from the formulas of the paper and of the released model."""
    rows, columns = grid
    plane = features.double().view(rows, columns, -1)
    if pooling == "adaptive":
        cells = []
        for i in range(side):
            for j in range(side):
                top, bottom = math.floor(i * rows / side), math.ceil((i + 1) * rows / side)
                left, right = math.floor(j * columns / side), math.ceil((j + 1) * columns / side)
                cells.append(plane[top:bottom, left:right].mean((0, 1)))
        return torch.stack(cells)
    high, wide = (side * math.ceil(n / side) for n in grid)

    def at(i, j):
        """The bilinear value of the larger grid's point (i, j), whose corners are the smaller one's corners."""
        y = i * (rows - 1) / (high - 1) if high > 1 else 0.0
        x = j * (columns - 1) / (wide - 1) if wide > 1 else 0.0
        y0, x0 = min(math.floor(y), rows - 1), min(math.floor(x), columns - 1)
        y1, x1 = min(y0 + 1, rows - 1), min(x0 + 1, columns - 1)
        v, u = y - y0, x - x0
        return (1 - v) * ((1 - u) * plane[y0, x0] + u * plane[y0, x1]) + v * ((1 - u) * plane[y1, x0] + u * plane[y1, x1])

    window = high // side, wide // side
    cells = []
    for i in range(side):
        for j in range(side):
            inside = [at(i * window[0] + a, j * window[1] + b) for a in range(window[0]) for b in range(window[1])]
            cells.append(torch.stack(inside).mean(0))
    return torch.stack(cells)


def slow_project(module, x):
    """LayerNorm, then (silu(x W1 + b1) * (x W2 + b2)) W3 + b3, in double precision."""
    w = {k: v.double() for k, v in module.state_dict().items()}
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * w["norm.weight"] + w["norm.bias"]
    gate, up = x @ w["gate.weight"].T + w["gate.bias"], x @ w["up.weight"].T + w["up.bias"]
    return (gate * torch.sigmoid(gate) * up) @ w["down.weight"].T + w["down.bias"]


@pytest.mark.parametrize("pooling", ["bilinear", "adaptive"])
@pytest.mark.parametrize("grid, side", [
    ((27, 27), 8), ((27, 27), 12), ((27, 27), 16), ((5, 7), 3), ((7, 5), 4), ((6, 6), 3), ((6, 6), 6), ((6, 6), 1), ((1, 1), 1),
    ((3, 3), 5), ((1, 4), 2), ((2, 2), 7),
])  # fmt: skip
def test_the_projector_equals_the_formulas(grid, side, pooling):
    torch.manual_seed(0)
    module = TokenFlexProjector(8, 12, pooling=pooling).eval()
    features = torch.randn(2, grid[0] * grid[1], 8)
    out = module(features, side=side, grid=grid)
    assert out.shape == (2, side * side, 12)
    for one, given in zip(out, features):
        pooled = slow_pool(given, grid, side, pooling)
        torch.testing.assert_close(module.pool(given[None], side, grid)[0].double(), pooled, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one.double(), slow_project(module, pooled), atol=1e-5, rtol=1e-5)
    assert torch.equal(out, module(features, side=side, grid=grid))


def test_the_poolings_differ_where_the_side_does_not_divide_the_grid_and_agree_where_it_does():
    features = torch.randn(1, 36, 8)
    bilinear, adaptive = TokenFlexProjector(8, 8), TokenFlexProjector(8, 8, pooling="adaptive")
    torch.testing.assert_close(bilinear.pool(features, 3), adaptive.pool(features, 3))
    assert not torch.allclose(bilinear.pool(features, 4), adaptive.pool(features, 4), atol=1e-3)


def test_the_parameters_are_those_of_the_paper_and_do_not_depend_on_the_count():
    with torch.device("meta"):
        module = TokenFlexProjector(1152, 3584)
    assert sum(p.numel() for p in module.parameters()) == 20_361_728  # 20.36 M


def test_gradients_reach_every_parameter_and_the_features_at_every_count():
    module = TokenFlexProjector(8, 12)
    for side in (1, 3, 4, 6, 9):
        features = torch.randn(2, 36, 8, requires_grad=True)
        module.zero_grad()
        module(features, side=side).square().sum().backward()
        assert features.grad is not None and features.grad.abs().sum() > 0
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_without_a_side_every_feature_becomes_a_token():
    module = TokenFlexProjector(8, 12)
    features = torch.randn(2, 36, 8)
    torch.testing.assert_close(module(features), module(features, side=6))


def test_the_mlp_control_is_llavas_own_projector_on_pooled_features(tiny_llava):
    own = tiny_llava.model.multi_modal_projector
    module = TokenFlexProjector(32, 32, layers="mlp")
    module.load_state_dict(own.state_dict())
    features = torch.randn(1, 36, 32)
    torch.testing.assert_close(module(features, side=3), own(module.pool(features, 3)))


@pytest.mark.parametrize("call, message", [
    (lambda: TokenFlexProjector(8, 8, pooling="max"), "pooling=.max. of a TokenFLEX projector: bilinear, adaptive"),
    (lambda: TokenFlexProjector(8, 8)(torch.zeros(1, 35, 8), side=2), "35 features form no square"),
    (lambda: TokenFlexProjector(8, 8)(torch.zeros(1, 35, 8), side=2, grid=(5, 6)), "no grid of 5 x 6"),
    (lambda: TokenFlexProjector(8, 8)(torch.zeros(1, 36, 8), side=0), "at least 1"),
])  # fmt: skip
def test_bad_calls_of_the_projector_are_one_line(call, message):
    with pytest.raises(me.MllmEfficientError, match=message):
        call()


# ------------------------------------------------------------------------------------------------ the method


@pytest.mark.parametrize("spec, message", [
    ("tokenflex:tokens=35", "no square: 25 and 36 are"),
    ("tokenflex:tokens=9,per=tile", "leave per="),
    ("tokenflex:tokens=9,newline=keep", "leave per= and newline="),
    ("tokenflex", "no budget"),
    ("tokenflex:tokens=0", "tokens=0"),
    ("none@divprune", "no weights of its own"),
    ("none@tokenflex:tokens=36", "a method without its budget is wanted"),
    ("none@", "a method without its budget is wanted"),
    ({"method": "tokenflex", "tokens": 9, "weights": 5}, "no folder or hub id"),
])  # fmt: skip
def test_bad_specifications_are_one_line(spec, message):
    with pytest.raises(me.MllmEfficientError, match=message):
        me.build(spec)


def test_a_fraction_becomes_the_largest_square():
    assert me.TokenFlex(keep=0.5).side((12, 12)) == 8  # 72 tokens
    assert me.TokenFlex(keep=0.25).side((12, 12)) == 6
    assert me.TokenFlex(keep=1).side((12, 12)) == 12


def random_folder(tmp_path, model, delta=None, **sizes):
    """A trained folder for a model, its weights random."""
    adapter = adapter_for(model)
    torch.manual_seed(5)
    module = TokenFlexProjector(*adapter.projector_widths, **sizes)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    trained.save(tmp_path, me.TokenFlex(tokens=9), module, base_of(model))
    if delta is not None:
        trained.save_delta(tmp_path, delta)
    return module.eval()


class ByHand(nn.Module):
    def __init__(self, module, side):
        super().__init__()
        self.module, self.side = module, side

    def forward(self, features):
        return self.module(features, side=self.side)


@pytest.mark.parametrize("side", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_llava_equals_the_model_with_the_projector_put_in_by_hand(make_llava, make_batch, tmp_path, side, tower):
    strategy = {} if tower == "clip" else {"vision_feature_select_strategy": "full"}
    model = make_llava(tower=tower, **strategy)
    batch = make_batch("one image", "two images", "text only")
    module = random_folder(tmp_path, model)
    by_hand = copy.deepcopy(model)
    by_hand.model.multi_modal_projector = ByHand(module, side)
    image, n = model.config.image_token_id, side * side
    me.wrap(model, me.TokenFlex(tokens=n, weights=str(tmp_path)))
    out = model.generate(**batch, **NEW)[:, batch["input_ids"].shape[1] :]
    report = me.last_report(model)
    assert [i.kept for i in report.images] == [n] * 3 and all(i.indices is None and i.grid == (side, side) for i in report.images)
    pixel = 0
    for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"])):
        ids = ids[mask.bool()]
        images = int((ids == image).sum()) // 36
        short, seen = [], 0
        for token in ids.tolist():
            seen = seen + 1 if token == image else 0
            if token != image or (seen - 1) % 36 < n:
                short.append(token)
        pixels = {"pixel_values": batch["pixel_values"][pixel : pixel + images]} if images else {}
        pixel += images
        alone = by_hand.generate(input_ids=torch.tensor([short]), **pixels, **NEW)[0, len(short) :]
        assert torch.equal(out[row], alone), row


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("side", [1, 2, 3])
def test_anyres_hosts_give_every_view_its_tokens_and_equal_the_slow_reference(name, side, tmp_path):
    model = copy.deepcopy(tiny(name))
    rows = ("one image", "text only", "long text")
    batch = make(name, *rows)
    module = random_folder(tmp_path, model)
    with me.compressed(model, me.TokenFlex(tokens=side * side, weights=str(tmp_path))):
        out = model.generate(**batch, **NEW)[:, batch["input_ids"].shape[1] :]
        report = me.last_report(model)
    images = iter(report.images)
    for row, kind in enumerate(rows):
        inputs = make(name, kind)
        found = visuals(name, model, inputs)
        kept = []
        for visual in found:
            pixels = inputs["pixel_values"].flatten(0, 1) if inputs["pixel_values"].ndim == 5 else inputs["pixel_values"]
            hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[model.config.vision_feature_layer]
            if model.config.vision_feature_select_strategy == "default":
                hidden = hidden[:, 1:]
            features = torch.cat([module(view[None], side=side)[0] for view in hidden])
            stay = torch.arange(len(visual.features)) < len(features)
            kept.append(Kept(stay, features))
            image = next(images)
            assert image.kept == len(features) == side * side * len(hidden) and len(image.kept_planes) == len(hidden)
        assert out[row].tolist() == greedy(model, splice(name, model, inputs, found, kept, "renumber")), kind


def test_a_large_count_for_which_the_prompt_has_no_room_is_an_error(tmp_path):
    model = tiny("llava_next")
    random_folder(tmp_path, model)
    batch = make("llava_next", "touching images")  # most of a very long picture's canvas is padding
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    with pytest.raises(me.BadBudgetError, match="the prompt has room for"):
        me.prepare(model, me.TokenFlex(tokens=side * side, weights=str(tmp_path)), **batch)


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(HOSTS)))
def test_other_hosts_are_refused(name):
    for spec in ("tokenflex:tokens=4,weights=random", "none@tokenflex:weights=random"):
        with pytest.raises(me.UnsupportedModelError, match="projector"):
            me.wrap(tiny(name), spec)


def test_a_video_is_refused(tmp_path):
    name = "llava_onevision"
    with pytest.raises(me.UnsupportedModelError, match="video"):
        me.prepare(tiny(name), "tokenflex:tokens=4,weights=random", **make(name, "video"))


def test_counts_change_between_calls_without_touching_weights(tiny_llava, make_batch, tmp_path):
    random_folder(tmp_path, tiny_llava)
    batch, weights = make_batch("one image"), f"weights={tmp_path}"
    me.wrap(tiny_llava, f"tokenflex:tokens=9,{weights}")
    before = {k: (v.data_ptr(), v.clone()) for k, v in tiny_llava.state_dict().items()}
    for tokens in (1, 4, 9, 16, 25, 36):
        tiny_llava.generate(**batch, **NEW, compression=f"tokenflex:tokens={tokens},{weights}")
        assert me.last_report(tiny_llava).visual_tokens_kept == tokens
    after = tiny_llava.state_dict()
    assert all(after[k].data_ptr() == where and torch.equal(after[k], value) for k, (where, value) in before.items())


def test_all_tokens_are_the_projector_on_every_feature(tiny_llava, make_batch, tmp_path):
    """``compression=None`` on a wrapped model, ``none@tokenflex`` and keep=1 are one thing."""
    random_folder(tmp_path, tiny_llava)
    batch, weights = make_batch("one image", "two images", "text only"), f"weights={tmp_path}"
    me.wrap(tiny_llava, f"tokenflex:tokens=9,{weights}")
    off = tiny_llava.generate(**batch, **NEW, compression=None)
    assert torch.equal(off, tiny_llava.generate(**batch, **NEW, compression=f"tokenflex:keep=1,{weights}"))
    me.unwrap(tiny_llava)
    with me.compressed(tiny_llava, f"none@tokenflex:{weights}"):
        assert torch.equal(off, tiny_llava.generate(**batch, **NEW))
    assert not torch.equal(off, tiny_llava.generate(**batch, **NEW))


def test_other_weights_on_a_wrapped_model_are_an_error(tiny_llava, make_batch, tmp_path):
    random_folder(tmp_path, tiny_llava)
    me.wrap(tiny_llava, f"tokenflex:tokens=9,weights={tmp_path}")
    with pytest.raises(me.MllmEfficientError, match="the model holds"):
        tiny_llava.generate(**make_batch("one image"), **NEW, compression="tokenflex:tokens=9,weights=random")


def test_unwrap_leaves_the_model_as_it_was(tiny_llava, make_batch, tmp_path):
    delta = {k: v + 1 for k, v in tiny_llava.named_parameters() if "layers.0" in k and "language_model" in k}
    random_folder(tmp_path, tiny_llava, {**delta, "model.language_model.embed_tokens.weight": tiny_llava.get_input_embeddings().weight * 2})
    modules, weights = list(tiny_llava.modules()), {k: (v, v.detach().clone()) for k, v in tiny_llava.named_parameters()}
    batch = make_batch("one image")
    stock = tiny_llava.generate(**batch, **NEW)
    me.wrap(tiny_llava, f"tokenflex:tokens=9,weights={tmp_path}")
    assert not torch.equal(stock, tiny_llava.generate(**batch, **NEW, compression=None))
    me.unwrap(tiny_llava)
    assert [id(m) for m in tiny_llava.modules()] == [id(m) for m in modules]
    now = dict(tiny_llava.named_parameters())
    assert all(now[k] is v and torch.equal(v, value) for k, (v, value) in weights.items()) and set(now) == set(weights)
    assert torch.equal(stock, tiny_llava.generate(**batch, **NEW))


def test_a_wrapped_copy_works_and_unwraps_on_its_own(tiny_llava, make_batch, tmp_path):
    random_folder(tmp_path, tiny_llava, {"model.language_model.norm.weight": tiny_llava.model.language_model.norm.weight * 2})
    batch = make_batch("one image")
    stock = tiny_llava.generate(**batch, **NEW)
    me.wrap(tiny_llava, f"tokenflex:tokens=9,weights={tmp_path}")
    wanted = tiny_llava.generate(**batch, **NEW)
    other = copy.deepcopy(tiny_llava)
    me.unwrap(tiny_llava)
    assert torch.equal(other.generate(**batch, **NEW), wanted)
    assert torch.equal(me.unwrap(other).generate(**batch, **NEW), stock)
    assert torch.equal(tiny_llava.generate(**batch, **NEW), stock)


def test_weights_of_the_language_model_come_with_the_projector(tiny_llava, make_batch, tmp_path):
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    delta = {name: torch.randn_like(tiny_llava.get_parameter(name))}
    module = random_folder(tmp_path, tiny_llava, delta)
    batch, spec = make_batch("one image", "two images"), f"tokenflex:tokens=9,weights={tmp_path}"
    with pytest.raises(me.MllmEfficientError, match="trained with the language model"):
        me.prepare(tiny_llava, spec, **batch)
    by_hand = copy.deepcopy(tiny_llava)
    by_hand.load_state_dict(delta, strict=False)
    trained.save(tmp_path / "alone", me.TokenFlex(tokens=9), module, base_of(by_hand))
    wanted = me.wrap(by_hand, f"tokenflex:tokens=9,weights={tmp_path / 'alone'}")(**batch).logits
    assert torch.equal(me.wrap(tiny_llava, spec)(**batch).logits, wanted)


def test_a_lora_is_merged_as_peft_merges_it(tiny_llava, make_batch, tmp_path):
    peft = pytest.importorskip("peft")
    module = random_folder(tmp_path, tiny_llava)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*\.(q_proj|down_proj)", init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(tiny_llava), config)
    model.save_pretrained(tmp_path / trained.DELTA)
    merged = model.merge_and_unload()
    trained.save(tmp_path / "alone", me.TokenFlex(tokens=9), module, base_of(merged))
    batch = make_batch("one image", "two images")
    wanted = me.wrap(merged, f"tokenflex:tokens=9,weights={tmp_path / 'alone'}")(**batch).logits
    torch.testing.assert_close(me.wrap(tiny_llava, f"tokenflex:tokens=9,weights={tmp_path}")(**batch).logits, wanted)


def test_a_spec_without_weights_is_what_the_model_holds(tiny_llava, make_batch, tmp_path):
    random_folder(tmp_path, tiny_llava)
    batch = make_batch("one image")
    me.wrap(tiny_llava, f"tokenflex:tokens=9,weights={tmp_path}")
    for short, long in (("tokenflex:tokens=4", f"tokenflex:tokens=4,weights={tmp_path}"), ("none@tokenflex", None)):
        assert torch.equal(tiny_llava.generate(**batch, **NEW, compression=short), tiny_llava.generate(**batch, **NEW, compression=long))


def test_a_baseline_on_other_weights_is_an_error(tiny_llava, make_batch, tmp_path):
    random_folder(tmp_path, tiny_llava)
    me.wrap(tiny_llava, f"tokenflex:tokens=9,weights={tmp_path}")
    with pytest.raises(me.MllmEfficientError, match="the model holds"):
        tiny_llava.generate(**make_batch("one image"), **NEW, compression="none@tokenflex:weights=random")


def test_a_baseline_on_trained_weights_is_not_lost_in_a_composition(tiny_llava):
    with pytest.raises(me.MllmEfficientError, match="one method at a time|of one kind"):
        me.wrap(tiny_llava, "none@tokenflex:weights=random | divprune:tokens=9")


def test_unwrap_follows_the_model(tiny_llava, make_batch, tmp_path):
    random_folder(tmp_path, tiny_llava, {"model.language_model.norm.weight": tiny_llava.model.language_model.norm.weight * 2})
    batch = make_batch("one image")
    wanted = copy.deepcopy(tiny_llava).bfloat16()
    me.wrap(tiny_llava, f"tokenflex:tokens=9,weights={tmp_path}")
    tiny_llava.to(torch.bfloat16)
    me.unwrap(tiny_llava)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    assert torch.equal(tiny_llava.generate(**batch, **NEW), wanted.generate(**batch, **NEW))


def test_the_explicit_path_follows_the_model_and_the_folder(tiny_llava, make_batch, tmp_path):
    random_folder(tmp_path, tiny_llava)
    batch, spec = make_batch("one image"), f"tokenflex:tokens=9,weights={tmp_path}"
    first = me.prepare(tiny_llava, spec, **batch).features[0][1]
    half = {**batch, "pixel_values": batch["pixel_values"].bfloat16()}
    assert me.prepare(tiny_llava.bfloat16(), spec, **half).features[0][1].dtype == torch.bfloat16
    tiny_llava.float()
    state = load_file(tmp_path / "compressor.safetensors")
    save_file({k: v * 2 for k, v in state.items()}, tmp_path / "compressor.safetensors")
    assert not torch.allclose(me.prepare(tiny_llava, spec, **batch).features[0][1], first)


def test_weights_that_were_replaced_are_seen_whatever_their_times_say(tiny_llava, make_batch, tmp_path):
    random_folder(tmp_path, tiny_llava)
    batch, spec, file = make_batch("one image"), f"tokenflex:tokens=9,weights={tmp_path}", tmp_path / "compressor.safetensors"
    me.wrap(tiny_llava, "none")
    before, times = tiny_llava.generate(**batch, **NEW, compression=spec), file.stat()
    for factor in (-1, 2):
        state = load_file(file)
        save_file({k: v * factor for k, v in state.items()}, file)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert file.stat().st_mtime_ns == times.st_mtime_ns and file.stat().st_size == times.st_size
        features = me.prepare(tiny_llava, spec, **batch).features[0][1]
        with me.compressed(me.unwrap(tiny_llava), spec):
            assert torch.equal(me.prepare(tiny_llava, "tokenflex:tokens=9", **batch).features[0][1], features)
        me.wrap(tiny_llava, "none")
    assert not torch.equal(tiny_llava.generate(**batch, **NEW, compression=spec), before)


def test_weights_are_read_once(tiny_llava, make_batch, tmp_path, monkeypatch):
    random_folder(tmp_path, tiny_llava)
    spec, read = f"tokenflex:tokens=9,weights={tmp_path}", []
    monkeypatch.setattr(trained, "_read", lambda path, stock=trained._read: read.append(path) or stock(path))
    for _ in range(3):
        me.prepare(tiny_llava, spec, **make_batch("one image"))
    assert read == [tmp_path / "compressor.safetensors"]


@pytest.mark.parametrize("where", ["projector", "language model"])
@pytest.mark.parametrize("value, error, message", [
    (float("nan"), me.NotFiniteError, "holds NaN or infinity"), (float("inf"), me.NotFiniteError, "holds NaN or infinity"),
    (torch.float64, me.MllmEfficientError, "is of float64, and weights are of float32"),
    (torch.int32, me.MllmEfficientError, "is of int32"),
])  # fmt: skip
def test_weights_that_are_no_numbers_or_of_another_dtype_are_refused_when_read(tiny_llava, tmp_path, where, value, error, message):
    delta = {"model.language_model.embed_tokens.weight": tiny_llava.get_input_embeddings().weight}
    random_folder(tmp_path, tiny_llava, delta)
    file = tmp_path / ("compressor.safetensors" if where == "projector" else "base_delta/model.safetensors")
    state = load_file(file)
    name = sorted(state)[-1]
    if isinstance(value, float):
        state[name].view(-1)[-1] = value
    else:
        state[name] = state[name].to(value)
    save_file(state, file)
    own = tiny_llava.model.multi_modal_projector
    with pytest.raises(error, match=f"{file.name}: {name} {message}"):
        me.wrap(tiny_llava, f"tokenflex:tokens=9,weights={tmp_path}")
    assert tiny_llava.model.multi_modal_projector is own and not me.is_wrapped(tiny_llava)


def test_a_projector_under_lora_is_refused(tiny_llava, tmp_path):
    peft = pytest.importorskip("peft")
    random_folder(tmp_path, tiny_llava)
    model = peft.get_peft_model(tiny_llava, peft.LoraConfig(r=2, target_modules=["linear_1", "q_proj"]))
    with pytest.raises(me.UnsupportedModelError, match="the projector belongs to a PEFT adapter"):
        me.wrap(model, f"tokenflex:tokens=9,weights={tmp_path}")


def test_weights_under_a_lora_are_refused_and_a_projector_alone_is_not(tiny_llava, make_batch, tmp_path):
    peft = pytest.importorskip("peft")
    random_folder(tmp_path / "alone", tiny_llava)
    random_folder(tmp_path / "both", tiny_llava, {"model.language_model.norm.weight": tiny_llava.model.language_model.norm.weight * 2})
    model = peft.get_peft_model(tiny_llava, peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj"))
    with pytest.raises(me.UnsupportedModelError, match="merge or unload the LoRA first"):
        me.wrap(model, f"tokenflex:tokens=9,weights={tmp_path / 'both'}")
    me.wrap(model, f"tokenflex:tokens=9,weights={tmp_path / 'alone'}")
    assert model.generate(**make_batch("one image"), **NEW).shape[0] == 1


def test_offloaded_models_run_as_those_that_are_not(tiny_llava, make_batch, tmp_path):
    from accelerate import cpu_offload

    random_folder(tmp_path, tiny_llava)
    batch, spec = make_batch("one image", "two images"), f"tokenflex:tokens=9,weights={tmp_path}"
    wanted = me.wrap(copy.deepcopy(tiny_llava), spec).generate(**batch, **NEW)
    language = copy.deepcopy(tiny_llava)
    cpu_offload(language.model.language_model)
    assert torch.equal(me.wrap(language, spec).generate(**batch, **NEW), wanted)
    everything = copy.deepcopy(tiny_llava)
    cpu_offload(everything)
    with pytest.raises(me.UnsupportedModelError, match="the projector is offloaded"):
        me.wrap(everything, spec)


# ------------------------------------------------------------------------------------------------ folders


# ------------------------------------------------------------------------------------------------ cost
