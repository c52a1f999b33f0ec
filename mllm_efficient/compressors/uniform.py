"""Evenly spaced tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import BadBudgetError
from ..lazy import torch
from ..registry import register
from ..tokens import VisualTokens
from .selector import Selector

if TYPE_CHECKING:
    from torch import Tensor


@register("uniform")
@dataclass(frozen=True, kw_only=True)
class Uniform(Selector):
    """Tokens on an even lattice over the grid; ``raster=True`` is the earlier rule, every (N/K)-th token. O(K).

    Rule: R rows of the grid, the middles of R equal parts, R = sqrt(K rows / columns) rounded, so that the lattice's cells are as
    square as they can be; the K tokens are shared among them as evenly as whole numbers are, each row's at the middles of equal
    parts. On 12 x 12, K = 36 takes every second token of every second row, where every fourth token of the raster would be three
    columns. Tokens that form no grid of their own (several views or frames chosen from together) are taken by ``raster``: token
    floor((i + 0.5) N / K).
    """

    raster: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.raster, bool):
            raise BadBudgetError(f"uniform: raster={self.raster!r} is not true or false")

    def select(self, v: VisualTokens, k: int) -> Tensor:  # type: ignore[override]
        if self.raster or v.grid is None:
            return (2 * torch.arange(k, device=v.features.device) + 1) * len(v) // (2 * k)
        return torch.tensor(lattice(v.grid, k), device=v.features.device)


def lattice(grid: tuple[int, int], k: int) -> list[int]:
    """k places of a grid in raster order, spread evenly over rows and columns."""
    rows, columns = grid
    taken = min(max(round(math.sqrt(k * rows / columns)), -(-k // columns)), rows, k)
    out = []
    for j in range(taken):
        row, here = (2 * j + 1) * rows // (2 * taken), (j + 1) * k // taken - j * k // taken
        out += [row * columns + (2 * i + 1) * columns // (2 * here) for i in range(here)]
    return out
