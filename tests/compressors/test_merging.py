"""What a selector does not keep, averaged into what it keeps: against a slow transcription, and what becomes of the rest of a call.

The transcription is plain loops in float64 and shares no code with the package. Cosines are compared to 2^-30 on both sides.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import mllm_efficient as me
from mllm_efficient.apply.prepare import encode

from ..families import FAMILIES, make, tiny
from ..pairs import for_all
from .test_attentive import cosine, drawn, tokens

RULES = ("mean", "similarity")


def slow_merge(x, kept, rule):
    """Rows of the kept tokens, in their order, with the others in them; which kept token each token is part of."""
    groups, weights = [], []
    for i in range(len(x)):
        likeness = {} if i in kept else {j: cosine(x[i], x[j]) for j in kept}
        joined = i if i in kept else min(kept, key=lambda j: (-likeness[j], j))
        groups.append(joined)
        weights.append(1.0 if rule == "mean" or joined == i else max(0.0, likeness[joined]))
    rows = [sum(w * row for w, row, g in zip(weights, x, groups) if g == j) for j in kept]
    return [row / sum(w for w, g in zip(weights, groups) if g == j) for row, j in zip(rows, kept)], groups


@pytest.mark.once
@pytest.mark.parametrize("rule", RULES)
@for_all("seed", range(200))
def test_each_dropped_token_joins_its_nearest_kept_one(seed, rule):
    x, attention, keys, k = drawn(seed)
    v = tokens(x, attention, keys)
    for spec in (f"divprune:tokens={k}", f"divprune:tokens={k},order=picked", f"fastervlm:tokens={k}"):
        plain, out = me.build(spec).compress(v, k), me.build(f"{spec},merge={rule}").compress(v, k)
        assert torch.equal(out.indices, plain.indices)
        kept = out.indices.tolist()
        rows, groups = slow_merge(x, kept, rule)
        assert [kept[g] for g in out.groups] == groups
        assert out.counts.tolist() == [groups.count(j) for j in kept]
        np.testing.assert_allclose(out.features.numpy(), np.stack(rows), rtol=1e-12, atol=1e-12)


def test_of_equally_similar_tokens_the_lowest_index_is_joined():
    """Token 0 is as like token 1 as token 3; in the order of choice token 3 comes first."""
    x = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.9, 0.0], [0.0, 1.0]])
    from mllm_efficient.compressors.merging import join

    for kept in ([1, 3], [3, 1]):
        groups, likeness = join(x, torch.tensor(kept), "m")
        assert [kept[g] for g in groups] == [1, 1, 1, 3] and likeness[1] == likeness[3] == 1


def test_divmerge_is_divprune_that_merges():
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    for settings in ({}, {"metric": "l2"}, {"order": "picked"}):
        one, other = me.DivMerge(tokens=9, **settings), me.DivPrune(tokens=9, merge="mean", **settings)
        a, b = (m.compress(me.VisualTokens(x), 9) for m in (one, other))
        assert torch.equal(a.features, b.features) and torch.equal(a.indices, b.indices)
        assert torch.equal(one.select(x), me.DivPrune(tokens=9, **settings).select(x))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_rows_leave_exactly_k(dtype, rule):
    """Equal, zero and opposite rows, K = 1 and K = N, and sums that half precision does not hold."""
    for x in (torch.ones(9, 4), torch.zeros(9, 4), torch.eye(9), torch.cat([torch.eye(4), -torch.eye(4)]), torch.full((9, 4), 6e4)):
        for k in (1, 2, 5, len(x)):
            out = me.DivMerge(tokens=k, merge=rule).compress(me.VisualTokens(x.to(dtype)), k)
            assert len(out) == k and out.features.dtype == dtype and out.features.isfinite().all()
            assert out.indices.tolist() == sorted(set(out.indices.tolist())) and int(out.counts.sum()) == len(x)
            assert torch.equal(out.groups[out.indices], torch.arange(k))


@pytest.mark.parametrize("spec", ["divmerge:keep=0.4", "scope:keep=0.4,merge=similarity", "vispruner:keep=0.4,merge=mean"])
def test_many_images_at_once_are_each_alone(spec):
    method = me.build(spec)
    parts = [tokens(*drawn(seed)[:3]) for seed in (3, 4, 5)]
    parts += [dataclasses.replace(p, features=p.features.flip(0)) for p in parts]
    ks = [max(1, len(v) // 2) for v in parts]
    for v, k, out in zip(parts, ks, method.compress_alike(parts, ks)):
        alone = method.compress(v, k)
        assert torch.equal(out.features, alone.features) and torch.equal(out.groups, alone.groups)


def test_what_is_merged_learns():
    """The gradient of a kept token's row is shared by all that are in it."""
    x = torch.randn(12, 5, requires_grad=True)
    out = me.DivMerge(tokens=3).compress(me.VisualTokens(x), 3)
    out.features[0].sum().backward()
    inside = out.groups == 0
    torch.testing.assert_close(x.grad[inside], torch.full((int(inside.sum()), 5), 1 / int(inside.sum())))
    assert not x.grad[~inside].any()


def test_a_token_selected_twice_is_refused(registered):
    @registered("twice")
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Twice(me.Selector):
        def select(self, v, k):
            return torch.zeros(k, dtype=torch.long)

    with pytest.raises(me.CountMismatchError, match="twice selected the same visual token twice"):
        me.build("twice:tokens=3,merge=mean").compress(me.VisualTokens(torch.randn(9, 4)), 3)


def test_a_setting_without_effect_is_refused(registered):
    @registered("own_way")
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class OwnWay(me.Selector):
        def compress(self, v, k):
            return me.CompressedTokens(v.features[:k], torch.arange(k))

    with pytest.raises(me.BadSettingError, match="own_way has a compress of its own"):
        me.build("own_way:tokens=3,merge=mean")
    with pytest.raises(me.BadSettingError, match=r"merge='sum' is not one of \('mean', 'similarity'\)"):
        me.build("uniform:tokens=3,merge=sum")
    with pytest.raises(me.BadSettingError, match="divmerge without merge= is divprune"):
        me.DivMerge(tokens=3, merge=None)


# ------------------------------------------------------------------------------------------------ in a model


@pytest.mark.parametrize("per", ["image", "tile", "frame"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_call_is_that_of_the_selection_with_other_features(name, per):
    """Prompt, positions and indices as without merging; features and those of later layers (deepstack) are the means of the groups."""
    model, inputs = tiny(name), make(name, *FAMILIES[name].mixed)
    try:
        plain = me.prepare(model, f"divprune:keep=0.3,per={per}", **inputs)
    except me.UnsupportedModelError:
        with pytest.raises(me.UnsupportedModelError, match=f"per='{per}' has no effect"):
            me.prepare(model, f"divmerge:keep=0.3,per={per}", **inputs)
        return
    merged = me.prepare(model, f"divmerge:keep=0.3,per={per}", **inputs)
    for key, value in plain.tensors.items():
        assert torch.equal(value, merged.tensors[key]), key
    whole = me.prepare(model, "none", **inputs, encoded=encode(model, "divmerge:keep=0.3", **inputs))
    for a, b, full, (_, features, deep), (_, rows, _) in zip(
        plain.report.images, merged.report.images, whole.features, merged.features, plain.features
    ):
        assert torch.equal(a.indices, b.indices) and a.groups is None and a.counts is None
        assert b.counts.tolist() == [int((b.groups == j).sum()) for j in range(b.kept)] and int(b.counts.sum()) == b.full
        assert torch.equal(b.groups[b.indices], torch.arange(b.kept))
        parts = a.frame if per == "frame" and a.frame is not None else a.tile if per == "tile" and a.tile is not None else None
        if parts is not None:
            assert torch.equal(parts, parts[b.indices[b.groups]])  # nothing is merged over the borders of a tile or frame
        stays = slots(a)
        for layer, found in zip((full[1], *full[2]), (features, *deep)):
            among = layer[stays]
            expected = torch.stack([among[b.groups == j].mean(0) for j in range(b.kept)])
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        assert features.shape == rows.shape and (b.kept == b.full or not torch.equal(features, rows))


def slots(image):
    """The places of an image's tokens among its placeholders."""
    from mllm_efficient.tokens import VisualShape

    closing = image.separators_full - sum(p.rows for p in image.planes if p.newline)
    return VisualShape(image.planes, image.modality, closing).token_slots


def test_a_batch_equals_its_rows(make_batch, tiny_llava):
    batch = make_batch("one image", "two images", "long text")
    with me.compressed(tiny_llava, "divmerge:tokens=7"):
        together = tiny_llava.generate(**batch, max_new_tokens=4)[:, batch["input_ids"].shape[1] :]
        for row, kind in enumerate(("one image", "two images", "long text")):
            if kind == "two images":
                continue
            alone = make_batch(kind)
            alone["pixel_values"] = batch["pixel_values"][[0 if row == 0 else 3]]
            ids = tiny_llava.generate(**alone, max_new_tokens=4)[:, alone["input_ids"].shape[1] :]
            assert torch.equal(ids[0], together[row])


def test_keeping_every_token_merges_nothing(make_batch, tiny_llava):
    batch = make_batch("one image")
    expected = tiny_llava.generate(**batch, max_new_tokens=3)
    with me.compressed(tiny_llava, "divmerge:keep=1"):
        assert torch.equal(tiny_llava.generate(**batch, max_new_tokens=3), expected)
        assert me.last_report(tiny_llava).images[0].groups is None


@pytest.mark.parametrize("before", ["", "tokenflex:tokens=16,weights=random | "])
def test_of_tokens_that_go_inside_the_decoder_the_report_says_so(make_batch, tiny_llava, before):
    """What was merged into a token that went is part of none that is left; behind another projector groups are of its tokens."""
    batch, spec = make_batch("one image"), f"{before}divmerge:tokens=8 | fastv:layer=1,ratio=0.5"
    with me.compressed(tiny_llava, spec), torch.no_grad():
        entered = me.prepare(tiny_llava, spec, **batch).planned.images[0]
        tiny_llava(**batch)
        (image,) = me.last_report(tiny_llava).images
    left = image.of_merged if before else image.indices
    assert len(image.groups) == (16 if before else 36) and len(left) == 4 == len(image.counts)
    came = entered.of_merged if before else entered.indices
    for was, now in zip(entered.groups.tolist(), image.groups.tolist()):
        token = int(came[was])
        assert now == (left.tolist().index(token) if token in left.tolist() else -1)
    assert image.counts.tolist() == [int((image.groups == j).sum()) for j in range(4)]
    assert int(image.counts.sum()) < len(image.groups)


def test_what_is_said_of_it(tiny_llava):
    from mllm_efficient.patches import adapter_for

    adapter = adapter_for(tiny_llava)
    assert me.DivMerge(tokens=9).describe(adapter.usual(), adapter) == (
        "divmerge keeps 9 of 36 tokens per image and merges the others into them (removes 75.0%)"
    )
    assert me.DivMerge(keep=1.0).describe(adapter.usual(), adapter) == "divmerge keeps 36 of 36 tokens per image (removes 0.0%)"
