"""``mllm-efficient sweep``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import MllmEfficientError
from ..eval.builtin import is_public
from . import options
from .evaluate import check_source, check_tasks_options


@options.of_model
def sweep(
    *,
    settings: Any,
    context: typer.Context,
    output_dir: Annotated[Path, typer.Option("--output-dir", help="Keeps answers, timings and the report here; resumes.")],
    method: Annotated[list[str], typer.Option("--method", help="With a budget, or without one to cross it with all. Repeatable.")],
    keep: Annotated[str | None, typer.Option("--keep", help="Fractions kept, such as 0.5,0.25.")] = None,
    tokens: Annotated[str | None, typer.Option("--tokens", help="Or counts kept, such as 192,128,64.")] = None,
    suite: Annotated[
        str | None,
        typer.Option("--suite", help="builtin (the default), builtin-hard: embedded benchmarks; or public ones, as eval takes them."),
    ] = None,
    categories: options.Categories = None,
    tasks: options.Tasks = None,
    data_root: options.DataRoot = None,
    coco_instances: options.CocoInstances = None,
    image_padding: options.ImagePadding = None,
    image_range: options.ImageRange = "full",
    prompt_format: options.PromptFormat = None,
    data: Annotated[Path | None, typer.Option("--data", help="Your own requests, as eval takes them; answers are not needed.")] = None,
    split: Annotated[str | None, typer.Option("--split", help="test (the default), or val for tuning.")] = None,
    limit: options.Limit = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            min=1,
            help="Of the questions; default 32, with --data 8, with tasks 1. Latency is of one prompt.",
        ),
    ] = None,
    max_new_tokens: options.MaxNewTokens = None,
    max_drop: Annotated[
        float, typer.Option("--max-drop", min=0, help="Points (of --data without answers: of agreement) that may be lost at most.")
    ] = 1.0,
    match: Annotated[str | None, typer.Option("--match", help="flops: solve budgets to the prefill FLOPs of a pure token drop.")] = None,
    no_bench: Annotated[bool, typer.Option("--no-bench", help="No latency and memory.")] = False,
    image_size: Annotated[str | None, typer.Option("--image-size", help="WxH of the timed prompt; default what the model takes.")] = None,
    text_tokens: Annotated[int, typer.Option("--text-tokens", min=1, help="Of the timed prompt beside its image's.")] = 64,
    output_tokens: Annotated[int, typer.Option("--output-tokens", min=1, help="Tokens generated when timing.")] = 32,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Of every timing.")] = 7,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Rounds thrown away before.")] = 1,
    columns: options.Columns = None,
    json: options.Json = False,
    imports: options.Import = None,
) -> int:
    """Accuracy (or, on your own requests, agreement with the uncompressed model), FLOPs, latency and memory of methods x
    budgets, an HTML report, and the budget to take."""
    from .bench import command_line, picture_size

    budgets = budgets_of(keep, tokens)
    public = is_public(tasks, suite)
    of_tasks = {
        "--data-root": data_root,
        "--coco-instances": coco_instances,
        "--image-padding": image_padding,
        "--prompt-format": prompt_format,
    }
    check_tasks_options(public, of_tasks, {"--data": data, "--split": split, "--categories": categories})
    if not public:
        check_source(data, suite, split, max_new_tokens, categories=categories)
    if match not in (None, "flops"):
        raise MllmEfficientError(f"--match {match} is not known: flops is")
    if max_drop != max_drop:
        raise MllmEfficientError("--max-drop is a number of points, such as 1.0")
    if data is None and not public and image_range != "full":
        raise MllmEfficientError("--image-range has no effect on the embedded benchmark, whose pictures have 8 bits: leave it out")
    size = picture_size(image_size)

    if public and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise MllmEfficientError("a sweep runs in one process: eval --tasks takes several")

    from ..eval.sweep import cross
    from ..eval.sweeping import Plan, asker, recommended
    from ..eval.sweeping import sweep as run
    from ..loading.models import load
    from ..measure.bench import Settings
    from ..measure.workload import Workload

    cross(method, budgets)  # before data are read
    wanted: Any = None
    if public:
        from ..eval.lmms.evaluate import even, task_names
        from ..eval.lmms.run import TaskOptions

        names, usual = task_names(tasks, suite)
        limit = even(names, limit or usual, suite, options.progress())
        wanted = TaskOptions(
            names, limit, batch_size or 1, data_root, image_padding=image_padding, prompt_format=prompt_format or "template",
            max_new_tokens=max_new_tokens, image_range=image_range, coco_instances=coco_instances,
        )  # fmt: skip
    options.check_columns(columns, "sweep", wanted.names if wanted else ())
    progress = options.progress()
    ask = asker(
        wanted, data, suite=suite, categories=categories, split=split or "test", limit=limit, batch_size=batch_size,
        max_new_tokens=max_new_tokens, image_range=image_range, progress=progress,
    )  # fmt: skip
    timing = Settings(Workload(size, 1, text_tokens, output_tokens), (1,), repeats, warmup, settings.seed)
    head = {"command": command_line(context), "limit": limit, "max_drop": max_drop}
    plan = Plan(method, budgets, ask, timing, not no_bench, match, head)
    found = run(lambda: load(settings), plan, output_dir, progress)
    return options.finish(found, json, columns, more=f"{recommended(found)}\nReport: {output_dir / 'report.html'}")


def budgets_of(keep: str | None, tokens: str | None) -> list[str]:
    """``--keep 0.5,0.25`` as ``["keep=0.5", "keep=0.25"]``; each is tried as a budget."""
    from ..budget import Budget

    if keep is not None and tokens is not None:
        raise MllmEfficientError("--keep and --tokens are two ways to say one thing: give one of them")
    name, text = ("keep", keep) if keep is not None else ("tokens", tokens)
    if text is None:
        return []
    out = []
    for part in text.split(","):
        try:
            value = float(part) if name == "keep" else int(part)
        except ValueError:
            example = "0.5,0.25" if name == "keep" else "192,128,64"
            raise MllmEfficientError(f"--{name} {text!r} is not a list of numbers, such as {example}") from None
        Budget(keep=value) if name == "keep" else Budget(tokens=int(value))
        out.append(f"{name}={part.strip()}")
    return list(dict.fromkeys(out))
