"""The model as lmms-eval sees it, a chat adapter: ``--model mllm_efficient --model_args pretrained=M,method=divprune,keep=0.1``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms

from mllm_efficient.errors import MllmEfficientError
from mllm_efficient.loading.models import BUILTIN, ModelOptions, load
from mllm_efficient.loading.processor import processor_settings
from mllm_efficient.media.images import converting, to_rgb
from mllm_efficient.registry import build

from .asking import FORMATS, MAX_NEW_TOKENS, RAISE, RECORD, Answer, Asker, Content, Request
from .cache import AnswerCache
from .model import ModelAsker

PADDING_ONLY = "__padding_only__"  # lmms-eval's mark on requests that only make ranks equally long


@dataclass
class Counts(TokenCounts):
    """What the log of a sample holds besides lmms-eval's own counts."""

    extra: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), **self.extra}


class ChatModel(lmms):
    """An adapter around anything that answers ``Request``s. It survives ``clean``, so one loaded model serves a whole sweep."""

    is_simple = False

    def __init__(self, asker: Asker, device: Any = "cpu") -> None:
        super().__init__()
        import torch

        self.asker, self.device = asker, torch.device(device)
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        real = [r for r in requests if PADDING_ONLY not in (r.metadata or {})]
        with self.asker.installed() if isinstance(self.asker, ModelAsker) else contextlib.nullcontext():
            answers = iter(self.asker.ask([self._request(r) for r in real]))
        return [_result(next(answers)) if PADDING_ONLY not in (r.metadata or {}) else "" for r in requests]

    def _request(self, instance: Any) -> Request:
        _, messages_of, settings, doc_id, task, split = instance.args

        def content() -> Content:
            with converting(self.asker.image_range):
                messages = messages_of(self.task_dict[task][split][doc_id])
            return content_of(messages, f"{task}/{doc_id}", self.asker.image_range)

        return Request(f"{task}/{doc_id}", dict(settings or {}), content)

    def loglikelihood(self, requests: Sequence[Any]) -> Any:
        raise MllmEfficientError("tasks that ask for likelihoods are not run: take one that generates its answers")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> Any:
        raise MllmEfficientError("tasks of several rounds are not run: take one that asks one question")

    def clean(self) -> None:
        """lmms-eval would take the model away after every evaluation."""


class MllmEfficient(ChatModel):
    """What ``python -m lmms_eval --model mllm_efficient`` loads.

    Args:
        pretrained: folder or hub id of the model; "builtin" is the embedded one.
        method: name of a method, whose settings follow as keys of their own (``method=divprune,keep=0.1``), or a YAML file,
            which may compose several. Without it the model runs uncompressed.
        batch_size, device, dtype, device_map, attn_implementation, quantization, revision, trust_remote_code: as the
            commands of this package take them. A process of several takes the GPU of its local rank.
        adapter, min_pixels, max_pixels, processor_kwargs: as the commands take them, the last several of them joined by ";".
        image_padding, image_range, prompt_format: see ``ModelAsker``. max_new_tokens: where a task names none.
        on_error: "raise" (the default here) or "record". cache: a folder for answers.
        settings: of the method.
    """

    def __init__(
        self, pretrained: str = BUILTIN, method: str = "none", batch_size: Any = 1, device: str | None = None, dtype: str = "auto",
        device_map: str | None = None, attn_implementation: str | None = None, quantization: str | None = None,
        revision: str | None = None, trust_remote_code: bool = False, image_padding: str | None = None,
        prompt_format: str = FORMATS[0], max_new_tokens: int = MAX_NEW_TOKENS, on_error: str = RAISE, cache: str | None = None,
        max_batch_size: Any = None, adapter: str | None = None, min_pixels: int | None = None, max_pixels: int | None = None,
        processor_kwargs: str | None = None, image_range: str = "full", **settings: Any,
    ) -> None:  # fmt: skip
        if on_error not in (RAISE, RECORD):
            raise MllmEfficientError(f"on_error {on_error!r} is not one of {RAISE}, {RECORD}")
        if method.endswith((".yaml", ".yml")) and settings:
            raise MllmEfficientError(f"{', '.join(settings)} beside {method}: put the settings into the file")
        built = build(method if not settings else {"method": method, **settings})
        options = ModelOptions(
            str(pretrained), rank_device(device if device_map is None else None), dtype, device_map, attn_implementation, quantization,
            revision, trust_remote_code=trust_remote_code, adapter=adapter,
            processor_kwargs=processor_settings(min_pixels, max_pixels, processor_kwargs.split(";") if processor_kwargs else ()),
        )  # fmt: skip
        loaded = load(options)
        for line in loaded.notes:
            _warn(line)
        asker = ModelAsker(
            whole(batch_size), int(max_new_tokens), on_error, AnswerCache(Path(cache)) if cache else None,
            loaded=loaded, method=built, image_padding=image_padding, prompt_format=prompt_format, image_range=image_range,
        )  # fmt: skip
        super().__init__(asker, loaded.device)
        asker.say = _warn
        self._bar = bar_of(asker)

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        with self._bar(len(requests), self.rank):
            out = super().generate_until(requests)
        failed = [a for a in out if getattr(getattr(a, "token_counts", None), "extra", {}).get("error")]
        if failed:  # lmms-eval's own exit code will not say so
            _warn(
                f"{len(failed)} of {len(requests)} answers failed, and count as wrong; the first: {failed[0].token_counts.extra['error']}"
            )
        return out


def whole(batch_size: Any) -> int:
    """lmms-eval's ``--batch_size``, which is a string. Raises for "auto"."""
    if not str(batch_size).isdigit() or int(batch_size) < 1:
        raise MllmEfficientError(f"batch size {batch_size!r} is not a whole number above 0")
    return int(batch_size)


def rank_device(asked: str | None) -> str:
    """The device of this process: ``auto``, or with several processes and GPUs the one of its local rank."""
    import torch

    if asked in (None, "auto", "cuda") and int(os.environ.get("WORLD_SIZE", 1)) > 1 and torch.cuda.is_available():
        return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    return asked or "auto"


def content_of(messages: Sequence[dict[str, Any]], name: str, image_range: str = "full") -> Content:
    """lmms-eval's messages, with the pictures taken out. name: of the sample, for methods that draw.

    Raises ``MllmEfficientError`` for anything but text and images.
    """
    pictures, keys = list[Any](), list[str]()
    out = list[dict[str, Any]]()
    for message in messages:
        content = [{"type": "text", "text": message["content"]}] if isinstance(message["content"], str) else message["content"]
        parts: list[dict[str, Any]] = []
        for part in content:
            if part["type"] == "text":
                parts.append({"type": "text", "text": part["text"]})
            elif part["type"] == "image" and not isinstance(part["url"], str):
                pictures.append(to_rgb(part["url"], image_range))
                keys.append(part.get("key") or f"{name}/{len(keys)}")
                parts.append({"type": "image"})
            else:
                raise MllmEfficientError(f"the task holds a part of type {part['type']}: texts and images are what this adapter asks")
        out.append({"role": message["role"], "content": parts})
    return Content(out, pictures, keys)


def _result(answer: Answer) -> Any:
    counts = {k: v for k, v in answer.counts().items() if k not in ("prompt_tokens", "output_tokens")}
    return GenerationResult(answer.text, Counts(input_tokens=answer.prompt_tokens, output_tokens=answer.output_tokens, extra=counts))


def bar_of(asker: Asker) -> Any:
    """A context with a progress bar on the first rank."""
    from tqdm import tqdm

    @contextlib.contextmanager
    def bar(total: int, rank: int) -> Any:
        with tqdm(total=total, unit="answer", mininterval=1, disable=rank != 0 or None) as shown:
            asker.progress = shown.update
            yield

    return bar


def _warn(text: str) -> None:
    import sys

    print(text, file=sys.stderr, flush=True)
