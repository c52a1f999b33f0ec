"""A uniform K-subset: what any selection has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import BadSettingError
from ..lazy import torch
from ..registry import register
from ..tokens import VisualTokens
from .base import generator_for
from .selector import Selector

if TYPE_CHECKING:
    from torch import Tensor


@register("random")
@dataclass(frozen=True, kw_only=True)
class Random(Selector):
    """K tokens drawn without replacement from (seed, key of the image). O(N).

    The key is the image's index within its row, or a hash of the sample in evaluations, so that a batch never
    changes a result.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise BadSettingError(f"random: seed={self.seed!r} is not a whole number")

    def select(self, v: VisualTokens, k: int) -> Tensor:  # type: ignore[override]
        generator = v.generator or generator_for(self, 0)
        return torch.randperm(len(v), generator=generator)[:k].to(v.features.device)
