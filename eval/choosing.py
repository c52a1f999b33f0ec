"""Which requests of a run to label, so that few labels say most about how much accuracy methods lose: disagreement times diversity.

Where a method answers in the same words as the uncompressed model, the difference between the two is 0 whatever is right. So requests are
drawn with probabilities that go up with disagreement, after the strategies of query by committee (Cacciarelli and Kulahci, arXiv
2302.08893), one from every stretch of a line on which like requests stand side by side: what is drawn is diverse.

Estimates have no bias: how far labels are from what the arms' votes foretell, which is known of all requests, counts with 1 over the
probability of each (the difference estimator, Sarndal, Swensson and Wretman 1992, of Horvitz and Thompson's kind).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mllm_efficient.errors import MllmEfficientError
from mllm_efficient.parsing import finished_lines, parse_json
from mllm_efficient.stats import student

from .answers import matches, normalise
from .record.samples import SAMPLES_FILE, read_lines
from .report.merge import Finished

EXPLORE = 0.2


@dataclass(frozen=True)
class Answered:
    """A request without a label. answers: of every arm, the baseline first; None where it failed."""

    id: str
    question: str
    answers: tuple[str | None, ...]
    images: tuple[str, ...] = ()

    @property
    def differ(self) -> tuple[bool, ...]:
        """Of each arm after the baseline, whether its answer is in other words than the baseline's."""
        first, *others = (None if answer is None else normalise(answer) for answer in self.answers)
        return tuple(other != first for other in others)

    @property
    def votes(self) -> tuple[float, ...]:
        """Of each arm the share of arms that give its answer, 0 where it failed: what its being right is foretold as."""
        said = [None if answer is None else normalise(answer) for answer in self.answers]
        return tuple(0.0 if own is None else said.count(own) / len(said) for own in said)


@dataclass(frozen=True)
class Estimated:
    """A mean over all requests in points, and its standard error; None where the labels cannot say."""

    value: float | None
    error: float | None


def probabilities(requests: Sequence[Answered], budget: int, explore: float = EXPLORE) -> np.ndarray:
    """(N,) the probability of each request to be drawn; they sum up to the budget, or to what there is to be drawn.

    A share ``explore`` of the budget is spread evenly, without which the accuracies themselves could not be estimated, only differences.
    The rest goes by the root of the share of arms that differ from the baseline: of all ways to spread it, this leaves the least variance
    summed over arms where one answer out of two that differ is right. What the requests that differ cannot take, the others get.
    """
    differ = np.sqrt([np.mean(r.differ) for r in requests])
    most = min(budget, len(requests))
    evenly = _spread(np.ones(len(requests)), explore * most, np.ones(len(requests)))
    out = evenly + _spread(differ, (1 - explore) * most, 1 - evenly)
    rest = most - out.sum()
    return out if explore == 0 or rest < 1e-9 else out + _spread(np.ones(len(requests)), rest, 1 - out)


def _spread(weights: np.ndarray, total: float, room: np.ndarray) -> np.ndarray:
    """``total`` in parts that go by the weights, none of them above its room; less than that where there is not room enough."""
    out, open_ = np.zeros(len(weights)), weights > 0
    while open_.any() and total - out.sum() > 1e-12:
        part = (total - out.sum()) * weights * open_ / weights[open_].sum()
        out = np.minimum(out + part, room)
        open_ &= out < room - 1e-12
    return out


def line_up(requests: Sequence[Answered], seed: int = 0) -> list[int]:
    """The places of the requests on a line on which those stand side by side of which the same arms differ, then the same is asked,
    then the same is answered; otherwise by chance."""
    chance = np.random.default_rng([seed, 1]).permutation(len(requests))
    return sorted(
        range(len(requests)),
        key=lambda i: (requests[i].differ, normalise(requests[i].question), normalise(requests[i].answers[0] or ""), chance[i]),
    )


def draw(p: np.ndarray, line: Sequence[int], seed: int | Sequence[int] = 0) -> list[int]:
    """Places, ascending, each with its probability: one for every whole step along a line on which each takes as much room as its
    probability, from a start by chance (systematic sampling, Madow 1949)."""
    ends = np.cumsum(p[list(line)])
    ends = np.where(np.abs(ends - np.round(ends)) < 1e-9, np.round(ends), ends)
    start = np.random.default_rng(seed).random()
    taken = np.floor(ends - start) > np.floor(np.concatenate([[0.0], ends[:-1]]) - start)
    return sorted(line[int(i)] for i in np.flatnonzero(taken))


def estimate(values: Any, foretold: Any, p: Any, foretold_of_all: Any, n: int) -> Estimated:
    """The mean over n requests, in the unit of the values.

    values, foretold, p: of those drawn, what is true, what was foretold and their probabilities. foretold_of_all: the mean of what was
    foretold. Without bias where everything that has no chance to be drawn is as foretold.

    The standard error is that of draws with replacement: a little too large, as systematic draws have no unbiased one. Those that were
    certain to be drawn have no part in it.
    """
    off = (np.asarray(values, dtype=float) - foretold) / p
    value, parts = float(foretold_of_all + off.sum() / n), off[np.asarray(p) < 1]
    if len(parts) == 1:
        return Estimated(value, None)
    return Estimated(value, math.sqrt(len(parts) * parts.var(ddof=1)) / n if len(parts) else 0.0)


# ------------------------------------------------------------------------------------------------ runs and files


def read_run(folder: Path, ids: Sequence[str]) -> tuple[list[str], list[Answered], int]:
    """The arms of a finished ``eval --data`` or ``sweep --data``, the baseline first, its requests among ``ids`` that have images and no
    answer, and how many have one. Raises ``MllmEfficientError``."""
    finished = Finished.read(folder)
    if finished.meta.get("suite") != "data":
        raise MllmEfficientError(f"{folder} is no run of your own requests: make one with eval --data or sweep --data")
    records, _ = read_lines(folder / SAMPLES_FILE, lambda r: ((r["method"], r["id"]), r), "an evaluation")
    known, arms = dict(records), list(dict.fromkeys(row["method"] for row in finished.rows))
    arms = [arm for arm in arms if any(of == arm for of, _ in known)]
    if len(arms) < 2:
        raise MllmEfficientError(f"{folder} has the answers of {len(arms)} arm(s): choose needs the baseline's and a method's")
    absent = [i for i in ids if (arms[0], i) not in known]
    if absent:
        raise MllmEfficientError(f"{folder} has no answer to {absent[0]!r} and {len(absent) - 1} other request(s): is it of this data?")
    shown = [i for i in ids if known[arms[0], i]["task"] == "agreement"]
    asked = [i for i in shown if not known[arms[0], i]["expected"]]
    return arms, [_answered(i, arms, known) for i in asked], len(shown) - len(asked)


def _answered(i: str, arms: Sequence[str], known: dict[tuple[str, str], dict[str, Any]]) -> Answered:
    first = known[arms[0], i]
    rows = [known.get((arm, i), {}) for arm in arms]
    return Answered(i, first["question"], tuple(r.get("answer") if r.get("error") is None else None for r in rows), tuple(first["images"]))


def chosen_lines(requests: Sequence[Answered], arms: Sequence[str], budget: int, explore: float, seed: int) -> list[dict[str, Any]]:
    """A record for each request to label: ``answer`` is to be filled in, with what is right or a list of all that is."""
    p = probabilities(requests, budget, explore)
    votes = dict(zip(arms, np.mean([r.votes for r in requests], 0).tolist()))
    return [
        {
            "id": requests[i].id, "question": requests[i].question, "images": list(requests[i].images), "answer": None,
            "probability": float(p[i]), "answers": dict(zip(arms, requests[i].answers)), "of": len(requests),
            "votes": votes, "explore": explore,
        }
        for i in draw(p, line_up(requests, seed), seed)
    ]  # fmt: skip


def estimates(path: Path) -> list[dict[str, Any]]:
    """Rows of what a labelled file says: of each arm ``accuracy`` and ``difference`` to the baseline in points, with standard errors and
    95% intervals. Accuracy is None where ``explore`` was 0. Raises ``MllmEfficientError`` for lines that are not labelled."""
    lines = [parse_json(line) for line in finished_lines(path)]
    wrong = [
        n for n, r in enumerate(lines, 1) if not isinstance(r, dict) or not {"probability", "answers", "of", "votes", "explore"} <= r.keys()
    ]
    if wrong or not lines:
        raise MllmEfficientError(f"{path} line {wrong[0] if wrong else 1} is none that choose wrote")
    empty = [r["id"] for r in lines if r.get("answer") in (None, "", [])]
    if empty:
        raise MllmEfficientError(f"{path}: {len(empty)} of {len(lines)} have no answer yet, the first is {empty[0]!r}")
    p, n = [r["probability"] for r in lines], lines[0]["of"]
    arms, of_all = list(lines[0]["answers"]), lines[0]["votes"]
    votes = np.array([Answered(r["id"], "", tuple(r["answers"][arm] for arm in arms)).votes for r in lines]).T
    right = np.array([[_right(r, arm) for r in lines] for arm in arms])
    out = []
    for i, arm in enumerate(arms):
        row: dict[str, Any] = {"method": arm, "labels": len(lines), "requests": n}
        for name, less in (("accuracy", 0), ("difference", 1)):
            values, foretold, mean = right[i] - less * right[0], votes[i] - less * votes[0], of_all[arm] - less * of_all[arms[0]]
            known = less or lines[0]["explore"] > 0
            said = estimate(100 * values, 100 * foretold, p, 100 * mean, n) if known else Estimated(None, None)
            row |= {name: said.value, f"{name}_error": said.error, f"{name}_interval": _interval(said, len(lines))}
        out.append(row)
    return out


def _right(line: dict[str, Any], arm: str) -> float:
    answer, expected = line["answers"][arm], line["answer"]
    return float(answer is not None and matches(answer, [str(e) for e in (expected if isinstance(expected, list) else [expected])]))


def _interval(said: Estimated, labels: int) -> list[float] | None:
    if said.value is None or said.error is None:
        return None
    reach = student(0.025, max(labels - 1, 1)) * said.error
    return [said.value - reach, said.value + reach]


def text_of(lines: Sequence[dict[str, Any]]) -> str:
    """The records as JSONL."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
