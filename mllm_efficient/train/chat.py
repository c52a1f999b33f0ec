"""A processor's chat template and tokenizer: the text of a conversation, its answers, and its tokens before images are spread out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import MllmEfficientError, shortened
from ..loading.prompts import answer_sign, rendered
from ..records import MARKER, Record
from ..records.record import messages

IGNORED = -100


@dataclass(frozen=True)
class Rendered:
    """A conversation's text up to the end of the last answer, an image token for each image.

    answers: (start, end) of each answer with what ends it, in characters.
    """

    text: str
    answers: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Row:
    """Tokens of a record before its images are spread out: ids, labels and turns (S,).

    text: what the processor is to make the first ``covered`` of them of; the others hold no image.
    """

    text: str
    covered: int
    ids: np.ndarray
    labels: np.ndarray
    turns: np.ndarray


class Chat:
    """A processor's template and tokenizer. ending: a token that is put after every question, which a router reads."""

    def __init__(self, processor: Any, ending: int | None = None):
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.name = type(processor).__name__
        if not getattr(self.tokenizer, "is_fast", False):
            raise MllmEfficientError(f"training needs a fast tokenizer, and {type(self.tokenizer).__name__} is none")
        for kind in ("pad", "eos"):
            if getattr(self.tokenizer, f"{kind}_token", None) is None:
                raise MllmEfficientError(f"training needs a {kind} token: set tokenizer.{kind}_token of the {self.name}")
        self.image, self.video = processor.image_token, getattr(processor, "video_token", None)
        self.image_id = self.tokenizer.convert_tokens_to_ids(self.image)
        self.sign = answer_sign(processor)
        self.ending = "" if ending is None else self._word(ending)
        self.special = sorted((str(t) for t in self.tokenizer.added_tokens_decoder.values() if t.special), key=len, reverse=True)

    def _word(self, token: int) -> str:
        """A token as text after a question."""
        word: str = self.tokenizer.decode([token]).strip()
        if not 0 <= token < len(self.tokenizer) or self.tokenizer(f"a {word}", add_special_tokens=False)["input_ids"][-1] != token:
            raise MllmEfficientError(f"router_token={token} is no token that can be written after a question: add a special one")
        return f" {word}"

    def render(self, record: Record) -> Rendered:
        """Raises ``MllmEfficientError`` naming the record where its answers cannot be found in the template's text."""
        turns = record.learned
        if self.sign and any(question.rstrip().endswith(self.sign) for question, _ in turns):
            raise MllmEfficientError(f"{record.name}: a question ends in {self.sign!r}, as a whole prompt does: give the question alone")
        chat = messages(record.system, turns, self.ending)
        text = self._template(chat, False, record)
        if text.count(self.image) != len(record.images):
            raise MllmEfficientError(
                f"{record.name}: the prompt has {text.count(self.image)} {self.image} for {len(record.images)} image(s)"
            )
        if self.video is not None and self.video in text:
            raise MllmEfficientError(f"{record.name}: the conversation has {self.video}, and training takes no videos")
        head = len(chat) - 2 * len(turns)  # the system prompt
        found = [self._find(text, chat[: head + 2 * i + 1], answer, record) for i, (_, answer) in enumerate(turns)]
        rest = text[found[-1][1] :]
        token = next((t for t in self.special if rest.lstrip().startswith(t)), None)
        ending = None if token is None else rest[: rest.index(token) + len(token)]
        out, last, spans = "", 0, []
        for start, end in found:
            begin = len(out) + start - last
            out += text[last:end]
            last = end
            if ending is not None and text.startswith(ending, end):
                out += ending
                last += len(ending)
            else:
                out += self.tokenizer.eos_token
            spans.append((begin, len(out)))
        return Rendered(out, tuple(spans))

    def _find(self, text: str, chat: list[dict[str, Any]], answer: str, record: Record) -> tuple[int, int]:
        """Where the answer to these messages begins, right after the prompt, and where it ends."""
        prompt = self._template(chat, True, record)
        gap = re.compile(r"\s*").match(text, len(prompt))
        begin = len(prompt) if gap is None else gap.end()
        if not text.startswith(prompt) or not text.startswith(answer, begin):
            raise MllmEfficientError(
                f"{record.name}: in the chat template of {self.name} the answer {shortened(answer, 40)!r} does not follow its prompt"
            )
        return len(prompt), begin + len(answer)

    def _template(self, chat: list[dict[str, Any]], prompt: bool, record: Record) -> str:
        try:
            return rendered(self.processor, chat, answer=prompt, name=self.name)
        except MllmEfficientError as error:
            raise MllmEfficientError(f"{record.name}: {error}") from None

    def tokenize(self, rendered: Sequence[Rendered]) -> list[Row]:
        """The tokens of each conversation, their labels and turns."""
        batch = self.tokenizer([r.text for r in rendered], return_offsets_mapping=True)
        return [self._row(r, *tokens) for r, *tokens in zip(rendered, batch["input_ids"], batch["offset_mapping"])]

    def _row(self, rendered: Rendered, tokens: list[int], offsets: list[tuple[int, int]]) -> Row:
        ids, (starts, ends) = np.array(tokens), np.array(offsets).T
        first, last = np.array(rendered.answers).T
        turns = 1 + np.searchsorted(last[:-1], starts, side="right")
        answered = (starts >= first[turns - 1]) & (starts < ends)
        images = np.flatnonzero((ids == self.image_id) & (turns == 1))
        turns[: images[-1] + 1 if len(images) else 0] = 0
        return Row(rendered.text, len(ids), ids, np.where(answered, ids, IGNORED), np.maximum.accumulate(turns))


# ------------------------------------------------------------------------------------------------ independent turns


def single_turns(record: Record) -> list[Record]:
    """Every turn as a conversation of its own about all images."""
    images = len(record.images)
    first = record.turns[0][0].lstrip()
    beginning = re.match(rf"(\s*{MARKER}\s*)*", first)
    text = first if beginning is None else first[beginning.end() :]
    if MARKER in text or any(MARKER in question for question, _ in record.turns[1:]):
        raise MllmEfficientError(f"{record.name}: independent turns need all images at the beginning of the first question")
    questions = [text, *(question for question, _ in record.turns[1:])]
    turns = [(f"{MARKER}\n" * images + question, answer) for question, (_, answer) in zip(questions, record.turns)]
    return [replace(record, turns=(turn,)) for turn in turns]


def joined(rows: Sequence[Row], name: str) -> Row:
    """The first turn's row, and after it the others without what they share with it."""
    shared = int((rows[0].turns == 0).sum())
    for row in rows[1:]:
        if not np.array_equal(row.ids[:shared], rows[0].ids[:shared]) or (row.turns == 0).sum() != shared:
            raise MllmEfficientError(f"{name}: the chat template makes the turns begin differently: they cannot be independent")
    ids, labels = (np.concatenate([rows[0].__dict__[k], *(r.__dict__[k][shared:] for r in rows[1:])]) for k in ("ids", "labels"))
    turns = np.concatenate([rows[0].turns, *(np.full(len(r.ids) - shared, i) for i, r in enumerate(rows[1:], start=2))])
    return Row(rows[0].text, rows[0].covered, ids, labels, turns)
