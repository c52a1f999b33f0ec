"""SCOPE: saliency times what a token adds to the coverage of all the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..errors import BadBudgetError
from ..lazy import torch
from ..registry import register
from ..tokens import VisualTokens
from ._cosine import cosines, finite
from .base import Selector

if TYPE_CHECKING:
    from torch import Tensor


@register("scope")
@dataclass(frozen=True, kw_only=True)
class Scope(Selector):
    """Greedy coverage, weighted by attention.

    Source: SCOPE (NeurIPS 2025, arXiv 2510.24214). Rule: the cover of a token is the largest cosine that it has to a chosen one,
    0 before any is; one token v after the other with the largest sum over all u of max(0, cos(u, v) - cover(u)), times
    attention(v)^alpha. Attention is the class token's.
    alpha: how much saliency counts; 0 is coverage alone, 1 what the released code does unasked. Cosines
    are of the projected tokens.
    Where nothing adds anything any more, and between ties, the lowest index is next. NaN or infinity
    raises. O(N^2 D + K N^2), no host synchronisation in the picks.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    paper: ClassVar[str] = "arXiv 2510.24214"

    alpha: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)) or not 0 <= self.alpha < float("inf"):
            raise BadBudgetError(f"scope: alpha={self.alpha!r} is not a number of at least 0")

    def flops(self, n: int, d: int, k: int) -> int:
        """The cosines of all tokens."""
        return 2 * n * n * d

    def select(self, v: VisualTokens, k: int) -> Tensor:  # type: ignore[override]
        assert v.attention is not None
        x = finite(v.features, self.name, "visual tokens")
        alike = cosines(x, x)
        attention = finite(v.attention, self.name, "attentions")
        full = torch.float32 if attention.device.type == "mps" else torch.float64
        saliency = (attention.to(full) ** self.alpha).float().to(alike.dtype)  # the last bits of a power differ with where it stands
        picked = torch.empty(k, dtype=torch.long, device=x.device)
        taken = torch.zeros(len(v), dtype=torch.bool, device=x.device)
        cover = alike.new_zeros(len(v), 1)
        for i in range(k):
            gain = (alike - cover).clamp_(min=0).sum(0) * saliency
            j = gain.masked_fill(taken, float("-inf")).argmax().view(1)
            picked[i : i + 1] = j
            taken.index_fill_(0, j, True)
            cover = torch.maximum(cover, alike.index_select(1, j))
        return picked
