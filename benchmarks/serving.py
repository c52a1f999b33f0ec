"""Requests per second of a compressed server of vLLM over the uncompressed one's, beside what the FLOPs allow.

    python benchmarks/serving.py --threads-of 0 --client-on 1 --repeats 7 --profile --output benchmarks/results/cpu-serving.json

All servers run on the same processors and the client on others. They take turns within every repeat, with the same requests, new ones in
every repeat, caches off. ``ideal`` is the ratio of the requests' FLOPs (``mllm-efficient flops``, convention ``exact``: tower, projector,
method, prompt and every further token), ``reached`` the measured ratio over it. With --profile ``serving_parts.py`` says where a request's
time goes in the server's processes, and what of it is more than the FLOPs allow.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from serving_parts import Probe, excess

TARGET = 0.8  # of what the FLOPs allow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="bench-0.3b", help="a shape or a config.json, with weights that vLLM makes up")
    parser.add_argument("--method", action="append", help="default: divprune:tokens=64")
    parser.add_argument("--threads-of", type=processors, default=(0,), help="processors of the servers, such as 0,1")
    parser.add_argument("--client-on", type=processors, default=(1,), help="processors of the client")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--requests", type=int, default=32, help="of a run")
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--serve-args", default="--enforce-eager", help="more arguments of vllm serve, as one text")
    parser.add_argument("--profile", action="store_true", help="where a request's time goes; costs a little of it")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    from mllm_efficient.errors import MllmEfficientError

    try:
        found = measured(options)
    except MllmEfficientError as error:
        parser.error(str(error))
    for row in found["rows"]:
        print(line(row))
        for part, ms in (row.get("excess_ms") or {}).items():
            print(f"    {part:24} {row['parts_ms'][part]:9.1f} ms of a request's, {ms:+9.1f} ms beside the ideal")
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")


def processors(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


@contextlib.contextmanager
def on(cores: Sequence[int]) -> Iterator[None]:
    """Processes that are started inside run on these processors."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Rows and meta."""
    import shlex

    import mllm_efficient as me
    from mllm_efficient.loading.models import ModelOptions
    from mllm_efficient.measure.launching import Launch, launched
    from mllm_efficient.measure.machine import machine, versions
    from mllm_efficient.measure.serving import MEANING, Load, measure
    from mllm_efficient.patches.vllm.benchmark import require_vllm, tool

    methods = [me.build(m) for m in options.method or ("divprune:tokens=64",)]
    settings = ModelOptions(model=options.model, dtype=options.dtype, device="cpu")
    launch = Launch(settings, methods, random_weights=True, image_size=None, images=1)
    load = Load(
        launch.image_size, text_tokens=options.text_tokens, output_tokens=options.output_tokens, concurrency=(options.concurrency,),
        requests=options.requests, repeats=options.repeats, warmup=options.warmup,
    )  # fmt: skip
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, options.threads_of))
    version, began = require_vllm(), machine()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as running:
        probe = Probe(Path(folder)) if options.profile else None
        with on(options.threads_of):
            say = lambda text: print(text, file=sys.stderr)  # noqa: E731
            arms, about = running.enter_context(launched(launch, load, shlex.split(options.serve_args), say))
        with on(options.client_on):
            ask = running.enter_context(tool())
            ask = probe.around(ask, load.warmup) if probe else ask
            rows = measure(arms, load, ask)
        parts = {arm.name: probe.of(arm.url, options.requests) for arm in arms} if probe else {}
    meta = {
        "command": " ".join(["python", *sys.argv]), "model": options.model, "dtype": options.dtype, "servers_on": options.threads_of,
        "client_on": options.client_on, "target_reached": TARGET, "weights": "vLLM's dummy weights", "text_tokens": options.text_tokens,
        "output_tokens": options.output_tokens, "repeats": options.repeats, "warmup": options.warmup, **about, "meaning": MEANING,
        "measured_by": f"vllm bench serve {version}", "profiled": options.profile, "versions": versions("torch", "transformers"),
        "machine": began, "machine_after": machine(),
    }  # fmt: skip
    return {"rows": beside_flops(rows, arms, launch.config, options, parts), "meta": meta}


def beside_flops(
    rows: Any, arms: Any, config: Any, options: argparse.Namespace, parts: dict[str, dict[str, float]]
) -> list[dict[str, Any]]:
    """The rows with the FLOPs of a request, what they allow, and how much of that is there."""
    from mllm_efficient.measure.flops import cost
    from mllm_efficient.measure.shapes import shape_of

    base = rows[0]
    if base["failed"]:
        raise SystemExit(f"the uncompressed server failed: {base['failed']}")
    text = round(base["prompt_tokens"]["median"] / options.requests) - arms[0].length
    shape = shape_of(config, options.model)
    costs = [cost(shape, method=r["method"], text_tokens=text, new_tokens=options.output_tokens) for r in rows]
    out = []
    for row, own in zip(rows, costs):
        ideal = costs[0].total / own.total
        more: dict[str, Any] = {
            "ideal": ideal, "reached": None if row["failed"] else row["requests_ratio"]["median"] / ideal,
            "gflops": {name: getattr(own, name) / 1e9 for name in ("vision", "compress", "prefill", "decode")},
        }  # fmt: skip
        if parts and not row["failed"]:
            more |= {"parts_ms": parts[row["method"]], "excess_ms": excess(parts[row["method"]], parts[base["method"]], ideal)}
        out.append({**row, **more})
    return out


def line(row: dict[str, Any]) -> str:
    if row["failed"]:
        return f"{row['method']:22} failed: {row['failed']}"
    ratio = row["requests_ratio"]
    return (
        f"{row['method']:22} {row['requests_per_s']['median']:.3f} req/s, TTFT p50 {row['ttft_p50_ms']['median']:,.0f} ms, "
        f"p99 {row['ttft_p99_ms']['median']:,.0f} ms, {ratio['median']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}] of it whole, "
        f"FLOPs allow {row['ideal']:.2f}x, {row['reached']:.0%} reached"
    )


if __name__ == "__main__":
    main()
