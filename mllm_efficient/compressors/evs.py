"""EVS: what changed since the frame before."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ..budget import Budget
from ..lazy import torch
from ..plans import Plan
from ..registry import register
from ..tokens import VisualTokens
from .math.cosine import finite, steps, unit
from .over_frames import OverFrames, frames_of

if TYPE_CHECKING:
    from torch import Tensor

    from ..family import Family


@register("evs")
@dataclass(frozen=True, kw_only=True)
class EVS(OverFrames):
    """The first frame of a video whole, and of the others the tokens that are least like the one at their place before.

    Source: EVS (arXiv 2510.14624), and vLLM's ``--video-pruning-method evs``, whose counts these are: the kept fraction of the video's
    tokens, rounded down, and at least the first frame (of 1,000 tokens, ``prune=0.8`` leaves 199). Rule: 1 minus the cosine to the token at
    the same row and column of the previous frame; the K largest of the whole video stay. A frame like the one before it keeps nothing.
    A still image is one frame and stays whole; models that take no videos are refused.
    Cosines are compared to 2^-18 (2^-30 in float64); ties go to the lowest index. NaN or infinity raises. O(N D).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"frame"})
    paper: ClassVar[str] = "arXiv 2510.14624"

    @property
    def budget(self) -> Budget:
        return replace(super().budget, down=True)

    def least(self, frames: int, each: int) -> int:
        return each

    def plan(self, adapter: Family, item: Any) -> Plan:
        return self.untouched_plan(item.shape) if item.shape.modality != "video" else super().plan(adapter, item)

    def score(self, v: VisualTokens) -> Tensor:
        frames, each = frames_of(v, self.name)
        x = unit(finite(v.features, self.name, "visual tokens")).view(frames, each, -1)
        fine = steps(x.dtype)
        changed = 1 - (x[1:] * x[:-1]).sum(-1).mul(fine).round().div(fine)
        whole = changed.new_full((1, each), 3)  # more than any
        return torch.cat([whole, changed]).flatten()
