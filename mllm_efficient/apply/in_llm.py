"""In-decoder methods on a call: where its visual tokens stand, what each stage leaves, and what is reported."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..compressors.reducer import Reducer, spread_out
from ..errors import CountMismatchError
from ..report import CompressionReport
from ..tokens import Grid, Plane, counts_of, grids_of
from .compress import CompressedImage, places_in
from .locate import PlacedImage
from .plan import Plan
from .prompt import IGNORE, Layout

if TYPE_CHECKING:
    from ..patches.decoder.staging import Staging


@dataclass(frozen=True)
class PromptImage:
    """The visual tokens of an image in the prompt that the decoder gets. columns: (n,), separators: (S,) of ``row``.

    places: (n, 3) plane, row and column of each. origin: (n,) its number among the N of the image, or among merged ones.
    grids: (rows, columns) of the rectangles that the tokens fill, None where they fill none. held: (n,) how many tokens each holds, None
    for one each. marks: (M,) columns of the text between them, which stays, but is none of the question's.
    """

    row: int
    columns: Tensor
    separators: Tensor
    places: Tensor
    origin: Tensor
    grids: tuple[Grid, ...] | None = None
    held: Tensor | None = None
    marks: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))


def whole_image(image: PlacedImage, p: Plan) -> PromptImage:
    """An image all of whose tokens are in the prompt."""
    columns, slots, planes = image.columns.cpu(), p.shape.token_slots, p.shape.planes
    is_separator = torch.ones(len(columns), dtype=torch.bool)
    is_separator[slots] = False
    places, origin = places_of(planes), torch.arange(p.shape.n)
    return PromptImage(image.row, columns[slots], columns[is_separator], places, origin, grids_of(planes), marks=image.marked())


def shortened_image(layout: Layout, image: PlacedImage, p: Plan, done: CompressedImage) -> PromptImage:
    """What a method before the decoder left of an image, in the prompt that is left."""
    valid = layout.mask[image.row].bool()
    short = torch.full((layout.full_length,), -1)
    short[layout.columns[image.row, valid]] = torch.arange(layout.reduced_length)[valid]
    kept = done.keep.nonzero()[:, 0]
    is_token = torch.zeros(len(kept), dtype=torch.bool)
    if done.indices is not None:
        is_token[torch.isin(kept, p.shape.token_slots)] = True
        planes, origin = p.shape.planes, done.indices  # as they stand, which order="picked" shuffles
    else:
        planes = done.kept_planes or ()
        origin = torch.arange(sum(len(plane) for plane in planes)) if done.of_merged is None else done.of_merged
        is_token[p.after.token_slots if p.after is not None and p.separators else torch.arange(len(origin))] = True
    columns, grids = short[image.columns.cpu()[kept]], grids_of(planes)
    filled = grids if len(origin) == sum(rows * columns for rows, columns in grids) else None
    held = None if done.groups is None else counts_of(done.groups, len(origin))
    places, marks = places_of(planes)[origin], short[image.marked(done.has_left())]
    return PromptImage(image.row, columns[is_token], columns[~is_token], places, origin, filled, held, marks)


def staging_of(
    method: Reducer,
    positions: str,
    mask: Tensor,
    images: Sequence[PromptImage],
    adapter: Any,
    ids: Tensor,
    labels: Tensor | None = None,
    keys: Sequence[int | str] | None = None,
) -> Staging:
    """What the decoder is to do with a batch of prompts.

    mask: (B, P) bool on the CPU; ids: (B, P). labels: (B, P), of which the first after the last image is where the answer
    begins; without them the whole prompt is the instruction. keys: one per image, for methods that draw; default its number in
    its row.
    """
    from ..patches.decoder.staging import StagedImage, Staging

    depth, staged_images, numbers = adapter.decoder_layers, list[StagedImage](), [0] * len(mask)
    visual = torch.zeros_like(mask)
    for image in images:
        n = len(image.columns)
        places = torch.cat([torch.full((n, 1), numbers[image.row]), image.places], 1)
        counts = method.counts(n, depth, fixed=False, grids=image.grids)
        keeps, key = method.newline == "keep", numbers[image.row] if keys is None else keys[len(staged_images)]
        staged_images.append(
            StagedImage(
                image.row, image.columns, image.separators, places, counts, image.origin, keeps, image.grids, key, held=image.held
            )
        )  # fmt: skip
        visual[image.row, image.columns] = True
        visual[image.row, image.separators] = True
        visual[image.row, image.marks] = True
        numbers[image.row] += 1
    last = instruction_end(mask, visual, labels)
    upto = torch.arange(mask.shape[1])[None] <= last[:, None]
    text = tuple(row.nonzero()[:, 0] for row in mask & ~visual & upto)
    read = tuple(last[:, None]) if method.read_token is None else _marked(method, ids.cpu(), mask & upto, {i.row for i in images})
    return Staging(method, method.stages(depth), positions, mask, last, text, read, tuple(staged_images))


def _marked(method: Reducer, ids: Tensor, instruction: Tensor, rows: set[int]) -> tuple[Tensor, ...]:
    """Of each row the columns of the token that a method reads. Raises for one with images that has none."""
    found = tuple(row.nonzero()[:, 0] for row in (ids == method.read_token) & instruction)
    if not all(len(found[row]) for row in rows):
        raise CountMismatchError(f"{method.name} reads token {method.read_token}, and a prompt has none: append it to the question")
    return found


def places_of(planes: Sequence[Plane]) -> Tensor:
    """(N, 3) plane, row and column of each token of all planes."""
    parts = [
        torch.stack([torch.full((len(p),), i), *(torch.arange(len(p)) // p.columns, torch.arange(len(p)) % p.columns)], 1)
        for i, p in enumerate(planes)
        if len(p)
    ]
    return torch.cat(parts)


def instruction_end(mask: Tensor, visual: Tensor, labels: Tensor | None) -> Tensor:
    """(B,) the column of each instruction's last token: the last of the prompt, or the one before the first answer's."""
    columns = torch.arange(mask.shape[1]).expand_as(mask)
    last = torch.where(mask, columns, -1).amax(1)
    if labels is None:
        return last.clamp(min=0)
    after = columns > torch.where(visual, columns, -1).amax(1, keepdim=True)
    answer = torch.where(mask & after & (labels.cpu() != IGNORE), columns, mask.shape[1]).amin(1)
    return torch.minimum(last, answer - 1).clamp(min=0)


def _pooled_planes(planes: Sequence[Plane], grids: Sequence[Grid], kernels: Sequence[Grid | None]) -> tuple[Plane, ...]:
    """The planes with the grids that pooling left, over what is in them: what is left over at an edge was dropped."""
    high, wide = (math.prod(kernel[side] for kernel in kernels if kernel) for side in (0, 1))
    left, out = iter(grids), []
    for plane in planes:
        rows, columns = next(left) if len(plane) else (0, 0)
        top, start, bottom, end = plane.box
        if len(plane):
            bottom, end = top + (bottom - top) * rows * high / plane.rows, start + (end - start) * columns * wide / plane.columns
        out.append(replace(plane, rows=rows, columns=columns, row_tiles=(), column_tiles=(), box=(top, start, bottom, end), newline=False))
    return tuple(out)


def report_of(staging: Staging, before: CompressionReport) -> CompressionReport:
    """The report with the tokens that a forward left. Before one has run, as it was."""
    if not staging.outcome:
        return before
    left, decided, depth = staging.outcome["left"], staging.outcome["decided"], before.decoder_layers
    images = []
    for i, (image, entered) in enumerate(zip(before.images, staging.images)):
        per_layer = spread_out(len(entered.columns), staging.stages, [stage[i] for stage in left], depth)
        stayed = None if staging.method.merges else entered.origin[staging.outcome["indices"][i].cpu()]
        indices, of_merged = (stayed, None) if image.kept_planes is None else (None, stayed)
        was = image.indices if image.kept_planes is None else image.of_merged
        groups = None if image.groups is None or was is None or stayed is None else places_in(was[image.groups], stayed)
        kernels = tuple("x".join(map(str, stage.kernels[i] or (1, 1))) for stage in decided)
        planes = (
            _pooled_planes(image.kept_planes or image.planes, staging.outcome["grids"][i], [stage.kernels[i] for stage in decided])
            if decided
            else None
        )
        done = replace(
            image, kept=round(sum(per_layer) / depth), indices=indices, of_merged=of_merged, groups=groups, per_layer=per_layer,
            kernels=kernels,
        )  # fmt: skip
        images.append(done if planes is None else replace(done, kept_planes=planes))
    seconds = sum(watch.seconds() for watch in staging.outcome["watches"])
    return replace(before, images=tuple(images), compress_seconds=before.compress_seconds + seconds)
