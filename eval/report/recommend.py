"""The cheapest cell that loses at most so many points, and what it hurts most. Keeping the uncompressed model is a legal answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mllm_efficient.stats import TAIL, Estimate, lower_bounds, needed, wider

from .rows import RIGHT, WORDS

KEEP = "keep the uncompressed model"
FEW = 100  # requests below which the line says how few they are, and labelled ones do not stand for the others
NOTHING = 5.0  # percent right up to which a baseline that could lose it all is not measured but badly asked
SAME = 3  # decimals to which FLOPs ratios are compared; a tenth of a percent is a tie


def recommend(rows: Sequence[dict[str, Any]], max_drop: float) -> dict[str, Any]:
    """The recommendation of a sweep's rows, the baseline's first.

    A cell is admitted if its lower 95% bound of the paired difference to ``none`` is at least ``-max_drop`` points and it costs
    less. The bound holds for all cells that cost less at once (``bounded``): the best of many is not better for having been picked.
    The fewest FLOPs win, then the lower TTFT ratio. Failed cells are not admitted. Where FLOPs are not known, the share of visual
    tokens kept stands for them; where neither is, nothing is cheaper.

    The difference is that of accuracy where answers are known (of a user's own requests: where all or at least ``FEW`` have one, on
    those), and otherwise that of the percent answered in the uncompressed model's words, whose bound must then be at least
    ``100 - max_drop``.

    Returns: method (its spec, to paste; ``none`` is the uncompressed model), rule (what was asked for, in words),
    flops_ratio, ttft_ratio, difference, interval and bound, cells (that could have been picked), hurts (category, difference,
    interval), nearest (the best refused cell, where ``none`` is the answer), warnings and line, all this in words.
    """
    base, family = rows[0], pickable(rows)
    if base["failed"] is None and base["score"] is not None and not _measured(base):
        return _answer(base, max_drop, f"{KEEP}: a task without intervals (captions) is among these, so nothing is sure")
    if not _measured(base):
        return _answer(base, max_drop, f"{KEEP}: it failed here, so there is nothing to compare with ({base['failed']})")
    if floor := _at_floor(base, max_drop):
        return _answer(base, max_drop, f"{KEEP}: {floor}")
    lows = _bounds(family)
    admitted = [r for r in family if lows[r["method"]] >= -max_drop]
    warnings = _warnings(base, max_drop, len(family))
    if not admitted:
        nearest = max(family, key=lambda r: (lows[r["method"]], -_cost(r)), default=None)
        parts = [f"{KEEP}: no method and budget here is sure of that (lower 95% bound)"]
        if nearest is not None:
            parts.append(f"{nearest['method']} comes nearest, {_change(nearest, lows, len(family))}")
        out = _answer(base, max_drop, "; ".join([*parts, *warnings]))
        return out | {"nearest": nearest and nearest["method"], "cells": len(family), "warnings": warnings}
    best = min(admitted, key=lambda r: (round(_cost(r), SAME), r["ttft_ratio"]["median"] if r["ttft_ratio"] else 1.0))
    out = _answer(best, max_drop, "")
    parts = [f"{best['method']}: {_change(best, lows, len(family))}", *warnings]
    if best["flops_ratio"] is not None:
        parts.append(f"{100 * best['flops_ratio']:.1f}% of its FLOPs")
    parts.append(f"TTFT ratio {out['ttft_ratio']:.3f}" if out["ttft_ratio"] is not None else "TTFT not measured")
    if out["hurts"] is not None:
        worst = out["hurts"]
        parts.append(
            f"hurts {worst['task']} most: {worst['difference']:+.1f} points [{worst['interval'][0]:+.1f}, {worst['interval'][1]:+.1f}]"
        )
    elif best["tasks"]:
        parts.append("hurts no category")
    return out | {"line": "; ".join(parts), "bound": round(lows[best["method"]], 2), "cells": len(family), "warnings": warnings}


def pickable(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cells that a recommendation picks from: measured, and cheaper than the baseline."""
    return [r for r in rows[1:] if _measured(r) and round(_cost(r), SAME) < 1]


def bounded(rows: Sequence[dict[str, Any]], differences: Mapping[str, Estimate]) -> None:
    """Gives every cell that can be picked its lower bound, which holds for all of them at once.

    differences: of each method to the baseline, by what decides, on the same resamples. ``bound``: in points; ``bound_cells``: for
    how many cells it holds.
    """
    family = [r for r in pickable(rows) if r["method"] in differences]
    lows = lower_bounds([differences[r["method"]] for r in family])
    for row, low in zip(family, lows):
        row |= {"bound": math.floor(1e4 * low) / 1e4, "bound_cells": len(family)}


def _bounds(family: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Lower bounds by method; of merged or older runs, which have none for all these cells together, from the intervals."""
    if all(r.get("bound_cells") == len(family) for r in family):
        return {r["method"]: float(r["bound"]) for r in family}
    found = [(r["method"], decisive(r)) for r in family]
    return {m: wider(float(d["difference_interval"][0]), float(d["difference"]), len(family)) for m, d in found}


def _at_floor(base: dict[str, Any], max_drop: float) -> str | None:
    """Why the baseline's scores say nothing, where it answers no better than it would without the image, or nothing right."""
    if base["floor"] is not None and base["score"] <= base["floor"]:
        scores = f"{base['score']:.1f} against {base['floor']:.1f}"
        return f"it is no better than without the image ({scores}), so these scores say nothing"
    score = decisive(base)["score"]
    if decided_by(base) != WORDS and score <= min(max_drop, NOTHING):
        return f"it is right on {score:.1f}% as the answers are worded, so there is nothing that could be lost: check the answers"
    return None


def _warnings(base: dict[str, Any], max_drop: float, cells: int) -> list[str]:
    """What the number of requests or images does not allow to be said."""
    own, out = decisive(base), list[str]()
    n, name = own.get("clusters") or own["n"], "requests" if "agreement" in base else "images"
    if "agreement" in base and n < FEW:
        out.append(f"measured on only {n} requests")
    least = needed(max_drop / 100, TAIL / max(cells, 1))
    among = f" where {cells} cells could be picked" if cells > 1 else ""
    if least is None:
        out.append("no number of them proves that nothing at all is lost: give --max-drop")
    elif n < least:
        out.append(f"{n} {name} cannot prove it: it takes at least {least} without a single loss{among}")
    return out


def decided_by(row: dict[str, Any]) -> str | None:
    """The metric by which a cell is admitted: ``RIGHT`` where all requests have an answer or enough do, otherwise ``WORDS``; a
    benchmark's is None."""
    right = row.get("agreement", {}).get(RIGHT)
    return row.get("metric") if right is None else RIGHT if right["n"] >= min(FEW, row["agreement"][WORDS]["n"]) else WORDS


def decisive(row: dict[str, Any]) -> dict[str, Any]:
    """The difference, its interval and n of that metric."""
    metric = decided_by(row)
    return row if metric is None else row["agreement"][metric]


def rule(row: dict[str, Any], max_drop: float) -> str:
    """What a cell must be sure of, at the lower 95% bound. row: any that was measured, such as the baseline's."""
    metric = decided_by(row)
    if metric is None:
        return f"at most {points(max_drop)} lost"
    if metric == RIGHT:
        return f"at most {points(max_drop)} of right answers lost on the {decisive(row)['n']} requests that have an answer"
    return f"at least {max(100 - max_drop, 0):g}% answered in the uncompressed model's words"


def _change(row: dict[str, Any], lows: Mapping[str, float], cells: int) -> str:
    """What is seen and what is sure of a cell."""
    own, sure = decisive(row), lows[row["method"]]
    among = f" with {cells} cells to pick from" if cells > 1 else ""
    if decided_by(row) == WORDS:
        low, high = own["score_interval"]
        return f"{own['score']:.1f}% [{low:.1f}, {high:.1f}] answered in its words, surely {max(100 + sure, 0):.1f}%{among}"
    low, high = own["difference_interval"]
    return f"{own['difference']:+.1f} points [{low:+.1f}, {high:+.1f}] against none, surely no less than {sure:+.1f}{among}"


def points(value: float) -> str:
    """``1 point``, ``2.5 points``."""
    return f"{value:g} point{'' if value == 1 else 's'}"


def _measured(row: dict[str, Any]) -> bool:
    return row["failed"] is None and decisive(row)["difference_interval"] is not None


def _cost(row: dict[str, Any]) -> float:
    if row["flops_ratio"] is not None:
        return float(row["flops_ratio"])
    if not row["visual_tokens_full"]:  # a server's, or of requests without an image: nothing says that it costs less
        return 1.0
    return float(row["visual_tokens_kept"] / row["visual_tokens_full"])


def _answer(row: dict[str, Any], max_drop: float, line: str) -> dict[str, Any]:
    ratio = row["ttft_ratio"]
    worst = min(row["tasks"].items(), key=lambda item: item[1]["difference"], default=None)
    hurts = None
    if worst is not None and worst[1]["difference"] < 0:
        hurts = {"task": worst[0], "difference": worst[1]["difference"], "interval": worst[1]["difference_interval"]}
    return {
        "method": row["method"], "rule": rule(row, max_drop), "max_drop": max_drop,
        "flops_ratio": row["flops_ratio"], "ttft_ratio": ratio and ratio["median"],
        "ttft_interval": ratio and [ratio["low"], ratio["high"]], "difference": decisive(row)["difference"],
        "difference_interval": decisive(row)["difference_interval"], "bound": None, "cells": None, "hurts": hurts, "nearest": None,
        "warnings": [], "line": line,
    }  # fmt: skip
