"""``metric=whitened``: grouped whitening as WhitenedCSE has it, transcribed slowly, without its shuffling and with shrinkage."""

from __future__ import annotations

import pytest
import torch

import mllm_efficient as me
from mllm_efficient.compressors.divprune import distances, loop
from mllm_efficient.compressors.math.whitening import groups_of, whitened, whitening_flops
from mllm_efficient.tokens import VisualTokens


def slow(x, groups):
    """(N, D): zero-phase whitening of each group, by eigenvalues, in float64."""
    x = x.double()
    out = []
    for group in range(groups):
        width = x.shape[1] // groups
        part = x[:, group * width : (group + 1) * width]
        part = part - part.mean(0)
        covariance = torch.zeros(width, width, dtype=torch.float64)
        for row in part:
            covariance += torch.outer(row, row) / len(x)
        covariance += 1e-3 * covariance.trace() / width * torch.eye(width, dtype=torch.float64)
        values, vectors = torch.linalg.eigh(covariance)
        out.append(part @ vectors @ torch.diag(values**-0.5) @ vectors.T)
    return torch.cat(out, 1)


def tokens(n, d, seed=0, dtype=torch.float32):
    """Tokens with a common direction and channels that go together, as projected ones have."""
    made = torch.Generator().manual_seed(seed)
    mixed = torch.randn(n, d, generator=made) @ torch.randn(d, d, generator=made)
    return (mixed + 20 * torch.randn(d, generator=made)).to(dtype)


@pytest.mark.parametrize("n, d, groups", [(36, 32, 1), (36, 32, 4), (144, 128, 2), (9, 64, 8), (5, 6, 1)])
def test_distances_and_choices_equal_the_slow_transcription(n, d, groups):
    x = tokens(n, d)
    expected = distances(slow(x, groups))
    found = distances(whitened(x.double(), groups, "divprune"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(distances(whitened(x, groups, "divprune")), expected.float(), rtol=0, atol=2e-3)
    k = max(1, n // 3)
    method = me.build(f"divprune:tokens={k},metric=whitened,groups={groups}")
    assert method.select(x.double()).tolist() == sorted(loop(expected.clone(), k).tolist())


def test_in_a_batch_as_one_by_one():
    parts = [VisualTokens(tokens(36, 32, seed)) for seed in range(3)]
    method = me.build("divprune:tokens=9,metric=whitened")
    for own, alone in zip(method.select_batch(parts, 9), parts, strict=True):
        assert sorted(own.tolist()) == method.select(alone, 9).tolist()


def test_the_common_direction_and_the_scale_of_channels_do_not_count():
    x = tokens(64, 16, dtype=torch.float64)
    moved = (x + 1000 * torch.randn(16, dtype=torch.float64)) * 2.0 ** torch.arange(16)
    method = me.build("divprune:tokens=12,metric=whitened,groups=16")  # a group of one channel is scaled alone
    assert method.select(x).tolist() == method.select(moved).tolist()
    assert me.build("divprune:tokens=12").select(x).tolist() != me.build("divprune:tokens=12").select(moved).tolist()


@pytest.mark.parametrize("x", [torch.ones(9, 8), torch.zeros(9, 8), torch.ones(9, 8) * 1e30, torch.ones(1, 8)])
def test_tokens_that_are_all_alike_are_as_far_as_can_be_from_each_other(x):
    assert whitened(x, 2, "divprune").abs().max() == 0
    k = min(4, len(x))
    assert me.build(f"divprune:tokens={k},metric=whitened").select(x).tolist() == list(range(k))


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_no_square_overflows_or_vanishes(factor):
    method = me.build("divprune:tokens=9,metric=whitened,groups=4")
    assert (
        method.select(tokens(36, 32) * factor).tolist()
        == method.select(tokens(36, 32) * 2.0 ** round(torch.tensor(factor).log2().item())).tolist()
    )


def test_nan_raises_and_half_precision_is_worked_on_in_float32():
    x = tokens(36, 32)
    with pytest.raises(me.MllmEfficientError, match="NaN"):
        me.build("divprune:tokens=9,metric=whitened").select(x.index_fill(0, torch.tensor([3]), float("nan")))
    half = x.half()
    method = me.build("divprune:tokens=9,metric=whitened")
    assert method.select(half).tolist() == method.select(half.float()).tolist()


def test_groups():
    assert [groups_of(576, 4096, None, ""), groups_of(144, 1024, None, ""), groups_of(20, 1024, None, "")] == [256, 64, 128]
    assert groups_of(2, 7, None, "") == 7 and groups_of(9, 12, 3, "") == 3
    with pytest.raises(me.MllmEfficientError, match="groups=5 does not divide the 32 channels"):
        me.build("divprune:tokens=9,metric=whitened,groups=5").select(tokens(36, 32))
    for spec in ("divprune:tokens=9,groups=4", "divprune:tokens=9,metric=whitened,groups=0"):
        with pytest.raises(me.MllmEfficientError, match="needs metric=whitened"):
            me.build(spec)
    assert whitening_flops(36, 32, 4, "") == 2 * 36 * 32 * 8 + 32 * 64 // 3 + 36 * 32 * 8
    assert me.build("divprune:tokens=9,metric=whitened,groups=4").flops(36, 32, 9) == 2 * 36 * 36 * 32 + whitening_flops(36, 32, 4, "")


def test_divmerge_takes_it(tiny_llava, make_batch):
    inputs = make_batch("one image")
    with torch.no_grad():
        kept = [me.prepare(tiny_llava, f"{name}:tokens=9,metric=whitened", **inputs).report.images[0] for name in ("divprune", "divmerge")]
    assert kept[0].indices.tolist() == kept[1].indices.tolist()
    assert kept[1].counts.sum() == 36
