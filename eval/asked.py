"""What every method of a sweep is asked: the embedded benchmark, or a user's own requests."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from mllm_efficient.compressors.base import Compressor
from mllm_efficient.loading.models import Loaded
from mllm_efficient.stats import Estimate

from .agreement import MAX_NEW_TOKENS, Agreement
from .agreement_rows import about, agreement_rows, cell_of
from .agreement_rows import differences as agreement_differences
from .builtin.suites import BUILTIN, Suite
from .record.samples import fingerprint_of
from .report.pictures import kept_pictures
from .report.rows import DATA_MEANING, MEANING
from .requests import Request, prompts_of
from .runner import Run
from .table import differences, rows_of, text_table

Records = Sequence[dict[str, Any]]
Scores = dict[str, dict[str, dict[str, Any]]]


class Asked:
    """run: the evaluation. line: what will be asked, in words. meaning: of the report's columns."""

    run: Any  # a Harness, or what has its arms, records and progress
    line: str
    meaning: dict[str, str]

    def scores(self, records: Records) -> Scores:
        """Of each method eval's rows by task, as ``row_of`` of the report takes them."""
        raise TypeError(f"{type(self).__name__} must define scores")

    def differences(self, records: Records, metric: str | None) -> dict[str, Estimate]:
        """Of each method the difference to the baseline by which it is recommended. metric: of a user's own requests."""
        raise TypeError(f"{type(self).__name__} must define differences")

    def about(self, records: Records) -> dict[str, Any]:
        """What a results file says of what was asked."""
        raise TypeError(f"{type(self).__name__} must define about")

    def table(self, scores: Scores, methods: Collection[str]) -> tuple[list[str], list[list[str]]]:
        """Header and lines of the categories; empty where there are none."""
        return [], []

    def pictures(self, records: Records, methods: Sequence[Compressor]) -> list[dict[str, Any]]:
        """What methods kept of a few samples, for the page."""
        return []


class Benchmark(Asked):
    """An embedded benchmark."""

    meaning = MEANING

    def __init__(
        self, loaded: Loaded, methods: Sequence[Compressor], split: str, limit: int | None, batch_size: int, folder: Path | None,
        suite: Suite = BUILTIN, categories: Sequence[str] | None = None,
    ):  # fmt: skip
        self.split, self.suite = split, suite
        self.questions = suite.samples(split, limit, categories or suite.categories)
        self.run: Run = Run(loaded, self.questions, methods, batch_size=batch_size, output_dir=folder, suite=suite)
        self.line = f"{len(self.questions)} questions x {len(self.run.arms)} arms (with the no-image floor)"

    def scores(self, records: Records) -> Scores:
        rows = rows_of(records, self.run.methods, self.suite.categories, seed=self.run.loaded.options.seed)
        return {m.spec(): {r["task"]: r for r in rows if r["method"] == m.spec()} for m in self.run.methods}

    def differences(self, records: Records, metric: str | None) -> dict[str, Estimate]:
        return differences(records, self.run.methods, self.suite.categories, seed=self.run.loaded.options.seed)

    def about(self, records: Records) -> dict[str, Any]:
        return {
            "split": self.split, "questions": len(self.questions), "images": len({s.image for s in self.questions}),
            "questions_fingerprint": fingerprint_of({"ids": sorted(s.id for s in self.questions)}),
            "interval": "95%, 2000 paired resamples of images", **self.suite.blind(self.questions),
        }  # fmt: skip

    def table(self, scores: Scores, methods: Collection[str]) -> tuple[list[str], list[list[str]]]:
        rows = [row for name, by_task in scores.items() if name in methods for row in by_task.values()]
        return text_table(rows, self.suite.categories) if rows else ([], [])

    def pictures(self, records: Records, methods: Sequence[Compressor]) -> list[dict[str, Any]]:
        return kept_pictures(self.run.loaded, methods, self.questions, records, self.run.size) if methods else []


class OwnRequests(Asked):
    """The requests in the file ``data``. Raises ``MllmEfficientError`` naming the line of one that the model does not take."""

    meaning = DATA_MEANING

    def __init__(
        self, loaded: Loaded, methods: Sequence[Compressor], requests: Sequence[Request], data: Path, batch_size: int,
        max_new_tokens: int | None, folder: Path | None,
    ):  # fmt: skip
        self.run: Agreement = Agreement(
            loaded, requests, methods, batch_size, folder, prompts=prompts_of(requests, loaded, data), data=data,
            max_new_tokens=max_new_tokens or MAX_NEW_TOKENS,
        )  # fmt: skip
        text_only = sum(not r.images for r in requests)
        self.line = f"{len(requests)} requests ({text_only} without an image) x {len(self.run.arms)} methods"

    def scores(self, records: Records) -> Scores:
        rows = agreement_rows(records, self.run.methods, seed=self.run.loaded.options.seed)
        return {m.spec(): cell_of([r for r in rows if r["method"] == m.spec()]) for m in self.run.methods}

    def differences(self, records: Records, metric: str | None) -> dict[str, Estimate]:
        assert metric is not None
        return agreement_differences(records, self.run.methods, metric, seed=self.run.loaded.options.seed)

    def about(self, records: Records) -> dict[str, Any]:
        return about(self.run.samples, records)
