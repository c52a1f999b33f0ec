"""Requests of a benchmark in batches of alike ones, out of the cache where it holds them, with their failures.

Nothing here knows lmms-eval (``adapter.py`` and ``run.py`` do) or who answers: ``model.py``, a model here, or ``server.py``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from mllm_efficient.errors import MllmEfficientError

from .cache import AnswerCache

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

MAX_NEW_TOKENS = 64  # where a task names none; lmms-eval's own adapters take up to 1024
NOT_OURS = ("image_aspect_ratio",)  # generation settings that tasks hold for other adapters
OF_SAMPLING = ("temperature", "top_p", "top_k")
PADDINGS = ("pad", "crop")
FORMATS = ("template", "llava_v1")
RAISE, RECORD = "raise", "record"


class SampleError(MllmEfficientError):
    """A request that could not be answered, named."""


@dataclass(frozen=True)
class Content:
    """What is asked. messages: roles and parts, ``{"type": "image"}`` where a picture stands. pictures: RGB, in prompt order.

    keys: of each picture, for methods that draw.
    """

    messages: list[dict[str, Any]]
    pictures: list[Picture]
    keys: list[str]


@dataclass(frozen=True)
class Request:
    """One sample of a task. id: ``"pope/12"``. settings: of generation, as the task has them. content: reads the sample."""

    id: str
    settings: dict[str, Any]
    content: Callable[[], Content]


@dataclass(frozen=True)
class Answer:
    """A request's answer. error: why there is none (text is then empty).

    visual_tokens_full, visual_tokens_kept, tokens_per_layer: summed over its images; prompt_tokens: of the language model's
    prompt after compression, prompt_tokens_full: before. latency_s: wall time of its batch, of ``batch`` requests, with the
    processor and the tower. Counts are None where they are not known. picture: a digest of the pixels asked about. confidence: the
    geometric mean of the probabilities of the answer's tokens.
    """

    text: str
    error: str | None = None
    visual_tokens_full: int | None = None
    visual_tokens_kept: int | None = None
    tokens_per_layer: list[int] | None = None
    prompt_tokens: int | None = None
    prompt_tokens_full: int | None = None
    output_tokens: int | None = None
    latency_s: float | None = None
    batch: int = 1
    cached: bool = False
    picture: str | None = None
    confidence: float | None = None

    def counts(self) -> dict[str, Any]:
        """What a sample's log holds of it."""
        return {k: v for k, v in asdict(self).items() if k != "text" and v is not None and v is not False}


@dataclass
class Asker:
    """Answers requests in batches of alike ones, out of the cache where it holds them; a subclass says how a batch is answered.

    on_error: "raise" stops at the first request that fails; "record" answers it with nothing and says why. A batch that
    fails as a whole is asked again one by one, which ``say`` is told. progress: called with the number answered. image_range: of
    pictures of more than 8 bits.
    """

    batch_size: int = 1
    max_new_tokens: int = MAX_NEW_TOKENS
    on_error: str = RAISE
    cache: AnswerCache | None = None
    progress: Callable[[int], Any] = lambda n: None
    say: Callable[[str], Any] = lambda text: None
    image_range: str = "full"

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that an answer depends on besides its request; part of the cache's key."""
        raise TypeError(f"{type(self).__name__} must define settings")

    @property
    def identity(self) -> Any:
        """What makes one arm another one than the next."""
        raise TypeError(f"{type(self).__name__} must define identity")

    def prompt(self, content: Content) -> Any:
        """The prompt as it is sent; part of the cache's key. Raises ``MllmEfficientError`` for what cannot be asked."""
        raise TypeError(f"{type(self).__name__} must define prompt")

    def answers(self, batch: Sequence[tuple[Content, Any]], settings: dict[str, Any]) -> list[Answer]:
        """Answers to contents and their prompts, all with pictures or all without."""
        raise TypeError(f"{type(self).__name__} must define answers")

    def ask(self, requests: Sequence[Request]) -> list[Answer]:
        """The answer to each request, in their order."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.settings, sort_keys=True, default=str), []).append(i)
        out: list[Answer | None] = [None] * len(requests)
        for members in groups.values():
            for low in range(0, len(members), self.batch_size):
                chunk = members[low : low + self.batch_size]
                for i, answer in self._chunk([(i, requests[i]) for i in chunk]):
                    out[i] = answer
                self.progress(len(chunk))
        return [a for a in out if a is not None]

    def _chunk(self, chunk: Sequence[tuple[int, Request]]) -> Iterator[tuple[int, Answer]]:
        """Answers to requests of the same settings, with their places."""
        settings = self.sensible(chunk[0][1].settings)
        alike: dict[bool, list[tuple[int, Request, Content, Any, str]]] = {}
        pictured: dict[int, str | None] = {}
        for i, request in chunk:
            try:
                content = request.content()
                pixels = [hashlib.sha256(f"{p.mode}{p.size}".encode() + p.tobytes()).hexdigest() for p in content.pictures]
                pictured[i] = hashlib.sha256("".join(pixels).encode()).hexdigest()[:16] if pixels else None
                prompt = self.prompt(content)
            except Exception as error:
                yield i, replace(self._failed(request, error), picture=pictured.get(i))
                continue
            cache = None if settings["do_sample"] else self.cache  # another draw is another answer
            key = "" if cache is None else self._key(content, pixels, prompt, settings)
            known = None if cache is None else cache.get(key)
            if known is not None:
                yield i, replace(Answer(**known), cached=True, picture=pictured[i])
            else:
                alike.setdefault(bool(content.pictures), []).append((i, request, content, prompt, key))
        for group in alike.values():
            found = self._asked([(r, c, p) for _, r, c, p, _ in group], settings)
            if self.cache is not None:
                self.cache.put({key: asdict(a) for (*_, key), a in zip(group, found) if key and a.error is None})
            yield from ((i, replace(answer, picture=pictured[i])) for (i, *_), answer in zip(group, found))

    def _asked(self, group: Sequence[tuple[Request, Content, Any]], settings: dict[str, Any]) -> list[Answer]:
        try:
            return self.answers([(content, prompt) for _, content, prompt in group], settings)
        except Exception as error:
            if len(group) == 1:
                return [self._failed(group[0][0], error)]
            reason = f"{type(error).__name__}: {error}"
        # outside the handler, so that the failed batch's tensors are free when its requests are tried
        self.say(f"a batch of {len(group)} from {group[0][0].id} failed ({line(reason)}): asking one by one")
        return [answer for one in group for answer in self._asked([one], settings)]

    def _failed(self, request: Request, error: Exception) -> Answer:
        reason = str(error) if isinstance(error, MllmEfficientError) else f"{type(error).__name__}: {error}"
        if self.on_error == RAISE:
            raise SampleError(f"{request.id}: {line(reason)}") from error
        return Answer("", line(reason))

    def _key(self, content: Content, pixels: Sequence[str], prompt: Any, settings: dict[str, Any]) -> str:
        whole = [self.settings, self.batch_size, settings, prompt, pixels, content.keys]
        return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()

    def sensible(self, given: dict[str, Any]) -> dict[str, Any]:
        """A task's generation settings as ``generate`` takes them: greedy unless a temperature says otherwise."""
        out = {k: v for k, v in given.items() if k not in NOT_OURS and v is not None}
        until = out.pop("until", None) or []
        out["until"] = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        out["max_new_tokens"] = int(out.get("max_new_tokens") or self.max_new_tokens)
        out["do_sample"] = bool(out.get("do_sample", (out.get("temperature") or 0) > 0))
        if not out["do_sample"]:
            out = {k: v for k, v in out.items() if k not in OF_SAMPLING}
        return out


def before(text: str, stops: Sequence[str]) -> str:
    """A text up to the first of some stop strings, without space around it."""
    for stop in stops:
        text = text.split(stop, 1)[0] if stop else text
    return text.strip()


def line(text: str) -> str:
    """A reason in one line, without addresses of memory."""
    return " ".join(re.sub(r" at 0x[0-9a-f]+", "", text).split())[:500]
