"""Records to rows: one per category and one overall for each method, the baseline beside every number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mllm_efficient.compressors.base import Compressor

from .runner import NO_IMAGE
from .stats import Hits, accuracy, draws, interval

OVERALL = "overall"


def rows_of(
    records: Sequence[dict[str, Any]], methods: Sequence[Compressor], tasks: Sequence[str], *, against: str | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """Rows as the README describes them: scores and retention in percent, intervals from 2,000 paired resamples of images.

    ``methods`` begins with the baseline. ``against`` adds each row's difference to that method. Questions that were the
    second of a conversation have rows of their own behind all others (``turns`` 2): their baseline is the uncompressed
    model in its second turn, and ``first_turn`` is the method's score on the same questions asked alone.
    """
    images = sorted({r["image"] for r in records})
    weights = np.concatenate([np.ones((1, len(images))), draws(len(images), seed)])
    out, alone = [], {(r["method"], r["image"], r["task"]): r for r in records if r.get("turns", 1) == 1}
    for turns in sorted({r.get("turns", 1) for r in records}):
        by_arm: dict[str, list[dict[str, Any]]] = {}
        first: dict[str, list[dict[str, Any]]] = {}
        for record in records:
            if record.get("turns", 1) == turns:
                by_arm.setdefault(record["method"], []).append(record)
                first.setdefault(record["method"], []).append(alone[record["method"], record["image"], record["task"]])
        scores = {arm: accuracy(Hits(rows, images, tasks), weights) for arm, rows in by_arm.items()}
        before = {arm: accuracy(Hits(rows, images, tasks), weights) for arm, rows in first.items()} if turns > 1 else {}
        for method in methods:
            arm = method.spec()
            for i, task in enumerate([*tasks, OVERALL]):
                mine = [r for r in by_arm[arm] if task in (OVERALL, r["task"])]
                if not mine:
                    continue
                row = _row(method, turns, task, mine, scores, i)
                if turns > 1:
                    change = scores[arm][:, i] - before[arm][:, i]
                    row |= {"first_turn": _round(before[arm][0, i]), "turn_difference": _round(change[0])}
                    row["turn_interval"] = interval(change[1:])
                if against is not None:
                    values, other = scores[arm][:, i], scores[against][:, i]
                    row |= {"against": against, "against_difference": _round(values[0] - other[0])}
                    row["against_interval"] = interval((values - other)[1:])
                out.append(row)
    return out


def _row(
    method: Compressor, turns: int, task: str, mine: Sequence[dict[str, Any]], scores: dict[str, np.ndarray], i: int
) -> dict[str, Any]:
    """One row. i: the column of the task in the scores, whose first line is the estimate and the others its resamples."""
    arm = method.spec()
    values, base = scores[arm][:, i], scores["none"][:, i]
    row = {
        "method": arm, "keep": method.fraction, "tokens": method.tokens, "turns": turns, "task": task, "metric": "exact_match",
        "score": _round(values[0]), "score_interval": interval(values[1:]),
        "baseline": _round(base[0]), "difference": _round(values[0] - base[0]),
        "difference_interval": interval((values - base)[1:]),
        "retention": _round(100 * values[0] / base[0]) if base[0] else None,
        "n": len(mine), "failures": sum(r["error"] is not None for r in mine),
        "floor": _round(scores[NO_IMAGE][0, i]) if NO_IMAGE in scores else None,
        "visual_tokens_full": _mean(mine, "visual_tokens_full"), "visual_tokens_kept": _mean(mine, "visual_tokens_kept"),
        "positions": next((r["positions"] for r in mine if r.get("positions")), method.positions or "renumber"),
        "region_share": _mean(mine, "region_share", 3), "region_kept": _mean(mine, "region_kept", 3),
    }  # fmt: skip
    return row | ({"micro": _round(scores[arm][0, -1])} if task == OVERALL else {})


def _round(value: float, digits: int = 2) -> float:
    return round(float(value), digits)


def _mean(rows: Sequence[dict[str, Any]], key: str, digits: int = 2) -> float | None:
    values = [r[key] for r in rows if r.get(key) is not None]
    return _round(sum(values) / len(values), digits) if values else None


def text_table(rows: Sequence[dict[str, Any]], tasks: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: a line per method with its categories, the floor as the first line, second turns as last columns."""
    tasks = [t for t in tasks if any(r["task"] == t for r in rows)]
    against = any("against" in r for r in rows)
    header = ["method", "tokens", *tasks, "macro", "vs none [95%]", "retention", "in region"]
    header += [f"vs {rows[0]['against']} [95%]"] if against else []
    by_method: dict[str, dict[str, dict[str, Any]]] = {}
    second: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row.get("turns", 1) == 1:
            by_method.setdefault(row["method"], {})[row["task"]] = row
        elif row["task"] == OVERALL:
            second[row["method"]] = row
    header += ["2nd turn", "vs none in it [95%]"] if second else []
    first = next(iter(by_method.values()))
    lines = []
    if first[OVERALL]["floor"] is not None:
        lines.append([NO_IMAGE, "0", *(_one(first[t]["floor"]) for t in [*tasks, OVERALL]), "", "", ""] + [""] * against)
        lines[0] += [_one(second["none"]["floor"]), ""] if second else []
    for method, by_task in by_method.items():
        total = by_task[OVERALL]
        share = "" if total["region_share"] is None else f"{100 * total['region_share']:.0f}%"
        kept = "" if total["visual_tokens_kept"] is None else f"{total['visual_tokens_kept']:g}"
        line = [method, kept, *(_one(by_task[t]["score"]) for t in [*tasks, OVERALL]), _change(total)]
        line += [_one(total["retention"]) + "%" if total["retention"] is not None else "", share]
        if against:
            line.append("" if method == total["against"] else _signed(total["against_difference"], total["against_interval"]))
        line += [_one(second[method]["score"]), _change(second[method])] if second else []
        lines.append(line)
    return header, lines


def _change(row: dict[str, Any]) -> str:
    return "" if row["method"] == "none" else _signed(row["difference"], row["difference_interval"])


def _signed(value: float, between: Sequence[float]) -> str:
    low, high = between
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def _one(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
