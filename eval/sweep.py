"""Methods x budgets on one model: accuracy, FLOPs, latency and memory of every cell, the uncompressed baseline first.

A folder keeps what is finished: answers in ``samples.jsonl``, timings in ``bench.jsonl``, at the end ``report.json``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mllm_efficient import locking
from mllm_efficient.apply.plan import check, describe
from mllm_efficient.compressors.base import Compressor
from mllm_efficient.compressors.composed import before_of, inside_of, runnable
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
from mllm_efficient.parsing import parse_yaml, read_yaml
from mllm_efficient.registry import get_method
from mllm_efficient.writing import write_text, writing

from .record.samples import SAMPLES_FILE, fingerprint_of

BUDGETS = ("keep", "tokens", "prune")
BENCH_FILE, LOCK_FILE, BEGUN_FILE = "bench.jsonl", "sweep.lock", "unfinished.json"
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
        own = own_budget(spec)
        if own is None and not budgets:
            like = "a budget in each stage" if "|" in spec else f"{spec}:keep=0.25"
            raise MllmEfficientError(f"--method {spec} has no budget: give --keep 0.5,0.25 or --tokens 64,32, or {like}")
        for budget in [None] if own is not None else budgets:
            method = runnable(spec) if budget is None else _with_budget(spec, budget)
            if method.same_weights is not None:
                cells.append(Cell(runnable(method.same_weights), METHOD))
            cells.append(Cell(method, METHOD, own or budget or ""))
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


def own_budget(spec: str) -> str | None:
    """The budget in a specification or YAML file, such as "keep=0.1"; "" for ``none`` and for several, None where one is lacking."""
    if spec.endswith((".yaml", ".yml")):
        try:
            method = runnable(spec)
        except MllmEfficientError as error:
            if "no budget" in str(error):
                return None
            raise
        settings = {k: v for k, v in method.to_dict().items() if k in (*BUDGETS, "min_tokens", "max_tokens", "per")}
        return ",".join(f"{k}={v}" for k, v in settings.items())
    if "|" in spec:
        lacking = [part for part in spec.split("|") if own_budget(part) is None]
        if len(lacking) > 1:
            raise MllmEfficientError(f"--method {spec}: a sweep crosses one stage with its budgets: give the others one of their own")
        return None if lacking else ""
    spec = spec.strip()
    name = re.split("[:@]", spec)[0].strip()
    if name == NoCompression.name or getattr(get_method(name), "routes", False):
        return ""
    found = re.findall(r"[:,]\s*(\w+)\s*=\s*([^,]+?)\s*(?=,|$)", spec)
    if any(k in ("ratio", "ratios") for k, _ in found):  # an in-decoder method that says what its stages leave
        return ""
    parts = [f"{k}={v}" for k, v in found if k in (*BUDGETS, "min_tokens", "max_tokens")]
    return ",".join(parts) if any(k in BUDGETS for k, _ in found) else None


def _with_budget(spec: str, budget: str) -> Compressor:
    if "|" in spec:
        return runnable([part if own_budget(part) is not None else _with_budget(part.strip(), budget) for part in spec.split("|")])
    if not spec.endswith((".yaml", ".yml")):
        return runnable(f"{spec}{',' if ':' in spec else ':'}{budget}")
    name, _, value = budget.partition("=")
    content = read_yaml(Path(spec))
    if not isinstance(content, dict) or "stages" in content:
        raise MllmEfficientError(f"{spec}: give each of its stages a budget")
    return runnable({**content, name: parse_yaml(value)})


def possible(cells: Sequence[Cell], loaded: Loaded, say: Callable[[str], None]) -> tuple[list[Cell], dict[str, str]]:
    """Cells that can run, those that fail with why, and the references left out.

    Raises for a method that the model cannot run at any budget.
    """
    adapter = require_supported(loaded)
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


# ------------------------------------------------------------------------------------------- timings that are kept


class BenchFile:
    """Finished bench rows by method, one line of JSON each, in ``bench.jsonl``; those of other settings are passed over.

    A torn last line (a kill in mid-write) is dropped.
    """

    def __init__(self, folder: Path, config: dict[str, Any]):
        self.path, self.fingerprint = folder / BENCH_FILE, fingerprint_of(config)
        self.rows: dict[str, dict[str, Any]] = {}
        self.about: dict[str, Any] = {}
        end = 0
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else (), start=1):
            if not line.endswith(b"\n"):
                break
            try:
                entry = json.loads(line)
                mine = entry["fingerprint"] == self.fingerprint
                method, row, about = entry["method"], entry["row"], entry["about"]
            except (ValueError, KeyError, TypeError):
                raise MllmEfficientError(f"{self.path} line {number} is no record of a sweep: use another --output-dir") from None
            if mine:
                self.rows[method] = row
                self.about = self.about or about
            end += len(line)
        if self.path.exists():
            os.truncate(self.path, end)

    def add(self, rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
        """Keeps what did not fail; a method that is there already stays as it is."""
        new = [r for r in rows if r["failed"] is None and r["method"] not in self.rows]
        lines = [json.dumps({"fingerprint": self.fingerprint, "method": r["method"], "row": r, "about": about}) + "\n" for r in new]
        with writing(self.path), self.path.open("a") as file:
            file.write("".join(lines))
        self.rows |= {r["method"]: r for r in new}
        self.about = self.about or about


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
        mine = [r for r in rows if r["method"] in wanted]
        file.add(mine, {k: meta[k] for k in ABOUT if k in meta})
        failed |= {r["method"]: r for r in mine if r["failed"] is not None and r["method"] not in file.rows}
    return {**failed, **{k: v for k, v in file.rows.items() if k in wanted}}


def begin(folder: Path, arms: Sequence[str], answers: int, command: str) -> None:
    """Notes what a sweep is going to answer, for ``unfinished``."""
    write_json(folder / BEGUN_FILE, {"arms": list(arms), "answers": answers, "command": command})


def unfinished(folder: Path) -> str | None:
    """How far the sweep in a folder has come and what to do; None where none has begun. To be asked where there is no report."""
    try:
        begun = json.loads((folder / BEGUN_FILE).read_text())
        arms, answers, command = set(begun["arms"]), begun["answers"], begun["command"]
        lines = (folder / SAMPLES_FILE).read_bytes().splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith(b"\n")]
        done = len({(r["method"], r["id"]) for r in rows if r["method"] in arms})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return f"unfinished: {min(done, answers)} of {answers} answers; run the same sweep again: {command}"


def owned(folder: Path) -> contextlib.AbstractContextManager[None]:
    """The folder belongs to this process inside; another process that owns it is named in the error."""
    return locking.owned(folder, LOCK_FILE, "--output-dir")


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file in one step: a reader finds the old one or the new one."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
