"""Proportional attention: a token that holds others is attended to as so many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from ..budget import Budget
from ..errors import BadBudgetError
from ..plans import Plan
from ..registry import register
from ..tokens import Grid, VisualShape
from . import fit
from .reducer import Reducer

if TYPE_CHECKING:
    from ..family import Family


@register("proportional")
@dataclass(frozen=True, kw_only=True)
class Proportional(Reducer):
    """In every layer the logarithm of how many tokens a merged one holds is added to the attention that it gets. Takes no budget.

    After a method that selects and merges: ``divmerge:keep=0.1 | proportional``. n copies of a token get together n times the attention
    of one, so a token that stands for n is given as much; text and single tokens are as they are. Later turns and new tokens see
    the same weights, which the cache remembers. It is an addition to the attention mask: kernels "sdpa" and "eager" take it, flash
    attention does not and is refused. No FLOPs of its own.
    Source: ToMe's proportional attention (Bolya et al., ICLR 2023, arXiv 2210.09461), which has it inside the vision tower.
    """

    paper: ClassVar[str] = "arXiv 2210.09461"
    weighs: ClassVar[bool] = True

    keep: float | None = 1.0

    def __post_init__(self) -> None:
        given = [n for n in ("tokens", "prune", "min_tokens", "max_tokens", "ratio", "ratios") if getattr(self, n) is not None]
        if given or self.keep != 1.0:
            raise BadBudgetError(f"proportional: {', '.join(given or ['keep'])}= has no effect: it drops nothing")
        super().__post_init__()

    @property
    def budget(self) -> Budget:
        return Budget(keep=1.0)

    def layers(self, depth: int) -> tuple[int, ...]:
        return ()

    def stages(self, depth: int) -> tuple[int, ...]:
        return ()

    def counts(self, n: int, depth: int, *, fixed: bool = True, grids: Sequence[Grid] | None = None) -> tuple[int, ...]:
        return ()

    def _reduced(self, adapter: Family, before: Plan, grids: tuple[Grid, ...] | None) -> Plan:
        return replace(before, per_layer=(before.kept,) * adapter.decoder_layers, entering=before.separators)

    def check(self, adapter: Family) -> None:
        """Nothing is merged before it where it is alone: a composition asks its parts by itself."""
        fit.require_counts(self, None)

    def describe(self, shape: VisualShape | None, adapter: Family) -> str:
        return "proportional weighs tokens by how many each holds"

    def describe_plan(self, planned: Plan, adapter: Family, first: bool = True) -> str:
        return self.describe(None, adapter)
