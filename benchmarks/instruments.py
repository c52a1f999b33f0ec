"""What the embedded models say of methods: every method at four budgets on each, positions, deepstack, and whether rankings agree.

    python benchmarks/instruments.py ask --output-dir runs/instruments                  # resumes; --only builtin-qwen for one model
    python benchmarks/instruments.py table                                              # of benchmarks/results/instruments, as Markdown

``ask`` leaves one JSON of right and wrong answers for every pair of a model and a benchmark, with the hash of the model's weights; tables
are made of those alone. A model whose weights are others is asked anew. ``--questions`` are of each benchmark's test split.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from mllm_efficient.stats import Scores, interval

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "instruments"
KEEPS = (0.5, 0.25, 0.125, 0.0625)
METHODS = (
    "random", "uniform", "resize", "pool", "spp", "tome", "tome:at=tower", "flowcut", "divprune", "divmerge", "apet", "otprune", "prunesid",
    "scope", "vispruner", "visionzip", "prumerge_plus", "fastervlm", "vscan", "cdpruner:relevance=llm", "mmtok", "hawk",
    "fastv:layer=1", "pyramiddrop", "sparsevlm", "dart:layer=1",
)  # fmt: skip
FILMED = ("evs", "vidcom2", "vcast", "fastvid")  # for videos alone
MOVED = ("random", "divprune", "divmerge")  # methods that are asked with both rules of positions
PARTED = ("uniform", "random", "divprune", "divmerge")  # and with a budget of each tile or frame instead of the whole
PAIRS = (
    ("builtin", "builtin", None), ("builtin-qwen", "builtin", None), ("builtin-qwen", "builtin-hard", None),
    ("builtin-video", "builtin-hard", "video"),
)  # fmt: skip  # model, benchmark, categories
FLAT = "without deepstack"
BASELINE, OTHER_RULE = "none", {"keep": "renumber", "renumber": "keep"}


def with_settings(method: str, *settings: str) -> str:
    name, colon, rest = method.partition(":")
    return f"{name}:{','.join([*([rest] if colon else []), *settings])}"


@dataclass(frozen=True)
class Answers:
    """One model on one benchmark. right: of every arm '1' or '0' for each question. tokens: kept, on average. refused: why, by arm."""

    model: str
    suite: str
    weights: str
    positions: str
    images: list[Any]
    tasks: list[str]
    full: float
    right: dict[str, str]
    tokens: dict[str, float]
    refused: dict[str, str]

    @property
    def name(self) -> str:
        return self.model if self.suite == "builtin" else f"{self.model}, {self.suite}"

    @property
    def categories(self) -> list[str]:
        return list(dict.fromkeys(self.tasks))

    def scores(self, arms: Sequence[str]) -> Scores:
        """Of arms, resampled by image; two benchmarks' answers about the same images are resampled alike."""
        rows = {
            arm: [{"image": i, "task": t, "correct": c == "1"} for i, t, c in zip(self.images, self.tasks, self.right[arm])] for arm in arms
        }
        return Scores(rows, sorted(dict.fromkeys(self.images)), self.categories)

    def has(self, arms: Sequence[str]) -> bool:
        return all(arm in self.right for arm in arms)


# ---------------------------------------------------------------------------------------------------------------- asking


def weights_of(model: str) -> str:
    """The hash of an embedded model's weights."""
    from mllm_efficient.embedded import model_source

    return hashlib.sha256((Path(model_source(model)) / "model.safetensors").read_bytes()).hexdigest()[:12]


def ask(model: str, suite: str, categories: str | None, questions: int, folder: Path, batch_size: int) -> Answers:
    """Asks what is not recorded in ``folder`` yet."""
    from mllm_efficient.apply.plan import check
    from mllm_efficient.errors import MllmEfficientError
    from mllm_efficient.eval.builtin.suites import embedded_suite
    from mllm_efficient.eval.runner import Run
    from mllm_efficient.loading.models import ModelOptions, load, require_supported
    from mllm_efficient.registry import runnable

    class Flat(Run):
        """Features of later layers are zeros."""

        def prepared(self, *given: Any) -> Any:
            done = super().prepared(*given)
            flat = [(kind, rows, tuple(layer * 0 for layer in deep)) for kind, rows, deep in done.features or ()]
            return replace(done, features=flat or None)

    weights = weights_of(model)
    loaded, embedded = load(ModelOptions(model)), embedded_suite(suite)
    asked = embedded.samples("test", questions, embedded.asks(categories, loaded.processor, print))
    adapter, methods, refused = require_supported(loaded), {BASELINE: runnable(BASELINE)}, dict[str, str]()
    video = categories == "video"
    part = f"per={'frame' if video else 'tile'}"
    wanted = [with_settings(m, f"keep={keep}") for keep in KEEPS for m in (*METHODS, *(FILMED if video else ()))]
    wanted += [with_settings(m, f"keep={keep}", part) for keep in KEEPS for m in PARTED]
    moved = (*METHODS, *FILMED) if video else MOVED  # when something happens is in the positions alone
    wanted += [with_settings(m, f"keep={keep}", f"positions={OTHER_RULE[adapter.positions]}") for keep in KEEPS for m in moved]
    for spec in wanted:
        try:
            method = runnable(spec)
            check(adapter, method)
            methods[spec] = method
        except MllmEfficientError as error:
            refused[spec] = str(error)
    where = folder / f"{model}-{suite}-{weights}"
    parts = [(Run, methods, "")]
    if adapter.deepstack:
        few = {spec: m for spec, m in methods.items() if spec == BASELINE or (m.name == "divprune" and m.positions is None)}
        parts.append((Flat, few, f" {FLAT}"))
    right, tokens, full = dict[str, str](), dict[str, float](), 0.0
    for kind, some, more in parts:
        run = kind(loaded, asked, list(some.values()), batch_size, where / (more.strip() or "stock"), floor=False, suite=embedded)
        records = run.answer_all()
        for spec, method in some.items():
            own = {r["id"]: r for r in records if r["method"] == method.spec()}
            failed = next((r["error"] for r in own.values() if r["error"] is not None), None)
            if failed is not None:
                refused[spec + more] = failed
                continue
            rows = [own[s.id] for s in asked]
            right[spec + more] = "".join("01"[r["correct"]] for r in rows)
            tokens[spec + more] = round(float(np.mean([r["visual_tokens_kept"] for r in rows])), 2)
            full = round(float(np.mean([r["visual_tokens_full"] for r in rows])), 2)
    images, tasks = [s.image for s in asked], [s.task for s in asked]
    return Answers(model, suite, weights, adapter.positions, images, tasks, full, right, tokens, refused)


def write(answers: Answers, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{answers.model}-{answers.suite}.json"
    lines = [f"{json.dumps(key)}: {_value(value)}" for key, value in vars(answers).items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _value(value: Any) -> str:
    if not isinstance(value, dict):
        return json.dumps(value)
    return "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n}"


def read(folder: Path) -> list[Answers]:
    """In the order of ``PAIRS``. Raises SystemExit where there is none."""
    paths = [folder / f"{model}-{suite}.json" for model, suite, _ in PAIRS]
    found = [Answers(**json.loads(path.read_text())) for path in paths if path.exists()]
    if not found:
        raise SystemExit(f"no answers in {folder}: 'python benchmarks/instruments.py ask --output-dir DIR' makes them")
    return found


# ---------------------------------------------------------------------------------------------------------------- tables


def signed(value: float, between: tuple[float, float], digits: int = 1) -> str:
    return f"{value:+.{digits}f} [{between[0]:+.{digits}f}, {between[1]:+.{digits}f}]"


def against(answers: Answers, arm: str, base: str) -> str:
    """The macro mean of an arm, and its paired difference to another with the 95% interval."""
    scores = answers.scores([arm, base])
    change = scores.of(arm, len(answers.categories), base)
    return f"{scores.values[arm][-2]:.1f}, {signed(change.value, change.interval())}"


def lined(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


def methods_table(answers: Answers, *settings: str) -> str:
    """Every method at every budget, the best mean over budgets first. settings: of all of them."""
    rows = []
    for method in (*METHODS, *FILMED):
        arms = [with_settings(method, f"keep={keep}", *settings) for keep in KEEPS]
        if not any(arm in answers.right for arm in arms):
            continue
        cells = [against(answers, arm, BASELINE) if arm in answers.right else "" for arm in arms]
        rows.append((sum(float(c.split(",")[0]) for c in cells if c) / sum(map(bool, cells)), [method, *cells]))
    header = [f"{', '.join([answers.name, *settings])}, none {answers.scores([BASELINE]).values[BASELINE][-2]:.1f}"]
    header += [f"{with_budget(answers, keep)} tokens" for keep in KEEPS]
    return lined(header, [cells for _, cells in sorted(rows, key=lambda row: -row[0])])


def with_budget(answers: Answers, keep: float) -> str:
    return f"{answers.tokens[with_settings('random', f'keep={keep}')]:g}"


def positions_table(all_answers: Sequence[Answers]) -> str:
    """Points that keeping positions gains over renumbering them."""
    rows = []
    for answers in all_answers:
        for method in MOVED:
            cells = []
            for keep in KEEPS:
                usual, other = (with_settings(method, f"keep={keep}", *s) for s in ((), (f"positions={OTHER_RULE[answers.positions]}",)))
                arms = (usual, other) if answers.positions == "keep" else (other, usual)
                cells.append(against(answers, *arms) if answers.has(arms) else "")
            rows.append([f"{answers.name}: {method}", *cells])
    return lined(["positions kept, against renumbered", *(f"keep={keep}" for keep in KEEPS)], rows)


def parts_table(all_answers: Sequence[Answers]) -> str:
    """Points that a budget of each tile or frame gains over one of the whole picture or video."""
    rows = []
    for answers in all_answers:
        for part, method in product(("tile", "frame"), PARTED):
            arms = [[with_settings(method, f"keep={keep}", *s) for s in ((f"per={part}",), ())] for keep in KEEPS]
            if any(answers.has(pair) for pair in arms):
                rows.append([f"{answers.name}: {method}, per={part}", *(against(answers, *p) if answers.has(p) else "" for p in arms)])
    return lined(["a budget of each part, against one of the whole", *(f"keep={keep}" for keep in KEEPS)], rows)


def deepstack_table(all_answers: Sequence[Answers]) -> str:
    """Points that are lost without the features of later layers."""
    rows = []
    for answers in all_answers:
        arms = [BASELINE, *(with_settings("divprune", f"keep={keep}") for keep in KEEPS)]
        if answers.has([f"{arm} {FLAT}" for arm in arms]):
            rows.append([answers.name, *(against(answers, f"{arm} {FLAT}", arm) for arm in arms)])
    return lined(["divprune without deepstack, against with it", "all tokens", *(f"keep={keep}" for keep in KEEPS)], rows)


def kendall(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Kendall's tau-b of each row of a with that of b (rows, methods). NaN where all of a row are equal."""
    first, second = np.triu_indices(a.shape[1], 1)
    x, y = (np.sign(v[:, first] - v[:, second]) for v in (a, b))
    with np.errstate(invalid="ignore", divide="ignore"):
        found: np.ndarray = (x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1))
    return found


def agreement_table(all_answers: Sequence[Answers]) -> str:
    """Kendall's tau between the rankings of two instruments by macro mean, with the 95% interval over resamples of images."""
    rows = []
    for i, one in enumerate(all_answers):
        for other in all_answers[i + 1 :]:
            cells = []
            for keep in KEEPS:
                arms = [with_settings(m, f"keep={keep}") for m in METHODS]
                arms = [arm for arm in arms if one.has([arm]) and other.has([arm])]
                both = [answers.scores(arms) for answers in (one, other)]
                value = kendall(*(np.array([[s.values[arm][-2] for arm in arms]]) for s in both))[0]
                drawn = kendall(*(np.stack([s.drawn[arm][:, -2] for arm in arms], 1) for s in both))
                cells.append(f"{signed(float(value), interval(drawn), 2)} ({len(arms)})")
            rows.append([f"{one.name} and {other.name}", *cells])
    return lined(["Kendall's tau (methods)", *(f"keep={keep}" for keep in KEEPS)], rows)


def best_table(all_answers: Sequence[Answers]) -> str:
    """The best method of each instrument at each budget, and those that are not shown to be worse (paired, 95%)."""
    rows = []
    for answers in all_answers:
        cells = []
        for keep in KEEPS:
            arms = {with_settings(m, f"keep={keep}"): m for m in (*METHODS, *FILMED) if answers.has([with_settings(m, f"keep={keep}")])}
            scores = answers.scores(list(arms))
            best = max(arms, key=lambda arm: scores.values[arm][-2])
            close = [m for arm, m in arms.items() if arm != best and scores.of(arm, len(answers.categories), best).interval()[1] >= 0]
            cells.append(f"**{arms[best]}**" + (f"; {', '.join(close)}" if close else ""))
        rows.append([answers.name, *cells])
    return lined(["best, and not shown to be worse", *(f"keep={keep}" for keep in KEEPS)], rows)


def tables(found: Sequence[Answers]) -> list[str]:
    """All of them, as Markdown."""
    each = []
    for answers in found:
        each.append(methods_table(answers))
        other = f"positions={OTHER_RULE[answers.positions]}"
        if any(answers.has([with_settings(m, f"keep={KEEPS[0]}", other)]) for m in METHODS if m not in MOVED):
            each.append(methods_table(answers, other))
    return [*each, positions_table(found), parts_table(found), deepstack_table(found), agreement_table(found), best_table(found)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("ask", "table"))
    parser.add_argument("--output-dir", type=Path, help="where answers are recorded as they come, to go on from there")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the files of right and wrong answers are")
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--only", action="append", help="a model; repeatable")
    args = parser.parse_args(argv)
    if args.action == "ask":
        if args.output_dir is None:
            parser.error("ask needs --output-dir")
        for model, suite, categories in PAIRS:
            if args.only is None or model in args.only:
                answers = ask(model, suite, categories, args.questions, args.output_dir, args.batch_size)
                write(answers, args.results)
                print(f"{answers.name}: {len(answers.right)} arms, {len(answers.refused)} refused", file=sys.stderr)
        return 0
    print("\n\n".join(tables(read(args.results))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
