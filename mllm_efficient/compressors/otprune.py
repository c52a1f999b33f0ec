"""OTPrune: the subset whose distribution is nearest to that of all tokens."""

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

ROWS = 512  # of the products of all tokens at a time


@register("otprune")
@dataclass(frozen=True, kw_only=True)
class OTPrune(Selector):
    """The least 2-Wasserstein distance to all tokens, by the determinant that bounds it. Without a query.

    Source: OTPrune (CVPR 2026, arXiv 2602.20205) and its code. Rule: channels are brought to unit norm over the image's tokens, G is the
    products of the tokens with each other, and one token after the other is taken that enlarges det(I + gamma G G^T of the chosen)
    most, by an incremental Cholesky factor. gamma: the code's 0.01. The code's are the projected tokens too; a channel that is 0
    everywhere counts for nothing.
    Scores that are equal in float32 go to the lowest index. NaN or infinity raises. O(N^2 D) once for the diagonal, O(N D + N K) for each
    of the K picks, in float64 where the device has it; no N x N matrix, no host synchronisation in the picks.
    """

    paper: ClassVar[str] = "arXiv 2602.20205"

    gamma: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.gamma, bool) or not isinstance(self.gamma, (int, float)) or not 0 < self.gamma < float("inf"):
            raise BadSettingError(f"otprune: gamma={self.gamma!r} is not a number above 0")

    def flops(self, n: int, d: int, k: int) -> int:
        """The diagonal, three products with all tokens for every pick but the last, and those with the factor."""
        return 2 * n * n * d + 6 * n * d * (k - 1) + n * (k - 1) * max(0, k - 2)

    def select(self, v: VisualTokens, k: int) -> Tensor:  # type: ignore[override]
        full = torch.float32 if v.features.device.type == "mps" else torch.float64
        x = v.features.detach().to(full)
        require_finite(x, self.name, "visual tokens")
        with torch.autocast(x.device.type, enabled=False):
            largest = x.abs().amax(0)  # first, so that no square overflows or vanishes
            x = x / torch.where(largest == 0, 1, largest)
            norm = torch.linalg.vector_norm(x, dim=0)
            return most_volume(x / torch.where(norm == 0, 1, norm), self.gamma, k)


def most_volume(x: Tensor, gamma: float, k: int) -> Tensor:
    """(k,) indices in the order of choice from rows x (N, D): greedy MAP of I + gamma (x x^T)^2."""
    n = len(x)
    left = torch.cat([1 + gamma * (rows @ x.T).square_().sum(1) for rows in x.split(ROWS)])
    picked, taken = torch.empty(k, dtype=torch.long, device=x.device), torch.zeros(n, dtype=torch.bool, device=x.device)
    factor = x.new_zeros(k, n)  # the rows of the transposed Cholesky factor that belong to the chosen
    for i in range(k):
        j = left.float().masked_fill(taken, float("-inf")).argmax().view(1)
        picked[i : i + 1] = j
        taken.index_fill_(0, j, True)
        if i == k - 1:
            break
        row = gamma * (((x.index_select(0, j) @ x.T) @ x) @ x.T)[0]
        row.index_add_(0, j, row.new_ones(1))
        if i:
            row -= (factor[:i].index_select(1, j).T @ factor[:i])[0]
        factor[i] = row / left.index_select(0, j).sqrt()  # of at least 1
        left = left - factor[i].square()
    return picked
