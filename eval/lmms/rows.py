"""Rows and tables of tasks: every metric of every arm, the baseline beside it, and what remains on the hard samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mllm_efficient.compressors.resize import Resize

from ..sweep import Cell
from ..table import OVERALL
from .run import TaskRun
from .server import ServerCell
from .scores import RIGHT, known, primary, top_of

RESAMPLES, BLOCK = 2000, 50
MEANING = {
    "score": "percent of the metric's best value; value: the metric as lmms-eval gives it. overall: the unweighted mean over tasks",
    "difference": "score minus the baseline's, in points; difference_interval: the central 95% of 2,000 paired resamples of samples, "
    "where the metric is the mean of its samples' scores",
    "retention": "percent of the baseline's score; overall: the mean over tasks",
    "hard": "score on the samples that the baseline gets right and resize at the same budget gets wrong, of which there are hard_n",
}


def rows_of(run: TaskRun, records: Sequence[dict[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """One row for each task, arm and metric that has a value, the metric that counts first; behind them one per arm for all tasks."""
    by: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for record in records:
        by.setdefault((record["method"], record["task"]), {})[record["id"]] = record
    rows: list[dict[str, Any]] = []
    for task in run.tasks:
        resized = {c.asked: c.spec for c in run.cells if c.method.name == Resize.name and c.asked}
        base = run.summary(run.arms[0], task.name)
        for cell in run.cells:
            mine, samples = run.summary(cell.spec, task.name), by.get((cell.spec, task.name), {})
            others = by.get((run.arms[0], task.name), {}), by.get((resized.get(cell.asked, ""), task.name), {})
            first = primary(task.name, task.metrics)
            for metric in [first, *(m for m in task.metrics if m != first and m in mine["metrics"])]:
                row = _row(cell, task.name, metric, task.higher[metric], mine, base, samples, others[0], seed)
                row |= {"primary": metric == first, "hard": None, "hard_n": None}
                if metric == first:
                    row |= _hard(cell, metric, samples, *others)
                rows.append(row)
    return rows + [_overall(cell, [r for r in rows if r["method"] == cell.spec]) for cell in run.cells]


def _row(
    cell: Cell, task: str, metric: str, higher: bool, mine: dict[str, Any], base: dict[str, Any], samples: dict[str, dict[str, Any]],
    of_base: dict[str, dict[str, Any]], seed: int,
) -> dict[str, Any]:  # fmt: skip
    value, other = mine["metrics"].get(metric), base["metrics"].get(metric)
    scores, before = _scores(samples, metric), _scores(of_base, metric)
    top = None if value is None else top_of(task, metric, value, list(scores.values()))
    score, baseline = (None if v is None or top is None else 100 * v / top for v in (value, other))
    difference = None if score is None or baseline is None else score - baseline
    between = None
    if difference is not None and top is not None and scores.keys() == before.keys() and _is_mean(scores, value, top):
        between = _interval(np.array([scores[i] - before[i] for i in scores]), seed)
    return {
        "method": cell.spec, "role": cell.role, **_budget(cell), "task": task, "metric": metric,
        "higher_is_better": higher, "value": value, "score": _round(score), "score_interval": None, "baseline": _round(baseline),
        "difference": _round(difference), "difference_interval": between,
        "retention": _round(100 * score / baseline) if higher and score is not None and baseline else None, "floor": None,
        "n": mine["n"], "failures": mine["failures"], "failed": mine["error"],
        "visual_tokens_full": _mean(samples, "visual_tokens_full"), "visual_tokens_kept": _mean(samples, "visual_tokens_kept"),
        "prompt_tokens": _mean(samples, "input_tokens"),
    }  # fmt: skip


def _budget(cell: Cell) -> dict[str, Any]:
    known_here = not isinstance(cell, ServerCell)  # what a server keeps is its own affair
    return {"keep": cell.method.budget.fraction if known_here else None, "tokens": cell.method.tokens if known_here else None}


def _hard(
    cell: Cell, metric: str, mine: dict[str, Any], base: dict[str, dict[str, Any]], resized: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """The score on the samples that the baseline gets right and ``resize`` gets wrong; nothing for arms without such a partner."""
    if cell.method.name == Resize.name or not resized:
        return {}
    scores, right, wrong = (_scores(rows, metric) for rows in (mine, base, resized))
    chosen = [i for i in scores if right.get(i, 0) > RIGHT and i in wrong and wrong[i] <= RIGHT]
    return {"hard": _round(100 * sum(scores[i] for i in chosen) / len(chosen)) if chosen else None, "hard_n": len(chosen) if scores else None}


def _overall(cell: Cell, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All tasks of an arm: means over tasks, None where one of them has no score."""
    rows = [r for r in rows if r["primary"]]

    def mean(name: str) -> float | None:
        values = [r[name] for r in rows]
        return None if not values or None in values else _round(sum(values) / len(values))

    names = ("score", "baseline", "difference", "retention", "visual_tokens_full", "visual_tokens_kept", "prompt_tokens")
    failed = [r["failed"] for r in rows if r["failed"] is not None]
    return {
        "method": cell.spec, "role": cell.role, **_budget(cell), "task": OVERALL, "metric": "mean over tasks", "higher_is_better": True, "value": None, "score_interval": None, "difference_interval": None,
        **{name: mean(name) for name in names}, "floor": None, "n": sum(r["n"] for r in rows), "failures": sum(r["failures"] for r in rows),
        "failed": failed[0] if failed else None, "primary": True, "hard": None, "hard_n": None,
    }  # fmt: skip


def _scores(rows: dict[str, dict[str, Any]], metric: str) -> dict[str, float]:
    return {i: r["scores"][metric] for i, r in rows.items() if metric in r["scores"]}


def _is_mean(scores: dict[str, float], value: float | None, top: float) -> bool:
    return value is not None and bool(scores) and abs(sum(scores.values()) / len(scores) - value / top) < 1e-6


def _interval(differences: np.ndarray, seed: int) -> tuple[float, float]:
    """Central 95% of the mean in percent over resamples, in blocks: large tasks would take gigabytes at once."""
    rng, n = np.random.default_rng(seed), len(differences)
    means = [100 * differences[rng.integers(0, n, (BLOCK, n))].mean(1) for _ in range(RESAMPLES // BLOCK)]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return round(float(low), 2), round(float(high), 2)


def _mean(rows: dict[str, dict[str, Any]], key: str) -> float | None:
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


# --------------------------------------------------------------------------------------------------------- tables


def task_table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: a line for every metric of every arm, task after task."""
    has = {name: any(r[name] is not None for r in rows) for name in ("visual_tokens_kept", "prompt_tokens", "hard_n")}
    header = ["task", "metric", "method", "tokens", "prompt", "value", "score", "vs baseline [95%]", "retention", "hard", "n", "failed"]
    lines = []
    for r in rows:
        base = r["role"] == "baseline"
        hard = "" if r["hard_n"] is None else f"{_one(r['hard'])} of {r['hard_n']}" if r["hard_n"] else "none"
        lines.append(
            [
                title(r["task"]), r["metric"], r["method"], _one(r["visual_tokens_kept"], "g"), _one(r["prompt_tokens"], ".0f"),
                _one(r["value"], ".4g"), _one(r["score"]), "" if base else _signed(r), "" if base else _one(r["retention"], ".1f", "%"),
                hard, str(r["n"]), str(r["failures"] or ""),
            ]
        )  # fmt: skip
    used = [i for i, h in enumerate(header) if {"tokens": has["visual_tokens_kept"], "prompt": has["prompt_tokens"], "hard": has["hard_n"]}.get(h, True)]
    return [header[i] for i in used], [[line[i] for i in used] for line in lines]


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
    """Our numbers beside a published row: each arm whose method the table has, task after task, in the table's units."""
    out = []
    for r in rows:
        name, column = r["method"].split(":")[0], reference["tasks"].get(r["task"])
        published = reference["rows"].get(name, {}).get(column)
        if not r["primary"] or published is None:
            continue
        points = known()[r["task"]].top.get(r["metric"], 1.0)
        ours = r["value"] if points > 100 or r["value"] is None else r["score"]
        out.append(
            {
                "task": column, "method": r["method"], "tokens": r["visual_tokens_kept"], "published_tokens": reference.get("budgets", {}).get(name),
                "ours": _round(ours), "published": published, "difference": _round(None if ours is None else ours - published),
            }
        )  # fmt: skip
    return out


def reference_table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    header = ["task", "method", "tokens", "published with", "ours", "published", "difference"]
    return header, [
        [
            r["task"], r["method"], _one(r["tokens"], "g"), _one(r["published_tokens"], "g"), _one(r["ours"], ".2f"),
            _one(r["published"], ".2f"), _one(r["difference"], "+.2f"),
        ]
        for r in rows
    ]  # fmt: skip
