"""One line of JSON per answered sample, appended as it comes, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from mllm_efficient.errors import MllmEfficientError
from mllm_efficient.writing import write_text, writing

RUN_FILE, SAMPLES_FILE = "run.json", "samples.jsonl"


def fingerprint_of(config: dict[str, Any]) -> str:
    """A short hash of a configuration; two runs may share a folder only if theirs agree."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


class Records:
    """The answers of a run, in memory and, with a folder, in ``samples.jsonl``.

    A torn last line (a kill in mid-write) is dropped. A folder belongs to one process at a time and to one
    configuration; anything else raises and leaves the folder as it was.
    """

    def __init__(self, folder: Path | None, config: dict[str, Any]):
        self.rows: dict[tuple[str, str], dict[str, Any]] = {}
        self.fingerprint = fingerprint_of(config)
        self.file = self._lock = None
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(folder)
        except OSError as error:
            raise MllmEfficientError(f"cannot write to {folder}: {error.strerror}") from None
        path = folder / SAMPLES_FILE
        end = self._read(path, folder, config) if path.exists() else 0
        with writing(path):
            self.file = path.open("ab")
            self.file.truncate(end)
        write_text(folder / RUN_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")

    def _read(self, path: Path, folder: Path, config: dict[str, Any]) -> int:
        """Reads finished lines; returns where the last of them ends."""
        end = 0
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
            if not line.endswith(b"\n"):
                break  # torn by a kill; only the last line can be
            try:
                row = json.loads(line)
                key, made_by, error = (row["method"], row["id"]), row["fingerprint"], row.get("error")
            except (ValueError, KeyError, TypeError, AttributeError):
                raise MllmEfficientError(f"{path} line {number} is no record of an evaluation: use another --output-dir") from None
            if made_by != self.fingerprint:
                raise MllmEfficientError(f"{folder} holds another run ({_difference(folder, config)}): use another --output-dir")
            self.rows.pop(key, None)  # a later line stands for an earlier one
            if error is None:  # what failed is asked again
                self.rows[key] = row
            end += len(line)
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
        for handle in (self.file, self._lock):
            if handle is not None:
                with contextlib.suppress(OSError):  # of lines that a full disk did not take, which ``put`` has told
                    handle.close()


def _lock(folder: Path):
    """An exclusive lock on the folder until it is closed or the process ends."""
    handle = (folder / ".lock").open("w")
    try:
        import fcntl
    except ImportError:  # Windows: no advisory locks; two processes on one folder are the user's care there
        return handle
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise MllmEfficientError(f"another process is writing to {folder}: wait for it or use another --output-dir") from None
    return handle


def _difference(folder: Path, config: dict[str, Any]) -> str:
    try:
        old = json.loads((folder / RUN_FILE).read_text())
    except (OSError, ValueError):
        return "of another configuration"
    changed = [f"{k}: {old.get(k)!r} there, {config.get(k)!r} now" for k in sorted({*old, *config}) if old.get(k) != config.get(k)]
    return "; ".join(changed) or "of another configuration"
