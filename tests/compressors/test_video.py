"""Methods that spend one budget over the frames of a video equal slow transcriptions of their rules, and vLLM where it has them.

The transcriptions are plain loops in float64 and share no code with the package. Every third video has frames that are copies of the one
before, every second one tokens of few values.
"""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest
import torch

import mllm_efficient as me
from mllm_efficient.patches import adapter_for
from mllm_efficient.tokens import Plane, VisualShape

from ..families import FAMILIES, WITH_VIDEO, make, tiny
from ..families_reference import chosen, everything, greedy, splice, visuals
from ..pairs import for_all

SEEDS = range(200)
METHODS = [me.EVS, me.VidCom2, me.VCast]
WITH_A_VIDEO = ("llava_next_video", "llava_onevision", "qwen2_5_vl", "qwen3_vl")
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")


def drawn(seed):
    """A video (T, P, D), and K."""
    draw = np.random.default_rng(seed)
    frames, each, d = int(draw.integers(1, 8)), int(draw.integers(1, 13)), int(draw.integers(2, 9))
    x = draw.normal(size=(frames, each, d)) if seed % 2 else draw.integers(-2, 3, size=(frames, each, d)).astype(float)
    if seed % 3 == 0:
        for t in range(1, frames, 2):
            x[t] = x[t - 1]
    return x, int(draw.integers(1, frames * each + 1))


def video(x, dtype=torch.float64):
    frames, each, d = x.shape
    return me.VisualTokens(torch.tensor(x).to(dtype).reshape(-1, d), frame=torch.arange(frames).repeat_interleave(each))


def length(row):
    return math.sqrt(math.fsum(v * v for v in row))


def cosine(a, b, least=0.0):
    lengths = [max(length(row), least) for row in (a, b)]
    return math.fsum(p * q for p, q in zip(a, b)) / (lengths[0] * lengths[1]) if min(lengths) > 0 else 0.0


def single(value):
    """In float32, in which the package compares."""
    return float(np.float32(value))


def highest(scores, count):
    """The ``count`` indices of a dictionary with the highest scores, the lowest index of equal ones."""
    return sorted(scores, key=lambda i: (-scores[i], i))[:count]


def slow_evs(x, k):
    frames, each, _ = x.shape
    scores = {}
    for t in range(frames):
        for p in range(each):
            like = -2.0 if t == 0 else round(cosine(x[t][p], x[t - 1][p]) * 2**30) / 2**30
            scores[t * each + p] = 1 - like
    return sorted(highest(scores, k))


def gaussians(a, b):
    squared = math.fsum((p - q) ** 2 for p, q in zip(a, b))
    return math.fsum(math.exp(-squared / (2 * width)) for width in (1 / 8, 1 / 4, 1 / 2, 1, 2))


def slow_vidcom2(x, k, share):
    frames, each, d = x.shape
    flat = x.reshape(-1, d)
    spread = [single(math.fsum((v - math.fsum(c) / len(c)) ** 2 for v in c) / len(c)) for c in flat.T]
    calm = sorted(range(d), key=lambda c: (spread[c], c))[: max(1, d // 2)]
    rows = [[list(np.array(token)[calm]) for token in frame] for frame in x]
    rows = [[[v / max(length(token), 1e-12) for v in token] for token in frame] for frame in rows]
    middle = [[math.fsum(c) / each for c in zip(*frame)] for frame in rows]
    whole = [math.fsum(c) / frames for c in zip(*middle)]
    to_video = [[gaussians(token, whole) for token in frame] for frame in rows]
    unlike = {t * each + p: single(-(to_video[t][p] + gaussians(rows[t][p], middle[t]))) for t in range(frames) for p in range(each)}
    of_frame = [-math.fsum(values) / each / 0.01 for values in to_video]
    powers = [math.exp(v - max(of_frame)) for v in of_frame]
    chances = [p / math.fsum(powers) for p in powers]
    kept = set()
    for t, p in enumerate(chances):
        count = min(max(round(min(share * (1 + p - math.fsum(chances) / frames), 1) * each), 1), each)
        kept |= set(highest({i: unlike[i] for i in range(t * each, (t + 1) * each)}, count))
    if len(kept) > k:
        kept = set(highest({i: unlike[i] for i in kept}, k))
    others = {i: v for i, v in unlike.items() if i not in kept}
    return sorted(kept | set(highest(others, k - len(kept))))


def slow_vcast(x, k):
    frames, each, _ = x.shape
    middle = [[math.fsum(c) / each for c in zip(*frame)] for frame in x]
    middle = [[v / max(length(m), 1e-6) for v in m] for m in middle]
    curves = []
    for t in range(frames):
        if t in (0, frames - 1):
            curves.append(1.0)
            continue
        into, away = ([q - p for p, q in zip(middle[a], middle[a + 1])] for a in (t - 1, t))
        curves.append(1 - cosine(into, away, 1e-6))
    powers = [math.exp((c - max(curves)) / 0.7) for c in curves]
    least = 1 if k >= frames else 0
    shares = [round(p / math.fsum(powers) * (k - least * frames) * 2**20) / 2**20 for p in powers]
    counts = [least + min(math.floor(s), each - least) for s in shares]
    while sum(counts) < k:  # all of what is left to the largest remainder that is not full
        most = max((s - math.floor(s), -t) for t, s in enumerate(shares) if counts[t] < each)
        counts[-most[1]] += 1
    kept = []
    for t, frame in enumerate(x):
        lengths = [length(token) for token in frame]
        low, high = min(lengths), max(lengths)
        score = {p: single(1 - cosine(frame[p], middle[t], 1e-6) + (lengths[p] - low) / (high - low + 1e-6)) for p in range(each)}
        kept += [t * each + p for p in highest(score, counts[t])]
    return sorted(kept)


SLOW = {"evs": slow_evs, "vidcom2": lambda x, k: slow_vidcom2(x, k, k / x[..., 0].size), "vcast": slow_vcast}


@pytest.mark.once
@pytest.mark.parametrize("name", SLOW)
@for_all("seed", SEEDS)
def test_the_method_is_its_slow_rule(name, seed):
    x, k = drawn(seed)
    found = me.build(f"{name}:tokens={k}").select(video(x), k).tolist()
    assert found == SLOW[name](x, k) and len(set(found)) == k


@pytest.mark.parametrize("cls", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_rows_leave_exactly_k(cls, dtype):
    """Equal, zero and few rows, frames that are all alike, K = 1 and K = N."""
    frame = torch.arange(4).repeat_interleave(3)
    for x in (torch.ones(12, 4), torch.zeros(12, 4), torch.eye(12), torch.randint(-2, 3, (12, 4)), torch.full((12, 4), 6e4)):
        v = me.VisualTokens(x.to(dtype), frame=frame)
        for k in (1, 3, 5, 12):
            out = cls(tokens=k).compress(v, k)
            assert len(out) == k and out.features.dtype == dtype and out.indices.tolist() == sorted(set(out.indices.tolist()))


@pytest.mark.parametrize("cls", METHODS)
def test_frames_of_different_sizes_and_nan_are_refused(cls):
    uneven = me.VisualTokens(torch.randn(5, 4), frame=torch.tensor([0, 0, 0, 1, 1]))
    with pytest.raises(me.CountMismatchError, match=r"the frames of the video have \[3, 2\] tokens: all must have as many"):
        cls(tokens=3).select(uneven, 3)
    with pytest.raises(me.NotFiniteError, match=f"{cls.name}: the visual tokens hold NaN"):
        cls(tokens=3).select(me.VisualTokens(torch.tensor([[1.0], [math.nan], [2.0], [0.0]]), frame=torch.tensor([0, 0, 1, 1])), 3)
    with pytest.raises(me.BadSettingError, match="shares one budget out to the frames of a video: leave per= out"):
        cls(keep=0.5, per="frame")


def test_a_still_scene_keeps_its_first_frame_and_a_cut_its_new_one():
    draw = torch.Generator().manual_seed(0)
    first, second = torch.randn(9, 8, generator=draw), torch.randn(9, 8, generator=draw)
    v = me.VisualTokens(torch.cat([first, first, second, second]), frame=torch.arange(4).repeat_interleave(9))
    assert me.EVS(tokens=18).select(v, 18).tolist() == [*range(9), *range(18, 27)]


def test_a_turn_has_more_tokens_than_what_goes_on():
    """A path that goes straight, turns back once and goes straight again."""
    ways = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.2, 0.1])
    means = torch.stack([ways.cos(), ways.sin()], 1)
    x = means[:, None] + 1e-3 * torch.randn(6, 64, 2, generator=torch.Generator().manual_seed(0))
    kept = me.VCast(tokens=48).select(me.VisualTokens(x.reshape(-1, 2), frame=torch.arange(6).repeat_interleave(64)), 48)
    counts = torch.bincount(kept // 64, minlength=6)
    assert counts[3] > 5 * counts[1] > 0 and counts.sum() == 48


# ------------------------------------------------------------------------------------------------ budgets


class AnyModel:
    """What planning asks of a family."""

    fixed_count, parts = False, frozenset({"frame"})

    @staticmethod
    def item(frames, rows, columns):
        from mllm_efficient.patches.base import Item

        return Item({}, VisualShape(tuple(Plane(rows, columns, frame=i) for i in range(frames)), "video"))


def kept_of(spec, frames=10, rows=10, columns=10):
    return me.build(spec).plan(AnyModel, AnyModel.item(frames, rows, columns)).kept


@pytest.mark.once
def test_counts_are_those_of_vllms_rule():
    """int(N * (1 - q)) in floating point: 1,000 tokens at q = 0.8 leave 199; never fewer than a frame, or than one a frame."""
    assert kept_of("evs:prune=0.8") == kept_of("evs:keep=0.2") == kept_of("vidcom2:prune=0.8") == 199
    assert kept_of("vcast:prune=0.8") == 200  # rounded, as its code does
    assert kept_of("evs:prune=0.99") == 100 and kept_of("vidcom2:prune=0.999") == 10 and kept_of("vcast:prune=0.999") == 10
    v = me.VisualTokens(torch.randn(1000, 4), frame=torch.arange(10).repeat_interleave(100))
    assert len(me.EVS(prune=0.8).select(v)) == 199 and len(me.EVS(prune=0.99).select(v)) == 100
    assert kept_of("evs:tokens=321") == kept_of("vidcom2:tokens=321") == kept_of("vcast:tokens=321") == 321


@needs_vllm
@pytest.mark.parametrize("name", ["evs", "vidcom2"])
def test_counts_are_vllms_own(name):
    from importlib import import_module

    theirs = import_module(f"vllm.multimodal.video_prune.{name}").compute_retained_tokens_count
    for q in (0.0, 0.1, 0.25, 0.3, 0.5, 0.55, 0.7, 0.75, 0.8, 0.9, 0.95, 0.99):
        for frames, rows, columns in ((1, 3, 5), (4, 7, 7), (10, 10, 10), (16, 8, 13), (3, 1, 1)):
            assert kept_of(f"{name}:prune={q}", frames, rows, columns) == theirs(rows * columns, frames, q), (q, frames)


@needs_vllm
@pytest.mark.parametrize("name", ["evs", "vidcom2"])
@for_all("seed", SEEDS)
def test_the_choice_is_vllms_own(name, seed):
    from importlib import import_module

    theirs = import_module(f"vllm.multimodal.video_prune.{name}").compute_retention_mask
    x = torch.randn(5, 12, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for q in (0.3, 0.75):
        method = me.build(f"{name}:prune={q}")
        k = method.plan(AnyModel, AnyModel.item(5, 3, 4)).kept
        v = me.VisualTokens(x.flatten(0, 1), frame=torch.arange(5).repeat_interleave(12))
        assert method.select(v, k).tolist() == theirs(x.flatten(0, 1), (5, 6, 8), 2, q).nonzero()[:, 0].tolist()


@pytest.mark.once
@pytest.mark.parametrize(
    "spec, says",
    [
        ("evs:tokens=99", "evs keeps at least 100 tokens of a video of 10 frames: tokens=99 is too few"),
        ("evs:keep=0.5,max_tokens=99", "evs keeps at least 100 tokens of a video of 10 frames: max_tokens=99 is too few"),
        ("vidcom2:tokens=9", "vidcom2 keeps at least 10 tokens of a video of 10 frames: tokens=9 is too few"),
        ("vcast:tokens=9", "vcast keeps at least 10 tokens of a video of 10 frames: tokens=9 is too few"),
    ],
)
def test_a_count_below_the_rules_least_is_refused(spec, says):
    with pytest.raises(me.BadBudgetError, match=says):
        kept_of(spec)


# ------------------------------------------------------------------------------------------------ in models


def left_by_hand(name, spec, found):
    """What a method leaves of the items of a row: of a video by its slow rule, of an image as one frame, which evs keeps whole."""
    method, left = me.build(spec), []
    for visual in found:
        if visual.modality == "image" and method.name == "evs":
            left.append(everything(visual))
            continue
        frames = len(visual.planes) if visual.modality == "video" else 1
        k = int(visual.n * (1 - (1 - method.keep))) if method.name != "vcast" else round(method.keep * visual.n)
        k = max(k, visual.n // frames if method.name == "evs" else frames)
        x = visual.tokens.double().numpy().reshape(frames, visual.n // frames, -1)
        kept = slow_vidcom2(x, k, method.keep) if method.name == "vidcom2" else SLOW[method.name](x, k)
        left.append(chosen(visual, torch.tensor(kept)))
    return left


@pytest.mark.parametrize("spec", ["evs:keep=0.5", "vidcom2:keep=0.375", "vcast:keep=0.375"])
@pytest.mark.parametrize("name", WITH_A_VIDEO)
def test_greedy_equals_the_slow_reference(name, spec):
    for row in ("video", "video and image"):
        model, inputs = tiny(name), make(name, row)
        found = visuals(name, model, inputs)
        whole = splice(name, model, inputs, found, left_by_hand(name, spec, found), "keep" if FAMILIES[name].mrope else "renumber")
        expected = greedy(model, whole)
        with me.compressed(model, spec):
            assert model.generate(**inputs, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :].tolist() == expected
            report = me.last_report(model)
        assert report.visual_tokens_kept < report.visual_tokens_full


@pytest.mark.parametrize("spec", ["evs:keep=0.5", "vidcom2:keep=0.375", "vcast:keep=0.375", "evs:keep=0.5 | fastv:layer={},ratio=0.5"])
@pytest.mark.parametrize("name", WITH_A_VIDEO)
def test_a_batch_of_videos_equals_one_by_one(name, spec):
    rows = ("video", "video and image", "one image", "text only")
    model, batch = tiny(name), make(name, *rows)
    with me.compressed(model, spec.format(2 if FAMILIES[name].mrope else 1)):  # after the layers of deepstack
        together = model.generate(**batch, max_new_tokens=4)[:, batch["input_ids"].shape[1] :]
        for row, kind in enumerate(rows):
            one = make(name, kind)
            assert torch.equal(model.generate(**one, max_new_tokens=4)[0, one["input_ids"].shape[1] :], together[row]), kind


@pytest.mark.parametrize("name", WITH_VIDEO)
def test_evs_leaves_an_image_whole(name):
    model, inputs = tiny(name), make(name, "two images")
    prepared = me.prepare(model, "evs:tokens=3", **inputs)
    assert all(i.kept == i.full for i in prepared.report.images) and prepared.layout is None
    assert me.build("evs:tokens=3").describe(adapter_for(model).items(inputs)[0].shape, adapter_for(model)).endswith("(removes 0.0%)")


def test_evs_is_refused_where_there_are_no_videos(tiny_llava):
    for model in (tiny_llava, tiny("llava_next")):
        with pytest.raises(me.UnsupportedModelError, match="evs needs frame, which .* does not give"):
            me.wrap(model, "evs:keep=0.5")


@pytest.mark.parametrize("spec", ["evs:keep=0.5", "vidcom2:keep=0.5", "vcast:keep=0.5"])
def test_a_pixel_that_is_not_finite_raises_by_name(spec):
    model, inputs = tiny("qwen2_5_vl"), make("qwen2_5_vl", "video")
    inputs["pixel_values_videos"][0, 0] = math.nan
    with me.compressed(model, spec), pytest.raises(me.NotFiniteError, match=f"{spec.partition(':')[0]}.* NaN or infinity"):
        model.generate(**inputs, max_new_tokens=2)
