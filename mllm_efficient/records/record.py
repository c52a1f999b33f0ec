"""A conversation about images, whatever form it was written in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MllmEfficientError
from ..loading.prompts import MARKER, parts_at
from ..media.images import name_of

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

UNANSWERED = "the conversation ends with a question: give answer, or end with the assistant's (gpt's) message"


@dataclass(frozen=True)
class Record:
    """A conversation. turns: (question, answer) pairs; each image has a ``<image>`` marker in some question, in their order. The last
    answer is None in a record that only asks.

    images: files, the bytes of files that were written into the record, or pictures. name: where it comes from, for messages. system:
    the system prompt. id: its own, or which line it is. answers: what is right for the last question, any of them; the first is the
    last turn's answer. extra: every other key of the record.
    """

    images: tuple[Path | bytes | Picture, ...]
    turns: tuple[tuple[str, str | None], ...]
    name: str = "a record"
    system: str | None = None
    id: str = ""
    answers: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)

    def first(self, turns: int) -> Record:
        """The record without the turns after these, and without their images."""
        kept = self.turns[:turns]
        return replace(self, images=self.images[: sum(question.count(MARKER) for question, _ in kept)], turns=kept)

    @property
    def learned(self) -> tuple[tuple[str, str], ...]:
        """The turns of a record that a model can learn from. Raises ``MllmEfficientError`` where the last question has no answer."""
        turns = tuple((question, answer.strip()) for question, answer in self.turns if answer is not None)
        if len(turns) < len(self.turns):
            raise MllmEfficientError(f"{self.name}: {UNANSWERED}")
        return turns

    @property
    def asked(self) -> list[dict[str, Any]]:
        """The messages up to the last question, as chat templates take them."""
        return messages(self.system, [*self.turns[:-1], (self.turns[-1][0], None)])

    def shown(self, folder: Path) -> list[str]:
        """Names of the images for reports, paths relative to a folder."""
        return [name_of(image, folder) for image in self.images]


def messages(system: str | None, turns: Sequence[tuple[str, str | None]], ending: str = "") -> list[dict[str, Any]]:
    """Turns as chat templates take them, every content a list of parts. ending: is put after every question."""
    out = [] if system is None else [{"role": "system", "content": [{"type": "text", "text": system}]}]
    for question, answer in turns:
        out.append({"role": "user", "content": parts_at(question.rstrip() + ending if ending else question, {MARKER: "image"})})
        if answer is not None:
            out.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return out
