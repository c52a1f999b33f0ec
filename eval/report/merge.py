"""Finished runs: reading what ``sweep`` and ``eval`` leave in a folder, and merging those that can be compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mllm_efficient.errors import MllmEfficientError

from ..agreement_rows import cell_of
from ..record.bench_file import SERVERS, unfinished
from .recommend import recommend
from .rows import row_of

SAME = (
    "suite", "split", "questions", "images", "questions_fingerprint", "weights", "quantization", "dtype", "device", "attention",
    "image_processor", "adapter.weights", "seed", "versions.mllm_efficient", "versions.torch", "versions.transformers", "versions.numpy",
    "versions.pillow",
)  # fmt: skip
SAME_IF_BOTH = (
    "questions_fingerprint",
    "form",
    "normalisation",
    "image_size",
    "image_padding",
    "prompt",
    "processor_kwargs",
    "processor",
    "default_max_new_tokens",
    "max_new_tokens",
    "flops_of",
    "workload",
    "bench.repeats",
    "bench.machine.cpu",
    "bench.machine.threads",
)
MAX_DROP = 1.0


@dataclass
class Finished:
    """One run or several merged ones. metas: of each run; pictures: ``{"budget", "samples"}``, empty where there are none."""

    rows: list[dict[str, Any]]
    metas: list[dict[str, Any]]
    names: list[str]
    pictures: dict[str, Any] = field(default_factory=dict)

    @property
    def meta(self) -> dict[str, Any]:
        return self.metas[0]

    @property
    def matched(self) -> bool:
        """Whether budgets were solved for equal FLOPs."""
        return any(m.get("match") for m in self.metas)

    @classmethod
    def read(cls, folder: Path) -> Finished:
        """The run in a folder of ``sweep`` (report.json) or ``eval`` (results.json).

        Raises ``MllmEfficientError`` where none has finished, saying how far a sweep came.
        """
        if not folder.is_dir():
            raise MllmEfficientError(f"no run folder {folder}")
        file = next((folder / n for n in ("report.json", "results.json") if (folder / n).is_file()), None)
        if file is None:
            if began := unfinished(folder):
                raise MllmEfficientError(f"{folder} is {began}")
            raise MllmEfficientError(f"{folder} holds no finished run (no report.json of sweep, no results.json of eval)")
        try:
            content = json.loads(file.read_text())
            rows, meta = content["rows"], content["meta"]
            if meta.get("suite") == SERVERS:
                raise MllmEfficientError(f"{folder} has answers of running servers, of which no report is made: {file.name} has their rows")
            if file.name == "results.json":
                rows = of_eval(rows, meta)
            if rows[0]["role"] != "baseline":
                raise ValueError("the first row is not the baseline")
            pictures = json.loads((folder / "pictures.json").read_text()) if (folder / "pictures.json").is_file() else {}
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise MllmEfficientError(f"{file} is not a report of this package: {type(error).__name__}: {error}") from None
        return cls(rows, [meta], [str(folder)], pictures)

    def recommendation(self, max_drop: float | None = None) -> dict[str, Any]:
        """For ``max_drop`` points, or for the strictest of what the runs were asked for."""
        asked = [m["max_drop"] for m in self.metas if m.get("max_drop") is not None]
        return recommend(self.rows, max_drop if max_drop is not None else min(asked, default=MAX_DROP))


def of_eval(rows: Sequence[dict[str, Any]], meta: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of ``eval`` (one per category) as rows of a sweep without times; FLOPs where the run says them."""
    costs = (meta.get("flops") or {}).get("ratios", {})
    by_method: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        # second turns, corrupted pictures and further metrics are no categories
        if row.get("turns", 1) == 1 and row.get("primary", True) and row.get("corruption") is None:
            by_method.setdefault(row["method"], []).append(row)
    out = []
    for method, own in by_method.items():
        by_task = cell_of(own) if "unit" in own[0] else {r["task"]: r for r in own}
        total = by_task["overall"]
        asked = (
            f"tokens={total['tokens']}" if total["tokens"] is not None else f"keep={total['keep']:g}" if total["keep"] is not None else ""
        )
        failed = f"{total['failures']} of {total['n']} answers failed" if total["failures"] else None
        role, asked = ("baseline", "") if method == rows[0]["method"] else (total.get("role", "method"), asked)
        out.append(row_of(method, role, asked, by_task, None, None, None, None, failed) | costs.get(method, {}))
    return out


def merge(runs: Sequence[Finished]) -> Finished:
    """All cells of runs that can be compared, the baseline once. Raises ``MllmEfficientError`` naming what differs."""
    first = runs[0]
    rows = {r["method"]: r for r in first.rows}
    for other in runs[1:]:
        where = f"{first.names[0]} and {other.names[0]} cannot be merged"
        for name in SAME + SAME_IF_BOTH:
            here, there = _get(first.meta, name), _get(other.meta, name)
            if here != there and not (name in SAME_IF_BOTH and None in (here, there)):
                raise MllmEfficientError(f"{where}: {name} is {_short(here)} in the first and {_short(there)} in the second")
        for row in other.rows:
            own = rows.setdefault(row["method"], row)
            if own["score"] != row["score"] and None not in (own["score"], row["score"]):
                raise MllmEfficientError(
                    f"{where}: score of {row['method']} is {own['score']} in the first and {row['score']} in the second"
                )
            better = (own["failed"] is not None, own["ttft_ms"] is None, own["flops_ratio"] is None)
            if (row["failed"] is not None, row["ttft_ms"] is None, row["flops_ratio"] is None) < better:
                rows[row["method"]] = row
    pictures = next((r.pictures for r in runs if r.pictures.get("samples")), {})
    return Finished(list(rows.values()), [m for r in runs for m in r.metas], [n for r in runs for n in r.names], pictures)


def _get(meta: dict[str, Any], name: str) -> Any:
    value: Any = meta
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else text[:79] + "…"
