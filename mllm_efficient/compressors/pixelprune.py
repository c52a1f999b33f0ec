"""PixelPrune: tokens whose pixels a neighbour's say already, dropped before the vision tower. Nothing of the picture is lost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import BadBudgetError, BadSettingError, UnsupportedModelError
from ..lazy import torch
from ..plans import Plan
from ..registry import register
from ..tokens import CompressedTokens, Grid, Plane, VisualShape, VisualTokens
from .base import BUDGET_FIELDS, Compressor

if TYPE_CHECKING:
    from torch import Tensor

    from ..family import Family


@register("pixelprune")
@dataclass(frozen=True, kw_only=True)
class PixelPrune(Compressor):
    """Drops what can be said of a picture without it: tokens whose pixels are those of the token to the left or above.

    Source: PixelPrune (arXiv 2604.00886). Rule: the pixels of a token are predicted from its neighbours' by the edge rule of LOCO-I: those
    above where the token to the upper left is the same as the left one and another than the one above, else those to the left (in the first
    row those to the left, in the first column those above; the first token stays). It is dropped if no pixel differs from that by more
    than ``tau``. Kept tokens are in their places, in the tower (which runs on them alone, with their own rotary positions) and in the
    language model; a method that selects may follow and choose among them (``pixelprune | divprune:keep=0.25``). With tau = 0 the whole
    picture can be rebuilt from them.
    dedup: of a picture after another of the same size in its prompt, and of a frame after the first, what a token is compared with is what
    stood there before, unless the token to the left and the one above are both new: then the rule above goes on.
    tau: in the values that the model is given, after normalisation (in vLLM of the model's dtype). Takes no budget: how many stay depends
    on the pixels, so FLOPs are not known before. Each frame of a video by itself. O(pixels) and one wait for a GPU, before the tower.
    """

    paper: ClassVar[str] = "arXiv 2604.00886"
    by_pixels: ClassVar[bool] = True

    keep: float | None = 1.0
    tau: float = 0.0
    dedup: bool = False

    def __post_init__(self) -> None:
        if any(getattr(self, name) != (1.0 if name == "keep" else None) for name in BUDGET_FIELDS):
            raise BadBudgetError("pixelprune takes no budget: how many tokens stay depends on the picture")
        if (self.per, self.newline) != ("image", None):
            raise BadSettingError("pixelprune takes no budget, so per= and newline= have no effect: leave them out")
        if isinstance(self.tau, bool) or not isinstance(self.tau, (int, float)) or not 0 <= self.tau < math.inf:
            raise BadSettingError(f"pixelprune: tau={self.tau!r} is not a difference of pixels from 0 up")
        if not isinstance(self.dedup, bool):
            raise BadSettingError(f"pixelprune: dedup={self.dedup!r} is not true or false")
        super().__post_init__()

    @property
    def in_tower(self) -> bool:
        return True

    def compress(self, v: VisualTokens, k: int) -> CompressedTokens:
        raise UnsupportedModelError("pixelprune looks at pixels before a model's tower, and here are tokens alone")

    def plan(self, adapter: Family, item: Any) -> Plan:
        """Raises ``BadBudgetError`` for an item of which only the size is known."""
        shape: VisualShape = item.shape
        if not getattr(item, "arguments", None):
            raise BadBudgetError("pixelprune: how many tokens stay depends on the pixels, and here is a size alone")
        pixels: Tensor = adapter.token_pixels(item)  # type: ignore[attr-defined]
        parts = pixels.split([len(plane) for plane in shape.planes])
        grids = [part.view(plane.rows, plane.columns, -1) for part, plane in zip(parts, shape.planes)]
        stay = torch.cat([~repeated(grid, then, self.tau) for grid, then in zip(grids, self._before(adapter, item, grids))])
        if stay.all():
            return self.untouched_plan(shape)
        kept = tuple(stay.nonzero()[:, 0].tolist())
        return Plan(shape, len(kept), after=VisualShape((Plane(1, len(kept), placed=False),), shape.modality), stay=kept)

    def _before(self, adapter: Family, item: Any, grids: list[Tensor]) -> list[Tensor | None]:
        """What stood where each picture or frame is, as far as it is compared with it."""
        if not self.dedup:
            return [None] * len(grids)
        before = getattr(item, "before", None)
        first = None if before is None else adapter.token_pixels(before).view(grids[0].shape)  # type: ignore[attr-defined]
        return [first, *grids[:-1]]

    def grids_left(self, planned: Plan) -> tuple[Grid, ...] | None:
        return super().grids_left(planned) if planned.untouched else None

    def describe(self, shape: VisualShape | None, adapter: Family) -> str:
        return f"pixelprune drops the tokens whose pixels a neighbour's say (tau={self.tau:g}), before the tower"

    def check_parts(self, adapter: Family) -> None:
        super().check_parts(adapter)
        if not adapter.drops_patches:
            raise UnsupportedModelError(
                f"pixelprune drops patches before the tower of Qwen2.5-VL or Qwen3-VL, which {adapter.name} has not: use a method that "
                "works after it"
            )

    def check_budget(self, adapter: Family, usual: VisualShape) -> None:
        """There is none."""


def repeated(pixels: Tensor, before: Tensor | None, tau: float) -> Tensor:
    """(rows * columns,) whether each token of pixels (rows, columns, D) is what is said of it. before: what stood there, if anything.

    The first token stays, so that something does.
    """
    alone = predicted(pixels, tau)
    if before is None:
        return alone
    new = ~_same(pixels, before, tau)
    left, above = torch.ones_like(new), torch.ones_like(new)
    left[:, 1:], above[1:] = new[:, :-1], new[:-1]
    out = torch.where(left & above, alone.view(new.shape), ~new)
    out[0, 0] = False
    return out.flatten()


def predicted(pixels: Tensor, tau: float) -> Tensor:
    """(rows * columns,) whether each token of pixels (rows, columns, D) is what its neighbours say."""
    across, down = _same(pixels[:, 1:], pixels[:, :-1], tau), _same(pixels[1:], pixels[:-1], tau)
    out = torch.zeros(pixels.shape[:2], dtype=torch.bool, device=pixels.device)
    out[0, 1:], out[1:, 0] = across[0], down[:, 0]
    edge = down[:, :-1] & ~across[:-1]  # of the tokens from the second row and column on: upper left like left, unlike above
    out[1:, 1:] = torch.where(edge, down[:, 1:], across[1:])
    return out.flatten()


def _same(a: Tensor, b: Tensor, tau: float) -> Tensor:
    return ((a - b).abs() <= tau).all(-1)
