"""What a sweep keeps in its folder beside the answers: timings, how far it has come, and the lock that makes it one process's."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllm_efficient import locking
from mllm_efficient.errors import MllmEfficientError
from mllm_efficient.writing import write_text, writing

from .samples import SAMPLES_FILE, fingerprint_of, read_lines

BENCH_FILE, LOCK_FILE, BEGUN_FILE = "bench.jsonl", "sweep.lock", "unfinished.json"
SERVERS = "servers"  # suite of answers that running servers gave to a user's own requests


class BenchFile:
    """Finished bench rows by method, one line of JSON each, in ``bench.jsonl``; those of other settings are passed over.

    A torn last line is dropped.
    """

    def __init__(self, folder: Path, config: dict[str, Any]):
        self.path, self.fingerprint = folder / BENCH_FILE, fingerprint_of(config)
        self.rows: dict[str, dict[str, Any]] = {}
        self.about: dict[str, Any] = {}
        entries, end = read_lines(self.path, lambda e: (e["fingerprint"], e["method"], e["row"], e["about"]), "a sweep")
        for made_by, method, row, about in entries:
            if made_by == self.fingerprint:
                self.rows[method] = row
                self.about = self.about or about
        if self.path.exists():
            os.truncate(self.path, end)

    def add(self, rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
        """Keeps what did not fail; a method that is there already stays as it is."""
        new = [r for r in rows if r["failed"] is None and r["method"] not in self.rows]
        lines = [json.dumps({"fingerprint": self.fingerprint, "method": r["method"], "row": r, "about": about}) + "\n" for r in new]
        with writing(self.path), self.path.open("a") as file:
            file.write("".join(lines))
        self.rows |= {r["method"]: r for r in new}
        self.about = self.about or about


def begin(folder: Path, arms: Sequence[str], answers: int, command: str) -> None:
    """Notes what a sweep is going to answer, for ``unfinished``."""
    write_json(folder / BEGUN_FILE, {"arms": list(arms), "answers": answers, "command": command})


def unfinished(folder: Path) -> str | None:
    """How far the sweep in a folder has come and what to do; None where none has begun. To be asked where there is no report."""
    try:
        begun = json.loads((folder / BEGUN_FILE).read_text())
        arms, answers, command = set(begun["arms"]), begun["answers"], begun["command"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    try:
        there, _ = read_lines(folder / SAMPLES_FILE, lambda r: (r["method"], r["id"]), "an evaluation")
    except MllmEfficientError:
        return None
    done = len({(arm, sample) for arm, sample in there if arm in arms})
    return f"unfinished: {min(done, answers)} of {answers} answers; run the same sweep again: {command}"


def owned(folder: Path) -> contextlib.AbstractContextManager[None]:
    """The folder belongs to this process inside; another process that owns it is named in the error."""
    return locking.owned(folder, LOCK_FILE, "--output-dir")


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file in one step: a reader finds the old one or the new one."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
