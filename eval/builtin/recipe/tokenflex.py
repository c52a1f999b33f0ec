"""The TokenFLEX paper's table on the embedded model: what a projector of any count loses against one trained at each.

    python -m mllm_efficient.eval.builtin.recipe.tokenflex --output-dir OUT [--jobs 2]   trains, asks, writes the answers
    python -m mllm_efficient.eval.builtin.recipe.tokenflex --table                       the table from the answers that ship

Arms: ``dynamic`` (SwiGLU, the count drawn for every batch), ``fixed-144``, ``fixed-36``, ``fixed-9`` (SwiGLU, one count),
``mlp-dynamic`` (LLaVA's own layers, drawn counts). Each is trained by ``configs/train/tokenflex_builtin.yaml`` from the
same embedded model for the same steps with three seeds, and asked the test questions at every count of ``TESTED``.
``untrained`` is the embedded model itself, whose tokens are pooled to the count. An interrupted run goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mllm_efficient.compressors.tokenflex import TokenFlex
from mllm_efficient.stats import Hits, accuracy, draws

from ..questions import CATEGORIES
from ..suite import Sample
from .study import UNTRAINED, Answers, Study, answered, difference, mean, read_answers, words_of

COUNTS = (144, 36, 9)
TESTED = (144, 64, 36, 25, 16, 9)
SEEDS = (0, 1, 2)
QUESTIONS = 5000
DRAWN = "{144: 0.5, 36: 0.3, 9: 0.2}"
PAPER = "settings={layers: swiglu, pooling: bilinear}"
ARMS: dict[str, tuple[str, ...]] = {
    "dynamic": (f"counts={DRAWN}", PAPER),
    **{f"fixed-{count}": (f"counts={{{count}: 1}}", PAPER) for count in COUNTS},
    "mlp-dynamic": (f"counts={DRAWN}", "settings={layers: mlp}"),
}
RESULTS = Path("benchmarks/results/tokenflex")
LONGER = "longer"  # subfolder with answers of single runs that were trained longer


def specs(final: Path | None) -> dict[int, str]:
    """What a run is asked as: the trained projector at every count, or the embedded model's tokens pooled to it."""
    if final is None:
        return {count: "none" if count == 144 else f"pool:tokens={count}" for count in TESTED}
    return {count: TokenFlex(tokens=count, weights=str(final)).spec() for count in TESTED}


def ask(asked: Sequence[Sample], specs: dict[int, str]) -> dict[str, Any]:
    """The one-word answers at every count, in the order of the questions."""
    return {"answers": {str(count): words_of(records) for count, records in answered(asked, specs).items()}}


def tables(folder: Path) -> str:
    out = table(*read_answers(folder))
    return out + ("\n\n" + longer_table(*read_answers(folder / LONGER)) if (folder / LONGER).is_dir() else "")


def scores(runs: Answers, asked: Sequence[Sample]) -> dict[tuple[str, int], dict[int, np.ndarray]]:
    """For every arm and count tested, by seed: macro accuracy in percent, the estimate first, then its paired resamples."""
    images = sorted({s.image for s in asked})
    weights = np.concatenate([np.ones((1, len(images))), draws(len(images), 0)])
    out: dict[tuple[str, int], dict[int, np.ndarray]] = {}
    for (arm, seed), run in runs.items():
        for count, words in run["answers"].items():
            rows = [
                {"image": s.image, "task": s.task, "correct": word == s.question.answer}
                for s, word in zip(asked, words.split(), strict=True)
            ]
            out.setdefault((arm, int(count)), {})[seed] = accuracy(Hits(rows, images, CATEGORIES), weights)[:, -2]
    return out


def table(runs: Answers, asked: Sequence[Sample]) -> str:
    """The table and the two claims as Markdown: means over seeds, 95% intervals over images, the seeds' range in brackets."""
    found = scores(runs, asked)
    arms = [UNTRAINED, *(f"fixed-{c}" for c in COUNTS), "mlp-dynamic", "dynamic"]
    missing = [arm for arm in arms if (arm, COUNTS[0]) not in found]
    if missing:
        raise SystemExit(f"no answers of {', '.join(missing)} yet: run it to its end first")
    lines = [f"| trained | {' | '.join(f'tested at {c}' for c in TESTED)} |", "|---" * (len(TESTED) + 1) + "|"]
    for arm in arms:
        cells = []
        for count in TESTED:
            each = [v[0] for v in found[arm, count].values()]
            spread = f" ({min(each):.1f}-{max(each):.1f})" if len(each) > 1 else ""
            cells.append(f"{np.mean(each):.1f}{spread}")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    lines += ["", *claims(found)]
    return "\n".join(lines)


def longer_table(runs: Answers, asked: Sequence[Sample]) -> str:
    """Single runs of more steps, and what is between them."""
    found = scores(runs, asked)
    arms = [arm for arm in ("fixed-9", "mlp-dynamic", "dynamic") if (arm, COUNTS[0]) in found]
    lines = [f"| trained | {' | '.join(f'tested at {c}' for c in TESTED)} |", "|---" * (len(TESTED) + 1) + "|"]
    lines += [f"| {arm} | {' | '.join(f'{mean(found[arm, c])[0]:.1f}' for c in TESTED)} |" for arm in arms]
    own, other = mean(found["dynamic", 9]), mean(found["fixed-9", 9])
    return "\n".join([*lines, "", difference("dynamic - fixed-9, at 9 tokens", own - other)])


def claims(found: dict[tuple[str, int], dict[int, np.ndarray]]) -> list[str]:
    """Differences in points with 95% intervals, each a paired bootstrap over images of the mean over seeds."""
    out = []
    for count in COUNTS:
        own, other = mean(found["dynamic", count]), mean(found[f"fixed-{count}", count])
        out.append(difference(f"dynamic - fixed-{count}, at {count} tokens", own - other))
    for count in COUNTS[1:]:
        for arm in ("fixed-144", "dynamic"):
            out.append(difference(f"{arm} at {count} tokens - at 144", mean(found[arm, count]) - mean(found[arm, 144])))
    for count in TESTED:
        own, other = mean(found["dynamic", count]), mean(found["mlp-dynamic", count])
        out.append(difference(f"dynamic - mlp-dynamic, at {count} tokens", own - other))
    return out


STUDY = Study(
    "mllm_efficient.eval.builtin.recipe.tokenflex", __doc__, "tokenflex_builtin", RESULTS, ARMS, SEEDS, QUESTIONS, specs, ask, tables
)
main = STUDY.main

if __name__ == "__main__":
    raise SystemExit(main())
