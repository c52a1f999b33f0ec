"""A user's own requests: one JSON object a line, with the paths of its images, its prompt or messages, perhaps its answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_efficient.errors import MllmEfficientError
from mllm_efficient.images import load_image

from .answers import normalised

KEYS = ("id", "images", "prompt", "messages", "answer")


@dataclass(frozen=True)
class Request:
    """One line. images: files, in prompt order. prompt or messages: exactly one of them. answer: what is right, if known."""

    id: str
    images: tuple[Path, ...] = ()
    prompt: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    answer: str | None = None

    @property
    def task(self) -> str:
        return "requests" if self.images else "text-only"

    def text(self, loaded: Any) -> str:
        """The request in the model's chat template."""
        if self.messages is None:
            assert self.prompt is not None
            return loaded.prompt(self.prompt, len(self.images))
        if not getattr(loaded.processor, "chat_template", None):
            raise MllmEfficientError(f"{loaded.options.model} has no chat template: give prompt instead of messages")
        return loaded.processor.apply_chat_template(list(self.messages), add_generation_prompt=True)


def read_requests(path: Path, limit: int | None = None) -> list[Request]:
    """The requests of a file, every line checked and every image opened before any model runs.

    Raises ``MllmEfficientError`` naming the line: no JSON object, unknown keys, neither or both of prompt and messages,
    an image that cannot be read, messages with another number of images, an id that stands twice.
    """
    if not path.is_file():
        raise MllmEfficientError(f"--data: no file {path}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MllmEfficientError(f"--data: {path} cannot be read: {error}") from None
    found: dict[str, Request] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            request = _request(line, number, path.parent)
            for image in request.images if limit is None or len(found) < limit else ():
                load_image(image)
        except MllmEfficientError as error:
            raise MllmEfficientError(f"{path} line {number}: {error}") from None
        if request.id in found:
            raise MllmEfficientError(f"{path} line {number}: the id {request.id!r} stands twice")
        found[request.id] = request
    if not found:
        raise MllmEfficientError(f"--data: {path} holds no request")
    return list(found.values())[:limit]


def _request(line: str, number: int, folder: Path) -> Request:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise MllmEfficientError(f"not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise MllmEfficientError("not a JSON object")
    unknown = sorted(set(entry) - set(KEYS))
    if unknown:
        raise MllmEfficientError(f"unknown key {unknown[0]!r} (it takes {', '.join(KEYS)})")
    images, prompt, messages, answer = (entry.get(k) for k in ("images", "prompt", "messages", "answer"))
    if images is None:
        images = []
    if not isinstance(images, list) or not all(isinstance(i, str) for i in images):
        raise MllmEfficientError("images must be a list of paths")
    if (prompt is None) == (messages is None):
        raise MllmEfficientError("give prompt or messages, one of them")
    if prompt is not None and (not isinstance(prompt, str) or not prompt.strip()):
        raise MllmEfficientError("prompt must be a text")
    if answer is not None and not isinstance(answer, (str, int, float)):
        raise MllmEfficientError("answer must be a text")
    if answer is not None and not normalised(str(answer)):
        raise MllmEfficientError(f"answer {answer!r} has no word or number in it")
    if messages is not None:
        messages = tuple(_messages(messages, len(images)))
    named = entry.get("id", number)
    if not isinstance(named, (str, int)):
        raise MllmEfficientError("id must be a text or a number")
    return Request(str(named), tuple(folder / i for i in images), prompt, messages, None if answer is None else str(answer))


def _messages(messages: Any, images: int) -> list[dict[str, Any]]:
    """Messages in the form of chat templates. Without an image in them, the images stand before the first user's text."""
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in messages):
        raise MllmEfficientError("messages must be a list of objects with role and content")
    out = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list) or not all(isinstance(part, dict) and "type" in part for part in content):
            raise MllmEfficientError("the content of a message must be a text or a list of objects with a type")
        out.append({"role": message["role"], "content": [{"type": "image"} if p["type"] == "image" else p for p in content]})
    there = sum(part["type"] == "image" for message in out for part in message["content"])
    if there == 0 and images:
        first = next((m for m in out if m["role"] == "user"), None)
        if first is None:
            raise MllmEfficientError("no message of a user takes the images")
        first["content"] = [*[{"type": "image"}] * images, *first["content"]]
    elif there != images:
        raise MllmEfficientError(f"messages hold {there} image(s) and images lists {images}")
    return out


def pictures(request: Request) -> Sequence[Any]:
    """The request's images as RGB pictures."""
    return [load_image(path) for path in request.images]
