"""FastVID equals a slow transcription of its rule: plain loops in float64 that share no code with the package."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import mllm_efficient as me
from mllm_efficient.compressors import fastvid
from mllm_efficient.patches import adapter_for

from ..families import make, tiny
from ..families_reference import Kept, greedy, splice, visuals
from ..pairs import for_all
from .test_video import SEEDS, cosine, highest, length, single, video

DEEP = "adds in later layers cannot follow"


def drawn(seed):
    """A video (T, P, D), attention (T, P), K: some frames are copies, some tokens of few values, some attention equal."""
    draw = np.random.default_rng(seed)
    frames, each, d = int(draw.integers(1, 15)), int(draw.integers(1, 11)), int(draw.integers(2, 9))
    x = draw.normal(size=(frames, each, d)) if seed % 2 else draw.integers(-2, 3, size=(frames, each, d)).astype(float)
    if seed % 3:
        for t in range(1, frames):
            x[t] = x[t - 1] + draw.choice([0, 0.01, 3]) * draw.normal(size=x[t].shape)
    attention = draw.random((frames, each)) if seed % 5 else draw.integers(0, 3, (frames, each)) / 4
    return x, attention, int(draw.integers(1, frames * each + 1))


def cuts(x, threshold):
    """The frames that segments end with."""
    means = [[math.fsum(c) / len(frame) for c in zip(*frame)] for frame in x]
    like = {t: single(cosine(means[t], means[t + 1])) for t in range(len(x) - 1)}
    least = sorted(like, key=lambda t: (like[t], t))[:7]
    return sorted({*least, *(t for t in like if like[t] < single(threshold)), len(x) - 1})


def slow_anchors(rows, count):
    """The ``count`` of a frame's tokens {index: row} that others are merged into."""
    width = len(next(iter(rows.values())))
    far = {i: {j: length([p - q for p, q in zip(rows[i], rows[j])]) / math.sqrt(width) for j in rows} for i in rows}
    density = {}
    for i in rows:
        near = sorted(far[i].values())[:4]
        density[i] = single(math.exp(-math.fsum(v * v for v in near) / len(near)))
    most = max(v for row in far.values() for v in row.values())
    score = {}
    for i in rows:
        denser = [far[i][j] for j in rows if (density[j], -j) > (density[i], -i)]
        score[i] = single(min([most, *denser]) * density[i])
    return sorted(highest(score, count))


def slow_fastvid(x, attention, k, contextual=0.4, threshold=0.9):
    """{place: row} of what stays."""
    frames, each, _ = x.shape
    if k == frames * each:
        return {t * each + p: x[t][p] for t in range(frames) for p in range(each)}
    shares = [k // frames + (t < k % frames) for t in range(frames)]
    context = [int(contextual * share) for share in shares]
    salient = [highest(dict(enumerate(attention[t])), shares[t] - context[t]) for t in range(frames)]
    rest = [[p for p in range(each) if p not in salient[t]] for t in range(frames)]
    out = {t * each + p: x[t][p] for t in range(frames) for p in salient[t]}
    first = 0
    for last in cuts(x, threshold):
        backward = list(range(last, first - 1, -1))
        few, left = backward[::4], sum(context[first : last + 1])
        counts = {t: min(left // len(few) + (i < left % len(few)), len(rest[t])) for i, t in enumerate(few)}
        for t in backward:
            counts[t] = counts.get(t, 0)
            while sum(counts.values()) < left and counts[t] < len(rest[t]):
                counts[t] += 1
        joining = [x[t][p] for t in range(first, last + 1) for p in rest[t]]
        for t, count in counts.items():
            chosen = slow_anchors({p: x[t][p] for p in rest[t]}, count) if count else []
            joined = {p: [] for p in chosen}
            for row in joining if chosen else []:
                like = {p: round(cosine(row, x[t][p]) * 2**30) for p in chosen}
                joined[highest(like, 1)[0]].append(row)
            for p in chosen:
                own = max(1 / (len(joined[p]) + 1), 0.6)
                out[t * each + p] = own * x[t][p] + (1 - own) * (np.mean(joined[p], axis=0) if joined[p] else 0)
        first = last + 1
    return out


def tokens(x, attention, dtype=torch.float64):
    v = video(x, dtype)
    return me.VisualTokens(v.features, frame=v.frame, attention=torch.tensor(attention).reshape(-1))


@pytest.mark.once
@for_all("seed", SEEDS)
def test_the_method_is_its_slow_rule(seed):
    x, attention, k = drawn(seed)
    contextual, threshold = [(0.4, 0.9), (0.7, 0.5), (0, 1)][seed % 3]
    found = me.FastVID(tokens=k, contextual=contextual, threshold=threshold).compress(tokens(x, attention), k)
    slow = slow_fastvid(x, attention, k, contextual, threshold)
    assert found.places.tolist() == sorted(slow) and len(slow) == k
    np.testing.assert_allclose(found.features.numpy(), np.stack([slow[i] for i in sorted(slow)]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_rows_leave_exactly_k_in_their_places(dtype):
    frame, attention = torch.arange(4).repeat_interleave(3), torch.ones(12)
    for x in (torch.ones(12, 4), torch.zeros(12, 4), torch.eye(12), torch.randint(-2, 3, (12, 4)), torch.full((12, 4), 6e4)):
        for k in range(1, 13):
            out = me.FastVID(tokens=k).compress(me.VisualTokens(x.to(dtype), frame=frame, attention=attention), k)
            assert len(out) == k and out.features.dtype == dtype and out.features.isfinite().all()
            assert out.places.tolist() == sorted(set(out.places.tolist())) and out.indices is None


def test_anchors_are_in_the_last_frame_of_a_segment_and_every_fourth_before():
    assert fastvid.segment(3, 11, [2] * 12, [9] * 12) == fastvid.Segment(3, 11, (6, 0, 0, 0, 6, 0, 0, 0, 6))
    assert fastvid.segment(0, 4, [1] * 5, [9] * 5).anchors == (2, 0, 0, 0, 3), "what does not divide goes to the last"
    assert fastvid.segment(0, 4, [4] * 5, [6] * 5).anchors == (6, 0, 2, 6, 6), "and what has no room to the frames before"


def test_a_scene_that_stays_is_said_by_few_frames_and_a_change_by_its_own():
    draw = torch.Generator().manual_seed(0)
    still, other = torch.randn(25, 16, generator=draw), torch.randn(25, 16, generator=draw)
    x = torch.stack([still + 1e-4 * torch.randn(25, 16, generator=draw) for _ in range(12)] + [other])
    v = me.VisualTokens(x.flatten(0, 1), frame=torch.arange(13).repeat_interleave(25), attention=torch.rand(325, generator=draw))
    kept = me.FastVID(tokens=130).compress(v, 130)
    counts = torch.bincount(kept.places // 25, minlength=13).tolist()
    assert counts[12] == 10 and sum(counts) == 130 and min(counts) == 6 and max(counts) > 10


@pytest.mark.once
@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("fastvid:keep=0.5,per=frame", "fastvid shares one budget out to the frames of a video: leave per= out"),
        ("fastvid:keep=0.5,contextual=1", "fastvid: contextual=1 is not a number from 0 to below 1"),
        ("fastvid:keep=0.5,threshold=1.5", "fastvid: threshold=1.5 is not a number from 0 to 1"),
    ],
)
def test_a_setting_outside_its_range_is_refused(spec, says):
    with pytest.raises(me.BadSettingError, match=says):
        me.build(spec)


def test_frames_of_different_sizes_and_nan_are_refused():
    uneven = me.VisualTokens(torch.randn(5, 4), frame=torch.tensor([0, 0, 0, 1, 1]), attention=torch.ones(5))
    with pytest.raises(me.CountMismatchError, match=r"the frames of the video have \[3, 2\] tokens: all must have as many"):
        me.FastVID(tokens=3).compress(uneven, 3)
    for x, attention, what in (
        (torch.tensor([[1.0], [math.nan]]), torch.ones(2), "visual tokens"),
        (torch.ones(2, 1), torch.tensor([1, math.inf]), "attentions"),
    ):
        with pytest.raises(me.NotFiniteError, match=f"fastvid: the {what} hold NaN"):
            me.FastVID(tokens=1).compress(me.VisualTokens(x, attention=attention), 1)


# ------------------------------------------------------------------------------------------------ in models


def test_greedy_equals_the_slow_reference():
    """What is merged keeps the position of its place."""
    model, inputs = tiny("qwen2_5_vl"), make("qwen2_5_vl", "video")
    adapter, (visual,) = adapter_for(model), visuals("qwen2_5_vl", model, inputs)
    (found,) = adapter.encode(adapter.items(inputs), frozenset({"attention"}))
    x, frames = visual.tokens, len(visual.planes)
    left = slow_fastvid(
        x.detach().double().numpy().reshape(frames, -1, x.shape[1]),
        found.attention.detach().double().numpy().reshape(frames, -1),
        round(0.4 * len(x)),
    )
    stay = torch.tensor([i in left for i in range(len(x))])
    kept = Kept(stay, torch.stack([torch.tensor(left[i]).to(x.dtype) for i in sorted(left)]))
    expected = greedy(model, splice("qwen2_5_vl", model, inputs, [visual], [kept], "keep"))
    with me.compressed(model, "fastvid:keep=0.4"):
        assert model.generate(**inputs, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :].tolist() == expected
        assert me.last_report(model).visual_tokens_kept == len(left)


def test_a_batch_of_videos_equals_one_by_one():
    rows = ("video", "video and image", "one image", "text only")
    model, batch = tiny("qwen2_5_vl"), make("qwen2_5_vl", *rows)
    with me.compressed(model, "fastvid:keep=0.5"):
        together = model.generate(**batch, max_new_tokens=4)[:, batch["input_ids"].shape[1] :]
        for row, kind in enumerate(rows):
            one = make("qwen2_5_vl", kind)
            assert torch.equal(model.generate(**one, max_new_tokens=4)[0, one["input_ids"].shape[1] :], together[row]), kind


def test_features_of_later_layers_are_refused():
    with pytest.raises(me.UnsupportedModelError, match=DEEP):
        me.wrap(tiny("qwen3_vl"), "fastvid:keep=0.5")
