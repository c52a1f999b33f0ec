"""``mllm-efficient flops``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import MllmEfficientError
from ..loading.processor import processor_settings
from ..report import by_layer
from . import options

if TYPE_CHECKING:
    from ..compressors.base import Compressor
    from ..loading.models import ModelOptions
    from ..measure.counter import Counted
    from ..measure.flops import Cost
    from ..measure.shapes import ModelShape
    from ..patches.rules import Size

Pair = tuple[int, int | None, "Size | None"]
TFLOP, MB = 1e12, 1e6
PHASES = ("vision", "compress", "prefill", "decode", "total")
MEANING = {
    "exact": "FLOPs = 2 x multiply-adds of matrix products, convolutions and full attention; head for one position",
    "divprune": "multiply-adds, 4nd^2 + 2n^2 d + 2ndm per decoder layer (arXiv 2503.02175): prefill alone",
    "sparsevlm": "multiply-adds, 4nd^2 + 2n^2 d + 3ndm per decoder layer (arXiv 2410.04417): prefill alone",
}


def flops(
    model: Annotated[
        str, typer.Option("--model", help="A shape such as llava-1.5-7b, a folder, a hub id, builtin or builtin-qwen.")
    ] = "builtin",
    method: Annotated[list[str] | None, typer.Option("--method", help="Specification or YAML file. Repeatable.")] = None,
    text_tokens: Annotated[str, typer.Option("--text-tokens", help="Tokens of the prompt that are not visual; a list zips.")] = "64",
    visual_tokens: Annotated[
        str | None,
        typer.Option("--visual-tokens", help="Visual tokens before compression; a list zips. Default: a usual picture."),
    ] = None,
    image_size: Annotated[
        str | None, typer.Option("--image-size", help="WxH in pixels, where the count depends on it; a list zips.")
    ] = None,
    images: Annotated[int, typer.Option("--images", min=1, help="Pictures of a prompt; not with --visual-tokens.")] = 1,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=0, help="Tokens generated; the prefill gives the first.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 1,
    convention: Annotated[str, typer.Option("--convention", help="exact, or a paper's: divprune, sparsevlm.")] = "exact",
    measured: Annotated[bool, typer.Option("--measured", help="Count with torch on the real model too (no weights for a shape).")] = False,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    min_pixels: options.MinPixels = None,
    max_pixels: options.MaxPixels = None,
    processor_kwargs: options.ProcessorKwargs = None,
    json: options.Json = False,
    imports: options.Import = None,
) -> None:
    """What methods cost without running anything: FLOPs by phase, the ratio to no compression, KV-cache size.

    Lists such as --text-tokens 15,23,83 give one prompt for each number; rows are means over them, and the ratio is the
    mean of the ratios.
    """
    from ..loading.models import ModelOptions
    from ..measure.flops import cost, load_shape
    from ..registry import runnable

    options.import_files(imports)
    pairs = _pairs(text_tokens, visual_tokens, image_size)
    methods = list(dict.fromkeys([runnable("none"), *(runnable(m) for m in method or ())]))
    if measured and convention != "exact":
        raise MllmEfficientError(f"--measured counts what runs, so it has no meaning with --convention {convention}")
    given = processor_settings(min_pixels, max_pixels, processor_kwargs)
    shape = load_shape(model, revision, trust_remote_code, given)
    call: dict[str, Any] = {"images": images, "new_tokens": new_tokens, "batch_size": batch_size}
    costs = {
        m: [cost(shape, text_tokens=t, visual_tokens=n, image_size=size, method=m, convention=convention, **call) for t, n, size in pairs]
        for m in methods
    }
    counted = {}
    if measured:
        settings = ModelOptions(shape.name, "cpu", revision=revision, trust_remote_code=trust_remote_code, processor_kwargs=given)
        counter = _Counter(shape, settings)
        counted = {m: counter.count(m, pairs, call) for m in methods}
        costs = {m: _as_left(shape, m, pairs, costs[m], counted[m], call) for m in methods}
    baseline = costs[methods[0]]
    rows = [_row(costs[m], baseline) for m in methods]
    seen = list(dict.fromkeys(c.pictures for c in baseline))
    options.say(f"{model}: {'; '.join(seen)} before compression")
    if measured:
        for m, row in zip(methods, rows):
            row["measured"] = _measured(counted[m], costs[m])
            if unknown := row["measured"]["unknown_operations"]:
                options.say(f"{m.spec()} uses {', '.join(unknown)}, whose FLOPs torch's counter takes for 0: counted is too low")
    meta = {
        **_versions(), "model": model, "processor_kwargs": given, "convention": convention, "counts": MEANING[convention],
        "pictures": [c.pictures for c in baseline],
        "prompts": [{"text_tokens": c.text_tokens, "visual_tokens": c.visual_tokens_full} for c in baseline], **call,
        "kv_cache_dtype": shape.decoder.dtype, "units": {"tflops": TFLOP, "mb": MB}, "methods": [m.to_dict() for m in methods],
    }  # fmt: skip
    if json:
        options.print_json(rows, meta)
        return
    _print(rows, measured)
    for m, row in zip(methods, rows):
        if row["visual_tokens_per_layer"]:
            said = (
                " (an estimate: the routing that training ended with; without one, every kernel equally likely)"
                if getattr(m, "has_router", False)
                else ""
            )
            print(f"{row['method']}: {by_layer(row['visual_tokens_per_layer'])} visual tokens{said}")
    print(f"TFLOPs (10^12) and MB (10^6 bytes, {shape.decoder.dtype}) for a batch of {batch_size}. {convention}: {MEANING[convention]}.")


def _pairs(text_tokens: str, visual_tokens: str | None, image_size: str | None) -> list[Pair]:
    """The prompts that the lists describe: zipped, lists of one for all."""
    texts = _numbers(text_tokens, "--text-tokens", 0)
    visuals: Sequence[int | None] = [None] if visual_tokens is None else _numbers(visual_tokens, "--visual-tokens", 1)
    sizes: Sequence[Size | None] = [None] if image_size is None else [_size(part) for part in image_size.split(",")]
    length = max(len(texts), len(visuals), len(sizes))
    lists: tuple[tuple[str, Sequence[Any]], ...] = (("--text-tokens", texts), ("--visual-tokens", visuals), ("--image-size", sizes))
    if any(len(values) not in (1, length) for _, values in lists):
        said = " and ".join(f"{name} has {len(values)}" for name, values in lists if len(values) > 1)
        raise MllmEfficientError(f"lists zip, so all are of one length or have one value: {said}")
    return [(texts[i % len(texts)], visuals[i % len(visuals)], sizes[i % len(sizes)]) for i in range(length)]


def _numbers(text: str, option: str, least: int) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= least for part in parts):
        raise MllmEfficientError(f"{option} {text!r} is not a list of whole numbers from {least}, such as 15,23,83")
    return [int(part) for part in parts]


def _size(text: str) -> Size:
    width, _, height = text.strip().lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise MllmEfficientError(f"--image-size {text!r} is not WIDTHxHEIGHT in pixels, such as 672x448")
    return int(width), int(height)


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
        from ..loading.models import load
        from ..measure.counter import build_on_meta
        from ..measure.shapes import shape_names

        self.shape, self.processor = shape, None
        if settings.model in shape_names():
            self.model = build_on_meta(shape)
        else:
            loaded = load(settings)
            self.model, self.processor = loaded.model, loaded.processor

    def count(self, method: Compressor, pairs: list[Pair], call: dict[str, Any]) -> list[Counted]:
        """What torch's counter says of each prompt."""
        from ..measure.counter import count

        call = {**call, "processor": self.processor}
        return [count(self.model, self.shape, method, text_tokens=t, visual_tokens=n, image_size=s, **call) for t, n, s in pairs]


def _measured(counted: list[Counted], costs: list[Cost]) -> dict[str, Any]:
    """Means over the prompts in TFLOPs, and the sum of |counted - closed form| over all phases and prompts in FLOPs."""
    row: dict[str, Any] = {f"{p}_tflops": sum(getattr(c, p) for c in counted) / len(counted) / TFLOP for p in PHASES}
    row["unknown_operations"] = sorted({name for c in counted for name in c.unknown})
    row["difference_flops"] = sum(abs(getattr(c, p) - getattr(k, p)) for c, k in zip(counted, costs) for p in PHASES[:-1])
    return row


def _as_left(
    shape: ModelShape, method: Compressor, pairs: list[Pair], costs: list[Cost], counted: list[Counted], call: dict[str, Any]
) -> list[Cost]:
    """The closed form with the row breaks and names of tiles that were left: which those are depends on what the method chose."""
    from ..measure.flops import cost

    if not any(c.marks for c in counted):
        return costs
    prompts = zip(pairs, counted)
    return [cost(shape, text_tokens=t, visual_tokens=n, image_size=s, method=method, marks=c.marks, **call) for (t, n, s), c in prompts]


def _versions() -> dict[str, Any]:
    import platform

    from .. import __version__

    return {"versions": {"mllm_efficient": __version__, "python": platform.python_version()}}


def _print(rows: list[dict[str, Any]], measured: bool) -> None:
    header = ["method", "text", "visual", "kept", *PHASES, "ratio", "KV MB"] + (["counted", "difference"] if measured else [])
    lines = []
    for row in rows:
        tokens = [f"{row[name]:.6g}" for name in ("text_tokens", "visual_tokens_full", "visual_tokens_kept")]
        numbers = [f"{row[f'{phase}_tflops']:.4g}" for phase in PHASES]
        line = [row["method"], *tokens, *numbers, f"{row['ratio']:.2f}%", f"{row['kv_cache_mb']:.4g}"]
        if measured:
            line += [f"{row['measured']['total_tflops']:.4g}", str(row["measured"]["difference_flops"])]
        lines.append(line)
    options.print_table(header, lines)
