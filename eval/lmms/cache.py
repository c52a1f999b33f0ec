"""Answers that are kept from run to run, by a hash of everything they depend on."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

from mllm_efficient.errors import MllmEfficientError

FILE = "answers.sqlite"
WAIT = 60.0  # seconds for another process that is writing


class AnswerCache:
    """One database in a folder, which several processes may share. What is put there is on disk when ``put`` returns."""

    def __init__(self, folder: Path):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._base = sqlite3.connect(folder / FILE, timeout=WAIT)
            self._base.execute("PRAGMA synchronous = NORMAL")
            with self._base:
                self._base.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)")
        except (OSError, sqlite3.Error) as error:
            raise MllmEfficientError(f"cannot keep answers in {folder}: {error}") from None

    def get(self, key: str) -> dict[str, Any] | None:
        """The answer under a key, or None."""
        row = self._base.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, answers: dict[str, dict[str, Any]]) -> None:
        with self._base:
            self._base.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", [(k, json.dumps(v)) for k, v in answers.items()])

    def close(self) -> None:
        self._base.close()
