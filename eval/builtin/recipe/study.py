"""What the studies of trained methods share: arms and seeds trained in processes of their own, answers kept, intervals.

An arm is a recipe with overrides. Every run is trained, asked the test questions, and leaves one JSON of answers; tables are
made of those alone. An interrupted study goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from mllm_efficient.stats import interval
from mllm_efficient.train.config import Recipe
from mllm_efficient.train.reading import read

from ..suite import Sample, samples

Answers = dict[tuple[str, int], dict[str, Any]]
UNTRAINED = "untrained"
# a big buffer is given back to the system and taken again at every step without these
MEMORY = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000"}


@dataclass(frozen=True)
class Study:
    """What is trained and asked.

    module: to run with ``python -m``. recipe: of ``configs/train``. arms: their overrides. specs: the methods that a trained
    folder (None: the model as it came) is asked as, by name. ask: what is kept of the answers. table: of all of them.
    untrained: whether the model as it came is asked too. recipes: of arms that have another one. shared: arms whose first
    stage is the same, which is trained once for each seed. plot: draws the answers of a folder into a file.
    """

    module: str
    doc: str
    recipe: str
    results: Path
    arms: dict[str, tuple[str, ...]]
    seeds: tuple[int, ...]
    questions: int
    specs: Callable[[Path | None], dict[Any, str]]
    ask: Callable[[Sequence[Sample], dict[Any, str]], dict[str, Any]]
    table: Callable[[Path], str]
    untrained: bool = True
    recipes: dict[str, str] = field(default_factory=dict)
    shared: tuple[str, ...] = ()
    plot: Callable[[Path, Path], None] | None = None

    def main(self, argv: Sequence[str] | None = None) -> int:
        parser = argparse.ArgumentParser(description=self.doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--output-dir", type=Path, help="where the runs are kept")
        parser.add_argument("--results", type=Path, help=f"where answers are (default: OUTPUT_DIR/answers; with --table {self.results})")
        parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one core (default: 2)")
        parser.add_argument("--arms", nargs="+", default=list(self.arms), choices=list(self.arms))
        parser.add_argument("--seeds", type=int, nargs="+", default=self.seeds)
        parser.add_argument("--override", action="append", default=[], help="key=value for the recipe, for shorter trials")
        parser.add_argument("--questions", type=int, default=self.questions)
        parser.add_argument("--table", action="store_true", help="print the table of the answers that are there")
        if self.plot is not None:
            parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the answers that are there")
        parser.add_argument("--run", nargs=2, metavar=("ARM", "SEED"), help="one run, in this process")
        args = parser.parse_args(argv)
        if args.output_dir is None and not args.table:
            parser.error("--output-dir or --table is needed")
        args.results = args.results or (self.results if args.output_dir is None else args.output_dir / "answers")
        if args.run:
            self.one_run(args.run[0], int(args.run[1]), args)
        elif args.table:
            print(self.table(args.results))
            if self.plot is not None and args.plot is not None:
                self.plot(args.results, args.plot)
        else:
            return self.run_all(args)
        return 0

    def run_all(self, args: argparse.Namespace) -> int:
        """Every arm and seed in a process of its own, so many at a time."""
        from mllm_efficient.train.build import records_of

        # all arms of a seed before the next seed: what is there after an interruption is comparable
        wanted = [*([(UNTRAINED, 0)] if self.untrained else []), *((arm, seed) for seed in args.seeds for arm in args.arms)]
        command = [sys.executable, "-m", self.module, "--output-dir", str(args.output_dir), "--results", str(args.results)]
        command += ["--questions", str(args.questions), *(f"--override={o}" for o in args.override)]
        args.output_dir.mkdir(parents=True, exist_ok=True)

        def one(run: tuple[str, int]) -> int:
            with (args.output_dir / f"{run[0]}-{run[1]}.out").open("a") as out:
                this = [*command, "--run", run[0], str(run[1])]
                return subprocess.run(this, env={**os.environ, **MEMORY}, stdout=out, stderr=out).returncode

        for arm in args.arms:
            for stage in (recipe := self.recipe_of(arm, 0, args)).stages:
                records_of(recipe, stage)  # draws the training images once for all
        with ThreadPoolExecutor(args.jobs) as pool:
            codes = dict(zip(wanted, pool.map(one, wanted)))
        failed = [f"{arm}-{seed}" for (arm, seed), code in codes.items() if code]
        if failed:
            print(f"failed: {', '.join(failed)}; what they printed is in {args.output_dir}; the same command goes on", file=sys.stderr)
            return 1
        print(self.table(args.results))
        return 0

    def recipe_of(self, arm: str, seed: int, args: argparse.Namespace) -> Recipe:
        config = Path(str(files("mllm_efficient.configs"))) / "train" / f"{self.recipes.get(arm, self.recipe)}.yaml"
        return read(config, [f"output_dir={args.output_dir / f'{arm}-{seed}'}", f"seed={seed}", *self.arms[arm], *args.override])

    def one_run(self, arm: str, seed: int, args: argparse.Namespace) -> None:
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
        final = None
        if arm != UNTRAINED:
            recipe = self.recipe_of(arm, seed, args)
            self._share(arm, seed, recipe, args)
            final = run(recipe)
            log = [json.loads(line) for line in (Path(recipe.output_dir) / "log.jsonl").read_text().splitlines()]
        kept = self.ask(samples("test", args.questions), self.specs(final))
        args.results.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"arm": arm, "seed": seed, **asked_as, **kept, "log": log}) + "\n")
        partial.replace(path)

    def _share(self, arm: str, seed: int, recipe: Recipe, args: argparse.Namespace) -> None:
        """Takes over the first stage of another arm that has trained the same, with its log."""
        from mllm_efficient.train.count_trainer import WEIGHTS
        from mllm_efficient.train.trainer import LOG

        stage = recipe.stages[0].name
        own = Path(recipe.output_dir) / stage / WEIGHTS
        for other in self.shared if arm in self.shared and not own.exists() else ():
            there = args.output_dir / f"{other}-{seed}" / stage / WEIGHTS
            if other != arm and there.exists():
                own.parent.mkdir(parents=True, exist_ok=True)
                lines = (args.output_dir / f"{other}-{seed}" / LOG).read_text().splitlines(keepends=True)
                (Path(recipe.output_dir) / LOG).write_text("".join(line for line in lines if json.loads(line)["stage"] == stage))
                shutil.copy(there, partial := own.with_suffix(".partial"))
                partial.replace(own)
                return


def answered(asked: Sequence[Sample], specs: dict[Any, str]) -> dict[Any, list[dict[str, Any]]]:
    """The records of every question under every method, by the methods' names, in the order of the questions."""
    from mllm_efficient.eval.runner import Run
    from mllm_efficient.loading.models import ModelOptions, load
    from mllm_efficient.registry import runnable

    methods = {name: runnable(spec) for name, spec in specs.items()}
    records = Run(load(ModelOptions()), asked, list(methods.values()), batch_size=64, floor=False).answer_all()
    out = {}
    for name, method in methods.items():
        out[name] = [r for r in records if r["method"] == method.spec()]
        failed = [r["error"] for r in out[name] if r["error"] is not None]
        if failed:
            raise RuntimeError(f"{len(failed)} answers failed under {name}: {failed[0]}")
    return out


def words_of(records: Sequence[dict[str, Any]]) -> str:
    """The one-word answers, "-" for none."""
    return " ".join(r["answer"] or "-" for r in records)


def read_answers(folder: Path) -> tuple[Answers, list[Sample]]:
    """What every run answered, and the questions."""
    runs = {(r["arm"], r["seed"]): r for r in (json.loads(f.read_text()) for f in sorted(folder.glob("*.json")))}
    if not runs:
        raise SystemExit(f"no answers in {folder}: run it with --output-dir first")
    sizes = {r["questions"] for r in runs.values()}
    if len(sizes) > 1:
        raise SystemExit(f"the runs in {folder} were asked different numbers of questions: {sorted(sizes)}")
    return runs, samples("test", sizes.pop())


def mean(by_seed: dict[int, np.ndarray]) -> np.ndarray:
    return np.mean(list(by_seed.values()), axis=0)


def difference(what: str, values: np.ndarray, digits: int = 1) -> str:
    """A line with an estimate and its 95% interval."""
    low, high = interval(values[1:])
    return f"- {what}: {values[0]:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
