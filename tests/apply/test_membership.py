"""What merged tokens are made of, read from the derivative, against what each method does by itself."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import mllm_efficient as me
from mllm_efficient.apply.membership import areas, membership
from mllm_efficient.compressors.math.matching import grouped
from mllm_efficient.tokens import VisualTokens


def tokens(n: int, width: int, seed: int = 0) -> VisualTokens:
    generator = torch.Generator().manual_seed(seed)
    keys, attention = torch.randn(n, 8, generator=generator), torch.rand(n, generator=generator)
    return VisualTokens(torch.randn(n, width, generator=generator), (n // 6, 6), keys=keys, attention=attention)


@pytest.mark.parametrize("width", [64, 5], ids=["one pass", "several passes"])
def test_of_tome_they_are_its_groups(width):
    v, method = tokens(36, width), me.ToMe(tokens=9)
    assert torch.equal(membership(method, v, 9), grouped(v.features, method.rounds(36, 9), "tome"))


def test_of_pooling_they_are_the_cells():
    wanted = torch.arange(3).repeat_interleave(2)[:, None] * 3 + torch.arange(3).repeat_interleave(2)
    assert torch.equal(membership(me.Pool(tokens=9), tokens(36, 16), 9), wanted.flatten())


def test_a_token_in_nothing_is_said_and_the_largest_part_counts():
    @dataclass(frozen=True, kw_only=True)
    class Half(me.Merger):
        def merge(self, v, k):
            x = v.features
            return me.CompressedTokens(torch.stack([0.75 * x[0] + 0.25 * x[1], 0.25 * x[0] + 0.75 * x[1]]))

    v = tokens(36, 16)
    found = membership(Half(tokens=2), v, 2)
    assert found[:2].tolist() == [0, 1] and (found[2:] == -1).all()


@pytest.mark.parametrize("spec", ["tome:keep=0.5", "pool:keep=0.5", "divprune:keep=0.5", "resize:keep=0.5", "none"])
def test_of_a_batch_of_images(tiny_llava, make_batch, spec):
    found = areas(tiny_llava, spec, **make_batch("one image"))
    merges = spec.split(":")[0] in ("tome", "pool")
    for own in found:
        assert (own is not None) == merges
        if own is not None:
            assert own.min() == 0 and len(own.unique()) == own.max() + 1
