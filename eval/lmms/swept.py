"""Tasks as what a sweep asks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from mllm_efficient.errors import MllmEfficientError
from mllm_efficient.loading.models import Loaded
from mllm_efficient.stats import Estimate

from ..asked import Asked, Records, Scores
from ..report.rows import MEANING
from ..sweep import Cell
from ..table import OVERALL
from .host import CAPTIONS, Host, Task
from .rows import MEANING as OF_TASKS
from .rows import overall, rows_of
from .run import TaskOptions, TaskRun, run_of
from .scores import primary
from .tables import task_table


class Tasks(Asked):
    """Public benchmarks. Raises ``MllmEfficientError`` for captions, whose scores have no interval to recommend by."""

    meaning = MEANING | OF_TASKS

    def __init__(
        self, loaded: Loaded, cells: Sequence[Cell], asked: TaskOptions, host: Host, tasks: Sequence[Task], folder: Path | None,
        say: Callable[[str], Any],
    ):  # fmt: skip
        for task in tasks:
            metric = primary(task.name, task.higher)
            if any(c in metric for c in CAPTIONS):
                raise MllmEfficientError(f"task {task.name}: a sweep recommends by intervals, which {metric} has none of: ask it with eval")
        self.run: TaskRun = run_of(loaded, cells, asked, host, tasks, folder, say)
        self.line = f"{', '.join(t.name for t in tasks)} x {len(self.run.arms)} arms: {self.run.total} answers"

    def scores(self, records: Records) -> Scores:
        self.rows = rows_of(self.run, records)
        out: Scores = {arm: {} for arm in self.run.arms}
        for row in self.rows:
            if row["primary"] and row["score"] is not None:
                out[row["method"]][row["task"]] = row
        return {arm: rows if OVERALL in rows else {} for arm, rows in out.items()}

    def differences(self, records: Records, metric: str | None) -> dict[str, Estimate]:
        tops = {r["task"]: r["top"] for r in self.rows if r["primary"] and r["task"] != OVERALL and r["method"] == self.run.arms[0]}
        found = {arm: overall(self.run, arm, tops) for arm in self.run.arms}
        return {arm: pair[1] for arm, pair in found.items() if pair is not None}

    def about(self, records: Records) -> dict[str, Any]:
        prints = {t.name: t.fingerprint for t in self.run.tasks}
        return {
            "tasks": [t.name for t in self.run.tasks], "questions": sum(map(self.run.asked_of, self.run.tasks)),
            "questions_fingerprint": prints, "interval": "95%, 2000 paired resamples of images",
        }  # fmt: skip

    def table(self, scores: Scores, methods: Collection[str]) -> tuple[list[str], list[list[str]]]:
        return task_table([r for r in self.rows if r["method"] in methods])
