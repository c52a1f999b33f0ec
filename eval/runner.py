"""Asks a model every question under every method, the uncompressed baseline first, through the shipped ``prepare``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mllm_efficient.apply.conversation import items_of
from mllm_efficient.apply.prepare import Prepared, prepare
from mllm_efficient.compressors.base import Compressor
from mllm_efficient.errors import MllmEfficientError
from mllm_efficient.loading.models import environment
from mllm_efficient.measure.workload import usual_size

from .agreement import cut
from .answers import NORMALISATION, judge
from .builtin.corruptions import CORRUPTIONS, TILE, Corrupted
from .builtin.suites import BUILTIN, AnySample, Suite, asked_size
from .calibration import Watched
from .harness import Harness, endings
from .turns import FollowUp, converse, follow_ups

NO_IMAGE = "no-image"  # the floor: the same questions without the image
MAX_NEW_TOKENS = 8
SENTENCE = 16  # new tokens for models that may answer with more than a word


@dataclass
class Run(Harness):
    """One evaluation on an embedded benchmark.

    turns: 2 asks every question a second time, as the second of a conversation about its image, with the tokens that
    were chosen for the first.
    """

    floor: bool = True
    turns: int = 1
    suite: Suite = BUILTIN

    def prepare_samples(self) -> None:
        # models trained on the benchmark know its questions alone; others are told to answer with one word
        self.builtin = self.suite.spoken_by(self.loaded.processor.tokenizer)
        self.size = asked_size(self.loaded.processor.tokenizer) or min(usual_size(self.adapter))
        self._processed: dict[Any, dict[str, Any]] = {}
        self._regions: dict[Any, Any] = {}

    @property
    def max_new_tokens(self) -> int:
        return MAX_NEW_TOKENS if self.builtin else SENTENCE

    @property
    def config(self) -> dict[str, Any]:
        form = {"form": "short", "normalisation": "first word"} if self.builtin else {"form": "natural", "normalisation": NORMALISATION}
        size = self.size if self.suite is BUILTIN else "own"
        how: dict[str, Any] = {"image_size": size, "max_new_tokens": self.max_new_tokens, "batch_size": self.batch_size}
        there = dict.fromkeys(s.corruption for s in self.samples if isinstance(s, Corrupted))
        if there:
            how["corruptions"] = {name: CORRUPTIONS[name] for name in sorted(there)} | ({"tile": TILE} if "patch" in there else {})
        return {"suite": self.suite.name, **form, **how, **environment(self.loaded)}

    @property
    def named_arms(self) -> list[tuple[str, Compressor | None]]:
        return [*([(NO_IMAGE, None)] if self.floor else []), *super().named_arms]

    @property
    def groups(self) -> list[Sequence[Any]]:
        kinds = [[s for s in self.samples if s.video is video] for video in (False, True)]
        alone = [kind for kind in kinds if kind]
        return [*alone, *(follow_ups(kind) for kind in alone if self.turns == 2)]

    def forget(self) -> None:
        super().forget()
        self._processed.clear()

    def head(self, arm: str, sample: AnySample | FollowUp) -> dict[str, Any]:
        q = sample.question
        head = {"method": arm, "id": sample.id, "image": sample.image, "task": sample.task, "question": q.text, "expected": q.answer}
        if isinstance(sample, FollowUp):
            return head | {"turns": 2, "first": sample.first.question.text}
        return head | ({"corruption": sample.corruption} if isinstance(sample, Corrupted) else {})

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
            if prepared is not None and method is not None:
                processor = self.seen_under(method, batch).loaded.processor.image_processor
                images = [image for image in prepared.report.images if image.row == i]
                row |= self._tokens(sample, images, prepared.report.positions, processor)
            rows.append(row)
        return rows

    def judged(self, sample: AnySample | FollowUp, text: str) -> tuple[str, bool]:
        """The answer in a text, and whether it is right."""
        if not self.builtin:
            return judge(sample.question, text)
        answer = first_word(text)
        return answer, answer == sample.question.answer

    def worded(self, sample: AnySample | FollowUp) -> str:
        """The question as this model is asked it."""
        return sample.question.text if self.builtin else sample.question.natural

    def inputs(self, batch: Sequence[AnySample], images: bool, method: Compressor | None = None) -> dict[str, Any]:
        """The processor's output for a batch, made once for all methods but those that set the processor.

        Raises ``MllmEfficientError`` for a video under one of those.
        """
        own = method is not None and method.sets_processor
        if method is not None and own and any(s.video for s in batch):
            raise MllmEfficientError(
                f"{method.spec()} sets the processor of pictures, and a video has another: leave the category video out"
            )
        key = (method.spec() if method is not None and own else None, images, *(s.id for s in batch))
        if key not in self._processed:
            loaded = self.loaded if method is None else self.seen_under(method, batch).loaded
            counts = [(0, 0) if not images else (0, 1) if s.video else (len(s.sizes(self.size)), 0) for s in batch]
            prompts = [loaded.prompt(self.worded(s), *count) for s, count in zip(batch, counts)]
            shown = [(s.video, s.pictures(self.size)) for s in batch] if images else []
            videos = [frames for video, frames in shown if video] or None
            self._processed[key] = loaded.inputs(prompts, [some for video, some in shown if not video], videos)
        return dict(self._processed[key])

    def sizes(self, sample: AnySample | FollowUp) -> list[tuple[int, int]]:
        return sample.sizes(self.size)

    def prepared(self, method: Compressor, batch: Sequence[AnySample], inputs: dict[str, Any]) -> Prepared:
        """The batch's shorter prompts; a picture goes through the tower once for all methods that see it alike."""
        asked, own = self.seen_under(method, batch), method.spec() if method.sets_processor else None
        keys = [key for s in batch for key in s.keys]  # a batch is of images or of videos
        encoded = self.vision.encoded(asked.method, items_of(self.adapter, inputs), [(own, key) for key in keys])
        rest = {k: v for k, v in inputs.items() if k not in self.adapter.encode_keys}
        return asked.shown(prepare(self.loaded.model, asked.method, encoded=encoded, image_keys=keys, **rest))

    def generate(self, call: dict[str, Any], **how: Any) -> Any:
        return self.loaded.model.generate(**call, max_new_tokens=self.max_new_tokens, do_sample=False, **how)

    def decoded(self, ids: torch.Tensor) -> list[str]:
        return self.loaded.processor.batch_decode(ids, skip_special_tokens=True)

    def _tokens(self, sample: AnySample | FollowUp, images: Sequence[Any], positions: str, processor: Any) -> dict[str, Any]:
        """What a record says of the tokens of a sample's images. processor: the image processor that made them."""
        full, kept = (sum(getattr(image, name) for image in images) for name in ("full", "kept"))
        row = {"visual_tokens_full": full, "visual_tokens_kept": kept, "positions": positions, **self._region(sample, images, processor)}
        if images[0].per_layer:
            row["tokens_per_layer"] = [sum(layer) for layer in zip(*(image.per_layer for image in images))]
        kernels = [kernel for image in images for kernel in image.kernels]
        return row | ({"kernels": kernels} if kernels else {})

    def _region(self, sample: AnySample | FollowUp, images: Sequence[Any], processor: Any) -> dict[str, float]:
        """Share of the kept tokens that lie in the region that matters, and share of that region that was kept."""
        inside = whole = kept = 0
        for number, (image, size) in enumerate(zip(images, self.sizes(sample))):
            if image.indices is None:
                return {}
            if (image.planes, size) not in self._regions:
                self._regions[image.planes, size] = self.adapter.place(image.planes, size, processor)
            region = sample.region(self._regions[image.planes, size], number)
            inside += int(region[image.indices.numpy()].sum())
            whole, kept = whole + int(region.sum()), kept + len(image.indices)
        return {"region_share": inside / kept, "region_kept": inside / whole} if whole and kept else {}


def first_word(text: str) -> str:
    """The first word of an answer in lower case, without punctuation; numbers stay numbers."""
    match = re.search(r"\w+", text.lower())
    return match.group() if match else ""
