"""What the wrapper itself costs: the model wrapped with a method that keeps everything, against the same model bare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..compressors.divprune import DivPrune
from ..models import Loaded, require_supported
from ..wrapper import compressed
from .bench import Settings
from .machine import machine
from .random_model import describe
from .timing import Clock, Series, clock_for, devices_of, interleave, paired, quick_gc, spread
from .workload import Inputs, make_inputs


def overhead(loaded: Loaded, settings: Settings, done: Callable[[], object] = lambda: None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows, one per batch size, and meta."""
    adapter, devices = require_supported(loaded), devices_of(loaded.model)
    clock, before, rows = clock_for(devices), machine(devices), []
    for batch in settings.batch_sizes:
        inputs = make_inputs(loaded, adapter, settings.workload, batch, settings.seed)
        more: dict[str, Any] = {"warmup": settings.warmup, "repeats": settings.repeats, "seed": settings.seed, "done": done}
        rows.append(overhead_row(loaded.model, inputs, clock=clock, batch_size=batch, **more))
    meta = {
        **describe(loaded), "workload": settings.workload.to_dict() | inputs.to_dict(),
        "repeats": settings.repeats, "warmup": settings.warmup, "order": "bare and wrapped in turn (A B A B)", "clock": clock.name,
        "meaning": {"overhead": "median of the paired ratios wrapped / bare of a forward with pixels and a cache, less 1"},
        "machine": before, "machine_after": machine(devices),
    }  # fmt: skip
    return rows, meta


@dataclass(kw_only=True)
class Side(Series):
    """One side of a pair."""

    wrapped: bool


def overhead_row(
    model: Any,
    inputs: Inputs,
    *,
    clock: Clock,
    batch_size: int,
    warmup: int = 2,
    repeats: int = 15,
    seed: int = 0,
    done: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Prefill (``forward`` with the pixels, a cache, logits of the last position) bare and wrapped with ``divprune:keep=1``.

    ``overhead`` is the median of the paired ratios, less 1.
    """
    method = DivPrune(keep=1.0)

    @torch.no_grad()
    def forward() -> Any:
        return model(**inputs.call, use_cache=True, logits_to_keep=1)

    def turn(side: Side) -> dict[str, float]:
        if not side.wrapped:
            return {"ms": clock.run(forward)[0]}
        with compressed(model, method):
            return {"ms": clock.run(forward)[0]}

    sides = [Side(name="bare", wrapped=False), Side(name="wrapped", wrapped=True)]
    with quick_gc():
        interleave(sides, turn, warmup=warmup, repeats=repeats, done=done)
    bare, wrapped = (side.values("ms") for side in sides)
    ratio = paired(wrapped, bare, seed)
    return {
        "method": method.spec(), "batch_size": batch_size, "bare_ms": spread(bare), "wrapped_ms": spread(wrapped), "ratio": ratio,
        "overhead": None if ratio is None else round(float(ratio["median"]) - 1, 5),
        "failed": next((side.failed for side in sides if side.failed), None),
    }  # fmt: skip
