"""PruMerge+: tokens that stand out by attention and evenly spaced ones, each merged with the pruned tokens around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import BadBudgetError
from ..lazy import torch
from ..registry import register
from ..tokens import CompressedTokens, VisualTokens
from ._cosine import cosines, finite
from .base import Merger


@register("prumerge_plus")
@dataclass(frozen=True, kw_only=True)
class PruMergePlus(Merger):
    """Attention's outliers and a uniform sample, merged by keys.

    Source: LLaVA-PruMerge (Shang et al., arXiv 2403.15388), its "+" variant. The paper keeps as many tokens as stand out of
    the class token's attention by the interquartile rule, adds a uniform sample, and merges each kept token with its nearest
    pruned ones by attention keys, weighted by attention. That count is the image's; here it is the budget's: the
    K - U tokens with the largest attention, then U evenly spaced ones of the rest in raster order.
    uniform: U / K, rounded; half is ours, the paper's split depends on the image. neighbours: pruned tokens that a kept one
    merges with, by the cosine of keys, one token with several if it is near several; the code's 32.
    A kept token becomes the mean of itself and its neighbours, weighted by attention (itself where all of that is 0), in its
    own place. Ties go to the lowest index. NaN or infinity raises. O(N log N + K N d) for keys of width d.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention", "keys"})
    paper: ClassVar[str] = "arXiv 2403.15388"

    uniform: float = 0.5
    neighbours: int = 32

    def __post_init__(self):
        super().__post_init__()
        share, near = self.uniform, self.neighbours
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise BadBudgetError(f"prumerge_plus: uniform={share!r} is not a share between 0 and 1")
        if isinstance(near, bool) or not isinstance(near, int) or near < 1:
            raise BadBudgetError(f"prumerge_plus: neighbours={near!r} is not a whole number of at least 1")

    def flops(self, n: int, d: int, k: int) -> int:
        """The cosines of keys, of width d, of kept with pruned tokens."""
        return 2 * k * (n - k) * d

    def merge(self, v: VisualTokens, k: int) -> CompressedTokens:
        assert v.attention is not None and v.keys is not None
        if k == len(v):
            return CompressedTokens(v.features, grid=v.grid)
        spaced = round(self.uniform * k)
        attention = finite(v.attention, self.name, "attentions")
        order = attention.sort(descending=True, stable=True).indices
        rest = order[k - spaced :].sort().values
        sample = rest[(2 * torch.arange(spaced, device=rest.device) + 1) * len(rest) // max(1, 2 * spaced)]
        kept = torch.cat([order[: k - spaced], sample]).sort().values
        is_kept = torch.zeros(len(v), dtype=torch.uint8, device=kept.device).index_fill_(0, kept, 1)
        pruned = is_kept.sort(stable=True).indices[: len(v) - k]
        keys = finite(v.keys, self.name, "keys")
        near = cosines(keys[kept], keys[pruned]).sort(dim=1, descending=True, stable=True).indices[:, : self.neighbours]
        near = pruned[near]
        full = v.features.to(torch.float64 if v.features.dtype == torch.float64 else torch.float32)
        weights = torch.cat([attention[kept, None], attention[near]], 1).to(full.dtype)
        total = weights.sum(1, keepdim=True)
        weights = torch.where(total > 0, weights / total.clamp(min=torch.finfo(full.dtype).tiny), 0)
        merged = weights[:, :1] * full[kept] + (weights[:, 1:, None] * full[near]).sum(1)
        return CompressedTokens(torch.where(total > 0, merged, full[kept]).to(v.features.dtype))
