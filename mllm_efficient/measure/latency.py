"""Latency by phase: every arm on the same inputs, phase by phase and end to end, turn by turn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from ..apply.encode import encode
from ..apply.prepare import prepare
from ..apply.signatures import cache_of
from ..apply.wrap import compressed, method_of
from ..compressors.none import NoCompression
from ..trained.install import installed
from .arms import TEXT_ONLY, Arm
from .memory import cache_mb, peak_memory
from .timing import Clock, attempt, interleave
from .workload import Inputs

PHASES = {
    "preprocess_ms": "pictures in memory to model inputs on the device, by the model's processor",
    "vision_ms": "vision tower and projector",
    "compress_ms": "the method, and the removal of placeholders",
    "method_ms": "the method's own part of compress_ms; of an in-decoder method its part of prefill_ms; on CUDA the device's time, "
    "elsewhere the host's, which on other accelerators need not wait for the work",
    "prefill_ms": "the language model over the prompt, features given; in-decoder methods run here",
    "ttft_ms": "generate, from pixels in memory to the first token: vision, method, prefill; measured by itself, not a sum",
    "tpot_ms": "each further token",
    "e2e_ms": "generate, from pixels in memory to the last token (preprocess_ms comes on top)",
    "tokens_per_s": "new tokens of the whole batch over e2e_ms",
}


class Stamps(StoppingCriteria):
    """Stops nothing; marks when each token was there."""

    def __init__(self, clock: Clock):
        self.clock, self.times = clock, list[Any]()
        self.go_on: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.times.append(self.clock.stamp())
        if self.go_on is None:
            self.go_on = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        return self.go_on


class Laps:
    """One turn of any arm on the inputs of one batch size.

    native: inputs of the arms that set the processor, by the method's specification.
    """

    def __init__(self, inputs: Inputs, output_tokens: int, clock: Clock, native: Mapping[str, Inputs] | None = None):
        self.inputs, self.output_tokens, self.clock, self.native = inputs, output_tokens, clock, native or {}

    def inputs_of(self, arm: Arm) -> Inputs:
        return self.native.get(arm.method.spec(), self.inputs)

    @torch.no_grad()
    def __call__(self, arm: Arm) -> dict[str, float]:
        """Milliseconds of each phase, and tokens per second."""
        sample = {} if arm.role == TEXT_ONLY else self.phases(arm)
        return sample | self.end_to_end(arm)

    def phases(self, arm: Arm) -> dict[str, float]:
        """Each phase on its own, with what the one before it made."""
        with installed(arm.model, arm.method if arm.wrapped else None):
            return self._phases(arm)

    def _phases(self, arm: Arm) -> dict[str, float]:
        inputs = self.inputs_of(arm)
        run, call, model = self.clock.run, inputs.call, arm.model
        sample = {}
        if inputs.preprocess is not None:
            sample["preprocess_ms"], _ = run(inputs.preprocess)
        method = arm.method if arm.wrapped else NoCompression()
        sample["vision_ms"], encoded = run(lambda: encode(model, method, **call))
        milliseconds, prepared = run(lambda: prepare(model, method, encoded=encoded, **call))
        sample["compress_ms"] = milliseconds if arm.wrapped else 0.0  # the stock model does nothing here
        arguments = prepared.model_kwargs
        sample["prefill_ms"], _ = run(lambda: model(**arguments, use_cache=True, logits_to_keep=1))
        sample["method_ms"] = 1000 * prepared.report.compress_seconds
        return sample

    def end_to_end(self, arm: Arm) -> dict[str, float]:
        """``generate`` as a user calls it, the stock model's for the baseline."""
        clock, stamps, n = self.clock, Stamps(self.clock), self.output_tokens
        with self.as_used(arm):
            clock.wait()
            begin = clock.stamp()
            self.generate(arm, stopping_criteria=StoppingCriteriaList([stamps]))
            end = clock.stamp()
            clock.wait()
        times = stamps.times[:n]  # on some devices generate makes one more token before it sees that it is done
        if len(times) < n:
            raise RuntimeError(f"{len(times)} tokens were generated where {n} were asked")
        total = clock.between(begin, end)
        sample = {"ttft_ms": clock.between(begin, times[0]), "e2e_ms": total}
        if n > 1:
            sample["tpot_ms"] = clock.between(times[0], times[-1]) / (n - 1)
        rows = len(self.inputs.call["input_ids"])
        return sample | {"tokens_per_s": 1000 * rows * n / total}

    def generate(self, arm: Arm, **more: Any) -> Any:
        """Exactly ``output_tokens`` greedy tokens for every row."""
        call = self.inputs.text_only if arm.role == TEXT_ONLY else self.inputs_of(arm).call
        pad = {} if arm.model.generation_config.pad_token_id is not None else {"pad_token_id": 0}
        n = {"max_new_tokens": self.output_tokens, "min_new_tokens": self.output_tokens}
        return arm.model.generate(**call, **n, **pad, do_sample=False, **more)

    @contextlib.contextmanager
    def as_used(self, arm: Arm):
        """The model wrapped with the arm's method; bare for the baseline."""
        with compressed(arm.model, arm.method) if arm.wrapped else contextlib.nullcontext():
            assert (method_of(arm.model) is not None) == arm.wrapped
            yield

    @torch.no_grad()
    def memory(self, arm: Arm, devices: Sequence[torch.device]) -> str:
        """Fills in the arm's peak memory and KV cache from one more ``generate``; returns what was measured."""
        with self.as_used(arm):
            peak, what, out = peak_memory(devices, lambda: self.generate(arm, return_dict_in_generate=True))
        arm.peak_memory_mb = None if peak is None else peak - arm.beside_mb
        arm.kv_cache_mb = cache_mb(cache_of(out))
        return what


def measure(
    arms: Sequence[Arm],
    laps: Laps,
    *,
    warmup: int,
    repeats: int,
    seed: int = 0,
    devices: Sequence[torch.device] = (),
    done: Callable[[], object] = lambda: None,
) -> str | None:
    """Runs all arms in turn, then each once more for its memory. Returns what the memory is, None if no arm is left."""
    interleave(arms, laps, warmup=warmup, repeats=repeats, seed=seed, done=done)
    what = None
    for arm in arms:
        if arm.failed is None and arm.role != TEXT_ONLY:
            what = attempt(arm, partial(laps.memory, arm, devices)) or what
        done()
    return what
