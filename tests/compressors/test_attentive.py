"""Methods that ask the vision tower for attention or keys equal slow transcriptions of their rules.

The transcriptions are plain loops in float64 and share no code with the package. Random cases are given in float64 too. Attention is
drawn from few values in every second case, and of every third case some rows are copies: cosines are compared to 2^-30 on both
sides, because the last bits of copies' differ with where they stand, and the lowest index wins.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import ClassVar

import numpy as np
import pytest
import torch

import mllm_efficient as me

from ..conftest import eager_attention
from ..families import ASPECTS, FAMILIES, make, noise, tiny
from ..pairs import for_all

SEEDS = range(200)


def drawn(seed: int):
    """Features (N, D), attention (N,), keys (N, d) and K."""
    draw = np.random.default_rng(seed)
    n, d = int(draw.integers(2, 40)), int(draw.integers(2, 20))
    x, keys = draw.normal(size=(n, d)), draw.normal(size=(n, 5))
    if seed % 3 == 0:
        same = draw.integers(0, n, n // 3)
        x[same], keys[same] = x[0], keys[0]
    attention = draw.integers(0, 4, n) / 8 if seed % 2 else draw.random(n)
    return x, attention, keys, int(draw.integers(1, n + 1))


def tokens(x, attention, keys, dtype=torch.float64):
    return me.VisualTokens(torch.tensor(x).to(dtype), attention=torch.tensor(attention), keys=torch.tensor(keys))


def cosine(a, b):
    lengths = math.sqrt(sum(v * v for v in a)) * math.sqrt(sum(v * v for v in b))
    return round(sum(p * q for p, q in zip(a, b)) / lengths * 2**30) / 2**30 if lengths else 0.0


def by_attention(attention):
    """All indices, the largest attention first, the lowest index of equal ones."""
    return sorted(range(len(attention)), key=lambda i: (-attention[i], i))


@pytest.mark.once
@for_all("seed", SEEDS)
def test_fastervlm_is_the_top_of_attention(seed):
    x, attention, keys, k = drawn(seed)
    assert me.FasterVLM(tokens=k).select(tokens(x, attention, keys)).tolist() == sorted(by_attention(attention)[:k])


def slow_vispruner(x, attention, k, r):
    important = by_attention(attention)[: int(r * k)]
    rest = [i for i in range(len(x)) if i not in important]
    while len(rest) > k - len(important) and len(important) < k:
        first, between = rest[::2], rest[1::2]
        likeness = {i: max(cosine(x[i], x[j]) for j in between) for i in first}
        gone = sorted(first, key=lambda i: (-likeness[i], i))[: min(8, len(rest) - (k - len(important)))]
        rest = [i for i in rest if i not in gone]
    return sorted(important + (rest if len(important) < k else []))


@pytest.mark.once
@for_all("seed", SEEDS)
def test_vispruner_is_the_slow_removal_of_duplicates(seed):
    x, attention, keys, k = drawn(seed)
    for r in (0.5, 0.2, 1.0, 0.0):
        found = me.VisPruner(tokens=k, r=r).select(tokens(x, attention, keys)).tolist()
        assert found == slow_vispruner(x, attention, k, r)


def slow_scope(x, attention, k, alpha):
    n = len(x)
    alike = [[cosine(x[u], x[v]) for v in range(n)] for u in range(n)]
    cover, chosen = [0.0] * n, []
    for _ in range(k):
        gains = {v: math.fsum(max(0.0, alike[u][v] - cover[u]) for u in range(n)) * float(np.float32(attention[v] ** alpha))
                 for v in range(n) if v not in chosen}  # fmt: skip
        best = max(gains.values())
        chosen.append(min(v for v, gain in gains.items() if gain >= best * (1 - 1e-9)))
        cover = [max(c, alike[u][chosen[-1]]) for u, c in enumerate(cover)]
    return chosen


@pytest.mark.once
@for_all("seed", SEEDS)
def test_scope_is_the_slow_greedy_coverage(seed):
    x, attention, keys, k = drawn(seed)
    for alpha in (1.0, 0.0, 1.5):
        assert me.Scope(tokens=k, alpha=alpha).select(tokens(x, attention, keys)).tolist() == sorted(slow_scope(x, attention, k, alpha))


def slow_visionzip(x, attention, keys, k, share):
    c = min(round(share * k), k - 1)
    order = by_attention(attention)
    dominant, rest = order[: k - c], sorted(order[k - c :])
    rows = {i: x[i] for i in dominant}
    if c and len(rest) > c:
        targets = [rest[i * (len(rest) // c)] for i in range(c)]
        joined = {t: [] for t in targets}
        for i in rest:
            if i not in targets:
                joined[max(targets, key=lambda t: (cosine(keys[i], keys[t]), -t))].append(x[i])
        rows |= {t: x[t] + (np.mean(joined[t], axis=0) if joined[t] else 0) for t in targets}
    else:
        rows |= {i: x[i] for i in rest[:c]}
    return np.stack([rows[i] for i in sorted(rows)])


@pytest.mark.once
@for_all("seed", SEEDS)
def test_visionzip_is_the_slow_merge(seed):
    x, attention, keys, k = drawn(seed)
    for share in (10 / 64, 0.5, 0.0):
        out = me.VisionZip(tokens=k, contextual=share).compress(tokens(x, attention, keys), k)
        assert out.indices is None
        np.testing.assert_allclose(out.features.numpy(), slow_visionzip(x, attention, keys, k, share), rtol=1e-12, atol=1e-12)


def slow_prumerge(x, attention, keys, k, share, neighbours):
    if k == len(x):
        return x
    spaced = round(share * k)
    order = by_attention(attention)
    outliers, rest = order[: k - spaced], sorted(order[k - spaced :])
    kept = sorted(outliers + [rest[(2 * i + 1) * len(rest) // (2 * spaced)] for i in range(spaced)])
    out = []
    for i in kept:
        others = [j for j in range(len(x)) if j != i]
        near = sorted(others, key=lambda j: (-cosine(keys[i], keys[j]), j))[:neighbours]
        out.append(x[i] + sum(attention[j] * x[j] for j in near))
    return np.stack(out)


@pytest.mark.once
@for_all("seed", SEEDS)
def test_prumerge_plus_is_the_slow_merge(seed):
    x, attention, keys, k = drawn(seed)
    for share, neighbours in ((0.75, 32), (0.25, 3), (0.0, 1), (1.0, 2)):
        method = me.PruMergePlus(tokens=k, uniform=share, neighbours=neighbours)
        out = method.compress(tokens(x, attention, keys), k)
        np.testing.assert_allclose(out.features.numpy(), slow_prumerge(x, attention, keys, k, share, neighbours), rtol=1e-12, atol=1e-12)


METHODS = [me.FasterVLM, me.VisPruner, me.Scope, me.VisionZip, me.PruMergePlus]


@pytest.mark.parametrize("cls", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_rows_leave_exactly_k(cls, dtype):
    """Equal, zero and few rows, equal attention, K = 1 and K = N; a kept row is one of the input's where nothing is merged."""
    for x in (torch.ones(9, 4), torch.zeros(9, 4), torch.eye(9), torch.randint(-2, 3, (9, 4))):
        for attention in (torch.ones(9), torch.zeros(9), torch.rand(9)):
            v = me.VisualTokens(x.to(dtype), attention=attention, keys=torch.randn(9, 3))
            for k in (1, 2, 5, 9):
                out = cls(tokens=k).compress(v, k)
                assert len(out) == k and out.features.dtype == dtype and out.features.isfinite().all()
                if out.indices is not None:
                    assert out.indices.tolist() == sorted(set(out.indices.tolist()))


@pytest.mark.parametrize("cls", METHODS)
def test_nan_is_refused(cls):
    for name in ("features", "attention", "keys"):
        v = {"features": torch.randn(9, 4), "attention": torch.rand(9), "keys": torch.randn(9, 3)}
        v[name][2] = float("nan")
        looks_at = {me.FasterVLM: {"attention"}, me.VisPruner: {"attention", "features"}, me.Scope: {"attention", "features"}}
        if name in looks_at.get(cls, {"attention", "keys"}):
            with pytest.raises(me.CountMismatchError, match="NaN or infinity"):
                cls(tokens=4).compress(me.VisualTokens(**v), 4)


@pytest.mark.parametrize(
    "spec, says",
    [
        ("vispruner:tokens=9,r=1.5", "r=1.5 is not a share"),
        ("scope:tokens=9,alpha=-1", "alpha=-1 is not a number of at least 0"),
        ("visionzip:tokens=9,contextual=1", "contextual=1 is not a share from 0 to below 1"),
        ("prumerge_plus:tokens=9,uniform=2", "uniform=2 is not a share"),
        ("prumerge_plus:tokens=9,neighbours=0", "neighbours=0 is not a whole number"),
    ],
)
def test_parameters_out_of_range_are_refused(spec, says):
    with pytest.raises(me.BadBudgetError, match=says):
        me.build(spec)


def test_attention_alone_takes_copies_and_the_others_do_not():
    """Four copies of the token that all attention goes to, and four tokens of their own."""
    x = torch.cat([torch.eye(5)[:1].expand(4, -1), torch.eye(5)[1:]])
    v = me.VisualTokens(x, attention=torch.tensor([0.9, 0.9, 0.9, 0.9, 0.5, 0.4, 0.3, 0.2]))
    assert me.FasterVLM(tokens=4).select(v).tolist() == [0, 1, 2, 3]
    assert me.Scope(tokens=4).select(v).tolist() == [0, 4, 5, 6]
    kept = me.VisPruner(tokens=4).select(v).tolist()
    assert kept[:2] == [0, 1] and len(set(kept[2:]) & {4, 5, 6, 7}) == 2


@pytest.mark.parametrize("method", [me.Scope(keep=0.4), me.VisPruner(keep=0.4), me.VisPruner(keep=0.4, r=0)], ids=lambda m: m.spec())
def test_many_images_at_once_are_each_alone(method):
    """As on a CUDA device: images of one size share the loop, others do not, and every result is bit-equal."""
    parts = [tokens(*drawn(seed)[:3]) for seed in (3, 4, 5, 6)]
    parts += [
        dataclasses.replace(parts[0], attention=parts[0].attention.flip(0)),
        dataclasses.replace(parts[1], features=-parts[1].features),
    ]
    ks = [max(1, len(v) // 2) for v in parts]
    together = method.compress_alike(parts, ks)
    for one, k, out in zip(parts, ks, together):
        alone = method.compress(one, k)
        assert torch.equal(out.indices, alone.indices) and torch.equal(out.features, alone.features)


def test_scope_adds_gains_exactly():
    """Against whole numbers, on cosines of 1,500 tokens that tie but for single steps of 2^-18: in float32 sums of them round."""
    from mllm_efficient.compressors.scope import most_coverage

    n, draw = 1500, torch.Generator().manual_seed(0)
    whole = 2**17 + torch.randint(-1, 2, (n, n), generator=draw)
    whole[:, n // 2 :] = whole[torch.randperm(n, generator=draw), : n // 2]  # the second half ties with the first
    picked = most_coverage((whole / 2**18).float()[None], torch.ones(1, n, dtype=torch.float64), 12)[0].tolist()
    cover, chosen = torch.zeros(n, 1, dtype=torch.long), []
    for _ in range(12):
        gain = (whole - cover).clamp(min=0).sum(0)
        gain[chosen] = -1
        chosen.append(int((gain == gain.max()).nonzero()[0]))
        cover = torch.maximum(cover, whole[:, chosen[-1], None])
    assert picked == chosen


def test_sums_by_group_are_added_from_the_first_row_on():
    """Bit for bit, in a batch of other groups too: (1e8 + 1) - 1e8 is 0 in float32, and 1 in any other order."""
    from mllm_efficient.compressors.math.sums import group_sums

    rows, group = torch.tensor([[1e8], [1.0], [-1e8], [3.0]]), torch.tensor([2, 2, 2, 0])
    sums, parts = group_sums(rows, group, 4)
    assert sums.flatten().tolist() == [3.0, 0.0, 0.0, 0.0] and parts.tolist() == [1, 0, 3, 0]
    many = group_sums(torch.cat([torch.full((5000, 1), 0.1), rows]), torch.cat([torch.arange(5000) % 700 + 4, group]), 704)[0]
    assert many[:4].flatten().tolist() == [3.0, 0.0, 0.0, 0.0]


# ------------------------------------------------------------------------------------------------ what towers give


@pytest.fixture
def seen(registered):
    """What a method that asks for attention and keys is given, image by image."""
    got: list[me.VisualTokens] = []

    @me.register("recorder")
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Recorder(me.Selector):
        """Keeps what it is given."""

        needs: ClassVar[frozenset] = frozenset({"attention", "keys"})

        def score(self, v):
            got.append(v)
            return v.attention

    return got


@pytest.mark.parametrize("name", ["llava_next", "llava_next_video", "llava_onevision"])
@pytest.mark.parametrize("aspect", ["1:1", "2:1", "1:3", "7:5"])
def test_attention_of_tiles_is_packed_as_their_features_are(name, aspect, seen):
    """Against an eager tower, tile by tile: the base view's, then those of the tiles side by side without the padding."""
    model, size = tiny(name), ASPECTS[aspect]
    processor, host = FAMILIES[name].processor("left"), sys.modules[type(tiny(name).model).__module__]
    inputs = processor(text="user : <image> what ? assistant :", images=[noise(0, *size)], return_tensors="pt")
    inputs.pop("token_type_ids", None)
    me.prepare(model, "recorder:tokens=5", **inputs)
    (v,) = seen
    vision, layer = model.config.vision_config, model.config.vision_feature_layer
    pixels, side = inputs["pixel_values"][0], vision.image_size // vision.patch_size
    attention, keys = eager_attention(model, pixels, layer - 1 if layer >= 0 else vision.num_hidden_layers + layer)
    cls = attention.shape[-1] > side**2
    attention, keys = (attention.mean(1)[:, 0, 1:], keys[:, 1:]) if cls else (attention.mean((1, 2)), keys)
    for found, each in ((v.attention[:, None], attention[..., None]), (v.keys, keys)):
        expected = [each[0]]
        down, across = host.get_anyres_image_grid_shape(size[::-1], model.config.image_grid_pinpoints, vision.image_size)
        if len(pixels) > 1:
            tiles = each[1 : 1 + down * across].unflatten(1, (side, side)).unflatten(0, (down, across))
            canvas = tiles.permute(4, 0, 2, 1, 3).reshape(each.shape[-1], down * side, across * side)
            canvas = host.unpad_image(canvas, torch.tensor(size[::-1]))
            shrink = math.sqrt(canvas[0].numel() / (4 * side**2)) if name == "llava_onevision" else 1  # anyres_max_4
            if shrink > 1.1:
                smaller = [int(n // shrink) for n in canvas.shape[1:]]
                canvas = torch.nn.functional.interpolate(canvas[None], smaller, mode="bilinear")[0]
            expected.append(canvas.flatten(1).T)
        torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize("cls", METHODS)
def test_a_batch_of_tiled_pictures_equals_its_rows(name, cls):
    """Left-padded rows with one and two pictures of different sizes: what each leaves alone and in the batch."""
    model, processor = tiny(name), FAMILIES[name].processor("left")
    pictures = [[noise(0, *ASPECTS["7:5"])], [noise(1, *ASPECTS["2:1"]), noise(2, *ASPECTS["1:3"])]]
    prompts = ["user : <image> what ? assistant :", "user : <image> is the ring in <image> red or blue ? assistant :"]

    def generated(rows):
        inputs = processor(
            text=[prompts[r] for r in rows], images=[p for r in rows for p in pictures[r]], return_tensors="pt", padding=True
        )
        inputs.pop("token_type_ids", None)
        with me.compressed(model, cls(keep=0.3)):
            ids = model.generate(**inputs, max_new_tokens=4)[:, inputs["input_ids"].shape[1] :]
            return ids, [(i.kept, i.full, None if i.indices is None else i.indices.tolist()) for i in me.last_report(model).images]

    together, reports = generated([0, 1])
    alone = [generated([r]) for r in (0, 1)]
    assert reports == [*alone[0][1], *alone[1][1]]
    assert torch.equal(together, torch.cat([ids for ids, _ in alone]))


@pytest.mark.parametrize("name", ["llava_next_video", "llava_onevision"])
def test_videos_refuse(name):
    inputs = make(name, "video")
    with pytest.raises(me.UnsupportedModelError, match="frames of a video are pooled, and have no attention of the tower's own"):
        me.prepare(tiny(name), "fastervlm:tokens=4", **inputs)
