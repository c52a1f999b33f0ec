"""What prompts cost under several methods, by closed form and counted: what ``me.flops`` and the command ``flops`` run. No torch unless
it is counted."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mllm_efficient import __version__
from mllm_efficient.compressors.base import Compressor
from mllm_efficient.errors import MllmEfficientError
from mllm_efficient.loading import models
from mllm_efficient.loading.models import ModelOptions
from mllm_efficient.measure.flops import Cost, cost
from mllm_efficient.measure.shapes import ModelShape, shape_names
from mllm_efficient.progress import SILENT, Progress
from mllm_efficient.registry import runnable
from mllm_efficient.report import by_layer
from mllm_efficient.tables import Table

from .results import FLOPS, Results

if TYPE_CHECKING:
    from mllm_efficient.measure.counter import Counted
    from mllm_efficient.patches.rules import Size

Pair = tuple[int, int | None, "Size | None"]
TFLOP, MB = 1e12, 1e6
PHASES = ("vision", "compress", "prefill", "decode", "total")
MEANING = {
    "exact": "FLOPs = 2 x multiply-adds of matrix products, convolutions and full attention; head for one position",
    "divprune": "multiply-adds, 4nd^2 + 2n^2 d + 2ndm per decoder layer (arXiv 2503.02175): prefill alone",
    "sparsevlm": "multiply-adds, 4nd^2 + 2n^2 d + 3ndm per decoder layer (arXiv 2410.04417): prefill alone",
}
FIRST = ("kept", "total", "ratio", "prefill", "KV MB", "visual")


@dataclass(frozen=True)
class Prompts:
    """What is priced: ``pairs`` are (text tokens, visual tokens or None, size of an image or None) of each prompt."""

    pairs: Sequence[Pair]
    images: int = 1
    new_tokens: int = 0
    batch_size: int = 1
    convention: str = "exact"
    measured: bool = False

    @property
    def call(self) -> dict[str, Any]:
        return {"images": self.images, "new_tokens": self.new_tokens, "batch_size": self.batch_size}


def zipped(texts: Sequence[int], visuals: Sequence[int] | None, sizes: Sequence[Size] | None) -> list[Pair]:
    """The prompts that lists describe: zipped, a list of one for all. Raises ``MllmEfficientError`` for other lengths."""
    lists: tuple[tuple[str, Sequence[Any]], ...] = (
        ("--text-tokens", texts), ("--visual-tokens", visuals or [None]), ("--image-size", sizes or [None]),
    )  # fmt: skip
    length = max(len(values) for _, values in lists)
    if any(len(values) not in (1, length) for _, values in lists):
        said = " and ".join(f"{name} has {len(values)}" for name, values in lists if len(values) > 1)
        raise MllmEfficientError(f"lists zip, so all are of one length or have one value: {said}")
    text, visual, size = ([*values] * (length // len(values)) for _, values in lists)
    return list(zip(text, visual, size))


def flops_of(
    shape: ModelShape, methods: Sequence[Compressor], prompts: Prompts, *, settings: ModelOptions, progress: Progress = SILENT
) -> Results:
    """A row for each method, the uncompressed model first, means over the prompts. settings: of the model, where it is counted on."""
    methods = list(dict.fromkeys([runnable("none"), *methods]))
    require_convention(prompts)
    how = {**prompts.call, "convention": prompts.convention}
    costs = {m: [cost(shape, text_tokens=t, visual_tokens=n, image_size=s, method=m, **how) for t, n, s in prompts.pairs] for m in methods}
    counted = {}
    if prompts.measured:
        counter = _Counter(shape, settings)
        counted = {m: counter.count(m, prompts.pairs, prompts.call) for m in methods}
        costs = {m: _as_left(shape, m, prompts.pairs, costs[m], counted[m], prompts.call) for m in methods}
    baseline = costs[methods[0]]
    rows = [_row(costs[m], baseline) for m in methods]
    seen = list(dict.fromkeys(c.pictures for c in baseline))
    progress.say(f"{shape.name}: {'; '.join(seen)} before compression")
    for m, row in zip(methods, rows if prompts.measured else ()):
        row["measured"] = _measured(counted[m], costs[m])
        if unknown := row["measured"]["unknown_operations"]:
            progress.warn(f"{m.spec()} uses {', '.join(unknown)}, whose FLOPs torch's counter takes for 0: counted is too low")
    meta = {
        "versions": {"mllm_efficient": __version__, "python": platform.python_version()}, "model": shape.name,
        "processor_kwargs": dict(settings.processor_kwargs), "convention": prompts.convention, "counts": MEANING[prompts.convention],
        "pictures": [c.pictures for c in baseline],
        "prompts": [{"text_tokens": c.text_tokens, "visual_tokens": c.visual_tokens_full} for c in baseline], **prompts.call,
        "kv_cache_dtype": shape.decoder.dtype, "units": {"tflops": TFLOP, "mb": MB}, "methods": [m.to_dict() for m in methods],
    }  # fmt: skip
    return Results(FLOPS, rows, meta, (_table(rows, methods, meta),))


def require_convention(prompts: Prompts) -> None:
    """Raises for a count on the model beside a paper's convention."""
    if prompts.measured and prompts.convention != "exact":
        raise MllmEfficientError(f"--measured counts what runs, so it has no meaning with --convention {prompts.convention}")


def _table(rows: Sequence[dict[str, Any]], methods: Sequence[Compressor], meta: Mapping[str, Any]) -> Table:
    measured = "measured" in rows[0]
    header = ["method", "text", "visual", "kept", *PHASES, "ratio", "KV MB"] + (["counted", "difference"] if measured else [])
    lines = []
    for row in rows:
        tokens = [f"{row[name]:.6g}" for name in ("text_tokens", "visual_tokens_full", "visual_tokens_kept")]
        numbers = [f"{row[f'{phase}_tflops']:.4g}" for phase in PHASES]
        line = [row["method"], *tokens, *numbers, f"{row['ratio']:.2f}%", f"{row['kv_cache_mb']:.4g}"]
        if measured:
            line += [f"{row['measured']['total_tflops']:.4g}", str(row["measured"]["difference_flops"])]
        lines.append(line)
    notes = []
    for m, row in zip(methods, rows):
        if row["visual_tokens_per_layer"]:
            routed = " (an estimate: the routing that training ended with; without one, every kernel equally likely)"
            said = routed if getattr(m, "has_router", False) else ""
            notes.append(f"{row['method']}: {by_layer(row['visual_tokens_per_layer'])} visual tokens{said}.")
    unit = f"TFLOPs (10^12) and MB (10^6 bytes, {meta['kv_cache_dtype']}) for a batch of {meta['batch_size']}."
    return Table(header, lines, first=FIRST, note=" ".join([*notes, unit, f"{meta['convention']}: {meta['counts']}."]))


def _row(costs: list[Cost], baseline: list[Cost]) -> dict[str, Any]:
    first = costs[0]
    row: dict[str, Any] = {"method": first.method, "convention": first.convention}
    for name in ("text_tokens", "visual_tokens_full", "visual_tokens_kept", "separators"):
        row[name] = _mean([getattr(c, name) for c in costs])
    for phase in PHASES:
        row[f"{phase}_tflops"] = sum(getattr(c, phase) for c in costs) / len(costs) / TFLOP
    row["ratio"] = sum(c.ratio(b) for c, b in zip(costs, baseline)) / len(costs)  # in percent, for one release more
    row["flops_ratio"] = row["ratio"] / 100
    layers = list(zip(*(c.visual_per_layer for c in costs)))
    row["visual_tokens_per_layer"] = [_mean(list(each)) for each in layers] or None
    row["kv_cache_mb"] = sum(c.kv_cache_bytes for c in costs) / len(costs) / MB
    return row


def _mean(values: list[int]) -> int | float:
    return sum(values) / len(values) if sum(values) % len(values) else sum(values) // len(values)


class _Counter:
    """torch's counter on the model: a shape on the meta device, anything else loaded on the CPU, with its processor."""

    def __init__(self, shape: ModelShape, settings: ModelOptions):
        from mllm_efficient.measure.counter import build_on_meta

        self.shape, self.processor = shape, None
        if settings.model in shape_names():
            self.model = build_on_meta(shape)
        else:
            loaded = models.load(settings)
            self.model, self.processor = loaded.model, loaded.processor

    def count(self, method: Compressor, pairs: Sequence[Pair], call: dict[str, Any]) -> list[Counted]:
        """What torch's counter says of each prompt."""
        from mllm_efficient.measure.counter import count

        call = {**call, "processor": self.processor}
        return [count(self.model, self.shape, method, text_tokens=t, visual_tokens=n, image_size=s, **call) for t, n, s in pairs]


def _measured(counted: list[Counted], costs: list[Cost]) -> dict[str, Any]:
    """Means over the prompts in TFLOPs, and the sum of |counted - closed form| over all phases and prompts in FLOPs."""
    row: dict[str, Any] = {f"{p}_tflops": sum(getattr(c, p) for c in counted) / len(counted) / TFLOP for p in PHASES}
    row["unknown_operations"] = sorted({name for c in counted for name in c.unknown})
    row["difference_flops"] = sum(abs(getattr(c, p) - getattr(k, p)) for c, k in zip(counted, costs) for p in PHASES[:-1])
    return row


def _as_left(
    shape: ModelShape, method: Compressor, pairs: Sequence[Pair], costs: list[Cost], counted: list[Counted], call: dict[str, Any]
) -> list[Cost]:
    """The closed form with the row breaks and names of tiles that were left: which those are depends on what the method chose."""
    if not any(c.marks for c in counted):
        return costs
    prompts = zip(pairs, counted)
    return [cost(shape, text_tokens=t, visual_tokens=n, image_size=s, method=method, marks=c.marks, **call) for (t, n, s), c in prompts]
