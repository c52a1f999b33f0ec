"""The forms that records are written in: LLaVA's, OpenAI's chat and batch lines, Hugging Face's parts, and a bare prompt."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import MllmEfficientError, shortened
from ..media.images import find
from .record import MARKER, Record

TALKS = ("prompt", "messages", "conversations")
KNOWN = {"id", "custom_id", "body", "image", "images", "video", "videos", "system", "system_prompt", "answer", *TALKS}
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system", "developer": "system"}
SOURCES = ("image", "url", "path", "base64", "image_url")
KINDS = {"user": "question", "assistant": "answer", "system": "text"}
UNUSABLE = ("tool_calls", "tool_call_id", "function_call", "audio", "reasoning_content", "weight")  # of a message
RESIZED = ("min_pixels", "max_pixels", "resized_height", "resized_width")  # of a part
VIDEO = "<video>"


def record_of(entry: Any, folder: Path, name: str, usual: str, look: bool = True) -> Record:
    """The record in a JSON value. folder: where paths begin. name: for messages. usual: the id of a record without one. look: whether
    images must be there. Raises ``MllmEfficientError`` for what cannot be used; nothing is left out in silence.
    """
    if not isinstance(entry, dict):
        raise MllmEfficientError(f"not a JSON object with {', '.join(TALKS[:-1])} or {TALKS[-1]}")
    try:
        json.dumps(entry, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold and no tokenizer takes
        raise MllmEfficientError("a text is not valid Unicode") from None
    entry = {k: v for k, v in _unfolded(entry).items() if v is not None}
    if entry.get("video") or entry.get("videos"):
        raise MllmEfficientError("a video: records take images")
    said, own = _said(entry)
    listed = _listed(entry)
    if own and listed:
        raise MllmEfficientError("both images of the record and of single parts: give one of them")
    turns = _turns(said, _answers(entry.get("answer")))
    answers = tuple(_answers(entry.get("answer"))) or ((turns[-1][1],) if turns[-1][1] is not None else ())
    images = tuple(find(i, folder, look) for i in own or listed)
    markers = sum(question.count(MARKER) for question, _ in turns)
    if images and not markers:
        turns[0] = (f"{MARKER}\n" * len(images) + turns[0][0], turns[0][1])
    elif markers != len(images):
        raise MllmEfficientError(f"{markers} {MARKER} in the questions, and {len(images)} image(s) are given")
    extra = {k: v for k, v in entry.items() if k not in KNOWN}
    return Record(images, tuple(turns), name, _system(entry, said), _id(entry, usual), answers, extra)


def _unfolded(entry: dict[str, Any]) -> dict[str, Any]:
    """A line of OpenAI's batches as a record: what is in its body beside what is around it."""
    body = entry.get("body")
    if body is None:
        return entry
    if not isinstance(body, dict):
        raise MllmEfficientError("body must be an object with messages")
    twice = sorted(k for k in set(body) & set(entry) if k in KNOWN)
    if twice:
        raise MllmEfficientError(f"{twice[0]} stands in the record and in its body: give one of them")
    return {**{k: v for k, v in entry.items() if k != "body"}, **body}


def _id(entry: dict[str, Any], usual: str) -> str:
    if "id" in entry and "custom_id" in entry:
        raise MllmEfficientError("both id and custom_id: give one of them")
    named = entry.get("id", entry.get("custom_id", usual))
    if isinstance(named, bool) or not isinstance(named, str | int) or named == "":
        raise MllmEfficientError("id must be a text or a whole number")
    return str(named)


def _listed(entry: dict[str, Any]) -> list[Any]:
    """The images of a record as they are named in it."""
    if entry.get("image") and entry.get("images"):
        raise MllmEfficientError("both image and images: give one of them")
    given = entry.get("image") or entry.get("images") or []
    return given if isinstance(given, list) else [given]


def _answers(given: Any) -> list[str]:
    """``answer`` is a text or a number, or a list of those, any of which is right."""
    out = []
    for one in () if given is None else given if isinstance(given, list) and given else [given]:
        number = isinstance(one, int | float) and not isinstance(one, bool) and math.isfinite(one)
        if not number and (not isinstance(one, str) or not one.strip()):
            raise MllmEfficientError("answer must be a text or a number, or a list of them")
        out.append(str(one).strip())
        _check_text("the answer", out[-1], image=False)
    return out


# ------------------------------------------------------------------------------------------------ who says what


def _said(entry: dict[str, Any]) -> tuple[list[tuple[str, str]], list[Any]]:
    """(role, text) of every message, a marker for each image in it, and the images that stand in messages, in their order."""
    given = [key for key in TALKS if key in entry]
    if len(given) != 1:
        raise MllmEfficientError(f"both {' and '.join(given)}: give one of them" if given else f"neither {' nor '.join(TALKS)}")
    talk = entry[given[0]]
    if given[0] == "prompt":
        if not isinstance(talk, str) or not talk.strip():
            raise MllmEfficientError("prompt must be a text")
        _check_text("prompt", talk)
        return [("user", talk)], []
    if not isinstance(talk, list):
        raise MllmEfficientError(f'{given[0]} must be a list such as [{{"role": "user", "content": "..."}}]')
    if not talk:
        raise MllmEfficientError(f"{given[0]}: the conversation is empty")
    said, images = [], list[Any]()
    for number, message in enumerate(talk, start=1):
        role, text = _message(message, number, images)
        said.append((role, text))
    return said, images


def _message(message: Any, number: int, images: list[Any]) -> tuple[str, str]:
    """Who speaks and what is said. The message's own images are appended to ``images``."""
    if not isinstance(message, dict):
        raise MllmEfficientError(f"message {number} is no object with role and content")
    who, what = ("from", "value") if "from" in message else ("role", "content")
    spoken_by, content = message.get(who), message.get(what)
    if not isinstance(spoken_by, str) or spoken_by not in ROLES:
        raise MllmEfficientError(f"message {number} has the unknown role {shortened(repr(spoken_by))} (known: {', '.join(ROLES)})")
    odd = next((key for key in UNUSABLE if message.get(key) is not None), None)
    if odd:
        raise MllmEfficientError(f"message {number} has {odd}, which is not supported")
    role = ROLES[spoken_by]
    if isinstance(content, list):
        text = _joined(content, number, role, images)
    elif isinstance(content, str):
        text = content
    else:
        raise MllmEfficientError(f"message {number} has no text {what!r}, and no list of parts")
    if not text.strip():
        raise MllmEfficientError(f"message {number} is an empty {KINDS[role]}")
    if role == "assistant":
        text = text.strip()
    _check_text(f"message {number}", text, image=role == "user")
    return role, text


def _joined(content: list[Any], number: int, role: str, images: list[Any]) -> str:
    """The text of a list of parts, a line for each text, a marker for each image."""
    out, last = "", ""
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            out += ("\n" if last == "text" else "") + part["text"]
        elif kind in ("image", "image_url"):
            if role != "user":
                raise MllmEfficientError(f"message {number} is of the {role} and has an image: images belong to questions")
            images += _sources(part, number)
            out += MARKER
        else:
            raise MllmEfficientError(
                f"message {number} has a part {shortened(repr(kind))}: parts are text, image (with image, url or path) and image_url"
            )
        last = kind
    return out


def _sources(part: dict[str, Any], number: int) -> list[Any]:
    """The image of a part; none where the record lists it."""
    odd = next((key for key in RESIZED if part.get(key) is not None), None)
    if odd:
        raise MllmEfficientError(f"message {number}: {odd} of a single image is not supported: give pixel limits to the command")
    given = [(key, part[key]) for key in SOURCES if part.get(key) is not None]
    if len(given) > 1:
        raise MllmEfficientError(f"message {number}: an image has both {given[0][0]} and {given[1][0]}: give one of them")
    if not given and part["type"] == "image_url":
        raise MllmEfficientError(f"message {number}: image_url has no url")
    if not given:
        return []
    key, value = given[0]
    if key == "image_url":
        value = value.get("url") if isinstance(value, dict) else value
    if not isinstance(value, str) or not value:
        raise MllmEfficientError(f"message {number}: {key} of an image must be a path, a file: or a data: URI")
    return [f"data:;base64,{value}" if key == "base64" else value]


def _check_text(where: str, text: str, image: bool = True) -> None:
    if VIDEO in text:
        raise MllmEfficientError(f"{where} has {VIDEO}, and the record has no video (records take images)")
    if MARKER in text and not image:
        raise MllmEfficientError(f"{where} has {MARKER}: images belong to questions")


def _turns(said: list[tuple[str, str]], answers: list[str]) -> list[tuple[str, str | None]]:
    """(question, answer) pairs of the messages, the last answer from ``answers`` where the messages have none."""
    spoken = said[1:] if said[0][0] == "system" else said
    offset = 1 + len(said) - len(spoken)
    for number, (role, _) in enumerate(spoken, start=offset):
        wanted = ("user", "assistant")[(number - offset) % 2]
        if role != wanted:
            raise MllmEfficientError(
                f"message {number} is of the {role}: user (human) and assistant (gpt) must take turns, the user first"
                + (", after a system prompt" if role == "system" else "")
            )
    if not spoken:
        raise MllmEfficientError("the conversation has no question")
    texts: list[str | None] = [text for _, text in spoken]
    if len(texts) % 2:
        texts.append(answers[0] if answers else None)
    elif answers:
        raise MllmEfficientError("both an answer and a last message of the assistant: give one of them")
    return [(str(question), answer) for question, answer in zip(texts[::2], texts[1::2])]


def _system(entry: dict[str, Any], said: list[tuple[str, str]]) -> str | None:
    """The system prompt, given by one of its names or as the first message."""
    found = [*_named_systems(entry), *(text for role, text in said[:1] if role == "system")]
    if len(found) > 1:
        raise MllmEfficientError("more than one system prompt: give one of them")
    return found[0] if found else None


def _named_systems(entry: dict[str, Any]) -> Iterator[str]:
    for key in ("system", "system_prompt"):
        if key in entry:
            if not isinstance(entry[key], str):
                raise MllmEfficientError(f"{key} must be a text")
            _check_text(key, entry[key], image=False)
            if entry[key].strip():
                yield entry[key]
