"""A process that imports vLLM once, which costs more than most engines do, and a fork of it for every engine and front end.

``python -m tests.vllm_forks`` reads jobs from stdin, a line of JSON each: ``kind`` (``engine`` or ``front_end``), ``environment``
(variables of the fork alone), ``job``. Of each it prints a line: ``rc``, ``found``, ``said`` (all that the fork printed).
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import select
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

# Without vLLM's plugins, which every fork loads for itself.
USED = (
    "vllm.entrypoints.llm", "vllm.v1.engine.core", "vllm.v1.worker.cpu_worker", "vllm.model_executor.models.llava",
    "vllm.model_executor.models.qwen2_5_vl", "vllm.lora.request",
)  # fmt: skip
QUIET = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


@functools.cache
def server() -> subprocess.Popen:
    """The one of this process; it ends when its stdin does."""
    from .vllm_models import ENVIRONMENT

    return subprocess.Popen(
        [sys.executable, "-m", "tests.vllm_forks"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**ENVIRONMENT, **QUIET}, cwd=Path(__file__).parents[1],
    )  # fmt: skip


def forked(kind: str, job, environment: dict[str, str] | None, timeout: float):
    """What a fresh fork makes of a job; an AssertionError with all it said if it fails."""
    process = server()
    process.stdin.write(json.dumps({"kind": kind, "environment": environment or {}, "job": job}) + "\n")
    process.stdin.flush()
    if not select.select([process.stdout], [], [], timeout)[0]:
        process.kill()
        server.cache_clear()
        raise TimeoutError(f"no answer of vLLM after {timeout} s")
    answer = json.loads(process.stdout.readline())
    assert answer["rc"] == 0, answer["said"]
    return answer["found"]


def run(kind: str, environment: dict[str, str], job, folder: Path) -> None:
    """The fork's part, which never returns."""
    code = 1
    try:
        said = os.open(folder / "said", os.O_WRONLY | os.O_CREAT)
        os.dup2(said, 1), os.dup2(said, 2)
        os.environ.update(environment)
        from . import vllm_engine, vllm_processor

        found = {"engine": vllm_engine.answers, "front_end": vllm_processor.counts}[kind](job)
        (folder / "found").write_text(json.dumps(found))
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def main() -> None:
    for name in USED:
        importlib.import_module(name)
    gc.freeze()  # vLLM collects garbage again and again, each time looking at all that was imported

    for line in sys.stdin:
        asked = json.loads(line)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if (child := os.fork()) == 0:
                run(asked["kind"], asked["environment"], asked["job"], folder)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            said = (folder / "said").read_text(errors="replace")
            found = json.loads((folder / "found").read_text()) if code == 0 else None
        print(json.dumps({"rc": code, "found": found, "said": said}), flush=True)


if __name__ == "__main__":
    main()
