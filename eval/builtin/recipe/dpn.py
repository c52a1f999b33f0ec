"""What a router inside the decoder buys on the embedded model: DPN against the same weights with every kernel forced.

    python -m mllm_efficient.eval.builtin.recipe.dpn --output-dir OUT [--jobs 2]   trains, asks, writes the answers
    python -m mllm_efficient.eval.builtin.recipe.dpn --table [--plot FILE.png]     the tables from the answers that ship

Arms: ``published`` is ``configs/train/dpn_builtin.yaml``, the paper's placement, kernels, temperature, factor and routing loss.
``reinforce`` is ``dpn_builtin_reinforce.yaml``; ``straight_through`` and ``gumbel`` are that with another estimator. Each is
asked the test questions with its router, with kernels drawn evenly, with every kernel forced, and with all tokens
(``none@dpn``). An interrupted study goes on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mllm_efficient.compressors.dpn import DPN
from mllm_efficient.measure.flops import load_shape, prefill_flops
from mllm_efficient.stats import Hits, accuracy, draws, interval

from ..questions import CATEGORIES
from ..suite import Sample, samples
from .study import Answers, Study, answered, difference, read_answers, words_of

SEEDS = (0, 1, 2)
QUESTIONS = 5000
TOKENS, TEXT = 144, 16  # of a picture, and text tokens of a prompt for its FLOPs
FULL, ALL, ROUTED, EVENLY = "none", "none@dpn", "routed", "random"
RESULTS = Path("benchmarks/results/dpn")
TRIED = "tried"  # subfolder with answers of single runs under other settings
SAME_COST = "stages.1.batch_size=16"  # as many prompts a step as two samples of half as many


def _estimator(name: str) -> tuple[str, ...]:
    return (f"routing.estimator={name}", "routing.samples=1", SAME_COST)


ARMS = {"published": (), "reinforce": (), "straight_through": _estimator("straight_through"), "gumbel": _estimator("gumbel")}
REINFORCE = "dpn_builtin_reinforce"


def specs(final: Path | None) -> dict[str, str]:
    """What a run is asked as."""
    assert final is not None
    kernels = json.loads((final / "config.json").read_text())["kernels"].split("/")
    method = DPN(weights=str(final))
    forced = {kernel: replace(method, routing="fixed", kernel=kernel).spec() for kernel in kernels}
    evenly = replace(method, routing="random").spec()
    return {FULL: "none", ALL: str(method.same_weights), ROUTED: method.spec(), EVENLY: evenly, **forced}


def ask(asked: Sequence[Sample], specs: dict[str, str]) -> dict[str, Any]:
    """The answers of every row, and what was kept: ``kernels`` of every question, ``layers`` of every way through them."""
    records = answered(asked, specs)
    pooled = {name: rows for name, rows in records.items() if name not in (FULL, ALL)}
    every = [r for rows in pooled.values() for r in rows]
    return {
        "answers": {name: words_of(rows) for name, rows in records.items()},
        "kernels": {name: " ".join("/".join(r["kernels"]) for r in rows) for name, rows in pooled.items()},
        "layers": {"/".join(r["kernels"]): r["tokens_per_layer"] for r in every},
    }


class Run:
    """The answers of one run by row, as estimates and resamples. images: of the questions; weights: (resamples, images)."""

    def __init__(self, run: dict[str, Any], asked: Sequence[Sample], weights: np.ndarray):
        self.run, self.asked, self.weights = run, asked, weights
        self.images = sorted({s.image for s in asked})
        decoder = load_shape("builtin").decoder
        whole = [TOKENS] * decoder.layers
        ways = {way: tuple(layers) for way, layers in run["layers"].items()}
        self.tokens, self.cost = dict[str, np.ndarray](), dict[str, np.ndarray]()
        full = prefill_flops(decoder, [n + TEXT for n in whole])
        for name in run["answers"]:
            taken = [tuple(whole)] * len(asked) if name in (FULL, ALL) else [ways[way] for way in run["kernels"][name].split()]
            costs = {layers: 100 * prefill_flops(decoder, [n + TEXT for n in layers]) / full for layers in set(taken)}
            self.tokens[name] = np.array([np.mean(layers) for layers in taken])
            self.cost[name] = np.array([costs[layers] for layers in taken])
        self.right = {
            name: np.array([w == s.question.answer for w, s in zip(words.split(), asked, strict=True)], dtype=float)
            for name, words in run["answers"].items()
        }

    @property
    def kernels(self) -> list[str]:
        """Those that were forced, from fine to coarse."""
        named = [name for name in self.run["answers"] if name not in (FULL, ALL, ROUTED, EVENLY)]
        return sorted(named, key=lambda kernel: -self.cost[kernel].mean())

    def of(self, values: np.ndarray) -> np.ndarray:
        """(resamples, categories + 2) means of a number per question; the last but one is that of the categories."""
        rows = [{"image": s.image, "task": s.task, "correct": v} for s, v in zip(self.asked, values)]
        return accuracy(Hits(rows, self.images, CATEGORIES), self.weights) / 100

    def score(self, name: str) -> np.ndarray:
        """(resamples,) macro accuracy in percent."""
        return 100 * self.of(self.right[name])[:, -2]

    def left(self, name: str) -> np.ndarray:
        """(resamples,) prefill FLOPs of the language model in percent of those with all tokens."""
        return self.of(self.cost[name])[:, -2]

    def around(self) -> tuple[str, str]:
        """The forced kernels whose FLOPs are next below and above the routed ones'."""
        own = self.cost[ROUTED].mean()
        coarse = [k for k in self.kernels if self.cost[k].mean() <= own]
        fine = [k for k in self.kernels if self.cost[k].mean() >= own]
        below, above = (coarse or self.kernels[-1:])[0], (fine or self.kernels[:1])[-1]
        if below == above:  # outside of them all, or on one of them
            at = self.kernels.index(above)
            above = self.kernels[at - 1] if at else above
            below = self.kernels[1] if at == 0 else below
        return below, above

    def above_the_line(self) -> np.ndarray:
        """(resamples,) points of the router above what mixing the two forced kernels around it would give at its FLOPs."""
        below, above = self.around()
        share = (self.left(ROUTED) - self.left(below)) / (self.left(above) - self.left(below))
        return self.score(ROUTED) - ((1 - share) * self.score(below) + share * self.score(above))

    def detail(self) -> np.ndarray:
        """(questions,) whether a question needs detail: right at the finer of the two kernels around, wrong at the coarser."""
        below, above = self.around()
        return (self.right[above] > 0) & (self.right[below] == 0)

    def effect(self) -> tuple[np.ndarray, np.ndarray]:
        """(resamples,) of the tokens of questions that need detail and of the others: the difference, and it over the deviation."""
        tokens, needs = self.tokens[ROUTED], self.detail()
        at = {image: i for i, image in enumerate(self.images)}
        where = np.array([at[s.image] for s in self.asked])
        moments = []
        for group in (needs, ~needs):
            sums = [np.bincount(where, weights=group * tokens**power, minlength=len(self.images)) for power in (0, 1, 2)]
            n, first, second = (self.weights @ s for s in sums)
            moments.append((n, first / n, second / n - (first / n) ** 2))
        (n1, m1, v1), (n2, m2, v2) = moments
        spread = np.sqrt((n1 * v1 + n2 * v2) / (n1 + n2))
        return m1 - m2, (m1 - m2) / spread


Runs = dict[str, dict[int, Run]]


def runs_of(answers: Answers, asked: Sequence[Sample]) -> Runs:
    images = len({s.image for s in asked})
    weights = np.concatenate([np.ones((1, images)), draws(images, 0)])
    out: Runs = {}
    for (arm, seed), run in sorted(answers.items()):
        out.setdefault(arm, {})[seed] = Run(run, asked, weights)
    return {arm: out[arm] for arm in ARMS if arm in out}


def table(folder: Path) -> str:
    """All tables as Markdown: means over seeds, 95% intervals over images, the seeds' range in brackets."""
    runs = runs_of(*read_answers(folder))
    parts = [part for arm, by_seed in runs.items() for part in (arm_table(arm, by_seed), claims(arm, by_seed))]
    parts += [tried(folder / TRIED)] if (folder / TRIED).is_dir() else []
    return "\n\n".join("\n".join(part) for part in parts)


def tried(folder: Path) -> list[str]:
    """One line for each of the single runs in a folder: what they changed in the recipe, and what came of it."""
    lines = ["| reinforce with | routed, macro | prefill FLOPs | - none@dpn | above the line | - random routing |", "|---" * 6 + "|"]
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        (run,) = next(iter(runs_of({("reinforce", content["seed"]): content}, samples("test", content["questions"])).values())).values()
        found = [run.score(ROUTED) - run.score(ALL), run.above_the_line(), run.score(ROUTED) - run.score(EVENLY)]
        cells = ["{:+.2f} [{:+.2f}, {:+.2f}]".format(v[0], *interval(v[1:])) for v in found]
        changed = ", ".join(f"`{o}`" for o in content["override"])
        lines.append(f"| {changed} | {run.score(ROUTED)[0]:.1f} | {run.left(ROUTED)[0]:.1f}% | {' | '.join(cells)} |")
    return lines


def arm_table(arm: str, by_seed: dict[int, Run]) -> list[str]:
    first = next(iter(by_seed.values()))
    seeds = f"{len(by_seed)} seeds" if len(by_seed) > 1 else f"seed {next(iter(by_seed))}"
    lines = [
        f"| {arm}, {seeds} | {' | '.join(CATEGORIES)} | macro | tokens per layer | prefill FLOPs |", "|---" * (len(CATEGORIES) + 4) + "|",
    ]  # fmt: skip
    for name in (FULL, ALL, *first.kernels, EVENLY, ROUTED):
        each = [run.score(name)[0] for run in by_seed.values()]
        by_task = 100 * np.mean([run.of(run.right[name])[0, : len(CATEGORIES)] for run in by_seed.values()], axis=0)
        tokens = np.mean([run.of(run.tokens[name])[0, -2] for run in by_seed.values()])
        left = np.mean([run.left(name)[0] for run in by_seed.values()])
        spread = f" ({min(each):.1f}-{max(each):.1f})" if len(each) > 1 and name != FULL else ""
        cells = [*(f"{v:.1f}" for v in by_task), f"{np.mean(each):.1f}{spread}", f"{tokens:.1f}", f"{left:.1f}%"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    tokens = np.mean([run.of(run.tokens[ROUTED])[0, : len(CATEGORIES)] for run in by_seed.values()], axis=0)
    return [*lines, f"| tokens per layer, routed | {' | '.join(f'{v:.1f}' for v in tokens)} | | | |"]


def claims(arm: str, by_seed: dict[int, Run]) -> list[str]:
    """What the routing is worth, each a paired bootstrap over images of the mean over seeds."""

    def average(value: Any) -> np.ndarray:
        out: np.ndarray = np.mean([value(run) for run in by_seed.values()], axis=0)
        return out

    around = {run.around() for run in by_seed.values()}
    kernels = " and ".join(sorted({f"{above} and {below}" for below, above in around}))
    needs = np.mean([run.detail().mean() for run in by_seed.values()])
    return [
        difference(f"{arm}: routed - {ALL}, points", average(lambda r: r.score(ROUTED) - r.score(ALL)), 2),
        difference(f"{arm}: routed - {FULL}, points", average(lambda r: r.score(ROUTED) - r.score(FULL)), 2),
        difference(f"{arm}: routed above the line between {kernels} forced, points", average(lambda r: r.above_the_line()), 2),
        difference(f"{arm}: routed - random routing, points", average(lambda r: r.score(ROUTED) - r.score(EVENLY)), 2),
        difference(f"{arm}: tokens per layer, questions that need detail ({100 * needs:.1f}%) - others", average(lambda r: r.effect()[0])),
        difference(f"{arm}: the same over its standard deviation (Cohen's d)", average(lambda r: r.effect()[1]), 2),
    ]


def plot(folder: Path, path: Path) -> None:
    """The kernels that ``reinforce`` chose by category, beside what the finer of the two kernels around is worth there."""
    from matplotlib.figure import Figure

    by_seed = runs_of(*read_answers(folder))["reinforce"]
    first = next(iter(by_seed.values()))
    below, above = first.around()
    tasks = np.array([s.task for s in first.asked])
    gain = {t: 100 * np.mean([(r.right[above] - r.right[below])[tasks == t].mean() for r in by_seed.values()]) for t in CATEGORIES}
    order = sorted(CATEGORIES, key=lambda t: gain[t])
    figure = Figure(figsize=(9, 3.6), dpi=160, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    start = np.zeros(len(order))
    for number, kernel in enumerate(reversed(first.kernels)):
        chosen = {seed: np.array(run.run["kernels"][ROUTED].split()) == kernel for seed, run in by_seed.items()}
        share = np.array([100 * np.mean([c[tasks == t].mean() for c in chosen.values()]) for t in order])
        left.barh(order, share, left=start, color=("#c9d3e0", "#5b84b1", "#16324f")[number % 3], label=kernel)
        start += share
    left.set(xlabel=f"kernel the router chose, % of questions ({len(by_seed)} seeds)", xlim=(0, 100))
    left.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.16), frameon=False)
    right.barh(order, [gain[t] for t in order], color="#c0652b")
    right.set(xlabel=f"points that {above} forced gains over {below} forced")
    right.axvline(0, color="#16181d", linewidth=0.8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


STUDY = Study(
    "mllm_efficient.eval.builtin.recipe.dpn", __doc__, "dpn_builtin", RESULTS, ARMS, SEEDS, QUESTIONS, specs, ask, table, untrained=False,
    recipes={arm: REINFORCE for arm in ARMS if arm != "published"}, shared=("reinforce", "straight_through", "gumbel"), plot=plot,
)  # fmt: skip
main = STUDY.main

if __name__ == "__main__":
    raise SystemExit(main())
