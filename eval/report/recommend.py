"""The cheapest cell that loses at most so many points, and what it hurts most. "none" is a legal answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SAME = 3  # decimals to which FLOPs ratios are compared; a tenth of a percent is a tie


def recommend(rows: Sequence[dict[str, Any]], max_drop: float) -> dict[str, Any]:
    """The recommendation of a sweep's rows, the baseline's first.

    A cell is admitted if the lower end of the paired 95% interval of its difference to ``none`` is at least
    ``-max_drop`` points and it costs less. The fewest FLOPs win, then the lower TTFT ratio. Failed cells are not
    admitted. Where FLOPs are not known, the share of visual tokens kept stands for them.

    Returns: method (its spec, to paste), flops_ratio, ttft_ratio, difference and interval, hurts (category, difference,
    interval), nearest (the best refused cell, where ``none`` is the answer) and line, all this in words.
    """
    base = rows[0]
    if not _measured(base):
        return _answer(base, max_drop, f"none: the uncompressed model failed, so there is nothing to compare with ({base['failed']})")
    if base["floor"] is not None and base["score"] <= base["floor"]:
        scores = f"{base['score']:.1f} against {base['floor']:.1f}"
        line = f"none: the uncompressed model is no better than without the image ({scores}), so these scores say nothing"
        return _answer(base, max_drop, line)
    admitted = [r for r in rows[1:] if _measured(r) and r["difference_interval"][0] >= -max_drop and round(_cost(r), SAME) < 1]
    if not admitted:
        refused = [r for r in rows[1:] if _measured(r) and round(_cost(r), SAME) < 1]
        nearest = max(refused, key=lambda r: (r["difference_interval"][0], -_cost(r)), default=None)
        line = f"none: no method and budget here is sure (lower 95% bound) to lose at most {points(max_drop)}"
        if nearest is not None:
            low, high = nearest["difference_interval"]
            line += f"; {nearest['method']} comes nearest, {nearest['difference']:+.1f} points [{low:+.1f}, {high:+.1f}]"
        return _answer(base, max_drop, line) | {"nearest": nearest and nearest["method"]}
    best = min(admitted, key=lambda r: (round(_cost(r), SAME), r["ttft_ratio"]["median"] if r["ttft_ratio"] else 1.0))
    out = _answer(best, max_drop, "")
    low, high = best["difference_interval"]
    parts = [f"{best['method']}: {best['difference']:+.1f} points [{low:+.1f}, {high:+.1f}] against none"]
    if best["flops_ratio"] is not None:
        parts.append(f"{100 * best['flops_ratio']:.1f}% of its FLOPs")
    parts.append(f"TTFT ratio {out['ttft_ratio']:.3f}" if out["ttft_ratio"] is not None else "TTFT not measured")
    if out["hurts"] is not None:
        worst = out["hurts"]
        parts.append(
            f"hurts {worst['task']} most: {worst['difference']:+.1f} points [{worst['interval'][0]:+.1f}, {worst['interval'][1]:+.1f}]"
        )
    else:
        parts.append("hurts no category")
    return out | {"line": "; ".join(parts)}


def points(value: float) -> str:
    """``1 point``, ``2.5 points``."""
    return f"{value:g} point{'' if value == 1 else 's'}"


def _measured(row: dict[str, Any]) -> bool:
    return row["failed"] is None and row["difference_interval"] is not None


def _cost(row: dict[str, Any]) -> float:
    if row["flops_ratio"] is not None:
        return float(row["flops_ratio"])
    return float(row["visual_tokens_kept"] / row["visual_tokens_full"])


def _answer(row: dict[str, Any], max_drop: float, line: str) -> dict[str, Any]:
    ratio = row["ttft_ratio"]
    worst = min(row["tasks"].items(), key=lambda item: item[1]["difference"], default=None)
    hurts = None
    if worst is not None and worst[1]["difference"] < 0:
        hurts = {"task": worst[0], "difference": worst[1]["difference"], "interval": worst[1]["difference_interval"]}
    return {
        "method": row["method"], "max_drop": max_drop, "flops_ratio": row["flops_ratio"], "ttft_ratio": ratio and ratio["median"],
        "ttft_interval": ratio and [ratio["low"], ratio["high"]], "difference": row["difference"],
        "difference_interval": row["difference_interval"], "hurts": hurts, "nearest": None, "line": line,
    }  # fmt: skip
