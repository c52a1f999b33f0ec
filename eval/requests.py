"""A user's own requests: one JSON object a line, with the paths of its images, its prompt or messages, perhaps its answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_efficient.errors import MllmEfficientError, did_you_mean
from mllm_efficient.images import load_image
from mllm_efficient.models import Loaded

KEYS = ("id", "images", "prompt", "messages", "answer")
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Request:
    """One line of a file. images: in prompt order. prompt or messages: one of them. answers: what is right, if known.

    digest: a hash of all of it, the contents of the images included.
    """

    id: str
    line: int
    images: tuple[Path, ...] = ()
    prompt: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    answers: tuple[str, ...] = ()
    digest: str = ""

    @property
    def question(self) -> str:
        """What the user asks last, for tables."""
        if self.prompt is not None:
            return self.prompt
        assert self.messages is not None
        return " ".join(part["text"] for part in self.messages[-1]["content"] if part["type"] == "text")

    def pictures(self) -> list[Any]:
        return [load_image(path) for path in self.images]


def read_requests(path: Path, limit: int | None = None) -> list[Request]:
    """The first ``limit`` requests of a file. Every line is checked, and every image of these requests is read.

    Raises ``MllmEfficientError`` naming the line: no JSON object, unknown keys, neither or both of prompt and messages, an
    image that is missing or cannot be read, messages with another number of images, an id that stands twice.
    """
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except FileNotFoundError:
        raise MllmEfficientError(f"--data: no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise MllmEfficientError(f"--data: {path} cannot be read: {error}") from None
    found: list[Request] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        wanted = limit is None or len(found) < limit
        try:
            request = _request(line, number, path.parent, wanted)
            if request.id in seen:
                raise MllmEfficientError(f"the id {request.id!r} stands on line {seen[request.id]} too")
        except MllmEfficientError as error:
            raise MllmEfficientError(f"{path} line {number}: {error}") from None
        seen[request.id] = number
        found += [request] if wanted else []
    if not found:
        raise MllmEfficientError(f"--data: {path} holds no request")
    return found


def _request(line: str, number: int, folder: Path, read: bool) -> Request:
    """A line's request. read: whether its images are opened, or only looked for."""
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise MllmEfficientError(f"not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise MllmEfficientError(f"not a JSON object with {', '.join(KEYS)}")
    for key in entry:
        if key not in KEYS:
            raise MllmEfficientError(f"unknown key {key!r}{did_you_mean(key, KEYS)} (a request has {', '.join(KEYS)})")
    prompt, messages, images = entry.get("prompt"), entry.get("messages"), entry.get("images") or []
    if not isinstance(images, list) or not all(isinstance(i, str) and i for i in images):
        raise MllmEfficientError("images must be a list of paths")
    if (prompt is None) == (messages is None):
        raise MllmEfficientError("neither prompt nor messages" if prompt is None else "both prompt and messages: give one of them")
    if prompt is not None and (not isinstance(prompt, str) or not prompt.strip()):
        raise MllmEfficientError("prompt must be a text")
    chat = None if messages is None else tuple(_messages(messages, len(images)))
    named = entry.get("id", f"line {number}")
    if isinstance(named, bool) or not isinstance(named, (str, int)) or named == "":
        raise MllmEfficientError("id must be a text or a whole number")
    paths, answers = tuple(folder / i for i in images), tuple(_answers(entry.get("answer")))
    digest = hashlib.sha256(json.dumps([prompt, chat, answers]).encode())
    for path in paths:
        if read:
            load_image(path)
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        elif not path.is_file():
            raise MllmEfficientError(f"no image file {path}")
    return Request(str(named), number, paths, prompt, chat, answers, digest.hexdigest()[:16])


def _answers(given: Any) -> Iterator[str]:
    """``answer`` is a text or a number, or a list of those, any of which is right."""
    if given is None:
        return
    for one in given if isinstance(given, list) and given else [given]:
        if isinstance(one, bool) or not isinstance(one, (str, int, float)) or not str(one).strip():
            raise MllmEfficientError("answer must be a text or a number, or a list of them")
        yield str(one)


def _messages(given: Any, images: int) -> Iterator[dict[str, Any]]:
    """Messages as chat templates take them, each content a list of parts. Without image parts the images come first."""
    if not isinstance(given, list) or not given:
        raise MllmEfficientError('messages must be a list such as [{"role": "user", "content": "..."}]')
    messages = [_message(m) for m in given]
    if messages[-1]["role"] != "user":
        raise MllmEfficientError("the last message must be the user's")
    there = sum(part["type"] == "image" for m in messages for part in m["content"])
    if not there and images:
        first = next(m for m in messages if m["role"] == "user")
        first["content"] = [*[{"type": "image"}] * images, *first["content"]]
    elif there != images:
        raise MllmEfficientError(f"messages have {there} image(s), and images lists {images}")
    yield from messages


def _message(given: Any) -> dict[str, Any]:
    if not isinstance(given, dict) or given.get("role") not in ROLES or "content" not in given:
        raise MllmEfficientError(f"each message must have a role ({', '.join(ROLES)}) and content")
    content = [{"type": "text", "text": given["content"]}] if isinstance(given["content"], str) else given["content"]
    if not isinstance(content, list):
        raise MllmEfficientError("the content of a message must be a text or a list of parts")
    parts: list[dict[str, Any]] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind == "image" and set(part) == {"type"}:
            parts.append({"type": "image"})
        else:
            raise MllmEfficientError('a part must be {"type": "text", "text": "..."} or {"type": "image"}, whose files images lists')
    return {"role": given["role"], "content": parts}


def prompts_of(requests: Sequence[Request], loaded: Loaded, path: Path) -> list[str]:
    """Each request in the model's chat template. Raises naming the line where its images and placeholders do not fit."""
    out = []
    for request in requests:
        try:
            out.append(_prompt(request, loaded))
        except MllmEfficientError as error:
            raise MllmEfficientError(f"{path} line {request.line}: {error}") from None
    return out


def _prompt(request: Request, loaded: Loaded) -> str:
    if request.messages is None:
        return loaded.prompt(request.prompt or "", len(request.images))
    return loaded.conversation(request.messages, len(request.images))
