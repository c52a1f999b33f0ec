"""Accuracy on the embedded benchmark, or agreement on a user's own requests: what ``me.evaluate`` and the command ``eval`` run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllm_efficient.compressors.base import Compressor
from mllm_efficient.embedded import is_embedded
from mllm_efficient.loading.models import Loaded
from mllm_efficient.progress import SILENT, Progress
from mllm_efficient.tables import Table

from .agreement_rows import agreement_rows, agreement_table, length_table, worst_table
from .answering import answered, failures
from .asked import OwnRequests
from .builtin.suites import embedded_suite
from .record.bench_file import write_json
from .record.samples import fingerprint_of
from .requests import Request
from .results import EVALUATE, Results
from .robustness import corrupted_rows, corrupted_table, under, with_corrupted
from .runner import Run
from .sweep import flops_ratios
from .table import rows_of, text_table

BATCH, DATA_BATCH = 32, 8
TINY = "Offline self-test on a tiny model, not evidence about 7B models."
AGREEMENT = (
    "'same answer', 'same words': percent of requests answered as by the uncompressed model, to the letter and apart from case, "
    "punctuation, articles and numbers spelled out; 'first other token': where different answers part, on average; 'KL': of the next "
    "token along the uncompressed model's answer; 'right': percent of the requests that have an answer."
)
SCORES = (
    "Scores are percent right; 'macro' is the unweighted mean of the categories; 'in region' is the share of kept tokens on what the "
    "question is about; 'ECE', 'AURC': calibration of the answers' confidence, in percent (lower is better)."
)
HARD = "'hard': right of what none gets right and resize at the same budget wrong; 'broken': wrong of what both get right."
TURNS = (
    "'2nd turn': the macro mean of the same questions asked second in a conversation, with the visual tokens that were chosen for the "
    "first question; none is then the uncompressed model in its second turn."
)
FIRST = ("tokens", "macro", "vs none", "retention")
FIRST_OF_DATA = ("tokens", "same words", "same answer", "right", "KL nats")


def on_benchmark(
    loaded: Loaded, methods: Sequence[Compressor], *, suite: str | None = None, categories: str | None = None,
    split: str = "test", turns: int = 1, limit: int | None = None, batch_size: int = 32,
    corrupt: Sequence[str] = (), against: str | None = None, output_dir: Path | None = None, progress: Progress = SILENT,
) -> Results:  # fmt: skip
    """Accuracy of methods, of which the first is the baseline, on an embedded benchmark. categories: ``a,b`` of it, None for all.

    corrupt: every question also about its pictures under each of these corruptions.
    """
    embedded = embedded_suite(suite)
    asked = embedded.asks(categories, loaded.processor, progress.say)
    questions = embedded.samples(split, limit, asked)
    every = with_corrupted(questions, corrupt)
    run = Run(loaded, every, methods, batch_size=batch_size, output_dir=output_dir, turns=turns, suite=embedded)
    paired = len(run.asked) - len(every)
    more = f", {paired} of them also as a second turn" if turns > 1 else ""
    more += f", each under {', '.join(corrupt)} too" if corrupt else ""
    progress.say(f"{len(questions)} questions x {len(run.arms)} arms (with the no-image floor){more}")
    records = answered(run, progress)
    rows = rows_of(under(records, None), methods, asked, against=against, seed=loaded.options.seed)
    more_rows = corrupted_rows(records, methods, asked, corrupt, against=against, seed=loaded.options.seed)
    meta = {
        **run.config, "split": split, "turns": turns, "questions": len(questions), "second_turns": paired,
        "questions_fingerprint": fingerprint_of({"ids": sorted(s.id for s in questions)}),
        "images": len({s.image for s in questions}), "batch_size": batch_size, "limit": limit,
        "methods": [m.to_dict() for m in methods], "interval": "95%, 2000 paired resamples of images",
        "flops": flops_ratios(loaded, methods),
        **embedded.blind(questions),
    }  # fmt: skip
    tables = [benchmark_table(rows, meta, asked), *([corrupted_table([*rows, *more_rows], corrupt)] if corrupt else [])]
    return _kept(Results(EVALUATE, [*rows, *more_rows], meta, tuple(tables), failures(records)), output_dir)


def benchmark_table(rows: Sequence[dict[str, Any]], meta: dict[str, Any], categories: Sequence[str]) -> Table:
    """The categories of every method, with what the columns mean."""
    header, lines = text_table(rows, categories)
    hard = [HARD] if any(r.get("hard_n") is not None for r in rows) else []
    floors = ", ".join(f"{name} {f['floor']:.1f} (at most {f['upper']:.1f})" for name, f in meta.get("blind_floor", {}).items())
    blind = [f"Answers learnt without images score: {floors}."] if floors else []
    notes = [*blind, *hard, SCORES, *([TURNS] if meta["turns"] > 1 else []), *([TINY] if is_embedded(meta["model"]) else [])]
    return Table(header, lines, first=FIRST, note=" ".join(notes))


def on_requests(
    loaded: Loaded, methods: Sequence[Compressor], requests: Sequence[Request], data: Path, *, limit: int | None = None,
    batch_size: int = 8, max_new_tokens: int | None = None, against: str | None = None, output_dir: Path | None = None,
    progress: Progress = SILENT,
) -> Results:  # fmt: skip
    """How far answers to a user's requests stay those of the uncompressed model, the first of the methods."""
    asked = OwnRequests(loaded, methods, requests, data, batch_size, max_new_tokens, output_dir)
    progress.say(asked.line)
    records = answered(asked.run, progress)
    rows = agreement_rows(records, methods, against=against, seed=loaded.options.seed)
    made = [m.to_dict() for m in methods]
    meta = {
        **asked.run.config,
        "batch_size": batch_size,
        "limit": limit,
        "methods": made,
        "flops": flops_ratios(loaded, methods),
        **asked.about(records),
    }
    tables = [Table(*agreement_table(rows), first=FIRST_OF_DATA, note=AGREEMENT), *lengths(rows)]
    if meta["worst"]:
        title = "Farthest from the uncompressed model (meta.worst has more):"
        tables.append(Table(*worst_table(meta["worst"]), left=5, title=title))
    return _kept(Results(EVALUATE, rows, meta, tuple(tables), failures(records)), output_dir)


def lengths(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """Agreement by the length of answers, where they are of several lengths."""
    header, lines = length_table(rows)
    title = "Same words by the tokens of the uncompressed model's answer, its end among them [95%]:"
    return [Table(header, lines, title=title)] if lines else []


def _kept(results: Results, output_dir: Path | None) -> Results:
    """The same, written to ``results.json`` of the folder."""
    if output_dir is not None:
        write_json(output_dir / "results.json", {"rows": results.rows, "meta": results.meta})
    return results
