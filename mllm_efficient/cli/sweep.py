"""``mllm-efficient sweep``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import MllmEfficientError
from . import options

if TYPE_CHECKING:
    from ..eval.sweep import Cell
    from ..models import Loaded

REPEATS, WARMUP = 7, 1


def sweep(
    context: typer.Context,
    output_dir: Annotated[Path, typer.Option("--output-dir", help="Keeps answers, timings and the report here; resumes.")],
    method: Annotated[list[str], typer.Option("--method", help="With a budget, or without one to cross it with all. Repeatable.")],
    model: options.Model = "builtin",
    keep: Annotated[str | None, typer.Option("--keep", help="Fractions kept, such as 0.5,0.25.")] = None,
    tokens: Annotated[str | None, typer.Option("--tokens", help="Or counts kept, such as 192,128,64.")] = None,
    suite: Annotated[str, typer.Option("--suite", help="builtin: the embedded benchmark.")] = "builtin",
    split: Annotated[str, typer.Option("--split", help="test, or val for tuning.")] = "test",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Number of questions, round-robin over categories.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Of the questions; latency is of one prompt.")] = 32,
    max_drop: Annotated[float, typer.Option("--max-drop", min=0, help="Points that the recommended method may lose at most.")] = 1.0,
    match: Annotated[str | None, typer.Option("--match", help="flops: solve budgets to the prefill FLOPs of a pure token drop.")] = None,
    no_bench: Annotated[bool, typer.Option("--no-bench", help="No latency and memory.")] = False,
    image_size: Annotated[str | None, typer.Option("--image-size", help="WxH of the timed prompt; default what the model takes.")] = None,
    text_tokens: Annotated[int, typer.Option("--text-tokens", min=1, help="Of the timed prompt beside its image's.")] = 64,
    output_tokens: Annotated[int, typer.Option("--output-tokens", min=1, help="Tokens generated when timing.")] = 32,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Of every timing.")] = REPEATS,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Rounds thrown away before.")] = WARMUP,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    attn_implementation: options.Attention = None,
    quantization: options.Quantization = None,
    revision: options.Revision = None,
    seed: options.Seed = 0,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
    imports: options.Import = None,
) -> int:
    """Accuracy, FLOPs, latency and memory of methods x budgets, an HTML report, and the budget to take."""
    from .bench import command_line, picture_size

    options.import_files(imports)
    budgets = budgets_of(keep, tokens)
    if suite != "builtin":
        raise MllmEfficientError(f"unknown suite {suite!r}: this version has builtin")
    if split not in ("test", "val"):
        raise MllmEfficientError(f"unknown split {split!r}: test, or val for tuning")
    if match not in (None, "flops"):
        raise MllmEfficientError(f"--match {match} is not known: flops is")
    if max_drop != max_drop:
        raise MllmEfficientError("--max-drop is a number of points, such as 1.0")
    size = picture_size(image_size)

    from ..eval.report.rows import failures
    from ..eval.sweep import Flops, cross, owned, possible, unique
    from ..measure.bench import Settings
    from ..measure.workload import Workload
    from ..models import ModelOptions, load

    cells = cross(method, budgets)
    settings = ModelOptions(
        model, device, dtype, device_map, attn_implementation, quantization, revision, seed, trust_remote_code
    )  # fmt: skip
    plan = Settings(Workload(size, 1, text_tokens, output_tokens), (1,), repeats, warmup, seed)
    begin = time.monotonic()
    with owned(output_dir):
        loaded = load(settings)
        flops = Flops(loaded, plan.workload, seed)
        if match and flops.error:
            raise MllmEfficientError(f"--match flops: {flops.error}")
        if flops.error:
            options.say(f"without FLOPs: {flops.error}")
        cells = [flops.match(c) for c in cells] if match else cells
        cells, left_out = possible(unique(cells), loaded, options.say)
        for spec, reason in left_out.items():
            options.say(f"without {spec}: {reason}")
        asked = {"suite": suite, "split": split, "limit": limit, "batch_size": batch_size, "max_drop": max_drop, "match": match}
        head = {"command": command_line(context), **asked, "left_out": left_out}
        rows, meta, eval_table = run(loaded, cells, flops, None if no_bench else plan, output_dir, head)
        meta["seconds"] = round(time.monotonic() - begin, 1)
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
    loaded: Loaded, cells: Sequence[Cell], flops: Any, plan: Any, folder: Path, head: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any], tuple[list[str], list[list[str]]]]:
    """Rows, meta, and eval's table of categories."""
    from tqdm import tqdm

    from ..eval.builtin.questions import CATEGORIES
    from ..eval.builtin.suite import samples
    from ..eval.records import fingerprint_of
    from ..eval.report.pictures import kept_pictures
    from ..eval.report.recommend import recommend
    from ..eval.report.rows import MEANING
    from ..eval.runner import Run
    from ..eval.sweep import BenchFile, bench_config, time_all, write_json
    from ..eval.table import rows_of, text_table
    from ..measure.machine import busy
    from ..models import environment

    questions = samples(head["split"], head["limit"])
    able = [c for c in cells if c.failed is None]
    answers = Run(loaded, questions, [c.method for c in able], batch_size=head["batch_size"], output_dir=folder)
    options.say(f"{len(questions)} questions x {len(answers.arms)} arms (with the no-image floor)")
    with tqdm(total=answers.total, unit="answer", mininterval=1, disable=None) as bar:
        answers.progress = bar.update
        records = answers.answer_all()
    accuracy = rows_of(records, [c.method for c in able], CATEGORIES, seed=loaded.options.seed)
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
    rows = [_row(c, accuracy, records, flops, timings.get(c.spec), bool(plan)) for c in cells]
    budget = middle(rows)
    shown = [c for c in able if c.asked == budget and not next(r for r in rows if r["method"] == c.spec)["failed"]]
    pictures = kept_pictures(loaded, [c.method for c in shown], questions, records, answers.size) if shown else []
    write_json(folder / "pictures.json", {"budget": budget, "samples": pictures})
    meta = {
        **head, **environment(loaded), "questions": len(questions), "images": len({s.image for s in questions}),
        "questions_fingerprint": fingerprint_of({"ids": sorted(s.id for s in questions)}),
        "methods": [c.method.to_dict() for c in cells], "interval": "95%, 2000 paired resamples of images",
        "workload": plan.workload.to_dict() if plan else None, "flops_of": flops.call, "flops_error": flops.error,
        "bench": about or None, "meaning": MEANING, "budget_shown": budget, "recommendation": recommend(rows, head["max_drop"]),
    }  # fmt: skip
    scored = {r["method"] for r in rows if r["score"] is not None}
    return rows, meta, text_table([r for r in accuracy if r["method"] in scored], CATEGORIES) if scored else ([], [])


def _more(bar: Any) -> Callable[[int], Callable[[], Any]]:
    """Makes a bar longer by so many turns."""

    def longer(turns: int) -> Callable[[], Any]:
        bar.total += turns
        bar.refresh()
        return bar.update

    return longer


def _row(cell: Cell, accuracy: Sequence[dict[str, Any]], records: Sequence[dict[str, Any]], flops: Any, timing: Any, timed: bool) -> Any:
    from ..eval.report.rows import row_of

    failed, cost, drop = cell.failed, None, None
    by_task = {r["task"]: r for r in accuracy if r["method"] == cell.spec} or None
    if failed is None:
        errors = [r["error"] for r in records if r["method"] == cell.spec and r["error"] is not None]
        asked = sum(r["method"] == cell.spec for r in records)
        failed = f"{len(errors)} of {asked} answers failed: {errors[0]}" if errors else None
        by_task = None if len(errors) == asked else by_task
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
    return options.one_method(f"random:{cell.asked},per={cell.method.per}") if cell.asked else cell.method


def middle(rows: Sequence[dict[str, Any]]) -> str:
    """The budget at which most methods ran, the one nearest a quarter of the tokens among equals."""
    found: dict[str, list[float]] = {}
    for r in rows:
        if r["asked"] and r["visual_tokens_kept"] and r["score"] is not None:
            found.setdefault(r["asked"], []).append(r["visual_tokens_kept"] / r["visual_tokens_full"])
    return min(found, key=lambda b: (-len(found[b]), abs(sum(found[b]) / len(found[b]) - 0.25)), default="")


def write(rows: Sequence[dict[str, Any]], meta: dict[str, Any], folder: Path) -> None:
    """report.json, report.csv, the plots and report.html."""
    from ..eval.report.formats import csv_text
    from ..eval.report.merge import Finished
    from ..eval.report.page import page, write_plots
    from ..eval.sweep import write_json

    write_json(folder / "report.json", {"rows": rows, "meta": meta})
    (folder / "report.csv").write_text(csv_text(rows))
    finished = Finished.read(folder)
    write_plots(finished, folder)
    (folder / "report.html").write_text(page(finished), encoding="utf-8")


def _print(rows: Sequence[dict[str, Any]], meta: dict[str, Any], eval_table: tuple[list[str], list[list[str]]]) -> None:
    from ..eval.report.recommend import points
    from ..eval.report.rows import main_table

    options.print_table(*main_table(rows, quartiles=False, asked=bool(meta["match"])))
    if eval_table[0]:
        options.print_table(*eval_table)
    print("Scores are percent right, 'score' and 'macro' the unweighted mean of the categories; FLOPs are percent of none's; times")
    print("are medians (quartiles are in the report), ratios are paired with the 95% interval; 'in region' is the share of kept tokens")
    print("on what the question is about.")
    if meta["model"] == "builtin":
        print("Offline self-test on a tiny model, not evidence about 7B models.")
    print(f"\nRecommended (at most {points(meta['max_drop'])} lost): {meta['recommendation']['line']}")
    print(f"  --method {meta['recommendation']['method']}")
