"""What a caller hands to ``generate`` to look at its sequences sees them as long as the caller's own prompt makes them."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

MERGE = "_merge_criteria_processor_list"  # where stock ``generate`` puts a caller's processors and criteria among its own
_shown: contextvars.ContextVar[tuple[Any, Tensor, int] | None] = contextvars.ContextVar("shown", default=None)


def with_prompt(sequences: Tensor, ids: Tensor, reduced_length: int) -> Tensor:
    """The original prompt in front of the new tokens, because callers slice by its length."""
    times = sequences.shape[0] // ids.shape[0]
    prompt = ids.repeat_interleave(times, 0).to(sequences.device)
    return torch.cat([prompt, sequences[:, reduced_length:]], 1)


class OriginalPrompt:
    """Passes a stream on, with the original prompt in place of the reduced one that ``generate`` sends first."""

    def __init__(self, streamer: Any, ids: Tensor):
        self.streamer = streamer
        self.ids: Tensor | None = ids

    def put(self, value: Tensor) -> None:
        if self.ids is not None:
            value, self.ids = self.ids.cpu(), None
        self.streamer.put(value)

    def end(self) -> None:
        self.streamer.end()


def allowed_after_prompt(function: Callable[..., Any], ids: Tensor, reduced_length: int, each: int) -> Callable[..., Any]:
    """A caller's ``prefix_allowed_tokens_fn``. each: rows of the batch that a prompt has, beams not counted."""

    def allowed(row: int, sequence: Tensor) -> Any:
        return function(row, with_prompt(sequence[None], ids[row // each][None], reduced_length)[0])

    return allowed


@contextlib.contextmanager
def shown_the_prompt(model: Any, ids: Tensor, reduced_length: int) -> Iterator[None]:
    """In the block the caller's logits processors and stopping criteria of a ``generate`` of ``model`` see the original prompt."""
    token = _shown.set((model, ids, reduced_length))
    try:
        yield
    finally:
        _shown.reset(token)


def merged_as_shown(model: Any, merged: Any, given: Any) -> Any:
    """The list that stock ``generate`` made of its own processors or criteria and of those given, with the given ones wrapped.

    They are not wrapped before: by their exact type stock lets one that is given take the place of its own.
    """
    shown = _shown.get()
    if shown is None or shown[0] is not model:
        return merged
    wanted = {id(one) for one in given}
    return type(merged)(_SeesOriginalPrompt(one, *shown[1:]) if id(one) in wanted else one for one in merged)


class _SeesOriginalPrompt:
    """A caller's logits processor or stopping criterion."""

    def __init__(self, inner: Any, ids: Tensor, reduced_length: int):
        self.inner, self.ids, self.reduced_length = inner, ids, reduced_length

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:  # two arguments: stock looks at how many a processor takes
        return self.inner(with_prompt(input_ids, self.ids, self.reduced_length), scores)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)
