"""``mllm-efficient sweep``."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import MllmEfficientError
from ..writing import write_text
from . import options
from .answering import answered
from .evaluate import AGREEMENT, BATCH, DATA_BATCH, check_source, check_tasks_options, print_lengths
from .tasks import LEGEND

if TYPE_CHECKING:
    from ..eval.asked import Asked
    from ..eval.sweep import Cell

REPEATS, WARMUP = 7, 1
OF_BENCHMARK = """\
Scores are percent right, 'score' and 'macro' the unweighted mean of the categories; FLOPs are percent of none's; times
are medians (quartiles are in the report), ratios are paired with the 95% interval; 'in region' is the share of kept tokens
on what the question is about."""
OF_TASKS = """\
'score' over tasks is their unweighted mean. FLOPs (percent of none's) and times (medians; quartiles are in the report) are of one
prompt of --image-size, --text-tokens and --output-tokens; ratios are paired with the 95% interval."""
OF_PROMPT = """\
FLOPs (percent of none's) and times (medians; quartiles are in the report) are of one prompt of --image-size, --text-tokens
and --output-tokens; ratios are paired with the 95% interval. Recommended is the cheapest whose lower 95% bound, for all cells at
once, is what stands in brackets. The requests that are farthest from the uncompressed model are in the report."""


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
            help=f"Of the questions; default {BATCH}, with --data {DATA_BATCH}, with tasks 1. Latency is of one prompt.",
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
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Of every timing.")] = REPEATS,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Rounds thrown away before.")] = WARMUP,
    json: options.Json = False,
    imports: options.Import = None,
) -> int:
    """Accuracy (or, on your own requests, agreement with the uncompressed model), FLOPs, latency and memory of methods x
    budgets, an HTML report, and the budget to take."""
    from .bench import command_line, picture_size

    options.import_files(imports)
    budgets = budgets_of(keep, tokens)
    public = options.is_public(tasks, suite)
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

    from ..eval.asked import Benchmark, OwnRequests
    from ..eval.builtin.suites import embedded_suite
    from ..eval.record.bench_file import owned
    from ..eval.report.rows import failures
    from ..eval.requests import read_requests
    from ..eval.sweep import Flops, cross, possible, unique
    from ..loading.models import load
    from ..measure.bench import Settings
    from ..measure.workload import Workload

    cells = cross(method, budgets)
    requests = None if data is None else read_requests(data, limit, image_range)
    if requests is not None and not any(r.images for r in requests):
        raise MllmEfficientError(f"--data: no request of {data} has an image, so there is nothing to compress")
    wanted: Any = None
    if public and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise MllmEfficientError("a sweep runs in one process: eval --tasks takes several")
    if public:
        from ..eval.lmms.run import TaskOptions
        from .tasks import checked, even, task_names

        names, usual = task_names(tasks, suite)
        limit = even(names, limit or usual, suite)
        wanted = TaskOptions(
            names, limit, batch_size or 1, data_root, image_padding=image_padding, prompt_format=prompt_format or "template",
            max_new_tokens=max_new_tokens, image_range=image_range, coco_instances=coco_instances,
        )  # fmt: skip
        host, named = checked(wanted)
    plan = Settings(Workload(size, 1, text_tokens, output_tokens), (1,), repeats, warmup, settings.seed)
    start = time.monotonic()
    with owned(output_dir):
        loaded = load(settings)
        flops = Flops(loaded, plan.workload, settings.seed)
        if match and flops.error:
            raise MllmEfficientError(f"--match flops: {flops.error}")
        if flops.error:
            options.say(f"without FLOPs: {flops.error}")
        cells = [flops.match(c) for c in cells] if match else cells
        cells, left_out = possible(unique(cells), loaded, options.say)
        for spec, reason in left_out.items():
            options.say(f"without {spec}: {reason}")
        head = {"command": command_line(context), "limit": limit, "max_drop": max_drop, "match": match, "left_out": left_out}
        methods = [c.method for c in cells if c.failed is None]
        asked: Asked
        if public:
            from ..eval.lmms.swept import Tasks

            asked = Tasks(loaded, [c for c in cells if c.failed is None], wanted, host, named, output_dir, options.say)
        elif data is None or requests is None:
            embedded = embedded_suite(suite)
            among = options.categories_of(embedded, categories, loaded)
            asked = Benchmark(loaded, methods, split or "test", limit, batch_size or BATCH, output_dir, embedded, among)
        else:
            asked = OwnRequests(loaded, methods, requests, data, batch_size or DATA_BATCH, max_new_tokens, output_dir)
        rows, meta, eval_table = run(asked, cells, flops, None if no_bench else plan, output_dir, head)
        meta["seconds"] = round(time.monotonic() - start, 1)
        write(rows, meta, output_dir)
    if json:
        options.print_json(rows, meta)
    else:
        _print(rows, meta, eval_table)
        print(f"\nReport: {output_dir / 'report.html'}")
    failed = failures(rows)
    for line in failed:
        options.say(line)
    return 1 if failed else 0


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


def run(
    asked: Asked, cells: Sequence[Cell], flops: Any, plan: Any, folder: Path, head: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any], tuple[list[str], list[list[str]]]]:
    """Rows, meta, and eval's table of categories."""
    from tqdm import tqdm

    from ..eval.record.bench_file import BenchFile, begin, write_json
    from ..eval.report.recommend import bounded, decided_by, recommend
    from ..eval.sweep import bench_config, time_all
    from ..measure.machine import busy

    loaded, able = asked.run.loaded, [c for c in cells if c.failed is None]
    options.say(asked.line)
    begin(folder, asked.run.arms, asked.run.total, head["command"])
    records = answered(asked.run)
    scores = asked.scores(records)
    timings: dict[str, dict[str, Any]] = {}
    about: dict[str, Any] = {}
    if plan is not None:
        file = BenchFile(folder, bench_config(loaded, plan))
        with tqdm(total=0, unit="turn", mininterval=1, disable=None) as bar:
            timings = time_all(loaded, able, plan, file, _more(bar))
        about = file.about
        warning = busy(about["machine"]) if about else None
        if warning:
            options.say(warning)
    rows = [_row(c, scores.get(c.spec), records, flops, timings.get(c.spec), bool(plan)) for c in cells]
    if rows[0]["failed"] is None:
        bounded(rows, asked.differences(records, decided_by(rows[0])))
    budget = middle(rows)
    shown = [c for c in able if c.asked == budget and not next(r for r in rows if r["method"] == c.spec)["failed"]]
    pictures = asked.pictures(records, [c.method for c in shown])
    write_json(folder / "pictures.json", {"budget": budget, "samples": pictures})
    meta = {
        **head, **asked.run.config, **asked.about(records), "batch_size": asked.run.batch_size,
        "methods": [c.method.to_dict() for c in cells],
        "workload": plan.workload.to_dict() if plan else None, "flops_of": flops.call, "flops_error": flops.error,
        "bench": about or None, "meaning": asked.meaning, "budget_shown": budget, "recommendation": recommend(rows, head["max_drop"]),
    }  # fmt: skip
    scored = {r["method"] for r in rows if r["score"] is not None}
    return rows, meta, asked.table(scores, scored)


def _more(bar: Any) -> Callable[[int], Callable[[], Any]]:
    """Makes a bar longer by so many turns."""

    def longer(turns: int) -> Callable[[], Any]:
        bar.total += turns
        bar.refresh()
        return bar.update

    return longer


def _row(cell: Cell, by_task: Any, records: Sequence[dict[str, Any]], flops: Any, timing: Any, timed: bool) -> dict[str, Any]:
    """The report's row of a cell. by_task: its scores, which do not count where every answer about an image failed."""
    from ..eval.agreement import TEXT_ONLY
    from ..eval.report.rows import row_of

    failed, cost, drop = cell.failed, None, None
    if failed is None:
        own = [r for r in records if r["method"] == cell.spec]
        errors = [r["error"] for r in own if r["error"] is not None]
        failed = f"{len(errors)} of {len(own)} answers failed: {errors[0]}" if errors else None
        if all(r["error"] is not None for r in own if r["task"] != TEXT_ONLY):
            by_task = None
        if failed is None and not by_task:
            failed = "no score over all tasks: one of them has none"
        if timed and (timing is None or timing["failed"] is not None):
            failed = failed or f"not timed: {timing['failed'] if timing else 'the run stopped'}"
        if flops.error is None:
            try:
                cost, drop = flops.of(cell.method), flops.pure_drop(_asked(cell)).prefill
            except MllmEfficientError as error:  # methods whose FLOPs this version does not count
                options.say(f"no FLOPs of {cell.spec}: {error}")
    timing = timing if timing and timing["failed"] is None else None
    return row_of(cell.spec, cell.role, cell.asked, by_task, cost, flops.baseline if flops.error is None else None, drop, timing, failed)


def _asked(cell: Cell) -> Any:
    from ..compressors.random import Random
    from ..eval.sweep import settings_of

    return Random(**settings_of(cell.asked), per=cell.method.per) if cell.asked else cell.method


def middle(rows: Sequence[dict[str, Any]]) -> str:
    """The budget at which most methods ran, the one nearest a quarter of the tokens among equals."""
    found: dict[str, list[float]] = {}
    for r in rows:
        if r["asked"] and r["visual_tokens_kept"] and r["score"] is not None:
            found.setdefault(r["asked"], []).append(r["visual_tokens_kept"] / r["visual_tokens_full"])
    return min(found, key=lambda b: (-len(found[b]), abs(sum(found[b]) / len(found[b]) - 0.25)), default="")


def write(rows: Sequence[dict[str, Any]], meta: dict[str, Any], folder: Path) -> None:
    """report.json, report.csv, the plots and report.html; what says that the sweep is unfinished goes."""
    from ..eval.record.bench_file import BEGUN_FILE, write_json
    from ..eval.report.formats import csv_text
    from ..eval.report.merge import Finished
    from ..eval.report.page import page, write_plots

    write_json(folder / "report.json", {"rows": rows, "meta": meta})
    write_text(folder / "report.csv", csv_text(rows))
    finished = Finished.read(folder)
    write_plots(finished, folder)
    write_text(folder / "report.html", page(finished))
    (folder / BEGUN_FILE).unlink(missing_ok=True)


def _print(rows: Sequence[dict[str, Any]], meta: dict[str, Any], eval_table: tuple[list[str], list[list[str]]]) -> None:
    from ..embedded import is_embedded
    from ..eval.agreement_rows import length_table
    from ..eval.report.rows import main_table

    options.print_table(*main_table(rows, quartiles=False, asked=bool(meta["match"])))
    if eval_table[0]:
        options.print_table(*eval_table, left=3 if meta["suite"] == "tasks" else 1)
    print({"data": f"{AGREEMENT}\n{OF_PROMPT}", "tasks": f"{LEGEND}\n{OF_TASKS}"}.get(meta["suite"], OF_BENCHMARK))
    print_lengths(*length_table(rows))
    if is_embedded(meta["model"]):
        print("Offline self-test on a tiny model, not evidence about 7B models.")
    chosen = meta["recommendation"]
    print(f"\nRecommended ({chosen['rule']}): {chosen['line']}")
    if chosen["method"] != "none":
        print(f"  --method {shlex.quote(chosen['method'])}")
