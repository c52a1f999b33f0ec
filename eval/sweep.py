"""Methods x budgets on one model: accuracy, FLOPs, latency and memory of every cell, the uncompressed baseline first.

A folder keeps what is finished: answers in ``samples.jsonl``, timings in ``bench.jsonl``, at the end ``report.json``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mllm_efficient.apply.plan import check, describe
from mllm_efficient.compressors.base import BUDGET_FIELDS, Compressor
from mllm_efficient.compressors.composed import before_of, inside_of
from mllm_efficient.compressors.none import NoCompression
from mllm_efficient.compressors.random import Random
from mllm_efficient.compressors.resize import Resize
from mllm_efficient.errors import BadBudgetError, MllmEfficientError
from mllm_efficient.loading.models import Loaded, environment, require_supported
from mllm_efficient.measure.arms import BASELINE, METHOD, REFERENCE
from mllm_efficient.measure.bench import Bench, Settings
from mllm_efficient.measure.flops import Cost
from mllm_efficient.measure.ideal import PromptFlops
from mllm_efficient.measure.workload import Workload, make_inputs
from mllm_efficient.registry import runnable, with_budget, without_budget
from mllm_efficient.spec import parse, value_of

from .record.bench_file import BenchFile

BUDGETS = ("keep", "tokens", "prune")
TRIED = 4096  # budgets that ``match`` tries at most


@dataclass(frozen=True)
class Cell:
    """One method at one budget. asked: the budget as it was asked for. failed: why it cannot run, known before it does."""

    method: Compressor
    role: str
    asked: str = ""
    failed: str | None = None

    @property
    def spec(self) -> str:
        return self.method.spec()


def cross(specs: Sequence[str], budgets: Sequence[str]) -> list[Cell]:
    """The baseline, every method at every budget (``"keep=0.25"``), one that has a budget at that, then the references.

    The references are ``random`` and ``resize`` at every budget where they are not among the methods.
    """
    cells = [Cell(NoCompression(), BASELINE)]
    for spec in specs:
        lacking = without_budget(spec)
        if len(lacking) > 1:
            raise MllmEfficientError(f"--method {spec}: a sweep crosses one stage with its budgets: give the others one of their own")
        if lacking and not budgets:
            like = "a budget in each stage" if "|" in spec else f"{spec}:keep=0.25"
            raise MllmEfficientError(f"--method {spec} has no budget: give --keep 0.5,0.25 or --tokens 64,32, or {like}")
        for budget in budgets if lacking else [None]:
            method = runnable(spec if budget is None else with_budget(spec, **settings_of(budget)))
            if method.same_weights is not None:
                cells.append(Cell(runnable(method.same_weights), METHOD))
            cells.append(Cell(method, METHOD, budget or budget_of(method)))
    for asked in dict.fromkeys([*budgets, *(c.asked for c in cells if c.method.per == "image")]):
        for name in (Random.name, Resize.name):
            if asked and not any(c.asked == asked and c.method.name == name for c in cells):
                cells.append(Cell(runnable(f"{name}:{asked}"), REFERENCE, asked))
    return unique(cells)


def unique(cells: Sequence[Cell]) -> list[Cell]:
    """The first cell of each specification."""
    out: dict[str, Cell] = {}
    for cell in cells:
        out.setdefault(cell.spec, cell)
    return list(out.values())


def settings_of(budget: str) -> dict[str, Any]:
    """``{"keep": 0.25}`` of ``"keep=0.25"``."""
    (stage,) = parse(f"any:{budget}")
    return {name: value_of(value, text=False) for name, value in stage.settings.items()}


def budget_of(method: Compressor) -> str:
    """The budget of a method in the words of a specification, such as "keep=0.1"; "" where it says in another way what stays."""
    given = {name: value for name, value in method.to_dict().items() if name in BUDGET_FIELDS}
    return ",".join(f"{name}={value}" for name, value in given.items()) if set(BUDGETS) & set(given) else ""


def possible(cells: Sequence[Cell], loaded: Loaded, say: Callable[[str], None]) -> tuple[list[Cell], dict[str, str]]:
    """Cells that can run, those that fail with why, and the references left out.

    Raises for a method that the model cannot run at any budget.
    """
    adapter = require_supported(loaded).with_settings(loaded.picture_settings)
    out, left_out = [], dict[str, str]()
    for cell in cells:
        try:
            check(adapter, cell.method)
        except MllmEfficientError as error:
            if cell.role == REFERENCE:
                left_out[cell.spec] = str(error)
                continue
            if not (isinstance(error, BadBudgetError) and inside_of(cell.method) is not None):
                raise
            if (before := before_of(cell.method)) is not None:
                check(adapter, before)  # whose budget is met or is the error
            out.append(replace(cell, failed=str(error)))  # an average that cannot be reached; others can
            continue
        try:
            say(describe(cell.method, adapter.usual(), adapter))
        except MllmEfficientError as error:
            if cell.role == REFERENCE:
                left_out[cell.spec] = str(error)
                continue
            cell = replace(cell, failed=str(error))
        out.append(cell)
    return out, left_out


class Flops(PromptFlops):
    """FLOPs of the workload's prompt under any method, its new tokens included."""

    def __init__(self, loaded: Loaded, workload: Workload, seed: int = 0):
        adapter = require_supported(loaded)
        super().__init__(loaded, adapter, workload, make_inputs(loaded, adapter, workload, 1, seed), workload.output_tokens)

    def pure_drop(self, budget: Compressor) -> Cost:
        """What leaving out all tokens but those of a budget would cost."""
        # its stages or its router say what is left
        if len(budget.parts) > 1 or (
            budget.as_reducer is not None and (budget.routes or all(getattr(budget, name) is None for name in BUDGETS))
        ):
            return self.of(Random(tokens=self.of(budget).visual_tokens_kept))
        return self.of(Random(**{name: getattr(budget, name) for name in (*BUDGETS, "min_tokens", "max_tokens", "per")}))

    def match(self, cell: Cell) -> Cell:
        """The cell at the budget whose prefill FLOPs are nearest those of a pure token drop at the budget asked for."""
        if len(cell.method.parts) > 1:
            raise MllmEfficientError(f"--match flops solves one budget, and {cell.spec} has one for each stage: leave it out")
        target, method = self.pure_drop(cell.method).prefill, cell.method
        if self.of(method).prefill == target or method.routes:
            return cell
        wanted, fraction = method.budget.count(self.full, fixed=False), method.budget.fraction is not None
        best: tuple[int, int, Compressor] | None = None
        for tokens in sorted(range(1, self.full + 1), key=lambda t: (abs(t - wanted), t))[:TRIED]:
            value: dict[str, Any] = {"keep": round(tokens / self.full, 6)} if fraction else {"tokens": tokens}
            tried = replace(method, **({"keep": None, "tokens": None, "prune": None} | value))
            with contextlib.suppress(MllmEfficientError):
                off = abs(self.of(tried).prefill - target)
                if best is None or (off, abs(tokens - wanted)) < best[:2]:
                    best = (off, abs(tokens - wanted), tried)
            if best is not None and best[0] == 0:
                break
        return cell if best is None else replace(cell, method=best[2])


def flops_ratios(loaded: Loaded, methods: Sequence[Compressor], seed: int = 0) -> dict[str, Any]:
    """FLOPs of one usual prompt under every method over the baseline's: ``ratios`` by method, ``of``: the prompt, ``error``: why none."""
    flops, ratios = Flops(loaded, Workload(), seed), dict[str, dict[str, float]]()
    for method in methods if flops.error is None else ():
        with contextlib.suppress(MllmEfficientError):  # methods whose FLOPs this version does not count
            cost = flops.of(method)
            ratios[method.spec()] = {
                "flops_ratio": round(cost.total / flops.baseline.total, 6),
                "prefill_flops_ratio": round(cost.prefill / flops.baseline.prefill, 6),
            }
    return {"of": flops.call, "error": flops.error, "ratios": ratios}


# ------------------------------------------------------------------------------------------------------------ timings


ABOUT = ("ceiling", "clock", "meaning", "peak_memory", "kv_cache", "weights_mb", "machine", "workload", "order", "repeats", "warmup")


def groups(cells: Sequence[Cell], done: Sequence[str]) -> list[list[Cell]]:
    """Cells still to be timed, those of one budget together, so that they take turns; the baseline is in each group."""
    by_budget: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.role != BASELINE and cell.failed is None and cell.spec not in done:
            by_budget.setdefault(cell.asked, []).append(cell)
    return list(by_budget.values()) or ([] if NoCompression.name in done else [[]])


def bench_config(loaded: Loaded, settings: Settings) -> dict[str, Any]:
    """All that a timing depends on besides the method."""
    import torch

    given = {"workload": settings.workload.to_dict(), "repeats": settings.repeats, "warmup": settings.warmup, "seed": settings.seed}
    return {**given, "threads": torch.get_num_threads(), **environment(loaded)}


def time_all(
    loaded: Loaded, cells: Sequence[Cell], settings: Settings, file: BenchFile, bar: Callable[[int], Any]
) -> dict[str, dict[str, Any]]:
    """Bench rows by method, of which finished ones are not run again; a failed one has its reason in ``failed``.

    bar: called with the number of turns to come, gives back what is called after each.
    """
    wanted = {c.spec for c in cells}
    failed: dict[str, dict[str, Any]] = {}
    for group in groups(cells, list(file.rows)):
        try:
            bench = Bench(loaded, [c.method for c in group], settings)
            rows, meta = bench.run(bar(bench.total))
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            failed |= {c.spec: {"method": c.spec, "failed": reason} for c in (*cells[:1], *group) if c.spec not in file.rows}
            continue
        own = [r for r in rows if r["method"] in wanted]
        file.add(own, {k: meta[k] for k in ABOUT if k in meta})
        failed |= {r["method"]: r for r in own if r["failed"] is not None and r["method"] not in file.rows}
    return {**failed, **{k: v for k, v in file.rows.items() if k in wanted}}
