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

    ``methods`` begins with the baseline. ``against`` adds each row's difference to that method.
    """
    images = sorted({r["image"] for r in records})
    weights = np.concatenate([np.ones((1, len(images))), draws(len(images), seed)])
    by_arm: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_arm.setdefault(record["method"], []).append(record)
    scores = {arm: accuracy(Hits(rows, images, tasks), weights) for arm, rows in by_arm.items()}
    out = []
    for method in methods:
        arm = method.spec()
        for i, task in enumerate([*tasks, OVERALL]):
            mine = [r for r in by_arm[arm] if task in (OVERALL, r["task"])]
            if not mine:
                continue
            values, base = scores[arm][:, i], scores["none"][:, i]
            row = {
                "method": arm, "keep": method.budget.fraction, "tokens": method.tokens, "task": task, "metric": "exact_match",
                "score": _round(values[0]), "score_interval": interval(values[1:]),
                "baseline": _round(base[0]), "difference": _round(values[0] - base[0]),
                "difference_interval": interval((values - base)[1:]),
                "retention": _round(100 * values[0] / base[0]) if base[0] else None,
                "n": len(mine), "failures": sum(r["error"] is not None for r in mine),
                "floor": _round(scores[NO_IMAGE][0, i]) if NO_IMAGE in scores else None,
                "visual_tokens_full": _mean(mine, "visual_tokens_full"), "visual_tokens_kept": _mean(mine, "visual_tokens_kept"),
                "positions": next((r["positions"] for r in mine if r.get("positions")), method.positions),
                "region_share": _mean(mine, "region_share", 3), "region_kept": _mean(mine, "region_kept", 3),
            }  # fmt: skip
            if task == OVERALL:
                row["micro"] = _round(scores[arm][0, -1])
            if against is not None:
                other = scores[against][:, i]
                row |= {"against": against, "against_difference": _round(values[0] - other[0])}
                row["against_interval"] = interval((values - other)[1:])
            out.append(row)
    return out


def _round(value: float, digits: int = 2) -> float:
    return round(float(value), digits)


def _mean(rows: Sequence[dict[str, Any]], key: str, digits: int = 2) -> float | None:
    values = [r[key] for r in rows if r.get(key) is not None]
    return _round(sum(values) / len(values), digits) if values else None


def text_table(rows: Sequence[dict[str, Any]], tasks: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: a line per method with its categories, and the floor as the first line."""
    tasks = [t for t in tasks if any(r["task"] == t for r in rows)]
    against = any("against" in r for r in rows)
    header = ["method", "tokens", *tasks, "macro", "vs none [95%]", "retention", "in region"]
    header += [f"vs {rows[0]['against']} [95%]"] if against else []
    by_method: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_method.setdefault(row["method"], {})[row["task"]] = row
    first = next(iter(by_method.values()))
    lines = []
    if first[OVERALL]["floor"] is not None:
        lines.append([NO_IMAGE, "0", *(_one(first[t]["floor"]) for t in [*tasks, OVERALL]), "", "", ""] + [""] * against)
    for method, by_task in by_method.items():
        total = by_task[OVERALL]
        low, high = total["difference_interval"]
        change = "" if method == "none" else f"{total['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"
        share = "" if total["region_share"] is None else f"{100 * total['region_share']:.0f}%"
        kept = "" if total["visual_tokens_kept"] is None else f"{total['visual_tokens_kept']:g}"
        line = [method, kept, *(_one(by_task[t]["score"]) for t in [*tasks, OVERALL]), change]
        line += [_one(total["retention"]) + "%" if total["retention"] is not None else "", share]
        if against:
            low, high = total["against_interval"]
            line.append("" if method == total["against"] else f"{total['against_difference']:+.1f} [{low:+.1f}, {high:+.1f}]")
        lines.append(line)
    return header, lines


def _one(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
