"""Asks a model every question under every method, the uncompressed baseline first, through the shipped ``prepare``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mllm_efficient.apply.prepare import Prepared, prepare
from mllm_efficient.compressors.base import Compressor
from mllm_efficient.loading.models import environment
from mllm_efficient.measure.workload import usual_size

from .agreement import cut
from .answers import NORMALISATION, judge
from .builtin.architecture import VOCABULARY
from .builtin.suite import Sample
from .calibration import Watched
from .harness import Harness, endings
from .turns import FollowUp, converse, follow_ups

NO_IMAGE = "no-image"  # the floor: the same questions without the image
MAX_NEW_TOKENS = 8
SENTENCE = 16  # new tokens for models that may answer with more than a word


@dataclass
class Run(Harness):
    """One evaluation on the embedded benchmark.

    turns: 2 asks every question a second time, as the second of a conversation about its image, with the tokens that
    were chosen for the first.
    """

    floor: bool = True
    turns: int = 1

    def prepare_samples(self) -> None:
        # models trained by the recipe know the questions alone; others are told to answer with one word
        self.builtin = self.loaded.processor.tokenizer.get_vocab() == VOCABULARY
        self.size = min(usual_size(self.adapter))
        self._processed: dict[Any, dict[str, Any]] = {}
        self._regions: dict[Any, Any] = {}

    @property
    def max_new_tokens(self) -> int:
        return MAX_NEW_TOKENS if self.builtin else SENTENCE

    @property
    def config(self) -> dict[str, Any]:
        form = {"form": "short", "normalisation": "first word"} if self.builtin else {"form": "natural", "normalisation": NORMALISATION}
        how = {"image_size": self.size, "max_new_tokens": self.max_new_tokens, "batch_size": self.batch_size}
        return {"suite": "builtin", **form, **how, **environment(self.loaded)}

    @property
    def named_arms(self) -> list[tuple[str, Compressor | None]]:
        return [*([(NO_IMAGE, None)] if self.floor else []), *super().named_arms]

    @property
    def groups(self) -> list[Sequence[Any]]:
        return [self.samples, *([follow_ups(self.samples)] if self.turns == 2 else [])]

    def forget(self) -> None:
        super().forget()
        self._processed.clear()

    def head(self, arm: str, sample: Sample | FollowUp) -> dict[str, Any]:
        q = sample.question
        head = {"method": arm, "id": sample.id, "image": sample.image, "task": sample.task, "question": q.text, "expected": q.answer}
        return head | ({"turns": 2, "first": sample.first.question.text} if isinstance(sample, FollowUp) else {})

    def __post_init__(self) -> None:
        super().__post_init__()
        for sample in (s for group in self.groups for s in group):
            for arm in self.arms:
                old = self.records.rows.get((arm, sample.id))
                if old is not None and old["error"] is None:  # by the rule of today
                    old["answer"], old["correct"] = self.judged(sample, old.get("text", old["answer"]))

    def answers(self, arm: str, method: Compressor | None, batch: Sequence[Any]) -> list[dict[str, Any]]:
        firsts, watched = None, Watched()
        if isinstance(batch[0], FollowUp):
            firsts, ids, prepared = converse(self, method, batch, watched)
        else:
            inputs = self.inputs(batch, images=method is not None, method=method)
            prepared = None if method is None else self.prepared(method, batch, inputs)
            call = inputs if prepared is None else prepared.model_kwargs
            ids = self.generate(call, logits_processor=[watched])[:, call["input_ids"].shape[1] :]
        texts, ends = self.decoded(ids), endings(self.loaded.model)
        sure = watched.confidences([cut(row, ends) for row in ids.cpu()], ids[:, -1])
        rows = []
        for i, (sample, text) in enumerate(zip(batch, texts)):
            answer, right = self.judged(sample, text)
            row = {**self.head(arm, sample), "answer": answer, "correct": right, "error": None, "confidence": sure[i]}
            if not self.builtin:
                row["text"] = text.strip()
            if firsts is not None:
                row["first_answer"] = firsts[i].strip()
            if prepared is not None:
                image, where = prepared.report.images[i], prepared.report.positions
                row |= {"visual_tokens_full": image.full, "visual_tokens_kept": image.kept, "positions": where} | self._region(
                    sample, image, self.seen_under(method, batch).loaded.processor.image_processor
                )
                if image.per_layer:
                    row["tokens_per_layer"] = list(image.per_layer)
                if image.kernels:
                    row["kernels"] = list(image.kernels)
            rows.append(row)
        return rows

    def judged(self, sample: Sample | FollowUp, text: str) -> tuple[str, bool]:
        """The answer in a text, and whether it is right."""
        if not self.builtin:
            return judge(sample.question, text)
        answer = first_word(text)
        return answer, answer == sample.question.answer

    def worded(self, sample: Sample | FollowUp) -> str:
        """The question as this model is asked it."""
        return sample.question.text if self.builtin else sample.question.natural

    def inputs(self, batch: Sequence[Sample], images: bool, method: Compressor | None = None) -> dict[str, Any]:
        """The processor's output for a batch, made once for all methods but those that set the processor."""
        own = method is not None and method.sets_processor
        key = (method.spec() if method is not None and own else None, images, *(s.id for s in batch))
        if key not in self._processed:
            loaded = self.loaded if method is None else self.seen_under(method, batch).loaded
            prompts = [loaded.prompt(self.worded(s), int(images)) for s in batch]
            self._processed[key] = loaded.inputs(prompts, [s.picture(self.size) for s in batch] if images else ())
        return dict(self._processed[key])

    def sizes(self, sample: Sample | FollowUp) -> list[tuple[int, int]]:
        return [(self.size, self.size)]

    def prepared(self, method: Compressor, batch: Sequence[Sample], inputs: dict[str, Any]) -> Prepared:
        """The batch's shorter prompts; a picture goes through the tower once for all methods that see it alike."""
        asked = self.seen_under(method, batch)
        names = [(method.spec() if method.sets_processor else None, s.image) for s in batch]
        encoded = self.vision.encoded(asked.method, self.adapter.items(inputs), names)
        rest = {k: v for k, v in inputs.items() if k not in self.adapter.encode_keys}
        return asked.shown(prepare(self.loaded.model, asked.method, encoded=encoded, image_keys=[s.key for s in batch], **rest))

    def generate(self, call: dict[str, Any], **how: Any) -> Any:
        return self.loaded.model.generate(**call, max_new_tokens=self.max_new_tokens, do_sample=False, **how)

    def decoded(self, ids: torch.Tensor) -> list[str]:
        return self.loaded.processor.batch_decode(ids, skip_special_tokens=True)

    def _region(self, sample: Sample | FollowUp, image: Any, processor: Any = None) -> dict[str, float]:
        """Share of the kept tokens that lie in the region that matters, and share of that region that was kept."""
        if image.indices is None:
            return {}
        if image.planes not in self._regions:
            size = (self.size, self.size)
            self._regions[image.planes] = self.adapter.place(image.planes, size, processor or self.loaded.processor.image_processor)
        region = sample.region(self._regions[image.planes])
        if not region.any():
            return {}
        inside = int(region[image.indices.numpy()].sum())
        return {"region_share": inside / len(image.indices), "region_kept": inside / int(region.sum())}


def first_word(text: str) -> str:
    """The first word of an answer in lower case, without punctuation; numbers stay numbers."""
    match = re.search(r"\w+", text.lower())
    return match.group() if match else ""
