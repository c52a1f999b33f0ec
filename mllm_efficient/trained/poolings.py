"""Learned poolings of a projector: the tower's grid (B, D, h, w) to side x side tokens (B, side * side, D), of any h, w and side.

All but the generalised means with a power of their own to begin with, and the ordered tokens, begin at or near the plain average.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compressors.mixing import LOW_RANK, NARROW, QUERIES, TAP_BRANCHES, groups_of, question_rank, require_width
from ..compressors.pool import cells
from ..errors import CountMismatchError

EPS = 1e-6
REGION, REGION_POWER, POWER = 5, 2.5, 4.6  # of SuperGlobal: window and power of a region, power of the whole


def in_cells(plane: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """(B, side * side, most, D) what is in each cell of adaptive pooling, and (side * side, most, 1) what only fills one up."""
    index = cells((plane.shape[2], plane.shape[3]), (side, side)).to(plane.device)
    n = plane.shape[2] * plane.shape[3]
    return plane.flatten(2).transpose(1, 2)[:, index.clamp(max=n - 1)], (index == n)[..., None]


def power_mean(members: Tensor, outside: Tensor, p: Tensor) -> Tensor:
    """(mean of x^p)^(1/p) over the second but last dimension, of x raised to at least 1e-6. By logarithms, so that no power overflows."""
    logs = (members.float().clamp(min=EPS).log() * p).masked_fill(outside, float("-inf"))
    count = (~outside).sum(-2).to(logs)
    return ((logs.logsumexp(-2) - count.log()) / p).exp()


def positive(raw: Tensor) -> Tensor:
    return F.softplus(raw) + 1e-2


def raw_of(value: float, n: int) -> nn.Parameter:
    """n parameters of which ``positive`` makes the value."""
    return nn.Parameter(torch.full((n,), math.log(math.expm1(value - 1e-2))))


class Tap(nn.Module):
    """Each token becomes a weighted mean of itself and of its 3 x 3 neighbourhoods at distances 1, 2 and 3, then cells are averaged.

    The weights are made of the token's own neighbourhood. Beyond the border nothing is counted, and a token begins at 0.95 of itself.
    Source: TAP (arXiv 2303.11126), which counts zeros beyond the border and feeds attention.
    """

    def __init__(self, width: int, queries: int = QUERIES):
        super().__init__()
        self.first, self.norm = nn.Conv2d(width, TAP_BRANCHES, 3, 1, 1, bias=False), nn.LayerNorm(TAP_BRANCHES)
        self.second = nn.Conv2d(TAP_BRANCHES, TAP_BRANCHES, 3, 1, 1)
        with torch.no_grad():
            self.second.weight.zero_()
            self.second.bias.copy_(torch.tensor([4.0, 0.0, 0.0, 0.0]))  # type: ignore[union-attr]

    def forward(self, plane: Tensor, side: int) -> Tensor:
        weights = self.second(self.norm(self.first(plane).movedim(1, -1)).movedim(-1, 1)).softmax(1)
        out = weights[:, :1] * plane
        inside = torch.ones_like(plane[:1, :1])
        for distance in range(1, TAP_BRANCHES):
            mean = neighbours(plane, distance) / neighbours(inside, distance)
            out = out + weights[:, distance : distance + 1] * mean
        return F.adaptive_avg_pool2d(out, side).flatten(2).transpose(1, 2)


def neighbours(x: Tensor, distance: int) -> Tensor:
    """The sum of the 3 x 3 places at steps of a distance, nothing beyond the border."""
    for axis in (2, 3):
        total, n = x.clone(), x.shape[axis]
        if n > distance:
            total.narrow(axis, 0, n - distance).add_(x.narrow(axis, distance, n - distance))
            total.narrow(axis, distance, n - distance).add_(x.narrow(axis, 0, n - distance))
        x = total
    return x


class AttSets(nn.Module):
    """Sum of a set's elements under a softmax over them, channel by channel, of one linear layer: W = 0 is their average.

    ``aggregate`` takes any set, in any order: the tokens of a cell, one place in the frames of a video or in several views of a picture.
    Above 1,152 channels W has rank 64. Source: AttSets (arXiv 1808.00758).
    """

    def __init__(self, width: int, queries: int = QUERIES):
        super().__init__()
        narrow = width <= NARROW
        self.down = nn.Identity() if narrow else nn.Linear(width, LOW_RANK, bias=False)
        self.score = nn.Linear(width if narrow else LOW_RANK, width, bias=False)
        nn.init.zeros_(self.score.weight)

    def aggregate(self, members: Tensor, outside: Tensor | None = None, scores: Tensor | None = None) -> Tensor:
        """(..., n, D) -> (..., D). outside: (..., n, 1), what is no member."""
        scores = self.score(self.down(members)) if scores is None else scores
        scores = scores if outside is None else scores.masked_fill(outside, float("-inf"))
        return (scores.softmax(-2) * members).sum(-2)

    def forward(self, plane: Tensor, side: int) -> Tensor:
        scores = self.score(self.down(plane.movedim(1, -1))).movedim(-1, 1)  # once for a token, of however many cells it is
        members, outside = in_cells(plane, side)
        return self.aggregate(members, outside, in_cells(scores, side)[0])


class Question(nn.Module):
    """Sum of a cell's tokens under a softmax over them, channel by channel, of what token and question say together.

    Both go through a linear layer and a tanh into a space of min(D, 256) channels and are multiplied there; a last layer, which
    begins at zero, the average, makes a score for each channel of the products. The question is the mean of the text's embeddings,
    normalised. Source: low-rank bilinear attention (MLB), one of the fusions that "On Bilinear Pooling in Video-QA" (arXiv 2012.10285)
    compares, there of whole videos; without its normalisation of the products.
    """

    def __init__(self, width: int, outputs: int):
        super().__init__()
        rank = question_rank(width)
        self.token, self.norm, self.text = nn.Linear(width, rank), nn.LayerNorm(outputs), nn.Linear(outputs, rank)
        self.score = nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.score.weight)

    def forward(self, plane: Tensor, side: int, text: Sequence[Tensor]) -> Tensor:
        """text: (T, outputs) of each picture of the batch."""
        question = torch.stack([words.mean(0) for words in text]).to(plane)
        together = self.token(plane.movedim(1, -1)).tanh() * self.text(self.norm(question)).tanh()[:, None, None]
        members, outside = in_cells(plane, side)
        scores = in_cells(self.score(together).movedim(-1, 1), side)[0].masked_fill(outside, float("-inf"))
        return (scores.softmax(-2) * members).sum(-2)


class Ggem(nn.Module):
    """The generalised mean of each cell with a learned power for every 64 channels, which begins at 1, the average.

    Powers are of positive numbers: a channel's minimum over the picture is taken off and put back. Source: GGeM (arXiv 2212.04114); the
    minimum as SuperGlobal does it (arXiv 2308.06954).
    """

    def __init__(self, width: int, queries: int = QUERIES):
        super().__init__()
        require_width("ggem", width, groups_of(width))
        self.power, self.each = raw_of(1.0, groups_of(width)), width // groups_of(width)

    def forward(self, plane: Tensor, side: int) -> Tensor:
        least = plane.amin((2, 3), keepdim=True)
        members, outside = in_cells(plane - least, side)
        pooled = power_mean(members, outside, positive(self.power).repeat_interleave(self.each))
        return pooled.to(plane) + least.flatten(2).transpose(1, 2)


class RegionalGem(nn.Module):
    """The mean of each token and of the generalised mean of its 5 x 5 region, then the generalised mean of each cell; powers learned.

    They begin at 2.5 and 4.6. Regions are reflected at the border (a side of one or two is repeated). A channel's minimum is taken off
    and put back. Source: SuperGlobal (arXiv 2308.06954), where nothing is learned.
    """

    def __init__(self, width: int, queries: int = QUERIES):
        super().__init__()
        self.region, self.power = raw_of(REGION_POWER, 1), raw_of(POWER, 1)

    def forward(self, plane: Tensor, side: int) -> Tensor:
        least = plane.amin((2, 3), keepdim=True)
        x = (plane - least).float().clamp(min=EPS)
        r = REGION // 2
        mode = "reflect" if min(x.shape[2:]) > r else "replicate"
        p = positive(self.region)
        region = F.avg_pool2d(F.pad(x.pow(p), (r, r, r, r), mode=mode), REGION, 1).pow(1 / p)
        members, outside = in_cells((x + region) / 2, side)
        return power_mean(members, outside, positive(self.power)).to(plane) + least.flatten(2).transpose(1, 2)


class Prefix(nn.Module):
    """Ordered tokens: learned queries attend to the grid, and the first so many of them are the answer, whichever number that is.

    A query's weights are a softmax of what it says of a token's content, learned from nothing, and of its place, (y, x, y^2, x^2) in
    [0, 1], of every 64 channels: it begins as a Gaussian around a cell's centre, cells ordered from coarse to fine (1, 2 x 2, 3 x 3 ...).
    The n-th token does not depend on how many are asked for. Trained with the number drawn for every batch.
    Source: One-D-Piece (arXiv 2501.10064) for the tail that is dropped; its tokens are latents of a transformer.
    """

    def __init__(self, width: int, queries: int = QUERIES):
        super().__init__()
        self.heads = groups_of(width)
        require_width("prefix", width, self.heads)
        self.norm, self.key = nn.LayerNorm(width), nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.key.weight)
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.place = nn.Parameter(coarse_to_fine(queries).repeat(self.heads, 1, 1))

    def forward(self, plane: Tensor, side: int) -> Tensor:
        return self.first(plane, side * side)

    def first(self, plane: Tensor, count: int) -> Tensor:
        """(B, count, D), the first so many tokens."""
        if not 1 <= count <= len(self.queries):
            raise CountMismatchError(f"{count} tokens of ordered ones that are {len(self.queries)}: 1 to {len(self.queries)}")
        h, w = plane.shape[2:]
        x = plane.flatten(2).transpose(1, 2)
        key = self.key(self.norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        query = self.queries[:count].unflatten(-1, (self.heads, -1)).transpose(0, 1) * key.shape[-1] ** -0.5
        y, z = ((torch.arange(n, device=x.device) + 0.5) / n for n in (h, w))
        y, z = y[:, None].expand(h, w).flatten(), z.expand(h, w).flatten()
        place = self.place[:, :count].float()
        near = sum(place[..., i, None] * part for i, part in enumerate((y, z, y * y, z * z)))  # (heads, count, N)
        weights = (query.expand(len(x), -1, -1, -1) @ key.transpose(-1, -2) + near).softmax(-1).to(x)
        return (weights @ x.unflatten(-1, (self.heads, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)


def coarse_to_fine(queries: int) -> Tensor:
    """(queries, 4) coefficients of (y, x, y^2, x^2) of the logarithm of a Gaussian as wide as half a cell, around its centre."""
    out, level = list[tuple[float, ...]](), 1
    while len(out) < queries:
        sharp = (2 * level) ** 2 / 2
        for i in range(level):
            for j in range(level):
                out.append((2 * sharp * (i + 0.5) / level, 2 * sharp * (j + 0.5) / level, -sharp, -sharp))
        level += 1
    return torch.tensor(out[:queries])


POOLERS: dict[str, type[nn.Module]] = {"tap": Tap, "attsets": AttSets, "ggem": Ggem, "regional_gem": RegionalGem, "prefix": Prefix}
