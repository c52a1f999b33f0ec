"""The five stages of ``train.py`` in numbers: steps, batches, learning rates and their schedule; and the log they write."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Stage:
    """steps; images per step over all processes; learning rates (Muon, AdamW) of the tower and of everything else.

    horizon: steps after which the cosine schedule would end, where the stage stops earlier. mix: how likely a question
    of each category is drawn. coordinates: weight of the row and column labels.
    """

    steps: int
    batch: int
    tower: tuple[float, float]
    rest: tuple[float, float]
    horizon: int | None = None
    mix: tuple[float, ...] = (1.0,) * 7
    coordinates: float = 0.0


STAGES = {
    "vision": Stage(1400, 32, tower=(3e-3, 1.5e-3), rest=(0.0, 3e-3)),
    "language": Stage(1500, 16, tower=(0.0, 0.0), rest=(5e-3, 1.5e-3)),
    "align": Stage(300, 32, tower=(0.0, 0.0), rest=(3e-3, 3e-3)),
    "joint": Stage(1400, 32, tower=(1e-3, 3e-4), rest=(5e-3, 1.5e-3), horizon=3000),
    "relate": Stage(1900, 32, tower=(1e-3, 3e-4), rest=(4e-3, 1.2e-3), mix=(0.3, 1.0, 1.3, 2.6, 1.0, 0.5, 1.2), coordinates=0.2),
}
QUESTIONS = 12
WEIGHTS = (0.3, 1.4, 0.6, 1.7, 1.4, 0.7, 1.3)  # per category, in the joint stage
IMAGES = 40_000
VAL = 300


class Log:
    """Appends JSON lines to OUTPUT_DIR/log.jsonl and prints them."""

    def __init__(self, path: Path, stage: str, minutes: float, quiet: bool):
        self.path, self.stage, self.before, self.quiet, self.start = path, stage, minutes, quiet, time.monotonic()

    @property
    def minutes(self) -> float:
        return self.before + (time.monotonic() - self.start) / 60

    def __call__(self, **fields):
        if self.quiet:
            return
        line = json.dumps({"stage": self.stage, "minutes": round(self.minutes, 2), **fields})
        print(line, flush=True)
        with self.path.open("a") as f:
            f.write(line + "\n")


def cosine(step: int, steps: int, warmup: int = 60, floor: float = 0.01) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
