"""Records of a user's requests to rows and tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mllm_efficient.compressors.base import Compressor
from mllm_efficient.errors import MllmEfficientError
from mllm_efficient.stats import Estimate, estimate, interval, points, sums

from .agreement import TEXT_ONLY, WITH_IMAGES, short
from .record.samples import fingerprint_of
from .requests import Request
from .table import OVERALL

WORST = 20
Value = Callable[[dict[str, Any]], float | None]


def _failed_is_wrong(name: str) -> Value:
    """A truth as percent; an answer that failed agrees with nothing."""
    return lambda r: 100.0 * bool(r.get(name)) if r["error"] is None else 0.0


def _accuracy(r: dict[str, Any]) -> float | None:
    return None if not r["expected"] else 100.0 * bool(r["correct"])


# metric: (unit, value of a record or None where it has none)
METRICS: dict[str, tuple[str, Value]] = {
    "exact_match": ("percent", _failed_is_wrong("exact_match")),
    "normalised_match": ("percent", _failed_is_wrong("normalised_match")),
    "first_divergence": ("tokens", lambda r: r.get("first_divergence")),
    "kl": ("nats", lambda r: r.get("kl")),
    "accuracy": ("percent", _accuracy),
}
ASKED = (
    (OVERALL, WITH_IMAGES, "exact_match"), (WITH_IMAGES, WITH_IMAGES, "exact_match"), (WITH_IMAGES, WITH_IMAGES, "normalised_match"),
    (WITH_IMAGES, WITH_IMAGES, "first_divergence"), (WITH_IMAGES, WITH_IMAGES, "kl"), ("accuracy", WITH_IMAGES, "accuracy"),
    (TEXT_ONLY, TEXT_ONLY, "exact_match"), (f"{TEXT_ONLY} accuracy", TEXT_ONLY, "accuracy"),
)  # fmt: skip


def agreement_rows(
    records: Sequence[dict[str, Any]], methods: Sequence[Compressor], *, against: str | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """Rows for each method: ``overall`` (all that the table shows), then one for each metric; the baseline first.

    ``unit`` is percent, nats or tokens. Intervals are 95% over 2,000 paired resamples of requests, and exact (Clopper-Pearson) where
    few answers differ. Requests without an image, in which nothing can be compressed, stand under a task of their own.
    """
    out = []
    compared = {(kind, metric): Compared(records, kind, metric, seed) for _, kind, metric in ASKED}
    for method in methods:
        own: list[dict[str, Any]] = []
        for task, kind, metric in ASKED:
            row = _row(compared[kind, metric], method, methods[0], task, metric, against)
            own += [row] if row is not None else []
        if own and own[0]["task"] == OVERALL:
            found = _by_metric(own)
            for name in ("normalised_match", "kl", "first_divergence", "accuracy"):
                own[0][name] = found[name]["score"] if name in found else None
            if method is not methods[0]:
                own[0]["by_length"] = by_length(records, method.spec(), methods[0].spec(), seed)
        out += own
    return out


BY_LENGTH = ("exact_match", "normalised_match")


def by_length(records: Sequence[dict[str, Any]], arm: str, base: str, seed: int = 0) -> dict[str, dict[str, Any]]:
    """How often a method answers as the uncompressed model does, by how long that one's answer is in tokens, its end among them.

    Of the requests with an image, in powers of two: ``"1"``, ``"2"``, ``"3-4"``, ``"5-8"`` and so on, each with ``tokens`` (from, to),
    ``n`` and of both metrics the percentage and its 95% interval. Bins without a request are left out.
    """
    rows = [r for r in records if r["task"] == WITH_IMAGES]
    longs = {r["id"]: len(r["token_ids"]) for r in rows if r["method"] == base and r["error"] is None}
    ends = sorted({(n - 1).bit_length() for n in longs.values()})
    out: dict[str, dict[str, Any]] = {}
    for low, high in ((2 ** max(end - 1, 0) + (end > 0), 2**end) for end in ends):
        own = [r for r in rows if r["method"] == arm and low <= longs.get(r["id"], 0) <= high]
        cell: dict[str, Any] = {"tokens": [low, high], "n": len(own)}
        for metric in BY_LENGTH:
            compared = Compared(own, WITH_IMAGES, metric, seed)
            cell |= {metric: _round(compared.mean(arm), "percent"), f"{metric}_interval": compared.bounds(arm)}
        out[str(low) if low == high else f"{low}-{high}"] = cell
    return out


def length_table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: of each method the answers in the same words by their length. No lines where all are of one length."""
    curves = {r["method"]: r["by_length"] for r in rows if r.get("by_length")}
    bins = list(next(iter(curves.values()), {}))
    if len(bins) < 2:
        return [], []
    counts = ["requests", *(str(next(iter(curves.values()))[b]["n"]) for b in bins)]
    return ["tokens of the answer", *bins], [counts, *([m, *(_cell(c[b]) for b in bins)] for m, c in curves.items())]


def _cell(found: dict[str, Any]) -> str:
    low, high = found["normalised_match_interval"]
    return f"{found['normalised_match']:.1f} [{low:.1f}, {high:.1f}]"


def _by_metric(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {r["metric"]: r for r in rows if r["task"] in (WITH_IMAGES, "accuracy")}


def cell_of(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A method's rows as ``row_of`` of the report takes them: ``overall`` is accuracy where every request has an answer,
    otherwise agreement in the same words; all metrics are in its ``agreement``.

    Raises ``MllmEfficientError`` where no request has an image.
    """
    found = _by_metric(rows)
    if not found:
        raise MllmEfficientError("no request has an image: nothing was compressed")
    all_answered = "accuracy" in found and found["accuracy"]["n"] == found["exact_match"]["n"]
    curve: dict[str, Any] = next((r["by_length"] for r in rows if r.get("by_length")), {})
    return {OVERALL: {**found["accuracy" if all_answered else "normalised_match"], "agreement": found, "by_length": curve}}


class Compared:
    """A metric of several arms on the requests of a kind, on the same resamples of requests.

    values: by arm one for each request, NaN where it has none.
    """

    def __init__(self, records: Sequence[dict[str, Any]], kind: str, metric: str, seed: int):
        (self.unit, value), self.seed = METRICS[metric], seed
        self.rows: dict[str, list[dict[str, Any]]] = {}
        for r in records:
            if r["task"] == kind:
                self.rows.setdefault(r["method"], []).append(r)
        found = {arm: [value(r) for r in rows] for arm, rows in self.rows.items()}
        self.values = {arm: np.array([np.nan if v is None else v for v in of]) for arm, of in found.items()}

    def mean(self, arm: str) -> float:
        """NaN where no request has the metric."""
        there = self.values[arm][~np.isnan(self.values[arm])]
        return float(there.mean()) if len(there) else math.nan

    def drawn(self, arm: str) -> np.ndarray:
        """The mean in every resample, NaN where no request of it has the metric."""
        there = ~np.isnan(self.values[arm])
        total, n = sums(np.stack([np.where(there, self.values[arm], 0.0), there.astype(float)], 1), self.seed).T
        with np.errstate(invalid="ignore", divide="ignore"):
            return total / n

    def of(self, arm: str, base: str | None = None) -> Estimate:
        """A percentage, or its difference to another arm's. Both arms have it for the same requests."""
        there = ~np.isnan(self.values[arm])
        n = int(there.sum())
        own = self.values[arm][there] / (100 * n)
        drawn, value = self.drawn(arm), self.mean(arm)
        if base is None:
            return estimate(value, drawn, np.full(n, 1 / n), own)
        theirs = self.values[base][there] / (100 * n)
        return estimate(value - self.mean(base), drawn - self.drawn(base), np.full(n, 1 / n), own, theirs)

    def bounds(self, arm: str, base: str | None = None) -> tuple[float, ...] | None:
        """The 95% interval of a mean or of a difference; None where most resamples have no value or all have the same, and it is no
        percentage, of which exact bounds are known."""
        if self.unit == "percent":
            return points(self.of(arm, base).interval())
        drawn = self.drawn(arm) - (0.0 if base is None else self.drawn(base))
        if np.isnan(drawn).mean() > 0.5 or np.nanmin(drawn) == np.nanmax(drawn):
            return None
        n = int((~np.isnan(self.values[arm])).sum())
        return tuple(round(v, 6 if self.unit == "nats" else 2) for v in interval(drawn, n))


def differences(records: Sequence[dict[str, Any]], methods: Sequence[Compressor], metric: str, *, seed: int = 0) -> dict[str, Estimate]:
    """Of each method a percentage less the baseline's, on the requests with an image. ``methods`` begins with the baseline."""
    compared = Compared(records, WITH_IMAGES, metric, seed)
    return {m.spec(): compared.of(m.spec(), methods[0].spec()) for m in methods if m.spec() in compared.values}


def _row(compared: Compared, method: Compressor, base: Compressor, task: str, metric: str, against: str | None) -> dict[str, Any] | None:
    """One row, or None where no request has the metric."""
    arm, reference = method.spec(), base.spec()
    if arm not in compared.rows:
        return None
    score, baseline, unit, own = compared.mean(arm), compared.mean(reference), compared.unit, compared.rows[arm]
    if np.isnan(score) and metric != "first_divergence":
        return None

    def apart(other: str) -> tuple[float | None, Any]:
        """The difference to another arm and its interval, which to itself is none."""
        none = (0.0, 0.0) if unit == "percent" else None
        return _round(score - compared.mean(other), unit), none if arm == other else compared.bounds(arm, other)

    difference, between = apart(reference)
    by_itself = arm == reference and metric in ("exact_match", "normalised_match")  # which is no measurement
    row = {
        "method": arm, "keep": method.fraction, "tokens": method.tokens, "turns": 1, "task": task, "metric": metric, "unit": unit,
        "score": _round(score, unit), "score_interval": (score, score) if by_itself else compared.bounds(arm),
        "baseline": _round(baseline, unit),
        "difference": difference, "difference_interval": between,
        "retention": _round(100 * score / baseline, unit) if unit == "percent" and baseline else None,
        "n": int((~np.isnan(compared.values[arm])).sum()), "failures": sum(r["error"] is not None for r in own), "floor": None,
        "visual_tokens_full": _mean(own, "visual_tokens_full"), "visual_tokens_kept": _mean(own, "visual_tokens_kept"),
        "positions": next((r["positions"] for r in own if r.get("positions")), None),
    }  # fmt: skip
    row["clusters"] = row["n"]
    if against is not None:
        row |= dict(zip(("against", "against_difference", "against_interval"), (against, *apart(against))))
    return row


def _round(value: float, unit: str) -> float | None:
    return None if np.isnan(value) else round(float(value), 6 if unit == "nats" else 2)


def _mean(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [r[key] for r in rows if r.get(key) is not None]
    return round(sum(values) / len(values), 2) if values else None


def about(requests: Sequence[Request], records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a results file says of the requests, and which answers are the farthest (``worst``)."""
    return {
        "questions": len(requests), "questions_fingerprint": fingerprint_of({"ids": sorted(r.digest for r in requests)}),
        "text_only": sum(not r.images for r in requests), "with_answer": sum(bool(r.answers) for r in requests),
        "interval": "95%, 2000 paired resamples of requests", "worst": worst(records),
    }  # fmt: skip


def worst(records: Sequence[dict[str, Any]], count: int = WORST) -> list[dict[str, Any]]:
    """Of each method the ``count`` answers that are farthest from the uncompressed model's, by KL, farthest first.

    To the ``count`` requests on which any method is farthest, every method's answer follows. Requests on which no method
    is apart are left out.
    """
    compared: dict[str, list[dict[str, Any]]] = {}
    far: dict[str, float] = {}
    for r in records:
        if "baseline_answer" in r or (r["error"] is not None and r["task"] == WITH_IMAGES):
            compared.setdefault(r["method"], []).append(r)
            far[r["id"]] = max(far.get(r["id"], 0.0), r.get("kl") or 0.0)
    of_any = {i for i in sorted(far, key=lambda i: -far[i])[:count] if far[i]}
    keys = ("method", "id", "question", "images", "expected", "kl", "first_divergence", "baseline_answer", "answer", "error")
    out = []
    for rows in compared.values():
        rows.sort(key=lambda r: -(r.get("kl") or 0.0))
        out += [{k: r.get(k) for k in keys} for i, r in enumerate(rows) if (i < count and r.get("kl")) or r["id"] in of_any]
    return out


def agreement_table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: one for each method."""
    header = ["method", "tokens", "same answer [95%]", "same words", "first other token", "KL nats [95%]", "right", "failed"]
    against = next((r["against"] for r in rows if "against" in r), None)
    header += [f"same answer vs {against} [95%]"] if against else []
    header += ["text-only: same"] if any(r["task"] == TEXT_ONLY for r in rows) else []
    lines = []
    for method in dict.fromkeys(r["method"] for r in rows):
        own = {(r["task"], r["metric"]): r for r in rows if r["method"] == method}
        exact, same, other, kl = (own.get((WITH_IMAGES, m)) for m in ("exact_match", "normalised_match", "first_divergence", "kl"))
        right, text = own.get(("accuracy", "accuracy")), own.get((TEXT_ONLY, "exact_match"))
        kept = exact["visual_tokens_kept"] if exact else None
        failed = sum(r["failures"] for r in (exact, text) if r)
        line = [method, "" if kept is None else f"{kept:g}", with_interval(exact, ".1f", method), _one(same, ".1f"), _one(other, ".1f")]
        line += [with_interval(kl, ".4f", method), _one(right, ".1f"), str(failed)]
        if against:
            known = exact is not None and method != against and exact["against_interval"]
            line.append(_signed(exact["against_difference"], exact["against_interval"]) if known and exact else "")
        lines.append(line + ([_one(text, ".1f")] if len(header) > len(line) else []))
    return header, lines


def worst_table(far: Sequence[dict[str, Any]], lines: int = WORST) -> tuple[list[str], list[list[str]]]:
    """Header and the farthest answers of each method, ``lines`` in all."""
    methods = list(dict.fromkeys(r["method"] for r in far))
    each = max(1, lines // max(1, len(methods)))
    shown = [r for m in methods for r in [r for r in far if r["method"] == m and r["kl"]][:each]]
    cells = [[r["method"], r["id"], f"{r['kl']:.3f}", short(r["baseline_answer"]), short(r["answer"])] for r in shown]
    return ["method", "request", "KL", "uncompressed", "compressed"], cells


def _one(row: dict[str, Any] | None, how: str) -> str:
    return "" if row is None or row["score"] is None else f"{row['score']:{how}}"


def with_interval(row: dict[str, Any] | None, how: str, method: str) -> str:
    """The score and its interval, which the baseline's agreement with itself does not need."""
    if row is None or method == "none" or row["score_interval"] is None:
        return _one(row, how)
    low, high = row["score_interval"]
    return f"{row['score']:{how}} [{low:{how}}, {high:{how}}]"


def _signed(value: float, between: Sequence[float]) -> str:
    return f"{value:+.1f} [{between[0]:+.1f}, {between[1]:+.1f}]"
