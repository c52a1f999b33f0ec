"""A user's own requests to running servers: how far a compressed server's answers stay those of the uncompressed one, and what they cost.

What each server does with a picture is its own affair; the first is the baseline. Servers take turns request by request of a batch, so
that what else runs on the machine reaches all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mllm_efficient.errors import MllmEfficientError
from mllm_efficient.progress import SILENT, Progress
from mllm_efficient.tables import Table

from .agreement import TEXT_ONLY, WITH_IMAGES, short
from .agreement_rows import Compared
from .answers import NORMALISATION, matches, normalise
from .lmms.asking import RECORD, Content
from .lmms.server import ServerAsker, ServerCell, served
from .record.bench_file import SERVERS, write_json
from .record.samples import fingerprint_of
from .requests import Request
from .results import EVALUATE, Results

RESULTS = "results.json"
NOTE = (
    "'same words': percent of the requests with a picture answered as by the first server, to the letter; 'normalised': apart from case, "
    "punctuation, articles and numbers spelled out; 'right': of those that have an answer; tokens as each server counts them, mean."
)
SHARES = ("exact_match", "normalised_match", "accuracy")
MEANING = {
    "exact_match, normalised_match": "percent of the requests with a picture that get the baseline's words, exactly or normalised; "
    "intervals: 95%",
    "accuracy": "percent right, of the requests that say what is right",
    "latency_p50_s, latency_p99_s": "from sending a request to the whole answer; at the concurrency of --batch-size",
    "prompt_tokens, visual_tokens_kept": "mean of a request, as the server counts them; visual ones null where it does not say (vLLM: "
    "--enable-prompt-tokens-details)",
}


def on_servers(
    cells: Sequence[ServerCell], requests: Sequence[Request], data: Path, *, batch_size: int, max_new_tokens: int, limit: int | None = None,
    output_dir: Path | None = None, seed: int = 0, progress: Progress = SILENT,
) -> Results:  # fmt: skip
    """How far the servers' answers to a user's requests stay those of the first server, latencies, and tokens as the servers count them.

    Raises ``MllmEfficientError`` for a folder that holds answers: a server may have changed since.
    """
    if output_dir is not None and (output_dir / RESULTS).exists():
        raise MllmEfficientError(f"{output_dir} holds answers, and a server may have changed since they were given: use another folder")
    progress.say(f"{len(requests)} requests x {len(cells)} servers, {batch_size} at a time")
    records = ask(cells, requests, batch_size=batch_size, max_new_tokens=max_new_tokens)
    rows = rows_of(records, cells, seed)
    meta = {
        **served(cells), "suite": SERVERS, "data": str(data), "limit": limit, "batch_size": batch_size, "max_new_tokens": max_new_tokens,
        "normalisation": NORMALISATION, "questions": len(requests), "meaning": MEANING, "worst": worst_of(records),
        "questions_fingerprint": fingerprint_of({"ids": sorted(r.digest for r in requests)}),
        "interval": "95%, 2000 paired resamples of requests", "methods": [],
    }  # fmt: skip
    if output_dir is not None:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(output_dir / RESULTS, {"rows": rows, "meta": meta, "records": records})
    failed = [f"{r['method']} on {r['id']}: {r['error']}" for r in records if r["error"] is not None]
    return Results(EVALUATE, rows, meta, (Table(*table(rows), first=HEADER[:5], note=NOTE),), tuple(failed))


def ask(cells: Sequence[ServerCell], requests: Sequence[Request], *, batch_size: int, max_new_tokens: int) -> list[dict[str, Any]]:
    """A record of every request and server."""
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "until": []}
    askers = [ServerAsker(on_error=RECORD, batch_size=batch_size, url=c.url, model=c.model) for c in cells]
    records: list[dict[str, Any]] = []
    for low in range(0, len(requests), batch_size):
        batch = requests[low : low + batch_size]
        contents = [(Content(r.record.asked, r.pictures(), []), None) for r in batch]
        base: list[str | None] = []
        for cell, asker in zip(cells, askers):
            said = asker.answers(contents, settings)
            base = base or [a.text if a.error is None else None for a in said]
            records += [_record(cell.name, request, answer, known) for request, answer, known in zip(batch, said, base)]
    return records


def _record(name: str, request: Request, answer: Any, base: str | None) -> dict[str, Any]:
    text, failed = answer.text.strip(), answer.error is not None
    same = not failed and base is not None
    return {
        "method": name, "id": request.id, "request": request.digest, "task": WITH_IMAGES if request.images else TEXT_ONLY,
        "question": short(request.question, 200), "answer": text, "error": answer.error, "expected": list(request.answers) or None,
        "correct": matches(text, request.answers) if request.answers and not failed else None,
        "exact_match": same and text == str(base).strip(), "normalised_match": same and normalise(text) == normalise(str(base)),
        "baseline_answer": base, "prompt_tokens": answer.prompt_tokens, "visual_tokens_kept": answer.visual_tokens_kept,
        "output_tokens": answer.output_tokens, "latency_s": answer.latency_s,
    }  # fmt: skip


def rows_of(records: Sequence[dict[str, Any]], cells: Sequence[ServerCell], seed: int = 0) -> list[dict[str, Any]]:
    """A row for each server, the baseline's first."""
    kind = WITH_IMAGES if any(r["task"] == WITH_IMAGES for r in records) else TEXT_ONLY
    compared = {metric: Compared(records, kind, metric, seed) for metric in SHARES}
    return [_row(cell, [r for r in records if r["method"] == cell.name], compared, cells[0].name) for cell in cells]


def _row(cell: ServerCell, own: list[dict[str, Any]], compared: dict[str, Compared], base: str) -> dict[str, Any]:
    row: dict[str, Any] = {"method": cell.name, "role": cell.role, "n": len(own), "failures": sum(r["error"] is not None for r in own)}
    for metric in SHARES:
        found = compared[metric]
        score = found.mean(cell.name)
        unknown, itself = bool(np.isnan(score)), cell.name == base and metric != "accuracy"  # which is no measurement
        row[metric] = None if unknown else round(score, 2)
        row[f"{metric}_interval"] = None if unknown or itself else found.bounds(cell.name)
    latencies = [r["latency_s"] for r in own if r["latency_s"] is not None]
    for percent in (50, 99):
        row[f"latency_p{percent}_s"] = round(float(np.percentile(latencies, percent)), 4) if latencies else None
    for name in ("prompt_tokens", "visual_tokens_kept", "output_tokens"):
        values = [r[name] for r in own if r[name] is not None]
        row[name] = round(sum(values) / len(values), 2) if values else None
    return row


def worst_of(records: Sequence[dict[str, Any]], most: int = 20) -> list[dict[str, Any]]:
    """Requests that a server answers in other words than the baseline."""
    other = [r for r in records if r["error"] is None and r["baseline_answer"] is not None and not r["normalised_match"]]
    return [{k: r[k] for k in ("method", "id", "question", "baseline_answer", "answer")} for r in other[:most]]


HEADER = ("server", "requests", "same words [95%]", "normalised", "right", "latency p50", "p99 s", "prompt", "visual tokens")


def table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the printed table."""

    def shown(value: Any, digits: int = 1) -> str:
        return "" if value is None else f"{value:,.{digits}f}"

    lines = []
    for r in rows:
        bounds = r["exact_match_interval"]
        said = shown(r["exact_match"]) + (f" [{bounds[0]:.1f}, {bounds[1]:.1f}]" if bounds else "")
        times = (shown(r[f"latency_p{p}_s"], 3) for p in (50, 99))
        tokens = (shown(r[n]) for n in ("prompt_tokens", "visual_tokens_kept"))
        lines.append([r["method"], str(r["n"]), said, shown(r["normalised_match"]), shown(r["accuracy"]), *times, *tokens])
    return list(HEADER), lines
