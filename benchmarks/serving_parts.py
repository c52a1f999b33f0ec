"""Where the time of a request goes in a server of vLLM: a plugin that its processes load, and what reads it.

A process adds up the CPU time of the thread that runs each part. Its rest is the CPU time of the whole process less those: of further
threads too, so servers run on one processor.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FOLDER = "SERVING_PARTS"  # variable of the environment: where processes write
PERIOD = 0.2  # seconds between two writings of a process
PICTURES, TOWER, METHOD, HEAD = "pictures and prompt", "tower", "method", "head"
PROMPTS, DECODING = "decoder, prompts", "decoder, next tokens"
FRONT, ENGINE, WORKER = "front end, rest", "engine, rest", "worker, rest"


class Ledger:
    """CPU seconds by part, of this process, which a thread writes down. who: what its rest is called."""

    def __init__(self, folder: Path, port: int):
        self.folder, self.port, self.who = folder, port, FRONT
        self.begin()
        os.register_at_fork(after_in_child=self.begin)

    def begin(self) -> None:
        self.parts: dict[str, float] = {}
        threading.Thread(target=self.keep, daemon=True).start()

    def add(self, part: str, seconds: float) -> None:
        self.parts[part] = self.parts.get(part, 0.0) + seconds

    def keep(self) -> None:
        file = self.folder / f"{self.port}-{os.getpid()}.json"
        partial = file.with_suffix(".part")
        while True:
            partial.write_text(json.dumps({"who": self.who, "parts": dict(self.parts)}))
            partial.replace(file)
            time.sleep(PERIOD)


def register() -> None:
    """The plugin: times the parts where they are called. vLLM loads it in every one of its processes."""
    from vllm.multimodal.processing import BaseMultiModalProcessor
    from vllm.v1.engine.core import EngineCore

    from mllm_efficient.patches.vllm import models

    command = Path(f"/proc/{os.getsid(0)}/cmdline").read_text().split("\0")
    if "--port" not in command:  # the client
        return
    ledger = Ledger(Path(os.environ[FOLDER]), int(command[command.index("--port") + 1]))
    timed(BaseMultiModalProcessor, "apply", ledger, lambda *_, **__: PICTURES)
    for cls in (models.CompressedLlava, models.CompressedLlavaNext, models.CompressedLlavaOnevision):
        timed(cls, "_process_image_input", ledger, lambda *_, **__: TOWER)
        timed(cls, "compute_logits", ledger, lambda *_, **__: HEAD)
        timed(cls, "forward", ledger, decoding)
        named(cls, ledger, WORKER)
    models.each_alone = part_of(models.each_alone, ledger, lambda *_, **__: METHOD)
    named(EngineCore, ledger, ENGINE, "_initialize_kv_caches")  # its __init__ is what loads this


def named(cls: Any, ledger: Ledger, who: str, method: str = "__init__") -> None:
    """The process that calls this method is called so."""
    stock = getattr(cls, method)

    @functools.wraps(stock)  # vLLM asks the signature of a model what it takes
    def begin(self: Any, *args: Any, **kwargs: Any) -> Any:
        ledger.who = who
        return stock(self, *args, **kwargs)

    setattr(cls, method, begin)


def decoding(*_: Any, **__: Any) -> str:
    """Whether a step of the decoder has parts of prompts in it, or a token of each request alone."""
    from vllm.forward_context import get_forward_context

    about = get_forward_context().attn_metadata
    about = next(iter(about.values())) if isinstance(about, dict) else about
    return PROMPTS if about is not None and about.max_query_len > 1 else DECODING


def timed(cls: Any, name: str, ledger: Ledger, part: Callable[..., str]) -> None:
    setattr(cls, name, part_of(getattr(cls, name), ledger, part))


def part_of(stock: Callable[..., Any], ledger: Ledger, part: Callable[..., str]) -> Callable[..., Any]:
    """The function, its time added to ``part(*its arguments)``."""

    @functools.wraps(stock)
    def run(*args: Any, **kwargs: Any) -> Any:
        begin = time.thread_time()
        try:
            return stock(*args, **kwargs)
        finally:
            ledger.add(part(*args, **kwargs), time.thread_time() - begin)

    return run


class Probe:
    """The plugin's folder in the environment of processes that are started from now on, and what their runs took."""

    def __init__(self, folder: Path):
        self.folder, self.runs = folder / "parts", dict[str, list[dict[str, float]]]()
        self.folder.mkdir()
        about = folder / "serving_parts-0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: serving-parts\nVersion: 0\n")
        (about / "entry_points.txt").write_text("[vllm.general_plugins]\nserving_parts = serving_parts:register\n")
        paths = [str(folder), str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", "")]
        os.environ.update({FOLDER: str(self.folder), "PYTHONPATH": os.pathsep.join(p for p in paths if p)})

    def so_far(self, url: str) -> dict[str, float]:
        """Seconds by part of a server's processes."""
        time.sleep(2 * PERIOD)
        total: dict[str, float] = {}
        for file in self.folder.glob(f"{url.rpartition(':')[2]}-*.json"):
            said, (cpu, alive) = json.loads(file.read_text()), cpu_seconds(int(file.stem.partition("-")[2]))
            if alive:
                for part, seconds in {**said["parts"], said["who"]: cpu - sum(said["parts"].values())}.items():
                    total[part] = total.get(part, 0.0) + seconds
        return total

    def around(self, ask: Callable[..., dict[str, Any]], warmup: int) -> Callable[..., dict[str, Any]]:
        """``ask`` with what every run of a server takes noted, but for its first ones."""
        seen: dict[str, int] = {}

        def run(url: str, *args: Any, **settings: Any) -> dict[str, Any]:
            before = self.so_far(url)
            out = ask(url, *args, **settings)
            after = self.so_far(url)
            seen[url] = seen.get(url, 0) + 1
            if seen[url] > warmup:
                self.runs.setdefault(url, []).append({part: after[part] - before.get(part, 0.0) for part in after})
            return out

        return run

    def of(self, url: str, requests: int) -> dict[str, float]:
        """Milliseconds of one request by part, the median over the runs; empty without any."""
        from statistics import median

        runs = self.runs.get(url, [])
        return {part: 1000 * median(run.get(part, 0.0) for run in runs) / requests for part in sorted({p for run in runs for p in run})}


def cpu_seconds(pid: int) -> tuple[float, bool]:
    """That a process has taken, and whether it is there."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0, False
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), True


def excess(own: Mapping[str, float], base: Mapping[str, float], ideal: float) -> dict[str, float]:
    """What each part takes beyond the uncompressed server's same part over the ideal: these add up to what the whole takes beyond it."""
    return {part: own.get(part, 0.0) - base.get(part, 0.0) / ideal for part in dict.fromkeys((*base, *own))}


if __name__ == "__main__":
    sys.exit("this is loaded by serving.py")
