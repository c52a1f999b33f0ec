"""``divmerge`` against every other method without training, on test scenes that chose nothing.

    python benchmarks/divmerge.py ask --output-dir runs/divmerge      # asks what is not recorded there yet
    python benchmarks/divmerge.py table                               # of benchmarks/results/divmerge.json, as Markdown

Settings of methods were chosen on the validation split, and earlier tables show the first 400 test scenes: these questions are about the
scenes behind them. Each row is ``divmerge`` minus another method at as many tokens. Its lower bound holds for all rows and counts at once
(max-T over paired resamples of images), so that what is above 0 is shown for all of them together.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from instruments import BASELINE, METHODS, lined, with_settings

from mllm_efficient.stats import Scores, lower_bounds

RESULTS = Path(__file__).resolve().parent / "results" / "divmerge.json"
BEFORE, OWN, COUNTS = 400, "divmerge", {36: 0.25, 18: 0.125, 9: 0.0625}
OTHERS = [m for m in METHODS if m not in (OWN, "random")] + [f"random:seed={seed}" for seed in range(3)]


def ask(questions: int, folder: Path) -> dict[str, Any]:
    """Answers of every arm to questions about scenes from number ``BEFORE`` on: "1" where right."""
    from mllm_efficient.apply.plan import check
    from mllm_efficient.errors import MllmEfficientError
    from mllm_efficient.eval.builtin.suite import samples
    from mllm_efficient.eval.runner import Run
    from mllm_efficient.loading.models import ModelOptions, load, require_supported
    from mllm_efficient.registry import runnable

    loaded = load(ModelOptions("builtin"))
    adapter, chosen, refused = require_supported(loaded), {BASELINE: runnable(BASELINE)}, dict[str, str]()
    for spec in [with_settings(m, f"keep={keep}") for keep in COUNTS.values() for m in (OWN, *OTHERS)]:
        try:
            check(adapter, runnable(spec))
            chosen[spec] = runnable(spec)
        except MllmEfficientError as error:
            refused[spec] = str(error)
    asked = [s for s in samples("test") if s.image >= BEFORE][:questions]
    records = Run(loaded, asked, list(chosen.values()), 32, folder, floor=False).answer_all()
    by_method, right = dict[str, dict[str, Any]](), {}
    for record in records:
        by_method.setdefault(record["method"], {})[record["id"]] = record
    for spec, method in chosen.items():
        own = by_method[method.spec()]
        failed = next((r["error"] for r in own.values() if r["error"] is not None), None)
        if failed is None:
            right[spec] = "".join("01"[own[s.id]["correct"]] for s in asked)
        else:
            refused[spec] = failed
    return {"images": [s.image for s in asked], "tasks": [s.task for s in asked], "right": right, "refused": refused}


def table(found: dict[str, Any]) -> str:
    """Rows: methods, by their mean. Cells: the other's macro mean, the difference, and its simultaneous lower bound."""
    images, tasks, right = found["images"], found["tasks"], found["right"]
    rows = {arm: [{"image": i, "task": t, "correct": c == "1"} for i, t, c in zip(images, tasks, hits)] for arm, hits in right.items()}
    scores = Scores(rows, sorted(dict.fromkeys(images)), list(dict.fromkeys(tasks)))
    there = [(m, n) for m in OTHERS for n, keep in COUNTS.items() if with_settings(m, f"keep={keep}") in right]
    cells = [scores.of(with_settings(OWN, f"keep={COUNTS[n]}"), -2, with_settings(m, f"keep={COUNTS[n]}")) for m, n in there]
    said = {
        at: f"{scores.of(with_settings(at[0], f'keep={COUNTS[at[1]]}'), -2).value:.1f}, {cell.value:+.1f} [{low:+.1f}]"
        for at, cell, low in zip(there, cells, lower_bounds(cells))
    }
    own = {n: scores.of(with_settings(OWN, f"keep={keep}"), -2).value for n, keep in COUNTS.items()}
    order = sorted({m for m, _ in there}, key=lambda m: sum(c.value for (other, _), c in zip(there, cells) if other == m))
    lines = [[m, *(said.get((m, n), "") for n in COUNTS)] for m in order]
    head = [f"{OWN} of none's {scores.of(BASELINE, -2).value:.1f}", *(f"{n} tokens: {own[n]:.1f}" for n in COUNTS)]
    return lined(head, lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("ask", "table"))
    parser.add_argument("--output-dir", type=Path, help="where answers are recorded as they come, to go on from there")
    parser.add_argument("--questions", type=int, default=4000, help="at most; there are about 3,300")
    args = parser.parse_args(argv)
    if args.action == "table":
        print(table(json.loads(RESULTS.read_text())))
        return 0
    if args.output_dir is None:
        parser.error("ask needs --output-dir")
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in ask(args.questions, args.output_dir).items()]
    RESULTS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
