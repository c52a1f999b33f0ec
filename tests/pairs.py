"""Fewer tests that say as much: every two values together instead of all combinations, many small cases in one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Iterable, Sequence
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


def for_all(name: str, values: Iterable[Any]) -> Callable[[Callable], Callable]:
    """One test that runs for every value of a parameter: what hundreds of small cases cost as tests of their own is mostly pytest.

    The first value that fails is named.
    """

    def decorate(test: Callable) -> Callable:
        @functools.wraps(test)
        def run(*args: Any, **kwargs: Any) -> None:
            for value in values:
                try:
                    test(*args, **kwargs, **{name: value})
                except Exception as error:
                    error.add_note(f"{name}={value!r}")
                    raise

        signature = inspect.signature(test)
        run.__signature__ = signature.replace(parameters=[p for n, p in signature.parameters.items() if n != name])
        return run

    return decorate
