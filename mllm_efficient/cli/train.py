"""``mllm-efficient train``."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from . import options


def train(
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as seed=1 or stages.0.steps=100.")] = None,
    config: Annotated[
        Path, typer.Option("--config", help="A recipe: a YAML file, or one that ships by its name, such as tokenflex_builtin.")
    ] = ...,  # type: ignore[assignment]
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the data, count tokens, estimate steps and memory; train nothing.")
    ] = False,
    json: options.Json = False,
    imports: options.Import = None,
) -> None:
    """Trains a method's own weights by a recipe; the same command goes on after an interruption.

    With torchrun it runs on several processes: torchrun --nproc_per_node 2 -m mllm_efficient train --config ...
    """
    from ..train.reading import read
    from .launching import check_launch

    check_launch(distributed_on_cpu=False)
    options.import_files(imports)
    recipe = read(config, overrides or ())
    if dry_run:
        _dry_run(recipe, json)
        return
    from ..registry import build
    from ..train.trainer import run

    folder = run(recipe)
    if int(os.environ.get("RANK", 0)) != 0:
        return
    budget = {"tokens": max(recipe.counts)} if recipe.counts else {}
    method = build({"method": recipe.method, **budget, "weights": str(folder)}).spec()
    options.say(f"trained: {folder}; use it as --method {shlex.quote(method)}")
    if json:
        options.print_json([], {"weights": str(folder), "method": method, "log": str(Path(recipe.output_dir) / "log.jsonl")})


def _dry_run(recipe, json: bool) -> None:
    from ..train.build import records_of
    from ..train.estimate import estimate

    found = estimate(recipe, {s.name: records_of(recipe, s, keep=False, look=False) for s in recipe.stages})
    if json:
        options.print_json(found["rows"], found["meta"])
        return
    header = [
        "stage",
        "trains",
        "records",
        "steps",
        "batch",
        "text",
        "visual",
        "drawn",
        "cut",
        "unreadable",
        "tiny",
        "trained M",
        "weights GB",
        "optimizer GB",
        "memory GB",
    ]
    lines = [
        [
            r["stage"], "+".join(r["train"]), f"{r['records']:,}", f"{r['steps']:,}", str(r["batch"]), f"{r['text_tokens']:g}",
            f"{r['visual_tokens_full']:g}", f"{r['visual_tokens_drawn']:g}",
            *("" if r[k] is None else f"{r[k]:,}" for k in ("cut_answers", "unreadable", "tiny")), f"{r['trained_parameters'] / 1e6:,.2f}",
            f"{r['weights_gb']:g}", f"{r['optimizer_gb']:g}", f"{r['memory_gb']:g}",
        ]
        for r in found["rows"]
    ]  # fmt: skip
    options.print_table(header, lines, left=2)
    for row in found["rows"]:
        _say_what_stops(row)
    meta = found["meta"]
    print(f"Tokens per record: {meta['tokens']}.")
    print(f"Memory: {meta['memory']}. Nothing was trained.")


def _say_what_stops(row) -> None:
    """What of the data a training would stop at."""
    told = {"unreadable": "unreadable pictures", "tiny": "below 8 pixels", "lost_answers": "records that max_length leaves no answer"}
    there = [f"{row[key]:,} {what}" for key, what in told.items() if row[key]]
    if there:
        print(f"Stage {row['stage']}: {', '.join(there)}: training stops at the first, or leaves such records out with data.on_bad=skip.")
