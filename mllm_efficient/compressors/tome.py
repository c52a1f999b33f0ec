"""ToMe: the most similar tokens merged pair by pair, by bipartite soft matching, in the tower or after the projector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import BadBudgetError, BadSettingError, UnsupportedModelError
from ..lazy import torch
from ..registry import register
from ..tokens import CompressedTokens, VisualTokens
from .divprune import full_float32
from .in_tower import Heads, Run
from .math.cosine import at_least_float32, gram_flops, steps, unit
from .math.finite import require_finite
from .math.sums import group_sums
from .merger import Merger

if TYPE_CHECKING:
    from torch import Tensor

BLOCKS = 24


@register("tome")
@dataclass(frozen=True, kw_only=True)
class ToMe(Merger):
    """Bipartite soft matching, round after round, until exactly K are left: in the tower, or of the projected tokens.

    Source: ToMe (Bolya et al., ICLR 2023, arXiv 2210.09461).
    Rule of a round: tokens in their order go alternately to A (first) and B; each of A is linked to the token of B with
    the largest cosine; the r strongest links merge, each into its token of B, by the mean weighted with the number of
    original tokens in each.
    at: "tower" merges as the paper does, one round in each block between attention and MLP, matched by the mean of the heads'
    keys; from then on attention is proportional to size (the logarithm of the size is added to the logits), the class token is in
    A and never merges, and the next round's order is what is left of A, then B. The tower gets cheaper too, and stops at the layer
    whose output the model takes. LLaVA-1.5, InternVL and Cohere2 Vision have such a tower; tiles of other families are packed by their
    places. Where the projector puts 2 x 2 patches together, these merge as one, matched by the mean of their keys, each patch with the
    one at its place in the other; every tile has its share of K.
    "projector" (the default) has no keys and no later blocks: tokens are matched by their features, all merging is done at once, and
    a merged token stands where its token of B stood. Either way the language model gets them by the places of B.
    r: pairs in a round; left out, as many as leave K tokens after 24 rounds, the blocks of CLIP's ViT-L, or in the tower
    the fewest that leave K after its blocks. A round merges at most half of its tokens, whatever r is, and the last one what is
    left to do.
    Equal cosines go to the lowest index; they are compared to 2^-18 (2^-30 in float64), because the last bits of the
    cosines of copies depend on where they stand. A zero row has cosine 0 to everything. NaN or infinity raises. float32,
    or float64 for float64 input. O(N^2 D) a round, which the images of a call that are of one size share on a CUDA device. On a CPU
    after the projector O(N^2 D) once: the products of a merged token are the sums of its tokens' products (``math.matching``).
    """

    paper: ClassVar[str] = "arXiv 2210.09461"
    shares_work = True

    r: int | None = None
    at: str = "projector"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r is not None and (isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1):
            raise BadSettingError(f"tome: r={self.r!r} is not a whole number of pairs of at least 1")
        if self.at not in ("projector", "tower"):
            raise BadSettingError(f"tome: at={self.at!r} is not one of 'projector', 'tower'")

    @property
    def in_tower(self) -> bool:
        return self.at == "tower"

    def rounds(self, n: int, k: int) -> list[int]:
        """Pairs that each round merges on the way from n tokens to k."""
        out, most = list[int](), self.r or -((k - n) // BLOCKS)
        while n > k:
            out.append(min(n - k, n // 2, most))
            n -= out[-1]
        return out

    def in_blocks(self, n: int, k: int, blocks: int) -> tuple[int, ...]:
        """Pairs that each of so many blocks of a tower merges. Raises ``BadBudgetError`` where that cannot leave k."""
        for most in [self.r] if self.r is not None else range(-((k - n) // blocks), n):
            left, out = n, list[int]()
            for _ in range(blocks):
                out.append(min(left - k, left // 2, most))
                left -= out[-1]
            if left == k:
                return tuple(out)
        said = f"r={self.r} pairs" if self.r is not None else "half of the tokens"
        raise BadBudgetError(
            f"tome: {said} in each of {blocks} blocks leave {left} of {n} tokens, not {k}: ask for more tokens or a larger r"
        )

    def block_flops(self, n: int, width: int, heads: int, run: Run, block: int) -> tuple[int, int, int]:
        """The product of A's keys with B's. Tokens merge before the MLP."""
        pairs, tokens = run.rounds[block], run.first + (n - run.first) // run.unit
        left = n - pairs * run.unit
        return (2 * ((tokens + 1) // 2) * (tokens // 2) * (width // heads) if pairs else 0), left, left

    def steps(self, run: Run, x: Tensor) -> Merging:
        return Merging(run, x)

    def flops(self, n: int, d: int, k: int) -> int:
        """The products of all tokens; those in the tower are in its own FLOPs. (A GPU has those of A with B in every round.)"""
        return gram_flops(n, d) if k < n and not self.in_tower else 0

    def merge(self, v: VisualTokens, k: int) -> CompressedTokens:
        if self.in_tower or k >= len(v) or v.features.device.type != "cpu":
            return self.compress_batch([v], k)[0]
        from .math.matching import grouped

        group = grouped(v.features, self.rounds(len(v), k), self.name)
        full = at_least_float32(v.features)
        with torch.autocast("cpu", enabled=False):
            sums, parts = group_sums(v.features.to(full), group, k)
            return CompressedTokens((sums / parts[:, None]).to(v.features.dtype))

    def compress_batch(self, parts: list[VisualTokens], k: int) -> list[CompressedTokens]:
        """The rounds of all at once."""
        if self.in_tower:
            raise UnsupportedModelError("tome: at='tower' merges inside a model's tower, and here are tokens alone: leave at= out")
        if k >= len(parts[0]):
            return [CompressedTokens(v.features, grid=v.grid) for v in parts]
        return [CompressedTokens(row) for row in self._merged(parts, k)]

    def batch_entries(self, n: int, d: int) -> int:
        return n * n + 3 * n * d

    def _merged(self, some: list[VisualTokens], k: int) -> Tensor:
        """(B, K, D) of images that are alike in size."""
        dtype = some[0].features.dtype
        full = at_least_float32(some[0].features)
        device = some[0].features.device.type
        with torch.autocast(device, enabled=False), full_float32(device):
            x = torch.stack([v.features.to(full) for v in some])
            require_finite(x, self.name, "visual tokens")
            size = torch.ones_like(x[..., :1])
            for pairs in self.rounds(x.shape[1], k):
                into, stays = match(x.detach(), pairs)
                x, size = merged(x, size, into, stays.sort(1).values)
        return x.to(dtype)


class Merging:
    """ToMe on one run of a tower. Tokens are their patches side by side; a class token, in front, is its own beside nothing."""

    kept = None

    def __init__(self, run: Run, x: Tensor):
        self.run = run
        self.size: Tensor | None = None
        self.where = torch.arange(run.first + (x.shape[1] - run.first) // run.unit, device=x.device).repeat(len(x), 1)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """Attention proportional to size."""
        return None if self.size is None else self._by_patch(self.size).log().to(dtype)[:, None, None]

    def after_attention(self, block: int, x: Tensor, heads: Heads) -> Tensor:
        pairs, run = self.run.rounds[block], self.run
        if not pairs:
            return x
        full = torch.float64 if x.dtype == torch.float64 else torch.float32
        device = "cpu" if x.is_meta else x.device.type
        with torch.autocast(device, enabled=False), full_float32(device):
            keys = self._tokens(heads.k.detach().mean(1), "mean")
            into, stays = match(keys.to(full), pairs, run.first)
            tokens = self._tokens(x, "side by side").to(full)
            size = torch.ones_like(tokens[..., :1]) if self.size is None else self.size
            tokens, self.size = merged(tokens, size, into, stays)
        self.where = self.where.gather(1, stays)
        return self._patches(tokens).to(x.dtype)

    def after_block(self, block: int, x: Tensor, heads: Heads) -> Tensor:
        return x

    def done(self, x: Tensor) -> Tensor:
        tokens, order = self._tokens(x, "side by side"), self.where.argsort(1)
        return self._patches(tokens.gather(1, order[..., None].expand_as(tokens)))

    def _tokens(self, x: Tensor, how: str) -> Tensor:
        """(views, tokens, ...) of (views, patches, d): the mean of each token's patches, or their rows side by side."""
        run = self.run
        if run.unit == 1:
            return x
        first, patches = x[:, : run.first], x[:, run.first :].unflatten(1, (-1, run.unit))
        if how == "mean":
            return torch.cat([first, patches.mean(2)], 1)
        return torch.cat([torch.nn.functional.pad(first, (0, (run.unit - 1) * x.shape[2])), patches.flatten(2)], 1)

    def _patches(self, tokens: Tensor) -> Tensor:
        """The inverse of rows side by side."""
        run = self.run
        if run.unit == 1:
            return tokens
        width = tokens.shape[2] // run.unit
        return torch.cat([tokens[:, : run.first, :width], tokens[:, run.first :].unflatten(2, (run.unit, width)).flatten(1, 2)], 1)

    def _by_patch(self, size: Tensor) -> Tensor:
        """(views, patches) of sizes (views, tokens, 1)."""
        run = self.run
        return torch.cat([size[:, : run.first, 0], size[:, run.first :, 0].repeat_interleave(run.unit, 1)], 1)


def blocks_of(layers: int, layer: Any) -> int:
    """How many of a tower's blocks run before the hidden states that a model takes; 0 where it takes those of several layers."""
    if not isinstance(layer, int):
        return 0
    return layer if layer >= 0 else layers + 1 + layer


def match(metric: Tensor, pairs: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """One round for rows (B, n, d): (B, n) the token that each becomes a part of, (B, n - pairs) those that stay, A's and then B's.

    first: tokens at the beginning that never merge, 0 or 1.
    """
    images, n, width = metric.shape
    rows = unit(metric.reshape(-1, width)).view(metric.shape)
    best, partner = (rows[:, ::2] @ rows[:, 1::2].mT).mul_(steps(metric.dtype)).round_().max(2)
    if first:
        best = best.index_fill(1, torch.zeros(1, dtype=torch.long, device=best.device), float("-inf"))
    strongest = best.sort(dim=1, descending=True, stable=True).indices
    gone = strongest[:, :pairs]
    into = torch.arange(n, device=metric.device).repeat(images, 1).scatter(1, 2 * gone, 2 * partner.gather(1, gone) + 1)
    rest = torch.arange(1, n, 2, device=metric.device).expand(images, -1)
    return into, torch.cat([2 * strongest[:, pairs:].sort(1).values, rest], 1)


def merged(x: Tensor, size: Tensor, into: Tensor, stays: Tensor) -> tuple[Tensor, Tensor]:
    """Features (B, m, D) and sizes (B, m, 1) of the tokens that stay (B, m), from those of n tokens."""
    images, n, _ = x.shape
    group = (into + n * torch.arange(images, device=x.device)[:, None]).flatten()
    sums = group_sums(torch.cat([x * size, size], 2).flatten(0, 1), group, images * n)[0].view(images, n, -1)
    sums = sums.gather(1, stays[..., None].expand(-1, -1, sums.shape[2]))
    return sums[..., :-1] / sums[..., -1:], sums[..., -1:].detach()
