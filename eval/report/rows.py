"""Rows of a sweep, one per cell: accuracy, FLOPs, latency and memory beside each other, and the tables made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mllm_efficient.measure.flops import Cost

from ..agreement_rows import with_interval
from ..table import OVERALL

TFLOP, MB = 1e12, 1e6
PHASES = ("vision", "compress", "prefill", "decode", "total")
TIMES = ("vision_ms", "compress_ms", "prefill_ms", "ttft_ms", "tpot_ms", "e2e_ms", "tokens_per_s")
BENCH = (*TIMES, "ttft_ratio", "e2e_ratio", "free_choice_reached", "peak_memory_mb", "kv_cache_mb")
ACCURACY = (
    "score", "score_interval", "baseline", "difference", "difference_interval", "retention", "micro", "n", "clusters", "failures", "floor",
    "visual_tokens_full", "visual_tokens_kept", "positions", "region_share", "region_kept", "hard", "hard_n", "broken", "broken_n",
    "ece", "ece_interval", "aurc", "aurc_interval",
)  # fmt: skip
TASK = ("score", "score_interval", "difference", "difference_interval", "retention", "floor", "n", "clusters", "failures")
WORDS, RIGHT = "normalised_match", "accuracy"  # what ``score`` is of a user's own requests
MEANING = {
    "score": "percent right, unweighted mean of the categories; tasks: each category by itself",
    "difference": "paired difference to none in points, 95% over 2,000 resamples of images; exact (Clopper-Pearson) where few differ",
    "bound": "lower 95% bound of the difference that decides, for all cells that cost less at once (bound_cells of them)",
    "retention": "percent of the baseline's score",
    "flops_ratio": "FLOPs of tower, projector, method, prefill and decoding over the baseline's (convention exact, *_tflops in 10^12)",
    "prefill_flops_ratio": "FLOPs of the language model's prefill over the baseline's; prefill_flops_ratio_asked: of a pure token drop "
    "at the budget asked for",
    "ttft_ratio": "time to first token over the baseline's of the same repeat: median, and 95% over medians of resampled repeats",
    "*_ms": "{median, q1, q3, n} in milliseconds, batch 1; tokens_per_s: new tokens over e2e_ms",
    "peak_memory_mb": "MB = 10^6 bytes; kv_cache_mb: keys and values after the last token",
}
DATA_MEANING = MEANING | {
    "score": "accuracy where every request with an image has an answer, otherwise normalised_match; metric says which",
    "difference": "paired difference to none in points, 95% over 2,000 resamples of requests; exact (Clopper-Pearson) where few differ",
    "agreement": "exact_match: percent of the requests answered by the uncompressed model's text, normalised_match: apart from case, "
    "punctuation, articles and numbers spelled out; first_divergence: the token at which other answers part, on average; kl: of the next "
    "token along the uncompressed model's answer, nats; accuracy: percent right of the requests that have an answer",
    "by_length": "exact_match and normalised_match by the number of tokens of the uncompressed model's answer, its end among them",
    "*_tflops, *_ms, *_mb": "of the timed prompt (workload), not of the requests",
}


def row_of(
    spec: str, role: str, asked: str, by_task: dict[str, dict[str, Any]] | None, cost: Cost | None, base: Cost | None,
    asked_prefill: int | None, bench: dict[str, Any] | None, failed: str | None,
) -> dict[str, Any]:  # fmt: skip
    """One cell. by_task: eval's rows by category; cost, base: its FLOPs and the baseline's; bench: its row of timings.

    What was not measured is None. Cells of a user's own requests say which ``metric`` their score is and have the others
    in ``agreement``.
    """
    total = (by_task or {}).get(OVERALL, {})
    row: dict[str, Any] = {"method": spec, "role": role, "asked": asked}
    row |= {name: total.get(name) for name in ("keep", "tokens", *ACCURACY)}
    row |= {f"{p}_tflops": None if cost is None else getattr(cost, p) / TFLOP for p in PHASES}
    whole, part = (cost and base and _ratio(getattr(cost, p), getattr(base, p)) for p in ("total", "prefill"))
    row |= {"flops_ratio": whole, "prefill_flops_ratio": part}
    row["prefill_flops_ratio_asked"] = _ratio(asked_prefill, base.prefill) if asked_prefill is not None and base else None
    row["kv_cache_mb_computed"] = None if cost is None else round(cost.kv_cache_bytes / MB, 3)
    row |= {name: (bench or {}).get(name) for name in BENCH}
    row["tasks"] = {t: {k: r.get(k) for k in TASK} for t, r in (by_task or {}).items() if t != OVERALL}
    if "agreement" in total:
        row["metric"] = total["metric"]
        row["agreement"] = {name: {k: r.get(k) for k in TASK} for name, r in total["agreement"].items()}
        row["by_length"] = total.get("by_length", {})
    return row | {"failed": failed}


def metric_of(rows: Sequence[dict[str, Any]]) -> str | None:
    """What the scores of a user's own requests are (``WORDS`` or ``RIGHT``); None for a benchmark's categories."""
    return next((r["metric"] for r in rows if "metric" in r), None)


def _ratio(value: int, of: int) -> float:
    return round(value / of, 6)


def tasks_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The categories that the rows have, in their order."""
    return list(dict.fromkeys(t for r in rows for t in r["tasks"]))


# --------------------------------------------------------------------------------------------------- tables

HEADER = (
    "method", "tokens", "score", "vs none [95%]", "retention",
    "same answer", "same words [95%]", "first other token", "KL nats [95%]", "right", "right vs none [95%]",
    "hard", "broken", "ECE", "AURC", "FLOPs", "prefill FLOPs", "asked", "TTFT ms", "TTFT/none [95%]",
    "prefill ms", "e2e ms", "tok/s", "peak MB", "KV MB",
)  # fmt: skip


def main_table(rows: Sequence[dict[str, Any]], *, quartiles: bool = True, asked: bool = False) -> tuple[list[str], list[list[str]]]:
    """Header and lines: everything of a cell in one line. Columns that nothing fills are left out.

    asked: whether the prefill FLOPs that were asked for stand beside those reached.
    """
    lines = [_line(r, spread if quartiles else median) for r in rows]
    third = HEADER.index("same answer") if metric_of(rows) else 2
    for r, line in zip(rows, lines):
        if _gone(r):
            line[third] = "failed"
    used = [i for i, h in enumerate(HEADER) if i < 2 or (any(line[i] for line in lines) and (asked or h != "asked"))]
    return [HEADER[i] for i in used], [[line[i] for i in used] for line in lines]


def _gone(r: dict[str, Any]) -> bool:
    return bool(r["failed"]) and r["score"] is None


def _line(r: dict[str, Any], timed: Callable[[dict[str, float] | None], str]) -> list[str]:
    if _gone(r):
        return [r["method"], *[""] * (len(HEADER) - 1)]
    base, ratio = r["role"] == "baseline", r["ttft_ratio"]
    name = f"{r['method']} (failed)" if r["failed"] else r["method"]
    paired = "" if base or ratio is None else f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
    return [
        name, number(r["visual_tokens_kept"], "g"), *_scores(r), *(number(r.get(n)) for n in ("hard", "broken", "ece", "aurc")),
        percent(r["flops_ratio"]), percent(r["prefill_flops_ratio"]), percent(r["prefill_flops_ratio_asked"]),
        timed(r["ttft_ms"]), paired, timed(r["prefill_ms"]), timed(r["e2e_ms"]), median(r["tokens_per_s"]),
        number(r["peak_memory_mb"], ",.0f"), number(r["kv_cache_mb"], ",.2f"),
    ]  # fmt: skip


def _scores(r: dict[str, Any]) -> list[str]:
    """From "score" to "right vs none": a benchmark's cell fills the first three, one of a user's own requests the others."""
    base = r["role"] == "baseline"
    if "agreement" not in r:
        lost = difference(r["difference"], r["difference_interval"])
        return [number(r["score"]), "" if base else lost, "" if base else number(r["retention"], ".1f", "%"), *[""] * 6]
    exact, words, other, kl, right = (r["agreement"].get(n) for n in ("exact_match", WORDS, "first_divergence", "kl", RIGHT))
    return [
        "", "", "", number(exact["score"]), with_interval(words, ".1f", r["method"]), number(other and other["score"]),
        with_interval(kl, ".4f", r["method"]), number(right and right["score"]),
        "" if base or right is None else difference(right["difference"], right["difference_interval"]),
    ]  # fmt: skip


def failures(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each failed cell with its reason."""
    return [f"failed: {r['method']}: {r['failed']}" for r in rows if r["failed"]]


def task_table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: the score of each category, the floor without the image first where there is one."""
    tasks = tasks_of(rows)
    lines = []
    first = next((r for r in rows if r["score"] is not None), None)
    if first is not None and first["floor"] is not None:
        lines.append(["no-image", "0", *(number(first["tasks"][t]["floor"]) for t in tasks), number(first["floor"])])
    for r in rows:
        if r["score"] is not None:
            scores = [number(r["tasks"][t]["score"] if t in r["tasks"] else None) for t in tasks]
            lines.append([r["method"], number(r["visual_tokens_kept"], "g"), *scores, number(r["score"])])
    return ["method", "tokens", *tasks, "macro"], lines


def number(value: float | None, how: str = ".1f", unit: str = "") -> str:
    return "" if value is None else f"{value:{how}}{unit}"


def percent(ratio: float | None) -> str:
    return number(None if ratio is None else 100 * ratio, ".1f", "%")


def difference(value: float | None, interval: Sequence[float] | None) -> str:
    return "" if value is None or interval is None else f"{value:+.1f} [{interval[0]:+.1f}, {interval[1]:+.1f}]"


def median(value: dict[str, float] | None) -> str:
    return "" if value is None else f"{value['median']:.{1 if value['median'] < 1000 else 0}f}"


def spread(value: dict[str, float] | None) -> str:
    """``12.3 [11.9, 12.8]``: median and quartiles."""
    if value is None:
        return ""
    digits = 1 if value["median"] < 1000 else 0
    return f"{value['median']:.{digits}f} [{value['q1']:.{digits}f}, {value['q3']:.{digits}f}]"
