"""SparseVLM: the text tokens that speak of the image rate its visual tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..registry import register
from ..tokens import LayerTokens
from .reducer import Reducer

if TYPE_CHECKING:
    from torch import Tensor

PAPER_LAYERS, PAPER_DEPTH = (2, 6, 15), 32


@register("sparsevlm")
@dataclass(frozen=True, kw_only=True)
class SparseVLM(Reducer):
    """At layers 2, 6 and 15 of 32 (in proportion elsewhere), the tokens with most attention from the text raters.

    Raters are the text tokens whose relevance, the mean over visual tokens of softmax over text of the products of what
    entered the decoder, is at least the mean relevance. The attention is that of the layer the tokens are about to
    enter, mean over heads and raters. Dropped tokens are not merged, as in the paper's second version; where that paper
    picks counts by hand, every stage leaves the same share. Source: SparseVLM (arXiv 2410.04417).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"text_attention", "entry"})
    paper: ClassVar[str] = "arXiv 2410.04417"

    def layers(self, depth: int) -> tuple[int, ...]:
        return tuple(sorted({max(1, round(layer * depth / PAPER_DEPTH)) for layer in PAPER_LAYERS}))

    def score(self, v: LayerTokens) -> Tensor:
        assert v.text_attention is not None and v.entry is not None and v.text_entry is not None
        relevance = (v.entry @ v.text_entry.T).float().softmax(-1).mean(0)
        raters = relevance >= relevance.mean()
        return (v.text_attention * raters[:, None]).sum(0)

    def choice_flops(self, n: int, k: int, text: int, d: int, full: int) -> int:
        return 2 * full * text * d
