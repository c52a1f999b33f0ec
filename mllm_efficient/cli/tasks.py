"""``mllm-efficient eval --tasks``: public benchmarks through lmms-eval, on a model here or on running servers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MllmEfficientError
from . import options
from .answering import answered, failures

if TYPE_CHECKING:
    from ..eval.lmms.host import Host, Task
    from ..eval.lmms.run import TaskOptions, TaskRun
    from ..eval.sweep import Cell
    from ..loading.models import ModelOptions

CHAIR = "me_coco_chair"
LEGEND = """\
'score' is percent of the metric's best value (of errors 100 less their percent), 'value' the metric as lmms-eval gives it; 'tokens'
and 'prompt' are visual tokens kept and prompt tokens per sample; 'hard': the score on the samples that the baseline gets right and
resize at the same budget gets wrong, and how many those are; 'broken': percent wrong of those that both get right; 'ECE', 'AURC':
calibration of the answers' confidence, in percent (lower is better); 'neither': answers to questions of yes or no that are neither.
A failed sample counts as wrong."""


def task_names(tasks: str | None, suite: str | None) -> tuple[tuple[str, ...], int | None]:
    """The tasks of ``--tasks a,b`` or of a suite, and the suite's limit. Raises where both or neither say any."""
    from ..eval.lmms import suites

    if tasks is not None and suite is not None:
        raise MllmEfficientError("--tasks and --suite are two ways to say one thing: give one of them")
    if suite is not None:
        content = suites.read(suites.SUITES, suite)
        return tuple(content["tasks"]), content.get("limit")
    found = tuple(dict.fromkeys(t.strip() for t in (tasks or "").split(",") if t.strip()))
    if not found:
        raise MllmEfficientError("--tasks names no task: gqa,pope are two")
    return found, None


def even(names: Sequence[str], limit: int | None, suite: str | None) -> int | None:
    """A suite's limit, which is one for all of its tasks: the next even number where one of them asks in pairs."""
    from ..eval.lmms.scores import known

    if suite is None or limit is None or limit % 2 == 0 or not any(n in known() and known()[n].pairs for n in names):
        return limit
    say(f"--limit {limit + 1}: a task of {suite} asks in pairs")
    return limit + 1


def unlike_protocol(run: TaskRun, reference: dict[str, Any]) -> list[str]:
    """A line for each setting in which a run is not what the published numbers were made with."""
    config, protocol = run.config, reference.get("protocol", {})
    out = [f"{k} is {config[k]} here and {v} there" for k, v in protocol.items() if k in config and config[k] != v]
    for method in run.methods:
        wanted = reference.get("methods", {}).get(method.name, {})
        out += [f"{method.spec()}: {k}={getattr(method, k)} here and {v} there" for k, v in wanted.items() if getattr(method, k, v) != v]
    return [f"Not the same setting: {line}." for line in out]


def evaluate_tasks(settings: ModelOptions, specs: Sequence[str], asked: TaskOptions, output_dir: Path | None, json: bool) -> int:
    """Runs, prints and keeps everything; the exit code."""
    from ..eval.lmms import suites
    from ..eval.lmms.asking import SampleError
    from ..eval.lmms.rows import rows_of
    from ..eval.lmms.server import tiling_note
    from ..eval.lmms.tables import missing, unscaled, without_interval, without_partner
    from ..eval.record.bench_file import write_json

    reference = None if asked.reference is None else suites.read(suites.REFERENCES, asked.reference)
    cells = [] if asked.servers else cells_of(specs)  # before data are read
    host, tasks = checked(asked)
    if reference is not None and not any(t.name in reference["tasks"] for t in tasks):
        raise MllmEfficientError(f"--reference {asked.reference} has none of these tasks (it has {', '.join(reference['tasks'])})")
    if asked.servers:
        run = on_servers(settings, asked, host, tasks, specs, output_dir)
    else:
        run = on_model(settings, cells, asked, host, tasks, output_dir)
    try:
        say(f"{', '.join(t.name for t in tasks)} x {len(run.arms)} arm{'s' * (len(run.arms) > 1)}: {run.total} answers")
        records = answered(run, run.rank == 0)
    except SampleError as error:
        options.say(f"failed: {error}")
        return 1
    if run.rank > 0:
        return 0
    rows = rows_of(run, records)
    note = None if not asked.servers else tiling_note(run.cells, run.askers.values())
    meta = _meta(run, rows, asked, tasks, reference) | {"note": note}
    if output_dir is not None:
        write_json(output_dir / "results.json", {"rows": rows, "meta": meta})
    if json:
        options.print_json(rows, meta)
    else:
        _print(rows, meta, reference, asked.limit)
    alone = [] if asked.servers else without_partner(rows)
    partners = [f"no hard samples for {', '.join(alone)}: no resize stands at the same budget"] if alone else []
    lacking = missing(rows)
    for line in [*([note] if note is not None else []), *unscaled(rows), *without_interval(rows), *partners, *lacking]:
        options.say(line)
    return max(failures(records), int(bool(lacking)))


def _meta(
    run: TaskRun, rows: Sequence[dict[str, Any]], asked: TaskOptions, tasks: Sequence[Task], reference: dict[str, Any] | None
) -> dict[str, Any]:
    """What a results file says of a run besides its rows. reference: published numbers to stand beside."""
    from ..eval.lmms.rows import MEANING
    from ..eval.lmms.tables import beside, notes

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


def _print(rows: Sequence[dict[str, Any]], meta: dict[str, Any], reference: dict[str, Any] | None, limit: int | None) -> None:
    from ..eval.lmms.tables import detail_table, reference_table, task_table

    options.print_table(*task_table(rows), left=3)
    print("\n".join([LEGEND, *meta["notes"]]))
    header, lines = detail_table(rows)
    if lines:
        print("\nOther metrics, as lmms-eval gives them:")
        options.print_table(header, lines, left=2)
    if reference is None:
        return
    published = meta["reference"]["rows"]
    print(f"\nBeside {reference['title']} ({reference['source']}):")
    options.print_table(*reference_table(published), left=2)
    if "averages" in reference:
        said = ", ".join(f"{name} {value}" for name, value in reference["averages"].items())
        print(f"Its averages over all of its sets, in percent of the uncompressed model: {said}")
    for line in dict.fromkeys([*meta["reference"]["differs"], *filter(None, map(_unlike, published))]):
        print(line)
    if limit is not None:
        print(f"Here each task is its first {limit} samples, there all: not the same setting.")


def _unlike(published: dict[str, Any]) -> str | None:
    here, there = published["kept"], published["published_kept"]
    if there is None or (here is not None and abs(here - there) < 0.2):
        return None
    kept = "an unknown share" if here is None else f"{here:.1f}%"
    return f"{published['method']} kept {kept} of the visual tokens here and {there:.1f}% in the paper: not the same setting."


def checked(asked: TaskOptions) -> tuple[Host, list[Task]]:
    """lmms-eval and the tasks, all of which can be read and scored here."""
    from ..eval.lmms.host import Host
    from ..eval.lmms.scores import known

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
    from ..compressors.random import Random
    from ..eval.sweep import cross
    from ..measure.arms import REFERENCE
    from ..registry import without_budget

    for spec in specs:
        if without_budget(spec):
            like = "give every stage one" if "|" in spec else f"{spec}:keep=0.25 and {spec}:tokens=64 have one"
            raise MllmEfficientError(f"--method {spec} has no budget: {like}")
    return [c for c in cross(specs, []) if c.role != REFERENCE or c.method.name != Random.name]


def on_model(
    settings: ModelOptions, cells: Sequence[Cell], asked: TaskOptions, host: Host, tasks: Sequence[Task], output_dir: Path | None
) -> TaskRun:
    """The run of arms on a model."""
    from ..eval.lmms.adapter import rank_device
    from ..eval.lmms.run import run_of
    from ..eval.sweep import possible
    from ..loading.models import load

    settings = replace(settings, device=rank_device(settings.device) if settings.device_map is None else settings.device)
    loaded = load(settings)
    for line in loaded.notes:
        say(line)
    cells, left_out = possible(cells, loaded, say)
    for spec, reason in left_out.items():
        say(f"without {spec}, and so without the hard samples: {reason}")
    broken = [c for c in cells if c.failed is not None]
    if broken:
        raise MllmEfficientError(f"{broken[0].spec}: {broken[0].failed}")
    return run_of(loaded, cells, asked, host, tasks, output_dir, say)


def on_servers(
    settings: ModelOptions, asked: TaskOptions, host: Host, tasks: Sequence[Task], specs: Sequence[str], output_dir: Path | None
) -> TaskRun:
    """The run of servers, the first of which is the baseline."""
    from ..eval.lmms.asking import MAX_NEW_TOKENS
    from ..eval.lmms.run import TaskRun
    from ..eval.lmms.server import ServerAsker, served, server_cells
    from ..eval.record.samples import SAMPLES_FILE
    from ..loading.models import ModelOptions

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

    return TaskRun(host, tasks, cells, asker, how, asked.limit, output_dir, None, asked.batch_size, settings.seed, say)


def say(text: str) -> None:
    """A line for the reader from the first of several processes."""
    if int(os.environ.get("RANK", 0)) == 0:
        options.say(text)
