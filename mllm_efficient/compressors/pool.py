"""Adaptive pooling of the token grid to a smaller one: average, maximum, generalised mean (GeM), group generalised mean (GGeM)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..budget import fit_grid
from ..errors import BadSettingError, CountMismatchError
from ..lazy import torch
from ..registry import register
from ..tokens import CompressedTokens, VisualTokens
from .math.finite import require_finite
from .merger import Merger

if TYPE_CHECKING:
    from torch import Tensor

OPS = ("avg", "max", "gem", "ggem")
EPS = 1e-6  # what features below it are raised to before a power is taken, as GeM's authors do
P = 3.0  # GeM's usual power


@dataclass(frozen=True, kw_only=True)
class Pooling(Merger):
    """Pools rectangles of tokens, channel by channel.

    op: "avg", "max", "gem" (Radenovic et al., arXiv 1711.02512) or "ggem" (Ko et al., arXiv 2212.04114): the p-th root of
    the mean of x^p, in GGeM with a power of its own for each of several equal groups of neighbouring channels. A power of
    1 is the mean, a growing one tends to the maximum. Powers are of positive numbers, so gem and ggem raise every feature
    to at least 1e-6 first, as published for features after a ReLU; projected tokens are negative in about half of their
    channels, all of which become 1e-6 where a whole cell is negative. Computed by logarithms in float32, or in float64
    for float64 input, so that no power overflows.
    p: the power of gem, 3 if left out; for ggem the powers of the groups, "1/3/5", as many as there are groups. The papers learn
    them; here they are given.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"grid"})
    channelwise: ClassVar[bool] = True

    op: str = "avg"
    p: float | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.op not in OPS:
            raise BadSettingError(f"{self.name}: op={self.op!r} is not one of {', '.join(map(repr, OPS))}")
        if self.op in ("avg", "max") and self.p is not None:
            raise BadSettingError(f"{self.name}: p={self.p!r} has no effect with op={self.op}: it is the power of gem and ggem")
        if self.op == "ggem" and (not isinstance(self.p, str) or "/" not in self.p):
            raise BadSettingError(f"{self.name}: op='ggem' needs the power of each group of channels, such as p=1/3/5, not p={self.p!r}")
        self.powers  # noqa: B018  (raises on a bad power)

    @property
    def powers(self) -> tuple[float, ...]:
        """The power of each group of channels; none of avg and max."""
        if self.op in ("avg", "max"):
            return ()
        given = [P if self.p is None else self.p] if self.op == "gem" else str(self.p).split("/")
        try:
            powers = tuple(float("nan" if isinstance(one, bool) or (self.op == "gem" and isinstance(one, str)) else one) for one in given)
        except ValueError:
            powers = (math.nan,)
        if not all(math.isfinite(one) and one > 0 for one in powers):
            like = "p=3" if self.op == "gem" else "p=1/3/5"
            raise BadSettingError(f"{self.name}: p={self.p!r} is not a power above 0 of {self.op}, such as {like}")
        return powers

    def pooled(self, v: VisualTokens, size: tuple[int, int]) -> Tensor:
        """Features (h * w, D) of adaptive pooling to (h, w). A grid of that size stays as it is."""
        x, grid = v.features, v.grid
        assert grid is not None
        if size == grid:
            return x
        if self.powers:
            return generalised_mean(self.name, x, grid, size, self.powers)
        pooling = torch.nn.functional.adaptive_avg_pool2d if self.op == "avg" else torch.nn.functional.adaptive_max_pool2d
        return pooling(x.T.reshape(1, x.shape[1], *grid), size).flatten(2)[0].T.contiguous()


@register("pool")
@dataclass(frozen=True, kw_only=True)
class Pool(Pooling):
    """Pools the projected tokens over a smaller grid: mean, maximum, or generalised mean (``op="avg", "max", "gem", "ggem"``). O(N D).

    The grid is the one with at most K cells that is nearest the image's aspect (``budget.fit_grid``), so the count
    can be below the budget: on a 12 x 12 grid K = 72 gives 8 x 9 = 72 tokens, and K = 18 gives 4 x 4 = 16. Where an
    image has several grids (anyres, video) each is pooled to its share of K. op and p are those of ``Pooling``; mode is
    op by its earlier name.
    """

    mode: str | None = None

    def __post_init__(self) -> None:
        if self.mode is not None:
            if self.op != "avg":
                raise BadSettingError(f"pool: op={self.op!r} and mode={self.mode!r} are two names of one setting: give op alone")
            object.__setattr__(self, "op", self.mode)
            object.__setattr__(self, "mode", None)
        super().__post_init__()

    def yields(self, k: int, grid: tuple[int, int] | None) -> int:
        h, w = self.target(grid, k)
        return h * w

    def target(self, grid: tuple[int, int] | None, k: int) -> tuple[int, int]:
        """The grid that a budget of k tokens gives."""
        if grid is None:
            raise CountMismatchError("pool needs the token grid, and these tokens form none")
        return fit_grid(grid, k)

    def merge(self, v: VisualTokens, k: int) -> CompressedTokens:
        size = self.target(v.grid, k)
        return CompressedTokens(self.pooled(v, size), grid=size)


def generalised_mean(name: str, x: Tensor, grid: tuple[int, int], size: tuple[int, int], powers: tuple[float, ...]) -> Tensor:
    """(h * w, D) in x's dtype: (mean of x^p)^(1/p) over each cell of adaptive pooling, one power for each group of channels."""
    n, width = x.shape
    if width % len(powers):
        raise BadSettingError(f"{name}: {width} channels do not divide into {len(powers)} equal groups, one for each power of p")
    require_finite(x, name, "visual tokens")
    full = torch.float64 if x.dtype == torch.float64 else torch.float32
    p = torch.tensor(powers, dtype=full).repeat_interleave(width // len(powers)).to(x.device)
    index = cells(grid, size).to(x.device)
    outside = index == n
    logs = x.to(full).clamp(min=EPS).log() * p
    members = logs[index.clamp(max=n - 1)].masked_fill(outside[..., None], float("-inf"))
    count = (~outside).sum(1, keepdim=True).to(full)
    return ((members.logsumexp(1) - count.log()) / p).exp().to(x.dtype)


def cells(grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """(h * w, most) the tokens in each cell of adaptive pooling from grid to size, filled up with rows * columns.

    Cell i of h covers the rows floor(i * rows / h) to ceil((i + 1) * rows / h) - 1, as torch's adaptive pooling does.
    """
    spans = []
    for side, parts in zip(grid, size):
        first = torch.arange(parts) * side // parts
        last = -(-(torch.arange(1, parts + 1) * side) // parts)
        places = first[:, None] + torch.arange(int((last - first).max()))
        spans.append(places.masked_fill(places >= last[:, None], -1))
    rows, columns = spans[0][:, None, :, None], spans[1][None, :, None, :]
    index = torch.where((rows >= 0) & (columns >= 0), rows * grid[1] + columns, grid[0] * grid[1])
    return index.flatten(2).flatten(0, 1)
