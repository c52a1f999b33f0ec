"""Resizers make the image smaller instead of its tokens fewer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import UnsupportedModelError
from ..plans import Plan
from ..tokens import VisualShape
from .base import Compressor

if TYPE_CHECKING:
    from ..family import Family


@dataclass(frozen=True, kw_only=True)
class Resizer(Compressor):
    """Changes the image instead of its tokens. ``target(grid, k, tokens)`` gives the smaller grid the tower shall see.

    grid is one the image (or each of its tiles) has now; ``tokens(smaller)`` is the image's count with a smaller one.
    """

    merges: ClassVar[bool] = True

    def target(self, grid: tuple[int, int], k: int, tokens: Callable[[tuple[int, int]], int] = lambda g: g[0] * g[1]) -> tuple[int, int]:
        raise TypeError(f"{type(self).__name__} must define target(grid, k)")

    @property
    def as_resizer(self) -> Resizer:
        return self

    @property
    def merges_tokens(self) -> bool:
        return False

    @property
    def fills_rectangles(self) -> bool:
        return True

    def plan(self, adapter: Family, item: Any) -> Plan:
        shape, unit = item.shape, adapter.unit(item)
        untouched, k = self.untouched_plan(shape), self.budget.count(shape.n, fixed=adapter.fixed_count)
        smaller = self.target(unit, k, lambda grid: adapter.shape_at(item, grid).n) if k < shape.n else unit
        if smaller == unit:
            return untouched
        after: VisualShape = adapter.shape_at(item, smaller)
        separators = after.separators if self.newline else 0
        return Plan(shape, after.n, smaller=smaller, after=after, separators=separators, clamped=untouched.clamped)

    def check_parts(self, adapter: Family) -> None:
        super().check_parts(adapter)
        if self.per != "image":
            raise UnsupportedModelError(f"{self.name} makes whole pictures smaller: leave per= out")
