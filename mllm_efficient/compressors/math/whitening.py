"""Tokens of a picture whitened: what they have in common is taken away, and no direction counts more than another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import BadSettingError
from ...lazy import torch
from .cosine import at_least_float32
from .finite import require_finite
from .precision import full_float32

if TYPE_CHECKING:
    from torch import Tensor

WIDTH = 16  # channels of a group where none is asked for: best of 64, 32, 16, 8 and 4 on validation questions of the embedded benchmark
SHRINK = 1e-3  # of the mean variance, added to the variance in every direction, so that few tokens have an inverse


def groups_of(n: int, d: int, groups: int | None, name: str) -> int:
    """How many groups d channels form. Left out: as few as have at most ``WIDTH`` channels each, and at most half as many as tokens.

    Raises ``BadSettingError`` for a number that does not divide the channels.
    """
    if groups is None:
        return next(g for g in range(1, d + 1) if d % g == 0 and (d // g <= min(WIDTH, max(1, n // 2)) or g == d))
    if d % groups:
        raise BadSettingError(f"{name}: groups={groups} does not divide the {d} channels of a visual token")
    return groups


def whitened(x: Tensor, groups: int | None, name: str) -> Tensor:
    """Rows (N, D), or (B, N, D), whose products within each group of neighbouring channels are those of whitened ones, in float32 at least.

    The mean over the rows goes, and every group is multiplied by the inverse of a square root of its covariance (Huang et al., grouped
    whitening, in WhitenedCSE, arXiv 2305.17746, without its shuffling). Which root makes no difference to products, so it is
    Cholesky's. O(N D d + D d^2) for groups of d channels. Rows that are all alike become 0. Raises ``NotFiniteError``.
    """
    x = x.detach().to(at_least_float32(x))
    require_finite(x, name, "visual tokens")
    g = groups_of(x.shape[-2], x.shape[-1], groups, name)
    with torch.autocast(x.device.type, enabled=False), full_float32(x.device.type):
        largest = x.abs().amax((-2, -1), keepdim=True)
        x = x / torch.where(largest == 0, 1, largest)  # so that no square overflows or vanishes
        x = (x - x.mean(-2, keepdim=True)).unflatten(-1, (g, -1)).transpose(-3, -2)  # (..., G, N, d)
        covariance = x.mT @ x / x.shape[-2]
        mean_variance = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        alike = mean_variance <= torch.finfo(x.dtype).eps ** 2  # nothing but rounding is left
        eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        root = torch.linalg.cholesky_ex(torch.where(alike, eye, covariance + SHRINK * mean_variance * eye))[0]
        out = torch.linalg.solve_triangular(root, x.mT, upper=False).mT
        return torch.where(alike, 0, out).transpose(-3, -2).flatten(-2)


def whitening_flops(n: int, d: int, groups: int | None, name: str) -> int:
    """FLOPs of ``whitened``: covariances, their roots and the triangular systems."""
    width = d // groups_of(n, d, groups, name)
    return 2 * n * d * width + d * width**2 // 3 + n * d * width
