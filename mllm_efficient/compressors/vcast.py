"""V-CAST: more tokens where a video turns, of every frame those that stand out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..lazy import torch
from ..registry import register
from ..tokens import VisualTokens
from .math.cosine import parts_of
from .math.finite import require_finite
from .over_frames import OverFrames, columns_of, first_of, frames_of, of_rows, wide

if TYPE_CHECKING:
    from torch import Tensor

TEMPERATURE = 0.7
EPSILON = 1e-6
STEPS = 2.0**20  # shares of the budget are taken to this, so that rounding decides no token


@register("vcast")
@dataclass(frozen=True, kw_only=True)
class VCast(OverFrames):
    """Budgets by the curvature of the video's path through feature space, tokens by distance from their frame's mean and by length.

    Source: V-CAST (arXiv 2603.27650) and its code. Rule: a frame is the mean of its tokens at length 1, its curvature 1 minus the cosine
    between the step that leads to it and the step that leads away, 1 for the first and the last. Every frame has one token; the softmax of
    curvature / 0.7 shares out the others, rounded down and at most the frame, and what is left then goes to the frame with the largest
    remainder, when that is full to the next, as in the code. Of each frame the tokens stay with the largest sum of 1 minus the cosine to
    the frame's mean and of their length, brought to 0 to 1 in the frame. Features of later layers (deepstack) follow their tokens.
    A still image is one frame (the code leaves it whole).
    Scores are compared in float32; ties go to the lowest index, the first frame. NaN or infinity raises. O(N D), in float64 where the
    device has it; no host synchronisation.
    """

    paper: ClassVar[str] = "arXiv 2603.27650"

    def select(self, v: VisualTokens, k: int) -> Tensor:  # type: ignore[override]
        frames, each = frames_of(v, self.name)
        require_finite(v.features, self.name, "visual tokens")
        x = v.features.detach()
        means = torch.cat([wide(x[:, part]).view(frames, each, -1).mean(1) for part in columns_of(x)], 1)
        means = means / torch.linalg.vector_norm(means, dim=1, keepdim=True).clamp(min=EPSILON)
        counts = shared_out(curvature(means), k, each)
        length, like = (means.new_empty(len(v)) for _ in range(2))
        for part in parts_of(x):
            rows = wide(x[part])
            length[part] = torch.linalg.vector_norm(rows, dim=1)
            like[part] = cosine(rows, of_rows(means, part, len(v), each))
        length = length.view(frames, each)
        low, high = length.aminmax(dim=1, keepdim=True)
        score = 1 - like.view(frames, each) + (length - low) / (high - low + EPSILON)
        return first_of(score.float(), counts).flatten().to(torch.uint8).sort(descending=True, stable=True).indices[:k]


def curvature(means: Tensor) -> Tensor:
    """(T,) of the path through means (T, D)."""
    ends = means.new_ones(1)
    if len(means) < 2:
        return ends
    step = means.diff(dim=0)
    return torch.cat([ends, 1 - cosine(step[:-1], step[1:]), ends])


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Of the last axis; lengths below 1e-6 count as that."""
    of_a, of_b = (torch.linalg.vector_norm(part, dim=-1).clamp(min=EPSILON) for part in (a, b))
    found: Tensor = (a * b).sum(-1) / (of_a * of_b)
    return found


def shared_out(curves: Tensor, k: int, each: int) -> Tensor:
    """(T,) how many of k tokens each frame of ``each`` has, by its curvature (T,); k in all."""
    frames = len(curves)
    least = 1 if k >= frames else 0
    raw = ((curves / TEMPERATURE).softmax(0) * (k - least * frames) * STEPS).round() / STEPS
    given = raw.floor().clamp(max=each - least)
    room = each - least - given
    order = (raw - raw.floor()).masked_fill(room == 0, -1).sort(descending=True, stable=True).indices
    room = room[order]
    left = k - least * frames - given.sum()
    more = (left - (room.cumsum(0) - room)).clamp(min=0).minimum(room)
    return given.index_add(0, order, more) + least
