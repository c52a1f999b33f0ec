"""Training conversations: a user's LLaVA-format file, checked before anything is trained, or the embedded benchmark's scenes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from ..errors import MllmEfficientError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

MARKER = "<image>"
SHOWN = 5  # problems that an error names; it counts the others
ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}
SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Record:
    """A conversation about images. turns: (question, answer) pairs; each image has a ``<image>`` marker in some question.

    name: where it comes from, for messages.
    """

    images: tuple[Path | Picture, ...]
    turns: tuple[tuple[str, str], ...]
    name: str = "a record"

    def first(self, turns: int) -> Record:
        """The record without the turns after these, and without their images."""
        kept = self.turns[:turns]
        return Record(self.images[: sum(question.count(MARKER) for question, _ in kept)], kept, self.name)


# ------------------------------------------------------------------------------------------------ a user's own file


def read(path: Path, image_folder: Path | None = None) -> list[Record]:
    """The conversations of a LLaVA-format file, a JSON list or JSONL. Images are looked for in the folder, but not opened.

    image_folder: where the paths of images begin; the folder of the file if None. Every record is checked. Raises
    ``MllmEfficientError`` in one line with ``file:line`` of the first five problems and the number of all.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise MllmEfficientError(f"cannot read the data {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise MllmEfficientError(f"{path} is not UTF-8 text: {error}") from None
    folder = str(path.parent if image_folder is None else image_folder)
    records, problems = [], []
    for place, entry in _list_entries(text) if text.lstrip().startswith("[") else _line_entries(text):
        try:
            if isinstance(entry, MllmEfficientError):
                raise entry
            records.append(_record(entry, folder, f"{path}:{place}"))
        except MllmEfficientError as error:
            problems.append(f"{path}:{place}: {error}")
    if len(problems) > 1:
        shown = f"the first {SHOWN}: " if len(problems) > SHOWN else ""
        raise MllmEfficientError(f"{len(problems)} problems in the data, {shown}{'; '.join(problems[:SHOWN])}")
    if problems:
        raise MllmEfficientError(problems[0])
    if not records:
        raise MllmEfficientError(f"{path} holds no record")
    return records


def _line_entries(text: str) -> Iterator[tuple[str, Any]]:
    """(line number, object or error) of every line that is not blank."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield str(number), json.loads(line)
            except (ValueError, RecursionError) as error:
                yield str(number), MllmEfficientError(f"not JSON: {_said_of(error)}")


def _list_entries(text: str) -> Iterator[tuple[str, Any]]:
    """(line number and record number, object or error) of the elements of a JSON list, up to where it is no JSON."""
    decoder = json.JSONDecoder()
    at, line, counted, number = _after_space(text, text.index("[") + 1), 1, 0, 0
    while number or text[at : at + 1] != "]":
        number += 1
        line, counted = line + text.count("\n", counted, at), at
        place = f"{line} (record {number})"
        try:
            entry, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            yield place, MllmEfficientError(f"not JSON: {_said_of(error)}")
            return
        yield place, entry
        at = _after_space(text, at)
        if text[at : at + 1] == "]":
            break
        if text[at : at + 1] != ",":
            yield place, MllmEfficientError("not JSON: no ',' or ']' after the record")
            return
        at = _after_space(text, at + 1)
    if text[at + 1 :].strip():
        yield str(text.count("\n", 0, at) + 1), MllmEfficientError("not JSON: the list ends here, and more follows")


def _said_of(error: Exception) -> str:
    return f"{error.msg} (line {error.lineno} column {error.colno})" if isinstance(error, json.JSONDecodeError) else str(error)


def _after_space(text: str, at: int) -> int:
    found = SPACE.match(text, at)
    return at if found is None else found.end()


def _record(entry: Any, folder: str, name: str) -> Record:
    if not isinstance(entry, dict):
        raise MllmEfficientError("not a JSON object with image and conversations")
    images = tuple(_images(entry, folder))
    turns = tuple(_turns(entry))
    markers = sum(question.count(MARKER) for question, _ in turns)
    if images and not markers:
        turns = ((f"{MARKER}\n" * len(images) + turns[0][0], turns[0][1]), *turns[1:])
    elif markers != len(images):
        raise MllmEfficientError(f"{markers} {MARKER} in the questions, and {len(images)} image(s) are given")
    return Record(images, turns, name)


def _images(entry: dict[str, Any], folder: str) -> Iterator[Path]:
    if entry.get("video") or entry.get("videos"):
        raise MllmEfficientError("a video: training takes images")
    if entry.get("image") and entry.get("images"):
        raise MllmEfficientError("both image and images: give one of them")
    given = entry.get("image") or entry.get("images") or []
    for image in given if isinstance(given, list) else [given]:
        if not isinstance(image, str) or not image:
            raise MllmEfficientError("image must be a path or a list of paths")
        path = os.path.join(folder, image)
        if not os.path.isfile(path):
            raise MllmEfficientError(f"no image file {path}")
        yield Path(path)


def _turns(entry: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The (question, answer) pairs of ``conversations`` (from, value) or ``messages`` (role, content)."""
    key, role, content = ("conversations", "from", "value") if "conversations" in entry else ("messages", "role", "content")
    given = entry.get(key)
    if not isinstance(given, list):
        raise MllmEfficientError('no conversations, a list such as [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]')
    if not given:
        raise MllmEfficientError("the conversation is empty")
    said: list[str] = []
    for number, message in enumerate(given, start=1):
        speaker, text = _message(message, role, content, number)
        if speaker != ("human", "gpt")[len(said) % 2]:
            raise MllmEfficientError(f"message {number} is of {message[role]!r}: human and gpt must take turns, and human begins")
        if not text:
            raise MllmEfficientError(f"message {number} is an empty {'question' if speaker == 'human' else 'answer'}")
        if speaker == "gpt" and MARKER in text:
            raise MllmEfficientError(f"message {number} is an answer with {MARKER}: images belong to questions")
        said.append(text)
    if len(said) % 2:
        raise MllmEfficientError("the conversation ends with a question: the last message must be gpt's")
    yield from zip(said[::2], said[1::2])


def _message(message: Any, role: str, content: str, number: int) -> tuple[str, str]:
    """Who speaks, "human" or "gpt", and what is said."""
    if not isinstance(message, dict) or not isinstance(message.get(content), str):
        raise MllmEfficientError(f"message {number} has no text {content!r}")
    spoken_by = message.get(role)
    if not isinstance(spoken_by, str) or spoken_by not in ROLES:
        raise MllmEfficientError(f"message {number} has the unknown role {spoken_by!r} (known: {', '.join(ROLES)})")
    text = message[content].strip()
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold and no tokenizer takes
        raise MllmEfficientError(f"message {number} is not valid Unicode") from None
    return ROLES[spoken_by], text


# ------------------------------------------------------------------------------------------------ generated scenes


class BuiltinRecords(Sequence[Record]):
    """Scenes of the embedded benchmark's generator, a record each, made when asked for. See ``builtin_records``."""

    def __init__(self, split: str, scenes: int, questions: int, images: Any, natural: bool, seed: int):
        self.split, self.scenes, self.questions = split, scenes, questions
        self.images, self.natural, self.seed = images, natural, seed

    def __len__(self) -> int:
        return self.scenes

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        import numpy as np
        from PIL import Image

        from ..eval.builtin.recipe.data import training_questions
        from ..eval.builtin.scenes import make_scene

        scene = make_scene(self.split, index)
        pixels = scene.draw() if self.images is None else np.array(self.images[index])
        pool = training_questions(scene)
        chosen = [pool[i] for i in np.random.default_rng([self.seed, index]).choice(len(pool), self.questions, replace=False)]
        turns = [(q.natural if self.natural else q.text, q.answer) for q in chosen]
        turns[0] = (f"{MARKER}\n{turns[0][0]}", turns[0][1])
        return Record((Image.fromarray(pixels),), tuple(turns), f"builtin/{self.split}/{index}")


def builtin_records(
    split: str, scenes: int, questions: int, folder: Path | None = None, natural: bool = False, seed: int = 0
) -> BuiltinRecords:
    """The first scenes of a split ("train" or "val"), each with ``questions`` of the 24 drawn for it, the same ones every time.

    folder: where the pictures are kept once drawn (about 3 ms each); None draws them whenever asked for. natural: the
    form for other models, which asks for one word; the embedded model is asked the short form.
    """
    from ..eval.builtin.recipe.data import POOL, build

    if split not in ("train", "val"):
        raise MllmEfficientError(f"split {split!r} is not train or val")
    if scenes < 1 or not 1 <= questions <= POOL:
        raise MllmEfficientError(f"{scenes} scenes with {questions} questions each: at least 1 scene, and 1 to {POOL} questions")
    images = None if folder is None else build(split, scenes, folder)["images"]
    return BuiltinRecords(split, scenes, questions, images, natural, seed)
