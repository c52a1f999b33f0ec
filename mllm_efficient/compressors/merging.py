"""Dropped tokens averaged into the kept one that each is most like: what any selector can do with what it does not keep."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import CountMismatchError
from ..lazy import torch
from .math.cosine import cosines, finite
from .math.sums import group_sums

if TYPE_CHECKING:
    from torch import Tensor

RULES = ("mean", "similarity")


def join(x: Tensor, kept: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Which kept token each of x (N, D) joins, and how like it it is.

    kept: (K,) indices without repetition, in any order. name: of the method. Returns (N,) places in ``kept``, a kept token's own among
    them, and (N,) cosines in float32 (float64 for float64 input), 1 for kept ones. Of equally similar kept tokens the one with the
    lowest index is joined, whatever the order of ``kept``; cosines are compared as ``math.cosine`` gives them. The matrix is of the
    dropped tokens against the kept ones, (N - K) x K. Raises ``NotFiniteError`` for NaN or infinity, and on a CPU ``CountMismatchError``
    where a token is kept twice: on a GPU that is seen when the indices are read.
    """
    n, k = len(x), len(kept)
    if kept.device.type == "cpu" and len(kept.unique()) != k:
        raise CountMismatchError(f"{name} selected the same visual token twice")
    rows, (ordered, place) = finite(x, name, "visual tokens"), kept.sort()
    is_kept = torch.zeros(n, dtype=torch.uint8, device=x.device).index_fill_(0, kept, 1)
    dropped = is_kept.sort(stable=True).indices[: n - k]  # of a fixed size, so that a GPU need not be waited for
    likeness, nearest = cosines(rows[dropped], rows[ordered]).max(1)
    groups = torch.empty(n, dtype=torch.long, device=x.device)
    groups[kept] = torch.arange(k, device=x.device)
    groups[dropped] = place[nearest]
    return groups, torch.ones(n, dtype=rows.dtype, device=x.device).index_copy_(0, dropped, likeness)


def averaged(x: Tensor, groups: Tensor, weights: Tensor, k: int) -> Tensor:
    """(K, D): the mean of the rows of x (N, D) in each group, by weights (N,), in the dtype of x; sums are in float32 at least."""
    full = x.to(weights.dtype)
    sums, _ = group_sums(torch.cat([full * weights[:, None], weights[:, None]], 1), groups, k)
    return (sums[:, :-1] / sums[:, -1:]).to(x.dtype)


def weights_of(rule: str, likeness: Tensor) -> Tensor:
    """(N,) what each token counts in the mean of its group; a kept token counts as 1, one that is not like its own at all as 0."""
    return likeness.clamp(min=0) if rule == "similarity" else torch.ones_like(likeness)
