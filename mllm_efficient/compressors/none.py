"""The uncompressed baseline as a method, so that every command can name it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import BadBudgetError
from ..lazy import torch
from ..registry import register
from ..tokens import VisualTokens
from .base import Selector

if TYPE_CHECKING:
    from torch import Tensor


@register("none")
@dataclass(frozen=True, kw_only=True)
class NoCompression(Selector):
    """All visual tokens, untouched: the baseline."""

    keep: float | None = 1.0

    def __post_init__(self):
        if (self.keep, self.tokens, self.prune, self.min_tokens, self.max_tokens) != (1.0, None, None, None, None):
            raise BadBudgetError("none keeps every token and takes no budget")
        if (self.per, self.newline) != ("image", None):
            raise BadBudgetError("none keeps every token and newline column: per= and newline= have no effect")
        super().__post_init__()

    def select(self, v: VisualTokens, k: int) -> Tensor:  # type: ignore[override]
        return torch.arange(k, device=v.features.device)
