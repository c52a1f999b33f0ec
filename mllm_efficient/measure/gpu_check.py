"""Everything that only a GPU can show, in one command of at most eight minutes that prints one JSON: ``make gpu-check``.

    python -m mllm_efficient.measure.gpu_check [--output FILE] [--only PART ...] [--device cpu --scale FILE]

Parts run one after the other, the most telling first, each in a process of its own: an error on the device, which nothing in the same
process survives, or a hang costs one part and no other. What a part has found is in the JSON under its name, with ``status``: "ok",
"failed" (an error, a wrong result, or no time left: exit code 1), or "not here" with the reason. Times are reported and no reason to fail.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..errors import BadSettingError, MllmEfficientError
from ..loading.models import ModelOptions, pick_device
from ..writing import write_text
from .gpu_models import compiled, graph, ttft
from .gpu_parts import NotHere, Scale, batches, is_cuda, kernel, read_scale, waits
from .machine import busy, machine, versions
from .timing import ORDER

SECONDS = 480
TO_START = 20.0  # less than this is no time for a part: imports and a model
ENDING = 5.0  # what reporting takes
LIBRARIES = ("torch", "transformers", "triton", "flash_attn", "flash_attn_3", "numpy")
MEANING = {
    "status": "ok; failed: an error, a wrong result or no time left; not here: this machine cannot run it, with the reason",
    "spread": "median, q1, q3: quartiles over n repeats; ratios: median and 95% of medians of resampled pairs",
    "order": f"what a part compares takes turns {ORDER}",
    "memory": "MB = 1e6 bytes",
}


@dataclass(frozen=True)
class Part:
    """What is run, and the seconds it may take at most."""

    run: Callable[[Scale, str, float], dict[str, Any]]
    seconds: float


def parts_of(scale: Scale) -> dict[str, Part]:
    """The parts by name, the most telling first."""
    first, last = ({f"ttft-{Path(m).name}-{a}": _ttft(m, a) for m in scale.models} for a in ("sdpa", "flash"))
    others = {"kernel": Part(kernel, 60), "batches": Part(batches, 45), "waits": Part(waits, 45), "graph": Part(graph, 60)}
    return {**first, **others, **last, "compiled": Part(compiled, 150)}


def _ttft(model: str, attention: str) -> Part:
    return Part(partial(ttft, model=model, attention=attention), 90)


def run_part(part: Part, scale: Scale, device: str, until: float) -> dict[str, Any]:
    """What the part gives, with its status; an exception is its error."""
    try:
        found = part.run(scale, device, until)
    except NotHere as reason:
        return {"status": "not here", "reason": str(reason)}
    except Exception as error:
        return failure(f"{type(error).__name__}: {error}")
    return {"status": "failed" if found["failed"] else "ok", **found}


def failure(reason: str) -> dict[str, Any]:
    return {"status": "failed", "failed": [" ".join(reason.split())[:1000]]}


def in_a_process(name: str, options: Sequence[str], seconds: float) -> dict[str, Any]:
    """The part in a process of its own, which is ended with all that it started when its time is over."""
    with tempfile.TemporaryDirectory() as folder:
        into, said = Path(folder) / "part.json", Path(folder) / "said"
        own = ["--part", name, "--into", str(into), "--until", str(time.time() + seconds - ENDING)]
        with said.open("wb") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", __spec__.name if __spec__ else __name__, *options, *own],
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
            try:
                code = child.wait(seconds)
            except subprocess.TimeoutExpired:
                return failure(f"not done in its {seconds:.0f} s{_end_of(said)}")
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        if not into.is_file():
            return failure(f"its process ended with code {code}{_end_of(said)}")
        return json.loads(into.read_text())


def _end_of(path: Path) -> str:
    last = " ".join(path.read_text(errors="replace").split())[-500:]
    return f": ... {last}" if last else ""


def check(
    scale: Scale, device: str, *, seconds: float, only: Sequence[str], run: Callable[[str, float], dict[str, Any]],
    write: Callable[[dict[str, Any]], object] = lambda result: None,
) -> dict[str, Any]:  # fmt: skip
    """The whole JSON. run: (name, seconds) -> what a part found. write: gets the result so far after every part."""
    begin, devices = time.monotonic(), [torch.device(device)] if is_cuda(device) else []
    result: dict[str, Any] = {
        "device": device, "dtype": scale.dtype, "versions": installed_versions(), "scale": asdict(scale), "budget_s": seconds,
        "machine": machine(devices), "meaning": MEANING, "parts": {},
    }  # fmt: skip
    for name, part in parts_of(scale).items():
        if only and name not in only:
            continue
        start = time.monotonic()
        left = seconds - ENDING - (start - begin)
        found = run(name, min(part.seconds, left)) if left >= TO_START else failure("no time left for it")
        result["parts"][name] = {**found, "seconds": round(time.monotonic() - start, 1)}
        print(f"{name}: {'; '.join([found['status'], *found.get('failed', ())])}", file=sys.stderr, flush=True)
        write(_with_summary(result, begin, devices))
    return _with_summary(result, begin, devices)


def _with_summary(result: dict[str, Any], begin: float, devices: Sequence[torch.device]) -> dict[str, Any]:
    """What failed, and what this machine could not show, of all parts."""
    found: dict[str, dict[str, Any]] = result["parts"]
    return {
        "failed": [name for name, part in found.items() if part["status"] == "failed"],
        "not_here": {name: part["reason"] for name, part in found.items() if part["status"] == "not here"}
        | {f"{name}: {what}": why for name, part in found.items() for what, why in part.get("not_here", {}).items()},
        "seconds": round(time.monotonic() - begin, 1), **result, "machine_after": machine(devices),
    }  # fmt: skip


def installed_versions() -> dict[str, str | None]:
    """Of the libraries that matter; None for one that is not installed."""
    out: dict[str, str | None] = dict(versions())
    for name in LIBRARIES:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = None
    return out


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m mllm_efficient.measure.gpu_check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the check itself with small sizes")
    parser.add_argument("--scale", type=Path, help="JSON of sizes that differ from those of a 7B model")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="these parts alone")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all of it")
    parser.add_argument("--output", type=Path, help="writes the JSON to this file too, after every part")
    for hidden in ("--part", "--into", "--until"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """0, 1 where a part failed, 2 for what cannot be run at all."""
    args = _arguments(argv)
    try:
        scale = read_scale(args.scale) if args.scale else Scale()
        parts = parts_of(scale)
        unknown = sorted(set(args.only) - set(parts))
        if unknown:
            raise BadSettingError(f"no part is called {', '.join(unknown)}: they are {', '.join(parts)}")
        if args.part:
            found = run_part(parts[args.part], scale, args.device, float(args.until))
            write_text(Path(args.into), json.dumps(found, allow_nan=False))
            return 0
        return _whole(args, scale)
    except MllmEfficientError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _whole(args: argparse.Namespace, scale: Scale) -> int:
    device = pick_device(ModelOptions(device=args.device))
    options = ["--device", device, *(["--scale", str(args.scale)] if args.scale else [])]

    def write(result: dict[str, Any]) -> None:
        if args.output:
            write_text(args.output, json.dumps(result, indent=1, allow_nan=False) + "\n")

    result = check(
        scale, device, seconds=args.seconds, only=args.only, run=lambda name, seconds: in_a_process(name, options, seconds), write=write
    )
    print(json.dumps(result, indent=1, allow_nan=False))
    warning = busy(result["machine"])
    if warning:
        print(warning, file=sys.stderr)
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
