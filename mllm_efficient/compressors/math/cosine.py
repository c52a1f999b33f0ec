"""Cosines between tokens: rows at unit length, and products in which copies tie."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...lazy import torch
from .finite import require_finite
from .precision import full_float32

if TYPE_CHECKING:
    from torch import Tensor


def unit(x: Tensor) -> Tensor:
    """Rows (N, D) at length 1, zero rows at 0. Divided by the largest entry first, so that no square overflows or vanishes."""
    largest = x.abs().amax(1, keepdim=True)
    x = x / torch.where(largest == 0, 1, largest)
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / torch.where(norm == 0, 1, norm)


def finite(x: Tensor, name: str, what: str) -> Tensor:
    """``x`` in float32, or float64 as it is. NaN and infinity raise (``require_finite``)."""
    x = x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    require_finite(x, name, what)
    return x


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """(N, M) of rows a (N, D) and b (M, D), to 2^-18 (2^-30 in float64): the last bits of copies depend on where they stand."""
    steps = 2.0**30 if a.dtype == torch.float64 else 2.0**18
    with torch.autocast(a.device.type, enabled=False), full_float32(a.device.type):
        return (unit(a) @ unit(b).T).mul_(steps).round_().div_(steps)
