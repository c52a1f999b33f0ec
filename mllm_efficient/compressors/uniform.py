"""Evenly spaced tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..lazy import torch
from ..registry import register
from ..tokens import VisualTokens
from .base import Selector

if TYPE_CHECKING:
    from torch import Tensor


@register("uniform")
@dataclass(frozen=True, kw_only=True)
class Uniform(Selector):
    """Token floor((i + 0.5) * N / K) in raster order for i = 0..K-1. O(K)."""

    def select(self, v: VisualTokens, k: int) -> Tensor:  # type: ignore[override]
        return (2 * torch.arange(k, device=v.features.device) + 1) * len(v) // (2 * k)
