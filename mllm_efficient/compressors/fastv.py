"""FastV: after an early layer, the visual tokens that the last token of the question attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..registry import register
from ..tokens import LayerTokens
from .recency import Debiased
from .reducer import OneStage

if TYPE_CHECKING:
    from torch import Tensor


@register("fastv")
@dataclass(frozen=True, kw_only=True)
class FastV(Debiased, OneStage):
    """From ``layer`` on, the tokens with most attention from the instruction's last token in the layer before, mean over heads.

    That row of the attention is computed once more for its one query, so any attention kernel will do: O(n d^2 + n d).
    ratio: the share of the tokens that is left after the layer. debias: see ``Debiased``. Source: FastV (arXiv 2403.06764).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    paper: ClassVar[str] = "arXiv 2403.06764"

    def score(self, v: LayerTokens) -> Tensor:
        assert v.attention is not None
        return self.fair(v.attention, v)
