"""VidCom2: the least usual tokens of each frame, more of them from frames that are least like the rest of the video."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from ..budget import Budget
from ..lazy import torch
from ..registry import register
from ..tokens import VisualTokens
from .math.cosine import parts_of
from .math.finite import require_finite
from .over_frames import OverFrames, columns_of, first_of, frames_of, of_rows, wide

if TYPE_CHECKING:
    from torch import Tensor

WIDTHS = tuple(2.0**power for power in range(-3, 2))  # of the Gaussians
TEMPERATURE = 0.01


@register("vidcom2")
@dataclass(frozen=True, kw_only=True)
class VidCom2(OverFrames):
    """Gaussian likeness to the centre of the video and to that of the frame; the least like stay.

    Source: VidCom2 (EMNLP 2025, arXiv 2505.14454), and vLLM's ``--video-pruning-method vidcom2``, whose counts these are: the kept fraction
    of the video's tokens, rounded down, and at least one a frame. Rule: tokens at length 1 in the half of the channels that vary least over
    the video; likeness is the sum of exp(-d^2 / 2a) over a = 1/8 to 2, d the distance to a centre, the mean of the video's tokens or of the
    frame's. A frame's share is the kept fraction times 1 + p - mean(p), at most 1, p the softmax at temperature 0.01 over frames of minus
    the mean likeness to the video; of each frame its share stays, rounded, at least one: those of the smallest sum of both likenesses.
    Where these are more than K the largest sums of all go, where fewer the smallest of the others are added.
    A still image is one frame.
    Sums are compared in float32; ties go to the lowest index, of channels too. NaN or infinity raises. O(N D), in float64 where the device
    has it; no host synchronisation.
    """

    paper: ClassVar[str] = "arXiv 2505.14454"

    @property
    def budget(self) -> Budget:
        return replace(super().budget, down=True)

    def select(self, v: VisualTokens, k: int) -> Tensor:  # type: ignore[override]
        frames, each = frames_of(v, self.name)
        require_finite(v.features, self.name, "visual tokens")
        x = calm_half(v.features.detach())
        to_video = likeness(x, x.mean(0, keepdim=True), len(v)).view(frames, each)
        to_frame = likeness(x, x.view(frames, each, -1).mean(1), each).view(frames, each)
        share = self.fraction or k / len(v)
        p = (to_video.mean(1) / -TEMPERATURE).softmax(0)
        counts = (share * (1 + p - p.mean())).clamp(max=1).mul(each).round().clamp(1, each)
        unlike = -(to_video + to_frame).float()
        apart = first_of(unlike, counts).flatten()
        order = unlike.flatten().sort(descending=True, stable=True).indices
        return order[apart[order].to(torch.uint8).sort(descending=True, stable=True).indices[:k]]


def calm_half(x: Tensor) -> Tensor:
    """(N, D / 2) the channels of rows x (N, D) that vary least, each row at length 1; made part by part, the only wide copy."""
    spread = torch.cat([wide(x[:, part]).var(0, unbiased=False) for part in columns_of(x)])
    calm = spread.float().sort(stable=True).indices[: max(1, x.shape[1] // 2)]
    out = x.new_empty(len(x), len(calm), dtype=spread.dtype)
    for part in parts_of(out):
        rows = wide(x[part].index_select(1, calm))
        torch.div(rows, torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp(min=1e-12), out=out[part])
    return out


def likeness(x: Tensor, centres: Tensor, each: int) -> Tensor:
    """(N,) sums of Gaussians of x (N, D), each of them around the centre (N / each, D) of its rows."""
    total = x.new_zeros(len(x))
    for part in parts_of(x):
        squared = (x[part] - of_rows(centres, part, len(x), each)).square().sum(-1)
        for width in WIDTHS:
            total[part] += (squared / (-2 * width)).exp()
    return total
