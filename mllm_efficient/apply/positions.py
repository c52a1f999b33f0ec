"""Explicit positions of a shortened prompt: kept places on 1-D RoPE, and everything on M-RoPE.

On M-RoPE three rows of positions come from the model's own rule. Kept tokens keep the positions they have in the full
prompt ("keep"); otherwise ("renumber") selected tokens count on as text does, and merged ones stand like a smaller
image of their grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .compress import CompressedImage
from .locate import PlacedImage, read_as
from .plan import Plan
from .prompt import Layout, require, with_text_row

KnownImage = tuple[PlacedImage, Plan, CompressedImage | None]


def place(
    adapter: Any,
    layout: Layout,
    ids: Tensor,
    mask: Tensor,
    short_ids: Tensor,
    short_mask: Tensor,
    past: Layout | None,
    images: Sequence[KnownImage],
) -> tuple[Layout, Tensor | None]:
    """The layout with the position that follows it, and positions (B, R) or (4, B, R); None where they simply count on.

    ids, mask: (B, L), the full prompt. short_ids, short_mask: (B, R), the reduced one.
    """
    valid, columns = short_mask.bool(), layout.columns.to(ids.device)
    if not adapter.mrope:
        if layout.positions != "keep":
            return layout, None
        full = (mask.long().cumsum(1) - 1).clamp(min=0)
        return replace(layout, following=mask.long().sum(1).cpu()), torch.where(valid, full.gather(1, columns), 0)
    keeps = layout.positions == "keep"
    start, before = (past.full_length, past.reduced_length) if past else (0, 0)
    new_ids, new_mask = (ids[:, start:], mask[:, start:]) if keeps else (short_ids[:, before:], valid[:, before:])
    places, following = native(adapter, new_ids, new_mask, images, layout.positions)
    if past is not None:
        assert past.following is not None
        offset = past.following.to(ids.device)
        places, following = places + offset[:, None], following + offset
    if keeps:
        places = places.gather(2, (columns[:, before:] - start).expand(len(places), -1, -1))
    places = torch.where(valid[:, before:], places, 0)
    places = torch.cat([places.new_zeros(len(places), len(ids), before), places], 2)  # those in the cache are not read again
    layout = replace(layout, following=following.cpu(), axes=len(places), text_row=adapter.text_row)
    return layout, with_text_row(places, valid) if adapter.text_row else places


def native(adapter: Any, ids: Tensor, mask: Tensor, images: Sequence[KnownImage], rule: str) -> tuple[Tensor, Tensor]:
    """The model's positions (3, B, L) of a prompt, and of one more text token after each row (B,)."""
    types, grids, seconds = _kinds(adapter, ids.cpu(), images, rule)
    one = torch.ones_like(ids[:, :1])
    longer = (torch.cat([t, end.to(t)], 1) for t, end in ((ids, 0 * one), (mask.long(), one), (types.to(ids.device), 0 * one)))
    items = [image.item for image, _, _ in sorted(images, key=lambda known: known[0].index)]
    places = adapter.rope(*longer, grids, seconds, items)
    return places[..., :-1], places[0, :, -1]


def _kinds(adapter: Any, ids: Tensor, images: Sequence[KnownImage], rule: str) -> tuple[Tensor, dict[str, list[Any]], list[Any]]:
    """(B, L) the kind of each column, the (t, h, w) of each item that is a grid, and the seconds of each video's frames."""
    types = torch.zeros_like(ids)
    here = read_as(adapter.placeholders, {image.item.shape.modality for image, _, _ in images})
    for kind, modality in enumerate(adapter.placeholders, start=1):
        if modality in here:
            types[ids == here[modality]] = kind
    grids: dict[str, list[Any]] = {modality: [] for modality in adapter.placeholders}
    seconds = list[Any]()
    for image, p, done in sorted(images, key=lambda known: known[0].index):
        whole = rule == "keep" or p.untouched or done is None  # as the call has it: a model of crops of several sizes is told them
        planes = p.shape.planes if whole or done is None else done.kept_planes
        if planes is None:  # selected tokens, which count on as text does
            types[image.row, _columns(ids, image, images)] = 0
            continue
        same = len({(plane.rows, plane.columns) for plane in planes}) == 1
        require(same or whole, "tokens merged to no grid have no place in M-RoPE: use a method that selects, or one that pools")
        grids[p.shape.modality].append((len(planes), planes[0].rows, planes[0].columns))
        if "second_per_grid_ts" in image.item.arguments:
            seconds.append(image.item.arguments["second_per_grid_ts"])
    return types, grids, seconds


def _columns(ids: Tensor, wanted: PlacedImage, images: Sequence[KnownImage]) -> Tensor:
    """Reduced columns of an item: its row's placeholders of its kind, after those of the items before it."""
    before = 0
    for image, _, done in images:
        assert done is not None
        length = int(done.keep.sum())
        if image is wanted:
            return (ids[wanted.row] == wanted.token).nonzero()[before : before + length, 0]
        before += length if (image.row, image.token) == (wanted.row, wanted.token) else 0
    raise AssertionError("the item is not among the images")
