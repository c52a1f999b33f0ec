"""Servers under load: time to the first token, time per token and requests per second of running OpenAI-compatible servers.

Measured by vLLM's own benchmark tool. All servers take turns in every repeat, on the same requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import CountMismatchError, MllmEfficientError
from .arms import BASELINE
from .timing import Series, interleave, paired, spread

QUANTITIES = {
    "ttft_p50_ms": "p50_ttft_ms", "ttft_p99_ms": "p99_ttft_ms", "tpot_p50_ms": "p50_tpot_ms", "tpot_p99_ms": "p99_tpot_ms",
    "e2e_p50_ms": "p50_e2el_ms", "e2e_p99_ms": "p99_e2el_ms", "requests_per_s": "request_throughput",
    "output_tokens_per_s": "output_throughput",
}  # fmt: skip
MEANING = {
    "ttft_p50_ms, ttft_p99_ms": "time to the first token over the requests of one run; e2e: to the last; tpot: per token after the first",
    "requests_per_s": "finished requests over the run's time; `output_tokens_per_s` likewise",
    "requests_ratio": "requests_per_s over the baseline's of the same repeat: median, and 95% over medians of resampled repeats",
    "ttft_ratio": "the same of ttft_p50_ms",
    "prompt_tokens": "of all requests of one run, as the server counts them; text and images",
    "visual_tokens_full, visual_tokens_kept": "of one prompt: by the project's own rule, of a server that was started here; of another, as "
    "it says of one request (usage, with --enable-prompt-tokens-details) and as the plugin counts (/metrics), null where it does not",
}  # fmt: skip


@dataclass(frozen=True)
class Load:
    """What every run asks. requests: of a run, None is four for each that may be at work at a time, and at least 16."""

    image_size: tuple[int, int]
    images: int = 1
    text_tokens: int = 64
    output_tokens: int = 32
    concurrency: tuple[int, ...] = (1, 8, 32)
    requests: int | None = None
    repeats: int = 5
    warmup: int = 1
    seed: int = 0

    def of(self, concurrency: int) -> int:
        """Requests of a run."""
        return self.requests or max(16, 4 * concurrency)


@dataclass(kw_only=True)
class Served(Series):
    """A running server as an arm.

    url: without ``/v1``. model: what it calls the model. tokenizer: folder or hub id for the text of the requests. full, kept: visual
    tokens of a prompt; length: placeholders of a prompt, newline columns included; None where the server does not tell.
    """

    role: str
    url: str
    model: str
    tokenizer: str
    full: int | None = None
    kept: int | None = None
    length: int | None = None
    totals: list[int] = field(default_factory=list)


def measure(
    arms: Sequence[Served], load: Load, ask: Callable[..., dict[str, Any]], done: Callable[[], object] = lambda: None
) -> list[dict[str, Any]]:
    """Rows: every server at every concurrency, the baseline's first. ask: ``patches.vllm.benchmark.load``. done: called after a run."""
    rows: list[dict[str, Any]] = []
    for concurrency in load.concurrency:
        for arm in arms:
            arm.samples, arm.totals = {}, []
        turns = dict.fromkeys((a.name for a in arms), 0)

        def turn(arm: Served, concurrency: int = concurrency, turns: dict[str, int] = turns) -> dict[str, float]:
            turns[arm.name] += 1  # the same requests for all, new ones in every repeat
            return _run(arm, load, concurrency, load.seed + turns[arm.name], ask)

        interleave(arms, turn, warmup=load.warmup, repeats=load.repeats, seed=load.seed, done=done)
        base = arms[0]
        for arm in arms:
            if arm.failed is None:
                _check_totals(arm, base, load, concurrency)
        rows += [_row(arm, base, load, concurrency) for arm in arms]
    return rows


def runs(arms: Sequence[Served], load: Load) -> int:
    """Runs in all, for a progress bar."""
    return len(arms) * len(load.concurrency) * (load.warmup + load.repeats)


def _run(arm: Served, load: Load, concurrency: int, seed: int, ask: Callable[..., dict[str, Any]]) -> dict[str, float]:
    requests = load.of(concurrency)
    said = ask(
        arm.url, arm.model, arm.tokenizer, requests=requests, concurrency=concurrency, text_tokens=load.text_tokens,
        output_tokens=load.output_tokens, images=load.images, image_size=load.image_size, seed=seed,
    )  # fmt: skip
    if said["completed"] != requests:
        raise MllmEfficientError(f"{requests - said['completed']} of {requests} requests failed")
    if said["total_output_tokens"] != requests * load.output_tokens:
        raise CountMismatchError(f"{said['total_output_tokens']} tokens were generated where {requests * load.output_tokens} were asked")
    arm.totals.append(int(said["total_input_tokens"]))
    return {own: float(said[theirs]) for own, theirs in QUANTITIES.items()}


def _check_totals(arm: Served, base: Served, load: Load, concurrency: int) -> None:
    """Marks an arm failed whose prompts do not have the tokens that its method leaves."""
    if arm.length is None or base.length is None or base.failed is not None:
        return
    for own, full in zip(arm.totals, base.totals):
        expected = full - load.of(concurrency) * (base.length - arm.length)
        if own != expected:
            arm.failed = f"the server's prompts have {own} tokens where {expected} are left of {full}"
            return


def _row(arm: Served, base: Served, load: Load, concurrency: int) -> dict[str, Any]:
    ok = arm.failed is None
    row: dict[str, Any] = {"method": arm.name, "arm": arm.role, "concurrency": concurrency, "requests": load.of(concurrency)}
    row |= {name: spread(arm.values(name), 3) if ok else None for name in QUANTITIES}
    both = ok and base.failed is None
    row |= {
        "requests_ratio": paired(arm.values("requests_per_s"), base.values("requests_per_s"), load.seed) if both else None,
        "ttft_ratio": paired(arm.values("ttft_p50_ms"), base.values("ttft_p50_ms"), load.seed) if both else None,
        "prompt_tokens": spread(arm.totals[load.warmup :], 1) if ok else None,
        "visual_tokens_full": arm.full, "visual_tokens_kept": arm.kept, "failed": arm.failed,
    }  # fmt: skip
    return row


def uncompressed(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Servers beside the baseline whose prompts are as long as its own: they compress nothing."""
    totals = {(r["method"], r["concurrency"]): r["prompt_tokens"] for r in rows}
    found = []
    base = next((r["method"] for r in rows if r["arm"] == BASELINE), None)
    for r in rows:
        own, full = r["prompt_tokens"], totals.get((base, r["concurrency"]))
        if r["arm"] != BASELINE and own and full and own["median"] >= full["median"] and r["method"] not in found:
            found.append(r["method"])
    return found


HEADER = (
    "method", "at a time", "visual", "prompt tokens", "TTFT p50", "p99 ms", "TPOT p50", "p99 ms", "req/s", "req/s over none [95%]",
    "TTFT/none",
)  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the printed table."""
    lines = []
    for r in rows:
        if r["failed"]:
            lines.append([r["method"], str(r["concurrency"]), f"failed: {r['failed'][:60]}", *[""] * (len(HEADER) - 3)])
            continue
        ratio = r["requests_ratio"] if r["arm"] != BASELINE else None
        times = (r[n] for n in ("ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms"))
        lines.append([
            r["method"], str(r["concurrency"]), "" if r["visual_tokens_kept"] is None else str(r["visual_tokens_kept"]),
            f"{r['prompt_tokens']['median']:,.0f}", *(f"{v['median']:.1f}" for v in times), f"{r['requests_per_s']['median']:.2f}",
            f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]" if ratio else "",
            f"{r['ttft_ratio']['median']:.2f}" if ratio else "",
        ])  # fmt: skip
    return list(HEADER), lines
