"""How an evaluation is shown while it runs, and what is said of it at its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import options


def answered(run: Any, shown: bool = True) -> list[dict[str, Any]]:
    """Every answer, with a progress bar where it is shown and there is a terminal.

    Says how many are there from before; on Ctrl-C, how to go on.
    """
    from tqdm import tqdm

    if shown and run.done:
        options.say(f"{run.done} of {run.total} answers are there already")
    try:
        with tqdm(total=run.total, unit="answer", mininterval=1, disable=None if shown else True) as bar:
            run.progress = bar.update
            return run.answer_all()
    except KeyboardInterrupt:
        kept = f"{run.done} of {run.total} answers are finished: the same command goes on from what {run.output_dir} holds"
        lost = "nothing is kept without --output-dir"
        if shown:
            options.say(f"stopped: {lost if run.output_dir is None else kept}")
        raise


def failures(records: Sequence[dict[str, Any]]) -> int:
    """Says what failed; the exit code."""
    failed = [r for r in records if r["error"] is not None]
    for record in failed[:5]:
        options.say(f"failed: {record['method']} on {record['id']}: {record['error']}")
    if failed:
        options.say(f"{len(failed)} of {len(records)} answers failed")
    return 1 if failed else 0
