"""PruMerge+: tokens that stand out by attention and evenly spaced ones, each merged with the pruned tokens around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..errors import BadSettingError
from ..lazy import torch
from ..registry import register
from ..tokens import CompressedTokens, VisualTokens
from .math.cosine import at_least_float32, cosines, finite
from .merger import Merger

if TYPE_CHECKING:
    from torch import Tensor


@register("prumerge_plus")
@dataclass(frozen=True, kw_only=True)
class PruMergePlus(Merger):
    """Attention's outliers and a uniform sample, merged by keys.

    Source: LLaVA-PruMerge (Shang et al., arXiv 2403.15388), its "+" variant. The paper keeps as many tokens as stand out of
    the class token's attention by the interquartile rule and samples three times as many evenly, so that the count is the
    image's. Here it is the budget's: the K - U tokens with the largest attention, then U evenly spaced ones of the rest in
    raster order. Rule of merging: x_i becomes x_i + sum_j a_j x_j over the tokens j whose attention keys are nearest to its own
    by cosine, a_j being their attention; one token goes into several if it is near several.
    uniform: U / K, rounded; 3/4 as in the paper's sample. neighbours: how many j, of all other tokens; the paper's 32. Left out:
    one more token that the released code adds, the sum of all pruned ones weighted by attention. It merges the tower's
    output, this merges projected tokens, each in the place of its x_i, whose M-RoPE position it keeps, and deepstack features likewise.
    Ties go to the lowest index. NaN or infinity raises. O(N log N + K N d) for keys of width d.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention", "keys"})
    paper: ClassVar[str] = "arXiv 2403.15388"
    in_place = True
    channelwise = True

    uniform: float = 0.75
    neighbours: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        share, near = self.uniform, self.neighbours
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise BadSettingError(f"prumerge_plus: uniform={share!r} is not a share between 0 and 1")
        if isinstance(near, bool) or not isinstance(near, int) or near < 1:
            raise BadSettingError(f"prumerge_plus: neighbours={near!r} is not a whole number of at least 1")

    def flops(self, n: int, d: int, k: int) -> int:
        """The cosines of keys, of width d, of kept tokens with all."""
        return 2 * k * n * d if k < n else 0

    def merge(self, v: VisualTokens, k: int) -> CompressedTokens:
        assert v.attention is not None and v.keys is not None
        if k == len(v):
            return CompressedTokens(v.features, grid=v.grid, places=torch.arange(k, device=v.features.device))
        spaced = round(self.uniform * k)
        attention = finite(v.attention, self.name, "attentions")
        order = attention.sort(descending=True, stable=True).indices
        rest = order[k - spaced :].sort().values
        sample = rest[(2 * torch.arange(spaced, device=rest.device) + 1) * len(rest) // max(1, 2 * spaced)]
        kept = torch.cat([order[: k - spaced], sample]).sort().values
        keys = finite(v.keys, self.name, "keys")
        alike = cosines(keys[kept], keys).scatter_(1, kept[:, None], -2)  # itself is no neighbour
        near = alike.sort(dim=1, descending=True, stable=True).indices[:, : min(self.neighbours, len(v) - 1)]
        full = at_least_float32(v.features)
        weights = attention.to(full)[near]
        if v.features.device.type == "cpu":  # one after the other: caches hold the neighbours of one token, and not those of all
            sums = torch.stack([weighed(v.features[i].to(full), w[:, None]) for i, w in zip(near, weights)])
        else:
            sums = weighed(v.features[near].to(full), weights[..., None])
        return CompressedTokens((v.features[kept].to(full) + sums).to(v.features.dtype), places=kept)


def weighed(rows: Tensor, weights: Tensor) -> Tensor:
    """Sums (..., D) of rows (..., neighbours, D), which are used up, by weights (..., neighbours, 1)."""
    return rows.mul_(weights).sum(-2)
