"""Work that a method shares between images that are alike: one loop on a GPU instead of one for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..errors import BadBudgetError
from ..tokens import VisualTokens

TOGETHER = 2**27  # entries in memory at a time: 512 MB of float32, 1 GB of float64


def pays(parts: Sequence[VisualTokens]) -> bool:
    """Whether sharing is worth it: on a GPU, where a loop's time is that of its launches. A CPU's is that of its sums."""
    return all(v.features.is_cuda for v in parts)


def alike(
    name: str, parts: Sequence[VisualTokens], ks: Sequence[int], entries: Callable[[int, int], int]
) -> Iterator[tuple[list[int], int]]:
    """Numbers of the parts that are alike in size, K, dtype and device, as many at a time as memory allows, and their K.

    entries: (n, d) -> the numbers that a part of n tokens of width d keeps in memory.
    """
    groups: dict[Any, list[int]] = {}
    for i, (v, k) in enumerate(zip(parts, ks)):
        if not 1 <= k <= len(v):
            raise BadBudgetError(f"{name}: {k} of {len(v)} tokens cannot be kept")
        groups.setdefault((v.features.shape, v.features.dtype, v.features.device, k), []).append(i)
    for ((n, d), *_, k), members in groups.items():
        most = max(1, TOGETHER // entries(n, d))
        yield from ((members[start : start + most], k) for start in range(0, len(members), most))
