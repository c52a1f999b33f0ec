"""Adaptive pooling of the token grid to a smaller one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..budget import fit_grid
from ..errors import BadBudgetError, CountMismatchError
from ..lazy import torch
from ..registry import register
from ..tokens import CompressedTokens, VisualTokens
from .base import Merger


@register("pool")
@dataclass(frozen=True, kw_only=True)
class Pool(Merger):
    """Averages (``mode="avg"``) or maximises (``"max"``) the projected tokens over a smaller grid. O(N D).

    The grid is the one with at most K cells that is nearest the image's aspect (``budget.fit_grid``), so the count
    can be below the budget: on a 12 x 12 grid K = 72 gives 8 x 9 = 72 tokens, and K = 18 gives 4 x 4 = 16. Where an
    image has several grids (anyres, video) each is pooled to its share of K.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"grid"})
    channelwise: ClassVar[bool] = True

    mode: str = "avg"

    def __post_init__(self):
        super().__post_init__()
        if self.mode not in ("avg", "max"):
            raise BadBudgetError(f"pool: mode={self.mode!r} is not one of 'avg', 'max'")

    def yields(self, k: int, grid: tuple[int, int] | None) -> int:
        h, w = self.target(grid, k)
        return h * w

    def target(self, grid: tuple[int, int] | None, k: int) -> tuple[int, int]:
        """The grid that a budget of k tokens gives."""
        if grid is None:
            raise CountMismatchError("pool needs the token grid, and these tokens form none")
        return fit_grid(grid, k)

    def merge(self, v: VisualTokens, k: int) -> CompressedTokens:
        assert v.grid is not None
        h, w = self.target(v.grid, k)
        plane = v.features.T.reshape(1, v.features.shape[1], *v.grid)
        pooling = torch.nn.functional.adaptive_avg_pool2d if self.mode == "avg" else torch.nn.functional.adaptive_max_pool2d
        return CompressedTokens(pooling(plane, (h, w)).flatten(2)[0].T.contiguous(), grid=(h, w))
