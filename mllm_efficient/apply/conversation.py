"""What an image may know of the others in its prompt: the one before it that looks alike, and how many turns ago it came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .locate import PlacedImage, locate


def items_of(adapter: Any, inputs: dict[str, Any]) -> list[Any]:
    """The images and videos of a call, as ``in_conversation`` has them where the call has its prompt."""
    items, ids = adapter.items(inputs), inputs.get("input_ids")
    if len(items) < 2 or ids is None:
        return list(items)
    placed = in_conversation(locate(ids.cpu(), adapter.placeholders, items), ids.cpu(), ends_of(adapter.model))
    return [image.item for image in sorted(placed, key=lambda image: image.index)]


def in_conversation(placed: Sequence[PlacedImage], ids: Tensor, ends: Sequence[int]) -> list[PlacedImage]:
    """The same images, in prompt order, each of which knows ``before`` and ``age``.

    ids: (B, L) of the prompts. ends: tokens that end a turn. before: the last image of the same shape before it in its row, if any. age:
    in how many later turns of its row there are images.
    """
    turns = torch.isin(ids, torch.tensor(ends, dtype=ids.dtype)).cumsum(1)
    turn_of = [int(turns[image.row, image.columns[0]]) for image in placed]
    out = list[PlacedImage]()
    for i, image in enumerate(placed):
        alike = [o.item for o in placed[:i] if o.row == image.row and o.item.shape == image.item.shape and o.item.shape.modality == "image"]
        later = {turn for o, turn in zip(placed, turn_of) if o.row == image.row and turn > turn_of[i]}
        out.append(replace(image, item=replace(image.item, before=alike[-1] if alike else None, age=len(later))))
    return out


def ends_of(model: Any) -> list[int]:
    """The tokens that end a turn: those that end an answer of ``generate``."""
    out = set[int]()
    for config in (getattr(model, "generation_config", None), model.config.get_text_config()):
        found = getattr(config, "eos_token_id", None)
        out |= set() if found is None else {found} if isinstance(found, int) else set(found)
    return sorted(out)
