"""The second question of a conversation, asked on the cache of the first with the visual tokens that were chosen for that one.

A method that looks at the question chooses well for the first and may have thrown away what the second needs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mllm_efficient.apply import wrap as wrapper
from mllm_efficient.apply.original_prompt import with_prompt
from mllm_efficient.apply.prepare import Prepared
from mllm_efficient.apply.prompt import leave_on, types_with_text
from mllm_efficient.apply.signatures import cache_of, with_cache
from mllm_efficient.compressors.base import Compressor
from mllm_efficient.errors import MllmEfficientError
from mllm_efficient.loading.models import Loaded
from mllm_efficient.loading.prompts import rendered
from mllm_efficient.measure.native import Asked

from .builtin.suites import AnyQuestion, AnySample
from .harness import endings

AFTER = "/after/"  # between the names of the two questions
ANSWER = "yes"  # stands for the first answer while a conversation is put in the chat template


@dataclass(frozen=True)
class FollowUp:
    """A question that is asked after another one about the same image."""

    first: AnySample
    second: AnySample

    @property
    def id(self) -> str:
        return f"{self.second.id}{AFTER}{self.first.task}"

    @property
    def image(self) -> Any:
        return self.second.image

    @property
    def task(self) -> str:
        return self.second.task

    @property
    def question(self) -> AnyQuestion:
        return self.second.question

    def sizes(self, size: int) -> list[tuple[int, int]]:
        return self.second.sizes(size)

    def region(self, planes: Sequence[Any], number: int = 0) -> Any:
        return self.second.region(planes, number)


def follow_ups(samples: Sequence[AnySample]) -> list[FollowUp]:
    """Every question once as the second one, after the question before it about its image (the first after the last).

    An image with a single question has none.
    """
    by_image: dict[Any, list[AnySample]] = {}
    for sample in samples:
        by_image.setdefault(sample.image, []).append(sample)
    return [FollowUp(group[i - 1], s) for group in by_image.values() if len(group) > 1 for i, s in enumerate(group)]


class Asks(Protocol):
    """What a conversation needs of an evaluation (``runner.Run``): how questions are asked there, and what was made for them."""

    loaded: Loaded

    def seen_under(self, method: Compressor, batch: Sequence[Any]) -> Asked: ...
    def inputs(self, batch: Sequence[AnySample], images: bool, method: Compressor | None = None) -> dict[str, Any]: ...
    def prepared(self, method: Compressor, batch: Sequence[AnySample], inputs: dict[str, Any]) -> Prepared: ...
    def generate(self, call: dict[str, Any], **how: Any) -> Any: ...
    def decoded(self, ids: Tensor) -> list[str]: ...
    def worded(self, sample: AnySample | FollowUp) -> str: ...


def converse(
    run: Asks, method: Compressor | None, batch: Sequence[FollowUp], watched: Any = None
) -> tuple[list[str], Tensor, Prepared | None]:
    """First answers, the (B, T) tokens of the second ones, and what was done to the images in the first turn.

    method: None leaves the image out. watched: a logits processor of the second turn.
    """
    model, images = run.loaded.model, method is not None
    asked = run.inputs([f.first for f in batch], images=images, method=method)
    prompt = asked["input_ids"]
    with wrapper.compressed(model, run.seen_under(method, batch).method) if method is not None else contextlib.nullcontext():
        prepared = run.prepared(method, [f.first for f in batch], asked) if method is not None else None
        layout = prepared.layout if prepared is not None else None
        if prepared is None or (layout is None and prepared.staging is None):
            first = run.generate(asked, return_dict_in_generate=True)  # the model's own call, which remembers M-RoPE positions
            said = first.sequences
        elif layout is None:  # tokens go inside the decoder
            first = run.generate(prepared.model_kwargs, return_dict_in_generate=True)
            said = first.sequences
        else:
            first = run.generate(prepared.model_kwargs, return_dict_in_generate=True)
            said = with_prompt(first.sequences, prompt, layout.reduced_length)
            leave_on(cache_of(first), layout)
        answers = said[:, prompt.shape[1] :]
        shown = [{"image": len(f.first.keys)} if not f.first.video else {"video": 1} for f in batch]
        turns = [
            next_turn(run.loaded, run.worded(f.first), run.worded(f.second), **(count if images else {})) for f, count in zip(batch, shown)
        ]
        added, new = padded(turns, prompt)
        ids = torch.cat([said, added], 1)
        call = {"input_ids": ids, "attention_mask": torch.cat([asked["attention_mask"], spoken(answers, endings(model)), new], 1)}
        call |= types_with_text(asked, ids.shape[1])
        more = {} if watched is None else {"logits_processor": [watched]}
        second = run.generate(call, **with_cache(model, cache_of(first)), **more)
    return run.decoded(answers), second[:, ids.shape[1] :], prepared


def spoken(answers: Tensor, ends: set[int]) -> Tensor:
    """(B, T) 1 for the words of an answer, 0 from its end on: the next turn brings the end that the chat template writes."""
    ended = torch.isin(answers, torch.tensor(sorted(ends), dtype=answers.dtype, device=answers.device))
    return (ended.cumsum(1) == 0).long()


def padded(turns: Sequence[list[int]], like: Tensor) -> tuple[Tensor, Tensor]:
    """Token lists of different lengths as (B, T) ids, padded on the left, and their mask."""
    longest = max(map(len, turns))
    ids = torch.tensor([[0] * (longest - len(t)) + t for t in turns], dtype=like.dtype, device=like.device)
    mask = torch.tensor([[0] * (longest - len(t)) + [1] * len(t) for t in turns], device=like.device)
    return ids, mask


def next_turn(loaded: Loaded, first: str, second: str, image: int = 0, video: int = 0) -> list[int]:
    """The tokens between the first answer and the second: the end of the answer, the second question, the way to its answer.

    image, video: how many stand in front of the first question.
    """
    processor = loaded.processor
    tokenizer = processor.tokenizer
    question, again = ({"type": "text", "text": t} for t in (first, second))
    shown = [{"type": kind} for kind in ["image"] * image + ["video"] * video]
    messages = [
        {"role": "user", "content": [*shown, question]},
        {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
        {"role": "user", "content": [again]},
    ]
    text = rendered(processor, messages, name=loaded.options.model)
    behind = text.find(ANSWER, text.find(first) + len(first))
    if first not in text or behind < 0 or second not in text[behind:]:
        raise MllmEfficientError("this model's chat template does not hold a conversation of two questions: leave --turns out")
    text = text[behind + len(ANSWER) :]
    # after a word, because some tokenizers treat the beginning of a text in their own way
    word = tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
    whole = tokenizer(ANSWER + text, add_special_tokens=False)["input_ids"]
    return whole[len(word) :] if whole[: len(word)] == word else tokenizer(text, add_special_tokens=False)["input_ids"]
