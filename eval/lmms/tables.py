"""Tables and notes of public tasks, from their rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mllm_efficient.compressors.resize import Resize
from mllm_efficient.measure.arms import METHOD

from ..table import OVERALL
from .rows import rounded
from .scores import known


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
        own = r["value"] if points > 100 or r["value"] is None else r["score"]
        out.append(
            {
                "task": column, "method": r["method"], "tokens": r["visual_tokens_kept"],
                "kept": rounded(100 * r["visual_tokens_kept"] / r["visual_tokens_full"]) if r["visual_tokens_full"] else None,
                "published_kept": rounded(100 * int(name.split("@")[1]) / reference["full"]) if "@" in name else shares.get(name),
                "ours": rounded(own), "published": published, "difference": rounded(None if own is None else own - published),
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
