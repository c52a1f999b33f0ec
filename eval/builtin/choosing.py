"""How much 50 labels say that ``choose`` picks, and 50 at random, on the embedded benchmark, where every label is known.

    python -m mllm_efficient.eval.builtin.choosing RUN_DIR

RUN_DIR: of a finished ``mllm-efficient eval --method ... --output-dir RUN_DIR``. Each way to draw is repeated 200 times; printed is the
root mean squared distance to the truth over all of the run's questions, and the mean distance (bias), both in points.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mllm_efficient.errors import MllmEfficientError

from ..choosing import Answered, draw, estimate, line_up, probabilities
from ..record.samples import SAMPLES_FILE, read_lines

REPEATS, BUDGET = 200, 50
NO_IMAGE = "no-image"  # the floor of an evaluation, no method
Draw = Callable[[int], tuple[list[int], np.ndarray]]


def read(folder: Path) -> tuple[list[str], list[Answered], np.ndarray]:
    """The arms of a run, its questions, and (arms, questions) who is right in percent."""
    records, _ = read_lines(folder / SAMPLES_FILE, lambda r: ((r["method"], r["id"]), r), "an evaluation")
    known = {key: r for key, r in records if key[0] != NO_IMAGE}
    arms, ids = ([*dict.fromkeys(key[part] for key in known)] for part in (0, 1))
    if len(arms) < 2:
        raise MllmEfficientError(f"{folder} holds fewer than two arms")
    asked = [Answered(i, known[arms[0], i]["question"], tuple(known[arm, i]["answer"] for arm in arms)) for i in ids]
    return arms, asked, np.array([[100.0 * bool(known[arm, i]["correct"]) for i in ids] for arm in arms])


def at_random(n: int, budget: int) -> Draw:
    """Every question as probable as any other."""
    even = np.full(n, budget / n)
    return lambda repeat: (sorted(np.random.default_rng([repeat, 2]).permutation(n)[:budget].tolist()), even)


def chosen(asked: Sequence[Answered], budget: int, explore: float, diverse: bool = True) -> Draw:
    """As ``choose`` draws. diverse: whether like questions stand side by side."""
    p = probabilities(asked, budget, explore)

    def one(repeat: int) -> tuple[list[int], np.ndarray]:
        line = line_up(asked, repeat) if diverse else np.random.default_rng([repeat, 3]).permutation(len(asked)).tolist()
        return draw(p, line, [repeat, 4]), p

    return one


def study(asked: Sequence[Answered], right: np.ndarray, budget: int = BUDGET, repeats: int = REPEATS) -> dict[str, dict[str, list[float]]]:
    """Of each way to draw: ``difference`` (each arm to the baseline) and ``accuracy`` (each arm), errors in points, mean over arms."""
    ways = {
        f"{budget} at random": at_random(len(asked), budget), f"{4 * budget} at random": at_random(len(asked), 4 * budget),
        f"{budget} at random, with votes": at_random(len(asked), budget),
        f"{budget} chosen, explore=0": chosen(asked, budget, 0), f"{budget} chosen, explore=0.2": chosen(asked, budget, 0.2),
        f"{budget} chosen, explore=0.2, not diverse": chosen(asked, budget, 0.2, diverse=False),
        f"{budget} chosen, explore=0.5": chosen(asked, budget, 0.5),
    }  # fmt: skip
    votes = 100 * np.array([a.votes for a in asked]).T
    out = {}
    for name, way in ways.items():
        found: dict[str, list[list[float]]] = {"difference": [], "accuracy": []}
        for repeat in range(repeats):
            places, p = way(repeat)
            for what, values, foretold in (("difference", right[1:] - right[0], votes[1:] - votes[0]), ("accuracy", right, votes)):
                if name.endswith("at random"):
                    foretold = 0 * foretold
                pairs = zip(values, foretold)
                said = [estimate(v[places], f[places], p[places], f.mean(), len(asked)).value for v, f in pairs]
                found[what].append([float(a) - b for a, b in zip(said, values.mean(1))])  # type: ignore[arg-type]
        out[name] = {what: [float(np.sqrt(np.square(e).mean(0)).mean()), float(np.abs(np.mean(e, 0)).mean())] for what, e in found.items()}
    return out


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    if len(given) != 1:
        raise MllmEfficientError("one folder of a finished eval: python -m mllm_efficient.eval.builtin.choosing RUN_DIR")
    arms, asked, right = read(Path(given[0]))
    differ = np.array([a.differ for a in asked])
    print(f"{len(asked)} questions; arms: {', '.join(arms)}; answers in other words than the baseline's: {100 * differ.mean(0)}")
    print(f"accuracy: {right.mean(1)}; difference: {(right[1:] - right[0]).mean(1)}; {REPEATS} repeats")
    for name, row in study(asked, right).items():
        print(f"{name:38}" + "  ".join(f"{what}: error {e:5.2f} bias {b:4.2f}" for what, (e, b) in row.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
