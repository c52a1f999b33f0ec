"""SCOPE: saliency times what a token adds to the coverage of all the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..errors import BadSettingError
from ..lazy import torch
from ..registry import register
from ..tokens import VisualTokens
from .math.cosine import finite, gram_flops, similarity
from .selector import Selector

if TYPE_CHECKING:
    from torch import Tensor

EXACT = 32  # how many gains are added up in float32


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
    raises. Sums of gains are exact (not on Apple's GPUs, which have no float64), so no device's order of adding changes a
    choice. O(N^2 D + K N^2) at most: a CPU adds up anew only the gains of tokens whose last one was larger than the best. No host
    synchronisation in the picks elsewhere; on a CUDA device the images of a call that are of one size share the loop.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    paper: ClassVar[str] = "arXiv 2510.24214"
    shares_work = True

    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)) or not 0 <= self.alpha < float("inf"):
            raise BadSettingError(f"scope: alpha={self.alpha!r} is not a number of at least 0")

    def flops(self, n: int, d: int, k: int) -> int:
        """The cosines of all tokens."""
        return gram_flops(n, d)

    def select(self, v: VisualTokens, k: int) -> Tensor:  # type: ignore[override]
        if v.features.device.type != "cpu":
            return self.select_batch([v], k)[0]
        from .math.lazy import most_coverage as lazily

        return lazily(*self._weighed(v), k)

    def batch_entries(self, n: int, d: int) -> int:
        return 3 * n * n

    def select_batch(self, parts: list[VisualTokens], k: int) -> Tensor:
        alike, saliency = zip(*(self._weighed(v) for v in parts))
        return most_coverage(torch.stack(alike), torch.stack(saliency), k)

    def _weighed(self, v: VisualTokens) -> tuple[Tensor, Tensor]:
        """Cosines (N, N) in whole steps, and saliency (N,) in the dtype that gains are added up in."""
        assert v.attention is not None
        attention = finite(v.attention, self.name, "attentions")
        full = torch.float32 if attention.device.type == "mps" else torch.float64
        saliency = (attention.to(full) ** self.alpha).float().to(full)  # the last bits of a power differ with where it stands
        return similarity(v.features, self.name, "visual tokens")[0].round_(), saliency


def most_coverage(alike: Tensor, saliency: Tensor, k: int) -> Tensor:
    """(B, K) indices in the order of choice from cosines (B, N, N) and saliency (B, N), in whose dtype gains are added up.

    Cosines are whole steps of 2^-18 (2^-30 in float64), or multiples of them: float32 has sums of 32 exactly, float64 those of all.
    """
    images, n, _ = alike.shape
    alike = torch.nn.functional.pad(alike, (0, 0, 0, -n % EXACT))  # rows that no token covers any better
    picked = torch.empty(images, k, dtype=torch.long, device=alike.device)
    taken = torch.zeros(images, n, dtype=torch.bool, device=alike.device)
    cover = alike.new_zeros(images, alike.shape[1], 1)
    for i in range(k):
        gain = (alike - cover).clamp_(min=0).unflatten(1, (-1, EXACT)).sum(2).sum(1, dtype=saliency.dtype) * saliency
        j = gain.masked_fill(taken, float("-inf")).argmax(1, keepdim=True)
        picked[:, i : i + 1] = j
        taken.scatter_(1, j, True)
        cover = torch.maximum(cover, alike.gather(2, j[:, None].expand(-1, alike.shape[1], 1)))
    return picked
