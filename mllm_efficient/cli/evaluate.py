"""``mllm-efficient eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import MllmEfficientError
from ..eval.builtin import is_public
from . import options


@options.of_model
def evaluate(
    *,
    settings: Any,
    method: Annotated[list[str] | None, typer.Option("--method", help="Specification or YAML file. Repeatable.")] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            "--suite",
            help="builtin (the default), builtin-hard: embedded benchmarks; or public ones: divprune-paper, cdpruner-paper, ocr, quick.",
        ),
    ] = None,
    categories: options.Categories = None,
    tasks: options.Tasks = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Your own requests, a JSON object a line: images, prompt or messages, answer.")
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="test (the default), or val for tuning.")] = None,
    turns: Annotated[
        int, typer.Option("--turns", min=1, max=2, help="2: every question also as the second of a conversation about its image.")
    ] = 1,
    corrupt: Annotated[
        str | None, typer.Option("--corrupt", help="Every question of it also under each of these: noise,blur,jpeg,watermark,patch.")
    ] = None,
    limit: options.Limit = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="Default 32; with --data 8; with --tasks 1.")] = None,
    max_new_tokens: options.MaxNewTokens = None,
    data_root: options.DataRoot = None,
    coco_instances: options.CocoInstances = None,
    include_path: Annotated[
        list[Path] | None, typer.Option("--include-path", help="With tasks: a folder with task YAML of your own. Repeatable.")
    ] = None,
    on_error: Annotated[
        str | None, typer.Option("--on-error", help="With tasks: record (the default, a failed sample is wrong) or raise (stop).")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="With tasks: a folder of answers for several runs; default the output folder.")
    ] = None,
    image_padding: options.ImagePadding = None,
    image_range: options.ImageRange = "full",
    prompt_format: options.PromptFormat = None,
    reference: Annotated[
        str | None, typer.Option("--reference", help="With tasks: published numbers beside ours: divprune-table1.")
    ] = None,
    server: Annotated[
        list[str] | None,
        typer.Option(
            "--server",
            help="With tasks or --data, instead of --model: [NAME=]URL of an OpenAI-compatible server, the baseline first. Repeatable.",
        ),
    ] = None,
    server_model: Annotated[
        str | None, typer.Option("--server-model", help="What the servers call the model, if they have several.")
    ] = None,
    against: Annotated[str | None, typer.Option("--against", help="A method of this run to compare each row with.")] = None,
    output_dir: Annotated[Path | None, typer.Option("--output-dir", help="Keeps answers and results here; resumes.")] = None,
    columns: options.Columns = None,
    json: options.Json = False,
    imports: options.Import = None,
) -> int:
    """Accuracy of methods, the uncompressed baseline first, with paired intervals and the no-image floor; on public benchmarks
    with --tasks; or, with --data, how far answers to your own requests stay those of the uncompressed model."""
    public = is_public(tasks, suite)
    check_tasks_options(
        public,
        {
            "--data-root": data_root, "--coco-instances": coco_instances, "--include-path": include_path, "--on-error": on_error,
            "--cache": cache, "--image-padding": image_padding, "--prompt-format": prompt_format, "--reference": reference,
            **({} if data is not None and server else {"--server": server, "--server-model": server_model}),
        },
        {
            "--data": data, "--split": split, "--categories": categories, "--against": against, "--turns": turns if turns > 1 else None,
            "--corrupt": corrupt,
        },
    )  # fmt: skip
    if public:
        from .launching import check_launch

        check_launch(distributed_on_cpu=True)

        from ..eval.lmms.evaluate import even, task_names
        from ..eval.lmms.run import TaskOptions
        from .tasks import evaluate_tasks

        names, usual = task_names(tasks, suite)
        count = even(names, limit or usual, suite, options.progress())
        asked = TaskOptions(
            names, count, batch_size or 1, data_root, tuple(include_path or ()), on_error or "record", cache, image_padding,
            prompt_format or "template", max_new_tokens, reference, tuple(server or ()), server_model, image_range, coco_instances,
        )  # fmt: skip
        options.check_columns(columns, "eval", names)
        found = evaluate_tasks(settings, method or (), asked, output_dir)
        return found if isinstance(found, int) else 0 if found is None else options.finish(found, json, columns)
    if data is not None and server:
        from .served import on_running

        given = {
            "--method": method, "--against": against, "--suite": suite, "--split": split, "--categories": categories, "--corrupt": corrupt,
        }  # fmt: skip
        found = on_running(settings, server, server_model, data, given, limit, batch_size, max_new_tokens, output_dir, image_range, turns)
        return options.finish(found, json, columns)
    chosen = [options.one_method("none"), *(options.one_method(m) for m in method or ())]
    corrupted = check_source(data, suite, split, max_new_tokens, turns, categories, corrupt)
    if data is None and image_range != "full":
        raise MllmEfficientError("--image-range has no effect on the embedded benchmark, whose pictures have 8 bits: leave it out")
    options.check_columns(columns, "eval")

    from ..eval.api import named_among
    from ..eval.evaluate import BATCH, DATA_BATCH, on_benchmark, on_requests
    from ..eval.harness import with_baselines
    from ..loading.models import load

    chosen = with_baselines(chosen)
    other = named_among(chosen, against)
    requests = None
    if data is not None:
        from ..eval.requests import read_requests

        requests = read_requests(data, limit, image_range)
    if not method:
        what = "the embedded benchmark" if data is None else str(data)
        options.say(f"no --method: {settings.model} is asked {what} as it is; --method divprune:keep=0.25 adds one to compare with it")
    loaded = load(settings)
    options.announce(loaded, chosen)
    how: dict[str, Any] = {"limit": limit, "against": other, "output_dir": output_dir, "progress": options.progress()}
    if data is not None and requests is not None:
        found = on_requests(loaded, chosen, requests, data, batch_size=batch_size or DATA_BATCH, max_new_tokens=max_new_tokens, **how)
    else:
        where: dict[str, Any] = {"suite": suite, "categories": categories, "split": split or "test", "turns": turns, "corrupt": corrupted}
        found = on_benchmark(loaded, chosen, **where, batch_size=batch_size or BATCH, **how)
    return options.finish(found, json, columns)


def check_tasks_options(public: bool, of_tasks: dict[str, Any], of_others: dict[str, Any]) -> None:
    """Raises for options of public benchmarks without one, and for options of the others beside one."""
    from ..eval.lmms.asking import FORMATS, PADDINGS

    for name, value in (of_others if public else of_tasks).items():
        if value is not None:
            raise MllmEfficientError(
                f"{name} has no effect {'with --tasks or a public suite' if public else 'without --tasks or a public suite'}: leave it out"
            )
    for name, among in (("--on-error", ("record", "raise")), ("--image-padding", PADDINGS), ("--prompt-format", FORMATS)):
        if of_tasks.get(name) not in (None, *among):
            raise MllmEfficientError(f"{name} {of_tasks[name]!r} is not one of {', '.join(among)}")
    if of_tasks.get("--server-model") is not None and not of_tasks["--server"]:
        raise MllmEfficientError("--server-model has no effect without --server: leave it out")


def check_source(
    data: Path | None, suite: str | None, split: str | None, max_new_tokens: int | None, turns: int = 1, categories: str | None = None,
    corrupt: str | None = None,
) -> tuple[str, ...]:  # fmt: skip
    """Raises for a benchmark's options beside ``--data``, for ``--data``'s without it, and for unknown values. Returns the corruptions."""
    if data is not None:
        for name, given, instead in (
            ("--suite", suite is not None, "leave it out"), ("--split", split is not None, "leave it out"),
            ("--categories", categories is not None, "leave it out"),
            ("--turns", turns > 1, "put earlier turns into messages"), ("--corrupt", corrupt is not None, "leave it out"),
        ):  # fmt: skip
            if given:
                raise MllmEfficientError(f"{name} has no effect with --data: {instead}")
        return ()
    if split not in (None, "test", "val"):
        raise MllmEfficientError(f"unknown split {split!r}: test, or val for tuning")
    if max_new_tokens is not None:
        raise MllmEfficientError("--max-new-tokens has no effect on the embedded benchmark, whose answers are words: leave it out")

    from ..eval.builtin.corruptions import corruptions_of

    return corruptions_of(corrupt, turns)
