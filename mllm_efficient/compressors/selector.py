"""Selectors keep K of the N tokens, as they are or with the others averaged into them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import BadBudgetError, BadSettingError, CountMismatchError
from ..tokens import CompressedTokens, VisualTokens
from . import merging
from .base import Compressor, generator_for
from .math.finite import require_inside, require_scores

if TYPE_CHECKING:
    from torch import Tensor

    from ..family import Family
    from ..plans import Plan


@dataclass(frozen=True, kw_only=True)
class Selector(Compressor):
    """Keeps K of the N tokens as they are. Override ``score`` (the K highest stay) or ``select``.

    ``select(v, k)`` may return any order; callers get raster order. It may be called with a tensor (N, D) and
    without k, which is then computed from the budget.

    merge: what becomes of the others. None drops them. "mean": each joins the kept token that it is most like by cosine (of equals
    the one with the lowest index), and a kept token becomes the mean of its group, itself one of it. "similarity": the mean is
    weighted, 1 for the kept token and for another its cosine, 0 where that is negative. Which tokens are kept, their places and
    their positions are as without merging. Features that a model adds in later layers (deepstack) are averaged over the same groups
    with the same weights: what a token stands for is the same in every layer. O((N - K) K D) more, and (N - K) x K numbers.
    Sources: VScan (arXiv 2505.22654), ApET (arXiv 2602.19870).

    age: of an image the budget is multiplied by it for every later turn of its prompt that has images: with ``keep=0.5,age=0.5`` the newest
    keep half, those of the turn before a quarter. Turns end with the tokens that end an answer of the model. A turn that goes on from a
    cache leaves the images in it as they are.
    """

    merge: str | None = None
    age: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.age is not None and (isinstance(self.age, bool) or not isinstance(self.age, (int, float)) or not 0 < self.age < 1):
            raise BadSettingError(
                f"{self.name}: age={self.age!r} is not a fraction between 0 and 1, what a budget is multiplied by each turn"
            )
        if self.merge is None:
            return
        if self.merge not in merging.RULES:
            raise BadSettingError(f"{self.name}: merge={self.merge!r} is not one of {merging.RULES}")
        if type(self).compress is not Selector.compress:
            raise BadSettingError(f"{self.name} has a compress of its own, so merge= would have no effect: leave it out")

    def plan(self, adapter: Family, item: Any) -> Plan:
        turns = getattr(item, "age", 0)
        return super().plan(adapter, item) if self.age is None or not turns else self.aged(turns).plan(adapter, item)

    def aged(self, turns: int) -> Selector:
        """The method for an image after which so many turns brought others."""
        assert self.age is not None
        share, of_age = self.age**turns, dict[str, Any](age=None, prune=None)
        if self.tokens is not None:
            return replace(self, **of_age, tokens=max(1, round(self.tokens * share)))
        return replace(self, **of_age, keep=(self.fraction or 0) * share)

    def score(self, v: VisualTokens) -> Tensor:
        """One score per token, (N,); the highest stay, ties go to the lowest index."""
        raise TypeError(f"{type(self).__name__} must define score(v) or select(v, k)")

    def select(self, v: VisualTokens | Tensor, k: int | None = None) -> Tensor:
        """Indices of the tokens to keep, LongTensor (K,)."""
        assert isinstance(v, VisualTokens)
        scores = self.score(v)
        if scores.shape != (len(v),):
            raise CountMismatchError(f"{self.name}: score gave {tuple(scores.shape)} for {len(v)} tokens: one each")
        require_scores(scores, self.name)
        return scores.sort(descending=True, stable=True).indices[:k]

    def count_of(self, v: VisualTokens) -> int:
        """K of an image or video that ``select`` is given by itself."""
        return self.count(len(v), v.grid)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "select" in cls.__dict__:
            cls.select = _checked(cls.select)  # type: ignore[method-assign]

    def compress(self, v: VisualTokens, k: int) -> CompressedTokens:
        return self._left(v, self.select(v, k))

    def compress_batch(self, parts: list[VisualTokens], k: int) -> list[CompressedTokens]:
        indices = self.select_batch(parts, k)
        if self.order == "raster":
            indices = indices.sort(dim=1).values
        return [self._left(v, index) for v, index in zip(parts, indices)]

    @property
    def says_counts(self) -> bool:  # type: ignore[override]
        return self.merge is not None

    def merge_flops(self, n: int, d: int, k: int) -> int:
        """The cosines of what is merged with what is kept."""
        return 2 * (n - k) * k * d if self.merge is not None else 0

    def describe_plan(self, planned: Plan, adapter: Family, first: bool = True) -> str:
        """``divmerge keeps 36 of 144 tokens per image and merges the others into them``."""
        said = super().describe_plan(planned, adapter, first)
        return said if self.merge is None or planned.untouched else f"{said} and merges the others into them"

    def _left(self, v: VisualTokens, kept: Tensor) -> CompressedTokens:
        """What is left of an image's tokens, of which ``kept`` (K,) stay."""
        if self.merge is None:
            return CompressedTokens(v.features[kept], kept)
        groups, likeness = merging.join(v.features, kept, self.name)
        weights = merging.weights_of(self.merge, likeness)
        return CompressedTokens(merging.averaged(v.features, groups, weights, len(kept)), kept, None, groups, weights)

    def select_batch(self, parts: list[VisualTokens], k: int) -> Tensor:
        """(B, K) indices of parts that are alike, in any order: what ``select`` gives for each, to the bit."""
        raise TypeError(f"{type(self).__name__} sets shares_work and must define select_batch(parts, k)")


def _checked(select: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``select`` that takes a bare tensor too, and returns exactly k indices in raster order."""

    @functools.wraps(select)
    def checked(self: Selector, v: VisualTokens | Tensor, k: int | None = None) -> Tensor:
        if not isinstance(v, VisualTokens):
            if v.ndim != 2:
                raise CountMismatchError(f"{self.name}: features must be (tokens, width), not {tuple(v.shape)}")
            v = VisualTokens(v, generator=generator_for(self, 0))
        k = self.count_of(v) if k is None else k
        if not 1 <= k <= len(v):
            raise BadBudgetError(f"{self.name}: {k} of {len(v)} tokens cannot be kept")
        indices = select(self, v, k)
        if indices.shape != (k,):
            raise CountMismatchError(f"{self.name}: select gave {tuple(indices.shape)} indices where {k} were asked")
        indices = require_inside(indices, len(v), self.name)
        return indices if self.order == "picked" else indices.sort().values

    return checked


Selector.select = _checked(Selector.select)  # type: ignore[method-assign]
