"""A smaller picture: the rival every user has today."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from ..errors import BadBudgetError, CountMismatchError
from ..registry import register
from .resizer import Resizer


@register("resize")
@dataclass(frozen=True, kw_only=True)
class Resize(Resizer):
    """The image itself made smaller, aspect kept, until it yields at most K tokens; the tower runs on that.

    The tower's position embeddings are interpolated and its cost falls with the picture. The largest grid
    (round(s * rows), round(s * columns)), s <= 1, with at most K tokens is taken; anyres tiles are all made smaller
    alike. Source of the comparison: VTC-Bench
    (arXiv 2510.07143).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"grid"})

    def target(self, grid: tuple[int, int], k: int, tokens: Callable[[tuple[int, int]], int] = math.prod) -> tuple[int, int]:
        half, fewest = Fraction(1, 2), 0
        # a side drops by one cell just below these scales; between two of them the grid is the same
        steps = {Fraction(1)} | {(i - half) / side for side in grid for i in range(2, side + 1)}
        for scale in sorted(steps, reverse=True):
            h, w = (max(1, math.floor(side * scale + half)) for side in grid)
            found = tokens((h, w))
            if 0 < found <= k:
                return h, w
            if found:
                fewest = found
        if 0 < tokens((1, 1)) <= k:
            return 1, 1
        raise BadBudgetError(f"resize: {k} token(s) are asked, and the smallest picture has {tokens((1, 1)) or fewest}: ask for as many")

    def yields(self, k: int, grid: tuple[int, int] | None) -> int:
        if grid is None:
            raise CountMismatchError("resize needs the token grid, and these tokens form none")
        return math.prod(self.target(grid, k))
