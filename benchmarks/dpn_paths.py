"""Which kernels at which layers: a mixture of supernets, one supernet and DPN's fixed placement against all 27 paths by brute force.

    python benchmarks/dpn_paths.py --output-dir runs/mixers         trains, asks, writes the answers; an interrupted run goes on
    python benchmarks/dpn_paths.py --table                          the tables from the answers in benchmarks/results/dpn_paths

A path is a kernel (1x1, 1x2 or 2x2, maximum) before each of the decoder's layers 1, 2 and 3, the same for every question: what
``dpn:routing=fixed,kernel=1x1/1x2/2x2`` runs, without its floor of 18 tokens. ``alone`` trains the embedded model's language model
along one path, for every path. ``supernet`` trains one copy along paths drawn evenly; ``mixture`` three copies, drawn by a table of
how well each did along a path, balanced so that all copies are used alike (arXiv 2306.11982). Both say of every path how right it
is, and what counts is how the path of the best score at a cost does when it is trained alone, as that paper retrains what it chose.
``shipped`` trains nothing: it asks the weights that ship as ``dpn``, which saw all paths as their router chose them, along every path.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from dpn_training import COPIES, HOTTEST, PATHS, STEPS, asked, balanced, left, name_of, train  # beside this file
from mixers import TAIL, questions, resampled, shown

import mllm_efficient as me

SHIPPED = "shipped"
VAL = 100  # scenes of a score
KINDS = (SHIPPED, *STEPS)
BUDGETS = (40, 45, 50, 55, 60, 70)  # percent of the prefill's FLOPs
BRUTE, FIXED = "brute force", "one kernel"
RESULTS = Path(__file__).parent / "results" / "dpn_paths"


# ------------------------------------------------------------------------------------------------ runs


def shipped(folder: Path, results: Path) -> None:
    """Answers of the weights that ship, along every path; each path's are kept as they come."""
    import torch

    file = results / f"{SHIPPED}-0.json"
    out = json.loads(file.read_text()) if file.exists() else {"kind": SHIPPED, "seed": 0, "val": {}, "test": {}}
    torch.set_num_threads(1)
    model, _ = me.builtin(device="cpu")
    projector = copy.deepcopy(model.model.multi_modal_projector)
    with me.compressed(model, "dpn"):
        lm = copy.deepcopy(model.model.language_model)
    results.mkdir(parents=True, exist_ok=True)
    for path in PATHS:
        if name_of(path) not in out["test"]:
            out["val"][name_of(path)] = asked(lm, projector, path, "val", folder, VAL)
            out["test"][name_of(path)] = asked(lm, projector, path, "test", folder, TAIL)
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(out) + "\n")
            partial.replace(file)
            print(f"{SHIPPED} {name_of(path)} is done", flush=True)


def one_run(kind: str, only: int | None, seed: int, folder: Path, results: Path) -> None:
    import torch

    label = kind if only is None else f"{kind}-{name_of(PATHS[only]).replace('/', '-')}"
    file = results / f"{label}-{seed}.json"
    if file.exists():
        return
    torch.set_num_threads(1)
    copies, table, projector, log = train(kind, only, seed, folder)
    out: dict[str, Any] = {"kind": kind, "seed": seed, **log}
    if only is None:
        best = balanced(table, HOTTEST).argmax(1)
        scored = {name_of(path): asked(copies[best[i]], projector, path, "val", folder, VAL) for i, path in enumerate(PATHS)}
        out |= {"val": scored, "table": table.round(4).tolist(), "copies": best.tolist()}
    else:
        path = PATHS[only]
        out |= {"path": name_of(path), "val": asked(copies[0], projector, path, "val", folder, VAL)}
        out |= {"test": asked(copies[0], projector, path, "test", folder, TAIL)}
    results.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(out) + "\n")
    partial.replace(file)
    print(f"{label}-{seed} is done", flush=True)


# ------------------------------------------------------------------------------------------------ tables


def read(results: Path) -> dict[str, dict[str, Any]]:
    """The runs of seed 0 by kind, those of ``alone`` by their path."""
    runs = (json.loads(file.read_text()) for file in sorted(results.glob("*-0.json")))
    return {run.get("path", run["kind"]): run for run in runs}


def ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks, equal values their mean one."""
    values = np.asarray(values)
    return (values[:, None] > values).sum(1) + ((values[:, None] == values).sum(1) - 1) / 2


class Found:
    """What the runs say. cost: of every path; score: its test accuracy trained alone, with resamples; said: by whom, what of each path."""

    def __init__(self, results: Path):
        self.runs, self.cost = read(results), {name_of(path): left(path) for path in PATHS}
        self.names = [name for name in self.cost if name in self.runs]
        val, test = ([q for q in questions(split) if q[0] < n] for split, n in (("val", VAL), ("test", TAIL)))
        self.score = {name: resampled(self.runs[name]["test"], test) for name in self.names}
        self.said = {BRUTE: {name: resampled(self.runs[name]["val"], val)[0] for name in self.names}}
        for kind in COPIES:
            if kind in self.runs:
                self.said[kind] = {name: resampled(self.runs[kind]["val"][name], val)[0] for name in self.names}

    def chosen(self, kind: str, budget: float) -> str | None:
        """The path within a budget that somebody says is best; of FIXED, of those with one kernel at all layers."""
        cheap = [n for n in self.names if self.cost[n] <= budget and (kind != FIXED or len(set(n.split("/"))) == 1)]
        said = self.said[BRUTE if kind == FIXED else kind]
        return max(cheap, key=lambda name: (said[name], -self.cost[name]), default=None)

    def correlation(self, kind: str, other: dict[str, float]) -> float:
        """Of ranks of the paths."""
        return float(np.corrcoef(*(ranks([said[n] for n in self.names]) for said in (self.said[kind], other)))[0, 1])


def lines(results: Path) -> Iterator[str]:
    runs = read(results)
    if SHIPPED in runs:
        yield from of_shipped(runs[SHIPPED])
    if {*map(name_of, PATHS), *COPIES} <= set(runs):
        yield ""
        yield from of_trained(Found(results))


def of_shipped(run: dict[str, Any]) -> Iterator[str]:
    """What the best path of each cost gains over one kernel at all layers, which DPN's controls force, on the weights that ship."""
    val, test = ([q for q in questions(split) if q[0] < n] for split, n in (("val", VAL), ("test", TAIL)))
    cost, names = {name_of(path): left(path) for path in PATHS}, list(run["test"])
    said = {name: resampled(run["val"][name], val)[0] for name in names}
    score = {name: resampled(run["test"][name], test) for name in names}
    yield "| FLOPs up to | best of all paths | FLOPs | macro | one kernel | FLOPs | macro | all paths - one kernel |"
    yield "|---" * 8 + "|"
    for budget in BUDGETS:
        cells, paths = list[str](), []
        for of in (names, [name for name in names if len(set(name.split("/"))) == 1]):
            path = max((name for name in of if cost[name] <= budget), key=lambda name: (said[name], -cost[name]), default=None)
            paths.append(path)
            cells += ["", "", ""] if path is None else [path, f"{cost[path]:.1f}%", f"{score[path][0]:.1f}"]
        first, second = paths
        away = "" if first is None or second is None else "the same" if first == second else shown(score[first] - score[second])
        yield f"| {budget}% | {' | '.join(cells)} | {away} |"
    tested = {name: score[name][0] for name in names}
    yield ""
    for layer in range(3):
        means = {k: np.mean([tested[n] for n in names if n.split("/")[layer] == k]) for k in ("1x1", "1x2", "2x2")}
        costs = {k: np.mean([cost[n] for n in names if n.split("/")[layer] == k]) for k in means}
        said_of = ", ".join(f"{k} {means[k]:.1f} at {costs[k]:.1f}%" for k in means)
        yield f"- mean of the nine paths with each kernel before layer {layer + 1}: {said_of}"


def of_trained(found: Found) -> Iterator[str]:
    """What each chooses at each cost, trained alone."""
    kinds = (*found.said, FIXED)
    yield f"| FLOPs up to | {' | '.join(kind if kind == BRUTE else f'{kind} | - brute force' for kind in kinds)} |"
    yield "|---" * (2 * len(kinds)) + "|"
    for budget in BUDGETS:
        cells, best = list[str](), found.chosen(BRUTE, budget)
        assert best is not None
        for kind in kinds:
            path = found.chosen(kind, budget)
            own = "none" if path is None else f"{path}: {found.score[path][0]:.1f}"
            away = "" if path is None else "the same" if path == best else shown(found.score[path] - found.score[best])
            cells += [own] if kind == BRUTE else [own, away]
        yield f"| {budget}% | {' | '.join(cells)} |"
    yield ""
    tested = {name: found.score[name][0] for name in found.names}
    for kind in found.said:
        alone = "" if kind == BRUTE else f"{found.correlation(kind, found.said[BRUTE]):.2f} with their validation alone, "
        yield f"- {kind}, ranks of {len(found.names)} paths: {alone}{found.correlation(kind, tested):.2f} with their test alone"
    seconds = {BRUTE: sum(found.runs[n]["cpu_seconds"] for n in found.names)}
    seconds |= {kind: found.runs[kind]["cpu_seconds"] for kind in found.said if kind != BRUTE}
    yield f"- training, CPU s: {', '.join(f'{kind} {spent:.0f}' for kind, spent in seconds.items())}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, help="where drawn pictures and features are kept, those of mixers.py")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where answers are (default: beside this file)")
    parser.add_argument("--table", action="store_true", help="print the tables of the answers that are there")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="two commands with others share the work")
    args = parser.parse_args(argv)
    if args.output_dir is None and not args.table:
        parser.error("--output-dir or --table is needed")
    for kind in () if args.table else args.kinds:
        if kind == SHIPPED:
            shipped(args.output_dir, args.results)
            continue
        for only in range(len(PATHS)) if kind == "alone" else (None,):
            one_run(kind, only, 0, args.output_dir, args.results)
    if args.table or args.kinds == list(KINDS):
        print("\n".join(lines(args.results)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
