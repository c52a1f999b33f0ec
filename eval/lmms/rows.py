"""Rows and tables of tasks: every metric of every arm, the baseline beside it, and what remains on the hard samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mllm_efficient.compressors.resize import Resize
from mllm_efficient.measure.arms import METHOD

from ..calibration import COLUMNS, Calibrated, calibrated, columns
from ..stats import Estimate, estimate, mean_of, points, sums
from ..sweep import Cell
from ..table import OVERALL, shares
from .host import Task
from .run import TaskRun
from .scores import RIGHT, YES_NO, counts_errors, known, neither, primary, top_of
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
    """One row for each task, arm and metric that has a value, the metric that counts first; behind them one per arm for all tasks."""
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
            mine, samples = run.summary(cell.spec, task.name), by.get((cell.spec, task.name), {})
            sure[cell.spec].append(_calibrated(samples, task.name, first, run.seed))
            for metric in [first, *(m for m in task.metrics if m != first and m in mine["metrics"])]:
                row = _row(cell, task, metric, mine, base, samples, tops.get(metric))
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
    cell: Cell, task: Task, metric: str, mine: dict[str, Any], base: dict[str, Any], samples: Samples, top: float | None
) -> dict[str, Any]:  # fmt: skip
    """A metric of an arm on a task, with nothing yet of what only the metric that counts has."""
    value, other = mine["metrics"].get(metric), base["metrics"].get(metric)
    higher, errors = task.higher.get(metric, True), counts_errors(task.name, metric)
    score, baseline = (_percent(task.name, metric, v, top) if higher or errors else None for v in (value, other))
    return _head(cell, task.name, metric) | {
        "higher_is_better": higher,
        "value": value, "score": _round(score), "baseline": _round(baseline),
        "difference": None if score is None or baseline is None else _round(score - baseline),
        "retention": _retention(value, other) if higher else _retention(score, baseline),
        "n": mine["n"], "failures": mine["failures"], "failed": mine["error"], "top": top,
        "visual_tokens_full": _mean(samples, "visual_tokens_full"), "visual_tokens_kept": _mean(samples, "visual_tokens_kept"),
        "prompt_tokens": _mean(samples, "input_tokens"), "neither": _neither(samples),
    }  # fmt: skip


def _percent(task: str, metric: str, value: float | None, top: float | None) -> float | None:
    """A metric's value as a score: of its best value, or of errors what is left."""
    if value is None or top is None:
        return None
    return 100 - 100 * value / top if counts_errors(task, metric) else 100 * value / top


def _retention(value: float | None, base: float | None) -> float | None:
    return _round(100 * value / base) if value is not None and base else None


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


def _hard(cell: Cell, task: str, metric: str, mine: Samples, base: Samples, resized: Samples) -> dict[str, Any]:
    """``hard`` and ``broken`` beside ``resize`` at the same budget; nothing for arms without such a partner."""
    scores, right, wrong = (_right(rows, task, metric) for rows in (mine, base, resized))
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
    mine, theirs = (np.array(p["right"]) / sum(p["asked"]) for p in parts)
    if errors:
        mine, theirs = of - mine, also_of - theirs
    return estimate(value, drawn, of, mine), estimate(value - baseline, drawn - before, (of + also_of) / 2, mine, theirs)


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
        return None if not values or None in values else _round(sum(values) / len(values))

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
    return _round(sum(values) / len(values)) if values else None


def _round(value: float | None) -> float | None:
    return None if value is None else round(float(value), 2)


def missing(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for every arm and task without a value of the metric that counts."""
    return [
        f"no score: {r['method']} on {r['task']}: {r['failed'] or 'lmms-eval gave no ' + r['metric']}"
        for r in rows
        if r["primary"] and r["task"] != OVERALL and r["value"] is None
    ]


def unscaled(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for every task whose metric counts but cannot be put in percent, so that there is no mean over tasks."""
    tasks = {r["task"]: r["metric"] for r in rows if r["primary"] and r["value"] is not None and r["score"] is None}
    return [f"{task} counts by {metric}, whose best value is not known: no percent, no mean over tasks" for task, metric in tasks.items()]


def without_interval(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for every task and reason for which a score that is there has no interval."""
    found = dict.fromkeys((r["task"], r["interval_missing"]) for r in rows if r["score"] is not None and r["task"] != OVERALL)
    return [f"{task} has no interval: {why}" for task, why in found if why is not None]


def notes(tasks: Sequence[str]) -> list[str]:
    """What a reader of the tasks' numbers should know, a line each."""
    return [f"{title(t)}: {known()[t].note}" for t in tasks if t in known() and known()[t].note]


def without_partner(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The arms of a model that have no ``resize`` at the same budget, and so no hard samples."""
    arms = dict.fromkeys(r["method"] for r in rows if r["role"] == METHOD and r["task"] == OVERALL)
    with_hard = {r["method"] for r in rows if r["hard_n"] is not None}
    return [a for a in arms if a not in with_hard and not a.startswith((Resize.name, "none@"))]


# --------------------------------------------------------------------------------------------------------- tables


def task_table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: the metric that counts of every arm, task after task. Columns that nothing fills are left out."""
    rows = [r for r in rows if r["primary"]]
    header = [
        "task", "metric", "method", "tokens", "prompt", "value", "score", "vs baseline [95%]", "retention", "hard", "broken", "ECE", "AURC",
        "n", "neither", "failed",
    ]  # fmt: skip
    lines = []
    for r in rows:
        base = r["role"] == "baseline"
        hard = "" if r["hard_n"] is None else f"{_one(r['hard'])} of {r['hard_n']}" if r["hard_n"] else "none"
        lines.append(
            [
                title(r["task"]), r["metric"], r["method"], _one(r["visual_tokens_kept"], "g"), _one(r["prompt_tokens"], ".0f"),
                _one(r["value"], ".4g"), _one(r["score"]), "" if base else _signed(r), "" if base else _one(r["retention"], ".1f", "%"),
                hard, _one(r["broken"], ".1f", "%"), _one(r.get("ece")), _one(r.get("aurc")),
                str(r["n"]), str(r.get("neither") or ""), str(r["failures"] or ""),
            ]
        )  # fmt: skip
    used = [i for i in range(len(header)) if any(line[i] for line in lines)]
    return [header[i] for i in used], [[line[i] for i in used] for line in lines]


def detail_table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: the other metrics, a line each with its value under every arm. No lines where there are none."""
    arms = list(dict.fromkeys(r["method"] for r in rows))
    values: dict[tuple[str, str], dict[str, str]] = {}
    for r in rows:
        if not r["primary"]:
            low, high = r.get("value_interval") or (None, None)
            between = "" if low is None else f" [{low:.4g}, {high:.4g}]"
            values.setdefault((title(r["task"]), r["metric"]), {})[r["method"]] = _one(r["value"], ".4g") + between
    return ["task", "metric", *arms], [[*key, *(by_arm.get(arm, "") for arm in arms)] for key, by_arm in values.items()]


def title(task: str) -> str:
    return task if task == OVERALL or task not in known() else f"{known()[task].title} ({task})"


def _one(value: float | None, how: str = ".1f", unit: str = "") -> str:
    return "" if value is None else f"{value:{how}}{unit}"


def _signed(r: dict[str, Any]) -> str:
    if r["difference"] is None:
        return ""
    between = r["difference_interval"]
    return f"{r['difference']:+.1f}" + ("" if between is None else f" [{between[0]:+.1f}, {between[1]:+.1f}]")


# ------------------------------------------------------------------------------------------- beside published numbers


def beside(rows: Sequence[dict[str, Any]], reference: dict[str, Any]) -> list[dict[str, Any]]:
    """Our numbers beside a published row: each arm whose method the table has, task after task, in the table's units.

    A row of the table that is called ``NAME@TOKENS`` is of arms that keep as many, to half a token. kept, published_kept: the share of an
    image's tokens, here and in the paper.
    """
    out, shares = [], reference.get("kept", {})
    for r in rows:
        if " | " in r["method"]:  # of several methods nobody has published anything
            continue
        name, column = r["method"].split(":")[0], reference["tasks"].get(r["task"])
        counted = f"{name}@{round(r['visual_tokens_kept'] or 0)}"
        name = counted if counted in reference["rows"] else name
        published = reference["rows"].get(name, {}).get(column)
        if not r["primary"] or published is None:
            continue
        points = r["top"] or 1.0
        ours = r["value"] if points > 100 or r["value"] is None else r["score"]
        out.append(
            {
                "task": column, "method": r["method"], "tokens": r["visual_tokens_kept"],
                "kept": _round(100 * r["visual_tokens_kept"] / r["visual_tokens_full"]) if r["visual_tokens_full"] else None,
                "published_kept": _round(100 * int(name.split("@")[1]) / reference["full"]) if "@" in name else shares.get(name),
                "ours": _round(ours), "published": published, "difference": _round(None if ours is None else ours - published),
            }
        )  # fmt: skip
    return out


def reference_table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    header = ["task", "method", "tokens", "kept", "kept there", "ours", "published", "difference"]
    return header, [
        [
            r["task"], r["method"], _one(r["tokens"], "g"), _one(r["kept"], ".1f", "%"), _one(r["published_kept"], ".1f", "%"),
            _one(r["ours"], ".2f"),
            _one(r["published"], ".2f"), _one(r["difference"], "+.2f"),
        ]
        for r in rows
    ]  # fmt: skip
