"""Can pixels say, before the tower runs, how many tokens ``spend=set`` would give a picture? Scenes of 1 to 30 objects, builtin-qwen.

    python benchmarks/pixels.py --output benchmarks/results/pixels.json      # about 5 minutes of one core

The statistic is the number of busy cells: of the squares that become a token those in which the means of 4 x 4 parts vary (deviation
over the parts, mean over the channels) by more than 8 of 255. On validation scenes the count that ``spend=set`` gives is fitted as
a power of it; a test picture then has the count that the fit says of its own pixels alone, and no other picture matters.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CELL, PARTS, VARIES = 28, 4, 8.0
BUDGETS = (0.25, 0.1)


def busy_cells(picture: Image.Image) -> int:
    """How many squares of a picture are not flat, at least 1."""
    columns, rows = (max(1, round(side / CELL)) for side in picture.size)
    pixels = np.asarray(picture.convert("RGB").resize((columns * CELL, rows * CELL), Image.Resampling.BICUBIC), dtype=np.float32)
    part = CELL // PARTS
    means = pixels.reshape(rows, PARTS, part, columns, PARTS, part, 3).mean((2, 5)).transpose(0, 2, 1, 3, 4)
    return max(1, int((means.reshape(rows * columns, PARTS**2, 3).std(1).mean(1) > VARIES).sum()))


class Asked:
    """Questions about scenes of a split, and the model that answers them."""

    def __init__(self, split: str, limit: int, folder: Path):
        from mllm_efficient.eval.builtin.hard.suite import samples
        from mllm_efficient.eval.runner import Run
        from mllm_efficient.loading.models import ModelOptions, load
        from mllm_efficient.registry import runnable

        self.samples, self.build = samples(split, limit, ["scene"]), runnable
        self.run = Run(load(ModelOptions("builtin-qwen")), self.samples, [runnable("none")], 64, folder, floor=False)
        self.busy = {s.image: busy_cells(s.pictures(self.run.size)[0]) for s in self.samples}

    def records(self, spec: str, some: Sequence[Any] | None = None, batch: int = 64) -> list[dict[str, Any]]:
        """One of each question, in their order."""
        some = self.samples if some is None else some
        parts = [some[i : i + batch] for i in range(0, len(some), batch)]
        return [record for part in parts for record in self.run.answers(spec, self.build(spec), part)]

    def with_counts(self, counts: dict[str, int]) -> list[dict[str, Any]]:
        """``records`` where each picture keeps its own count."""
        alike, found = defaultdict(list), {}
        for sample in self.samples:
            alike[counts[sample.image]].append(sample)
        for count, some in alike.items():
            found |= {record["id"]: record for record in self.records(f"divprune:tokens={count}", some)}
        return [found[s.id] for s in self.samples]


def fitted(asked: Asked, keep: float) -> tuple[float, float]:
    """Scale and power: what ``spend=set`` gives, as a power of the busy cells, scaled to the same mean over the questions."""
    records = asked.records(f"divprune:keep={keep},spend=set", batch=len(asked.samples))
    kept = {r["image"]: r["visual_tokens_kept"] for r in records}
    busy = np.array([asked.busy[image] for image in kept], dtype=float)
    power, _ = np.polyfit(np.log(busy), np.log([*kept.values()]), 1)
    of_questions = np.array([asked.busy[r["image"]] for r in records], dtype=float) ** power
    return float(np.mean([r["visual_tokens_kept"] for r in records]) / of_questions.mean()), float(power)


def rows_of(asked: Asked, keep: float, scale: float, power: float) -> list[dict[str, Any]]:
    """Accuracy of the three ways to spend one budget, and what the second and third are above each picture's own."""
    from mllm_efficient.stats import Scores

    counts = {image: max(1, round(scale * busy**power)) for image, busy in asked.busy.items()}
    arms = {
        "own": asked.records(f"divprune:keep={keep}"),
        "set": asked.records(f"divprune:keep={keep},spend=set", batch=len(asked.samples)),
        "pixels": asked.with_counts(counts),
    }
    scores, out = Scores(arms, [*asked.busy], ["scene"]), []
    for arm, records in arms.items():
        kept, full = (np.array([r[f"visual_tokens_{what}"] for r in records]) for what in ("kept", "full"))
        row = {"keep": keep, "arm": arm, "n": len(records), "pictures": len(asked.busy), "tokens": float(kept.mean())}
        row |= {"score": scores.of(arm, -2).value, "share": [float(v) for v in np.percentile(kept / full, (10, 90))]}
        for base in ("own", "set"):
            if base != arm:
                found = scores.of(arm, -2, base)
                row[f"to_{base}"] = [found.value, *found.interval()]
        out.append(row)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=480, help="questions of each split")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        val, test = (Asked(split, options.limit, Path(folder) / split) for split in ("val", "test"))
        fits = {keep: fitted(val, keep) for keep in BUDGETS}
        rows = [{**row, "fit": fits[keep]} for keep in BUDGETS for row in rows_of(test, keep, *fits[keep])]
    for row in rows:
        print(json.dumps(row), flush=True)
    if options.output:
        options.output.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
