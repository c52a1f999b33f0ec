"""Options that several commands take, and how results are printed."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import MllmEfficientError, shortened
from ..progress import Progress
from ..tables import Table

if TYPE_CHECKING:
    from ..compressors.base import Compressor
    from ..eval.results import Results
    from ..loading.models import Loaded

NOTE = 130  # characters of a line below a table, where no terminal says
Model = Annotated[str, typer.Option("--model", help="Folder or hub id; 'builtin', 'builtin-qwen' and 'builtin-video' are embedded.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1 ...; auto takes a GPU if there is one.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto (as stored), float32, bfloat16 or float16.")]
DeviceMap = Annotated[str | None, typer.Option("--device-map", help="Accelerate's device map, such as auto.")]
Attention = Annotated[str | None, typer.Option("--attn-implementation", help="sdpa, eager, flash_attention_2, anchor (sparse prefill) ...")]
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
Columns = Annotated[
    str | None, typer.Option("--columns", help="Columns of the table, such as tokens,score,FLOPs; all: every one, however wide.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, everything else on stderr.")]
Import = Annotated[list[Path] | None, typer.Option("--import", help="A Python file that registers methods. Repeatable.")]


def of_model(command: Callable) -> Callable:
    """A command with the options that every model command takes; as ``settings`` it gets the ``ModelOptions`` that they make.

    What can be checked without torch is checked before the command begins: files of methods, methods, the model's options, columns.
    """
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.name != "settings"]
    kind = inspect.Parameter.KEYWORD_ONLY
    more = [inspect.Parameter(name, kind, default=default, annotation=type_) for name, (type_, default) in OF_A_MODEL.items()]

    @functools.wraps(command)
    def run(**given: Any) -> Any:
        from ..loading.models import ModelOptions, require_options
        from ..loading.processor import processor_settings

        import_files(given.get("imports"))
        method = given.get("method") or ()
        check_methods([method] if isinstance(method, str) else method)
        of_a_model = {name: given.pop(name) for name in OF_A_MODEL}
        pixels = processor_settings(*(of_a_model.pop(name) for name in ("min_pixels", "max_pixels", "processor_kwargs")))
        settings = ModelOptions(**of_a_model, processor_kwargs=pixels)
        if not given.get("random_weights") and not given.get("server"):
            require_options(settings)
        return command(settings=settings, **given)

    run.__signature__ = signature.replace(parameters=[more[0], *(p.replace(kind=kind) for p in own), *more[1:]])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in [*own, *more]} | {"return": signature.return_annotation}
    return run


def check_methods(specs: Sequence[str]) -> None:
    """Raises for whatever is wrong with a specification but that it has no budget, which a sweep gives it."""
    from ..registry import without_budget

    for spec in specs:
        without_budget(spec)


def check_columns(text: str | None, command: str, more: Sequence[str] = ()) -> list[str] | None:
    """The columns asked for. Raises for one that no table of the command has. more: names of tasks."""
    from ..tables import columns_named, listed

    names = listed(text)
    if names is None:
        return None
    from ..eval.builtin.hard.forms import CATEGORIES as OF_HARD
    from ..eval.builtin.questions import CATEGORIES
    from ..eval.columns import BY_COMMAND

    categories = (*CATEGORIES, *OF_HARD) if command in ("eval", "sweep", "report") else ()
    columns_named(names, [*BY_COMMAND[command], *categories, *more])
    return names


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


def one_method(spec: str) -> Compressor:
    """A method, or several composed, of a specification or YAML file."""
    from ..registry import runnable

    return runnable(spec)


_progress = Progress()


def be_quiet(quiet: bool) -> None:
    """Whether commands say what they are doing."""
    global _progress
    _progress = Progress(quiet=quiet)


def progress() -> Progress:
    """What shows how far the command is."""
    return _progress


def say(text: str) -> None:
    """A line for the reader, off stdout."""
    _progress.say(text)


def warn(text: str) -> None:
    """A line that the reader must see, off stdout."""
    _progress.warn(text)


def announce(loaded: Loaded, methods: Sequence[Compressor]) -> None:
    """Says before anything runs what each method keeps, and raises for one that the model cannot run."""
    from ..eval.api import require_runnable

    for line in [*loaded.notes, *require_runnable(loaded, methods)]:
        say(line)


def print_json(rows: Sequence[dict[str, Any]], meta: dict[str, Any]) -> None:
    print(json.dumps({"rows": list(rows), "meta": meta}, allow_nan=False))


def finish(results: Results, as_json: bool, columns: str | None = None, more: str = "") -> int:
    """Prints results and what failed; the exit code. more: a last line on stdout, beside the tables."""
    if as_json:
        print_json(results.rows, results.meta)
    else:
        for i, table in enumerate(results.tables):
            if i:
                print()
            print_tables(table, columns if i == 0 else None)
        if more:
            print(f"\n{more}")
    for line in results.failed:
        warn(line)
    return 1 if results.failed else 0


def print_tables(table: Table, columns: str | None = None) -> None:
    """A table on stdout with what stands above and below it: on a terminal the columns that fit, elsewhere all, or those asked for."""
    from rich.console import Console

    from ..tables import columns_named, listed, plain

    names, console = listed(columns), Console(highlight=False, markup=False)
    if names is not None:
        there = {plain(name) for name in table.header}
        columns_named([n for n in names if plain(n) in there], table.header)
        table = table.select([n for n in names if plain(n) in there])
    width = console.width if console.is_terminal and columns is None else None
    shown = table if width is None else table.fitted(width)
    if table.title:
        print(wrapped(table.title, console))
    if width is None:
        console = Console(highlight=False, markup=False, width=10_000)
    console.print(shown.drawn(width), crop=False)
    if shown.hidden:
        print(wrapped(f"No room for {', '.join(shown.hidden)}: --columns all shows every column, --columns a,b these.", console))
    if table.note:
        print(wrapped(table.note, console))


def print_prose(text: str) -> None:
    """Paragraphs, each in lines that fit the terminal."""
    from rich.console import Console

    console = Console()
    for paragraph in text.split("\n\n"):
        print("\n" + wrapped(" ".join(paragraph.split()), console))


def wrapped(text: str, console: Any) -> str:
    """Lines that fit the terminal, or of ``NOTE`` characters where there is none."""
    width = console.width if console.is_terminal else NOTE
    return "\n".join(textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False) for line in text.splitlines())


def print_table(header: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1, columns: str | None = None) -> None:
    """The same of a header and lines; the first ``left`` columns are text, the others numbers."""
    print_tables(Table(header, lines, left), columns)
