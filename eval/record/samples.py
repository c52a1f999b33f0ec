"""One line of JSON per answered sample, appended as it comes, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from mllm_efficient.errors import MllmEfficientError
from mllm_efficient.locking import owned
from mllm_efficient.parsing import finished_lines
from mllm_efficient.writing import write_text, writing

RUN_FILE, SAMPLES_FILE, LOCK_FILE = "run.json", "samples.jsonl", ".lock"
T = TypeVar("T")


def fingerprint_of(config: dict[str, Any]) -> str:
    """A short hash of a configuration; two runs may share a folder only if theirs agree."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def read_lines(path: Path, read: Callable[[Any], T], what: str) -> tuple[list[T], int]:
    """What ``read`` makes of every line of a file, a torn last one left out, and the byte at which the last whole one ends.

    Raises:
        MllmEfficientError: a line that is not JSON, or of which ``read`` makes nothing. what: of what it then is no record.
    """
    out, end = list[T](), 0
    for number, line in enumerate(finished_lines(path), start=1):
        try:
            out.append(read(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise MllmEfficientError(f"{path} line {number} is no record of {what}: use another --output-dir") from None
        end += len(line)
    return out, end


class Records:
    """The answers of a run, in memory and, with a folder, in ``samples.jsonl``.

    A torn last line is dropped. A folder belongs to one process at a time and to one
    configuration; anything else raises and leaves the folder as it was.
    """

    def __init__(self, folder: Path | None, config: dict[str, Any]):
        self.rows: dict[tuple[str, str], dict[str, Any]] = {}
        self.fingerprint = fingerprint_of(config)
        self.file: BinaryIO | None = None
        self._owned = contextlib.ExitStack()
        if folder is None:
            return
        with contextlib.ExitStack() as owned_here:
            owned_here.enter_context(owned(folder, LOCK_FILE, "--output-dir"))
            path = folder / SAMPLES_FILE
            end = self._read(path, folder, config)
            with writing(path):
                self.file = path.open("ab")
                self.file.truncate(end)
            write_text(folder / RUN_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")
            self._owned = owned_here.pop_all()

    def _read(self, path: Path, folder: Path, config: dict[str, Any]) -> int:
        """Reads finished lines; returns where the last of them ends."""
        found, end = read_lines(path, lambda r: (r["fingerprint"], (r["method"], r["id"]), r.get("error"), r), "an evaluation")
        for made_by, key, error, row in found:
            if made_by != self.fingerprint:
                raise MllmEfficientError(f"{folder} holds another run ({_difference(folder, config)}): use another --output-dir")
            self.rows.pop(key, None)  # a later line stands for an earlier one
            if error is None:  # what failed is asked again
                self.rows[key] = row
        return end

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self.rows

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Keeps the rows whose (method, id) are new."""
        self.put([r for r in rows if (r["method"], r["id"]) not in self.rows])

    def put(self, rows: list[dict[str, Any]]) -> None:
        """Keeps the rows in place of those there are."""
        new = [{**r, "fingerprint": self.fingerprint} for r in rows]
        for row in new:
            self.rows[row["method"], row["id"]] = row
        if self.file is not None:
            with writing(Path(self.file.name)):
                self.file.write("".join(json.dumps(r) + "\n" for r in new).encode())
                self.file.flush()

    def close(self) -> None:
        if self.file is not None:
            with contextlib.suppress(OSError):  # of lines that a full disk did not take, which ``put`` has told
                self.file.close()
        self._owned.close()


def _difference(folder: Path, config: dict[str, Any]) -> str:
    try:
        old = json.loads((folder / RUN_FILE).read_text())
    except (OSError, ValueError):
        return "of another configuration"
    changed = [f"{k}: {old.get(k)!r} there, {config.get(k)!r} now" for k in sorted({*old, *config}) if old.get(k) != config.get(k)]
    return "; ".join(changed) or "of another configuration"
