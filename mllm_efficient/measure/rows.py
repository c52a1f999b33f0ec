"""What a benchmark says: one row per arm and batch size, and the ceiling of what compression can gain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .arms import BASELINE, TEXT_ONLY, Arm, free_choice
from .timing import paired, spread

TIMED = (
    "preprocess_ms", "vision_ms", "compress_ms", "method_ms", "prefill_ms", "ttft_ms", "tpot_ms", "e2e_ms", "tokens_per_s"
)  # fmt: skip
MEANING = {
    "ttft_ratio": "TTFT over the baseline's of the same repeat: median, and 95% over medians of resampled repeats",
    "e2e_ratio": "the same of e2e_ms",
    "flops_ratio": "the ideal TTFT ratio: FLOPs of tower, projector, method and prefill over the baseline's (convention exact)",
    "ideal_reached": "flops_ratio / ttft_ratio: the share of the ideal speed-up that is measured",
    "free_choice_reached": "TTFT of `random` at the same count over this arm's, of the same repeat; 1 is as fast as a free choice",
    "visual_tokens_full": "per prompt, before", "visual_tokens_kept": "per prompt, after",
}  # fmt: skip


def rows_of(
    arms: Sequence[Arm], *, batch_size: int, images: int, full: int, flops_ratio: Callable[[Arm], float | None], seed: int = 0
) -> list[dict[str, Any]]:
    """The rows of one batch size, the baseline's first. full: visual tokens of a prompt without compression."""
    shown = [a for a in arms if a.role != TEXT_ONLY]
    base = next(a for a in shown if a.role == BASELINE)
    out = []
    for arm in shown:
        row: dict[str, Any] = {"method": arm.name, "arm": arm.role, "quantization": arm.quantization, "batch_size": batch_size}
        row |= {name: spread(arm.values(name)) for name in TIMED}
        ok = arm.failed is None
        free = free_choice(arm, shown)
        ratio = paired(arm.values("ttft_ms"), base.values("ttft_ms"), seed)
        ideal, compared = flops_ratio(arm), arm is not base and arm.quantization == base.quantization
        row |= {
            "peak_memory_mb": _rounded(arm.peak_memory_mb) if ok else None,
            "kv_cache_mb": _rounded(arm.kv_cache_mb) if ok else None,
            "visual_tokens_full": full,
            "visual_tokens_kept": arm.kept * images,
            "flops_ratio": None if ideal is None else round(ideal, 6),
            "ttft_ratio": ratio,
            "e2e_ratio": paired(arm.values("e2e_ms"), base.values("e2e_ms"), seed),
            "ideal_reached": round(ideal / ratio["median"], 4) if ideal and ratio and compared else None,
            "free_choice_reached": paired(free.values("ttft_ms"), arm.values("ttft_ms"), seed) if free and free is not arm else None,
            "failed": arm.failed,
        }
        if arm.max_batch is not None:
            row["max_batch"] = arm.max_batch
        out.append(row)
    return out


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def ceiling(base: Arm, text_only: Arm, *, batch_size: int, output_tokens: int) -> dict[str, Any] | None:
    """What could be gained if visual tokens cost the language model nothing, from the baseline of every repeat.

    prefill_share: of the baseline's end-to-end time. gain_at_most: end to end, the vision tower still running;
    gain_at_most_without_vision: the picture as free as no picture. ttft_gain_at_most: to the first token. None if
    either arm failed.
    """
    e2e, ttft, vision, prefill = (np.array(base.values(n)) for n in ("e2e_ms", "ttft_ms", "vision_ms", "prefill_ms"))
    text_e2e, text_ttft = (np.array(text_only.values(n)) for n in ("e2e_ms", "ttft_ms"))
    if not len(e2e) or not len(text_e2e):
        return None
    out = {
        "batch_size": batch_size, "output_tokens": output_tokens,
        "prefill_share": _median(prefill / e2e), "vision_share": _median(vision / e2e),
        "gain_at_most": _median(e2e / (vision + text_e2e)), "gain_at_most_without_vision": _median(e2e / text_e2e),
        "ttft_gain_at_most": _median(ttft / (vision + text_ttft)),
        "text_only_ttft_ms": spread(list(text_ttft)), "text_only_e2e_ms": spread(list(text_e2e)),
    }  # fmt: skip
    return {"line": _line(out), **out}


def _median(values: Any) -> float:
    return round(float(np.median(values)), 4)


def _gain(times: float) -> str:
    """A gain below 1 is none that compression could have: the clock's noise is larger than what there is to gain."""
    return f"{times:.1f}x" if times >= 1 else "not measurable"


def _line(c: dict[str, Any]) -> str:
    whole, first, bare = (_gain(c[name]) for name in ("gain_at_most", "ttft_gain_at_most", "gain_at_most_without_vision"))
    return (
        f"prefill is {100 * c['prefill_share']:.0f}% of your end-to-end time; with all visual tokens free you gain at most "
        f"{whole} (to the first token {first}; {bare} end to end if the vision tower were free too) "
        f"[batch {c['batch_size']}, {c['output_tokens']} new tokens]"
    )


HEADER = (
    "method", "batch", "tokens", "vision", "compress", "prefill", "TTFT ms", "TTFT/none [95%]", "ideal", "reached", "vs random",
    "TPOT", "e2e ms", "tok/s", "peak MB", "KV MB",
)  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the printed table; ``max_batch`` only where it was searched."""
    extra = any("max_batch" in r for r in rows)
    lines = []
    for r in rows:
        name = r["method"] if r["quantization"] is None else f"{r['method']} ({r['quantization']})"
        if r["failed"]:
            lines.append([name, str(r["batch_size"]), f"failed: {r['failed'][:60]}", *[""] * (len(HEADER) - 3 + extra)])
            continue
        ratio, free = r["ttft_ratio"], r["free_choice_reached"]
        line = [
            name, str(r["batch_size"]), str(r["visual_tokens_kept"]),
            *(_ms(r[n]) for n in ("vision_ms", "compress_ms", "prefill_ms", "ttft_ms")),
            f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]" if ratio and r["arm"] != BASELINE else "",
            _number(r["flops_ratio"], ".3f"), _percent(r["ideal_reached"]), _percent(free and free["median"]),
            *(_ms(r[n]) for n in ("tpot_ms", "e2e_ms", "tokens_per_s")),
            _number(r["peak_memory_mb"], ",.0f"), _number(r["kv_cache_mb"], ",.1f"),
        ]  # fmt: skip
        lines.append([*line, str(r.get("max_batch", ""))] if extra else line)
    return [*HEADER, "max batch"] if extra else list(HEADER), lines


def _ms(value: dict[str, Any] | None) -> str:
    return "" if value is None else f"{value['median']:.1f}" if value["median"] < 1000 else f"{value['median']:.0f}"


def _number(value: float | None, how: str) -> str:
    return "" if value is None else format(value, how)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f}%"
