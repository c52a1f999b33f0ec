"""What a metric's value means: its scale, which metric of a task counts, and whether a single answer is right."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np

from mllm_efficient.stats import grouped, picks

RIGHT = 0.5  # a sample's score above which it counts as right
YES_NO = ("yes", "no")
SAID = ("pred", "prediction", "parsed_pred")
CIRCLE = 1_000_000  # what MMBench adds to a question's index for each other order of its choices
WHOLE = ("average", "overall", "total", "_all")
CLOSE = 1e-5  # some tasks round their metric to so much


@dataclass(frozen=True)
class Known:
    """A task whose scale is known. metric: the one that counts. top: of each metric the value that is 100 percent. per: what the
    number of right answers is divided by, however many were asked. pairs: samples come in pairs that belong together. errors: metrics
    of what is wrong. note: what a reader of its numbers should know."""

    metric: str
    title: str
    top: dict[str, float]
    pairs: bool = False
    per: int | None = None
    errors: Sequence[str] = ()
    note: str | None = None


@functools.cache
def known() -> dict[str, Known]:
    """``configs/benchmarks.yaml``."""
    import yaml

    content = yaml.safe_load((files("mllm_efficient.configs") / "benchmarks.yaml").read_text())
    return {name: Known(**{"top": {}, **entry}) for name, entry in content.items()}


def primary(task: str, higher: dict[str, bool]) -> str:
    """The metric of a task that tables show and means take: the known one, or of those that are better when higher the one that
    is called a whole, otherwise the first. higher: of each metric in order."""
    if task in known():
        return known()[task].metric
    better = [m for m, is_better in higher.items() if is_better] or list(higher)
    return next((m for m in better if any(word in m.lower() for word in WHOLE)), better[0])


def top_of(task: str, metric: str, value: float, scores: Sequence[float]) -> float | None:
    """The value of a metric that is 100 percent: known, or seen from a mean of the samples' scores, which lie in [0, 1]. Else None.

    A value of 0 says nothing of the scale: ask with that of another arm.
    """
    entry = known().get(task)
    if entry is not None:
        return len(scores) / entry.per if entry.per else entry.top.get(metric, 1.0)
    if not scores or not all(0 <= s <= 1 for s in scores):
        return None
    mean = sum(scores) / len(scores)
    return next((top for top in (1.0, 100.0) if abs(top * mean - value) < CLOSE * top), None)


def counts_errors(task: str, metric: str) -> bool:
    """Whether a metric is a share of what is wrong, so that what is left of 100 percent is the score."""
    return task in known() and metric in known()[task].errors


def sample_score(value: Any) -> float | None:
    """A sample's score as its task computed it, in [0, 1] for all but odd tasks: a number, a ``score`` in what is kept for the
    aggregation, or whether the choice kept there is the right one. None where there is nothing of that kind, as with captions."""
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, dict):
        return None
    if isinstance(value.get("score"), (int, float)):
        return float(value["score"])
    said, answer = next((value[k] for k in SAID if k in value), None), value.get("answer")
    said = said[0] if isinstance(said, list) and said else said  # MMMU keeps one prediction of each repetition
    if said is None or not isinstance(answer, str):
        return None
    if isinstance(said, list):
        return float(_open(said, answer))
    if circular(value):
        return float(_choice(value) == answer)
    return float(str(said).strip().lower() == answer.strip().lower())


def neither(answers: Sequence[str]) -> int:
    """How many answers begin with another word than yes or no. Some tasks count "None" and "Not sure" as no."""
    from ..runner import first_word

    return sum(first_word(a) not in YES_NO for a in answers)


def circular(item: Any) -> bool:
    """Whether the sample is a turn of one of MMBench's questions, which stands in the data with its choices in several orders."""
    return isinstance(item, dict) and "index" in item and "prediction" in item


def _choice(item: dict[str, Any]) -> str:
    """The letter that MMBench's static evaluation reads: one that is said plainly, else that of the only option whose words are in
    the answer, else what the extractor of letters finds."""
    from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    judge, turn = MMBench_Evaluator(), {**item, "prediction": str(item["prediction"])}
    return judge.prefetch_answer(turn) or extract_mcq_answer(turn["prediction"], choices=sorted(judge.build_choices(turn)))


def _open(candidates: Sequence[Any], answer: str) -> bool:
    """MMMU's rule for open questions: a number among the candidates, or a text inside one of them."""
    try:
        return round(float(answer.replace(",", "")), 2) in candidates
    except ValueError:
        wanted = answer.strip().lower()
        texts = [wanted] if len(wanted) > 1 else [f" {wanted}", f"{wanted} "]
        return any(t in c for c in candidates if isinstance(c, str) for t in texts)


# ------------------------------------------------------------------------------------------ a metric over resamples


@dataclass(frozen=True)
class Clustered:
    """A metric's samples by cluster, or why it has no interval.

    asked, right: of each cluster, in scores of samples (of questions, where a question is right if every turn of it is; a sample whose
    ``weight`` is not 1, as of a caption that names several objects, counts so often). drawn: the
    metric in each resample, where it is not top * right / asked. why: there is no interval. weighted: what is asked of a picture is up to
    the answer.
    """

    asked: list[float]
    right: list[float]
    drawn: list[float] | None = None
    why: str | None = None
    weighted: bool = False


def clustered(
    aggregate: Callable[..., Any] | None, items: Sequence[Any], clusters: Sequence[Hashable], value: float, top: float | None,
    seed: int = 0, name: str = "",
) -> Clustered:  # fmt: skip
    """What a metric is made of by cluster, and what it is in every resample of clusters.

    items: what the task kept of each sample for its aggregation, in the order of the samples; clusters: of each, what it is drawn
    with. value: of all of them. top: that is 100 percent. Where the metric is the mean of the samples' scores, sums say all;
    otherwise the task's own aggregation runs again on each resample, unless it writes files or there is no score of a sample.
    """
    scores = [sample_score(item) for item in items]
    known = [s for s in scores if s is not None]
    if not items or len(known) < len(items):
        return Clustered([], [], why="there is no score of a single answer")
    members = grouped(clusters)
    units = [_units([items[i] for i in m], [known[i] for i in m]) for m in members]
    weighted = any(_weight(i) != 1 for i in items)
    asked = [math.fsum(_weight(items[i]) for i in m) if weighted else float(len(u)) for u, m in zip(units, members)]
    right: list[float] = [math.fsum(u) for u in units]
    if top is not None and any(asked) and abs(math.fsum(right) / math.fsum(asked) * top - value) < CLOSE * top:
        return Clustered(asked, right, weighted=weighted)
    if aggregate is None or "args" in inspect.signature(aggregate).parameters:
        return Clustered(asked, right, why=f"the metric is {value:.6g} and its samples' scores do not come to that")
    drawn = _aggregated(aggregate, items, members, seed, name)
    return Clustered(asked, right, drawn, None if drawn else "some resamples leave the metric undefined")


def _weight(item: Any) -> float:
    """How often a sample counts in a share over all samples."""
    return float(item.get("weight", 1.0)) if isinstance(item, dict) else 1.0


def _units(items: Sequence[Any], scores: Sequence[float]) -> list[float]:
    """The scores of a cluster's questions. One that stands there in several orders counts once, and only if the first is among them."""
    if not any(map(circular, items)):
        return [s * _weight(i) for i, s in zip(items, scores)]
    turns: dict[int, list[tuple[int, float]]] = {}
    for item, score in zip(items, scores):
        turns.setdefault(int(item["index"]) % CIRCLE, []).append((int(item["index"]), score))
    return [min(s for _, s in found) for found in turns.values() if min(i for i, _ in found) < CIRCLE]


def _aggregated(
    aggregate: Callable[..., Any], items: Sequence[Any], members: Sequence[Sequence[int]], seed: int, name: str
) -> list[float] | None:
    """The aggregation of each resample; None where one of them fails. A question that is drawn twice is two questions."""
    copies: list[list[list[Any]]] = []  # of each cluster as the first, second ... time that it is drawn
    out: list[float] = []
    with contextlib.redirect_stdout(io.StringIO()):  # some print every time
        for drawn in (row for block in picks(len(members), seed, name) for row in block):
            chosen: list[Any] = []
            times = np.bincount(drawn, minlength=len(members))
            while len(copies) < times.max():
                copies.append([[_copy(items[i], len(copies)) for i in m] for m in members])
            for cluster in np.flatnonzero(times):
                for again in range(times[cluster]):
                    chosen += copies[again][cluster]
            try:
                out.append(round(float(aggregate(chosen)), 8))
            except Exception:
                return None
    return out if np.isfinite(out).all() else None


def _copy(item: Any, again: int) -> Any:
    return {**item, "question_id": f"{again}/{item['question_id']}"} if isinstance(item, dict) and "question_id" in item else item
