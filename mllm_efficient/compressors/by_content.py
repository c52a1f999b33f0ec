"""Budgets that pictures spend by what is in them: a radius that all tokens must be within, or one budget for all pictures of a call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..budget import Budget
from ..errors import BadBudgetError, BadSettingError
from ..lazy import torch
from ..plans import Plan
from ..tokens import CompressedTokens, VisualShape, VisualTokens
from .grouping import groups_of, plan_of
from .selector import Selector

if TYPE_CHECKING:
    from torch import Tensor

    from ..family import Family

MOST = 2.0  # the largest cosine distance


@dataclass(frozen=True, kw_only=True)
class ByContent(Selector):
    """A selector that takes tokens one after the other and knows what each adds. Override ``picks``.

    radius: in place of a budget, the cosine distance within which every token of the picture has a kept one; as many stay as that
    takes, between ``min_tokens`` and ``max_tokens``. spend: "set" shares the budgets of all pictures of a call out among them by what
    each token adds, so that the sum is what it was and the radius of all is the same; each keeps one (or ``min_tokens``) at least. What a
    picture keeps then depends on the others of its call, and a call with one picture spends that one's budget. With ``per`` the parts of a
    picture are what pictures are here.

    How many stay is known when the tower has run. So FLOPs of a radius are not known before, a later stage cannot follow, and a server
    that reserves the places before cannot run either. One more wait for a GPU.
    """

    radius: float | None = None
    spend: str | None = None

    def __post_init__(self) -> None:
        if self.radius is not None:
            self._check_radius()
        super().__post_init__()
        if self.spend not in (None, "set"):
            raise BadSettingError(f"{self.name}: spend={self.spend!r} is not 'set': leave it out to give every picture its own budget")
        if self.spend is not None and self.radius is not None:
            raise BadSettingError(f"{self.name}: spend= shares a budget out, and radius= has none: leave one of them out")
        if self.age is not None and self.counts_by_content:
            raise BadSettingError(
                f"{self.name}: age= lowers the budget of every picture, and radius= and spend= give by content: leave it out"
            )
        if self.spend is not None and self.fraction == 1:
            raise BadSettingError(f"{self.name}: spend= has no effect where every token stays: leave it out")

    def _check_radius(self) -> None:
        value, given = self.radius, [name for name in ("keep", "tokens", "prune") if getattr(self, name) is not None]
        if given:
            raise BadBudgetError(f"{self.name}: radius= says by content how many tokens stay: leave {given[0]}= out")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and 0 < value < MOST):
            raise BadBudgetError(f"{self.name}: radius={value!r} is not a cosine distance between 0 and {MOST:g}, such as radius=0.2")

    @property
    def budget(self) -> Budget:
        """With a radius the most that may stay."""
        return super().budget if self.radius is None else Budget(1.0, min_tokens=self.min_tokens, max_tokens=self.max_tokens)

    @property
    def fraction(self) -> float | None:
        return super().fraction if self.radius is None else None

    @property
    def counts_by_content(self) -> bool:  # type: ignore[override]
        return self.radius is not None or self.spend is not None

    def picks(self, v: VisualTokens, most: int) -> tuple[Tensor, Tensor]:
        """Indices (most,) in the order of choice, and how far each was from those before it (the first infinitely far), descending."""
        raise TypeError(f"{type(self).__name__} must define picks(v, most)")

    def count_of(self, v: VisualTokens) -> int:
        k = super().count_of(v)
        return k if self.radius is None else self._counts([self.picks(v, k)[1]], [k])[0]

    def compress_all(self, parts: Sequence[VisualTokens], ks: Sequence[int]) -> list[CompressedTokens]:
        """Every part with as many tokens as its content asks for. ks: with a radius the most of each, else what they share out."""
        if not self.counts_by_content or not parts:
            return super().compress_all(parts, ks)
        most = ks if self.radius is not None else [min(len(v), self.max_tokens or len(v)) for v in parts]
        found = [self.picks(v, m) for v, m in zip(parts, most)]
        out = []
        for v, (order, _), k in zip(parts, found, self._counts([gains for _, gains in found], ks)):
            kept = order[:k]
            out.append(self._left(v, kept.sort().values if self.order == "raster" else kept))
        return out

    def _counts(self, gains: list[Tensor], ks: Sequence[int]) -> list[int]:
        """How many of each part's picks stay. gains: of each the distances of ``picks``, any device, waited for once."""
        parts = torch.cat(gains).cpu().split([len(g) for g in gains])
        least = [min(len(g), self.min_tokens or 1) for g in parts]
        if self.radius is not None:
            return [max(low, int((g > self.radius).sum())) for g, low in zip(parts, least)]
        sure = torch.cat([g.index_fill(0, torch.arange(low), math.inf) for g, low in zip(parts, least)])
        taken = torch.zeros(len(sure), dtype=torch.bool)
        taken[sure.sort(descending=True, stable=True).indices[: sum(ks)]] = True
        return [int(t.sum()) for t in taken.split([len(g) for g in parts])]

    # ------------------------------------------------------------------------------ before it is known

    def plan(self, adapter: Family, item: Any) -> Plan:
        """Of a picture at hand a plan that is open; of a size alone the budget's, which is the mean where it is shared out.

        Raises ``BadBudgetError`` for a radius and a size alone.
        """
        if not self.counts_by_content:
            return super().plan(adapter, item)
        if not getattr(item, "arguments", None):
            if self.radius is not None:
                raise BadBudgetError(f"{self.spec()}: how many tokens stay depends on the picture, and here is a size alone")
            return super().plan(adapter, item)
        shape: VisualShape = item.shape
        groups = groups_of(self, shape, self.wanted(shape, fixed=adapter.fixed_count))
        clamped = self.tokens is not None and any(self.tokens > g.n for g in groups)
        return Plan(shape, sum(g.kept for g in groups), groups, clamped=clamped, open=True)

    def settled(self, p: Plan, counts: Sequence[int]) -> Plan:
        """What an open plan has become, by how many tokens each of its groups kept."""
        return plan_of(self, p.shape, tuple(replace(g, k=k, kept=k) for g, k in zip(p.groups, counts)), p.clamped)

    def describe(self, shape: VisualShape | None, adapter: Family) -> str:
        if self.radius is not None:
            bounds = [f"{word} {n}" for word, n in (("at least", self.min_tokens), ("at most", self.max_tokens)) if n is not None]
            said = f"{self.name} keeps as many tokens as it takes to have one within a cosine distance of {self.radius:g} of each"
            return said + (f", {' and '.join(bounds)}" if bounds else "")
        said = super().describe(shape, adapter)
        return said if self.spend is None else f"{said}, on average over the pictures of a call, by content"
