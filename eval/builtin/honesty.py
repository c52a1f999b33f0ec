"""Does a model look at the images of the harder benchmark? Asks every question about the images of another item.

    python -m mllm_efficient.eval.builtin.honesty MODEL [QUESTIONS]

A model that answers from its images falls to the floor of every category then: above the end of the floor's interval (95%, for all
categories at once) it answers from something else, and the command exits with 1.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from mllm_efficient.errors import MllmEfficientError, run_as_command
from mllm_efficient.loading.models import ModelOptions, load
from mllm_efficient.registry import build

from ..runner import Run
from .hard.floor import floors
from .hard.suite import round_robin, shuffled
from .suites import HARD


def rows_of(own: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]], floor: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """A row of percentages for each category: with its own images, with those of others, and its floor. above: of the floor's interval."""

    def score(records: Sequence[dict[str, Any]], task: str) -> float:
        found = [r["correct"] for r in records if r["task"] == task]
        return 100 * sum(found) / len(found)

    rows = []
    for category, bounds in floor.items():
        others = score(other, category)
        rows.append({"category": category, "own": score(own, category), "other": others, **bounds, "above": others > bounds["upper"]})
    return rows


def main(argv: Sequence[str]) -> int:
    if not 1 <= len(argv) <= 2 or not all(a.isdigit() and int(a) for a in argv[1:]):
        raise MllmEfficientError("usage: python -m mllm_efficient.eval.builtin.honesty MODEL [QUESTIONS]")
    loaded = load(ModelOptions(model=argv[0]))
    categories, left_out = HARD.chosen(None, loaded.processor)
    for line in (left_out, HARD.note(loaded.processor.tokenizer)):
        if line is not None:
            print(line, file=sys.stderr)
    asked = round_robin("test", int(argv[1]) if argv[1:] else None, categories)
    asked.sort(key=lambda s: s.id)  # the questions of an item share a batch
    own, other = (Run(loaded, some, [build("none")], floor=False, suite=HARD).answer_all() for some in (asked, shuffled(asked)))
    failed = [r["error"] for r in (*own, *other) if r["error"] is not None]
    if failed:
        raise MllmEfficientError(f"{len(failed)} answers failed: {failed[0]}")
    rows = rows_of(own, other, floors([s.question for s in asked]))
    print(f"{'category':<12}{'own images':>12}{'others':>9}{'floor':>8}{'upper':>8}")
    for row in rows:
        numbers = f"{row['own']:>12.1f}{row['other']:>9.1f}{row['floor']:>8.1f}{row['upper']:>8.1f}"
        print(f"{row['category']:<12}{numbers}{'  ABOVE' if row['above'] else ''}")
    return int(any(row["above"] for row in rows))


if __name__ == "__main__":
    run_as_command(main)
