"""What the second environment leaves out: tests marked ``once``, and most families of the tests that run for all of them.

A test marked ``once`` that what differs between the environments could change fails. Of the families (tests/families.py) the second
environment runs one of each kind, and all of them in tests marked ``every_family``: those of what transformers itself can change in a
family, the call, the shapes, the positions, the cache. What the package does on top is the same code for all families of a kind.
Of a test with several parameters it runs so many cases that each value is in one; in the first environment they all meet.

Hooks of pytest, which ``conftest.py`` imports. Processes that a test starts are not looked into.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pytest

# What the two environments have in different versions, or one of them alone.
OTHERS = "(?:lmms_eval|vllm|torchvision)"
ABSENT = re.compile(rf"^\s*(?:from|import) {OTHERS}\b|needs_vllm\b|find_spec\(\"{OTHERS}\"|importorskip\(\"{OTHERS}\"", re.M)
STOCK = {
    "PreTrainedModel": ("__init__", "__call__"),
    "GenerationMixin": ("generate",),
    "ProcessorMixin": ("__call__",),
    "PreTrainedTokenizerBase": ("__init__", "__call__"),
    "BaseImageProcessor": ("__init__", "__call__"),
}
reached: pytest.StashKey[list[str]] = pytest.StashKey()


@contextmanager
def watched() -> Iterator[list[str]]:
    """What of transformers is called meanwhile, by name."""
    calls: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        # Where it is not imported yet the test itself would have to; the whole suite imports it before the first test.
        for name, methods in STOCK.items() if "transformers" in sys.modules else ():
            cls = getattr(sys.modules["transformers"], name)
            for method in methods:
                patch.setattr(cls, method, noting(getattr(cls, method), f"{name}.{method}", calls))
        yield calls


def noting(stock, name, calls):
    @functools.wraps(stock)
    def call(self, *args, **kwargs):
        calls.append(name)
        return stock(self, *args, **kwargs)

    return call


def once(item: pytest.Item) -> bool:
    return item.get_closest_marker("once") is not None


def kinds(family) -> set[str]:
    """In what a family differs from a plain one, by its flags."""
    flags = {f.name for f in fields(family) if isinstance(f.default, bool) and getattr(family, f.name) != f.default}
    return flags | ({"video"} if family.video else set())


def representatives(families: Mapping) -> list[str]:
    """Names of families that together are of every kind there is. The later ones first: they have all that their predecessors have."""
    out, seen = [], set()
    for name, family in reversed(families.items()):
        if kinds(family) - seen:
            out.append(name)
            seen |= kinds(family)
    return out


def elsewhere_too(items: list[pytest.Item]) -> list[pytest.Item]:
    """Those of modules that name nothing which only the second environment has: they run whole in the first."""
    modules = {getattr(item, "module", None) for item in items} - {None}
    only_there = {module for module in modules if ABSENT.search(inspect.getsource(module))}
    return [item for item in items if getattr(item, "module", None) not in only_there]


def spare(items: list[pytest.Item]) -> None:
    """Marks ``spared`` what only repeats a test with another family of the same kind; ``make test-integration`` leaves it out."""
    module = sys.modules.get(f"{__package__}.families")
    left = set(module.FAMILIES) - set(representatives(module.FAMILIES)) if module else set()
    for item in elsewhere_too(items):
        if not left or item.get_closest_marker("every_family"):
            continue
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if any(isinstance(value, str) and value in left for value in values):
            item.add_marker("spared")


def thin(items: list[pytest.Item]) -> None:
    """Marks ``spared`` the cases of a test of whose values each is in another case: all of them meet in the first environment alone.

    Greedy: the case with the most values that were in none goes first, of equals the earliest.
    """
    of_test: dict[tuple[Path, str], list[pytest.Item]] = {}
    for item in elsewhere_too(items):
        if hasattr(item, "callspec") and not item.get_closest_marker("spared"):
            of_test.setdefault((item.path, item.nodeid.partition("[")[0]), []).append(item)
    for cases in of_test.values():
        values = [{(name, repr(value)) for name, value in case.callspec.params.items()} for case in cases]
        missing = set().union(*values)
        while missing:
            best = max(range(len(cases)), key=lambda i: (len(values[i] & missing), -i))
            missing -= values[best]
            values[best] = set()
            cases[best] = None
        for case in filter(None, cases):
            case.add_marker("spared")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuses ``once`` on tests that name what only the second environment has: there they would be left out, here skipped."""
    spare(items)
    thin(items)
    for module in {item.module for item in items if isinstance(item, pytest.Function) and once(item)}:
        marks = getattr(module, "pytestmark", [])
        whole = any(mark.name == "once" for mark in (marks if isinstance(marks, list) else [marks]))
        own = {item.function for item in items if item.module is module and once(item)}
        for source in [inspect.getsource(module)] if whole else map(inspect.getsource, own):
            if found := ABSENT.search(source):
                raise pytest.UsageError(f"{module.__name__}: a test marked once names {found[0].strip()!r}: it would run nowhere")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    if not once(item):
        return (yield)
    with watched() as item.stash[reached]:
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item):
    result = yield
    if calls := item.stash.get(reached, []):
        pytest.fail(f"marked once, but it calls {calls[0]} of transformers, which differs between the environments", pytrace=False)
    return result
