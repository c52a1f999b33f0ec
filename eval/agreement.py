"""A user's own requests under every method: how far the answers stay those of the uncompressed model. No labels needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mllm_efficient.compressors.base import Compressor
from mllm_efficient.models import Loaded, environment, require_supported
from mllm_efficient.shrink import Encoded, encode_items, encoding_key, has_pixels, prepare

from .answers import holds, normalised
from .records import Records
from .requests import Request, pictures
from .stats import draws, interval

METRICS = ("exact_agreement", "normalised_agreement", "kl", "accuracy")
WORST = 20


@dataclass
class Agreement:
    """One run over a user's requests, the baseline first; the vision tower's output is shared between methods.

    KL is the divergence KL(baseline || method) of the next-token distributions in nats, both models reading the
    baseline's answer, averaged over its tokens (at most ``max_new_tokens``).
    """

    loaded: Loaded
    requests: Sequence[Request]
    methods: Sequence[Compressor]
    max_new_tokens: int = 64
    output_dir: Path | None = None
    progress: Callable[[int], None] = lambda n: None
    _vision: dict[Any, Encoded] = field(default_factory=dict)

    def __post_init__(self):
        self.adapter = require_supported(self.loaded)
        self.records = Records(self.output_dir, self.config)

    @property
    def config(self) -> dict[str, Any]:
        """Everything that answers depend on besides the method and the request."""
        asked = [[r.id, [str(p) for p in r.images], r.prompt or r.messages, r.answer] for r in self.requests]
        return {"suite": "data", "max_new_tokens": self.max_new_tokens, "requests": asked, **environment(self.loaded)}

    @property
    def total(self) -> int:
        return len(self.methods) * len(self.requests)

    def answer_all(self) -> list[dict[str, Any]]:
        """Runs what is not recorded yet; returns the records of this run, method after method."""
        try:
            for request in self.requests:
                self._one(request)
        finally:
            self.records.close()
        return [self.records.rows[m.spec(), r.id] for m in self.methods for r in self.requests]

    def _one(self, request: Request) -> None:
        self._vision.clear()
        wanted = [m for m in self.methods if (m.spec(), request.id) not in self.records]
        if wanted:
            try:
                inputs = self.loaded.inputs([request.text(self.loaded)], pictures(request))
                # the baseline's tokens and distributions are what all others are held against
                tokens, logits, base = self._ask(self.methods[0], request, inputs, None, None)
                self.records.add([base])
                for method in wanted:
                    if method is not self.methods[0]:
                        self.records.add([self._try(method, request, inputs, tokens, logits)])
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                self.records.add([self._failed(m, request, reason) for m in wanted])
        self.progress(len(self.methods))

    def _try(self, method: Compressor, request: Request, inputs: dict[str, Any], tokens: Tensor, logits: Tensor) -> dict[str, Any]:
        try:
            return self._ask(method, request, inputs, tokens, logits)[2]
        except Exception as error:
            return self._failed(method, request, f"{type(error).__name__}: {error}")

    @torch.no_grad()
    def _ask(
        self, method: Compressor, request: Request, inputs: dict[str, Any], base_tokens: Tensor | None, base_logits: Tensor | None
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """The answer's tokens (T,), log probabilities (T', vocabulary) along the baseline's answer, and the record."""
        model = self.loaded.model
        prompt = self._prepared(method, request, inputs, inputs["input_ids"])
        out = model.generate(**prompt.model_kwargs, max_new_tokens=self.max_new_tokens, do_sample=False)
        tokens = out[0, prompt.tensors["input_ids"].shape[1] :].cpu()
        along = tokens if base_tokens is None else base_tokens
        ids = torch.cat([inputs["input_ids"], along[None].to(inputs["input_ids"])], 1)
        call = self._prepared(method, request, inputs, ids).model_kwargs
        read = model(**call, use_cache=True, logits_to_keep=len(along) + 1).logits[0]
        logits = read[:-1].float().log_softmax(-1).cpu()
        text = self.loaded.processor.decode(tokens, skip_special_tokens=True).strip()
        report = prompt.report
        row = {
            **self._head(method, request), "answer": text, "error": None, "new_tokens": len(tokens),
            "accuracy": None if request.answer is None else holds(text, request.answer),
            "visual_tokens_full": report.visual_tokens_full, "visual_tokens_kept": report.visual_tokens_kept,
        }  # fmt: skip
        if base_logits is None or base_tokens is None:
            return tokens, logits, row | {"exact_agreement": True, "normalised_agreement": True, "first_divergence": None, "kl": 0.0}
        base = self.records.rows[self.methods[0].spec(), request.id]["answer"]
        divergence = (base_logits.exp() * (base_logits - logits)).sum(-1)
        row |= {
            "exact_agreement": torch.equal(tokens, base_tokens), "normalised_agreement": normalised(text) == normalised(base),
            "first_divergence": first_difference(tokens, base_tokens), "kl": max(float(divergence.mean()), 0.0), "baseline_answer": base,
        }  # fmt: skip
        return tokens, logits, row

    def _prepared(self, method: Compressor, request: Request, inputs: dict[str, Any], ids: Tensor) -> Any:
        """The call with this prompt, which may go on with an answer; images go through the tower once for all methods."""
        mask = torch.ones_like(ids)
        rest = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask", "mm_token_type_ids")}
        if not has_pixels(rest):
            return prepare(self.loaded.model, method, input_ids=ids, attention_mask=mask)
        items = self.adapter.items({**rest, "input_ids": ids, "attention_mask": mask})
        key = tuple(encoding_key(self.adapter, method, item) for item in items)
        if key not in self._vision:
            self._vision[key] = encode_items(self.adapter, method, items)
        keys = [f"data/{request.id}/{i}" for i in range(len(items))]
        left = {k: v for k, v in rest.items() if k not in self.adapter.encode_keys}
        return prepare(self.loaded.model, method, input_ids=ids, attention_mask=mask, encoded=self._vision[key], image_keys=keys, **left)

    def _head(self, method: Compressor, request: Request) -> dict[str, Any]:
        return {"method": method.spec(), "id": request.id, "task": request.task, "expected": request.answer}

    def _failed(self, method: Compressor, request: Request, reason: str) -> dict[str, Any]:
        return {**self._head(method, request), "answer": None, "error": reason}


def first_difference(tokens: Tensor, others: Tensor) -> int | None:
    """The index of the first token that is another one, or that the shorter answer does not have; None if all agree."""
    n = min(len(tokens), len(others))
    where = (tokens[:n] != others[:n]).nonzero()
    if len(where):
        return int(where[0])
    return None if len(tokens) == len(others) else n


def agreement_rows(records: Sequence[dict[str, Any]], methods: Sequence[Compressor], seed: int = 0) -> list[dict[str, Any]]:
    """A row for each method, kind of request and metric: percent, or nats for ``kl``; 95% intervals over requests."""
    rows = []
    for task in ("requests", "text-only"):
        ids = sorted({r["id"] for r in records if r["task"] == task})
        if not ids:
            continue
        table = {(r["method"], r["id"]): r for r in records if r["task"] == task}
        weights = np.concatenate([np.ones((1, len(ids))), draws(len(ids), seed)])
        for method in methods:
            mine = [table[method.spec(), i] for i in ids]
            for metric in METRICS:
                values, base = (_estimates(table, ids, m.spec(), metric, weights) for m in (method, methods[0]))
                if values is None or base is None:
                    continue
                n = sum(r.get(metric) is not None for r in mine)
                rows.append({
                    "method": method.spec(), "keep": method.budget.fraction, "tokens": method.tokens, "task": task, "metric": metric,
                    "score": _round(values[0]), "score_interval": interval(values[1:]), "baseline": _round(base[0]),
                    "difference": _round(values[0] - base[0]), "difference_interval": interval((values - base)[1:]),
                    "retention": _round(100 * values[0] / base[0]) if base[0] and metric != "kl" else None,
                    "n": n, "failures": sum(r["error"] is not None for r in mine),
                    "visual_tokens_full": _mean(mine, "visual_tokens_full"), "visual_tokens_kept": _mean(mine, "visual_tokens_kept"),
                    "first_divergence": _mean(mine, "first_divergence"),
                })  # fmt: skip
    return rows


def _estimates(table: dict, ids: Sequence[str], method: str, metric: str, weights: np.ndarray) -> np.ndarray | None:
    """The mean over requests that have the metric, for each resample; a request that failed counts as disagreement."""
    value, there = np.zeros(len(ids)), np.zeros(len(ids))
    for i, name in enumerate(ids):
        row = table[method, name]
        if row["error"] is not None and metric != "kl" and (metric != "accuracy" or row.get("expected") is not None):
            there[i] = 1
        elif row.get(metric) is not None:
            value[i], there[i] = float(row[metric]), 1
    if not there.any():
        return None
    with np.errstate(invalid="ignore", divide="ignore"):
        return (1 if metric == "kl" else 100) * (weights @ value) / (weights @ there)


def worst(records: Sequence[dict[str, Any]], count: int = WORST) -> list[dict[str, Any]]:
    """The answers farthest from the baseline's, by KL."""
    with_kl = [r for r in records if r.get("kl")]
    return sorted(with_kl, key=lambda r: -r["kl"])[:count]


def agreement_table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines, a line for each method and kind of request."""
    header = ["method", "requests", "tokens", "same answer", "[95%]", "same words", "KL nats", "first other token", "right", "failed"]
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["task"], row["method"]), {})[row["metric"]] = row
    lines = []
    for (task, method), metrics in found.items():
        exact = metrics["exact_agreement"]
        low, high = exact["score_interval"]
        name = method if task == "requests" else f"{method} ({task})"
        line = [name, str(exact["n"]), f"{exact['visual_tokens_kept'] or 0:g}", f"{exact['score']:.1f}%", f"[{low:.1f}, {high:.1f}]"]
        line += [f"{metrics['normalised_agreement']['score']:.1f}%", f"{metrics['kl']['score']:.4f}" if "kl" in metrics else ""]
        line.append("" if exact["first_divergence"] is None else f"{exact['first_divergence']:.1f}")
        line.append(f"{metrics['accuracy']['score']:.1f}%" if "accuracy" in metrics else "")
        lines.append([*line, str(exact["failures"])])
    return header, lines


def _round(value: float, digits: int = 4) -> float:
    return round(float(value), digits)


def _mean(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [r[key] for r in rows if r.get(key) is not None]
    return _round(sum(values) / len(values), 2) if values else None
