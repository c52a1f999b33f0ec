"""Output folders that one process at a time writes to."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import MllmEfficientError


@contextlib.contextmanager
def owned(folder: Path, name: str, option: str) -> Iterator[None]:
    """The folder belongs to this process inside. name: of the lock's file. option: how the user names a folder.

    Raises ``MllmEfficientError`` where another process owns it, which it names, or nothing can be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / name).open("a+")
    except OSError as error:
        raise MllmEfficientError(f"cannot write to {folder}: {error.strerror}") from None
    with handle:
        with contextlib.suppress(ImportError):  # Windows has no advisory locks: two processes are the user's care there
            import fcntl

            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                handle.seek(0)
                owner = handle.read().strip() or "another one"
                raise MllmEfficientError(f"process {owner} is writing to {folder}: wait for it or use another {option}") from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield
