"""One ``vllm serve`` for the uncompressed model and one for each method, all running at the same time."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..compressors.base import Compressor
from ..compressors.none import NoCompression
from ..embedded import model_source
from ..errors import MllmEfficientError, UnsupportedModelError
from ..loading.lora import is_adapter
from ..loading.models import ModelOptions
from ..trained.files import SERVED as KEY
from .arms import BASELINE, METHOD
from .serving import Load, Served
from .workload import usual_size

START = 1800.0  # seconds that a server may take to answer
KV_SPACE = "4"  # GiB of a server's KV cache on a CPU, unless VLLM_CPU_KVCACHE_SPACE says otherwise
BY_SIZE = ("llava", "llava_next", "llava_onevision")  # types whose plans follow from a picture's size, without their processor
SLACK = 128  # tokens of a prompt beside text and images: the chat template's


@dataclass(frozen=True)
class Plan:
    """What a server is started with. source: folder or hub id; arguments: of ``vllm serve``; full, kept, length: see ``Served``."""

    name: str
    role: str
    source: str
    arguments: tuple[str, ...]
    full: int
    kept: int
    length: int


class Launch:
    """Plans for the baseline and each method. Raises before anything starts for what cannot be served.

    config: of transformers, for ``random_weights``; else it is the model's. image_size: None is the size that the model takes.
    """

    def __init__(
        self, options: ModelOptions, methods: Sequence[Compressor], *, random_weights: bool, image_size: tuple[int, int] | None, images: int
    ):
        from ..patches.vllm import SERVED
        from ..patches.vllm.settings import require_served
        from ..patches.vllm.shapes import Shapes

        self.options, self.random, self.images = options, random_weights, images
        if is_adapter(options.model):
            raise UnsupportedModelError(f"{options.model} is an adapter, and servers are started with whole weights: merge it first")
        self.source = model_source(options.model)
        self.config = self._config()
        name = (getattr(self.config, "architectures", None) or [type(self.config).__name__])[0]
        if name not in SERVED:
            raise UnsupportedModelError(f"{options.model} is a {name}, and the served models are {', '.join(SERVED)}")
        self.shapes = Shapes(self.config)
        if self.config.model_type not in BY_SIZE:
            raise UnsupportedModelError(f"{name} is not started here: run a server for each method and give --server NAME=URL for each")
        self.image_size = image_size or usual_size(self.shapes.adapter)
        self.methods = [NoCompression(), *(m for m in methods if m.spec() != NoCompression.name)]
        for method in self.methods[1:]:
            if method.as_resizer is not None and self.shapes.adapter.usual() is not None:
                continue
            require_served(method)
            self.shapes.check(method)
            if self.random and method.as_projector is not None:
                raise MllmEfficientError(f"{method.name} needs its weights: leave --random-weights out")

    def _config(self) -> Any:
        if self.random:
            from .random_model import config_of

            for name in ("revision", "trust_remote_code"):
                if getattr(self.options, name):
                    raise MllmEfficientError(f"--{name.replace('_', '-')} has no effect with --random-weights: leave it out")
            return config_of(self.options.model)
        from transformers import AutoConfig

        try:
            remote = self.options.trust_remote_code
            return AutoConfig.from_pretrained(self.source, revision=self.options.revision, trust_remote_code=remote)
        except (OSError, ValueError) as error:
            raise MllmEfficientError(f"--model {self.options.model}: {str(error).splitlines()[0]}") from None

    def plans(self, folder: Path) -> list[Plan]:
        """What to start, with the folders that this takes written into ``folder``."""
        out: list[Plan] = []
        source = self.source
        if self.random:
            from .random_folder import random_folder

            source = str(folder / "model")
            random_folder(self.config, Path(source))
        width, height = self.image_size
        none = self.shapes.plan(NoCompression(), height, width)
        for i, method in enumerate(self.methods):
            plan = self.shapes.plan(method, height, width)
            length = plan.after.length if plan.after is not None else plan.kept + plan.separators
            counts = [n * self.images for n in (none.shape.n, plan.kept, none.shape.length if i == 0 else length)]
            more: list[str] = []
            if i == 0:
                own = source
            elif method.as_resizer is not None or method.as_projector is not None:
                own = str(folder / f"arm{i}")
                self._write(method, plan, Path(own))
            else:
                own, more = source, ["--hf-overrides", json.dumps({KEY: method.to_dict()})]
            more += ["--load-format", "dummy"] if self.random else []
            more += ["--trust-remote-code"] if self.options.trust_remote_code else []
            more += ["--revision", self.options.revision] if self.options.revision and own == source else []
            out.append(Plan(method.spec(), METHOD if i else BASELINE, own, tuple(more), *counts))
        return out

    def _write(self, method: Compressor, plan: Any, folder: Path) -> None:
        """The folder of a smaller model, or of one with a trained projector."""
        if self.random:
            from .random_folder import random_folder

            smaller = copy.deepcopy(self.config)
            smaller.vision_config.image_size = plan.after.planes[-1].rows * smaller.vision_config.patch_size
            smaller.image_seq_length = plan.after.length
            random_folder(smaller, folder)
            return
        from ..loading.models import load
        from ..trained.export import export

        export(load(replace(self.options, device="cpu")), method, folder)


@contextlib.contextmanager
def launched(
    launch: Launch, load: Load, more: Sequence[str] = (), say: Callable[[str], None] = lambda line: None
) -> Iterator[tuple[list[Served], dict[str, Any]]]:
    """The running servers, and what they were started with. more: arguments for each of them. They end with the block."""
    from ..patches.vllm.benchmark import serve_command

    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1"}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", KV_SPACE)
    with tempfile.TemporaryDirectory(prefix="mllm-efficient-") as folder, contextlib.ExitStack() as running:
        plans = launch.plans(Path(folder))
        length = plans[0].length + load.text_tokens + load.output_tokens + SLACK
        shared = ["--max-model-len", str(length), "--max-num-seqs", str(max(load.concurrency))]
        shared += ["--limit-mm-per-prompt", json.dumps({"image": load.images}), "--served-model-name", "model", *_precision(launch.options)]
        if torch.cuda.is_available() and "--gpu-memory-utilization" not in more:
            shared += ["--gpu-memory-utilization", f"{0.9 / len(plans):.3f}"]
        arms, commands = [], {}
        for i, plan in enumerate(plans):
            port = _free_port()
            command = serve_command(plan.source, port, [*shared, *plan.arguments, *more])
            say(f"starting vLLM for {plan.name}")
            log = Path(folder) / f"server{i}.log"
            process = running.enter_context(_process(command, log, environment))
            url = f"http://127.0.0.1:{port}"
            _wait(url, process, log, plan.name)
            commands[plan.name] = " ".join(["vllm", "serve", *command[4:]]).replace(folder, "DIR")
            arms.append(
                Served(
                    name=plan.name, role=plan.role, url=url, model="model", tokenizer=plans[0].source, full=plan.full, kept=plan.kept,
                    length=plan.length,
                )
            )  # fmt: skip
        yield arms, {"servers": commands, "kv_cache_gib_on_cpu": environment["VLLM_CPU_KVCACHE_SPACE"]}


def _precision(options: ModelOptions) -> list[str]:
    """As stored on an accelerator; float32 on a CPU, where vLLM would take another type than transformers."""
    if options.dtype != "auto":
        return ["--dtype", options.dtype]
    return [] if torch.cuda.is_available() else ["--dtype", "float32"]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def _process(command: Sequence[str], log: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen]:
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(url: str, process: subprocess.Popen, log: Path, name: str) -> None:
    """Returns when the server answers. Raises ``MllmEfficientError`` with its own reason where it ends instead."""
    until = time.monotonic() + START
    while time.monotonic() < until:
        if process.poll() is not None:
            lines = [line for line in log.read_text(errors="replace").splitlines() if "Error" in line]
            reason = lines[-1].split(") ")[-1].strip() if lines else "it says nothing of why"
            raise MllmEfficientError(f"vLLM for {name} did not start: {reason[:400]}")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return
        time.sleep(0.5)
    raise MllmEfficientError(f"vLLM for {name} did not answer within {START:.0f} seconds")
