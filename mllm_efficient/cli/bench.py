"""``mllm-efficient bench``."""

from __future__ import annotations

import contextlib
import functools
import json as json_module
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import MllmEfficientError
from ..tables import Table
from ..writing import writing
from . import options, serving

if TYPE_CHECKING:
    from ..eval.results import Results
    from ..loading.models import Loaded, ModelOptions

REPEATS, PAIRS, WARMUP, MAX_BATCH = 10, 15, 2, 256
SERVED_REPEATS, SERVED_WARMUP, CONCURRENCY = 5, 1, "1,8,32"


@options.of_model
def bench(
    *,
    settings: Any,
    context: typer.Context,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="Shape name or config.json; nothing is downloaded.")] = False,
    layers: Annotated[
        int | None, typer.Option("--layers", min=1, help="With --random-weights: only so many layers of the language model and tower.")
    ] = None,
    method: Annotated[list[str] | None, typer.Option("--method", help="Specification or YAML file. Repeatable.")] = None,
    batch_size: Annotated[str, typer.Option("--batch-size", help="One or several, such as 1,8.")] = "1",
    image_size: Annotated[str | None, typer.Option("--image-size", help="WxH in pixels; default what the model takes.")] = None,
    images: Annotated[int, typer.Option("--images", min=1, help="Images in a prompt.")] = 1,
    text_tokens: Annotated[int, typer.Option("--text-tokens", min=1, help="Tokens of a prompt beside its images'.")] = 64,
    output_tokens: Annotated[int, typer.Option("--output-tokens", min=1, help="Tokens generated, neither more nor fewer.")] = 32,
    repeats: Annotated[int | None, typer.Option("--repeats", min=1, help=f"Default {REPEATS}; {PAIRS} for the two below.")] = None,
    warmup: Annotated[
        int | None, typer.Option("--warmup", min=0, help=f"Rounds thrown away before; default {WARMUP}, of servers 1.")
    ] = None,
    max_batch: Annotated[bool, typer.Option("--max-batch", help="Find the largest batch that fits with each method (CUDA).")] = False,
    max_batch_limit: Annotated[int | None, typer.Option("--max-batch-limit", min=1, help=f"Try none above; default {MAX_BATCH}.")] = None,
    quantized: Annotated[str | None, typer.Option("--quantized", help="int8 or int4: the same arms on quantized weights too.")] = None,
    overhead: Annotated[
        bool, typer.Option("--overhead", help="Instead: the wrapper's own cost, against the bare model and against the same work by hand.")
    ] = False,
    selection: Annotated[
        bool, typer.Option("--selection", help="Instead: methods alone (no budgets); by default DivPrune's steps.")
    ] = False,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; default torch's own choice.")] = None,
    backend: Annotated[
        str, typer.Option("--backend", help="vllm: serve the model, once for each method, and load the servers.")
    ] = "transformers",
    server: Annotated[
        list[str] | None,
        typer.Option(
            "--server", help="Instead of --model: [NAME=]URL of a running server, the baseline first; --model its tokenizer. Repeatable."
        ),
    ] = None,
    server_model: Annotated[
        str | None, typer.Option("--server-model", help="What the servers call the model, if they have several.")
    ] = None,
    concurrency: Annotated[
        str | None, typer.Option("--concurrency", help=f"Of servers: requests at a time; default {CONCURRENCY}.")
    ] = None,
    requests: Annotated[
        int | None, typer.Option("--requests", min=1, help="Of servers: requests of a run; default 4 for each at a time, at least 16.")
    ] = None,
    serve_args: Annotated[
        str | None, typer.Option("--serve-args", help="With --backend vllm: more arguments of vllm serve, as one text.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", help="Writes rows and meta to this JSON file too.")] = None,
    columns: options.Columns = None,
    json: options.Json = False,
    imports: options.Import = None,
) -> int:
    """Latency by phase, memory, and the ceiling of what compression can gain; the uncompressed model beside every number."""
    options.check_columns(columns, "bench")
    serving.require_effect(list(given_options(context)), backend, server or ())
    batches, size = batch_sizes(batch_size), picture_size(image_size)
    if overhead and selection:
        raise MllmEfficientError("--overhead and --selection are two benchmarks: give one of them")
    if (overhead and method) or ((overhead or selection) and (max_batch or quantized)):
        given = "--method" if overhead and method else "--max-batch" if max_batch else "--quantized"
        raise MllmEfficientError(f"{given} has no effect with {'--overhead' if overhead else '--selection'}: leave it out")
    if selection and (random_weights or settings.model != "builtin"):
        raise MllmEfficientError("--selection runs no model: leave --model and --random-weights out")
    if layers is not None and (not random_weights or selection):
        raise MllmEfficientError("--layers has no effect without --random-weights: a model with weights has the layers that it has")
    if max_batch_limit is not None and not max_batch:
        raise MllmEfficientError("--max-batch-limit has no effect without --max-batch")
    chosen = [] if selection else [options.one_method(m) for m in method or ()]
    of_servers = bool(server) or backend != serving.BACKENDS[0]
    times = repeats or (SERVED_REPEATS if of_servers else PAIRS if overhead or selection else REPEATS)
    rounds = warmup if warmup is not None else SERVED_WARMUP if of_servers else WARMUP
    with _writing(output) as write, _threads(threads):
        if of_servers:
            load: dict[str, Any] = {
                "image_size": size, "images": images, "text_tokens": text_tokens, "output_tokens": output_tokens, "repeats": times,
                "concurrency": serving.concurrency_of(concurrency or CONCURRENCY), "requests": requests, "warmup": rounds,
                "seed": settings.seed,
            }  # fmt: skip
            found = serving.run_servers(
                settings, chosen, load, servers=server or (), server_model=server_model, random_weights=random_weights,
                tokenizer=settings.model if "--model" in given_options(context) else None, serve_args=serve_args or "",
            )  # fmt: skip
        elif selection:
            found = _selection(settings, method or (), rounds, times)
        else:
            from ..measure.bench import Settings
            from ..measure.workload import Workload

            plan = Settings(
                Workload(size, images, text_tokens, output_tokens), batches, times, rounds, settings.seed,
                (max_batch_limit or MAX_BATCH) if max_batch else None,
            )  # fmt: skip
            build = functools.partial(_load, random_weights=random_weights, layers=layers)
            loaded = build(settings)
            found = _overhead(loaded, plan) if overhead else _latency(loaded, chosen, plan, quantized, build, json)
        found = replace(found, meta={"command": command_line(context), **found.meta})
        write(found.rows, found.meta)
    return options.finish(found, json, columns)


def batch_sizes(text: str) -> tuple[int, ...]:
    """``"1,8"`` as numbers."""
    parts = [p.strip() for p in text.split(",")]
    if not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise MllmEfficientError(f"--batch-size {text!r} is not one or several whole numbers, such as 1,8")
    return tuple(dict.fromkeys(int(p) for p in parts))


def picture_size(text: str | None) -> tuple[int, int] | None:
    """``"672x336"`` as (width, height)."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)[xX](\d+)", text.strip())
    if not found or min(int(v) for v in found.groups()) < 8:
        raise MllmEfficientError(f"--image-size {text!r} is not WIDTHxHEIGHT in pixels, each at least 8, such as 672x336")
    return int(found[1]), int(found[2])


def _load(settings: ModelOptions, random_weights: bool, layers: int | None = None) -> Loaded:
    from ..loading.models import load
    from ..measure.random_model import random_model
    from ..measure.shapes import shape_names

    if random_weights:
        options.say(f"building {settings.model} with random weights{'' if layers is None else f', {layers} layers of it'}")
        return random_model(settings, layers)
    if settings.model in shape_names():
        raise MllmEfficientError(f"{settings.model} is a shape without weights: add --random-weights")
    return load(settings)


def _latency(
    loaded: Loaded, chosen: Sequence[Any], plan: Any, quantized: str | None, build: Callable[[ModelOptions], Loaded], json: bool
) -> Results:  # fmt: skip
    from ..eval.timings import bench_of, ceilings

    options.announce(loaded, chosen)
    second = None if quantized is None else lambda: build(replace(loaded.options, quantization=quantized))
    found = bench_of(loaded, chosen, plan, quantized=second, progress=options.progress())
    for line in ceilings(found.meta) if json else ():
        options.say(line)
    return found


def _overhead(loaded: Loaded, plan: Any) -> Results:
    from ..measure.overhead import METHODS, overhead

    turns = 2 * len(METHODS) * len(plan.batch_sizes) * (plan.warmup + plan.repeats)
    with options.progress().bar(turns, "turn") as bar:
        return _small(*overhead(loaded, plan, bar.update), _overhead_table)


def _selection(settings: ModelOptions, specs: Sequence[str], warmup: int, repeats: int) -> Results:
    from ..loading.models import pick_device
    from ..measure.selection import METHOD_SHAPES, SHAPES, cost_of_methods, methods_table, selection, selection_table, steps_on

    if specs:
        with options.progress().bar((len(set(specs)) + 1) * len(METHOD_SHAPES) * (warmup + repeats), "turn") as bar:
            return _small(*cost_of_methods(settings, specs, warmup, repeats, bar.update), methods_table)
    with options.progress().bar(len(steps_on(pick_device(settings))) * len(SHAPES) * (warmup + repeats), "turn") as bar:
        return _small(*selection(settings, warmup, repeats, bar.update), selection_table)


def _small(rows: list[dict[str, Any]], meta: dict[str, Any], table: Any) -> Results:
    """The results of a benchmark of the package's own parts."""
    from ..eval.results import BENCH, Results
    from ..measure.machine import busy

    if warning := busy(meta["machine"]):
        options.warn(warning)
    failed = meta["failed"] if "failed" in meta else [r["failed"] for r in rows if r["failed"]]
    return Results(BENCH, rows, meta, (Table(*table(rows)),), tuple(f"failed: {line}" for line in failed))


def _overhead_table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    header, lines = ["method", "batch", "bare ms", "wrapped ms", "wrapped/bare [95%]", "overhead", "overhead ms"], []
    for r in rows:
        ratio = r["ratio"]
        said = f"{ratio['median']:.4f} [{ratio['low']:.4f}, {ratio['high']:.4f}]" if ratio else "failed"
        ms = [f"{r[name]['median']:.1f}" if r[name] else "" for name in ("bare_ms", "wrapped_ms")]
        own = f"{r['overhead_ms']['median']:.2f}" if r["overhead_ms"] else ""
        lines.append([r["method"], str(r["batch_size"]), *ms, said, f"{100 * r['overhead']:+.2f}%" if ratio else "", own])
    return header, lines


@contextlib.contextmanager
def _writing(path: Path | None) -> Iterator[Any]:
    """A function that writes rows and meta to the file, which is tried before anything runs."""
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a").close()
        except OSError as error:
            raise MllmEfficientError(f"--output {path} cannot be written: {error.strerror}") from None

    def write(rows: Sequence[dict[str, Any]], meta: dict[str, Any]) -> None:
        if path is not None:
            with writing(path):
                path.write_text(json_module.dumps({"rows": list(rows), "meta": meta}, indent=1, allow_nan=False) + "\n")

    try:
        yield write
    finally:
        if path is not None and path.is_file() and path.stat().st_size == 0:
            path.unlink()  # nothing came of it


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """So many CPU threads inside."""
    import torch

    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def given_options(context: typer.Context) -> dict[str, Any]:
    """Every option that is not its default."""
    found = {}
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if value not in (None, [], (), parameter.default):
            found[parameter.opts[0]] = value
    return found


def command_line(context: typer.Context) -> str:
    """The command with every option that is not its default."""
    words = [context.command_path]
    for flag, value in given_options(context).items():
        for one in value if isinstance(value, list | tuple) else [value]:
            words += [flag] if one is True else [flag, str(one)]
    return shlex.join(" ".join(words[:1]).split() + words[1:])
