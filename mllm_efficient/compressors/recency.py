"""Attention without its recency: later visual tokens get more of it for being nearer to the question, whatever they show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import BadSettingError
from .reducer import Reducer

if TYPE_CHECKING:
    from torch import Tensor

    from ..tokens import LayerTokens


@dataclass(frozen=True, kw_only=True)
class Debiased(Reducer):
    """A method that rates by attention, and can do so without the trend of attention over the places of an image's tokens.

    debias: subtract the straight line that fits the scores of an image over the numbers of its tokens best, by least squares.
    Source: attention debiasing (arXiv 2508.17807); what it does to padding has no counterpart, since no padding is rated here.
    """

    debias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.debias, bool):
            raise BadSettingError(f"{self.name}: debias={self.debias!r} is not true or false")

    def fair(self, scores: Tensor, v: LayerTokens) -> Tensor:
        """Scores (n,) as they are to be compared."""
        return without_trend(scores, v.index) if self.debias else scores


def without_trend(scores: Tensor, index: Tensor) -> Tensor:
    """Scores (n,) less their straight line over index (n,), in float32; their mean stays. Of a single token nothing is subtracted."""
    scores, at = scores.float(), index.to(scores.device).float()
    at = at - at.mean()
    slope = (at * (scores - scores.mean())).sum() / at.square().sum().clamp(min=1e-12)
    trendless: Tensor = scores - slope * at
    return trendless
