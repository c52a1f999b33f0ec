"""Public benchmarks through lmms-eval, on a model here or on running servers: what ``me.evaluate`` and ``eval --tasks`` run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mllm_efficient.compressors.random import Random
from mllm_efficient.errors import MllmEfficientError
from mllm_efficient.loading.models import Loaded, ModelOptions
from mllm_efficient.measure.arms import REFERENCE
from mllm_efficient.progress import SILENT, Progress
from mllm_efficient.registry import without_budget
from mllm_efficient.tables import Table

from ..answering import answered, failures
from ..record.bench_file import write_json
from ..record.samples import SAMPLES_FILE
from ..results import EVALUATE, Results
from ..sweep import Cell, cross, possible
from . import suites
from .asking import MAX_NEW_TOKENS
from .host import Host, Task
from .rows import MEANING, rows_of
from .run import TaskOptions, TaskRun, run_of
from .scores import known
from .server import ServerAsker, served, server_cells, tiling_note
from .tables import beside, detail_table, missing, notes, reference_table, task_table, unscaled, without_interval, without_partner

CHAIR = "me_coco_chair"
FIRST = ("score", "vs baseline", "tokens", "retention", "n")
LEGEND = (
    "'score' is percent of the metric's best value (of errors 100 less their percent), 'value' the metric as lmms-eval gives it; 'tokens' "
    "and 'prompt' are visual tokens kept and prompt tokens per sample; 'hard': the score on the samples that the baseline gets right and "
    "resize at the same budget gets wrong, and how many those are; 'broken': percent wrong of those that both get right; 'ECE', 'AURC': "
    "calibration of the answers' confidence, in percent (lower is better); 'neither': answers to questions of yes or no that are neither. "
    "A failed sample counts as wrong."
)


def task_names(tasks: str | None, suite: str | None) -> tuple[tuple[str, ...], int | None]:
    """The tasks of ``--tasks a,b`` or of a suite, and the suite's limit. Raises where both or neither say any."""
    if tasks is not None and suite is not None:
        raise MllmEfficientError("--tasks and --suite are two ways to say one thing: give one of them")
    if suite is not None:
        content = suites.read(suites.SUITES, suite)
        return tuple(content["tasks"]), content.get("limit")
    found = tuple(dict.fromkeys(t.strip() for t in (tasks or "").split(",") if t.strip()))
    if not found:
        raise MllmEfficientError("--tasks names no task: gqa,pope are two")
    return found, None


def even(names: Sequence[str], limit: int | None, suite: str | None, progress: Progress) -> int | None:
    """A suite's limit, which is one for all of its tasks: the next even number where one of them asks in pairs."""
    if suite is None or limit is None or limit % 2 == 0 or not any(n in known() and known()[n].pairs for n in names):
        return limit
    progress.warn(f"--limit {limit + 1}: a task of {suite} asks in pairs")
    return limit + 1


def on_tasks(
    asked: TaskOptions, methods: Sequence[str], loaded: Loaded | None, *, settings: ModelOptions, output_dir: Path | None = None,
    progress: Progress = SILENT, host: Host | None = None, tasks: Sequence[Task] = (),
) -> Results | None:  # fmt: skip
    """The tasks under every method, the uncompressed baseline first. loaded: None for ``asked.servers``.

    host, tasks: what ``checked`` gave, if it was called before the model was loaded. None in the processes of a launcher that are not the
    first, which has the results.
    """
    if host is None:
        host, tasks = checked(asked)
    reference = require_reference(asked)
    if loaded is None:
        run = on_servers(settings, asked, host, tasks, methods, output_dir, progress)
    else:
        run = on_model(loaded, cells_of(methods), asked, host, tasks, output_dir, progress)
    progress.say(f"{', '.join(t.name for t in tasks)} x {len(run.arms)} arm{'s' * (len(run.arms) > 1)}: {run.total} answers")
    records = answered(run, progress if run.rank == 0 else SILENT)
    if run.rank > 0:
        return None
    rows = rows_of(run, records)
    note = None if not asked.servers else tiling_note(run.cells, run.askers.values())
    meta = _meta(run, rows, asked, tasks, reference) | {"note": note}
    if output_dir is not None:
        write_json(output_dir / "results.json", {"rows": rows, "meta": meta})
    lacking = missing(rows)
    for line in [*_remarks(rows, asked, note), *lacking]:
        progress.warn(line)
    tables = (*tables_of(rows, meta), *tables_beside(meta, reference, asked.limit))
    return Results(EVALUATE, rows, meta, tables, (*failures(records), *lacking))


def require_reference(asked: TaskOptions) -> dict[str, Any] | None:
    """The published numbers that were asked for. Raises where there are none of that name, or of none of the tasks."""
    if asked.reference is None:
        return None
    reference = suites.read(suites.REFERENCES, asked.reference)
    if not any(name in reference["tasks"] for name in asked.names):
        raise MllmEfficientError(f"--reference {asked.reference} has none of these tasks (it has {', '.join(reference['tasks'])})")
    return reference


def _remarks(rows: Sequence[dict[str, Any]], asked: TaskOptions, note: str | None) -> list[str]:
    """What has to be known of the numbers."""
    alone = [] if asked.servers else without_partner(rows)
    partners = [f"no hard samples for {', '.join(alone)}: no resize stands at the same budget"] if alone else []
    return [*([note] if note is not None else []), *unscaled(rows), *without_interval(rows), *partners]


def tables_of(rows: Sequence[dict[str, Any]], meta: dict[str, Any]) -> list[Table]:
    """The metric that counts, and the others."""
    header, lines = detail_table(rows)
    more = [Table(header, lines, left=2, title="Other metrics, as lmms-eval gives them:")] if lines else []
    return [Table(*task_table(rows), left=3, first=FIRST, note=" ".join([LEGEND, *meta["notes"]])), *more]


def tables_beside(meta: dict[str, Any], reference: dict[str, Any] | None, limit: int | None) -> list[Table]:
    """Published numbers beside these."""
    if reference is None:
        return []
    published = meta["reference"]["rows"]
    said = [*dict.fromkeys([*meta["reference"]["differs"], *filter(None, map(_unlike, published))])]
    if "averages" in reference:
        averages = ", ".join(f"{name} {value}" for name, value in reference["averages"].items())
        said.insert(0, f"Its averages over all of its sets, in percent of the uncompressed model: {averages}.")
    if limit is not None:
        said.append(f"Here each task is its first {limit} samples, there all: not the same setting.")
    title = f"Beside {reference['title']} ({reference['source']}):"
    return [Table(*reference_table(published), left=2, title=title, note=" ".join(said))]


def unlike_protocol(run: TaskRun, reference: dict[str, Any]) -> list[str]:
    """A line for each setting in which a run is not what the published numbers were made with."""
    config, protocol = run.config, reference.get("protocol", {})
    out = [f"{k} is {config[k]} here and {v} there" for k, v in protocol.items() if k in config and config[k] != v]
    for method in run.methods:
        wanted = reference.get("methods", {}).get(method.name, {})
        out += [f"{method.spec()}: {k}={getattr(method, k)} here and {v} there" for k, v in wanted.items() if getattr(method, k, v) != v]
    return [f"Not the same setting: {line}." for line in out]


def _meta(
    run: TaskRun, rows: Sequence[dict[str, Any]], asked: TaskOptions, tasks: Sequence[Task], reference: dict[str, Any] | None
) -> dict[str, Any]:
    """What a results file says of a run besides its rows. reference: published numbers to stand beside."""
    published = None if reference is None else {
        "name": asked.reference, "source": reference["source"], "rows": beside(rows, reference), "averages": reference.get("averages"),
        "differs": unlike_protocol(run, reference),
    }  # fmt: skip
    return {
        **run.config, "tasks": [t.name for t in tasks], "questions": sum(map(run.asked_of, tasks)), "batch_size": asked.batch_size,
        "on_error": asked.on_error, "interval": "95%, 2000 paired resamples of images", "meaning": MEANING,
        "notes": notes([t.name for t in tasks]),
        "methods": [] if asked.servers else [m.to_dict() for m in run.methods], "processes": run.ranks,
        "model_calls": run.calls, "questions_fingerprint": {t.name: t.fingerprint for t in tasks}, "reference": published,
    }  # fmt: skip


def _unlike(published: dict[str, Any]) -> str | None:
    here, there = published["kept"], published["published_kept"]
    if there is None or (here is not None and abs(here - there) < 0.2):
        return None
    kept = "an unknown share" if here is None else f"{here:.1f}%"
    return f"{published['method']} kept {kept} of the visual tokens here and {there:.1f}% in the paper: not the same setting."


def checked(asked: TaskOptions) -> tuple[Host, list[Task]]:
    """lmms-eval and the tasks, all of which can be read and scored here."""
    if asked.coco_instances is not None and CHAIR not in asked.names:
        raise MllmEfficientError(f"--coco-instances has no effect without the task {CHAIR}: leave it out")
    host = Host(asked.data_root, asked.include, asked.coco_instances)
    for name in asked.names:
        if asked.limit is not None and asked.limit % 2 and name in known() and known()[name].pairs:
            raise MllmEfficientError(f"task {name} asks in pairs: give an even --limit")
    host.require_data(asked.names)
    tasks = [host.check(name) for name in asked.names]
    if asked.max_new_tokens is not None and all(t.length for t in tasks):
        raise MllmEfficientError("--max-new-tokens has no effect: every one of these tasks says how long its answers may be")
    return host, tasks


def cells_of(specs: Sequence[str]) -> list[Cell]:
    """The baseline, the methods, and ``resize`` at every budget. Raises for a method without one."""
    for spec in specs:
        if without_budget(spec):
            like = "give every stage one" if "|" in spec else f"{spec}:keep=0.25 and {spec}:tokens=64 have one"
            raise MllmEfficientError(f"--method {spec} has no budget: {like}")
    return [c for c in cross(specs, []) if c.role != REFERENCE or c.method.name != Random.name]


def on_model(
    loaded: Loaded, cells: Sequence[Cell], asked: TaskOptions, host: Host, tasks: Sequence[Task], output_dir: Path | None,
    progress: Progress,
) -> TaskRun:  # fmt: skip
    """The run of arms on a model."""
    cells, left_out = possible(cells, loaded, progress.say)
    for spec, reason in left_out.items():
        progress.warn(f"without {spec}, and so without the hard samples: {reason}")
    broken = [c for c in cells if c.failed is not None]
    if broken:
        raise MllmEfficientError(f"{broken[0].spec}: {broken[0].failed}")
    return run_of(loaded, cells, asked, host, tasks, output_dir, progress.say)


def on_servers(
    settings: ModelOptions, asked: TaskOptions, host: Host, tasks: Sequence[Task], specs: Sequence[str], output_dir: Path | None,
    progress: Progress,
) -> TaskRun:  # fmt: skip
    """The run of servers, the first of which is the baseline."""
    own = replace(settings, seed=ModelOptions.seed) != ModelOptions()
    if output_dir is not None and (output_dir / SAMPLES_FILE).exists():
        raise MllmEfficientError(f"{output_dir} holds answers, and a server may have changed since they were given: use another folder")
    for name, given, why in (
        ("--model and how it is loaded", own, "the server has loaded its own"),
        ("--method", bool(specs), "the server decides what it compresses: start one for each method and give --server NAME=URL for each"),
        ("--cache", asked.cache is not None, "a server does not say what it compresses, so its answers cannot be told apart later"),
        ("--image-padding", asked.image_padding is not None, "the server processes the images"),
        ("--prompt-format", asked.prompt_format != "template", "the server writes the prompt"),
        ("--image-range", asked.image_range != "full", "the server gets pictures of 8 bits by the usual rule"),
    ):
        if given:
            raise MllmEfficientError(f"{name} has no effect with --server: {why}")
    cells = server_cells(asked.servers, asked.server_model)
    tokens = asked.max_new_tokens or MAX_NEW_TOKENS
    how = served(cells) | {"default_max_new_tokens": tokens}

    def asker(cell: Any) -> ServerAsker:
        return ServerAsker(asked.batch_size, tokens, asked.on_error, url=cell.url, model=cell.model)

    return TaskRun(host, tasks, cells, asker, how, asked.limit, output_dir, None, asked.batch_size, settings.seed, progress.say)
