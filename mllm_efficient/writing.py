"""Files that are written whole or not at all, and what is said where they cannot be."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from .errors import MllmEfficientError

REASON = re.compile(r"I/O error: (.*) \(os error \d+\)")  # in what safetensors says
UNFINISHED = ("PytorchStreamWriter", "inline_container")  # in what torch.save says, which never has the cause


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Where a disk is full or read-only, ``MllmEfficientError`` names the path: the system names none once a file is open."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.strerror is None:
            raise
        raise MllmEfficientError(f"cannot write {path}: {error.strerror}") from error
    except RuntimeError as error:
        if not any(name in str(error) for name in UNFINISHED):
            raise
        raise MllmEfficientError(f"cannot write {path}: torch could not finish a file (is the disk full?)") from error
    except Exception as error:
        reason = REASON.search(str(error))
        if type(error).__name__ != "SafetensorError" or reason is None:
            raise
        raise MllmEfficientError(f"cannot write {path}: {reason[1]}") from error


def write_text(path: Path, text: str) -> None:
    """Writes a file in one step: a reader finds the old one or the new one. Raises ``MllmEfficientError``."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise MllmEfficientError(f"cannot write {path}: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
