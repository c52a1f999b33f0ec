"""Conversations to model inputs: the chat template, labels on the answers alone, and batches as each family takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..apply.prompt import TYPES
from ..errors import MllmEfficientError
from ..loading.prompts import model_inputs
from ..media.images import load_image
from ..records import Record
from .chat import IGNORED, Chat, Row, joined, single_turns

PADDING = {"labels": IGNORED, "turns": -1, "attention_mask": 0, "mm_token_type_ids": 0, "token_type_ids": 0}
SAID_OF_TOKENS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}


def encode(record: Record, processor: Any, max_length: int | None = None) -> dict[str, Tensor]:
    """One conversation as tensors without a batch dimension.

    Returns ``input_ids`` (L,), ``labels`` (L,) with -100 everywhere but on the answers and the token that ends each,
    ``turns`` (L,), 0 up to the end of the first question's images and the number of the turn after that (a conversation
    that begins without images has no 0), ``mm_token_type_ids`` or ``token_type_ids`` (L,) if the processor marks images by them, and the
    processor's vision tensors as they come. Turns that go beyond ``max_length`` are left out, and the end of the first one; raises
    ``MllmEfficientError`` if its images or all of its answer do, or if the template or the processor makes something of the
    conversation that cannot be labelled.
    """
    rows, vision = _encode([record], Chat(processor), max_length, independent=False)
    return rows[0] | vision


class Collator:
    """Records to a right-padded batch. A turn beyond ``max_length`` tokens (visual ones included) is left out, a first one cut.

    ``input_ids``, ``attention_mask``, ``labels`` (-100 on padding) are (batch, L), and what the processor marks
    images by, where it does; the vision tensors are what the processor makes of all images of the batch.

    independent_turns: every turn is encoded as the single-turn conversation about the record's images that it would be
    alone, without the beginning that it shares with the others. ``turns`` (batch, L) tells which is which: 0 for the
    shared beginning, then the number of the turn, -1 on padding. All images must stand at the beginning.

    ending: a token that is put after every question. image_range: of pictures with more than 8 bits (see ``images``).
    """

    def __init__(
        self, processor: Any, max_length: int | None = None, independent_turns: bool = False, ending: int | None = None,
        image_range: str = "full",
    ):  # fmt: skip
        self.chat, self.max_length, self.independent_turns = Chat(processor, ending), max_length, independent_turns
        self.image_range = image_range

    def __call__(self, records: Sequence[Record]) -> dict[str, Tensor]:
        rows, vision = _encode(records, self.chat, self.max_length, self.independent_turns, self.image_range)
        for row in rows:
            row["attention_mask"] = torch.ones_like(row["input_ids"])
            if not self.independent_turns:
                del row["turns"]
        padding = PADDING | {"input_ids": self.chat.tokenizer.pad_token_id}
        names = ("input_ids", "attention_mask", *sorted(set(rows[0]) - {"input_ids", "attention_mask"}))
        batch = {name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=padding[name]) for name in names}
        return batch | vision


def tokens_of(records: Sequence[Record], chat: Chat, independent: bool) -> list[Row]:
    """Each record's tokens before its images are spread out, with labels and turns."""
    conversations = [single_turns(r) if independent else [r] for r in records]
    tokens = iter(chat.tokenize([chat.render(c) for turns in conversations for c in turns]))
    return [joined([next(tokens) for _ in turns], record.name) for record, turns in zip(records, conversations)]


def _encode(
    records: Sequence[Record], chat: Chat, max_length: int | None, independent: bool, image_range: str = "full"
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Each record's tensors (L,), and the vision tensors of them all."""
    rows = tokens_of(records, chat, independent)
    records = [_opened(record, image_range) for record in records]
    batch = model_inputs(chat.processor, [r.text for r in rows], [r.images for r in records], padding_side="right")
    encoded = [_spread(row, i, batch, chat, record.name) for i, (row, record) in enumerate(zip(rows, records))]
    fitting = [_fitting(record, row["turns"], max_length) for record, row in zip(records, encoded)]
    if any(len(fit.turns) < len(record.turns) for fit, record in zip(fitting, records)):
        return _encode(fitting, chat, max_length, independent, image_range)  # anew, because images may have gone with their turns
    encoded = [_cut(row, max_length, chat, record.name) for row, record in zip(encoded, records)]
    return encoded, {name: value for name, value in batch.items() if name not in SAID_OF_TOKENS}


def _spread(row: Row, index: int, batch: dict[str, Tensor], chat: Chat, name: str) -> dict[str, Tensor]:
    """A row with its images spread out as the processor does it. Visual tokens have no label, and the turn of what precedes."""
    real = batch["attention_mask"][index].bool()
    full = batch["input_ids"][index][real].numpy()
    head = row.ids[: row.covered]
    text, written = np.isin(full, head[head != chat.image_id]), head != chat.image_id
    text &= ~_within_images(full, text, chat.image_id)
    if not np.array_equal(full[text], head[written]):
        raise MllmEfficientError(f"{name}: {chat.name} changes the text around its images: it cannot be trained with")
    labels, turns = np.full(len(full), IGNORED), np.zeros(len(full), dtype=np.int64)
    labels[text], turns[text] = row.labels[: row.covered][written], row.turns[: row.covered][written]
    columns = {"input_ids": (full, row.ids), "labels": (labels, row.labels), "turns": (np.maximum.accumulate(turns), row.turns)}
    out = {k: torch.from_numpy(np.concatenate([covered, every[row.covered :]])) for k, (covered, every) in columns.items()}
    for kind in TYPES:
        if kind in batch and (kind == TYPES[0] or batch[kind].any()):  # a tokenizer's own, of one text, are all 0
            types = batch[kind][index][real]
            out[kind] = torch.cat([types, types.new_zeros(len(out["turns"]) - len(full))])
    return out


def _within_images(full: np.ndarray, text: np.ndarray, placeholder: int) -> np.ndarray:
    """(L,) bool, tokens of the text that an image has too: behind a placeholder, and in front of what only images have.

    Such as the line break between rows of tiles. text: (L,) bool, tokens that are in the text.
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[False], text, [False]]).astype(int)))
    within = np.zeros(len(full), dtype=bool)
    for start, stop in edges.reshape(-1, 2):
        within[start:stop] = start > 0 and stop < len(full) and full[start - 1] == placeholder != full[stop]
    return within


def _fitting(record: Record, turns: Tensor, max_length: int | None) -> Record:
    """The record with as many of its turns as fit. turns: (L,)."""
    if max_length is None or len(turns) <= max_length:
        return record
    lengths = [int((turns <= turn).sum()) for turn in range(1, len(record.turns) + 1)]
    return record.first(max(1, sum(length <= max_length for length in lengths)))


def _cut(row: dict[str, Tensor], max_length: int | None, chat: Chat, name: str) -> dict[str, Tensor]:
    """A row whose first turn alone is too long, without its end. Raises where images would be cut."""
    if max_length is None or len(row["input_ids"]) <= max_length:
        return row
    if (row["input_ids"][max_length:] == chat.image_id).any():
        raise MllmEfficientError(f"{name}: its images go beyond max_length={max_length}: raise it")
    out = {key: value[:max_length] for key, value in row.items()}
    if not (out["labels"] != IGNORED).any():
        begins = 1 + int((row["labels"] != IGNORED).nonzero()[0])
        raise MllmEfficientError(f"{name}: max_length={max_length} cuts all of its answers, the first of which begins at token {begins}")
    return out


def _opened(record: Record, image_range: str) -> Record:
    """The record with its images as pictures. Raises ``MllmEfficientError`` naming the record of one that cannot be read."""
    try:
        return replace(record, images=tuple(i if hasattr(i, "getpixel") else load_image(i, image_range) for i in record.images))
    except MllmEfficientError as error:
        raise MllmEfficientError(f"{record.name}: {error}") from error
