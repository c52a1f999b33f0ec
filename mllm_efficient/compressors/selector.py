"""Selectors keep K of the N tokens as they are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import BadBudgetError, CountMismatchError
from ..tokens import CompressedTokens, VisualTokens
from .base import Compressor, generator_for
from .math.finite import require_inside, require_scores

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Selector(Compressor):
    """Keeps K of the N tokens as they are. Override ``score`` (the K highest stay) or ``select``.

    ``select(v, k)`` may return any order; callers get raster order. It may be called with a tensor (N, D) and
    without k, which is then computed from the budget.
    """

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

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "select" in cls.__dict__:
            cls.select = _checked(cls.select)  # type: ignore[method-assign]

    def compress(self, v: VisualTokens, k: int) -> CompressedTokens:
        indices = self.select(v, k)
        return CompressedTokens(v.features[indices], indices)

    def compress_batch(self, parts: list[VisualTokens], k: int) -> list[CompressedTokens]:
        indices = self.select_batch(parts, k)
        if self.order == "raster":
            indices = indices.sort(dim=1).values
        return [CompressedTokens(v.features[index], index) for v, index in zip(parts, indices)]

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
        k = self.count(len(v), v.grid) if k is None else k
        if not 1 <= k <= len(v):
            raise BadBudgetError(f"{self.name}: {k} of {len(v)} tokens cannot be kept")
        indices = select(self, v, k)
        if indices.shape != (k,):
            raise CountMismatchError(f"{self.name}: select gave {tuple(indices.shape)} indices where {k} were asked")
        indices = require_inside(indices, len(v), self.name)
        return indices if self.order == "picked" else indices.sort().values

    return checked


Selector.select = _checked(Selector.select)  # type: ignore[method-assign]
