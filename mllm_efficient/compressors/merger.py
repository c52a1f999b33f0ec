"""Mergers make new tokens out of N."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import CountMismatchError, UnsupportedModelError
from ..plans import Plan
from ..tokens import CompressedTokens, Grid, Plane, VisualShape, VisualTokens
from .base import Compressor

if TYPE_CHECKING:
    from ..family import Family


@dataclass(frozen=True, kw_only=True)
class Merger(Compressor):
    """Makes new tokens out of N. Override ``merge(v, k) -> CompressedTokens``, and ``yields`` where it gives fewer than k.

    One that merges in the blocks of the tower says so by ``in_tower``, and defines ``in_blocks``.
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

    def in_blocks(self, n: int, k: int, blocks: int) -> tuple[int, ...]:
        """Pairs that each of so many blocks of a tower merges, on the way from n tokens to k."""
        raise TypeError(f"{type(self).__name__} must define in_blocks(n, k, blocks)")

    @property
    def fills_rectangles(self) -> bool:
        return type(self).target is not Merger.target

    def plan(self, adapter: Family, item: Any) -> Plan:
        if not self.in_tower:
            return super().plan(adapter, item)
        untouched = self.untouched_plan(item.shape)
        n, k = item.shape.n, self.budget.count(item.shape.n, fixed=adapter.fixed_count)
        if k == n:
            return untouched
        after, rounds = VisualShape((Plane(1, k, placed=False),)), self.in_blocks(n, k, adapter.tower_blocks)
        return Plan(item.shape, k, after=after, rounds=rounds, clamped=untouched.clamped)

    def grids_left(self, planned: Plan) -> tuple[Grid, ...] | None:
        return tuple(self.target(g.grid, g.k) for g in planned.groups) if planned.groups else super().grids_left(planned)

    def check_parts(self, adapter: Family) -> None:
        super().check_parts(adapter)
        if self.in_tower and (not adapter.tower_blocks or (usual := adapter.usual()) is None or len(usual.planes) > 1):
            raise UnsupportedModelError(
                f"{self.name}: at='tower' merges in a LLaVA-1.5's tower that gives the patches of one layer, which {adapter.name} has not: "
                "leave at= out"
            )

    def check_budget(self, adapter: Family, usual: VisualShape) -> None:
        k = self.budget.count(usual.n, fixed=adapter.fixed_count)
        if self.in_tower and k < usual.n:
            self.in_blocks(usual.n, k, adapter.tower_blocks)
