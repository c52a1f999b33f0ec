"""The TokenFLEX paper's table on the embedded model: what a projector of any count loses against one trained at each.

    python -m mllm_efficient.eval.builtin.recipe.tokenflex --output-dir OUT [--jobs 2]   trains, asks, writes the answers
    python -m mllm_efficient.eval.builtin.recipe.tokenflex --table                       the table from the answers that ship

Arms: ``dynamic`` (SwiGLU, the count drawn for every batch), ``fixed-144``, ``fixed-36``, ``fixed-9`` (SwiGLU, one count),
``mlp-dynamic`` (LLaVA's own layers, drawn counts). Each is trained by ``configs/train/tokenflex_builtin.yaml`` from the
same embedded model for the same steps with three seeds, and asked the test questions at every count of ``TESTED``.
``untrained`` is the embedded model itself, whose tokens are pooled to the count. An interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from mllm_efficient.eval.stats import Hits, accuracy, draws, interval
from mllm_efficient.train.config import Recipe, read

from ..questions import CATEGORIES
from ..suite import Sample, samples

COUNTS = (144, 36, 9)
TESTED = (144, 64, 36, 25, 16, 9)
SEEDS = (0, 1, 2)
QUESTIONS = 5000
DRAWN = "{144: 0.5, 36: 0.3, 9: 0.2}"
ARMS = {
    "dynamic": (f"counts={DRAWN}",),
    **{f"fixed-{count}": (f"counts={{{count}: 1}}",) for count in COUNTS},
    "mlp-dynamic": (f"counts={DRAWN}", "settings={layers: mlp}"),
}
UNTRAINED = "untrained"
RESULTS = Path("benchmarks/results/tokenflex")
LONGER = "longer"  # subfolder with answers of single runs that were trained longer


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, help="where the runs are kept")
    parser.add_argument("--results", type=Path, help=f"where the answers are (default: OUTPUT_DIR/answers; with --table {RESULTS})")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one core (default: 2)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--override", action="append", default=[], help="key=value for the recipe, for shorter trials")
    parser.add_argument("--questions", type=int, default=QUESTIONS)
    parser.add_argument("--table", action="store_true", help="print the table of the answers that are there")
    parser.add_argument("--run", nargs=2, metavar=("ARM", "SEED"), help="one run, in this process")
    args = parser.parse_args(argv)
    if args.output_dir is None and not args.table:
        parser.error("--output-dir or --table is needed")
    args.results = args.results or (RESULTS if args.table else args.output_dir / "answers")
    if args.run:
        one_run(args.run[0], int(args.run[1]), args)
    elif args.table:
        print(table(*read_answers(args.results)))
        if (args.results / LONGER).is_dir():
            print("\n" + longer_table(*read_answers(args.results / LONGER)))
    else:
        return run_all(args)
    return 0


def run_all(args: argparse.Namespace) -> int:
    """Every arm and seed in a process of its own, so many at a time."""
    from mllm_efficient.train.trainer import records_of

    # all arms of a seed before the next seed: what is there after an interruption is comparable
    wanted = [(UNTRAINED, 0), *((arm, seed) for seed in args.seeds for arm in ARMS)]
    command = [sys.executable, "-m", __spec__.name, "--output-dir", str(args.output_dir), "--results", str(args.results)]
    command += ["--questions", str(args.questions), *(f"--override={o}" for o in args.override)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000"}
    args.output_dir.mkdir(parents=True, exist_ok=True)

    def one(run: tuple[str, int]) -> int:
        with (args.output_dir / f"{run[0]}-{run[1]}.out").open("a") as out:
            return subprocess.run([*command, "--run", run[0], str(run[1])], env=env, stdout=out, stderr=out).returncode

    for stage in (recipe := _recipe("dynamic", 0, args)).stages:
        records_of(recipe, stage)  # draws the training images once for all
    with ThreadPoolExecutor(args.jobs) as pool:
        codes = dict(zip(wanted, pool.map(one, wanted)))
    failed = [f"{arm}-{seed}" for (arm, seed), code in codes.items() if code]
    if failed:
        print(f"failed: {', '.join(failed)}; what they printed is in {args.output_dir}; the same command goes on", file=sys.stderr)
        return 1
    print(table(*read_answers(args.results)))
    return 0


def _recipe(arm: str, seed: int, args: argparse.Namespace) -> Recipe:
    config = Path(str(files("mllm_efficient.configs"))) / "train" / "tokenflex_builtin.yaml"
    return read(config, [f"output_dir={args.output_dir / f'{arm}-{seed}'}", f"seed={seed}", *ARMS[arm], *args.override])


def one_run(arm: str, seed: int, args: argparse.Namespace) -> None:
    """Trains one arm, asks it everything, and writes its answers and its log."""
    from mllm_efficient.train.trainer import run

    path = args.results / f"{arm}-{seed}.json"
    asked_as = {"questions": args.questions, "override": args.override}
    if path.exists():
        there = json.loads(path.read_text())
        if {k: there[k] for k in asked_as} != asked_as:
            raise SystemExit(f"{path} is of another run ({ {k: there[k] for k in asked_as} }): use other --results and --output-dir")
        return
    log: list[dict[str, Any]] = []
    if arm == UNTRAINED:
        specs = {count: "none" if count == 144 else f"pool:tokens={count}" for count in TESTED}
    else:
        recipe = _recipe(arm, seed, args)
        final = run(recipe)
        log = [json.loads(line) for line in (Path(recipe.output_dir) / "log.jsonl").read_text().splitlines()]
        specs = {count: f"tokenflex:tokens={count},weights={final}" for count in TESTED}
    asked = samples("test", args.questions)
    answers = ask(asked, specs)
    args.results.mkdir(parents=True, exist_ok=True)
    content = {"arm": arm, "seed": seed, **asked_as, "answers": answers, "log": log}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content) + "\n")
    partial.replace(path)


def ask(asked: Sequence[Sample], specs: dict[int, str]) -> dict[str, str]:
    """The one-word answers at every count, in the order of the questions, "-" for none."""
    from mllm_efficient.eval.runner import Run
    from mllm_efficient.models import ModelOptions, load
    from mllm_efficient.shrink import pre_llm

    methods = {count: pre_llm(spec) for count, spec in specs.items()}
    records = Run(load(ModelOptions()), asked, list(methods.values()), batch_size=64, floor=False).answer_all()
    out = {}
    for count, method in methods.items():
        mine = [r for r in records if r["method"] == method.spec()]
        failed = [r["error"] for r in mine if r["error"] is not None]
        if failed:
            raise RuntimeError(f"{len(failed)} answers failed at {count} tokens: {failed[0]}")
        out[str(count)] = " ".join(r["answer"] or "-" for r in mine)
    return out


Answers = dict[tuple[str, int], dict[str, Any]]


def read_answers(folder: Path) -> tuple[Answers, list[Sample]]:
    """What every run answered, and the questions."""
    runs = {(r["arm"], r["seed"]): r for r in (json.loads(f.read_text()) for f in sorted(folder.glob("*.json")))}
    if not runs:
        raise SystemExit(f"no answers in {folder}: run it with --output-dir first")
    sizes = {r["questions"] for r in runs.values()}
    if len(sizes) > 1:
        raise SystemExit(f"the runs in {folder} were asked different numbers of questions: {sorted(sizes)}")
    return runs, samples("test", sizes.pop())


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


def mean(by_seed: dict[int, np.ndarray]) -> np.ndarray:
    return np.mean(list(by_seed.values()), axis=0)


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


def difference(what: str, values: np.ndarray) -> str:
    """A line with an estimate and its 95% interval."""
    low, high = interval(values[1:])
    return f"- {what}: {values[0]:+.1f} [{low:+.1f}, {high:+.1f}]"


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


if __name__ == "__main__":
    raise SystemExit(main())
