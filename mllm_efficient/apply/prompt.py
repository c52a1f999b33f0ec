"""Which columns of a prompt are left after compression, and how a later call on the same cache is mapped to them.

Trap: transformers raises nothing for a cache of one length and ids or a mask of another; it gives wrong tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import CountMismatchError

CACHE_ATTRIBUTE = "_visual_layout"
SEGMENTS_ATTRIBUTE = "_visual_segments"  # what in-decoder methods leave on a cache
UNCOMPRESSED_CACHE = (
    "new images on a cache that was not compressed: start with an empty cache, which PEFT's prefix tuning never does (LoRA does)"
)
IGNORE = -100  # the label that enters no loss


@dataclass(frozen=True)
class Layout:
    """Which columns of a full prompt are in the reduced one. Sits on the cache object between calls.

    ids: (B, L) the full prompt. keep: (B, L) bool, False exactly where a visual token went, or text of its image with it. columns:
    (B, R) the full column of each reduced column. mask: (B, R) 1 where a reduced column is not padding. images: (B,) images of each
    row. positions: "renumber" or "keep". following: (B,) the position of the next token of each row, where positions
    are not simply counted on (kept positions, M-RoPE). axes: rows of positions on M-RoPE models, else 0; text_row: whether
    the model takes one more in front, the places in the prompt. All on the CPU.
    """

    ids: Tensor
    keep: Tensor
    columns: Tensor
    mask: Tensor
    images: Tensor
    positions: str
    following: Tensor | None = None
    axes: int = 0
    text_row: bool = True

    @property
    def mrope(self) -> bool:
        return bool(self.axes)

    def grown(self, ids: Tensor, mask: Tensor | None, length: int) -> Layout:
        """The layout with the columns that a cache of ``length`` got since: they stay as they are in the cache."""
        n = length - self.reduced_length
        start, stop = self.full_length, self.full_length + n
        more = torch.arange(start, stop).expand(len(self.ids), n)
        new = torch.ones_like(more) if mask is None else mask[:, start:stop].cpu().long()
        return replace(
            self,
            ids=ids[:, :stop].cpu(),
            keep=torch.cat([self.keep, torch.ones_like(more, dtype=torch.bool)], 1),
            columns=torch.cat([self.columns, more], 1),
            mask=torch.cat([self.mask, new], 1),
            following=None if self.following is None else self.following + new.sum(1),
        )

    def repeated(self, times: int) -> Layout:
        """The layout of a cache in which every row stands ``times`` times."""
        parts = {name: getattr(self, name) for name in ("ids", "keep", "columns", "mask", "images", "following")}
        return replace(self, **{name: part.repeat_interleave(times, 0) for name, part in parts.items() if part is not None})

    def positions_of(self, mask: Tensor, new: int) -> Tensor | None:
        """Explicit positions, (B, new) or (4, B, new), of the last ``new`` columns of a reduced mask; None to count on."""
        if self.following is None:
            return None
        since = mask[:, self.reduced_length :].long().cumsum(1)
        places = (self.following.to(mask.device)[:, None] + since - 1)[:, -new:]
        if not self.mrope:
            return places
        places = places.expand(self.axes, *places.shape)
        return with_text_row(places, mask) if self.text_row else places

    @property
    def full_length(self) -> int:
        return self.ids.shape[1]

    @property
    def reduced_length(self) -> int:
        return self.columns.shape[1]

    @property
    def removed(self) -> int:
        """Columns by which the reduced prompt is shorter."""
        return self.full_length - self.reduced_length


def with_text_row(places: Tensor, mask: Tensor) -> Tensor:
    """Positions (4, B, n) out of (3, B, n): in front the places in the prompt, from which the causal mask is made."""
    text = (mask.long().cumsum(1) - 1).clamp(min=0)[:, mask.shape[1] - places.shape[2] :]
    return torch.cat([text[None].to(places), places])


class EncoderOutputs(dict[str, Any]):
    """``mm_encoder_outputs`` that remembers the layout it belongs to, what is to be done inside the decoder, and its report."""

    layout: Layout | None = None
    staging: Any = None
    planned: Any = None
    full: Any = None  # ``outputs.Full`` where logits of the prompt's own length are asked for


def require(ok: bool, message: str) -> None:
    """Raises ``CountMismatchError`` unless ``ok``."""
    if not ok:
        raise CountMismatchError(message)


TYPES = ("mm_token_type_ids", "token_type_ids")  # (B, L), which columns are of images
PER_COLUMN = ("attention_mask", "labels", *TYPES)  # (B, L), with the prompt


def types_with_text(call: dict[str, Any], length: int) -> dict[str, Tensor]:
    """What of ``call`` says which columns are of images, as long as a prompt of ``length`` columns that goes on with text."""
    found = {name: call[name] for name in TYPES if call.get(name) is not None}
    return {name: torch.cat([t, t.new_zeros(len(t), length - t.shape[1])], 1) for name, t in found.items()}


def require_short(kwargs: dict[str, Any]) -> None:
    """Raises ``CountMismatchError`` for a shortened prompt beside which a tensor of the full prompt's length is given.

    Some models take such a tensor without a word and give other logits.
    """
    layout, ids = getattr(kwargs.get("mm_encoder_outputs"), "layout", None), kwargs.get("input_ids")
    if layout is None or ids is None or ids.shape[1] != layout.reduced_length:
        return
    for name in PER_COLUMN:
        given = kwargs.get(name)
        if isinstance(given, Tensor) and given.ndim == 2 and given.shape[1] != ids.shape[1]:
            raise CountMismatchError(
                f"{name} {tuple(given.shape)} is not of the shortened prompt, which has {ids.shape[1]} columns: take all of model_kwargs"
            )


def lay_out(ids: Tensor, mask: Tensor, keep: Tensor, past: Layout | None, images: Tensor, positions: str) -> Layout:
    """Repacks the kept, unmasked columns, padded on the side the prompt is padded on.

    With an earlier turn its reduced columns stay as they are in the cache, and only the new columns are repacked.
    """
    start = past.full_length if past else 0
    stays = (keep & mask)[:, start:]
    right = bool(mask.shape[1]) and not bool(mask[:, -1].all())
    length = int(stays.sum(1).max()) if stays.numel() else 0
    order = stays.to(torch.uint8).argsort(dim=1, descending=right, stable=True)
    columns = order[:, :length] if right else order[:, order.shape[1] - length :]
    valid = stays.gather(1, columns)
    columns = columns + start
    if past is not None:
        columns, valid = torch.cat([past.columns, columns], 1), torch.cat([past.mask.bool(), valid], 1)
    return Layout(ids, keep, columns, valid.long(), images, positions)


def take_columns(layout: Layout, input_ids: Tensor, attention_mask: Tensor, rest: dict[str, Any], pad_id: int) -> dict[str, Any]:
    """Every (B, L) tensor of a call at the layout's columns; padding is ``pad_id``, 0 or, for labels, -100."""
    columns, valid = layout.columns.to(input_ids.device), layout.mask.to(input_ids.device).bool()
    out = dict(rest)
    out["input_ids"] = torch.where(valid, input_ids.gather(1, columns), pad_id)
    out["attention_mask"] = valid.to(attention_mask.dtype)
    if rest.get("labels") is not None:
        labels = rest["labels"]
        at, ok = columns.to(labels.device), valid.to(labels.device)
        shorter = torch.where(ok, labels.gather(1, at), IGNORE)
        # The first real token after left padding would be predicted from padding.
        after_pad = ok & ~torch.cat([torch.ones_like(ok[:, :1]), ok[:, :-1]], 1)
        out["labels"] = torch.where(after_pad, IGNORE, shorter)
    for name in TYPES:
        if rest.get(name) is not None:
            out[name] = torch.where(valid, rest[name].gather(1, columns), 0)
    return out


def leave_on(cache: Any, layout: Layout | None) -> None:
    if layout is not None and hasattr(cache, "get_seq_length"):
        setattr(cache, CACHE_ATTRIBUTE, layout)


def layout_on(cache: Any) -> Layout | None:
    """The layout of a cache that holds something; an emptied cache has none."""
    layout: Layout | None = getattr(cache, CACHE_ATTRIBUTE, None)
    if layout is None or int(cache.get_seq_length()) == 0:
        return None
    if int(cache.get_seq_length()) < layout.reduced_length:
        raise CountMismatchError("the cache was cut inside its compressed prompt: start with an empty cache")
    return layout


def holds_uncompressed(cache: Any) -> bool:
    """Whether a cache holds a prompt that was not compressed."""
    return cache is not None and layout_on(cache) is None and int(cache.get_seq_length()) > 0


def continue_forward(layout: Layout, cache: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A later ``forward`` on a compressed cache: masks and ids of full length lose the removed columns.

    ``input_ids`` may be the new tokens or the whole conversation. Any length that is neither the full nor the reduced
    one raises: the wrong one would give wrong tokens without an error.
    """
    kwargs = dict(kwargs)
    ids, mask, seen = kwargs.get("input_ids"), kwargs.get("attention_mask"), int(cache.get_seq_length())
    if ids is None:
        raise CountMismatchError("a compressed cache goes on with input_ids alone: pass them instead of inputs_embeds")
    if kwargs.get("position_ids") is not None:
        raise CountMismatchError("position_ids cannot be given on a compressed cache: use positions='keep'")
    full_seen = seen + layout.removed
    if ids.shape[1] >= layout.full_length and torch.equal(ids[:, : layout.full_length].cpu(), layout.ids):  # the whole conversation
        if ids.shape[1] <= full_seen:
            raise CountMismatchError(f"{ids.shape[1]} input_ids on a cache of {full_seen} tokens: this turn adds none")
        ids = kwargs["input_ids"] = ids[:, full_seen:]
    total = seen + ids.shape[1]
    if mask is not None and (mask.ndim != 2 or mask.shape[1] not in (total, total + layout.removed)):
        raise CountMismatchError(
            f"attention_mask {tuple(mask.shape)} fits neither the {total + layout.removed} tokens of the full "
            f"conversation nor the {total} of the compressed one"
        )
    if mask is None or mask.shape[1] != total:
        prompt = layout.mask.to(ids.device)
        new = prompt.new_ones(ids.shape[0], total - layout.reduced_length) if mask is None else mask[:, layout.full_length :]
        mask = kwargs["attention_mask"] = torch.cat([prompt.to(new.dtype), new.to(ids.device)], 1)
    positions = layout.positions_of(mask, ids.shape[1])
    return kwargs if positions is None else {**kwargs, "position_ids": positions}
