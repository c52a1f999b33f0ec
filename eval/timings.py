"""Latency by phase and memory of methods on one model: what ``me.bench`` and the command ``bench`` run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mllm_efficient.compressors.base import Compressor
from mllm_efficient.errors import MllmEfficientError
from mllm_efficient.loading.models import Loaded
from mllm_efficient.measure.arms import REFERENCE
from mllm_efficient.measure.bench import Bench, Settings
from mllm_efficient.measure.machine import busy
from mllm_efficient.measure.rows import table
from mllm_efficient.progress import SILENT, Progress
from mllm_efficient.tables import Table

from .results import BENCH, Results

FIRST = ("batch", "tokens", "TTFT ms", "TTFT/none", "e2e ms", "prefill", "ideal", "peak MB")
NO_CEILING = "no ceiling: the baseline or the text-only prompt failed"
NOTE = (
    "Milliseconds are medians. 'ideal' is the TTFT ratio that the FLOPs allow, 'reached' how much of that speed-up is there; 'vs random' "
    "is the TTFT of a free choice of as many tokens over this method's."
)


def bench_of(
    loaded: Loaded, methods: Sequence[Compressor], plan: Settings, *, quantized: Callable[[], Loaded] | None = None,
    progress: Progress = SILENT,
) -> Results:  # fmt: skip
    """Every phase of every method in turns, the uncompressed model beside each. quantized: loads the same model for a second set."""
    if quantized is not None and loaded.options.quantization is not None:
        raise MllmEfficientError("--quantized adds arms to a model that is not quantized: leave --quantization out")
    run = Bench(loaded, methods, plan, quantized=None if quantized is None else quantized())
    references = [a.name for a in run.arms() if a.role == REFERENCE]
    if references:
        progress.say(f"beside them {', '.join(references)}")
    for spec, reason in run.left_out.items():
        progress.warn(f"without {spec}: {reason}")
    with progress.bar(run.total, "turn") as bar:
        rows, meta = run.run(bar.update)
    warning = busy(meta["machine"])
    if warning:
        progress.warn(warning)
    header, lines = table(rows)
    where = f"{meta['device']}, {meta['dtype']}, {meta['attention']}, {meta['machine']['threads']} threads"
    note = f"{NOTE} {where}, {meta['weights_mb']:,.0f} MB of weights."
    shown = Table(header, lines, first=FIRST, title="\n".join(ceilings(meta)), note=note)
    return Results(BENCH, rows, meta, (shown,), tuple(f"failed: {line}" for line in meta["failed"]))


def ceilings(meta: dict[str, Any]) -> list[str]:
    """What could be gained at most, a line for each batch size."""
    return [c["line"] if c else NO_CEILING for c in meta["ceiling"]]
