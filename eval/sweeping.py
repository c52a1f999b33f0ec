"""A sweep from its cells to its report: what ``me.sweep`` and the command ``sweep`` run."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_efficient.compressors.random import Random
from mllm_efficient.embedded import is_embedded
from mllm_efficient.errors import MllmEfficientError
from mllm_efficient.loading.models import Loaded
from mllm_efficient.measure.bench import Settings
from mllm_efficient.measure.machine import busy
from mllm_efficient.progress import SILENT, Progress
from mllm_efficient.tables import Table
from mllm_efficient.writing import write_text

from .agreement import TEXT_ONLY
from .answering import answered
from .asked import Asked, Benchmark, OwnRequests, Records
from .builtin.suites import embedded_suite
from .evaluate import AGREEMENT, BATCH, DATA_BATCH, TINY, lengths
from .record.bench_file import BEGUN_FILE, BenchFile, begin, owned, write_json
from .report.formats import csv_text
from .report.merge import Finished
from .report.page import page, write_plots
from .report.recommend import bounded, decided_by, recommend
from .report.rows import failures, main_table, row_of
from .requests import read_requests
from .results import SWEEP, Results
from .sweep import Cell, Flops, bench_config, cross, possible, settings_of, time_all, unique

if TYPE_CHECKING:
    from .lmms.run import TaskOptions

REPEATS, WARMUP = 7, 1
FIRST = ("tokens", "score", "vs none", "same words", "right", "FLOPs", "TTFT/none", "retention", "TTFT ms", "peak MB")
OF_TIMES = (
    "FLOPs (percent of none's) and times (medians; quartiles are in the report) are of one prompt of --image-size, --text-tokens and "
    "--output-tokens; ratios are paired with the 95% interval."
)
NOTES = {
    "builtin": "Scores are percent right, 'score' and 'macro' the unweighted mean of the categories; FLOPs are percent of none's; times "
    "are medians (quartiles are in the report), ratios are paired with the 95% interval; 'in region' is the share of kept tokens on what "
    "the question is about.",
    "tasks": f"'score' over tasks is their unweighted mean. {OF_TIMES}",
    "data": f"{AGREEMENT} {OF_TIMES} Recommended is the cheapest whose lower 95% bound, for all cells at once, is what stands in brackets. "
    "The requests that are farthest from the uncompressed model are in the report.",
}
Ask = Callable[[Loaded, Sequence[Cell], Path], Asked]


@dataclass(frozen=True)
class Plan:
    """What is swept. ask: makes of a loaded model, the cells that can run and the folder what they are asked. timed: None for no timing.

    workload: the prompt that FLOPs are of. head: what else a results file says of it; ``command`` and ``max_drop`` among that.
    """

    specs: Sequence[str]
    budgets: Sequence[str]
    ask: Ask
    settings: Settings
    timed: bool
    match: str | None
    head: dict[str, Any]


def asker(
    tasks: TaskOptions | None, data: Path | None, *, suite: str | None, categories: str | None, split: str,
    limit: int | None, batch_size: int | None, max_new_tokens: int | None, image_range: str, progress: Progress,
) -> Ask:  # fmt: skip
    """What makes the questions of a sweep: public tasks, a user's own requests, or an embedded benchmark. Reads and checks them now.

    Raises ``MllmEfficientError`` for tasks or data that cannot be read, and for data without any image.
    """
    if tasks is not None:
        from .lmms.evaluate import checked
        from .lmms.swept import Tasks

        host, named = checked(tasks)
        return lambda loaded, cells, folder: Tasks(loaded, cells, tasks, host, named, folder, progress.say)
    if data is None:
        embedded = embedded_suite(suite)
        return lambda loaded, cells, folder: Benchmark(
            loaded, [c.method for c in cells], split, limit, batch_size or BATCH, folder, embedded,
            embedded.asks(categories, loaded.processor, progress.say),
        )  # fmt: skip
    requests = read_requests(data, limit, image_range)
    if not any(r.images for r in requests):
        raise MllmEfficientError(f"--data: no request of {data} has an image, so there is nothing to compress")
    return lambda loaded, cells, folder: OwnRequests(
        loaded, [c.method for c in cells], requests, data, batch_size or DATA_BATCH, max_new_tokens, folder
    )


def sweep(loaded: Loaded | Callable[[], Loaded], plan: Plan, folder: Path, progress: Progress = SILENT) -> Results:
    """Every method at every budget in a folder that is this process's meanwhile, and the report. loaded: or what loads it."""
    cells, start = cross(plan.specs, plan.budgets), time.monotonic()
    with owned(folder):
        model = loaded if isinstance(loaded, Loaded) else loaded()
        flops = Flops(model, plan.settings.workload, plan.settings.seed)
        if plan.match and flops.error:
            raise MllmEfficientError(f"--match flops: {flops.error}")
        if flops.error:
            progress.warn(f"without FLOPs: {flops.error}")
        cells = [flops.match(c) for c in cells] if plan.match else cells
        cells, left_out = possible(unique(cells), model, progress.say)
        for spec, reason in left_out.items():
            progress.warn(f"without {spec}: {reason}")
        asked = plan.ask(model, [c for c in cells if c.failed is None], folder)
        found = _run(asked, cells, flops, plan, folder, left_out, progress)
        found.meta["seconds"] = round(time.monotonic() - start, 1)
        write(found.rows, found.meta, folder)
    return found


def _run(
    asked: Asked, cells: Sequence[Cell], flops: Flops, plan: Plan, folder: Path, left_out: dict[str, str], progress: Progress
) -> Results:
    loaded, able = asked.run.loaded, [c for c in cells if c.failed is None]
    timed = plan.settings if plan.timed else None
    progress.say(asked.line)
    begin(folder, asked.run.arms, asked.run.total, plan.head.get("command") or "me.sweep(...)")
    records = answered(asked.run, progress)
    scores = asked.scores(records)
    timings, about = _timings(loaded, able, plan.settings, folder, progress) if plan.timed else ({}, {})
    said: list[str] = []
    rows = [_row(c, scores.get(c.spec), records, flops, timings.get(c.spec), plan.timed, said.append) for c in cells]
    for line in said:
        progress.warn(line)
    if rows[0]["failed"] is None:
        bounded(rows, asked.differences(records, decided_by(rows[0])))
    budget = middle(rows)
    shown = [c for c in able if c.asked == budget and not next(r for r in rows if r["method"] == c.spec)["failed"]]
    write_json(folder / "pictures.json", {"budget": budget, "samples": asked.pictures(records, [c.method for c in shown])})
    meta = {
        **plan.head, "match": plan.match, "left_out": left_out,
        **asked.run.config, **asked.about(records), "batch_size": asked.run.batch_size,
        "methods": [c.method.to_dict() for c in cells],
        "workload": timed.workload.to_dict() if timed else None, "flops_of": flops.call, "flops_error": flops.error,
        "bench": about or None, "meaning": asked.meaning, "budget_shown": budget,
        "recommendation": recommend(rows, plan.head["max_drop"]),
    }  # fmt: skip
    header, lines = asked.table(scores, {r["method"] for r in rows if r["score"] is not None})
    public = meta["suite"] == "tasks"
    categories = [Table(header, lines, left=3 if public else 1, first=("score", "macro", "tokens"), note=_legend(public))] if header else []
    return Results(SWEEP, rows, meta, (main_table_of(rows, meta), *categories, *lengths(rows)), tuple(failures(rows)))


def _legend(public: bool) -> str:
    """What the columns of public tasks mean."""
    if not public:
        return ""
    from .lmms.evaluate import LEGEND

    return LEGEND


def main_table_of(rows: Sequence[dict[str, Any]], meta: dict[str, Any]) -> Table:
    """Everything of a cell in one line, with what the columns mean."""
    tiny = f" {TINY}" if is_embedded(meta["model"]) else ""
    header, lines = main_table(rows, quartiles=False, asked=bool(meta["match"]))
    return Table(header, lines, first=FIRST, note=NOTES.get(meta["suite"], NOTES["builtin"]) + tiny)


def recommended(results: Results) -> str:
    """The budget to take, in words, and how it is given to a command."""
    chosen = results.meta["recommendation"]
    taken = "" if chosen["method"] == "none" else f"\n  --method {shlex.quote(chosen['method'])}"
    return f"Recommended ({chosen['rule']}): {chosen['line']}{taken}"


def _timings(
    loaded: Loaded, cells: Sequence[Cell], settings: Settings, folder: Path, progress: Progress
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Bench rows by method, and how they were timed."""
    file = BenchFile(folder, bench_config(loaded, settings))
    with progress.bar(0, "turn") as bar:
        timings = time_all(loaded, cells, settings, file, bar.longer)
    warning = busy(file.about["machine"]) if file.about else None
    if warning:
        progress.warn(warning)
    return timings, file.about


def _row(
    cell: Cell, by_task: Any, records: Records, flops: Flops, timing: Any, timed: bool, say: Callable[[str], None]
) -> dict[str, Any]:  # fmt: skip
    """The report's row of a cell. by_task: its scores, which do not count where every answer about an image failed."""
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
                say(f"no FLOPs of {cell.spec}: {error}")
    timing = timing if timing and timing["failed"] is None else None
    return row_of(cell.spec, cell.role, cell.asked, by_task, cost, flops.baseline if flops.error is None else None, drop, timing, failed)


def _asked(cell: Cell) -> Any:
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
    write_json(folder / "report.json", {"rows": rows, "meta": meta})
    write_text(folder / "report.csv", csv_text(rows))
    finished = Finished.read(folder)
    write_plots(finished, folder)
    write_text(folder / "report.html", page(finished))
    (folder / BEGUN_FILE).unlink(missing_ok=True)
