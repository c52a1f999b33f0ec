"""DivPrune's selection alone: ``mllm-efficient bench --selection``.

Against two things, in turn within one run: the product of similarities that it cannot do without, and the naive loop,
which for every pick takes the minimum over all tokens chosen so far again. On a CUDA device also several images at once,
and the picks without the fused kernel; the table is in microseconds there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from ..compressors.base import Compressor, generator_for
from ..compressors.divprune import DivPrune, distances, farthest_first, full_float32, loop, mixed_precision, products
from ..compressors.kinds import PRE_LLM
from ..errors import MllmEfficientError
from ..loading.models import DTYPES, ModelOptions, pick_device
from ..registry import runnable, with_budget
from ..tokens import VisualTokens
from .machine import machine, versions
from .timing import ORDER, Clock, Series, clock_for, interleave, paired, quick_gc, spread

BATCH = 8
HEADS = 32  # of a 7B decoder
SHAPES = ((576, 4096, 57), (2880, 4096, 282), (576, 1024, 57), (576, 4096, 288))


def product(x: Tensor) -> Tensor:
    """(N, N) products of rows (N, D) in float32: what any selection by similarity has to compute."""
    with full_float32(x.device.type):
        return products(x if mixed_precision(x) else x.float())


def naive(x: Tensor, k: int) -> Tensor:
    """Max-min diversity by the textbook, on rows (N, D). (K,) ascending."""
    unit = torch.nn.functional.normalize(x.float(), dim=1)
    with full_float32(x.device.type):
        d = 1 - unit @ unit.T
    return naive_loop(d, k).sort().values


def naive_loop(d: Tensor, k: int) -> Tensor:
    """K indices from distances (N, N), which are used up: each pick takes the minimum over everything chosen so far."""
    d.fill_diagonal_(float("inf"))
    chosen = d.amin(1).argmax().view(1)
    for _ in range(k - 1):
        nearest = d[chosen].amin(0)
        nearest[chosen] = float("-inf")
        chosen = torch.cat([chosen, nearest.argmax().view(1)])
    return chosen


# What is timed, each on one image's tokens (N, D), their distances (N, N) and K.
STEPS: dict[str, Callable[[Tensor, Tensor, int], Any]] = {
    "product_ms": lambda x, d, k: product(x),
    "select_ms": lambda x, d, k: cast(Any, DivPrune(tokens=k)).select(x),
    "distances_ms": lambda x, d, k: distances(x),
    "loop_ms": lambda x, d, k: farthest_first(d, k),
    "naive_ms": lambda x, d, k: naive(x, k),
    "naive_loop_ms": lambda x, d, k: naive_loop(d, k),
}
STEPS_ON_CUDA: dict[str, Callable[[Tensor, Tensor, int], Any]] = {
    "batch_ms": lambda x, d, k: DivPrune(tokens=k).compress_all([VisualTokens(x)] * BATCH, [k] * BATCH),
    "torch_loop_ms": lambda x, d, k: loop(d, k),
}
RATIOS = {
    "select_over_product": ("select_ms", "product_ms"),
    "select_over_naive": ("select_ms", "naive_ms"),
    "loop_over_naive_loop": ("loop_ms", "naive_loop_ms"),
}
RATIOS_ON_CUDA = {"batch_over_select": ("batch_ms", "select_ms"), "loop_over_torch_loop": ("loop_ms", "torch_loop_ms")}
MEANING = {
    "product_ms": "X X^T, added up and given in float32",
    "select_ms": "DivPrune(tokens=K).select(X), which is distances_ms and loop_ms, each timed alone too",
    "naive_ms": "the same choice from float32 rows by a loop that for every pick takes the minimum over everything chosen again",
    "naive_loop_ms": "that loop on distances that are there",
    "batch_ms": f"on CUDA: {BATCH} images at once, features gathered too",
    "torch_loop_ms": "on CUDA: the picks of loop_ms without the fused kernel",
    "select_over_product": "paired ratio, median, and 95% over medians of resampled repeats; the others alike",
}


def steps_on(device: str) -> dict[str, Callable[[Tensor, Tensor, int], Any]]:
    """What is timed on a device."""
    return STEPS | (STEPS_ON_CUDA if torch.device(device).type == "cuda" else {})


def selection_rows(
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    clock: Clock | None = None,
    warmup: int = 2,
    repeats: int = 15,
    seed: int = 0,
    done: Callable[[], object] = lambda: None,
) -> list[dict[str, Any]]:
    """For each (N, D, K): milliseconds of each step, and their paired ratios; on CUDA some more of both."""
    where = torch.device(device)
    steps, ratios = steps_on(device), RATIOS | (RATIOS_ON_CUDA if where.type == "cuda" else {})
    clock = clock or clock_for([] if where.type == "cpu" else [where])
    rows = []
    for n, d, k in shapes:
        x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).to(where, dtype)
        arms, ready = [Series(name) for name in steps], distances(x)

        def turn(arm: Series, x: Tensor = x, ready: Tensor = ready, k: int = k) -> dict[str, float]:
            own = ready.clone()
            return {"ms": clock.run(lambda: steps[arm.name](x, own, k))[0]}

        with quick_gc():
            interleave(arms, turn, warmup=warmup, repeats=repeats, done=done)
        ms = {arm.name: arm.values("ms") for arm in arms}
        row: dict[str, Any] = {"n": n, "d": d, "k": k, "device": where.type} | {name: spread(values) for name, values in ms.items()}
        row |= {name: paired(ms[over], ms[under], seed) for name, (over, under) in ratios.items()}
        rows.append({**row, "failed": next((arm.failed for arm in arms if arm.failed), None)})
    return rows


def _device_and_dtype(options: ModelOptions) -> tuple[str, torch.dtype]:
    device = pick_device(options)
    if options.dtype not in DTYPES:
        raise MllmEfficientError(f"dtype {options.dtype!r} is not one of {', '.join(DTYPES)}")
    usual = torch.float32 if device == "cpu" else torch.bfloat16
    return device, usual if options.dtype == "auto" else getattr(torch, options.dtype)


def selection(
    options: ModelOptions, warmup: int, repeats: int, done: Callable[[], object] = lambda: None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows and meta, on the device of ``options``; dtype "auto" is float32 on a CPU and bfloat16 elsewhere."""
    device, dtype = _device_and_dtype(options)
    devices = [] if device == "cpu" else [torch.device(device)]
    before = machine(devices)
    rows = selection_rows(device=device, dtype=dtype, warmup=warmup, repeats=repeats, seed=options.seed, done=done)
    meta = {
        "device": device, "dtype": str(dtype).removeprefix("torch."), "seed": options.seed, "repeats": repeats, "warmup": warmup,
        "versions": versions("torch"),
        "order": f"all steps {ORDER}", "meaning": MEANING, "machine": before, "machine_after": machine(devices),
    }  # fmt: skip
    return rows, meta


METHOD_SHAPES = ((576, 4096, 64, (24, 24)), (2880, 4096, 160, (48, 60)))


def at_budget(spec: str, k: int) -> Compressor:
    """A specification without a budget at k tokens. Raises ``MllmEfficientError`` for one that has a budget."""
    method = runnable(with_budget(spec, tokens=k))
    if method.tokens != k:
        raise MllmEfficientError(f"--method {spec}: --selection has budgets of its own: leave the method's out")
    return method


def drawn_tokens(n: int, d: int, grid: tuple[int, int], device: str, dtype: torch.dtype, seed: int = 0) -> VisualTokens:
    """N tokens of width D with text, attention, keys and products of text and tokens, all drawn from ``seed``."""
    draw = torch.Generator().manual_seed(seed)
    x, text, keys = (torch.randn(size, generator=draw).to(device, dtype) for size in ((n, d), (32, d), (n, 64)))
    attention = torch.rand(n, generator=draw).softmax(0).to(device)
    heads = torch.randn(HEADS, n, generator=draw).to(device)
    return VisualTokens(x, grid=grid, attention=attention, keys=keys, text=text, heads=heads)


def cost_of_methods(
    options: ModelOptions,
    specs: Sequence[str],
    warmup: int,
    repeats: int,
    done: Callable[[], object] = lambda: None,
    shapes: Sequence[tuple[int, int, int, tuple[int, int]]] = METHOD_SHAPES,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows and meta: what each method takes on the tokens of one image, features gathered too, over the product of similarities.

    specs: methods without a budget, which the shapes (N, D, K, grid) give. Tokens, text, attention and keys are drawn.
    """
    device, dtype = _device_and_dtype(options)
    devices = [] if device == "cpu" else [torch.device(device)]
    clock, before, rows = clock_for(devices), machine(devices), list[dict[str, Any]]()
    for spec in specs:
        for _, _, k, _ in shapes:
            method = at_budget(spec, k)
            if method.kind != PRE_LLM or method.as_resizer is not None or method.sets_processor or method.in_tower:
                raise MllmEfficientError(f"{spec} does not work on tokens before the language model: --selection measures those that do")
    for n, d, k, grid in shapes:
        v = drawn_tokens(n, d, grid, device, dtype, options.seed)
        arms = [Series("product"), *(Series(spec) for spec in dict.fromkeys(specs))]

        def turn(arm: Series, v: VisualTokens = v, k: int = k) -> dict[str, float]:
            if arm.name == "product":
                return {"ms": clock.run(lambda: product(v.features))[0]}
            method: Any = at_budget(arm.name, k)
            drawing = replace(v, generator=generator_for(method, 0))
            return {"ms": clock.run(lambda: method.compress_all([drawing], [k]))[0]}

        with quick_gc():
            interleave(arms, turn, warmup=warmup, repeats=repeats, done=done)
        for arm in arms[1:]:
            ms, base = arm.values("ms"), arms[0].values("ms")
            rows.append({
                "method": arm.name, "n": n, "d": d, "k": k, "device": torch.device(device).type, "ms": spread(ms),
                "product_ms": spread(base), "over_product": paired(ms, base, options.seed) if ms else None, "failed": arm.failed,
            })  # fmt: skip
    meaning = {"ms": "choosing or making K tokens, features gathered", "product_ms": MEANING["product_ms"], "over_product": "paired ratio"}
    meta = {
        "device": device, "dtype": str(dtype).removeprefix("torch."), "seed": options.seed, "repeats": repeats, "warmup": warmup,
        "versions": versions("torch"), "order": f"all methods {ORDER}", "meaning": meaning, "machine": before,
        "machine_after": machine(devices),
    }  # fmt: skip
    return rows, meta


def methods_table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the printed table of ``cost_of_methods``: milliseconds, or microseconds on CUDA."""
    unit, scale, digits = ("us", 1000, 0) if rows[0]["device"] == "cuda" else ("ms", 1, 2)
    lines = []
    for r in rows:
        at, ratio = f"{r['n']} x {r['d']} -> {r['k']}", r["over_product"]
        said = ["failed", ""]
        if ratio:
            said = [f"{scale * r['ms']['median']:.{digits}f}", f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"]
        lines.append([r["method"], at, *said])
    return ["method", "N x D -> K", unit, "over the product [95%]"], lines


def selection_table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the printed table: milliseconds, or microseconds on CUDA."""
    cuda = rows[0]["device"] == "cuda"
    unit, scale, digits = ("us", 1000, 0) if cuda else ("ms", 1, 3)
    times = ["product_ms", "select_ms", "naive_ms", "loop_ms", "naive_loop_ms", *(STEPS_ON_CUDA if cuda else ())]
    ratios = [*RATIOS, *(RATIOS_ON_CUDA if cuda else ())]
    header = ["N x D -> K", *(f"{name.removesuffix('_ms').replace('_', ' ')} {unit}" for name in times)]
    header += [name.replace("_over_", " / ").replace("_", " ") for name in ratios]

    def ratio(value: dict[str, Any] | None) -> str:
        return f"{value['median']:.2f} [{value['low']:.2f}, {value['high']:.2f}]" if value else ""

    lines = []
    for r in rows:
        medians = [f"{scale * r[name]['median']:.{digits}f}" if r[name] else "failed" for name in times]
        lines.append([f"{r['n']} x {r['d']} -> {r['k']}", *medians, *(ratio(r[name]) for name in ratios)])
    return header, lines
