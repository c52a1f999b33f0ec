"""Rows and tables of tasks: every metric of every arm, the baseline beside it, and what remains on the hard samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mllm_efficient.compressors.resize import Resize
from mllm_efficient.stats import Estimate, estimate, mean_of, points, sums

from ..calibration import COLUMNS, Calibrated, calibrated, columns
from ..sweep import Cell
from ..table import OVERALL, shares
from .host import Task
from .run import TaskRun
from .scores import RIGHT, YES_NO, counts_errors, neither, primary, top_of
from .server import ServerCell

MEANING = {
    "score": "percent of the metric's best value, of a metric that counts errors 100 less its percent; value: the metric as lmms-eval "
    "gives it, value_interval: 95%. overall: the unweighted mean over tasks",
    "difference": "score minus the baseline's, in points; difference_interval: 95% over 2,000 paired resamples of images, of the metric "
    "that counts; interval_missing says why there is none",
    "retention": "percent of the baseline's score; overall: the mean over tasks",
    "neither": "answers to questions of yes or no that begin with another word",
    "hard": "score on the samples that the baseline gets right and resize at the same budget gets wrong, of which there are hard_n",
    "broken": "percent wrong of the broken_n samples that the baseline and resize at the same budget get right",
    "ece": "expected calibration error of the answers' confidence (geometric mean of their tokens' probabilities) in percent; aurc: area "
    "under the risk-coverage curve in percent; lower is better, 95% intervals over resamples of images; overall: means over tasks; null "
    "where answers are a server's or of beams, or no single answer has a score between 0 and 1",
}
Samples = dict[str, dict[str, Any]]


def rows_of(run: TaskRun, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each task, arm and metric that has a value, the metric that counts first; after them one per arm for all tasks."""
    by: dict[tuple[str, str], Samples] = {}
    for record in records:
        by.setdefault((record["method"], record["task"]), {})[record["id"]] = record
    rows: list[dict[str, Any]] = []
    sure: dict[str, list[Calibrated | None]] = {cell.spec: [] for cell in run.cells}
    resized = {_budget(c): c.spec for c in run.cells if c.method.name == Resize.name}
    for task in run.tasks:
        first = primary(task.name, task.higher)
        tops = _tops(run, task, by)
        base, of_base = run.summary(run.arms[0], task.name), by.get((run.arms[0], task.name), {})
        for cell in run.cells:
            own, samples = run.summary(cell.spec, task.name), by.get((cell.spec, task.name), {})
            sure[cell.spec].append(_calibrated(samples, task.name, first, run.seed))
            for metric in [first, *(m for m in task.metrics if m != first and m in own["metrics"])]:
                row = _row(cell, task, metric, own, base, samples, tops.get(metric))
                row["primary"] = metric == first
                if metric == first:
                    row |= columns(sure[cell.spec][-1:])
                if metric == first and row["score"] is not None:
                    row |= _hard(cell, task.name, metric, samples, of_base, by.get((resized.get(_budget(cell), ""), task.name), {}))
                if row["score"] is not None and _parts(run, cell.spec, task.name, metric) is not ...:
                    row |= _intervals(run, row, cell.spec)
                rows.append(row)
    for cell in run.cells:
        counting = [r for r in rows if r["method"] == cell.spec and r["primary"]]
        rows.append(_overall(run, cell, counting) | columns(sure[cell.spec]))
    return rows


def _budget(cell: Cell) -> tuple[Any, ...] | None:
    """What two arms have alike that keep as many tokens; None for those whose budget is no count or share of all tokens."""
    method = cell.method
    if isinstance(cell, ServerCell) or (method.tokens is None and (method.fraction is None or not cell.asked)):
        return None
    return method.fraction, method.tokens, method.min_tokens, method.max_tokens


def _tops(run: TaskRun, task: Task, by: dict[tuple[str, str], Samples]) -> dict[str, float | None]:
    """Of every metric the value that is 100 percent, for all arms alike: a value of 0 does not show its scale."""
    out: dict[str, float | None] = {}
    for metric in task.metrics:
        found = [(run.summary(a, task.name)["metrics"].get(metric), by.get((a, task.name), {})) for a in run.arms]
        value, samples = next(((v, s) for v, s in found if v), next(((v, s) for v, s in found if v is not None), (None, {})))
        given = run.summary(run.arms[0], task.name).get("tops", {}).get(metric)
        out[metric] = given if value is None or given else top_of(task.name, metric, value, list(_scores(samples, metric).values()))
    return out


def _row(
    cell: Cell, task: Task, metric: str, own: dict[str, Any], base: dict[str, Any], samples: Samples, top: float | None
) -> dict[str, Any]:  # fmt: skip
    """A metric of an arm on a task, with nothing yet of what only the metric that counts has."""
    value, other = own["metrics"].get(metric), base["metrics"].get(metric)
    higher, errors = task.higher.get(metric, True), counts_errors(task.name, metric)
    score, baseline = (_percent(task.name, metric, v, top) if higher or errors else None for v in (value, other))
    return _head(cell, task.name, metric) | {
        "higher_is_better": higher,
        "value": value, "score": rounded(score), "baseline": rounded(baseline),
        "difference": None if score is None or baseline is None else rounded(score - baseline),
        "retention": _retention(value, other) if higher else _retention(score, baseline),
        "n": own["n"], "failures": own["failures"], "failed": own["error"], "top": top,
        "visual_tokens_full": _mean(samples, "visual_tokens_full"), "visual_tokens_kept": _mean(samples, "visual_tokens_kept"),
        "prompt_tokens": _mean(samples, "input_tokens"), "neither": _neither(samples),
    }  # fmt: skip


def _percent(task: str, metric: str, value: float | None, top: float | None) -> float | None:
    """A metric's value as a score: of its best value, or of errors what is left."""
    if value is None or top is None:
        return None
    return 100 - 100 * value / top if counts_errors(task, metric) else 100 * value / top


def _retention(value: float | None, base: float | None) -> float | None:
    return rounded(100 * value / base) if value is not None and base else None


def _head(cell: Cell, task: str, metric: str) -> dict[str, Any]:
    here = not isinstance(cell, ServerCell)  # what a server keeps is its own affair
    return {
        "method": cell.spec, "role": cell.role, "keep": cell.method.fraction if here else None,
        "tokens": cell.method.tokens if here else None, "task": task, "metric": metric, "primary": False, "higher_is_better": True,
        "value_interval": None, "score_interval": None, "difference_interval": None, "interval_missing": None, "clusters": None,
        "floor": None,
        "hard": None, "hard_n": None, "broken": None, "broken_n": None, **dict.fromkeys(COLUMNS),
    }  # fmt: skip


def _calibrated(samples: Samples, task: str, metric: str, seed: int) -> Calibrated | None:
    """Confidence against a task's own score of each answer, which is how right it is."""
    scores = _right(samples, task, metric)
    if len(scores) < len(samples) or not all(0 <= s <= 1 for s in scores.values()):
        return None
    found = [
        {"image": r["cluster"], "error": r["error"], "confidence": r.get("confidence"), "correct": scores[i]} for i, r in samples.items()
    ]
    return calibrated(found, seed, task)


def _hard(cell: Cell, task: str, metric: str, own: Samples, base: Samples, resized: Samples) -> dict[str, Any]:
    """``hard`` and ``broken`` beside ``resize`` at the same budget; nothing for arms without such a partner."""
    scores, right, wrong = (_right(rows, task, metric) for rows in (own, base, resized))
    if cell.method.name == Resize.name or not wrong or not scores:
        return {}
    known = {i for i in right if right[i] > RIGHT and i in wrong}
    return shares(scores, {i for i in known if wrong[i] <= RIGHT}, {i for i in known if wrong[i] > RIGHT})


def _parts(run: TaskRun, arm: str, task: str, metric: str) -> Any:
    """A metric's samples by cluster; None where the task failed, ``...`` where they are not kept (of most metrics that do not count)."""
    summary = run.summary(arm, task)
    if metric == primary(task, _higher(run, task)):
        return summary.get("clustered")
    return summary.get("errors_clustered", {}).get(metric, ...)


def estimates(run: TaskRun, arm: str, task: str, metric: str, top: float | None) -> tuple[Estimate, Estimate] | str:
    """A task's score under an arm and its difference to the baseline's, on the same resamples; or why there are none."""
    parts: list[Any] = [_parts(run, a, task, metric) for a in (arm, run.arms[0])]
    missing = next((p["why"] if p else "the task failed" for p in parts if not p or p["why"] is not None), None)
    if missing is not None or top is None:
        return missing or "the metric's best value is not known"
    asked, also = (np.array(p["asked"]) for p in parts)
    if len(asked) != len(also) or not (parts[0].get("weighted") or np.array_equal(asked, also)):
        return "the baseline was asked about other pictures"
    errors = counts_errors(task, metric)
    drawn, before = (_drawn(p, top, run.seed, task, errors) for p in parts)
    if not (np.isfinite(drawn).all() and np.isfinite(before).all()):
        return "some resamples leave the metric undefined"
    values = [_percent(task, metric, run.summary(a, task)["metrics"][metric], top) for a in (arm, run.arms[0])]
    value, baseline = (float(v) for v in values if v is not None)
    of, also_of = asked / asked.sum(), also / also.sum()  # which differ where arms name other numbers of objects
    own, theirs = (np.array(p["right"]) / sum(p["asked"]) for p in parts)
    if errors:
        own, theirs = of - own, also_of - theirs
    return estimate(value, drawn, of, own), estimate(value - baseline, drawn - before, (of + also_of) / 2, own, theirs)


def _higher(run: TaskRun, task: str) -> dict[str, bool]:
    return next(t.higher for t in run.tasks if t.name == task)


def _drawn(parts: dict[str, Any], top: float, seed: int, task: str, errors: bool) -> np.ndarray:
    """A score in every resample of clusters."""
    if parts["drawn"] is not None:
        found = 100 * np.array(parts["drawn"]) / top
    else:
        right, asked = sums(np.array([parts["right"], parts["asked"]]).T, seed, task).T
        with np.errstate(invalid="ignore", divide="ignore"):
            found = 100 * right / asked
    return 100 - found if errors else found


def _intervals(run: TaskRun, row: dict[str, Any], arm: str) -> dict[str, Any]:
    """Of the score and of its difference."""
    found = estimates(run, arm, row["task"], row["metric"], row["top"])
    if isinstance(found, str):
        return {"interval_missing": found}
    out = _of(run, arm, found)
    low, high = (row["top"] * s / 100 for s in out["score_interval"])
    between = (row["top"] - high, row["top"] - low) if counts_errors(row["task"], row["metric"]) else (low, high)
    return out | {"value_interval": tuple(round(v, 6) for v in between)}


def _of(run: TaskRun, arm: str, found: tuple[Estimate, Estimate]) -> dict[str, Any]:
    score, change = found
    between = (0.0, 0.0) if arm == run.arms[0] else points(change.interval())
    return {"score_interval": points(score.interval()), "difference_interval": between, "clusters": score.clusters}


def overall(run: TaskRun, arm: str, tops: dict[str, float | None]) -> tuple[Estimate, Estimate] | None:
    """An arm's mean score over the tasks and its difference to the baseline's; None where a task has no interval. tops: by task."""
    found = [estimates(run, arm, task.name, primary(task.name, task.higher), tops.get(task.name)) for task in run.tasks]
    pairs = [f for f in found if not isinstance(f, str)]
    return None if len(pairs) < len(found) else (mean_of([s for s, _ in pairs]), mean_of([d for _, d in pairs]))


def _overall(run: TaskRun, cell: Cell, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All tasks of an arm: means over tasks, None where one of them has no score."""

    def mean(name: str) -> float | None:
        values = [r[name] for r in rows]
        return None if not values or None in values else rounded(sum(values) / len(values))

    names = ("score", "baseline", "difference", "retention", "visual_tokens_full", "visual_tokens_kept", "prompt_tokens")
    out = _head(cell, OVERALL, "mean over tasks") | {name: mean(name) for name in names}
    out |= {"value": None, "top": 100.0, "primary": True, "n": sum(r["n"] for r in rows), "failures": sum(r["failures"] for r in rows)}
    out["failed"] = next((r["failed"] for r in rows if r["failed"] is not None), None)
    found = overall(run, cell.spec, {r["task"]: r["top"] for r in rows})
    if found is None:
        out["interval_missing"] = "; ".join(f"{r['task']}: {r['interval_missing']}" for r in rows if r["interval_missing"] is not None)
        return out
    return out | _of(run, cell.spec, found)


def _scores(rows: Samples, metric: str) -> dict[str, float]:
    return {i: r["scores"][metric] for i, r in rows.items() if metric in r["scores"]}


def _right(rows: Samples, task: str, metric: str) -> dict[str, float]:
    """How right each sample is."""
    scores = _scores(rows, metric)
    return {i: 1 - s for i, s in scores.items()} if counts_errors(task, metric) else scores


def _neither(samples: Samples) -> int | None:
    """Answers to questions of yes or no that are neither; None for other tasks."""
    if not samples or any(str(r.get("expected")).strip().lower() not in YES_NO for r in samples.values()):
        return None
    return neither([r["answer"] or "" for r in samples.values()])


def _mean(rows: Samples, key: str) -> float | None:
    values = [r[key] for r in rows.values() if r.get(key) is not None]
    return rounded(sum(values) / len(values)) if values else None


def rounded(value: float | None) -> float | None:
    return None if value is None else round(float(value), 2)


# --------------------------------------------------------------------------------------------------------- tables


# ------------------------------------------------------------------------------------------- beside published numbers
