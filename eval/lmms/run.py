"""Tasks x arms, the baseline first, one lmms-eval evaluation each; what is finished is kept and not run again."""

from __future__ import annotations

import math
import numbers
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mllm_efficient.compressors.base import Compressor
from mllm_efficient.errors import MllmEfficientError

from ..record.samples import Records, fingerprint_of
from ..sweep import Cell
from .asking import MAX_NEW_TOKENS, Asker, SampleError
from .cache import AnswerCache
from .host import Host, Task
from .model import ModelAsker
from .scores import CIRCLE, Clustered, circular, clustered, counts_errors, known, primary, sample_score, top_of

ANSWERS = (
    "visual_tokens_full", "visual_tokens_kept", "tokens_per_layer", "input_tokens", "prompt_tokens_full", "output_tokens", "latency_s",
    "batch", "confidence",
)  # fmt: skip
POINTS = 200.0  # of each of MME's categories


@dataclass(frozen=True)
class TaskOptions:
    """What is asked and how. names: of tasks. servers: instead of a model; methods are then theirs."""

    names: Sequence[str]
    limit: int | None = None
    batch_size: int = 1
    data_root: Path | None = None
    include: tuple[Path, ...] = ()
    on_error: str = "record"
    cache: Path | None = None
    image_padding: str | None = None
    prompt_format: str = "template"
    max_new_tokens: int | None = None
    reference: str | None = None
    servers: tuple[str, ...] = ()
    server_model: str | None = None
    image_range: str = "full"
    coco_instances: Path | None = None


@dataclass
class TaskRun:
    """One evaluation of tasks. asker: makes what answers for an arm. how: everything answers depend on besides arm and sample.

    A failed sample counts as wrong; its arm's row says how many there were. A task that raises is recorded and the others go
    on, unless several processes run, which would wait for each other: there it ends the run.
    """

    host: Host
    tasks: Sequence[Task]
    cells: Sequence[Cell]
    asker: Callable[[Cell], Asker]
    how: dict[str, Any]
    limit: int | None = None
    output_dir: Path | None = None
    loaded: Any = None
    batch_size: int = 1
    seed: int = 0
    say: Callable[[str], Any] = lambda text: None
    progress: Callable[[int], Any] = lambda n: None
    records: Records = field(init=False)
    calls: int = field(default=0, init=False)  # answers that came from the model, not from the cache

    def __post_init__(self) -> None:
        self.rank, self.ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.ranks > 1:
            from accelerate import Accelerator
            from accelerate.utils import InitProcessGroupKwargs

            # the group of processes, before the first thing is shared; those that finish early wait for long
            Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(weeks=1))])
        self.askers = {c.spec: self.asker(c) for c in self.cells}
        self.made_by = {c.spec: fingerprint_of({"arm": self.askers[c.spec].identity}) for c in self.cells}
        self.records = Records(self.output_dir if self.rank == 0 else None, self.config)
        self._require_the_same()

    def _require_the_same(self) -> None:
        """Raises where the folder has answers to other questions, or of an arm that was something else."""
        tasks = {t.name: t.fingerprint for t in self.tasks}
        for row in self.records.rows.values():
            changed = None
            if row["task"] in tasks and row["of_task"] != tasks[row["task"]]:
                changed = f"task {row['task']} or its data"
            elif row["method"] in self.made_by and row["made_by"] != self.made_by[row["method"]]:
                changed = f"the code or the weights of {row['method']}"
            if changed:
                self.records.close()
                raise MllmEfficientError(f"{self.output_dir} holds answers from before {changed} changed: use another --output-dir")
        for kind, held, named in (
            ("tasks", {r["task"] for r in self.records.rows.values()}, tasks),
            ("methods", {r["method"] for r in self.records.rows.values()}, self.made_by),
        ):
            if held - set(named):  # whose results would be written over
                self.records.close()
                others = ", ".join(sorted(held - set(named)))
                raise MllmEfficientError(f"{self.output_dir} holds the {kind} {others} too: name them as well, or use another --output-dir")

    @property
    def config(self) -> dict[str, Any]:
        harness = {"lmms_eval": version("lmms_eval"), "datasets": version("datasets")}
        return {
            "suite": "tasks",
            "limit": self.limit,
            "resampled_by": "image",
            "batch_size": self.batch_size,
            **self.how,
            "harness": harness,
        }

    @property
    def arms(self) -> list[str]:
        return [c.spec for c in self.cells]

    @property
    def methods(self) -> list[Compressor]:
        return [c.method for c in self.cells]

    def asked_of(self, task: Task) -> int:
        """Samples that are asked of a task."""
        return task.size if self.limit is None else min(self.limit, task.size)

    @property
    def total(self) -> int:
        return len(self.cells) * sum(self.asked_of(t) for t in self.tasks)

    @property
    def done(self) -> int:
        """Answers that are recorded already."""
        return sum(self.asked_of(t) for t in self.tasks for c in self.cells if (c.spec, t.name) in self.records)

    def answer_all(self) -> list[dict[str, Any]]:
        """Runs what is not finished yet; the records of this run's samples. ``summary`` has the scores."""
        try:
            for task in self.tasks:
                for cell in self.cells:
                    if self._shared((cell.spec, task.name) in self.records):
                        self.progress(self.asked_of(task))
                        continue
                    asker = self.askers[cell.spec]
                    asker.progress, asker.say = self.progress, self.say if self.rank == 0 else _say
                    self._add(cell, task, asker)
        finally:
            self.records.close()
        names = {t.name for t in self.tasks}
        return [r for r in self.records.rows.values() if r["method"] in self.arms and r["task"] in names and "metrics" not in r]

    def _shared(self, value: Any) -> Any:
        """The first process's value, in all."""
        if self.ranks == 1:
            return value
        import torch

        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def _add(self, cell: Cell, task: Task, asker: Asker) -> None:
        """Evaluates a task under an arm and records its samples, then its metrics."""
        from .adapter import ChatModel

        head = {"method": cell.spec, "task": task.name, "of_task": task.fingerprint, "made_by": self.made_by[cell.spec]}
        files = None if self.output_dir is None else self.output_dir / "files" / task.name / self.made_by[cell.spec]
        device = "cpu" if self.loaded is None else self.loaded.device
        try:
            result = self.host.evaluate(ChatModel(asker, device), task.name, self.limit, self.batch_size, files, self.seed)
            if result is None:
                return
            rows = self._rows(head, task, result)
        except SampleError:
            raise
        except Exception as error:
            if self.ranks > 1:
                raise
            reason = str(error) if isinstance(error, MllmEfficientError) else f"task {task.name}: {type(error).__name__}: {error}"
            rows = [{**head, "id": task.name, "metrics": {}, "n": 0, "failures": 0, "clustered": None, "error": reason}]
            self.say(f"failed: {cell.spec} on {reason}")
        self.calls += sum(not r.get("cached", True) for r in rows)
        self.records.put(rows)

    def _rows(self, head: dict[str, Any], task: Task, result: dict[str, Any]) -> list[dict[str, Any]]:
        """Every sample of an evaluation, then what they come to."""
        logged = sorted(_of_one_filter(result["samples"][task.name]), key=lambda s: s["doc_id"])
        samples = [self._sample(head, task, s) for s in logged]
        if len(samples) != self.asked_of(task):
            raise MllmEfficientError(f"task {task.name}: {self.asked_of(task)} samples were asked and {len(samples)} came back")
        metrics: dict[str, float] = {}
        for key, value in result["results"][task.name].items():
            if _is_metric(key, value, task):
                metrics.setdefault(key.split(",")[0], float(value))
        failed = [s for s in samples if s["error"] is not None]
        worst = {m: float(counts_errors(task.name, m)) for m in task.metrics}
        shares = {m for s in logged for m in task.metrics if isinstance(s.get(m), dict) and "weight" in s[m]}  # an empty answer has none
        credited = {m for s in failed for m, score in s["scores"].items() if score != worst[m] and m not in shares}
        for sample in failed:
            sample["scores"] = {m: worst[m] for m in sample["scores"]}
        for metric in credited:  # some tasks guess where there is no answer: what failed is wrong
            _without_guesses(task, metric, metrics, samples)
        first = primary(task.name, task.higher)
        error = f"{len(failed)} of {len(samples)} answers failed: {failed[0]['id']}: {failed[0]['error']}" if failed else None
        if first not in metrics:
            error = error or f"task {task.name}: no value of {first}"
        parts = _clustered(task, first, metrics, logged, [s["cluster"] for s in samples], bool(credited), self.seed)
        summary = {**head, "id": task.name, "metrics": metrics, "n": len(samples), "failures": len(failed), "clustered": asdict(parts)}
        summary["errors_clustered"] = {
            m: asdict(_clustered(task, m, metrics, logged, [s["cluster"] for s in samples], bool(credited), self.seed))
            for m in _beside_errors(task)
        }  # fmt: skip
        value = f"{first} {metrics[first]:.4g}" if first in metrics else "no value"
        self.say(f"{task.name}, {head['method']}: {value}{'; ' + error if error else ''}")
        return [*samples, {**summary, "tops": _tops(task, logged), "error": error}]

    def _sample(self, head: dict[str, Any], task: Task, logged: dict[str, Any]) -> dict[str, Any]:
        """A sample's record. Its cluster is the baseline's, so that arms are resampled alike even where a picture failed in one."""
        row = _sample(head, task, logged)
        before = self.records.rows.get((self.arms[0], row["id"]))
        return row if before is None else {**row, "cluster": before["cluster"]}

    def summary(self, arm: str, task: str) -> dict[str, Any]:
        """The metrics of an arm on a task, ``{}`` where it raised, with ``n``, ``failures`` and ``error``."""
        return self.records.rows[arm, task]


def run_of(
    loaded: Any, cells: Sequence[Cell], asked: TaskOptions, host: Host, tasks: Sequence[Task], output_dir: Path | None,
    say: Callable[[str], Any] = lambda text: None,
) -> TaskRun:  # fmt: skip
    """The run of arms on a loaded model. Answers are kept in ``asked.cache``, or beside the results."""
    folder = asked.cache or output_dir
    cache = None if folder is None else AnswerCache(folder)

    def asker(cell: Cell) -> ModelAsker:
        return ModelAsker(
            asked.batch_size, asked.max_new_tokens or MAX_NEW_TOKENS, asked.on_error, cache,
            loaded=loaded, method=cell.method, image_padding=asked.image_padding, prompt_format=asked.prompt_format,
            image_range=asked.image_range,
        )  # fmt: skip

    return TaskRun(
        host, tasks, cells, asker, asker(cells[0]).how, asked.limit, output_dir, loaded, asked.batch_size, loaded.options.seed, say
    )


def _tops(task: Task, logged: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The most points that the questions asked can give, where a task counts points of categories (MME): with a limit not all are."""
    if task.name not in known() or not known()[task.name].pairs:
        return {}
    found = {m: {s[m]["category"] for s in logged if m in s} for m in task.metrics}
    return {m: POINTS * len(categories) for m, categories in found.items() if categories}


def _beside_errors(task: Task) -> list[str]:
    """The metrics that say something beside one that counts errors, so that they need an interval as well: what is left out of a
    caption cannot be wrong."""
    return [m for m in task.metrics if m != primary(task.name, task.higher)] if task.name in known() and known()[task.name].errors else []


def _say(text: str) -> None:
    """What a process that is not the first has to say."""
    print(text, file=sys.stderr, flush=True)


def _is_metric(key: str, value: Any, task: Task) -> bool:
    return key.split(",")[0] in task.higher and isinstance(value, numbers.Real) and math.isfinite(value)


def _without_guesses(task: Task, metric: str, metrics: dict[str, float], samples: Sequence[dict[str, Any]]) -> None:
    """A metric again, from the samples' scores; without a value where its scale is not known."""
    scores = [s["scores"][metric] for s in samples if metric in s["scores"]]
    value = metrics.pop(metric, None)
    top = None if value is None else top_of(task.name, metric, value, scores)
    if top is not None:
        metrics[metric] = top * sum(scores) / len(scores)


def _of_one_filter(logged: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each sample once: a task with several filters of its answers logs it for each, and its first filter counts."""
    out: dict[int, dict[str, Any]] = {}
    for sample in logged:
        out.setdefault(sample["doc_id"], sample)
    return list(out.values())


def _sample(head: dict[str, Any], task: Task, logged: dict[str, Any]) -> dict[str, Any]:
    """A sample of lmms-eval's log as a record of this package."""
    counts = (logged["token_counts"] or [None])[0] or {}
    scores = {m: sample_score(logged[m]) for m in task.metrics if m in logged}
    texts = [a for a in logged.get("arguments", []) if isinstance(a, str)]
    return {
        **head, "id": f"{task.name}/{logged['doc_id']}", "question": texts[0] if texts else "", "expected": _expected(logged),
        "answer": _plain(logged["filtered_resps"][0]) if logged["filtered_resps"] else "",
        "scores": {m: s for m, s in scores.items() if s is not None}, "cluster": _cluster(logged, counts),
        "error": counts.get("error"), "cached": bool(counts.get("cached")),
        **{k: counts[k] for k in ANSWERS if k in counts},
    }  # fmt: skip


def _cluster(logged: dict[str, Any], counts: dict[str, Any]) -> str:
    """What a sample is drawn with: all that are asked about its picture; without one all of its question, or itself alone."""
    if counts.get("picture"):
        return str(counts["picture"])
    items = [v for v in logged.values() if isinstance(v, dict)]
    question = next((v["index"] % CIRCLE if circular(v) else v["question_id"] for v in items if circular(v) or "question_id" in v), None)
    return f"sample {logged['doc_id']}" if question is None else f"question {question}"


def _clustered(
    task: Task, metric: str, metrics: dict[str, float], logged: Sequence[dict[str, Any]], clusters: Sequence[str], credited: bool, seed: int
) -> Clustered:  # fmt: skip
    """The metric that counts by cluster, over the samples that have it. credited: whether failed samples had a score."""
    if credited or metric not in metrics:
        return Clustered([], [], why="the task gives credit where an answer failed" if credited else f"there is no {metric}")
    items, where = [s[metric] for s in logged if metric in s], [c for s, c in zip(logged, clusters) if metric in s]
    scores = [s for s in map(sample_score, items) if s is not None]
    top = top_of(task.name, metric, metrics[metric], scores)
    return clustered(task.aggregate.get(metric), items, where, metrics[metric], top, seed, task.name)


def _expected(logged: dict[str, Any]) -> Any:
    """The right answer, or answers; some tasks name a column for it that is not there."""
    target, document = logged["target"], logged["doc"]
    if target == "answer" and "answer" not in document:
        target = next((document[k] for k in ("answers", "caption", "annotations_captions") if k in document), None)
    return _plain(target)


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, type(None))) else [str(v) for v in value] if isinstance(value, list) else str(value)
