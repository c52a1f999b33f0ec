"""What a timing depends on besides the program: processor, clocks, threads, load, power limit."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import __version__

GPU_FIELDS = (
    "name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu",
    "clocks_throttle_reasons.active",
)  # fmt: skip


def machine(devices: Sequence[torch.device] = ()) -> dict[str, Any]:
    """The state of the machine now: of the CPU always, of each CUDA device among ``devices``."""
    out: dict[str, Any] = {
        "cpu": _cpu_name(), "cpu_count": os.cpu_count(), "cpus_usable": _usable(), "threads": torch.get_num_threads(),
        "load_average": [round(v, 2) for v in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "cpu_mhz": _cpu_mhz(), "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(), "system": platform.platform(),
    }  # fmt: skip
    gpus = [gpu(d) for d in devices if d.type == "cuda"]
    return out | {"gpus": gpus} if gpus else out


def versions(*packages: str) -> dict[str, str]:
    """Of this package, Python, and the packages named."""
    own = {"mllm_efficient": __version__, "python": platform.python_version()}
    return own | {name: metadata.version(name) for name in packages}


def busy(state: dict[str, Any]) -> str | None:
    """A warning where a ``machine`` was at other work: its load average is over half of its processors."""
    load, cpus = state["load_average"], state["cpus_usable"] or 1
    if load is None or load[0] <= cpus / 2:
        return None
    return f"this machine is busy: load average {load[0]} on {cpus} processors, so times are noisy"


def gpu(device: torch.device) -> dict[str, Any]:
    """Name, memory and, by nvidia-smi, clocks (MHz), power (W), temperature; ``nvidia_smi`` says why they are missing."""
    properties = torch.cuda.get_device_properties(device)
    out: dict[str, Any] = {
        "name": properties.name, "memory_mb": round(properties.total_memory / 1e6), "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}", "cuda": torch.version.cuda,
        "fp32_precision": _fp32_precision(),
    }  # fmt: skip
    which = getattr(properties, "uuid", None)
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"]
    command += ["-i", f"GPU-{str(which).removeprefix('GPU-')}"] if which is not None else []
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        return out | {"nvidia_smi": f"not available: {type(error).__name__}"}
    return out | dict(zip(GPU_FIELDS, (v.strip() for v in said.split(","))))


def _fp32_precision() -> str:
    """What float32 products are made in, by whichever of torch's two settings this version has."""
    matmul: Any = torch.backends.cuda.matmul
    return str(matmul.fp32_precision) if hasattr(matmul, "fp32_precision") else "tf32" if matmul.allow_tf32 else "ieee"


def _usable() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpu_mhz() -> float | None:
    said = _cpuinfo("cpu MHz")
    return round(float(said), 1) if said else None


def _cpuinfo(field: str) -> str | None:
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        if line.startswith(field):
            return line.partition(":")[2].strip()
    return None


def _read(path: str) -> str | None:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return Path(path).read_text().strip()
    return None
