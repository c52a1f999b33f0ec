"""SparseVLM: the text tokens that speak of the image rate its visual tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..errors import BadSettingError
from ..lazy import torch
from ..registry import register
from ..tokens import LayerTokens, ReducedTokens
from .math.finite import require_finite, require_scores
from .recency import Debiased

if TYPE_CHECKING:
    from torch import Tensor

PAPER_LAYERS, PAPER_DEPTH = (2, 6, 15), 32
NEIGHBOURS = 5  # that a token's density is taken from


@register("sparsevlm")
@dataclass(frozen=True, kw_only=True)
class SparseVLM(Debiased):
    """At layers 2, 6 and 15 of 32 (in proportion elsewhere), the tokens with most attention from the text raters.

    Raters are the text tokens whose relevance, the mean over visual tokens of softmax over text of the products of what
    entered the decoder, is at least the mean relevance. The attention is that of the layer the tokens are about to
    enter, mean over heads and raters. Where the paper picks counts by hand, every stage leaves the same share.

    recycle: the share of the dropped tokens, the best rated of them, that are not lost: density peaks make groups of them,
    ``clusters`` of their number but one token less than the budget at most, and each group is summed to one token in the
    place of its peak, within the budget.
    0 drops them; the paper's first version merges, its second need not. debias: see ``Debiased``.
    Source: SparseVLM (arXiv 2410.04417).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"text_attention", "entry"})
    paper: ClassVar[str] = "arXiv 2410.04417"

    recycle: float = 0.0
    clusters: float = 0.1

    def __post_init__(self) -> None:
        for name, value, zero in (("recycle", self.recycle, True), ("clusters", self.clusters, False)):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not (0 < value <= 1 or (zero and value == 0)):
                raise BadSettingError(f"sparsevlm: {name}={value!r} is not a share in {'[' if zero else '('}0, 1]")
        if self.clusters != 0.1 and not self.recycle:
            raise BadSettingError("sparsevlm: clusters= has no effect without recycle=")
        super().__post_init__()

    @property
    def merges(self) -> bool:  # type: ignore[override]
        return self.recycle > 0

    def layers(self, depth: int) -> tuple[int, ...]:
        return tuple(sorted({max(1, round(layer * depth / PAPER_DEPTH)) for layer in PAPER_LAYERS}))

    def score(self, v: LayerTokens) -> Tensor:
        assert v.text_attention is not None and v.entry is not None and v.text_entry is not None
        relevance = (v.entry @ v.text_entry.T).float().softmax(-1).mean(0)
        require_finite(relevance, self.name, "relevances of the text")  # else no token is a rater, and all scores are 0
        raters = relevance >= relevance.mean()
        return self.fair((v.text_attention * raters[:, None]).sum(0), v)

    def split(self, n: int, k: int) -> tuple[int, int, int]:
        """Of n tokens, how many stay as they are, how many are recycled, and how many groups these make: k tokens in all.

        recycle is a share of the n - k that the budget has no room for.
        """
        recycled = round(self.recycle * (n - k))
        groups = min(k - 1, recycled, max(1, round(self.clusters * recycled)))
        return k - groups, recycled if groups else 0, groups

    def reduce(self, v: LayerTokens, k: int) -> ReducedTokens:
        stay, recycled, groups = self.split(len(v), k) if self.recycle and k < len(v) else (k, 0, 0)
        if not groups:
            return super().reduce(v, k)
        scores = self.score(v)
        require_scores(scores, self.name)
        order = scores.sort(descending=True, stable=True).indices
        pool = order[stay : stay + recycled]
        peaks, sums = aggregate(v.hidden[pool], groups)
        indices, back = torch.cat([order[:stay], pool[peaks]]).sort()
        return ReducedTokens(indices, torch.cat([v.hidden[order[:stay]], sums])[back])

    def choice_flops(self, n: int, k: int, text: int, d: int, full: int) -> int:
        recycled = self.split(n, k)[1] if self.recycle and k < n else 0
        return 2 * full * text * d + 2 * recycled * recycled * d


def aggregate(states: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Density peaks of states (n, d): the index of each peak (groups,) and the sum of the tokens nearest to it (groups, d).

    A token's density is exp of minus the mean squared distance to its nearest neighbours over d, its separation the distance
    to the nearest denser token; peaks have the largest products of both. Source: DPC-KNN (Du et al., 2016) as SparseVLM has it.
    """
    x = states.detach().float()
    n, width = x.shape
    squares = x.square().sum(-1)
    distance = (squares[:, None] + squares - 2 * x @ x.T).clamp(min=0).fill_diagonal_(0).div(width).sqrt()
    near = distance.square().sort(dim=1).values[:, 1 : 1 + NEIGHBOURS]
    density = (-near.mean(1)).exp() if n > 1 else torch.ones(1, device=x.device)
    place = torch.arange(n, device=x.device)
    denser = (density[None] > density[:, None]) | ((density[None] == density[:, None]) & (place[None] < place[:, None]))
    apart = torch.where(denser, distance, torch.inf).amin(1)
    apart = torch.where(apart.isinf(), distance.max(), apart)
    peaks = (density * apart).sort(descending=True, stable=True).indices[:groups]
    nearest = distance[:, peaks].argmin(1)
    nearest = nearest.index_put((peaks,), torch.arange(groups, device=x.device))
    return peaks, torch.zeros(groups, width, dtype=states.dtype, device=x.device).index_add(0, nearest, states)
