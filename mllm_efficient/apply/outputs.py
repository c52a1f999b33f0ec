"""What a wrapped ``forward`` gives back: which columns of the prompt its logits belong to, and logits at the prompt's own length.

Callers who hold ids, labels or masks of the full prompt beside a shortened output find those of the output's length on it, or
ask for logits of the prompt's length. There every column that went says what the column before it says, as inside the decoder
a token that went does: the token after an image is predicted by the last visual token that is left, wherever that stood.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CountMismatchError, MllmEfficientError
from ..report import remember
from .active import active_on
from .encode import has_pixels
from .generate import within_generate
from .in_llm import report_of
from .prepare import Prepared
from .prompt import IGNORE, Layout, leave_on

LENGTHS = ("short", "full")


@dataclass
class Reading:
    """What a trainer does around the calls of a step. full: it sets logits beside the labels it holds. labels: (B, L) of the step."""

    full: bool
    labels: Tensor | None = None


_reading: contextvars.ContextVar[Reading | None] = contextvars.ContextVar("reading", default=None)


@dataclass(frozen=True)
class Full:
    """Logits of the full prompt's length. source: (B, K) the logits of the shortened prompt that each column gets; K of the
    L columns are asked for, those at ``columns`` (K,)."""

    source: Tensor
    columns: Tensor


def check_length(logits: str) -> None:
    """Raises for anything but ``"short"`` and ``"full"``."""
    if logits not in LENGTHS:
        raise MllmEfficientError(f"logits={logits!r}: the length of a wrapped model's logits is 'short' or 'full'")


@contextlib.contextmanager
def reading(full: bool) -> Iterator[None]:
    """While it is open, a trainer runs a step: with ``full`` logits have the prompt's length."""
    token = _reading.set(Reading(full))
    try:
        yield
    finally:
        _reading.reset(token)


def holds(labels: Tensor | None) -> None:
    """Says which labels (B, L) belong to the next call of the trainer that is reading, if one is."""
    now = _reading.get()
    if now is not None:
        now.labels = labels


def held_back(call: dict[str, Any]) -> dict[str, Tensor]:
    """The labels that a trainer did not pass to a call of its step, because it computes the loss itself; empty if it did.

    Methods that read the question see by them where the answer begins.
    """
    now, ids = _reading.get(), call.get("input_ids")
    if now is None or now.labels is None or call.get("labels") is not None or ids is None or now.labels.shape != ids.shape:
        return {}
    return {"labels": now.labels}


def call_of(prepared: Prepared, logits: str) -> dict[str, Any]:
    """The arguments of a prepared ``forward``, with what ``mark_output`` has to know of the length that was asked for.

    Raises:
        CountMismatchError: ``logits_to_keep`` counts columns of a prompt that is shorter than the caller thinks.
    """
    call, layout = prepared.model_kwargs, prepared.layout
    encoded, keep = call.get("mm_encoder_outputs"), call.get("logits_to_keep", 0)
    if layout is None or encoded is None:
        return call
    now = _reading.get()
    every = keep is None or (not torch.is_tensor(keep) and keep == 0)
    if logits == "full" or (now is not None and now.full):
        columns = torch.arange(layout.full_length)
        columns = columns if every else columns[keep.cpu() if torch.is_tensor(keep) else slice(-keep, None)]
        source = sources(layout)[:, columns]
        first = 0 if every or not source.numel() else int(source.min())
        encoded.full = Full(source - first, columns)
        if first:
            call["logits_to_keep"] = layout.reduced_length - first
        elif not every:
            call["logits_to_keep"] = 0
    elif not every and not _same_end(layout, keep):
        raise CountMismatchError(
            "logits_to_keep names columns of the full prompt, which are others in the compressed one: "
            "leave it out, or wrap(model, ..., logits='full')"
        )
    return call


def sources(layout: Layout) -> Tensor:
    """(B, L) for each column of the full prompt the one of the shortened prompt that is the last at or before it."""
    stays = _stays(layout)
    start = layout.mask.argmax(1, keepdim=True)
    return start + (stays.long().cumsum(1) - 1).clamp(min=0)


def _stays(layout: Layout) -> Tensor:
    """(B, L) bool, the columns of the full prompt that are in the shortened one."""
    stays = torch.zeros_like(layout.keep)
    rows, at = layout.mask.bool().nonzero().T
    stays[rows, layout.columns[rows, at]] = True
    return stays


def _same_end(layout: Layout, keep: Any) -> bool:
    """Whether the last ``keep`` logits of the shortened prompt are those of the full prompt's last columns."""
    if torch.is_tensor(keep) or keep > layout.reduced_length:
        return False
    end = torch.arange(layout.reduced_length - keep, layout.reduced_length).expand(len(layout.ids), -1)
    read = _stays(layout)[:, -keep:] | ~layout.keep[:, -keep:]  # nobody reads padding
    return torch.equal(sources(layout)[:, -keep:][read], end[read])


@torch.compiler.disable(reason="compression chooses by values")
def mark_output(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """The forward hook: puts on the output which columns it belongs to, and the layout on the cache."""
    active = active_on(model)
    if within_generate(model) or active is None or active.here(model) is None:
        return None
    encoded = kwargs.get("mm_encoder_outputs")
    layout, staging, full = (getattr(encoded, name, None) for name in ("layout", "staging", "full"))
    if encoded is not None and staging is not None:
        remember(model, report_of(staging, encoded.planned))
    if layout is not None:
        for part in output if isinstance(output, tuple) else output.values():
            leave_on(part, layout)
    if isinstance(output, tuple):
        return None if full is None else _tuple_at_full_length(output, full, kwargs.get("labels") is not None)
    if layout is None and not has_pixels(kwargs) and staging is None:
        return None
    _mark(output, layout, full, kwargs)
    return None


def _mark(output: Any, layout: Layout | None, full: Full | None, kwargs: dict[str, Any]) -> None:
    """``visual_keep_mask`` (B, L), and ids, labels and mask of the logits' length."""
    ids, labels, mask = kwargs["input_ids"], kwargs.get("labels"), kwargs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    keep: Any = kwargs.get("logits_to_keep", 0)
    columns: Any = None
    if layout is not None and not hasattr(output, "logits"):  # a fused head's values, one for each label
        _scatter_fields(output, layout)
        ids, labels, mask = at_full_length(layout, ids, labels, mask)
    elif layout is not None and full is not None:
        if output.logits is not None:
            output.logits = _gathered(output.logits, full)
        ids, labels, mask = at_full_length(layout, ids, labels, mask)
        columns = full.columns.to(ids.device)
    elif torch.is_tensor(keep) or keep:
        columns = keep if torch.is_tensor(keep) else slice(-keep, None)
    if columns is not None:
        ids, mask, labels = ids[:, columns], mask[:, columns], None if labels is None else labels[:, columns]
    kept = torch.ones_like(kwargs["input_ids"], dtype=torch.bool) if layout is None else layout.keep
    logits = getattr(output, "logits", None)
    output.visual_keep_mask = kept.to(ids.device if logits is None else logits.device)
    output.visual_input_ids, output.visual_labels, output.visual_attention_mask = ids, labels, mask


def at_full_length(layout: Layout, ids: Tensor, labels: Tensor | None, mask: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Ids, labels and mask (B, L) of the full prompt out of those (B, R) of the shortened one; columns that went are masked."""
    rows, at = layout.mask.bool().nonzero().T
    columns = layout.columns[rows, at]
    wide = None if labels is None else labels.new_full(layout.ids.shape, IGNORE)
    if wide is not None and labels is not None:
        predicted = at > 0  # nothing predicts the first column of the shortened prompt, wherever it stands in the full one
        wide[rows[predicted], columns[predicted]] = labels[rows[predicted], at[predicted]]
    seen = mask.new_zeros(layout.ids.shape)
    seen[rows, columns] = 1
    return layout.ids.to(ids.device), wide, seen


def _gathered(logits: Tensor, full: Full) -> Tensor:
    """Logits (B, K, V) at the columns asked for out of those (B, R, V) of the shortened prompt."""
    rows = torch.arange(len(logits), device=logits.device)[:, None]
    return logits[rows, full.source.to(logits.device)]


def _tuple_at_full_length(output: tuple[Any, ...], full: Full, labelled: bool) -> tuple[Any, ...]:
    at = int(labelled)  # after the loss
    return (*output[:at], _gathered(output[at], full), *output[at + 1 :])


def _scatter_fields(output: Any, layout: Layout) -> None:
    """Values (B, R - 1) of labels 1 to R - 1 of the shortened prompt become (B, L - 1) of the full one's, 0 where a label went."""
    rows, at = layout.mask[:, 1:].bool().nonzero().T
    before = layout.columns[rows, at + 1] - 1
    for name, values in list(output.items()):
        if torch.is_tensor(values) and values.shape == (len(layout.ids), layout.reduced_length - 1):
            wide = values.new_zeros(len(layout.ids), layout.full_length - 1)
            wide[rows, before] = values[rows, at]
            output[name] = wide
