"""Selectors keep K of the N tokens as they are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import BadBudgetError, CountMismatchError
from ..tokens import CompressedTokens, VisualTokens
from .base import Compressor, generator_for
from .math.finite import require_scores

if TYPE_CHECKING:
    from torch import Tensor

TOGETHER = 2**27  # entries in memory at a time: 512 MB of float32, 1 GB of float64


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

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "select" in cls.__dict__:
            cls.select = _checked(cls.select)  # type: ignore[method-assign]

    def compress(self, v: VisualTokens, k: int) -> CompressedTokens:
        indices = self.select(v, k)
        return CompressedTokens(v.features[indices], indices)

    def compress_alike(
        self,
        parts: Sequence[VisualTokens],
        ks: Sequence[int],
        choose: Callable[[list[VisualTokens], int], Tensor],
        entries: Callable[[int, int], int],
    ) -> list[CompressedTokens]:
        """``compress_all`` that hands ``choose`` all parts that are alike in size, K, dtype and device, as far as memory allows.

        choose: (parts, k) -> (B, k) indices. entries: (n, d) -> the numbers that a part of n tokens of width d keeps in memory.
        """
        done: dict[int, CompressedTokens] = {}
        for some, k in alike(self.name, parts, ks, entries):
            indices = choose([parts[i] for i in some], k)
            if self.order == "raster":
                indices = indices.sort(dim=1).values
            done |= {i: CompressedTokens(parts[i].features[index], index) for i, index in zip(some, indices)}
        return [done[i] for i in range(len(parts))]


def alike(
    name: str, parts: Sequence[VisualTokens], ks: Sequence[int], entries: Callable[[int, int], int]
) -> Iterator[tuple[list[int], int]]:
    """Numbers of the parts that are alike in size, K, dtype and device, as many at a time as memory allows, and their K."""
    groups: dict[Any, list[int]] = {}
    for i, (v, k) in enumerate(zip(parts, ks)):
        if not 1 <= k <= len(v):
            raise BadBudgetError(f"{name}: {k} of {len(v)} tokens cannot be kept")
        groups.setdefault((v.features.shape, v.features.dtype, v.features.device, k), []).append(i)
    for ((n, d), *_, k), members in groups.items():
        most = max(1, TOGETHER // entries(n, d))
        yield from ((members[start : start + most], k) for start in range(0, len(members), most))


def _checked(select: Callable) -> Callable:
    """``select`` that takes a bare tensor too, and returns exactly k indices in raster order."""

    @functools.wraps(select)
    def checked(self, v, k=None):
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
        if indices.min() < 0 or indices.max() >= len(v):
            raise CountMismatchError(f"{self.name}: select gave an index outside 0..{len(v) - 1}")
        return indices if self.order == "picked" else indices.sort().values

    return checked


Selector.select = _checked(Selector.select)  # type: ignore[method-assign]
