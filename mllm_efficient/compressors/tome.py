"""ToMe: the most similar tokens merged pair by pair, by bipartite soft matching."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..errors import BadBudgetError, CountMismatchError
from ..lazy import torch
from ..registry import register
from ..tokens import CompressedTokens, VisualTokens
from ._cosine import unit
from ._sums import group_sums
from .base import Merger
from .divprune import full_float32

if TYPE_CHECKING:
    from torch import Tensor

BLOCKS = 24


@register("tome")
@dataclass(frozen=True, kw_only=True)
class ToMe(Merger):
    """Bipartite soft matching of the projected tokens, round after round, until exactly K are left.

    Source: ToMe (Bolya et al., ICLR 2023, arXiv 2210.09461), whose merging runs inside the tower: a fixed number of pairs
    in each block, matched by the attention keys, with attention proportional to size from then on. Behind the projector
    there are no keys and no later blocks, so tokens are matched by their features and all merging is done at once.
    Rule of a round: tokens in raster order go alternately to A (first) and B; each of A is linked to the token of B with
    the largest cosine; the r strongest links merge, each into its token of B, by the mean weighted with the number of
    original tokens in each. A merged token stands where its token of B stood.
    r: pairs in a round, as the paper's r in a block; left out, as many as leave K tokens after 24 rounds, the blocks of
    CLIP's ViT-L. A round merges at most half of its tokens, whatever r is, and the last one what is left to do.
    Equal cosines go to the lowest index; they are compared to 2^-18 (2^-30 in float64), because the last bits of the
    cosines of copies depend on where they stand. A zero row has cosine 0 to everything. NaN or infinity raises. float32,
    or float64 for float64 input. O(N^2 D) a round.
    """

    paper: ClassVar[str] = "arXiv 2210.09461"

    r: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.r is not None and (isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1):
            raise BadBudgetError(f"tome: r={self.r!r} is not a whole number of pairs of at least 1")

    def rounds(self, n: int, k: int) -> list[int]:
        """Pairs that each round merges on the way from n tokens to k."""
        out, most = list[int](), self.r or -((k - n) // BLOCKS)
        while n > k:
            out.append(min(n - k, n // 2, most))
            n -= out[-1]
        return out

    def flops(self, n: int, d: int, k: int) -> int:
        """The products of A with B in every round."""
        total = 0
        for pairs in self.rounds(n, k):
            total += 2 * ((n + 1) // 2) * (n // 2) * d
            n -= pairs
        return total

    def merge(self, v: VisualTokens, k: int) -> CompressedTokens:
        if k >= len(v):
            return CompressedTokens(v.features, grid=v.grid)
        full = torch.float64 if v.features.dtype == torch.float64 else torch.float32
        x = v.features.to(full)
        if not x.isfinite().all():
            raise CountMismatchError("tome: the visual tokens hold NaN or infinity, which has no cosine")
        size = torch.ones(len(x), 1, dtype=full, device=x.device)
        with torch.autocast(x.device.type, enabled=False), full_float32(x.device.type):
            for pairs in self.rounds(len(v), k):
                x, size = merge_pairs(x, size, pairs)
        return CompressedTokens(x.to(v.features.dtype))


def merge_pairs(x: Tensor, size: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """One round: features (n - pairs, D) and sizes (n - pairs, 1) of n tokens and their sizes, in raster order."""
    n, rows = len(x), unit(x.detach())
    steps = 2.0**30 if x.dtype == torch.float64 else 2.0**18
    best, partner = (rows[::2] @ rows[1::2].T).mul_(steps).round_().max(1)
    strongest = best.sort(descending=True, stable=True).indices
    merged = strongest[:pairs]
    into = torch.arange(n, device=x.device)  # the token that each one becomes a part of
    into[2 * merged] = 2 * partner[merged] + 1
    stays = torch.cat([2 * strongest[pairs:], torch.arange(1, n, 2, device=x.device)]).sort().values
    sums = group_sums(torch.cat([x * size, size], 1), into, n)[0][stays]
    return sums[:, :-1] / sums[:, -1:], sums[:, -1:].detach()
