"""Projectors replace the model's own by a trained one that gives as many tokens as are asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import BadBudgetError, BadSettingError, UnsupportedModelError
from ..plans import Plan
from ..tokens import Plane, VisualShape
from .base import Compressor
from .kinds import PROJECTOR

if TYPE_CHECKING:
    from ..family import Family


@dataclass(frozen=True, kw_only=True)
class Projector(Compressor):
    """Replaces the model's projector by a trained one that gives side x side tokens per image, side chosen at run time.

    Override ``module(inputs, outputs)`` and ``projector_flops``. The budget is of one image, or of each tile of an anyres
    image: the largest square of at most K tokens. weights: a folder that ``mllm-efficient train`` wrote, or a hub id;
    "random" draws them, for timing alone; None is what ships for the embedded model.
    """

    kind: ClassVar[str] = PROJECTOR
    trained: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    weights: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per != "image" or self.newline is not None:
            raise BadSettingError(f"{self.name} gives every tile its tokens and keeps no newline columns: leave per= and newline= out")
        if self.weights is not None and not isinstance(self.weights, str):
            raise BadSettingError(f"{self.name}: weights={self.weights!r} is no folder or hub id")
        if self.tokens is not None and math.isqrt(self.tokens) ** 2 != self.tokens:
            near = math.isqrt(self.tokens)
            raise BadBudgetError(f"{self.name}: tokens={self.tokens} is no square: {near**2} and {(near + 1) ** 2} are")

    @property
    def full_is_identity(self) -> bool:
        return False

    @property
    def installs(self) -> Projector | None:
        return self

    def yields(self, k: int, grid: tuple[int, int] | None) -> int:
        return math.isqrt(k) ** 2

    def side(self, grid: tuple[int, int]) -> int:
        """Tokens along a side of what a tile of this grid becomes."""
        return math.isqrt(self.budget.count(grid[0] * grid[1], fixed=True))

    def module(self, inputs: int, outputs: int, **config: Any) -> Any:
        """A projector from tower width to language-model width, its weights not loaded yet."""
        raise TypeError(f"{type(self).__name__} must define module(inputs, outputs)")

    def projector_flops(self, inputs: int, outputs: int, n: int) -> int:
        """FLOPs of making n tokens, matrix products alone."""
        raise TypeError(f"{type(self).__name__} must define projector_flops(inputs, outputs, n)")

    def mixing_flops(self, inputs: int, outputs: int, grid: tuple[int, int], n: int | None) -> int:
        """FLOPs of what is done to a view's features on their grid before they become n tokens, or one each (None)."""
        return 0

    def joining_flops(self, inputs: int, n: int) -> int:
        """FLOPs of making one of n tokens of a view and those of other views at their places, for each view."""
        return 0

    def together(self, item: Any) -> bool:
        """Whether all views or frames of an item are one set, whose places get one token each."""
        return False

    @property
    def asks(self) -> bool:
        """Whether the folder that it names holds a projector whose tokens depend on the prompt's text."""
        return False

    @property
    def as_projector(self) -> Projector:
        return self

    @property
    def fills_rectangles(self) -> bool:
        return True

    def plan(self, adapter: Family, item: Any) -> Plan:
        shape: VisualShape = item.shape
        if shape.modality != "image" and not self.together(item):
            raise UnsupportedModelError(f"{self.name} projects pictures, and this call has a video")
        side = self.side(adapter.unit(item) if shape.modality == "image" else (shape.planes[0].rows, shape.planes[0].columns))
        after: VisualShape = as_one(shape, side) if self.together(item) else adapter.projected(item, side)
        if after.n > shape.n:
            raise BadBudgetError(
                f"{self.name}: {side * side} tokens for each of {len(after.planes)} views are {after.n}: the prompt has room for {shape.n}"
            )
        return Plan(shape, after.n, side=side, after=after)

    def check_budget(self, adapter: Family, usual: VisualShape) -> None:
        self.budget.count(len(usual.planes[-1]), fixed=adapter.fixed_count)


def as_one(shape: VisualShape, side: int) -> VisualShape:
    """What an image or video becomes all of whose views or frames are one set. Views of an image are of different parts of it."""
    video = shape.modality == "video"
    return VisualShape((Plane(side, side, frame=0 if video else None, placed=video),), shape.modality)
