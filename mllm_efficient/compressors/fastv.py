"""FastV: after an early layer, the visual tokens that the last token of the question attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..errors import BadBudgetError
from ..registry import register
from ..tokens import LayerTokens
from .reducer import Reducer

if TYPE_CHECKING:
    from torch import Tensor


@register("fastv")
@dataclass(frozen=True, kw_only=True)
class FastV(Reducer):
    """From ``layer`` on, the tokens with most attention from the instruction's last token in the layer before, mean over heads.

    That row of the attention is computed once more for its one query, so any attention kernel will do: O(n d^2 + n d).
    ratio: the share of the tokens that is left after the layer. Source: FastV (arXiv 2403.06764).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    paper: ClassVar[str] = "arXiv 2403.06764"

    layer: int = 2

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 1:
            raise BadBudgetError(f"{self.name}: layer={self.layer!r} is not a whole number of layers that see every token, such as 2")

    def layers(self, depth: int) -> tuple[int, ...]:
        return (self.layer,)

    def rater(self, layer: int) -> int:
        return layer - 1

    def score(self, v: LayerTokens) -> Tensor:
        assert v.attention is not None
        return v.attention
