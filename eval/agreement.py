"""A user's own requests under every method: how far the answers stay those of the uncompressed model. No labels needed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mllm_efficient.apply.conversation import items_of
from mllm_efficient.apply.encode import Encoded
from mllm_efficient.apply.prepare import Prepared, prepare
from mllm_efficient.apply.prompt import types_with_text
from mllm_efficient.compressors.base import Compressor
from mllm_efficient.errors import MllmEfficientError
from mllm_efficient.loading.models import environment
from mllm_efficient.measure.native import sizes_of

from .answers import NORMALISATION, matches, normalise
from .harness import Harness, endings
from .requests import Request

MAX_NEW_TOKENS = 64
WITH_IMAGES, TEXT_ONLY = "agreement", "text-only"


@dataclass(frozen=True)
class Reference:
    """The uncompressed model's answer to a request. ids: (T,) its tokens, the end among them. log_p: (T, vocabulary)."""

    text: str
    ids: Tensor
    log_p: Tensor


@dataclass
class Agreement(Harness):
    """One run over a user's requests (``samples``), of which ``prompts`` are the texts for this model. Baseline first.

    A method's answer is held against the baseline's. KL is KL(baseline || method) of the next-token distributions in
    nats, both reading the baseline's answer, as the mean over its tokens. The method chooses its visual tokens before it
    reads that answer.
    """

    prompts: Sequence[str] = ()
    data: Path | None = None
    max_new_tokens: int = MAX_NEW_TOKENS
    _inputs: dict[Any, tuple[dict[str, Any], list[Any]]] = field(default_factory=dict)
    _references: dict[str, Reference] = field(default_factory=dict)
    _sizes: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        self._prompt = {r.id: p for r, p in zip(self.samples, self.prompts, strict=True)}
        for request in self.samples:
            for arm in self.arms:
                old = self.records.rows.get((arm, request.id))
                if old is not None and old["error"] is None and request.answers:  # by the rule of today
                    old["correct"] = matches(old["answer"], request.answers)
                if old is not None and old["request"] != request.digest:
                    self.records.close()
                    raise MllmEfficientError(
                        f"{self.output_dir} holds an answer to another {request.id} (its text, answer or an image changed): "
                        "use another --output-dir"
                    )

    @property
    def config(self) -> dict[str, Any]:
        data = None if self.data is None else os.path.relpath(self.data, self.output_dir or self.data.parent)
        how = {"suite": "data", "data": data, "normalisation": NORMALISATION, "max_new_tokens": self.max_new_tokens}
        how["batch_size"] = self.batch_size
        return {**how, **environment(self.loaded)}

    @property
    def groups(self) -> list[Sequence[Request]]:
        return [[r for r in self.samples if r.images], [r for r in self.samples if not r.images]]

    def forget(self) -> None:
        super().forget()
        self._inputs.clear()
        self._references.clear()

    def head(self, arm: str, sample: Request) -> dict[str, Any]:
        head: dict[str, Any] = {
            "method": arm,
            "id": sample.id,
            "request": sample.digest,
            "task": WITH_IMAGES if sample.images else TEXT_ONLY,
        }
        head |= {
            "question": short(sample.question, 200),
            "images": sample.record.shown(self.data.parent if self.data is not None else Path()),
            "expected": list(sample.answers) or None,
        }
        return head | ({"extra": sample.record.extra} if sample.record.extra else {})

    @torch.no_grad()
    def refer(self, arm: str, batch: Sequence[Request]) -> None:
        if arm != self.arms[0]:
            self._referred(batch)

    @torch.no_grad()
    def answers(self, arm: str, method: Compressor | None, batch: Sequence[Request]) -> list[dict[str, Any]]:
        assert method is not None
        baseline = arm == self.arms[0]
        references = None if baseline else self._referred(batch)
        prepared, _ = self._prepared(method, batch)
        call = prepared.model_kwargs
        out = self.loaded.model.generate(**call, max_new_tokens=self.max_new_tokens, do_sample=False)
        ids = [cut(row, endings(self.loaded.model)) for row in out[:, call["input_ids"].shape[1] :].cpu()]
        del out, call
        read = None if references is None else self._along(method, batch, [r.ids for r in references])
        rows = []
        for i, request in enumerate(batch):
            text = self.loaded.processor.decode(ids[i], skip_special_tokens=True).strip()
            images = [image for image in prepared.report.images if image.row == i]
            row = {
                **self.head(arm, request), "answer": text, "token_ids": ids[i].tolist(), "error": None,
                "correct": matches(text, request.answers) if request.answers else None,
                "visual_tokens_full": sum(image.full for image in images), "visual_tokens_kept": sum(image.kept for image in images),
                "positions": prepared.report.positions if images else None,
                "exact_match": True, "normalised_match": True, "first_divergence": None, "kl": 0.0,
            }  # fmt: skip
            if references is not None and read is not None:
                own, base = read[i], references[i]
                row |= {
                    "baseline_answer": base.text, "exact_match": text == base.text,
                    "normalised_match": normalise(text) == normalise(base.text),
                    "first_divergence": first_difference(ids[i], base.ids), "kl": divergence(base.log_p, own),
                }  # fmt: skip
            rows.append(row)
        return rows

    def sizes(self, sample: Request) -> list[tuple[int, int]]:
        if sample.id not in self._sizes:
            self._sizes[sample.id] = sizes_of(sample.pictures())
        return self._sizes[sample.id]

    def _inputs_of(self, method: Compressor, batch: Sequence[Request]) -> tuple[dict[str, Any], list[Any]]:
        """The processor's output for a batch and its images as items, made once for all methods but those that set the processor."""
        key = (method.spec() if method.sets_processor else None, *(r.id for r in batch))
        if key not in self._inputs:
            loaded = self.seen_under(method, batch).loaded
            inputs = loaded.inputs([self._prompt[r.id] for r in batch], [r.pictures() for r in batch])
            self._inputs[key] = inputs, items_of(self.adapter, inputs)
        return self._inputs[key]

    def _prepared(self, method: Compressor, batch: Sequence[Request], answers: Tensor | None = None) -> tuple[Prepared, Tensor]:
        """The batch's shorter prompts, and the full mask. answers: (B, T) go after the prompts, -1 where there is none."""
        inputs, items = self._inputs_of(method, batch)
        rest = {k: v for k, v in inputs.items() if k not in self.adapter.encode_keys}
        if answers is not None:
            rest["input_ids"] = torch.cat([rest["input_ids"], answers.clamp(min=0).to(rest["input_ids"])], 1)
            rest["attention_mask"] = torch.cat([rest["attention_mask"], (answers >= 0).to(rest["attention_mask"])], 1)
            rest |= types_with_text(rest, rest["input_ids"].shape[1])
        asked, own = self.seen_under(method, batch), method.spec() if method.sets_processor else None
        names = [(own, r.digest, i) for r in batch for i in range(len(r.images))]
        encoded: Encoded | None = self.vision.encoded(asked.method, items, names) if items else None
        keys = [f"data/{r.id}/{i}" for r in batch for i in range(len(r.images))] if items else None
        done = prepare(self.loaded.model, asked.method, encoded=encoded, image_keys=keys, **rest)
        return asked.shown(done), rest["attention_mask"]

    def _referred(self, batch: Sequence[Request]) -> list[Reference]:
        """The baseline's answers to a batch and its distributions along them."""
        arm, method = self.named_arms[0]
        assert method is not None
        if any(r.id not in self._references for r in batch):
            rows = [self.records.rows[arm, r.id] for r in batch]
            if any(row["error"] is not None for row in rows):
                raise MllmEfficientError("the uncompressed model failed on this request")
            ids = [torch.tensor(row["token_ids"]) for row in rows]
            for request, row, tokens, log_p in zip(batch, rows, ids, self._along(method, batch, ids)):
                self._references[request.id] = Reference(row["answer"], tokens, log_p)
        return [self._references[r.id] for r in batch]

    def _along(self, method: Compressor, batch: Sequence[Request], answers: Sequence[Tensor]) -> list[Tensor]:
        """(T, vocabulary) log probabilities of each token of the given answers, under a method that has not seen them."""
        longest = max(map(len, answers))
        read = torch.full((len(answers), longest), -1)
        for row, ids in zip(read, answers):
            row[: len(ids) - 1] = ids[:-1]  # what follows the last token is not asked
        read = read[:, : longest - 1]
        prepared, _ = self._prepared(method, batch)
        layout = prepared.layout
        if layout is None and prepared.staging is None:  # nothing is chosen, so nothing can be chosen by the answer
            call = self._prepared(method, batch, read)[0].model_kwargs
        else:
            call = prepared.model_kwargs
            new, mask = read.to(call["input_ids"].device), call["attention_mask"]
            call["input_ids"] = torch.cat([call["input_ids"], new.clamp(min=0)], 1)
            call["attention_mask"] = torch.cat([mask, (new >= 0).to(mask)], 1)
            call |= types_with_text(call, call["input_ids"].shape[1])
            places = layout.positions_of(call["attention_mask"], new.shape[1]) if layout is not None and longest > 1 else None
            if places is not None:
                call["position_ids"] = torch.cat([call["position_ids"], places.to(call["position_ids"])], -1)
        logits = self.loaded.model(**call, use_cache=True, logits_to_keep=longest).logits
        own = logits[:, -longest:]  # some models give all whatever is asked
        return [row[: len(ids)].float().log_softmax(-1) for row, ids in zip(own, answers)]


def short(text: str, length: int = 40) -> str:
    """A text in one line of so many characters at most."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"


def cut(ids: Tensor, ends: set[int]) -> Tensor:
    """An answer's tokens up to and with its end; what ``generate`` puts after is padding."""
    ended = torch.isin(ids, torch.tensor(sorted(ends), dtype=ids.dtype)).nonzero()
    return ids[: int(ended[0]) + 1] if len(ended) else ids


def divergence(p: Tensor, q: Tensor) -> float:
    """Mean KL(p || q) in nats over (T, vocabulary) log probabilities."""
    terms = torch.where(p.exp() > 0, p.exp() * (p - q), 0.0)
    return max(float(terms.sum(-1).mean()), 0.0)  # rounding can leave it below zero


def first_difference(tokens: Tensor, others: Tensor) -> int | None:
    """The index of the first token that is another one, or that the shorter answer does not have; None if all agree."""
    n = min(len(tokens), len(others))
    where = (tokens[:n] != others[:n]).nonzero()
    return int(where[0]) if len(where) else None if len(tokens) == len(others) else n
