"""Every two values together at least once, instead of every combination of all."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from itertools import combinations
from typing import Any


def pairwise(cases: Iterable[Sequence[Hashable]]) -> list[Any]:
    """Some of the cases (tuples), in their order: whatever two values meet in any case still meet in one of these.

    Greedy: the case that brings the most pairs that have not met goes first, of equals the earliest.
    """
    given = [tuple(case) for case in cases]
    pairs = [frozenset(combinations(enumerate(case), 2)) for case in given]
    missing, chosen = frozenset().union(*pairs), set()
    while missing:
        best = max(range(len(given)), key=lambda i: (len(pairs[i] & missing), -i))
        chosen.add(best)
        missing -= pairs[best]
    return [case for i, case in enumerate(given) if i in chosen]
