"""The cheapest cell that loses at most so many points, and what it hurts most. Keeping the uncompressed model is a legal answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .rows import RIGHT, WORDS

KEEP = "keep the uncompressed model"
FEW = 100  # requests below which the line says how few they are
SAME = 3  # decimals to which FLOPs ratios are compared; a tenth of a percent is a tie


def recommend(rows: Sequence[dict[str, Any]], max_drop: float) -> dict[str, Any]:
    """The recommendation of a sweep's rows, the baseline's first.

    A cell is admitted if the lower end of the paired 95% interval of its difference to ``none`` is at least
    ``-max_drop`` points and it costs less. The fewest FLOPs win, then the lower TTFT ratio. Failed cells are not
    admitted. Where FLOPs are not known, the share of visual tokens kept stands for them; where neither is, nothing is cheaper.

    The difference is that of accuracy where answers are known (of a user's own requests: on those that have one), and
    otherwise that of the percent answered in the uncompressed model's words, whose lower end must then be at least
    ``100 - max_drop``.

    Returns: method (its spec, to paste; ``none`` is the uncompressed model), rule (what was asked for, in words),
    flops_ratio, ttft_ratio, difference and interval, hurts (category, difference, interval), nearest (the best refused
    cell, where ``none`` is the answer) and line, all this in words.
    """
    base = rows[0]
    if base["failed"] is None and base["score"] is not None and not _measured(base):
        return _answer(base, max_drop, f"{KEEP}: a task without intervals (captions) is among these, so nothing is sure")
    if not _measured(base):
        return _answer(base, max_drop, f"{KEEP}: it failed here, so there is nothing to compare with ({base['failed']})")
    if base["floor"] is not None and base["score"] <= base["floor"]:
        scores = f"{base['score']:.1f} against {base['floor']:.1f}"
        line = f"{KEEP}: it is no better than without the image ({scores}), so these scores say nothing"
        return _answer(base, max_drop, line)
    admitted = [r for r in rows[1:] if _measured(r) and decisive(r)["difference_interval"][0] >= -max_drop and round(_cost(r), SAME) < 1]
    if not admitted:
        refused = [r for r in rows[1:] if _measured(r) and round(_cost(r), SAME) < 1]
        nearest = max(refused, key=lambda r: (decisive(r)["difference_interval"][0], -_cost(r)), default=None)
        line = f"{KEEP}: no method and budget here is sure of that (lower 95% bound)"
        if nearest is not None:
            line += f"; {nearest['method']} comes nearest, {_change(nearest)}"
        return _answer(base, max_drop, line) | {"nearest": nearest and nearest["method"]}
    best = min(admitted, key=lambda r: (round(_cost(r), SAME), r["ttft_ratio"]["median"] if r["ttft_ratio"] else 1.0))
    out = _answer(best, max_drop, "")
    parts = [f"{best['method']}: {_change(best)}"]
    if "agreement" in best and decisive(best)["n"] < FEW:
        parts.append(f"measured on only {decisive(best)['n']} requests")
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
    return out | {"line": "; ".join(parts)}


def decided_by(row: dict[str, Any]) -> str | None:
    """The metric by which a cell is admitted: ``RIGHT`` where answers are known, otherwise ``WORDS``; a benchmark's is None."""
    return RIGHT if RIGHT in row.get("agreement", {}) else row.get("metric")


def decisive(row: dict[str, Any]) -> dict[str, Any]:
    """The difference, its interval and n of that metric."""
    return row["agreement"][RIGHT] if decided_by(row) == RIGHT else row


def rule(row: dict[str, Any], max_drop: float) -> str:
    """What a cell must be sure of, at the lower 95% bound. row: any that was measured, such as the baseline's."""
    metric = decided_by(row)
    if metric is None:
        return f"at most {points(max_drop)} lost"
    if metric == RIGHT:
        return f"at most {points(max_drop)} of right answers lost on the {decisive(row)['n']} requests that have an answer"
    return f"at least {max(100 - max_drop, 0):g}% answered in the uncompressed model's words"


def _change(row: dict[str, Any]) -> str:
    if decided_by(row) == WORDS:
        low, high = row["score_interval"]
        return f"{row['score']:.1f}% [{low:.1f}, {high:.1f}] answered in its words"
    low, high = decisive(row)["difference_interval"]
    return f"{decisive(row)['difference']:+.1f} points [{low:+.1f}, {high:+.1f}] against none"


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
        "difference_interval": decisive(row)["difference_interval"], "hurts": hurts, "nearest": None, "line": line,
    }  # fmt: skip
