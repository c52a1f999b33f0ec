"""What is switched in lmms-eval and around it while it runs, and back afterwards."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    """An environment variable, which is all that a task's functions can be told."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def once() -> Iterator[None]:
    """Without lmms-eval's silent repetitions, which hide the cause of an error for up to a minute."""
    from lmms_eval.api.task import ConfigurableTask
    from tenacity import stop_after_attempt

    policies = [function.retry for function in (ConfigurableTask.download, ConfigurableTask.process_results)]
    stops = [p.stop for p in policies]
    for policy in policies:
        policy.stop = stop_after_attempt(1)
    try:
        yield
    finally:
        for policy, stop in zip(policies, stops):
            policy.stop = stop


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Without lmms-eval's bars inside the one that counts answers."""
    from lmms_eval import evaluator
    from lmms_eval.api import task

    stock = [(module, module.tqdm) for module in (evaluator, task)]
    for module, bar in stock:
        module.tqdm = lambda *args, bar=bar, **kwargs: bar(*args, **{**kwargs, "disable": True})
    try:
        yield
    finally:
        for module, bar in stock:
            module.tqdm = bar


@contextlib.contextmanager
def own_draws() -> Iterator[None]:
    """Tasks that guess where an answer cannot be read (MMMU) draw by the sample, whichever process scores it and when."""
    from lmms_eval.api.task import ConfigurableTask

    stock: Any = ConfigurableTask.process_results

    @functools.wraps(stock)
    def process_results(self: Any, doc: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        random.seed(json.dumps(doc, sort_keys=True, default=lambda value: type(value).__name__))
        return stock(self, doc, *args, **kwargs)

    ConfigurableTask.process_results = process_results
    try:
        yield
    finally:
        ConfigurableTask.process_results = stock
