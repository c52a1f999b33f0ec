"""What ``gpu_check`` runs a model of random weights for: the time to the first token with its memory, and decoding by CUDA graphs and
compiled. The parts are as ``gpu_parts`` says."""

from __future__ import annotations

import importlib.util
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..apply.prepare import prepare
from ..apply.signatures import with_cache
from ..compressors.none import NoCompression
from ..loading.models import Loaded, ModelOptions, require_supported
from ..registry import runnable, with_budget
from .arms import BASELINE, REFERENCE, Arm, arms_for
from .gpu_parts import NOT_ON_CPU, NotHere, Scale, is_cuda
from .ideal import PromptFlops
from .latency import Laps, measure
from .random_model import random_model
from .rows import rows_of
from .timing import Series, clock_for, devices_of, free, interleave, paired, quick_gc, spread
from .workload import Inputs, Workload, make_inputs

FLASH = {"flash_attn_interface": "flash_attention_3", "flash_attn": "flash_attention_2"}  # module: what transformers calls it


def flash(device: str) -> str:
    """The flash attention that is installed, by transformers' name. Raises ``NotHere``."""
    if not is_cuda(device):
        raise NotHere(NOT_ON_CPU)
    found = [name for module, name in FLASH.items() if importlib.util.find_spec(module) is not None]
    if not found:
        raise NotHere(f"not installed: {' or '.join(FLASH)}")
    return found[0]


def built(scale: Scale, device: str, model: str, attention: str = "sdpa") -> Loaded:
    return random_model(ModelOptions(model=model, device=device, dtype=scale.dtype, attn_implementation=attention, seed=scale.seed))


# ------------------------------------------------------------------------------- time to the first token


def ttft(scale: Scale, device: str, until: float, *, model: str, attention: str) -> dict[str, Any]:
    """Rows of every budget and batch size beside the uncompressed model: TTFT and its phases, FLOPs, peak memory, KV cache."""
    kernel = flash(device) if attention == "flash" else attention
    loaded = built(scale, device, model, kernel)
    work = Workload(text_tokens=scale.text_tokens, output_tokens=1)
    out: dict[str, Any] = {"model": model, "attention": kernel, "dtype": scale.dtype, "rows": [], "failed": [], "not_here": {}}
    for i, batch in enumerate(scale.batch_sizes):
        now = time.time()
        rows, memory = first_tokens(loaded, scale, work, batch, now + (until - now) / (len(scale.batch_sizes) - i))
        out["rows"] += rows
        out["failed"] += [f"{r['method']} at batch {batch}: {r['failed']}" for r in rows if r["failed"]]
        out["peak_memory"] = memory or out.get("peak_memory")
    return out


def first_tokens(loaded: Loaded, scale: Scale, work: Workload, batch: int, until: float) -> tuple[list[dict[str, Any]], str | None]:
    """The rows of one batch size, and what their memory is."""
    adapter, devices = require_supported(loaded), devices_of(loaded.model)
    one, inputs = (make_inputs(loaded, adapter, work, b, scale.seed) for b in (1, batch))
    methods = [runnable(with_budget(scale.method, keep=keep)) for keep in scale.keeps]
    arms = [a for a in arms_for(adapter, adapter.items(one.call)[0], methods)[0] if a.role != REFERENCE]
    laps = Laps(inputs, work.output_tokens, clock_for(devices))
    with quick_gc():
        repeats = repeats_until(arms, laps, scale.repeats, until)
        memory = measure(arms, laps, warmup=0, repeats=repeats, seed=scale.seed, devices=devices)
    flops = PromptFlops(loaded, adapter, work, one)
    ideal = (lambda arm: None) if flops.error else (lambda arm: flops.of(arm.method).total / flops.baseline.total)
    rows = rows_of(arms, batch_size=batch, images=work.images, full=one.visual_tokens, flops_ratio=ideal, seed=scale.seed)
    free()
    return [{**row, "baseline_ttft_ms": rows[0]["ttft_ms"], "no_flops": flops.error} for row in rows], memory


def repeats_until(arms: Sequence[Any], turn: Callable[[Any], dict[str, float]], most: int, until: float) -> int:
    """How many more rounds there is time for, at least one, after two that warm up; a last one is left for the memory."""
    interleave(arms, turn, warmup=1, repeats=0)
    begin = time.time()
    interleave(arms, turn, warmup=1, repeats=0)
    now = time.time()
    return max(1, min(most, int((until - now) / max(now - begin, 1e-9)) - 1))


# ---------------------------------------------------------------------------------------------- decoding


class StaticDecode:
    """Greedy decoding with a static cache after a prefill, one token a step, without the host: what a CUDA graph can hold.

    call: arguments of the stock model, as ``prepare`` gives them, without padding. new_tokens: the first one is the prefill's.
    """

    def __init__(self, model: Any, call: dict[str, Any], new_tokens: int):
        from transformers import StaticCache

        self.model, self.new_tokens, self.length = model, new_tokens, call["input_ids"].shape[1]
        self.cache = StaticCache(config=model.config.get_text_config(), max_cache_len=self.length + new_tokens)
        logits = model(**call, **with_cache(model, self.cache), use_cache=True, logits_to_keep=1).logits
        self.first = logits[:, -1].argmax(-1, keepdim=True)
        self.token, self.position = self.first.clone(), torch.full_like(self.first, self.length)

    def step(self) -> None:
        """Puts the next token where the last one was."""
        call = {"input_ids": self.token, "position_ids": self.position, **with_cache(self.model, self.cache)}
        logits = self.model(**call, use_cache=True, logits_to_keep=1).logits
        self.token.copy_(logits[:, -1].argmax(-1, keepdim=True))
        self.position.add_(1)

    def reset(self) -> None:
        """Back to where the prefill ended; what is behind it in the cache is written anew before it is seen."""
        self.token.copy_(self.first)
        self.position.fill_(self.length)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.length)

    def tokens(self, step: Callable[[], object]) -> Tensor:
        """(B, new_tokens) by repeating ``step``, which is ``self.step`` or a recording of it."""
        self.reset()
        out = [self.first]
        for _ in range(self.new_tokens - 1):
            step()
            out.append(self.token.clone())
        return torch.cat(out, 1)


def recorded(decode: StaticDecode) -> Callable[[], object]:
    """The step as a CUDA graph; calling it replays it."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            decode.reset()
            decode.step()
    torch.cuda.current_stream().wait_stream(aside)
    recording = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recording):
        decode.step()
    return recording.replay


def methods_of(scale: Scale) -> list[Any]:
    """The uncompressed model, and the second smallest budget (keep=0.1)."""
    return [NoCompression(), runnable(with_budget(scale.method, keep=sorted(scale.keeps)[:2][-1]))]


@torch.no_grad()
def graph(scale: Scale, device: str, until: float) -> dict[str, Any]:
    """Milliseconds of each further token after a compressed and a whole prompt: a static cache step by step, and as a CUDA graph."""
    loaded = built(scale, device, scale.models[0])
    adapter, clock = require_supported(loaded), clock_for(devices_of(loaded.model))
    inputs = make_inputs(loaded, adapter, Workload(text_tokens=scale.text_tokens, output_tokens=scale.new_tokens), 1, scale.seed)
    out: dict[str, Any] = {"model": scale.models[0], "rows": [], "failed": []}
    out["not_here"] = {} if is_cuda(device) else {"CUDA graph": NOT_ON_CPU}
    for method in methods_of(scale):
        decode = StaticDecode(loaded.model, prepare(loaded.model, method, **inputs.call).model_kwargs, scale.new_tokens)
        steps: dict[str, Callable[[], object]] = {"static": decode.step}
        if is_cuda(device):
            steps["graph"] = recorded(decode)
        row = {"method": method.spec(), "prompt_tokens": decode.length, "new_tokens": scale.new_tokens}
        row |= timed_steps(decode, steps, clock, scale, until)
        row["same_tokens_as_generate"] = torch.equal(decode.tokens(decode.step), _generated(loaded.model, method, inputs, scale.new_tokens))
        out["rows"].append(row)
        out["failed"] += [f"{method.spec()}: {name}" for name in row["failed"]]
    return out


def timed_steps(decode: StaticDecode, steps: dict[str, Callable[[], object]], clock: Any, scale: Scale, until: float) -> dict[str, Any]:
    """``NAME_tpot_ms`` of each way to step, paired ratios to the first, and ``failed``: what raised or gave other tokens."""
    arms = [Series(name) for name in steps]

    def turn(arm: Series) -> dict[str, float]:
        return {"ms": clock.run(lambda: decode.tokens(steps[arm.name]))[0] / (decode.new_tokens - 1)}

    with quick_gc():
        interleave(arms, turn, warmup=0, repeats=repeats_until(arms, turn, scale.repeats, until), seed=scale.seed)
    row: dict[str, Any] = {f"{arm.name}_tpot_ms": spread(arm.values("ms")) for arm in arms}
    row |= {f"{arm.name}_over_{arms[0].name}": paired(arm.values("ms"), arms[0].values("ms"), scale.seed) for arm in arms[1:]}
    row["failed"] = [f"{arm.name}: {arm.failed}" for arm in arms if arm.failed]
    if not row["failed"]:
        expected = decode.tokens(decode.step)
        others = [name for name, step in steps.items() if not torch.equal(decode.tokens(step), expected)]
        row["failed"] = [f"{name} gives other tokens than {arms[0].name}" for name in others]
    return row


def _generated(model: Any, method: Any, inputs: Inputs, new: int) -> Tensor:
    """(B, new) of the stock ``generate`` with a growing cache after the same prompt."""
    call = prepare(model, method, **inputs.call).model_kwargs
    pad = {} if model.generation_config.pad_token_id is not None else {"pad_token_id": 0}
    made = model.generate(**call, max_new_tokens=new, min_new_tokens=new, do_sample=False, **pad)
    return made[:, -new:]


@dataclass(kw_only=True)
class DecodeArm(Arm):
    """An arm whose ``generate`` gets more arguments. first_call: what its first call took and what torch.compile did in it."""

    options: dict[str, Any] = field(default_factory=dict)
    first_call: dict[str, Any] | None = None


class DecodeLaps(Laps):
    """Only ``generate``, end to end."""

    def __call__(self, arm: Any) -> dict[str, float]:
        begin, (graphs, breaks) = time.perf_counter(), dynamo_counters()
        sample = self.end_to_end(arm)
        if arm.first_call is None:
            now, reasons = dynamo_counters()
            arm.first_call = {"seconds": round(time.perf_counter() - begin, 3), "graphs": now - graphs, "breaks": reasons - breaks}
        return sample

    def generate(self, arm: Any, **more: Any) -> Any:
        return super().generate(arm, **more, **arm.options)


def compiled(scale: Scale, device: str, until: float) -> dict[str, Any]:
    """Milliseconds of each further token of ``generate`` as it is and with a static cache and torch.compile, wrapped and not."""
    loaded = built(scale, device, scale.models[0])
    adapter = require_supported(loaded)
    work = Workload(text_tokens=scale.text_tokens, output_tokens=scale.new_tokens)
    inputs = make_inputs(loaded, adapter, work, 1, scale.seed)
    laps = DecodeLaps(inputs, work.output_tokens, clock_for(devices_of(loaded.model)))
    arms = _decode_arms(adapter, inputs, scale)
    with quick_gc():
        interleave(arms, laps, warmup=0, repeats=repeats_until(arms, laps, scale.repeats, until), seed=scale.seed)
    rows = [_decode_row(arm, arms, scale.seed) for arm in arms]
    failed = [f"{row['method']} {row['decode']}: {row['failed']}" for row in rows if row["failed"]]
    failed += [f"{arm.name}: nothing was compiled" for arm in arms if arm.options and arm.first_call and not arm.first_call["graphs"]]
    return {"model": scale.models[0], "backend": scale.backend, "rows": rows, "failed": failed, "not_here": {}}


def _decode_arms(adapter: Any, inputs: Inputs, scale: Scale) -> list[DecodeArm]:
    """Every method with ``generate`` as it is, and compiled."""
    from transformers import CompileConfig

    config = CompileConfig(backend=scale.backend, mode="reduce-overhead" if scale.backend == "inductor" else "default")
    config._compile_all_devices = True
    ways: dict[str, dict[str, Any]] = {"plain": {}, "compiled": {"cache_implementation": "static", "compile_config": config}}
    found = [a for a in arms_for(adapter, adapter.items(inputs.call)[0], methods_of(scale)[1:])[0] if a.role != REFERENCE]
    return [
        DecodeArm(name=a.name, method=a.method, role=a.role, model=a.model, kept=a.kept, options=options)
        for a in found
        for options in ways.values()
    ]


def _decode_row(arm: DecodeArm, arms: Sequence[DecodeArm], seed: int) -> dict[str, Any]:
    """tpot_ms, and its paired ratios to the same method as it is and to the uncompressed model decoding alike."""
    plain = next(a for a in arms if a.name == arm.name and not a.options)
    base = next(a for a in arms if a.role == BASELINE and bool(a.options) == bool(arm.options))
    ratio = {name: paired(arm.values("tpot_ms"), other.values("tpot_ms"), seed) for name, other in (("plain", plain), ("baseline", base))}
    return {
        "method": arm.name, "decode": "compiled" if arm.options else "plain", "visual_tokens_kept": arm.kept,
        "tpot_ms": spread(arm.values("tpot_ms")), "ttft_ms": spread(arm.values("ttft_ms")), "over_plain": ratio["plain"],
        "over_baseline": ratio["baseline"], "first_call": arm.first_call, "failed": arm.failed,
    }  # fmt: skip


def dynamo_counters() -> tuple[int, Counter[str]]:
    """The graphs that torch.compile has made so far, and the breaks between them by their reason."""
    from torch._dynamo.utils import counters

    breaks: Counter[str] = Counter()
    for reason, count in counters["graph_break"].items():
        breaks[" ".join(reason.partition("Hint:")[0].split())[:300]] += count
    return int(counters["stats"]["unique_graphs"]), breaks
