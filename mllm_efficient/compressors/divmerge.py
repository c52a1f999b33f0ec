"""DivMerge: the most diverse tokens, and every other token averaged into the one of them that it is most like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import BadSettingError
from ..registry import register
from .divprune import DivPrune


@register("divmerge")
@dataclass(frozen=True, kw_only=True)
class DivMerge(DivPrune):
    """DivPrune's choice with the dropped tokens merged into it: nothing of the image is thrown away. Without a query.

    Kept are the tokens that ``divprune`` keeps, at their places and positions, so that it runs wherever that does; each is the mean of
    itself and of the tokens nearest to it (``merge=``, see ``Selector``). O(N^2 D), as the choice is; merging adds (N - K) K D.
    Source: the choice is DivPrune's (arXiv 2503.02175), the merging that of VScan (arXiv 2505.22654) and ApET (arXiv 2602.19870).
    """

    paper: ClassVar[str] = "arXiv 2503.02175, 2505.22654"
    shares_work = True

    merge: str | None = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.merge is None:
            raise BadSettingError("divmerge without merge= is divprune: name that")
