"""What the records of a training hold, found without decoding a picture: tokens, answers that are cut, pictures that cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..errors import MllmEfficientError
from ..loading.prompts import model_inputs
from ..media.images import MIN_SIDE, size_of
from ..records import Record
from .chat import IGNORED, Chat, Row
from .encoding import tokens_of

CHUNK = 64  # records that are tokenized together
Progress = Callable[[int], Any]


def survey(
    records: Sequence[Record], processor: Any, max_length: int | None = None, independent: bool = False, sample: int | None = None,
    progress: Progress | None = None, adapter: Any = None,
) -> dict[str, Any]:  # fmt: skip
    """Counts over records. Of pictures only headers are read; a processor sees blank ones of the same sizes, each combination once.

    Returns ``unreadable`` (pictures that are missing or no images), ``tiny`` (a side below 8 pixels), ``cut_answers`` (records that lose
    answers or the end of one to ``max_length``), ``lost_answers`` (of those, records that lose all, at which a training stops),
    ``text_tokens``, ``answer_tokens`` and ``visual_tokens`` (``{"mean", "max"}`` of the records with readable pictures), ``surveyed``
    and ``records``. processor: None leaves out what needs one. adapter: the model's, with which newline columns are none of the visual
    tokens, as in every report. sample: how many evenly spaced records are looked at, instead of all.
    Raises ``MllmEfficientError`` naming a record that the processor's template does not take.
    """
    count = len(records) if sample is None else min(sample, len(records))
    picked = np.unique(np.linspace(0, len(records) - 1, count).round().astype(int)).tolist()
    found: dict[str, Any] = {"unreadable": 0, "tiny": 0, "surveyed": len(picked), "records": len(records)}
    tokens = None if processor is None else _Tokens(processor, max_length, independent, adapter)
    for low in range(0, len(picked), CHUNK):
        whole = []
        for record in (records[i] for i in picked[low : low + CHUNK]):
            sizes = [_size(image) for image in record.images]
            found["unreadable"] += sizes.count(None)
            found["tiny"] += sum(size is not None and min(size) < MIN_SIDE for size in sizes)
            if all(size is not None and min(size) >= MIN_SIDE for size in sizes):
                whole.append((record, tuple(size for size in sizes if size is not None)))
        if tokens is not None and whole:
            tokens.add(whole)
        if progress is not None:
            progress(min(CHUNK, len(picked) - low))
    return found if tokens is None else found | tokens.found()


def _size(image: Any) -> tuple[int, int] | None:
    try:
        return image.size if hasattr(image, "getpixel") else size_of(image)
    except MllmEfficientError:
        return None


class _Tokens:
    """Counts tokens as the collator will see them."""

    def __init__(self, processor: Any, max_length: int | None, independent: bool, adapter: Any):
        self.chat, self.max_length, self.independent, self.adapter = Chat(processor), max_length, independent, adapter
        self.spread: dict[tuple[tuple[int, int], ...], tuple[np.ndarray, np.ndarray]] = {}
        self.counts: list[tuple[int, int, int]] = []
        self.cut = self.lost = 0

    def add(self, whole: Sequence[tuple[Record, tuple[tuple[int, int], ...]]]) -> None:
        for (_, sizes), row in zip(whole, tokens_of([record for record, _ in whole], self.chat, self.independent)):
            self._count(row, sizes)

    def _count(self, row: Row, sizes: tuple[tuple[int, int], ...]) -> None:
        if sizes not in self.spread:
            self.spread[sizes] = _spread(self.chat, sizes, self.adapter)
        columns, visual = self.spread[sizes]
        width = np.ones(len(row.ids), dtype=np.int64)
        width[row.ids == self.chat.image_id] = columns
        ends, labelled, seen = width.cumsum(), row.labels != IGNORED, int(visual.sum())
        self.counts.append((int(ends[-1]) - seen, int(labelled.sum()), seen))
        if self.max_length is not None and ends[-1] > self.max_length:
            self.cut += 1
            self.lost += not (ends[labelled] <= self.max_length).any()

    def found(self) -> dict[str, Any]:
        names = ("text_tokens", "answer_tokens", "visual_tokens")
        columns = zip(names, np.array(self.counts or [(0, 0, 0)]).T)
        counts: dict[str, Any] = {name: {"mean": float(c.mean()), "max": int(c.max())} for name, c in columns}
        return counts | {"cut_answers": self.cut, "lost_answers": self.lost}


def _spread(chat: Chat, sizes: tuple[tuple[int, int], ...], adapter: Any) -> tuple[np.ndarray, np.ndarray]:
    """(images,) columns that each image's token becomes in a prompt with images of these sizes, and how many are visual tokens."""
    from PIL import Image

    if not sizes:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    text = chat.tokenizer.eos_token.join([chat.image] * len(sizes))
    call = model_inputs(chat.processor, [text], [[Image.new("RGB", size) for size in sizes]])
    full = call["input_ids"][0].numpy()
    plain = np.array(chat.tokenizer(text)["input_ids"])
    parts, before = (np.split(ids, np.flatnonzero(ids == chat.tokenizer.eos_token_id))[: len(sizes)] for ids in (full, plain))
    columns = np.array([1 + len(part) - len(old) for part, old in zip(parts, before)])
    if adapter is not None:
        return columns, np.array([item.shape.n for item in adapter.items(call)])
    return columns, np.array([int((part == chat.image_id).sum()) for part in parts])
