"""A task's metric over resamples of its samples. The same samples draw the same resamples, so arms are paired."""

from __future__ import annotations

import contextlib
import inspect
import io
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from .scores import CLOSE, sample_score

CIRCLE = 1_000_000  # what MMBench adds to a question's index for each other order of its choices
RESAMPLES, BLOCK = 1000, 50


def resampled(
    aggregate: Callable[..., Any] | None, items: Sequence[Any], value: float, top: float | None, seed: int = 0
) -> list[float] | None:
    """The metric in each of ``RESAMPLES`` resamples of the questions, those of one ``question_id`` together; None where it cannot be had.

    items: what the task kept of each sample for its aggregation, in the order of the samples. value: of all of them. Where it is
    the mean of the samples' scores that is resampled; otherwise the task's own aggregation runs again on each resample, unless it
    writes files or, as with captions, there is no score of a sample.
    """
    scores = [sample_score(item) for item in items]
    known = [s for s in scores if s is not None]
    if not items or len(known) < len(items):
        return None
    groups: dict[Hashable, list[int]] = {}
    for i, item in enumerate(items):
        groups.setdefault(_question(item, i), []).append(i)
    rng, members = np.random.default_rng(seed), list(groups.values())
    if any(_circular(item) for item in items):  # right if every turn is
        sums, sizes = np.array([min(known[i] for i in m) for m in members]), np.ones(len(members))
    else:
        sums, sizes = np.array([sum(known[i] for i in m) for m in members]), np.array([len(m) for m in members])
    if top is not None and abs(sums.sum() / sizes.sum() * top - value) < CLOSE * top:
        out: list[float] = []
        for _ in range(RESAMPLES // BLOCK):
            drawn = rng.integers(0, len(members), (BLOCK, len(members)))
            out += (top * sums[drawn].sum(1) / sizes[drawn].sum(1)).tolist()
        return out
    if aggregate is None or "args" in inspect.signature(aggregate).parameters:
        return None
    out = []
    with contextlib.redirect_stdout(io.StringIO()):  # some print every time
        for _ in range(RESAMPLES):
            chosen = [_as_drawn(items[i], draw) for draw, g in enumerate(rng.integers(0, len(members), len(members))) for i in members[g]]
            try:
                out.append(float(aggregate(chosen)))
            except Exception:  # a metric that some draw leaves undefined has no interval
                return None
    return out


def _question(item: Any, place: int) -> Hashable:
    """What samples of one question have in common."""
    if _circular(item):
        return int(item["index"]) % CIRCLE
    return f"question {item['question_id']}" if isinstance(item, dict) and "question_id" in item else place


def _circular(item: Any) -> bool:
    """Whether the sample is a turn of one of MMBench's questions, which stands in the data with its choices in several orders."""
    return isinstance(item, dict) and "index" in item and "prediction" in item


def _as_drawn(item: Any, draw: int) -> Any:
    """A question that is drawn twice is two questions."""
    return {**item, "question_id": f"{draw}/{item['question_id']}"} if isinstance(item, dict) and "question_id" in item else item
