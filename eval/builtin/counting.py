"""Why does ``count`` break under selection? Reads a finished run and prints by how much each method miscounts.

    python -m mllm_efficient.eval.builtin.counting RUN_DIR

``bias`` is the mean of (answer - truth) over the count questions that were answered with a number; ``slope`` is the
least-squares slope of the answers over the truth (1 is a model that counts, 0 one that guesses).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mllm_efficient.errors import MllmEfficientError, run_as_command
from mllm_efficient.parsing import finished_lines


def miscounts(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per method: n, accuracy in percent, bias, slope and the mean share of kept tokens on the small shapes."""
    by_method: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record["task"] == "count" and record["answer"] is not None and record["answer"].isdigit():
            by_method.setdefault(record["method"], []).append(record)
    rows = []
    for method, found in by_method.items():
        truth = np.array([int(r["expected"]) for r in found])
        answer = np.array([int(r["answer"]) for r in found])
        shares = [r["region_share"] for r in found if r.get("region_share") is not None]
        rows.append(
            {
                "method": method,
                "n": len(found),
                "accuracy": 100 * float((truth == answer).mean()),
                "bias": float((answer - truth).mean()),
                "slope": float(np.polyfit(truth, answer, 1)[0]) if truth.std() else float("nan"),
                "region_share": float(np.mean(shares)) if shares else None,
            }
        )
    return rows


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        raise MllmEfficientError("usage: python -m mllm_efficient.eval.builtin.counting RUN_DIR")
    path = Path(argv[0]) / "samples.jsonl"
    if not path.is_file():
        raise MllmEfficientError(f"no run in {argv[0]}: there is no samples.jsonl")
    print(f"{'method':<34}{'n':>6}{'accuracy':>10}{'bias':>8}{'slope':>8}{'in region':>11}")
    for row in miscounts(json.loads(line) for line in finished_lines(path)):
        share = "" if row["region_share"] is None else f"{100 * row['region_share']:.0f}%"
        print(f"{row['method']:<34}{row['n']:>6}{row['accuracy']:>10.1f}{row['bias']:>+8.2f}{row['slope']:>8.2f}{share:>11}")
    return 0


if __name__ == "__main__":
    run_as_command(main)
