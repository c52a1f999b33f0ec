"""How an evaluation is shown while it runs, and what is said of it at its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mllm_efficient.progress import SILENT, Progress

SHOWN = 5


def answered(run: Any, progress: Progress = SILENT) -> list[dict[str, Any]]:
    """Every answer. Says how many are there from before; on Ctrl-C, how to go on."""
    if run.done:
        progress.say(f"{run.done} of {run.total} answers are there already")
    try:
        with progress.bar(run.total, "answer") as bar:
            run.progress = bar.update
            return run.answer_all()
    except KeyboardInterrupt:
        kept = f"{run.done} of {run.total} answers are finished: the same command goes on from what {run.output_dir} holds"
        progress.warn(f"stopped: {'nothing is kept without --output-dir' if run.output_dir is None else kept}")
        raise


def failures(records: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """A line for each of the first failed answers, and how many there are."""
    failed = [r for r in records if r["error"] is not None]
    lines = [f"failed: {r['method']} on {r['id']}: {r['error']}" for r in failed[:SHOWN]]
    return (*lines, f"{len(failed)} of {len(records)} answers failed") if failed else ()
