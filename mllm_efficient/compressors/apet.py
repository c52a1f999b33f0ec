"""ApET: tokens that a few of them cannot be combined to, and those few; the rest merged into them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..errors import BadSettingError
from ..lazy import torch
from ..registry import register
from ..tokens import VisualTokens
from .math.finite import require_finite
from .selector import Selector

if TYPE_CHECKING:
    from torch import Tensor

RIDGE = 1e-5


@register("apet")
@dataclass(frozen=True, kw_only=True)
class ApET(Selector):
    """What linear combinations of a basis of tokens miss most, without attention and without a query.

    Source: ApET (CVPR 2026, arXiv 2602.19870). Rule: the basis is ``basis`` tokens, each the farthest from those before it; every token
    is approximated by the combination of the basis that is nearest to it (least squares with a ridge of 1e-5), and the K tokens with
    the largest residual are kept, the last of them replaced by the basis. Every other token is merged into the kept one most like it
    (``merge=mean``, see ``Selector``).
    basis: the paper's 10, and at most K. Here the first token of the basis is the one with the largest norm, distances are Euclidean
    and all is of the projected tokens, where the paper takes the tower's. The paper does the same again inside the decoder at
    layer 16; ``| fastv:layer=16,ratio=...`` drops there by attention.
    Distances and residuals that are equal in float32 go to the lowest index. NaN or infinity raises. O(N D basis), in float64 where the
    device has it; no N x N matrix, no host synchronisation.
    """

    paper: ClassVar[str] = "arXiv 2602.19870"

    basis: int = 10
    merge: str | None = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.basis, bool) or not isinstance(self.basis, int) or self.basis < 1:
            raise BadSettingError(f"apet: basis={self.basis!r} is not a whole number of at least 1")

    def flops(self, n: int, d: int, k: int) -> int:
        """The combinations of the basis, one way and back."""
        return 4 * n * d * min(self.basis, k, d)

    def select(self, v: VisualTokens, k: int) -> Tensor:  # type: ignore[override]
        full = torch.float32 if v.features.device.type == "mps" else torch.float64
        require_finite(v.features, self.name, "visual tokens")
        x = v.features.detach().to(full).nan_to_num()  # of a decomposition that would raise before the answer above is read
        with torch.autocast(x.device.type, enabled=False):
            basis = farthest(x, min(self.basis, k))
            missed = residuals(x, x[basis]).float().index_fill(0, basis, float("inf"))
        return missed.sort(descending=True, stable=True).indices[:k]


def farthest(x: Tensor, count: int) -> Tensor:
    """Indices (count,) of rows x (N, D): the one with the largest norm, then each the farthest from those before it."""
    picked = torch.empty(count, dtype=torch.long, device=x.device)
    far, taken = x.square().sum(1), torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for i in range(count):
        picked[i] = j = far.float().masked_fill(taken, float("-inf")).argmax()
        taken.index_fill_(0, j.view(1), True)
        away = (x - x.index_select(0, j.view(1))).square_().sum(1)
        far = away if i == 0 else torch.minimum(far, away)
    return picked


def residuals(x: Tensor, basis: Tensor) -> Tensor:
    """(N,) norms of what combinations of the basis (m, D), by least squares with a ridge, leave of rows x (N, D)."""
    _, singular, directions = torch.linalg.svd(basis, full_matrices=False)
    along = x @ directions.T
    beside = x - along @ directions
    kept_back = along * (RIDGE / (singular.square() + RIDGE))  # of what lies in the basis, the ridge's share
    missed: Tensor = (beside.square().sum(1) + kept_back.square().sum(1)).sqrt()
    return missed
