"""Cosines between tokens: rows at unit length, and products in which copies tie."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ...lazy import torch
from ..divprune import full_float32
from .finite import require_finite

if TYPE_CHECKING:
    from torch import Tensor

IN_CACHE = 2**17  # entries that a CPU works on at a time, so that only the first look at them is at memory
BLOCK = 192  # rows of a symmetric product at a time; a multiple of what matrix kernels take at once, so that no sum changes


def unit(x: Tensor) -> Tensor:
    """Rows (N, D) at length 1, zero rows at 0. Divided by the largest entry first, so that no square overflows or vanishes."""
    largest = x.abs().amax(1, keepdim=True)
    x = x / torch.where(largest == 0, 1, largest)
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / torch.where(norm == 0, 1, norm)


def finite(x: Tensor, name: str, what: str) -> Tensor:
    """``x`` in float32, or float64 as it is. NaN and infinity raise (``require_finite``)."""
    x = x.detach().to(at_least_float32(x))
    require_finite(x, name, what)
    return x


def at_least_float32(x: Tensor) -> torch.dtype:
    """The dtype that rows are worked on in: float64 for float64, float32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def steps(dtype: torch.dtype) -> float:
    """One over what cosines are compared to: the last bits of copies depend on where they stand."""
    return 2.0**30 if dtype == torch.float64 else 2.0**18


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """(N, M) of rows a (N, D) and b (M, D), to 2^-18 (2^-30 in float64)."""
    fine = steps(a.dtype)
    with torch.autocast(a.device.type, enabled=False), full_float32(a.device.type):
        return (unit(a) @ unit(b).T).mul_(fine).round_().div_(fine)


def parts_of(x: Tensor) -> Iterator[slice]:
    """Rows (N, D) in parts: all at once, or on a CPU as many as its caches hold."""
    rows = max(1, IN_CACHE // max(1, x.shape[1]) if x.device.type == "cpu" else len(x))
    return (slice(start, start + rows) for start in range(0, len(x), rows))


def unit_rows(x: Tensor, name: str, what: str, length: float = 1.0) -> Tensor:
    """``unit`` of rows (N, D), in float32 or float64, at another length, a power of two; nothing of their size is made besides.

    NaN and infinity raise (``require_finite``).
    """
    x = x.detach()
    out, largest = torch.empty_like(x, dtype=at_least_float32(x)), x.new_empty(len(x), 1, dtype=at_least_float32(x))
    for part in parts_of(x):
        rows = out[part].copy_(x[part])
        most = torch.amax(rows.abs(), 1, keepdim=True, out=largest[part])
        rows.div_(torch.where(most == 0, 1, most))
        norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        rows.div_(torch.where(norm == 0, 1, norm).div_(length))
    require_finite(largest, name, what)
    return out


def similarity(x: Tensor, name: str, what: str) -> Tensor:
    """(N, N) cosines of rows (N, D) in steps of 2^-18 (2^-30 in float64), before they are rounded to whole ones.

    NaN and infinity raise (``require_finite``).
    """
    return gram(unit_rows(x, name, what, steps(x.dtype) ** 0.5))


def gram(rows: Tensor) -> Tensor:
    """(N, N) products of rows (N, D) with each other: one half is multiplied, the other is its mirror image."""
    n = len(rows)
    out = rows.new_empty(n, n)
    with torch.autocast(rows.device.type, enabled=False), full_float32(rows.device.type):
        for start in range(0, n, BLOCK):
            end = min(start + BLOCK, n)
            torch.mm(rows[start:end], rows[start:].T, out=out[start:end, start:])
            out[end:, start:end] = out[start:end, end:].T
    return out


def gram_flops(n: int, d: int) -> int:
    """FLOPs of ``gram``."""
    return sum(2 * min(BLOCK, n - start) * (n - start) * d for start in range(0, n, BLOCK))
