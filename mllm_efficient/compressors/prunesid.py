"""PruneSID: tokens grouped by the principal component that they belong to, and in each group those that no better one is like."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..lazy import torch
from ..registry import register
from ..tokens import VisualTokens
from .math.cosine import cosines, finite
from .selector import Selector

if TYPE_CHECKING:
    from torch import Tensor

LEAST = 1e-10  # of the largest variance: a component with no more than this is rounding
STEPS = 2.0**30  # loadings are compared to this


@register("prunesid")
@dataclass(frozen=True, kw_only=True)
class PruneSID(Selector):
    """Semantic components, then suppression of the alike within each.

    Source: PruneSID (ICLR 2026, arXiv 2603.09480) and its code. Rule: K / 4 principal components (rounded down, at least 1) of the
    sigmoid of the features, channels as samples and tokens as variables; a token belongs to the component with its largest
    absolute loading. In each group tokens are taken by attention of the class token, and one that is more like a taken one than K / 32
    times the mean cosine of all pairs is passed over. Every group gives 1 token, the rest of K is shared in proportion to how many were
    taken, at most 5 ceil(K / 64) or as many as were taken; where that is not enough, one more from each until it is. A group's are
    the taken ones, then the passed over, each by attention.
    The code's components are those of a randomised SVD; these are exact, so that the same image gives the same tokens, and absolute
    loadings need no rule for signs. Components of no variance are none. It works on the tower's output and counts the class
    token as one of K; these are the projected tokens, and all K are patches.
    Ties: the lowest index, the first component, the first group. NaN or infinity raises. O(N^2 D + N^3) for the components in float64
    where the device has it, a few passes over the pairs; the CPU waits for the shares.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    paper: ClassVar[str] = "arXiv 2603.09480"

    def flops(self, n: int, d: int, k: int) -> int:
        """The covariances and the cosines of all tokens. The decomposition is no matrix product."""
        return 4 * n * n * d if k < n else 0

    def select(self, v: VisualTokens, k: int) -> Tensor:  # type: ignore[override]
        assert v.attention is not None
        attention = finite(v.attention, self.name, "attentions")
        n, order = len(v), attention.sort(descending=True, stable=True).indices
        if k == n:
            return order
        x = finite(v.features, self.name, "visual tokens")[order]  # from here on by attention
        group = components(x, max(1, k // 4))
        alike = cosines(x, x)
        mean = alike.double().sum().sub(alike.diagonal().double().sum()) / (n * (n - 1))
        taken = not_alike(group, alike > (k / 32 * mean))
        count = int(group.max()) + 1
        sizes, survivors = (
            torch.zeros(count, dtype=torch.long, device=x.device).index_add(0, group, t.long()) for t in (group >= 0, taken)
        )
        quota = torch.tensor(quotas(sizes.tolist(), survivors.tolist(), k), device=x.device)
        rank = torch.empty_like(order)
        first = (group * 2 + ~taken).sort(stable=True).indices  # group by group, the taken ones before the others, each by attention
        start = sizes.cumsum(0) - sizes
        rank[first] = torch.arange(n, device=x.device) - start[group[first]]
        return order[(rank < quota[group]).to(torch.uint8).sort(descending=True, stable=True).indices[:k]]


def components(x: Tensor, count: int) -> Tensor:
    """(N,) the principal component that each row of x (N, D) belongs to, numbered from that of the largest variance."""
    full = torch.float32 if x.device.type == "mps" else torch.float64
    with torch.autocast(x.device.type, enabled=False):
        s = x.to(full).nan_to_num().sigmoid()  # a decomposition would raise before what was found of x is read
        s = s - s.mean(1, keepdim=True)
        variance, loadings = torch.linalg.eigh(s @ s.T)
    variance, loadings = variance.flip(0)[:count], loadings.flip(1)[:, :count]
    real = variance > LEAST * variance[0].clamp(min=torch.finfo(full).tiny)
    return torch.where(real, loadings.abs().mul(STEPS).round(), -1).argmax(1)


def not_alike(group: Tensor, alike: Tensor) -> Tensor:
    """(N,) bool: taken one after the other, but for those that are alike (N, N) to one of their group that was taken before.

    A token is decided once all before it that could pass it over are: each pass decides at least one more, and passes end where
    nothing changes.
    """
    n = len(group)
    before = (alike & (group[:, None] == group)).triu_(1)  # row i could pass column j over
    taken = torch.ones(n, dtype=torch.bool, device=group.device)
    for _ in range(n):
        now = ~(before & taken[:, None]).any(0)
        if torch.equal(now, taken):
            break
        taken = now
    return taken


def quotas(sizes: list[int], taken: list[int], k: int) -> list[int]:
    """How many tokens each group gives, k in all. sizes: of the groups; taken: how many of each are not passed over."""
    least = [min(1, size) for size in sizes]
    most = [min(5 * math.ceil(k / 64), size, kept) for size, kept in zip(sizes, taken)]
    while sum(most) < k:
        most = [min(limit + 1, size) for limit, size in zip(most, sizes)]
    rest, so_far, given = max(0, k - sum(least)), 0, 0
    out = []
    for low, high, kept in zip(least, most, taken):
        so_far += kept
        share = round(so_far * rest / sum(taken)) - given
        given += share
        out.append(min(low + share, high))
    for i in sorted(range(len(out)), key=lambda i: -taken[i]):
        out[i] += min(most[i] - out[i], k - sum(out))
    return out
