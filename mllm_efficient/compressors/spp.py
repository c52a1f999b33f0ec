"""Spatial pyramid pooling: a count of tokens that does not depend on the grid, from several scales."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ..errors import CountMismatchError
from ..lazy import torch
from ..registry import register
from ..tokens import CompressedTokens, VisualTokens
from .pool import Pooling


@register("spp")
@dataclass(frozen=True, kw_only=True)
class SpatialPyramidPooling(Pooling):
    """The tokens pooled over 1 x 1, 2 x 2, 4 x 4 ... cells, whatever the grid: coarse tokens first. O(levels N D).

    Source: SPP-net (He et al., ECCV 2014, arXiv 1406.4729), which takes the maximum: ``op="max"``.
    Rule: a pyramid has a 1 x 1 level, and each level has at least twice the cells per side of the one before. Of all
    pyramids with at most K cells the one with most cells is taken, among those one with the most levels, among those the
    one with the smallest sides, first level first. So the count depends on K alone and can be below it: K = 85 gives
    1 + 4 + 16 + 64, K = 64 gives 1 + 9 + 49 = 59. With K = N the tokens stay as they are. Where a grid has fewer rows or
    columns than a level has cells, cells repeat. Where an image has several grids (anyres, video) each gets the pyramid
    of its share of K. op and p are those of ``pool``.
    """

    paper: ClassVar[str] = "arXiv 1406.4729"

    def yields(self, k: int, grid: tuple[int, int] | None) -> int:
        if grid is None:
            raise CountMismatchError("spp needs the token grid, and these tokens form none")
        return k if k >= grid[0] * grid[1] else sum(side * side for side in levels(k))

    def merge(self, v: VisualTokens, k: int) -> CompressedTokens:
        if k >= len(v):
            return CompressedTokens(v.features, grid=v.grid)
        return CompressedTokens(torch.cat([self.pooled(v, (side, side)) for side in levels(k)]))


@functools.lru_cache(maxsize=1024)
def levels(k: int) -> tuple[int, ...]:
    """Cells per side of each level of the pyramid that a budget of k tokens gives."""
    return min(pyramids(k - 1, (1,)), key=lambda sides: (-sum(side * side for side in sides), -len(sides), sides))


def pyramids(left: int, sides: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Every pyramid that begins with these sides and has at most ``left`` cells more."""
    yield sides
    for side in range(2 * sides[-1], math.isqrt(left) + 1):
        yield from pyramids(left - side * side, (*sides, side))
