"""Checkpoints and the log of a training run of an embedded model."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

TIED = "model.lm_head.weight"  # the embedding, stored once


class Log:
    """Appends JSON lines to a file and prints them. seconds: of processor time, of all starts together.

    Lines of steps that an earlier start took after its last checkpoint are dropped: they are taken again.
    """

    def __init__(self, path: Path, first: int, spent: float):
        self.path, self.before = path, spent - time.process_time()
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= first]
            path.write_text("".join(line + "\n" for line in lines))

    @property
    def seconds(self) -> float:
        return self.before + time.process_time()

    def __call__(self, **fields: Any) -> None:
        line = json.dumps({"cpu_seconds": round(self.seconds, 1), **fields})
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(line + "\n")


def save(packed: nn.Module, opts: list[torch.optim.Optimizer], path: Path, step: int, seconds: float) -> None:
    """Weights and optimiser state in one file, swapped in whole so that a kill leaves the old one."""
    tensors = {k: v.contiguous() for k, v in packed.state_dict().items() if k != TIED}
    for i, opt in enumerate(opts):
        for j, state in opt.state_dict()["state"].items():
            tensors |= {f"opt.{i}.{j}.{k}": torch.as_tensor(v).contiguous() for k, v in state.items()}
    new = path.with_suffix(".new")
    save_file(tensors, new, metadata={"step": str(step), "seconds": str(seconds)})
    new.replace(path)


def restore(packed: nn.Module, opts: list[torch.optim.Optimizer], path: Path) -> tuple[int, float]:
    """(next step, seconds so far) of an earlier start, its state loaded; (0, 0.0) if there was none."""
    if not path.exists():
        return 0, 0.0
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    missing, unknown = packed.load_state_dict({k: v for k, v in tensors.items() if not k.startswith("opt.")}, strict=False)
    if unknown or set(missing) - {TIED}:
        raise ValueError(f"{path} is of another model: {[*unknown, *missing][:3]}")
    for i, opt in enumerate(opts):
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(f"opt.{i}."):
                _, _, j, name = key.split(".", 3)
                state.setdefault(int(j), {})[name] = value
        opt.load_state_dict(opt.state_dict() | {"state": state})
    return int(meta["step"]), float(meta["seconds"])
