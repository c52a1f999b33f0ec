"""Images that the model could make nothing of: noted by the worker that saw it, so that the request, and no other, ends with an error.

A worker knows no requests and must not raise, which would end the engine for everybody. So it notes the image by the name that the
front end gave it (``fingerprint``) in a folder that all processes of a server on one machine share; the scheduler, which knows whose
image it is, reads it after every step. On several machines those of other machines are logged alone.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import shutil
import tempfile
from pathlib import Path

FOLDER = "MLLM_EFFICIENT_VLLM_FAILURES"  # variable of the environment, for the processes that a server starts
MOST = 4096  # files in a folder: the oldest half goes where there are more
REQUESTS = "requests"
# What vLLM makes of a client's id X (``X-Request-Id``): "chatcmpl-X", "_0" or "-0" of several prompts, eight digits of its own; before it
# "0_" of several answers.
NAMED = r"(?:\d+_)?(?:chatcmpl|cmpl|generate-tokens)-{}(?:[-_]\d+)?(?:-[0-9a-f]{{8}})?"


def folder() -> Path | None:
    """Where failures are noted; None where nothing is served compressed."""
    name = os.environ.get(FOLDER)
    return Path(name) if name else None


def share() -> None:
    """Makes the folder, for this process and those that it starts. Only the first call in a server makes one."""
    if folder() is None:
        made = Path(tempfile.mkdtemp(prefix="mllm-efficient-"))
        (made / REQUESTS).mkdir()
        os.environ[FOLDER] = str(made)
        atexit.register(_remove, made, os.getpid())


def _remove(made: Path, process: int) -> None:
    """Of the process that made it alone: those that it started have the folder by its name."""
    if os.getpid() == process:
        shutil.rmtree(made, ignore_errors=True)


def note(image: int, why: str) -> None:
    """Notes that an image failed. image: its fingerprint. Never raises: a full disk must not end the engine either."""
    where = folder()
    if where is not None:
        _write(where / str(image), why)


def note_request(request_id: str, why: str) -> None:
    """Notes why a request ends with an error."""
    where = folder()
    if where is not None:
        _write(where / REQUESTS / _file_name(request_id), why)


def of_request(given: str) -> str | None:
    """Why the request ended with an error that a client gave this id; None where none of it is known."""
    where, name = folder(), re.compile(NAMED.format(re.escape(_file_name(given))))
    with contextlib.suppress(OSError):
        for path in [] if where is None else (where / REQUESTS).iterdir():
            if name.fullmatch(path.name):
                return path.read_text()
    return None


def number() -> int:
    """How many images are noted."""
    where = folder()
    with contextlib.suppress(OSError):
        return 0 if where is None else sum(path.is_file() for path in where.iterdir())
    return 0


class Reader:
    """What has been noted."""

    def __init__(self) -> None:
        self.known: dict[int, str] = {}

    def read(self) -> dict[int, str]:
        """Why each image failed, by its fingerprint. A look at an empty folder takes microseconds."""
        where = folder()
        if where is not None:
            with contextlib.suppress(OSError):
                for name in os.listdir(where):
                    if name.isdigit() and int(name) not in self.known:
                        self.known[int(name)] = (where / name).read_text()
        return self.known


def _file_name(request_id: str) -> str:
    return request_id.replace("/", "_")


def _write(path: Path, text: str) -> None:
    with contextlib.suppress(OSError):
        if path.exists():
            return
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(text)
        partial.replace(path)
        written = sorted((p for p in path.parent.iterdir() if p.is_file()), key=lambda p: p.stat().st_mtime_ns)
        if len(written) > MOST:
            for old in written[: MOST // 2]:
                old.unlink(missing_ok=True)
