"""Tests marked ``once`` run in one environment; this fails those among them that what differs in the other could change.

Hooks of pytest, which ``conftest.py`` imports. Processes that a test starts are not looked into.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuses the mark on tests that name what only the second environment has: there they would be left out, here skipped."""
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
