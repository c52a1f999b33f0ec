"""A smaller picture: the rival every user has today."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..errors import CountMismatchError
from ..registry import register
from .base import Resizer


@register("resize")
@dataclass(frozen=True, kw_only=True)
class Resize(Resizer):
    """The image itself made smaller, aspect kept, until it yields at most K tokens; the tower runs on that.

    The tower's position embeddings are interpolated and its cost falls with the picture. The largest grid
    (round(s * rows), round(s * columns)), s <= 1, with at most K cells is taken. Source of the comparison: VTC-Bench
    (arXiv 2510.07143).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"grid"})

    def target(self, grid: tuple[int, int], k: int) -> tuple[int, int]:
        rows, cols = grid
        for long in range(max(grid), 0, -1):
            scale = long / max(grid)
            h, w = (max(1, math.floor(side * scale + 0.5)) for side in (rows, cols))
            if h * w <= k:
                return h, w
        return 1, 1

    def count(self, n: int, grid: tuple[int, int] | None, *, fixed: bool = True) -> int:
        k = super().count(n, grid, fixed=fixed)
        if grid is None:
            raise CountMismatchError("resize needs the token grid, and these tokens form none")
        h, w = self.target(grid, k)
        return h * w
