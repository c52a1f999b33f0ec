"""FasterVLM: the tokens that the vision tower's class token attends to most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..registry import register
from ..tokens import VisualTokens
from .math.cosine import finite
from .selector import Selector

if TYPE_CHECKING:
    from torch import Tensor


@register("fastervlm")
@dataclass(frozen=True, kw_only=True)
class FasterVLM(Selector):
    """The K tokens with the largest attention, averaged over heads. Nothing keeps them from saying the same.

    Source: FasterVLM (Zhang et al., arXiv 2412.01818v1). Rule: top-k of the class token's attention in the layer whose output the
    model takes; in a tower without a class token (SigLIP) the mean attention that a token receives. Ties go to the lowest
    index; NaN or infinity raises. O(N log N).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    paper: ClassVar[str] = "arXiv 2412.01818v1"

    def score(self, v: VisualTokens) -> Tensor:
        assert v.attention is not None
        return finite(v.attention, self.name, "attentions")
