"""VScan: tokens by early attention window by window, then by late attention anywhere; the rest merged into them."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..errors import BadSettingError, CountMismatchError
from ..lazy import torch
from ..registry import register
from ..tokens import Grid, VisualTokens
from .math.cosine import finite
from .selector import Selector

if TYPE_CHECKING:
    from torch import Tensor


@register("vscan")
@dataclass(frozen=True, kw_only=True)
class VScan(Selector):
    """Half of the tokens from all over the image, half wherever the tower looks; nothing is thrown away. Without a query.

    Source: VScan (TMLR 2026, arXiv 2505.22654) and its code. Rule: K / 2 tokens (rounded down) by the class token's attention in an early
    block, from windows of the grid, at most K / 2 over the number of windows (rounded up) from each; the others by that of the layer whose
    output the model takes, the last but one of LLaVA-1.5. Every other token is merged into the kept one most like it (``merge=mean``, see
    ``Selector``: sums are divided by how many there are).
    window: tokens along a side, the paper's 6 of LLaVA-1.5's grid of 24; its code for Qwen2.5-VL takes 4. Rows and columns that fill no
    window belong to the last one, as there. Where the windows cannot give K / 2 the rest is by late attention. Windows are laid over every
    rectangle of an image of several views or a video, K is shared by all. The early block is a quarter of the way up the tower, the sixth
    of CLIP's 24, or of a tower of windows the first that sees the whole image, the eighth of Qwen2.5-VL's 32. A tower without a class token
    gives the mean attention that a token receives.
    The paper's second stage drops two thirds inside the decoder by the last token's attention, at layer 16 of LLaVA-1.5-7B, 14 of
    Qwen2.5-VL-7B: ``vscan:tokens=96 | fastv:layer=16,ratio=0.333333`` is its average of 64, ``tokens=192`` and ``288`` its 128 and 192.
    Ties go to the lowest index. NaN or infinity raises. O(N log N), and merging.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention", "early_attention"})
    paper: ClassVar[str] = "arXiv 2505.22654"

    window: int = 6
    merge: str | None = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1:
            raise BadSettingError(f"vscan: window={self.window!r} is not a whole number of at least 1")

    def select(self, v: VisualTokens, k: int) -> Tensor:  # type: ignore[override]
        assert v.attention is not None and v.early_attention is not None
        grids = v.grids if v.grid is None else (v.grid,)
        if grids is None or sum(math.prod(grid) for grid in grids) != len(v):
            raise CountMismatchError("vscan lays windows over the token grid, and these tokens come with none: give VisualTokens a grid")
        early, late = (finite(a, self.name, "attentions") for a in (v.early_attention, v.attention))
        windows, sizes = windows_of(grids, self.window)
        local = from_windows(early, torch.tensor(windows, device=early.device), sizes, k // 2)
        rest = late.index_fill(0, local, float("-inf")).sort(descending=True, stable=True).indices
        return torch.cat([local, rest[: k - len(local)]])


@functools.lru_cache(maxsize=64)
def windows_of(grids: tuple[Grid, ...], side: int) -> tuple[list[int], list[int]]:
    """The number of the window that each token of the grids is in, and how many tokens each window has."""
    out, before = list[int](), 0
    for rows, columns in grids:
        down, across = max(1, rows // side), max(1, columns // side)
        down_to, across_to = ([min(i // side, n - 1) for i in range(length)] for length, n in ((rows, down), (columns, across)))
        out += [before + r * across + c for r in down_to for c in across_to]
        before += down * across
    sizes = [0] * before
    for window in out:
        sizes[window] += 1
    return out, sizes


def from_windows(scores: Tensor, window: Tensor, sizes: list[int], share: int) -> Tensor:
    """Indices of the ``share`` highest of scores (N,), as many from each window as from another at most, fewer where that is all.

    window: (N,) the number of each token's window, sizes: tokens of each.
    """
    limit = -(-share // len(sizes))
    order = scores.sort(descending=True, stable=True).indices
    by_window = window[order].sort(stable=True).indices  # places in ``order``, window by window, each by score
    starts = torch.tensor([sum(sizes[:i]) for i in range(len(sizes))], device=scores.device)
    rank = torch.empty_like(order)
    rank[by_window] = torch.arange(len(order), device=scores.device) - starts[window[order][by_window]]
    first = (rank < limit).to(torch.uint8).sort(descending=True, stable=True).indices
    return order[first[: min(share, sum(min(limit, size) for size in sizes))]]
