"""Attention and keys of towers whose patches are merged to tokens: Qwen-VL, InternVL and Cohere2 Vision, against eager towers.

The published ports to such towers (VisionZip and VisPruner on Qwen2.5-VL) take, for a patch, what it receives from all others in the
last block. The references here have whole attention matrices, and place every token by its row and column.
"""

from __future__ import annotations

import copy
import dataclasses
import sys

import pytest
import torch
import transformers

import mllm_efficient as me
from mllm_efficient.compressors.base import generator_for
from mllm_efficient.measure.counter import Counted, count
from mllm_efficient.measure.flops import cost, shape_of
from mllm_efficient.patches import adapter_for
from mllm_efficient.patches.rules import rules_class
from mllm_efficient.patches.sizes import Plain
from mllm_efficient.patches.tower import attention as watching
from mllm_efficient.patches.tower.packed import window_order

from ..families import FAMILIES, make, tiny
from ..families_reference import Kept, greedy, splice, visuals

PACKED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
SHUFFLED = ("internvl", "cohere2_vision")
METHODS = [me.FasterVLM, me.VisPruner, me.Scope, me.VisionZip, me.PruMergePlus]
MERGING = (me.VisionZip, me.PruMergePlus)
BOTH = frozenset({"attention", "keys"})
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def windowed_last():
    """A Qwen2.5-VL whose last block attends in windows, which no released one does."""
    model = tiny("qwen2_5_vl")
    model.model.visual.fullatt_block_indexes = [0]
    model.config.vision_config.fullatt_block_indexes = [0]
    return model


def eager_packed(model, inputs, monkeypatch):
    """(P,) attention received in sum, and (P, d) keys, of the last block, patches in the tower's order; of each modality."""
    host, last = sys.modules[type(model.model).__module__], model.model.visual.blocks[-1].attn
    eager, found = host.eager_attention_forward, []

    def look(module, query, key, *args, **kwargs):
        out, weights = eager(module, query, key, *args, **kwargs)
        if module is last:
            found.append((weights[0].mean(0).sum(0), key[0].mean(0)))
        return out, weights

    model.set_attn_implementation("eager")
    monkeypatch.setattr(host, "eager_attention_forward", look)
    out = {}
    for modality, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if pixels in inputs:
            found.clear()
            with torch.no_grad():
                getattr(model.model, f"get_{modality}_features")(inputs[pixels], inputs[f"{modality}_grid_thw"], return_dict=True)
            out[modality] = tuple(torch.cat(parts) for parts in zip(*found))
    return out


def slow_places(grids, window):
    """The place in prompt order of every token in the tower's order: windows row by row, tokens row by row in each."""
    places, before = [], 0
    for frames, rows, columns in grids:
        for frame in range(frames):
            for top in range(0, rows, window or rows):
                for left in range(0, columns, window or columns):
                    for r in range(top, min(top + (window or rows), rows)):
                        for c in range(left, min(left + (window or columns), columns)):
                            places.append(before + (frame * rows + r) * columns + c)
        before += frames * rows * columns
    return places


@pytest.mark.parametrize("row", ["one image", "two images", "video and image"])
@pytest.mark.parametrize("build", [*PACKED, windowed_last], ids=lambda b: b if isinstance(b, str) else "windowed last")
def test_a_packed_tower_gives_what_an_eager_one_has(build, row, monkeypatch):
    model = build() if callable(build) else tiny(build)
    name = "qwen2_5_vl" if callable(build) else build
    inputs, adapter = make(name, row), adapter_for(model)
    encodings = adapter.encode(adapter.items(inputs), BOTH)
    expected = eager_packed(copy.deepcopy(model), inputs, monkeypatch)
    assert sum(len(e.features) for e in encodings) == sum(len(a) for a, _ in expected.values()) // 4
    for modality, (attention, keys) in expected.items():
        grids = [(t, h // 2, w // 2) for t, h, w in inputs[f"{modality}_grid_thw"].tolist()]
        places = slow_places(grids, 2 if name == "qwen2_5_vl" else 0)
        received, key = [0.0] * len(places), [None] * len(places)
        for i, place in enumerate(places):
            received[place], key[place] = float(sum(attention[4 * i : 4 * i + 4])), sum(keys[4 * i : 4 * i + 4]) / 4
        start = 0
        for e, (t, h, w) in zip([e for e in encodings if e.shape.modality == modality], grids):
            n = t * h * w
            torch.testing.assert_close(e.attention, torch.tensor(received[start : start + n]) / (4 * n), **CLOSE)
            torch.testing.assert_close(e.keys, torch.stack(key[start : start + n]), **CLOSE)
            assert float(e.attention.sum()) == pytest.approx(1, abs=1e-5)
            start += n


@pytest.mark.parametrize("window", [1, 2, 3, 8])
def test_windows_are_those_of_transformers(window):
    from transformers import vision_utils

    grids = [(1, 5, 7), (2, 3, 2), (1, 1, 9), (3, 8, 4)]
    whole = torch.tensor([(t, 2 * h, 2 * w) for t, h, w in grids])
    index, _ = vision_utils.get_vision_window_index(whole, spatial_merge_size=2, window_size=window * 28, patch_size=14)
    assert window_order(grids, window).tolist() == index.tolist() == slow_places(grids, window)


def normed_internvl():
    """InternVL3's larger towers have norms of queries and keys, and scales on both branches of a block."""
    config = copy.deepcopy(tiny("internvl").config)
    config.vision_config.use_qk_norm, config.vision_config.layer_scale_init_value = True, 0.3
    torch.manual_seed(0)
    return transformers.InternVLForConditionalGeneration(config).eval()


@pytest.mark.parametrize(
    "build, layer",  # cohere2_vision has no setting for the layer
    [(build, layer) for build in (*SHUFFLED, normed_internvl) for layer in (-1, -2, 1) if build != "cohere2_vision" or layer == -1],
    ids=lambda b: "normed" if callable(b) else str(b),
)
def test_a_shuffled_tower_gives_what_an_eager_one_has(build, layer):
    model, name = build() if callable(build) else tiny(build), "internvl" if callable(build) else build
    if name == "internvl":
        model.config.vision_feature_layer = layer
    inputs, adapter = make(name, "two images"), adapter_for(model)
    encodings = adapter.encode(adapter.items(inputs), BOTH)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    tower, index, keys = eager.model.vision_tower, {-1: 1, -2: 0, 1: 0}[layer], []
    attentions = [m for n, m in tower.named_modules() if n.endswith(("self_attn", ".attention"))]
    getattr(attentions[index], "k_norm", attentions[index].k_proj).register_forward_hook(lambda m, a, out: keys.append(out))
    with torch.no_grad():
        matrix = tower(inputs["pixel_values"], output_attentions=True).attentions[index]
    key = keys[0].unflatten(-1, (2, -1)).mean(2)
    if name == "internvl":
        matrix, key = matrix.mean(1)[:, 0, 1:], key[:, 1:]
    else:
        matrix = matrix.mean((1, 2))
    expected = []
    for tile, of_keys in zip(matrix, key):  # 6 x 6 patches
        for r in range(3):
            for c in range(3):
                patches = [6 * (2 * r + i) + 2 * c + j for i in (0, 1) for j in (0, 1)]
                expected.append((sum(tile[p] for p in patches), sum(of_keys[p] for p in patches) / 4))
    torch.testing.assert_close(torch.cat([e.attention for e in encodings]), torch.stack([a for a, _ in expected]), **CLOSE)
    torch.testing.assert_close(torch.cat([e.keys for e in encodings]), torch.stack([k for _, k in expected]), **CLOSE)


@pytest.mark.parametrize("at_once", [1, 300, 4096])
def test_a_large_matrix_is_never_whole(at_once, monkeypatch):
    """In pieces of so many entries, and no more memory than a few of them: the pieces are what softmax is given."""
    q, k = torch.randn(2, 3, 50, 4, generator=torch.Generator().manual_seed(0))
    whole = (q @ k.mT / 2).softmax(-1).sum((0, 1)) / 3
    monkeypatch.setattr(watching, "AT_ONCE", at_once)
    seen, softmax = [], torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda x, dim: seen.append(x.numel()) or softmax(x, dim))
    torch.testing.assert_close(watching.received(q, k), whole, **CLOSE)
    assert max(seen) <= max(at_once, 3 * 50) and sum(seen) == 3 * 50 * 50


@pytest.mark.parametrize("name", [*PACKED, *SHUFFLED, "llava_next", "llava_onevision"])
def test_rules_and_adapters_give_the_same(name):
    config = tiny(name).config
    gives = adapter_for(tiny(name)).gives
    assert gives == rules_class(name)(name, config).gives == rules_class(name)(name, Plain(config.to_dict())).gives
    assert gives >= BOTH and ("clip_text" in gives) == (name == "llava_next")


# ------------------------------------------------------------------------------------------------ in models


def reference(name, model, method, inputs):
    """The row with what the method keeps of the stock features, put together by hand; merged tokens where one of them stood."""
    found, adapter = visuals(name, model, inputs), adapter_for(model)
    encodings = {modality: [] for modality in ("image", "video")}
    for e in adapter.encode(adapter.items(inputs), BOTH):
        encodings[e.shape.modality].append(e)
    left = []
    for visual in found:
        e = encodings[visual.modality].pop(0)
        k, grid = max(1, round(method.keep * visual.n)), e.shape.grid
        v = me.VisualTokens(visual.tokens, grid, attention=e.attention, keys=e.keys, generator=generator_for(method, 0))
        done = method.compress(v, k)
        stay = torch.zeros(visual.n, dtype=torch.bool)
        stay[done.indices if done.places is None else done.places] = True
        deep = [method.compress(dataclasses.replace(v, features=d), k).features if done.indices is None else d[stay] for d in visual.deep]
        left.append(Kept(stay, done.features, tuple(deep)))
    return splice(name, model, inputs, found, left, "keep" if FAMILIES[name].mrope else "renumber")


@pytest.mark.parametrize(
    "name, row", [(name, row) for name in (*PACKED, *SHUFFLED) for row in ("two images", "video and image") if row in FAMILIES[name].rows]
)
@pytest.mark.parametrize("cls", METHODS)
def test_greedy_equals_the_slow_reference(cls, name, row):
    model, inputs, method = tiny(name), make(name, row), cls(keep=0.4)
    expected = greedy(model, reference(name, model, method, inputs))
    with me.compressed(model, method):
        out = model.generate(**inputs, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
        report = me.last_report(model)
    assert out.tolist() == expected
    assert report.positions == ("keep" if FAMILIES[name].mrope else "renumber")
    assert all((i.indices is None) == (cls in MERGING) for i in report.images)


@pytest.mark.parametrize("name", [*PACKED, *SHUFFLED])
@pytest.mark.parametrize("cls", METHODS)
def test_batch_equals_one_by_one(cls, name):
    model, rows = tiny(name), ("one image", "two images", "text only", *(["video"] if FAMILIES[name].video else []))
    with me.compressed(model, cls(keep=0.3)):
        batch = make(name, *rows)
        together = model.generate(**batch, max_new_tokens=4)[:, batch["input_ids"].shape[1] :]
        for row, kind in enumerate(rows):
            one = make(name, kind)
            assert torch.equal(model.generate(**one, max_new_tokens=4)[0, one["input_ids"].shape[1] :], together[row]), kind


@pytest.mark.parametrize("spec", ["visionzip:keep=0.3,positions=keep", "prumerge_plus:keep=0.3,positions=keep,per=tile"])
def test_merged_tokens_with_a_place_keep_its_position(spec):
    """On a model of 1-D positions too: what its forward is given is the full prompt's positions at the columns that stay."""
    model, inputs = tiny("llava_next"), make("llava_next", "one image")
    prepared = me.prepare(model, spec, **inputs)
    positions = prepared.model_kwargs["position_ids"][0]
    assert positions.tolist() == prepared.visual_keep_mask[0].logical_or(inputs["input_ids"][0] != model.config.image_token_id).nonzero()[
        :, 0
    ].tolist()  # fmt: skip
    assert prepared.report.positions == "keep" and prepared.report.images[0].indices is None
    method, (e,) = me.build(spec), adapter_for(model).encode(adapter_for(model).items(inputs), BOTH)
    if method.per == "image":
        tokens = e.features[e.shape.token_slots]
        places = method.compress(me.VisualTokens(tokens, attention=e.attention, keys=e.keys), prepared.report.images[0].kept).places
        first = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[0])
        assert set((first + e.shape.token_slots[places]).tolist()) < set(positions.tolist())


def test_tokens_merged_in_no_place_keep_no_position():
    with pytest.raises(me.MllmEfficientError, match="tome merges tokens, and a merged token has no old position"):
        me.build("tome:keep=0.3,positions=keep")
    with pytest.raises(me.UnsupportedModelError, match="tome merges by content, and the features that .* adds in later layers"):
        me.wrap(tiny("qwen3_vl"), "tome:keep=0.3")


@pytest.mark.parametrize("name", [*PACKED, *SHUFFLED])
@pytest.mark.parametrize("cls", METHODS)
def test_it_costs_what_torch_counts(name, cls):
    model, method = tiny(name), cls(keep=0.4)
    shape, call = shape_of(model.config, "tiny", FAMILIES[name].settings), {"text_tokens": 9, "batch_size": 2, "new_tokens": 2}
    closed = cost(shape, method=method, **call)
    assert count(model, shape, method, **call) == Counted(closed.vision, closed.compress, closed.prefill, closed.decode)
    assert closed.vision > cost(shape, **call).vision


def test_a_tower_that_was_compiled_before_is_watched():
    """Code that was compiled without hooks runs none: the tower is then run as it is written."""
    model, inputs = tiny("qwen2_5_vl"), make("qwen2_5_vl", "one image")
    adapter = adapter_for(model)
    (expected,) = adapter.encode(adapter.items(inputs), BOTH)
    model.model.visual.blocks[-1].attn.compile(backend="eager")
    with torch.no_grad():
        adapter.encode(adapter.items(inputs))
    (found,) = adapter.encode(adapter.items(inputs), BOTH)
    torch.testing.assert_close(found.attention, expected.attention)
    torch.testing.assert_close(found.keys, expected.keys)


@pytest.mark.parametrize("name", PACKED)
def test_a_version_that_hands_on_less_is_named(name, monkeypatch):
    model, inputs = tiny(name), make(name, "one image")
    adapter = adapter_for(model)
    tower = model.model.visual

    def positional(x, cu_seqlens, **kwargs):
        return x + tower.blocks[-1].attn(tower.blocks[-1].norm1(x), cu_seqlens, position_embeddings=kwargs["position_embeddings"])

    monkeypatch.setattr(tower.blocks[-1], "forward", positional)
    with pytest.raises(me.UnsupportedModelError, match="this version of transformers does not hand .* attention and keys are computed"):
        adapter.encode(adapter.items(inputs), BOTH)
