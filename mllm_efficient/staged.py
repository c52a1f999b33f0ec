"""In-decoder methods (family L) on a call: where its visual tokens stand, what each stage leaves, and what is reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .compressors.reducer import Reducer, spread_out
from .layout import IGNORE
from .locate import Located
from .plan import Plan
from .report import CompressionReport
from .tokens import VisualShape

if TYPE_CHECKING:
    from .patches.passes import Staging


def staging_of(
    method: Reducer, positions: str, mask: Tensor, found: Sequence[Located], plans: Sequence[Plan], labels: Tensor | None = None
) -> Staging:
    """What the decoder is to do with a batch of prompts.

    mask: (B, P) bool on the CPU. labels: (B, P), of which the first behind the last image is where the answer begins; without
    them the whole prompt is the instruction.
    """
    from .patches.passes import StagedImage, Staging

    images, numbers = [], [0] * len(mask)
    visual = torch.zeros_like(mask)
    for f, p in zip(found, plans):
        slots, columns = p.shape.token_slots, f.columns.cpu()
        between = torch.ones(len(columns), dtype=torch.bool)
        between[slots] = False
        places = torch.cat([torch.full((p.shape.n, 1), numbers[f.row]), places_of(p.shape)], 1)
        counts = tuple(count for _, count in p.stages)
        images.append(StagedImage(f.row, columns[slots], columns[between], places, counts, method.newline == "keep"))
        visual[f.row, columns] = True
        numbers[f.row] += 1
    last = instruction_end(mask, visual, labels)
    upto = torch.arange(mask.shape[1])[None] <= last[:, None]
    text = tuple(row.nonzero()[:, 0] for row in mask & ~visual & upto)
    return Staging(method, tuple(layer for layer, _ in plans[0].stages), positions, mask, last, text, tuple(images))


def places_of(shape: VisualShape) -> Tensor:
    """(N, 3) plane, row and column of each token."""
    parts = [
        torch.stack([torch.full((len(p),), i), *(torch.arange(len(p)) // p.columns, torch.arange(len(p)) % p.columns)], 1)
        for i, p in enumerate(shape.planes)
        if len(p)
    ]
    return torch.cat(parts)


def instruction_end(mask: Tensor, visual: Tensor, labels: Tensor | None) -> Tensor:
    """(B,) the column of each instruction's last token: the last of the prompt, or the one before the first answer's."""
    columns = torch.arange(mask.shape[1]).expand_as(mask)
    last = torch.where(mask, columns, -1).amax(1)
    if labels is None:
        return last.clamp(min=0)
    behind = columns > torch.where(visual, columns, -1).amax(1, keepdim=True)
    answer = torch.where(mask & behind & (labels.cpu() != IGNORE), columns, mask.shape[1]).amin(1)
    return torch.minimum(last, answer - 1).clamp(min=0)


def targets(labels: Tensor, mask: Tensor, staging: Staging) -> Tensor:
    """Labels (B, P) without those of visual tokens, and of a row's first token where padding is in front of it."""
    out = labels.clone()
    for image in staging.images:
        for columns in (image.columns, image.separators):
            out[image.row, columns.to(out.device)] = IGNORE
    mask = mask.to(out.device)
    out[:, 1:][mask[:, 1:] & ~mask[:, :-1]] = IGNORE
    return out


def report_of(staging: Staging, before: CompressionReport) -> CompressionReport:
    """The report with the tokens that a forward left. Before one has run, as it was."""
    if not staging.outcome:
        return before
    left, depth = staging.outcome["left"], before.decoder_layers
    images = []
    for i, image in enumerate(before.images):
        per_layer = spread_out(image.full, staging.stages, [stage[i] for stage in left], depth)
        indices = None if staging.method.merges else staging.outcome["indices"][i].cpu()
        images.append(replace(image, kept=round(sum(per_layer) / depth), indices=indices, per_layer=per_layer))
    return replace(before, images=tuple(images), compress_seconds=staging.outcome["seconds"])
