"""Cosines between tokens: rows at unit length, and products in which copies tie."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ...lazy import torch
from .finite import require_finite
from .precision import full_float32

if TYPE_CHECKING:
    from torch import Tensor

IN_CACHE = 2**18  # entries that a CPU works on at a time, so that only the first look at them is at memory
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


def unit_rows(x: Tensor, name: str, what: str, length: float = 1.0) -> tuple[Tensor, Tensor]:
    """``unit`` of rows (N, D), in float32 or float64, at another length, a power of two; and their own lengths (N,), see ``lengths_of``.

    Nothing of their size is made but the result. NaN and infinity raise (``require_finite``).
    """
    x, full = x.detach(), at_least_float32(x)
    out, most, norm = torch.empty_like(x, dtype=full), x.new_empty(len(x), 1, dtype=full), x.new_empty(len(x), 1, dtype=full)
    spare = x.new_empty(0)
    for part in parts_of(x):
        given, rows = x[part], out[part]
        spare = torch.abs(given, out=spare[: len(given)])
        most[part] = spare.amax(1, keepdim=True)
        torch.div(given, torch.where(most[part] == 0, 1, most[part]), out=rows)
        norm[part] = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        rows.div_(torch.where(norm[part] == 0, 1, norm[part]).div_(length))
    require_finite(most, name, what)
    return out, lengths_of(most, norm)


def lengths_of(most: Tensor, norm: Tensor) -> Tensor:
    """(N,) lengths in float64, over the largest entry of all rows, from the largest (N, 1) of each and its length over that."""
    full = torch.float32 if most.device.type == "mps" else torch.float64
    return (most.to(full) / most.max().clamp(min=torch.finfo(most.dtype).tiny) * norm)[:, 0]


def similarity(x: Tensor, name: str, what: str) -> tuple[Tensor, Tensor]:
    """(N, N) cosines of rows (N, D) in steps of 2^-18 (2^-30 in float64), before they are rounded to whole ones; lengths of the rows (N,).

    NaN and infinity raise (``require_finite``).
    """
    rows, lengths = unit_rows(x, name, what, steps(x.dtype) ** 0.5)
    return gram(rows), lengths


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
