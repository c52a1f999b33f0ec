"""Resizers make the picture smaller instead of its tokens fewer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from .base import Compressor


@dataclass(frozen=True, kw_only=True)
class Resizer(Compressor):
    """Changes the picture instead of its tokens. ``target(grid, k, tokens)`` gives the smaller grid the tower shall see.

    grid is one the picture (or each of its tiles) has now; ``tokens(smaller)`` is the image's count with a smaller one.
    """

    merges: ClassVar[bool] = True

    def target(self, grid: tuple[int, int], k: int, tokens: Callable[[tuple[int, int]], int] = lambda g: g[0] * g[1]) -> tuple[int, int]:
        raise TypeError(f"{type(self).__name__} must define target(grid, k)")
