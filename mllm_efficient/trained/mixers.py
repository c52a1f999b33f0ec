"""Token mixers: what a projector may do to the tower's grid before it pools it. Each maps (B, D, h, w) to the same shape, of any h and w.

Every mixer is a residual whose branch begins at zero, so that a projector with one starts as the projector without. They are the token
mixing of the papers alone: what mixes channels there (an MLP) is the projector behind them here. Batch norms are layer norms, so that a
picture's tokens depend on no other picture.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compressors.mixing import DW_KERNEL, RAFT_EXPANSION, RAFT_SLOTS, SHIFTS, STRIP_PATCHES, heads_of, require_width, stripe


class ChannelNorm(nn.LayerNorm):
    """A layer norm over the channels of (B, D, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def zeroed(layer: nn.Module) -> nn.Module:
    """A layer that begins at zero, so that the residual around it does nothing yet."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class PoolMixer(nn.Module):
    """x + s (mean of the 3 x 3 neighbourhood - n), n = norm(x), padding not counted; s of each channel begins at 0.

    Source: PoolFormer (arXiv 2111.11418); its norm has the mean and variance of all tokens and channels of a picture.
    """

    def __init__(self, width: int, side: int):
        super().__init__()
        self.norm, self.scale = nn.GroupNorm(1, width), nn.Parameter(torch.zeros(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x.contiguous())  # torch 2.13's group norm does not train on every memory format
        return x + self.scale * (F.avg_pool2d(n, 3, 1, 1, count_include_pad=False) - n)


class RaftMixer(nn.Module):
    """One two-layer perceptron over all rows and two slots of channels, shared by all columns; then one over the columns.

    Channels are (2, D / 2), slots first. The grid is resampled (bicubic) to the trained side x side, and what mixing changed back.
    Source: RaftMLP (arXiv 2108.04384), r = e = 2. It resamples the tokens themselves, which blurs them.
    """

    def __init__(self, width: int, side: int):
        super().__init__()
        require_width("raft", width, RAFT_SLOTS)
        self.side, n = side, RAFT_SLOTS * side
        self.norms = nn.ModuleList(ChannelNorm(width) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(n, RAFT_EXPANSION * n) for _ in range(2))
        self.down = nn.ModuleList(zeroed(nn.Linear(RAFT_EXPANSION * n, n)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        size, trained = x.shape[2:], (self.side, self.side)
        small = x if size == trained else F.interpolate(x, trained, mode="bicubic", align_corners=False)
        mixed = small
        for axis in (0, 1):  # rows, then columns
            n = self.norms[axis](mixed).unflatten(1, (RAFT_SLOTS, -1))  # (B, r, c, h, w)
            n = n.permute(0, 2, 4, 1, 3) if axis == 0 else n.permute(0, 2, 3, 1, 4)  # (B, c, other, r, mixed)
            n = self.down[axis](F.gelu(self.up[axis](n.flatten(3)))).unflatten(3, (RAFT_SLOTS, self.side))
            mixed = mixed + (n.permute(0, 3, 1, 4, 2) if axis == 0 else n.permute(0, 3, 1, 2, 4)).flatten(1, 2)
        change = mixed - small
        return x + (change if size == trained else F.interpolate(change, size, mode="bicubic", align_corners=False))


class StripMixer(nn.Module):
    """Half of the channels mix along whole rows, then along whole columns; the other half in strips of 3 x 7 and 7 x 3.

    A row is mixed by weights of the distance between two places, from three neighbouring rows, in D / 8 groups that four patches of
    channels share. side: distances from which on the weight is the last one. Source: Strip-MLP (arXiv 2307.11458), whose weights are
    of pairs of places of one trained square grid, beside a table of relative positions, which these weights are.
    """

    def __init__(self, width: int, side: int):
        super().__init__()
        require_width("strip", width, 2 * STRIP_PATCHES)
        half, groups, self.side = width // 2, width // 2 // STRIP_PATCHES, side
        self.first = nn.Sequential(
            ChannelNorm(width), nn.GELU(), nn.Conv2d(width, width, 3, 1, 1, groups=width), nn.Conv2d(width, width, 1), ChannelNorm(width),
            nn.GELU(),
        )  # fmt: skip
        self.tables = nn.ParameterList(nn.Parameter(torch.randn(groups, 3, 2 * side - 1) / (6 * side) ** 0.5) for _ in range(2))
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(groups)) for _ in range(2))
        self.back = nn.Sequential(nn.Conv2d(width, half, 1), ChannelNorm(half), nn.GELU())
        self.whole = nn.Conv2d(width, half, 1)
        self.strips = nn.ModuleList(nn.Conv2d(half, half, k, padding=(k[0] // 2, k[1] // 2), groups=half) for k in ((3, 7), (7, 3)))
        self.weigh = nn.Sequential(nn.Linear(half, half // 2), nn.GELU(), nn.Linear(half // 2, 3 * half))
        self.last = zeroed(nn.Conv2d(width, width, 1))

    def along(self, x: Tensor, axis: int) -> Tensor:
        """(B, D / 2, h, w) mixed along its rows (0) or columns (1)."""
        n = x.shape[3 - axis]
        far = torch.arange(1 - n, n, device=x.device).clamp(1 - self.side, self.side - 1) + self.side - 1
        kernel = self.tables[axis][:, None, :, far]  # (groups, 1, 3, 2n - 1)
        kernel, padding = (kernel, (1, n - 1)) if axis == 0 else (kernel.transpose(2, 3), (n - 1, 1))
        patches = x.unflatten(1, (STRIP_PATCHES, -1)).flatten(0, 1)
        return F.conv2d(patches, kernel, self.biases[axis], padding=padding, groups=len(kernel)).view_as(x)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).chunk(2, 1)
        rows = self.back(torch.cat([a, self.along(a, 0)], 1))
        a = self.whole(torch.cat([a, self.along(rows, 1)], 1))
        share = self.weigh(b.mean((2, 3))).unflatten(1, (3, -1)).softmax(1)[..., None, None]
        b = share[:, 0] * self.strips[0](b) + share[:, 1] * self.strips[1](b) + share[:, 2] * b
        return x + self.last(torch.cat([a, b], 1))


class ShiftMixer(nn.Module):
    """Five groups of channels, shifted by -2 to 2 along the width and, a second copy, along the height; each filtered depth-wise.

    The kernel grows with the distance (5, 3, 1, 3, 5); what a shift brings in is zero, and a grid of few places is shifted less. Both
    copies are added, normalised and go through one linear layer. Source: MS-MLP (arXiv 2202.06510), whose code lets kernels grow with
    the signed shift and shifts around the border; its two-layer channel MLP is one layer here.
    """

    def __init__(self, width: int, side: int):
        super().__init__()
        require_width("shift", width, 1, least=len(SHIFTS))
        self.sizes = [len(part) for part in torch.arange(width).tensor_split(len(SHIFTS))]
        self.filters = nn.ModuleList(
            nn.Conv2d(n, n, 1 + 2 * abs(d), 1, abs(d), groups=n) for _ in range(2) for n, d in zip(self.sizes, SHIFTS)
        )  # fmt: skip
        self.norm, self.last = ChannelNorm(width), zeroed(nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for axis, filters in ((3, self.filters[: len(SHIFTS)]), (2, self.filters[len(SHIFTS) :])):
            parts = zip(filters, x.split(self.sizes, 1), SHIFTS)
            total = total + torch.cat([each(shifted(part, d, axis)) for each, part, d in parts], 1)
        return x + self.last(self.norm(total))


def shifted(x: Tensor, by: int, axis: int) -> Tensor:
    """x moved to higher places of an axis, at most by less than half of it; what comes in is zero."""
    most = (x.shape[axis] - 1) // 2
    by = max(-most, min(most, by))
    out = torch.zeros_like(x)
    n = x.shape[axis] - abs(by)
    out.narrow(axis, max(by, 0), n).copy_(x.narrow(axis, max(-by, 0), n))
    return out


class CswMixer(nn.Module):
    """Attention in vertical stripes for half of the heads and in horizontal ones for the others; values also filtered 3 x 3.

    A stripe is as wide as a quarter of the side. A last narrower one is filled up, and nothing attends to what fills it. The filter on the
    values stays inside its stripe. Source: CSWin (arXiv 2107.00652) with its locally-enhanced positional encoding.
    """

    def __init__(self, width: int, side: int):
        super().__init__()
        require_width("csw", width, heads_of(width))
        self.heads = heads_of(width) // 2  # of each direction
        self.norm, self.qkv, self.last = nn.LayerNorm(width), nn.Linear(width, 3 * width), zeroed(nn.Linear(width, width))
        self.local = nn.ModuleList(nn.Conv2d(width // 2, width // 2, 3, 1, 1, groups=width // 2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x.movedim(1, -1))).unflatten(-1, (3, 2, -1))  # (B, h, w, 3, 2, D / 2)
        down = self.within(qkv[..., 0, :], self.local[0])
        across = self.within(qkv[..., 1, :].transpose(1, 2), self.local[1]).transpose(1, 2)
        return x + self.last(torch.cat([down, across], -1)).movedim(-1, 1)

    def within(self, qkv: Tensor, local: nn.Module) -> Tensor:
        """(B, h, w, 3, d) -> (B, h, w, d): attention inside stripes of columns."""
        b, h, w = qkv.shape[:3]
        wide = stripe(w)
        stripes = -(-w // wide)
        qkv = F.pad(qkv, (0, 0, 0, 0, 0, stripes * wide - w)).unflatten(2, (stripes, wide)).transpose(1, 2).flatten(0, 1)
        filled = (torch.arange(stripes * wide, device=qkv.device) >= w).view(stripes, 1, wide).expand(-1, h, -1).reshape(stripes, 1, 1, -1)
        q, k, v = (
            qkv[..., i, :].flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2) for i in range(3)
        )  # (B s, heads, h wide, d)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        out = scores.masked_fill(filled.repeat(b, 1, 1, 1), float("-inf")).softmax(-1) @ v
        out = out.transpose(1, 2).flatten(2).unflatten(1, (h, wide)) + local(qkv[..., 2, :].movedim(-1, 1)).movedim(1, -1)
        return out.unflatten(0, (b, stripes)).transpose(1, 2).flatten(2, 3)[:, :, :w]


class DwConvMixer(nn.Module):
    """x + a depth-wise 5 x 5 filter of norm(x) + s (its maximum over 3 x 3 - norm(x)); filter and s begin at 0.

    Source: Max-Former (arXiv 2505.18608): depth-wise filters in place of early attention, and maxima, which keep high frequencies. There
    the maximum is part of the downsampling, and neurons spike.
    """

    def __init__(self, width: int, side: int):
        super().__init__()
        self.norm, self.scale = ChannelNorm(width), nn.Parameter(torch.zeros(width, 1, 1))
        self.filter = zeroed(nn.Conv2d(width, width, DW_KERNEL, 1, DW_KERNEL // 2, groups=width))

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        return x + self.filter(n) + self.scale * (F.max_pool2d(n, 3, 1, 1) - n)


MIXERS: dict[str, type[nn.Module]] = {
    "pool": PoolMixer, "raft": RaftMixer, "strip": StripMixer, "shift": ShiftMixer, "csw": CswMixer, "dwconv": DwConvMixer,
}  # fmt: skip
