"""Asks a model every question under every method, the uncompressed baseline first, through the shipped ``prepare``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mllm_efficient.compressors.base import Compressor
from mllm_efficient.models import Loaded, environment, require_supported
from mllm_efficient.shrink import Encoded, encode_items, encoding_key, prepare
from mllm_efficient.tokens import Plane

from .answers import label
from .builtin.architecture import VOCABULARY
from .builtin.suite import Sample
from .records import Records

NO_IMAGE = "no-image"  # the floor: the same questions without the image
MAX_NEW_TOKENS = 8
SENTENCE = 24  # new tokens for models that may answer with a sentence


@dataclass
class Run:
    """One evaluation: a loaded model, samples and methods, with the vision tower's output shared between methods."""

    loaded: Loaded
    samples: Sequence[Sample]
    methods: Sequence[Compressor]
    batch_size: int = 32
    output_dir: Path | None = None
    floor: bool = True
    progress: Callable[[int], None] = lambda n: None
    _vision: dict[Any, Encoded] = field(default_factory=dict)
    _processed: dict[Any, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self):
        self.adapter = require_supported(self.loaded)
        # models trained by the recipe know the questions alone; others are told to answer with one word
        self.builtin = self.loaded.processor.tokenizer.get_vocab() == VOCABULARY
        size = getattr(self.loaded.model.config.vision_config, "image_size", 448)  # Qwen-VL takes any
        self.size = size if isinstance(size, int) else size[0]
        self.records = Records(self.output_dir, self.config)

    @property
    def config(self) -> dict[str, Any]:
        """Everything that answers depend on besides the method and the sample; part of every record's fingerprint."""
        how = {"form": "short"} if self.builtin else {"form": "natural", "answers": "first label"}
        return {"suite": "builtin", **how, **environment(self.loaded)}

    @property
    def arms(self) -> list[str]:
        return [*([NO_IMAGE] if self.floor else []), *(m.spec() for m in self.methods)]

    @property
    def total(self) -> int:
        return len(self.arms) * len(self.samples)

    def answer_all(self) -> list[dict[str, Any]]:
        """Runs what is not recorded yet; returns the records of this run's methods and samples."""
        try:
            for low in range(0, len(self.samples), self.batch_size):
                self._batch(self.samples[low : low + self.batch_size])
        finally:
            self.records.close()
        return [self.records.rows[arm, s.id] for arm in self.arms for s in self.samples]

    def _batch(self, batch: Sequence[Sample]) -> None:
        """Every arm on one batch. A half-recorded batch is asked again whole, so that padding is as it was."""
        self._vision.clear()
        self._processed.clear()
        for arm, method in zip(self.arms, [*([None] if self.floor else []), *self.methods]):
            if not all((arm, s.id) in self.records for s in batch):
                self.records.add(self._ask(arm, method, batch))
            self.progress(len(batch))

    def _ask(self, arm: str, method: Compressor | None, batch: Sequence[Sample]) -> list[dict[str, Any]]:
        """Records of a batch; if it fails as a whole its samples are asked one by one, and those that fail say why."""
        try:
            return self._answers(arm, method, batch)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        # outside the handler, so that the failed batch's tensors are free when its samples are tried
        if len(batch) > 1:
            return [row for s in batch for row in self._ask(arm, method, [s])]
        return [{**self._head(arm, batch[0]), "answer": None, "correct": False, "error": reason}]

    def _head(self, arm: str, sample: Sample) -> dict[str, Any]:
        q = sample.question
        return {"method": arm, "id": sample.id, "image": sample.image, "task": sample.task, "question": q.text, "expected": q.answer}

    def _answers(self, arm: str, method: Compressor | None, batch: Sequence[Sample]) -> list[dict[str, Any]]:
        if method is None:
            ids, reports, positions = self._generate(self._inputs(batch, images=False)), None, None
        else:
            inputs = self._inputs(batch, images=True)
            encoded = self._encode(method, batch, inputs)
            inputs = {k: v for k, v in inputs.items() if k not in self.adapter.encode_keys}
            prepared = prepare(self.loaded.model, method, encoded=encoded, image_keys=[s.key for s in batch], **inputs)
            ids, reports, positions = self._generate(prepared.model_kwargs), prepared.report.images, prepared.report.positions
        rows = []
        for i, (sample, text) in enumerate(zip(batch, self.loaded.processor.batch_decode(ids, skip_special_tokens=True))):
            answer = first_word(text) if self.builtin else label(text, sample.question.answer)
            row = {**self._head(arm, sample), "answer": answer, "correct": answer == sample.question.answer, "error": None}
            if reports is not None:
                planes = self.adapter.place(reports[i].planes, (self.size, self.size), self.loaded.processor.image_processor)
                row |= {"visual_tokens_full": reports[i].full, "visual_tokens_kept": reports[i].kept, "positions": positions}
                row |= _region(sample, reports[i].indices, planes)
            rows.append(row)
        return rows

    def _inputs(self, batch: Sequence[Sample], images: bool) -> dict[str, Any]:
        """The processor's output for a batch, made once for all methods."""
        key = (images, *(s.id for s in batch))
        if key not in self._processed:
            texts = [s.question.text if self.builtin else s.question.natural for s in batch]
            prompts = [self.loaded.prompt(t, int(images)) for t in texts]
            self._processed[key] = self.loaded.inputs(prompts, [s.picture(self.size) for s in batch] if images else ())
        return dict(self._processed[key])

    def _generate(self, inputs: dict[str, Any]) -> torch.Tensor:
        out = self.loaded.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS if self.builtin else SENTENCE, do_sample=False)
        return out[:, inputs["input_ids"].shape[1] :]

    def _encode(self, method: Compressor, batch: Sequence[Sample], inputs: dict[str, Any]) -> Encoded:
        """The batch's visual tokens; each picture goes through the tower once for all methods that see it alike."""
        items = self.adapter.items(inputs)
        first = {s.image: i for i, s in reversed(list(enumerate(batch)))}
        key = (encoding_key(self.adapter, method, items[0]), *(s.id for s in batch))
        encoded = self._vision.get(key)
        if encoded is None:
            with torch.no_grad():
                once = encode_items(self.adapter, method, [items[i] for i in first.values()])
            at = [list(first).index(s.image) for s in batch]
            encoded = Encoded(items, [once.encodings[i] for i in at], [once.made_for[i] for i in at])
            self._vision[key] = encoded
        return encoded


def first_word(text: str) -> str:
    """The first word of an answer in lower case, without punctuation; numbers stay numbers."""
    match = re.search(r"\w+", text.lower())
    return match.group() if match else ""


def _region(sample: Sample, indices: Any, planes: Sequence[Plane]) -> dict[str, float]:
    """Share of the kept tokens that lie in the region that matters, and share of that region that was kept."""
    region = sample.region_of(planes)
    if indices is None or not region:
        return {}
    inside = sum(int(i) in region for i in indices)
    return {"region_share": inside / len(indices), "region_kept": inside / len(region)}
