"""A whole benchmark: for every batch size all arms in turn, their rows, the ceiling, the largest batches, and the settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..apply.plan import check
from ..compressors.base import Compressor
from ..compressors.composed import or_random
from ..compressors.none import NoCompression
from ..errors import MllmEfficientError
from ..loading.models import Loaded, require_supported
from .arms import METHOD, TEXT_ONLY, Arm, arms_for
from .ideal import PromptFlops
from .latency import PHASES, Laps, measure
from .machine import machine
from .memory import fits_in_memory, largest_batch, weights_mb
from .native import Control
from .random_model import describe
from .rows import MEANING, ceiling, rows_of
from .timing import ORDER, Clock, clock_for, devices_of, free, quick_gc
from .workload import Inputs, Workload, make_inputs

NO_MAX_BATCH = (
    "--max-batch needs a CUDA device: a CPU that runs out of memory swaps or kills the process, which is no error to be caught. "
    "peak_memory_mb at two --batch-size values says what a row costs"
)


@dataclass(frozen=True)
class Settings:
    """What is run. max_batch: the largest batch to try in the search for one that fits; None searches none."""

    workload: Workload
    batch_sizes: tuple[int, ...] = (1,)
    repeats: int = 10
    warmup: int = 2
    seed: int = 0
    max_batch: int | None = None


class Bench:
    """One model with the methods to compare. Raises before anything is timed for what the model cannot run.

    quantized: the same model with quantized weights, for a second set of arms. clock: another one than the device's, for tests.
    """

    def __init__(
        self,
        loaded: Loaded,
        methods: Sequence[Compressor],
        settings: Settings,
        *,
        quantized: Loaded | None = None,
        clock: Clock | None = None,
    ):
        self.loaded, self.settings, self.quantized = loaded, settings, quantized
        self.methods = [or_random(m) for m in methods] if loaded.processor is None else methods
        self.adapter = require_supported(loaded)
        self.devices = devices_of(loaded.model)
        self.clock = clock or clock_for(self.devices)
        if settings.max_batch is not None and not (self.devices and all(d.type == "cuda" for d in self.devices)):
            raise MllmEfficientError(NO_MAX_BATCH)
        self.control = Control(loaded)
        self.one = self.inputs(1)
        self.natives = self.native_inputs(1)
        self.left_out: dict[str, str] = {}
        self.arms()  # raises for methods that cannot run

    def inputs(self, batch: int) -> Inputs:
        return make_inputs(self.loaded, self.adapter, self.settings.workload, batch, self.settings.seed)

    def native_inputs(self, batch: int) -> dict[str, Inputs]:
        """The inputs of each method that sets the processor, by its specification. Raises for one that the model cannot run."""
        work, out = self.settings.workload, dict[str, Inputs]()
        for method in self.methods:
            if method.sets_processor:
                check(self.adapter, method)
                loaded = self.control.asked(method, [[self.one.image_size] * work.images]).loaded
                out[method.spec()] = make_inputs(loaded, self.adapter, work, batch, self.settings.seed)
        return out

    def arms(self) -> list[Arm]:
        """Fresh arms: the baseline, the methods, the references, those of the quantized model, the text-only prompt."""
        item = self.adapter.items(self.one.call)[0]
        each = {spec: inputs.visual_tokens // self.settings.workload.images for spec, inputs in self.natives.items()}
        arms, self.left_out = arms_for(self.adapter, item, self.methods, self.loaded.options.quantization, each)
        if self.quantized is not None:
            model, kind = self.quantized.model, self.quantized.options.quantization
            more = [
                replace(a, role=METHOD, model=model, quantization=kind, samples={}, beside_mb=weights_mb(self.loaded.model)) for a in arms
            ]
            for arm in arms:
                arm.beside_mb = weights_mb(model)
            arms += more
        return [*arms, Arm(name="text-only", method=NoCompression(), role=TEXT_ONLY, model=self.loaded.model, kept=0)]

    @property
    def total(self) -> int:
        """Turns in all, for a progress bar."""
        return len(self.settings.batch_sizes) * len(self.arms()) * (self.settings.warmup + self.settings.repeats + 1)

    def run(self, done: Callable[[], object] = lambda: None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Rows and meta. ``done`` is called after every turn."""
        with quick_gc():
            return self._run(done)

    def _run(self, done: Callable[[], object]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        settings, work = self.settings, self.settings.workload
        before, rows, ceilings, memory, failed = machine(self.devices), list[Any](), list[Any](), None, list[str]()
        ideal, no_ideal = self.flops_ratios()
        most, search_errors = self.largest_batches() if settings.max_batch is not None else ({}, {})
        for batch in settings.batch_sizes:
            arms = self.arms()
            try:
                laps = Laps(self.inputs(batch), work.output_tokens, self.clock, self.native_inputs(batch))
            except RuntimeError as error:  # the inputs alone fill the device
                for arm in arms:
                    arm.failed = f"{type(error).__name__}: {error}"[:500]
            else:
                how: dict[str, Any] = {"warmup": settings.warmup, "repeats": settings.repeats, "seed": settings.seed}
                memory = measure(arms, laps, **how, devices=self.devices, done=done) or memory
                del laps
                free()
            for arm in arms:
                arm.max_batch = most.get((arm.name, arm.quantization))
            failed += [f"{a.name} at batch {batch}: {a.failed}" for a in arms if a.failed]
            full = self.one.visual_tokens
            rows += rows_of(arms, batch_size=batch, images=work.images, full=full, flops_ratio=ideal, seed=settings.seed)
            ceilings.append(ceiling(arms[0], arms[-1], batch_size=batch, output_tokens=work.output_tokens))
        meta = {
            **describe(self.loaded),
            "workload": work.to_dict() | self.one.to_dict(),
            "batch_sizes": list(settings.batch_sizes), "repeats": settings.repeats, "warmup": settings.warmup,
            "order": f"arms {ORDER}; all phases of an arm in its turn",
            "methods": [a.method.to_dict() for a in self.arms() if a.role != TEXT_ONLY],
            "clock": self.clock.name, "ceiling": ceilings, "left_out": self.left_out, "failed": failed,
            "meaning": PHASES | MEANING,
            "preprocess": "by the model's processor" if self.one.preprocess else "null: random weights bring no processor",
            "peak_memory": memory, "kv_cache": "keys and values after the last token, whole batch; MB = 1e6 bytes",
            "weights_mb": round(weights_mb(self.loaded.model), 1), "ideal": no_ideal or "mllm_efficient.measure.flops, convention exact",
            "machine": before, "machine_after": machine(self.devices),
        }  # fmt: skip
        if settings.max_batch is not None:
            meta["max_batch"] = {"tried_up_to": settings.max_batch, "errors": search_errors}
        return rows, meta

    def flops_ratios(self) -> tuple[Callable[[Arm], float | None], str | None]:
        """The ideal TTFT ratio of an arm, and why there is none, if so."""
        flops = PromptFlops(self.loaded, self.adapter, self.settings.workload, self.one)
        if flops.error is not None:
            return lambda arm: None, f"null: {flops.error}"
        known = {arm.name: flops.of(arm.method).total / flops.baseline.total for arm in self.arms() if arm.role != TEXT_ONLY}
        return lambda arm: known[arm.name], None

    def largest_batches(self) -> tuple[dict[tuple[str, str | None], int], dict[str, str]]:
        """The largest batch that each arm can generate with, and what else stopped a search."""
        found, errors = {}, {}
        assert self.settings.max_batch is not None
        for arm in self.arms():
            if arm.role == TEXT_ONLY:
                continue

            def fits(batch: int, arm: Arm = arm) -> bool:
                def once() -> None:
                    native = self.native_inputs(batch) if arm.method.sets_processor else None
                    laps = Laps(self.inputs(batch), self.settings.workload.output_tokens, self.clock, native)
                    with laps.as_used(arm), torch.no_grad():
                        laps.generate(arm)

                return fits_in_memory(once)

            try:
                found[arm.name, arm.quantization] = largest_batch(fits, self.settings.max_batch)
            except Exception as error:
                errors[arm.name] = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            free()
        return found, errors
