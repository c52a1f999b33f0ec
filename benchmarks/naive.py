"""The loops that methods are usually published with, in float32, to be timed beside ours; written from the rules.

    mllm-efficient bench --selection --import benchmarks/naive.py --method scope --method naive_scope

Every step looks at everything again, and ties, NaN and the order of sums are as they come.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

import mllm_efficient as me


@me.register("naive_cdpruner")
@dataclass(frozen=True, kw_only=True)
class NaiveCDPruner(me.Selector):
    """The whole conditioned kernel, then greedy MAP with a Cholesky factor."""

    needs: ClassVar[frozenset[str]] = frozenset({"text"})

    def select(self, v: me.VisualTokens, k: int) -> Tensor:
        assert v.text is not None
        x = normalize(v.features.float(), dim=1)
        relevance = x @ normalize(v.text.float().mean(0), dim=0)
        relevance = (relevance - relevance.min()) / (relevance.max() - relevance.min())
        kernel = relevance[:, None] * (x @ x.T) * relevance
        left, factor, chosen = kernel.diagonal().clone(), kernel.new_zeros(k, len(x)), []
        for i in range(k):
            j = left.argmax()
            chosen.append(j)
            factor[i] = (kernel[j] - factor[:i, j] @ factor[:i]) / left[j].sqrt()
            left = left - factor[i] ** 2
            left[j] = float("-inf")
        return torch.stack(chosen)


@me.register("naive_scope")
@dataclass(frozen=True, kw_only=True)
class NaiveScope(me.Selector):
    """All gains in every step."""

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})

    def select(self, v: me.VisualTokens, k: int) -> Tensor:
        assert v.attention is not None
        x = normalize(v.features.float(), dim=1)
        alike = x @ x.T
        cover, chosen = alike.new_zeros(len(x)), []
        taken = torch.zeros(len(x), dtype=torch.bool)
        for _ in range(k):
            gain = (alike - cover).clamp(min=0).sum(1) * v.attention
            j = gain.masked_fill(taken, float("-inf")).argmax()
            chosen.append(j)
            taken[j] = True
            cover = torch.maximum(cover, alike[j])
        return torch.stack(chosen)


@me.register("naive_vispruner")
@dataclass(frozen=True, kw_only=True)
class NaiveVisPruner(me.Selector):
    """The product of every second token with those between, in every round."""

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})

    def select(self, v: me.VisualTokens, k: int) -> Tensor:
        assert v.attention is not None
        x = normalize(v.features.float(), dim=1)
        order = v.attention.argsort(descending=True)
        important, rest = order[: k // 2], order[k // 2 :].sort().values
        while len(rest) > k - len(important):
            first, between = rest[::2], rest[1::2]
            gone = min(8, len(first), len(rest) - (k - len(important)))
            nearest = (x[first] @ x[between].T).amax(1).argsort(descending=True)
            rest = torch.cat([first[nearest[gone:]], between]).sort().values
        return torch.cat([important, rest])


@me.register("naive_prumerge_plus")
@dataclass(frozen=True, kw_only=True)
class NaivePruMergePlus(me.Merger):
    """The neighbours of one kept token after the other."""

    needs: ClassVar[frozenset[str]] = frozenset({"attention", "keys"})

    def merge(self, v: me.VisualTokens, k: int) -> me.CompressedTokens:
        assert v.attention is not None and v.keys is not None
        x, keys, spaced = v.features.float(), normalize(v.keys.float(), dim=1), round(0.75 * k)
        order = v.attention.argsort(descending=True)
        rest = order[k - spaced :].sort().values
        kept = torch.cat([order[: k - spaced], rest[(2 * torch.arange(spaced) + 1) * len(rest) // (2 * spaced)]]).sort().values
        alike, out = keys @ keys.T, []
        for i in kept:
            alike[i, i] = -2
            near = alike[i].topk(min(32, len(x) - 1)).indices
            out.append(x[i] + (v.attention[near][:, None] * x[near]).sum(0))
        return me.CompressedTokens(torch.stack(out).to(v.features.dtype))


@me.register("naive_tome")
@dataclass(frozen=True, kw_only=True)
class NaiveToMe(me.Merger):
    """Unit rows, the product of A with B and all sums of features anew in every round."""

    def merge(self, v: me.VisualTokens, k: int) -> me.CompressedTokens:
        x = v.features.float()
        size = torch.ones(len(x), 1)
        for pairs in me.ToMe(tokens=k).rounds(len(x), k):
            unit = normalize(x, dim=1)
            best, partner = (unit[::2] @ unit[1::2].T).max(1)
            strongest = best.argsort(descending=True)
            gone, stays = strongest[:pairs], strongest[pairs:]
            weighed = x * size
            sums = weighed[1::2].index_add(0, partner[gone], weighed[::2][gone])
            sizes = size[1::2].index_add(0, partner[gone], size[::2][gone])
            places = torch.cat([2 * stays, 2 * torch.arange(len(sums)) + 1]).argsort()  # back in raster order
            x = torch.cat([x[::2][stays], sums / sizes])[places]
            size = torch.cat([size[::2][stays], sizes])[places]
        return me.CompressedTokens(x.to(v.features.dtype))


@me.register("naive_visionzip")
@dataclass(frozen=True, kw_only=True)
class NaiveVisionZip(me.Merger):
    """What is merged as a matrix of zeros and ones times all features."""

    needs: ClassVar[frozenset[str]] = frozenset({"attention", "keys"})

    def merge(self, v: me.VisualTokens, k: int) -> me.CompressedTokens:
        assert v.attention is not None and v.keys is not None
        x, keys = v.features.float(), normalize(v.keys.float(), dim=1)
        order, c = v.attention.argsort(descending=True), min(round(10 / 64 * k), k - 1)
        dominant, rest = order[: k - c], order[k - c :].sort().values
        spaced = torch.arange(c) * (len(rest) // c)
        others = torch.ones(len(rest), dtype=torch.bool).index_fill(0, spaced, False)
        joined = torch.nn.functional.one_hot((keys[rest[others]] @ keys[rest[spaced]].T).argmax(1), c).float()
        merged = x[rest[spaced]] + joined.T @ x[rest[others]] / joined.sum(0)[:, None].clamp(min=1)
        places = torch.cat([dominant, rest[spaced]]).argsort()
        return me.CompressedTokens(torch.cat([x[dominant], merged])[places].to(v.features.dtype))
