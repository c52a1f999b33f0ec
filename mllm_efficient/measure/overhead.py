"""What the wrapper itself costs: where nothing is compressed against the bare model, and where something is against the same work
done by hand: the stock tower, and the stock model on the shorter prompt."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..apply.prepare import prepare
from ..apply.wrap import compressed
from ..compressors.base import Compressor
from ..compressors.divprune import DivPrune
from ..compressors.random import Random
from ..loading.models import Loaded, require_supported
from ..patches import inner_model
from ..report import last_report
from .bench import Settings
from .machine import machine
from .random_model import describe
from .timing import ORDER, Clock, Series, clock_for, devices_of, interleave, paired, quick_gc, spread
from .workload import Inputs, make_inputs

METHODS = (DivPrune(keep=1.0), Random(keep=0.5))  # one that passes everything through, and the cheapest that does not


def overhead(loaded: Loaded, settings: Settings, done: Callable[[], object] = lambda: None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows, one per batch size and of ``METHODS``, and meta."""
    adapter, devices = require_supported(loaded), devices_of(loaded.model)
    clock, before, rows = clock_for(devices), machine(devices), []
    for batch in settings.batch_sizes:
        inputs = make_inputs(loaded, adapter, settings.workload, batch, settings.seed)
        more: dict[str, Any] = {"warmup": settings.warmup, "repeats": settings.repeats, "seed": settings.seed, "done": done}
        rows += [overhead_row(loaded.model, inputs, method, clock=clock, batch_size=batch, **more) for method in METHODS]
    meta = {
        **describe(loaded), "workload": settings.workload.to_dict() | inputs.to_dict(),
        "repeats": settings.repeats, "warmup": settings.warmup, "order": f"bare and wrapped {ORDER}", "clock": clock.name,
        "meaning": {
            "bare_ms": "keep=1: a forward with pixels and a cache of the bare model; otherwise the stock tower and projector, then the "
            "stock model on the shorter prompt, made before",
            "overhead": "median of the paired ratios wrapped / bare, less 1",
            "overhead_ms": "wrapped less bare of the same repeat, less method_ms, the method's own time",
        },
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
    method: Compressor,
    *,
    clock: Clock,
    batch_size: int,
    warmup: int = 2,
    repeats: int = 15,
    seed: int = 0,
    done: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Prefill (``forward`` with the pixels, a cache, logits of the last position) wrapped, and the same work without the wrapper."""
    with torch.no_grad():
        shorter = dict(prepare(model, method, **inputs.call).model_kwargs)
    keeps_all = shorter["input_ids"].shape == inputs.call["input_ids"].shape

    @torch.no_grad()
    def forward() -> Any:
        return model(**inputs.call, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def by_hand() -> Any:
        features = inner_model(model).get_image_features
        features(**{k: v for k, v in inputs.call.items() if k in inspect.signature(features).parameters})
        return model(**shorter, use_cache=True, logits_to_keep=1)

    def turn(side: Side) -> dict[str, float]:
        if not side.wrapped:
            return {"ms": clock.run(forward if keeps_all else by_hand)[0]}
        with compressed(model, method):
            took = clock.run(forward)[0]
            return {"ms": took, "method_ms": 1000 * last_report(model).compress_seconds}

    sides = [Side(name="bare", wrapped=False), Side(name="wrapped", wrapped=True)]
    with quick_gc():
        interleave(sides, turn, warmup=warmup, repeats=repeats, seed=seed, done=done)
    bare, wrapped = (side.values("ms") for side in sides)
    ratio, own = paired(wrapped, bare, seed), sides[1].values("method_ms")
    return {
        "method": method.spec(), "batch_size": batch_size, "bare_ms": spread(bare), "wrapped_ms": spread(wrapped), "ratio": ratio,
        "method_ms": spread(own), "overhead_ms": spread([w - b - m for w, b, m in zip(wrapped, bare, own)]),
        "overhead": None if ratio is None else round(float(ratio["median"]) - 1, 5),
        "failed": next((side.failed for side in sides if side.failed), None),
    }  # fmt: skip
