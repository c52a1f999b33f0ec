"""Options that several commands take, and how results are printed."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import MllmEfficientError, shortened

if TYPE_CHECKING:
    from ..compressors.base import Compressor
    from ..eval.builtin.suites import Suite
    from ..loading.models import Loaded

Model = Annotated[str, typer.Option("--model", help="Folder or hub id of a model; 'builtin' and 'builtin-qwen' are embedded.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1 ...; auto takes a GPU if there is one.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto (as stored), float32, bfloat16 or float16.")]
DeviceMap = Annotated[str | None, typer.Option("--device-map", help="Accelerate's device map, such as auto.")]
Attention = Annotated[str | None, typer.Option("--attn-implementation", help="sdpa, eager, flash_attention_2 ...")]
Quantization = Annotated[str | None, typer.Option("--quantization", help="int8 or int4 weights (torchao).")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub model.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Seed of torch and of the bootstrap; methods have their own.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with a hub model.")]
Adapter = Annotated[str | None, typer.Option("--adapter", help="Folder of a LoRA for the model; such a folder is also a --model.")]
MinPixels = Annotated[int | None, typer.Option("--min-pixels", help="Fewest pixels of a picture (Qwen-VL); default the model's own.")]
MaxPixels = Annotated[int | None, typer.Option("--max-pixels", help="Most pixels of a picture (Qwen-VL); default the model's own.")]
ProcessorKwargs = Annotated[
    list[str] | None,
    typer.Option("--processor-kwargs", help="KEY=VALUE of the image processor, such as max_patches=6; JSON or text. Repeatable."),
]
OF_A_MODEL: dict[str, tuple[Any, Any]] = {  # the options of ``of_model``: types and defaults
    "model": (Model, "builtin"), "device": (Device, "auto"), "dtype": (Dtype, "auto"), "device_map": (DeviceMap, None),
    "attn_implementation": (Attention, None), "quantization": (Quantization, None), "revision": (Revision, None), "seed": (Seed, 0),
    "trust_remote_code": (TrustRemoteCode, False), "adapter": (Adapter, None), "min_pixels": (MinPixels, None),
    "max_pixels": (MaxPixels, None), "processor_kwargs": (ProcessorKwargs, None),
}  # fmt: skip
Categories = Annotated[str | None, typer.Option("--categories", help="Of an embedded benchmark, such as document,chart; default all.")]
Tasks = Annotated[str | None, typer.Option("--tasks", help="Tasks of lmms-eval and of our own, such as me_pope,gqa.")]
DataRoot = Annotated[
    Path | None, typer.Option("--data-root", help="With tasks: a folder with the data sets by their hub ids; default: from the hub.")
]
CocoInstances = Annotated[
    Path | None, typer.Option("--coco-instances", help="For me_coco_chair: COCO's instances_val2017.json, what its pictures show.")
]
ImagePadding = Annotated[str | None, typer.Option("--image-padding", help="With tasks, LLaVA-1.5: pad to a square (the default) or crop.")]
PromptFormat = Annotated[
    str | None, typer.Option("--prompt-format", help="With tasks: template (the default), or llava_v1 with its system prompt.")
]
ImageRange = Annotated[
    str,
    typer.Option(
        "--image-range", help="Pictures of more than 8 bits: full (the default: 65,535 is white), or auto (lowest to highest value)."
    ),
]
MaxNewTokens = Annotated[int | None, typer.Option("--max-new-tokens", min=1, help="With --data, and for tasks that name none: default 64.")]
Limit = Annotated[
    int | None,
    typer.Option("--limit", min=1, help="Number of questions (round-robin over categories), requests, samples of each task (its first)."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, everything else on stderr.")]
Import = Annotated[list[Path] | None, typer.Option("--import", help="A Python file that registers methods. Repeatable.")]


def of_model(command: Callable) -> Callable:
    """A command with the options that every model command takes; as ``settings`` it gets the ``ModelOptions`` that they make."""
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.name != "settings"]
    kind = inspect.Parameter.KEYWORD_ONLY
    more = [inspect.Parameter(name, kind, default=default, annotation=type_) for name, (type_, default) in OF_A_MODEL.items()]

    @functools.wraps(command)
    def run(**given: Any) -> Any:
        from ..loading.models import ModelOptions
        from ..loading.processor import processor_settings

        of_a_model = {name: given.pop(name) for name in OF_A_MODEL}
        pixels = processor_settings(*(of_a_model.pop(name) for name in ("min_pixels", "max_pixels", "processor_kwargs")))
        return command(settings=ModelOptions(**of_a_model, processor_kwargs=pixels), **given)

    run.__signature__ = signature.replace(parameters=[more[0], *(p.replace(kind=kind) for p in own), *more[1:]])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in [*own, *more]} | {"return": signature.return_annotation}
    return run


def import_files(paths: Sequence[Path] | None) -> None:
    """Runs the user's method files."""
    for path in paths or ():
        if not os.path.isfile(path):
            raise MllmEfficientError(f"--import: no file {path}")
        spec = importlib.util.spec_from_file_location(f"_imported_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise MllmEfficientError(f"--import: {path} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        try:
            spec.loader.exec_module(module)
        except MllmEfficientError:
            raise
        except (Exception, SystemExit) as error:
            raise MllmEfficientError(f"--import: {path} fails: {type(error).__name__}: {shortened(error, 200)}") from error


def is_public(tasks: str | None, suite: str | None) -> bool:
    """Whether public benchmarks are asked for, and not an embedded one or a user's own requests."""
    from ..eval.builtin.suites import SUITES

    return tasks is not None or suite not in (None, *SUITES)


def categories_of(suite: Suite, asked: str | None, loaded: Loaded) -> tuple[str, ...]:
    """The categories of an embedded benchmark to ask a model; says what it cannot be asked. asked: those of ``--categories``."""
    chosen, left_out = suite.chosen(asked, loaded.processor)
    for line in (left_out, suite.note(loaded.processor.tokenizer)):
        if line is not None:
            say(line)
    return chosen


def one_method(spec: str) -> Compressor:
    """A method, or several composed, of a specification or YAML file."""
    from ..registry import runnable

    return runnable(spec)


def say(text: str) -> None:
    """A line for the reader, off stdout."""
    print(text, file=sys.stderr, flush=True)


def announce(loaded: Loaded, methods: Sequence[Compressor]) -> None:
    """Says before anything runs what each method keeps, and raises for one that the model cannot run."""
    from ..apply.plan import check, describe
    from ..loading.models import require_supported

    adapter = require_supported(loaded)
    for line in loaded.notes:
        say(line)
    for method in methods:
        check(adapter, method)
        if method.installs is not None:
            from ..trained.folder import located

            located(adapter, method.installs)
        say(describe(method, adapter.usual(), adapter))


def print_json(rows: Sequence[dict[str, Any]], meta: dict[str, Any]) -> None:
    print(json.dumps({"rows": list(rows), "meta": meta}, allow_nan=False))


def print_table(header: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> None:
    """A plain table on stdout; the first ``left`` columns are text, the others numbers."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i < left else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    console = Console(highlight=False, markup=False)
    least = table.__rich_measure__(console, console.options.update(max_width=10_000)).maximum
    if not console.is_terminal or console.width < least:
        console = Console(highlight=False, markup=False, width=max(200, least))
    console.print(table)
