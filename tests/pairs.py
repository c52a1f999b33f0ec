"""Fewer tests that say as much: every two values together instead of all combinations, many small cases in one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import chain, combinations, product
from typing import Any

import pytest


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


def two_by_two(test: Callable) -> Callable:
    """The parametrizations stacked on a test, as the cases in which every two of their values meet."""
    stacked = [mark for mark in test.pytestmark if mark.name == "parametrize"]
    names = ", ".join(mark.args[0] if isinstance(mark.args[0], str) else ", ".join(mark.args[0]) for mark in stacked)
    axes = [[_case(mark, i, value) for i, value in enumerate(mark.args[1])] for mark in stacked]
    cases = []
    for chosen in pairwise(product(*(range(len(axis)) for axis in axes))):
        parts = [axis[i] for axis, i in zip(axes, chosen)]
        values, marks = ([*chain(*of_each)] for of_each in zip(*((part.values, part.marks) for part in parts)))
        cases.append(pytest.param(*values, marks=marks, id="-".join(part.id for part in parts)))
    test.pytestmark = [mark for mark in test.pytestmark if mark not in stacked]
    return pytest.mark.parametrize(names, cases)(test)


def _case(mark: pytest.Mark, i: int, value: Any):
    """A value of a parametrization with the id that pytest would give it, or its place."""
    if isinstance(value, type(pytest.param())):
        values, marks, name = value.values, value.marks, value.id
    else:
        several = not isinstance(mark.args[0], str) or "," in mark.args[0]
        values, marks, name = tuple(value) if several else (value,), (), None
    ids = mark.kwargs.get("ids")
    if name is None and ids is not None:
        name = "-".join(str(ids(v)) for v in values) if callable(ids) else ids[i]
    if name is None:
        name = "-".join(v if isinstance(v, str) else str(v) if isinstance(v, (int, float, type(None))) else f"case{i}" for v in values)
    return pytest.param(*values, marks=marks, id=name)
