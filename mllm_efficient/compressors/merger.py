"""Mergers make new tokens out of N."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import CountMismatchError
from ..plans import Plan
from ..tokens import CompressedTokens, Grid, VisualShape, VisualTokens
from .base import Compressor
from .in_tower import check_tower, check_tower_budget, plan_in_tower

if TYPE_CHECKING:
    from ..family import Family


@dataclass(frozen=True, kw_only=True)
class Merger(Compressor):
    """Makes new tokens out of N. Override ``merge(v, k) -> CompressedTokens``, and ``yields`` where it gives fewer than k.

    One that merges in the blocks of the tower says so by ``in_tower``, and defines what ``in_tower.WorksInTower`` has.
    """

    merges: ClassVar[bool] = True

    def merge(self, v: VisualTokens, k: int) -> CompressedTokens:
        raise TypeError(f"{type(self).__name__} must define merge(v, k)")

    def target(self, grid: tuple[int, int] | None, k: int) -> tuple[int, int]:
        """The grid that the merged tokens fill: a row of them where they fill none."""
        return 1, self.yields(k, grid)

    def compress(self, v: VisualTokens, k: int) -> CompressedTokens:
        out, wanted = self.merge(v, k), self.yields(k, v.grid)
        if len(out) != wanted:
            raise CountMismatchError(f"{self.name}: merge gave {len(out)} tokens where {wanted} were asked")
        return out

    @property
    def fills_rectangles(self) -> bool:
        return type(self).target is not Merger.target

    def plan(self, adapter: Family, item: Any) -> Plan:
        if not self.in_tower:
            return super().plan(adapter, item)
        return plan_in_tower(self, adapter, item)

    def grids_left(self, planned: Plan) -> tuple[Grid, ...] | None:
        return tuple(self.target(g.grid, g.k) for g in planned.groups) if planned.groups else super().grids_left(planned)

    def check_parts(self, adapter: Family) -> None:
        super().check_parts(adapter)
        if self.in_tower:
            check_tower(self, adapter, "leave at= out")

    def check_budget(self, adapter: Family, usual: VisualShape) -> None:
        if self.in_tower:
            check_tower_budget(self, adapter, usual)
        else:
            super().check_budget(adapter, usual)
