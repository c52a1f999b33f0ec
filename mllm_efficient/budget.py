"""How many visual tokens are kept: the one rounding rule, shared by every back end and by the FLOPs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from .errors import BadBudgetError, MissingBudgetError


@dataclass(frozen=True)
class Budget:
    """``keep`` (fraction kept), ``tokens`` (count kept) or ``prune`` (fraction removed): exactly one of the three.

    With a fraction, ``min_tokens`` and ``max_tokens`` bound the count. down: a fraction's count is rounded down, as vLLM rounds that of a
    video, its floating-point arithmetic included. Raises ``BadBudgetError`` on anything that
    cannot be honoured: booleans, NaN, float counts, fractions outside (0, 1], bounds that cross or have no effect.
    """

    keep: float | None = None
    tokens: int | None = None
    prune: float | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    down: bool = False

    def __post_init__(self):
        given = [n for n in ("keep", "tokens", "prune") if getattr(self, n) is not None]
        if len(given) != 1:
            one = "give exactly one of keep=0.1, tokens=64 or prune=0.9"
            raise BadBudgetError(f"{' and '.join(given)} together: {one}") if given else MissingBudgetError(f"no budget: {one}")
        if self.tokens is not None:
            _count("tokens", self.tokens)
            if self.min_tokens is not None or self.max_tokens is not None:
                raise BadBudgetError("min_tokens and max_tokens have no effect with tokens=: use them with keep=")
        else:
            name = given[0]
            value = _fraction(name, getattr(self, name))
            ok = 0 < value <= 1 if name == "keep" else 0 <= value < 1
            if not ok:
                bounds = "(0, 1]" if name == "keep" else "[0, 1)"
                raise BadBudgetError(f"{name}={getattr(self, name)} is outside {bounds}")
        for name in ("min_tokens", "max_tokens"):
            if getattr(self, name) is not None:
                _count(name, getattr(self, name))
        if self.min_tokens and self.max_tokens and self.min_tokens > self.max_tokens:
            raise BadBudgetError(f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}")

    @property
    def fraction(self) -> float | None:
        """The kept fraction, or None for a count."""
        if self.prune is not None:
            return round(1 - self.prune, 12)  # 1 - 0.9 is a hair below 0.1 in binary, which can cost a token
        return self.keep

    def count(self, n: int, *, fixed: bool = True) -> int:
        """K for an image of ``n`` tokens: ``clamp(round(keep * n), min_tokens, max_tokens)`` or ``tokens``; see ``down``.

        Never above n, at least 1. ``tokens`` above n raises where every image has n tokens (``fixed``); elsewhere it
        keeps all n.
        """
        if n < 1:
            raise BadBudgetError(f"an image with {n} visual tokens cannot be compressed")
        if self.tokens is not None:
            if fixed and self.tokens > n:
                raise BadBudgetError(f"tokens={self.tokens} is more than the {n} an image has: use at most {n}")
            return min(self.tokens, n)
        fraction = self.fraction
        assert fraction is not None
        k = int(n * (1 - round(1 - fraction, 12))) if self.down else round(fraction * n)
        if self.max_tokens is not None:
            k = min(k, self.max_tokens)
        if self.min_tokens is not None:
            k = max(k, self.min_tokens)
        return max(1, min(k, n))


def _fraction(name: str, value) -> float:
    if isinstance(value, int) and not isinstance(value, bool):
        return float(min(max(value, -2), 2))  # whole numbers of any size; all but 0 and 1 are out of bounds
    if not isinstance(value, float) or not math.isfinite(value):
        raise BadBudgetError(f"{name}={value!r} is not a fraction, such as {name}=0.1")
    return value


def _count(name: str, value) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadBudgetError(f"{name}={value!r} is not a whole number of tokens, such as {name}=64")
    if value < 1:
        raise BadBudgetError(f"{name}={value} is below 1: at least one visual token is kept")
    return value


def fit_grid(grid: tuple[int, int], k: int) -> tuple[int, int]:
    """The smaller grid (h, w) with h * w <= k that is nearest the aspect of ``grid``.

    Candidates are the grids to which no row and no column can be added within k and ``grid``; among equally near
    ones the larger wins, then the wider.
    """
    rows, cols = grid
    best: tuple[tuple[Fraction, int, int], tuple[int, int]] | None = None
    for h in range(1, rows + 1):
        w = min(cols, k // h)
        if w < 1 or (h < rows and (h + 1) * w <= k):
            continue
        across, down = w * rows, h * cols
        rank = (Fraction(max(across, down), min(across, down)), -h * w, -w)
        if best is None or rank < best[0]:
            best = (rank, (h, w))
    assert best is not None
    return best[1]


def apportion(k: int, sizes: Sequence[int]) -> list[int]:
    """k tokens shared out to parts of these sizes in proportion: floor(k * size / total), at least 1, never above k in all.

    Raises ``BadBudgetError`` where there are more parts than tokens.
    """
    if k < len(sizes):
        raise BadBudgetError(f"{k} token(s) for {len(sizes)} parts of an image: at least {len(sizes)} are needed, one for each")
    total = sum(sizes)
    shares = [max(1, k * size // total) for size in sizes]
    while sum(shares) > k:
        shares[shares.index(max(shares))] -= 1
    return shares
