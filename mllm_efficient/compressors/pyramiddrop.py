"""PyramidDrop: visual tokens that the question's last token attends to, fewer from quarter to quarter of the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..registry import register
from ..tokens import LayerTokens
from .recency import Debiased

if TYPE_CHECKING:
    from torch import Tensor


@register("pyramiddrop")
@dataclass(frozen=True, kw_only=True)
class PyramidDrop(Debiased):
    """At a quarter, half and three quarters of the layers, the tokens with most attention from the instruction's last token.

    The attention is that of the layer the tokens are about to enter, mean over heads, computed for its one query. The
    paper's setting is ``ratio=0.5``: 0.5, 0.25 and 0.125 of the tokens are left. debias: see ``Debiased``. Source: PyramidDrop
    (arXiv 2410.17247).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    paper: ClassVar[str] = "arXiv 2410.17247"

    def layers(self, depth: int) -> tuple[int, ...]:
        return tuple(sorted({max(1, depth * quarter // 4) for quarter in (1, 2, 3)}))

    def score(self, v: LayerTokens) -> Tensor:
        assert v.attention is not None
        return self.fair(v.attention, v)
