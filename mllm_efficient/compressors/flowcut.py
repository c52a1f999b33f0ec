"""FlowCut: tokens that little information flows to, dropped step by step between the blocks of the vision tower."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import BadSettingError, UnsupportedModelError
from ..lazy import torch
from ..plans import Plan
from ..registry import register
from ..tokens import CompressedTokens, Grid, VisualShape, VisualTokens
from .base import Compressor
from .in_tower import Heads, Run, check_tower, check_tower_budget, plan_in_tower
from .math.finite import require_finite

if TYPE_CHECKING:
    from torch import Tensor

    from ..family import Family

EVERY = 2  # blocks from one drop to the next
ASSUMED = 0.95  # entropy of attention over log N where FLOPs are asked for and each image's own counts: the embedded model's, 0.92 to 0.98


@register("flowcut")
@dataclass(frozen=True, kw_only=True)
class FlowCut(Compressor):
    """Tokens with a small flow of information dropped in the tower, more of them where attention is concentrated.

    Source: FlowCut (arXiv 2505.19536). Rule: a token's score in a block is (its share of the class token's attention + its share of
    softmax(class token's value . values), either averaged over heads) x the L1 norm of its value, averaged over heads. Scores are
    carried on from block to block, half the sum of old and new. Every second block, counted back from the last but one that runs,
    drops after its MLP the tokens with the smallest, r of N of them: r = (N - K) / sqrt(blocks left) x (1 - (H / log N)^2), H being
    the entropy of the class token's attention; the last drop leaves exactly K. A tower without a class token (SigLIP) takes the mean
    query in its place and the score attention x norm, as the paper's code for Qwen2-VL does.
    entropy: H / log N taken for all images, from 0 to 1; left out, each image's own, as in the paper. Then what the tower costs is only
    known once an image is seen: FLOPs are counted for 0.95, and images run one by one, since each drops its own number (the paper's code
    takes the largest of a batch).
    Where the projector puts 2 x 2 patches together (InternVL, Cohere2 Vision) they stay or go as one, their scores and shares of
    attention added; the paper's code for Qwen2-VL takes any four patches that are left for one token. Each tile has its share of K.
    Kept tokens are the tower's own, in their places. Ties go to the lowest index. float32, or float64 for float64 input. NaN or infinity
    raises. O(N D) a block, and the blocks after it cost less.
    """

    paper: ClassVar[str] = "arXiv 2505.19536"

    entropy: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        e = self.entropy
        if e is not None and (isinstance(e, bool) or not isinstance(e, (int, float)) or not 0 <= e <= 1):
            raise BadSettingError(f"flowcut: entropy={e!r} is not a share of log N from 0 to 1")

    @property
    def in_tower(self) -> bool:
        return True

    @property
    def by_content(self) -> bool:
        """Whether a view is to be seen before it is known how many tokens each block drops."""
        return self.entropy is None

    def compress(self, v: VisualTokens, k: int) -> CompressedTokens:
        raise UnsupportedModelError("flowcut works inside a model's tower, and here are tokens alone")

    def plan(self, adapter: Family, item: Any) -> Plan:
        return plan_in_tower(self, adapter, item)

    def grids_left(self, planned: Plan) -> tuple[Grid, ...] | None:
        return super().grids_left(planned) if planned.untouched else None

    def check_parts(self, adapter: Family) -> None:
        super().check_parts(adapter)
        check_tower(self, adapter, "use a method that works after it")

    def check_budget(self, adapter: Family, usual: VisualShape) -> None:
        check_tower_budget(self, adapter, usual)

    def in_blocks(self, n: int, k: int, blocks: int) -> tuple[int, ...]:
        """By the entropy that is given, or assumed. The last of several blocks drops nothing."""
        out = [0] * blocks
        for block, left in drops(blocks):
            out[block] = dropped(n, k, left, ASSUMED if self.entropy is None else self.entropy)
            n -= out[block]
        return tuple(out)

    def block_flops(self, n: int, width: int, heads: int, run: Run, block: int) -> tuple[int, int, int]:
        """The products of one query and, with a class token, one value with all tokens, as long as some are yet to go."""
        scores = 2 * n * width * (1 + run.first) if any(run.rounds[block:]) else 0
        return scores, n, n - run.rounds[block] * run.unit

    def steps(self, run: Run, x: Tensor) -> Dropping:
        return Dropping(run, x, None if self.entropy is not None or x.is_meta else len(x))


def drops(blocks: int) -> list[tuple[int, int]]:
    """(block, blocks left until the last drop) of every drop in a tower of which so many blocks run."""
    last = max(blocks - 2, 0)
    return [(block, last - block) for block in range(last + 1) if (last - block) % EVERY == 0]


def dropped(n: int, k: int, left: int, entropy: float) -> int:
    """How many of n tokens go on the way to k. entropy: that of attention over log n."""
    return n - k if left == 0 else min(n - k, round((n - k) / math.sqrt(left) * (1 - entropy**2)))


class Dropping:
    """FlowCut on one run of a tower. alone: 1 where the view's own entropy decides, None where ``run.rounds`` do."""

    def __init__(self, run: Run, x: Tensor, alone: int | None):
        if alone not in (None, 1):
            raise ValueError("views that drop as many tokens as their contents say run one by one")
        n = (x.shape[1] - run.first) // run.unit
        self.run, self.by_content, self.left = run, alone is not None, n
        self.target, self.at = n - sum(run.rounds), dict(drops(len(run.rounds)))
        self.scores: Tensor | None = None
        self.kept = torch.arange(n, device=x.device).repeat(len(x), 1)

    def bias(self, dtype: Any) -> None:
        return None

    def after_attention(self, block: int, x: Tensor, heads: Heads) -> Tensor:
        return x

    def after_block(self, block: int, x: Tensor, heads: Heads) -> Tensor:
        if self.left == self.target:
            return x
        flow, attention = (of_patch.unflatten(1, (-1, self.run.unit)).sum(2) for of_patch in scores(heads, self.run.first))
        require_finite(flow, "flowcut", "tower's scores")
        self.scores = flow if self.scores is None else 0.5 * self.scores + 0.5 * flow
        if block not in self.at:
            return x
        goes = self.run.rounds[block]
        if self.by_content:
            entropy = -torch.special.xlogy(attention, attention).sum(1) / math.log(max(self.left, 2))
            goes = dropped(self.left, self.target, self.at[block], min(1.0, float(entropy)))
        return self._without(x, goes) if goes else x

    def _without(self, x: Tensor, goes: int) -> Tensor:
        assert self.scores is not None
        order = self.scores.detach().sort(dim=1, descending=True, stable=True).indices
        stay = order[:, : self.left - goes].sort(1).values
        self.kept, self.scores, self.left = self.kept.gather(1, stay), self.scores.gather(1, stay), self.left - goes
        tokens = x[:, self.run.first :].unflatten(1, (-1, self.run.unit))
        tokens = tokens.gather(1, stay[..., None, None].expand(-1, -1, *tokens.shape[2:])).flatten(1, 2)
        return torch.cat([x[:, : self.run.first], tokens], 1)

    def done(self, x: Tensor) -> Tensor:
        return x


def scores(heads: Heads, first: int) -> tuple[Tensor, Tensor]:
    """(views, patches) the score of every patch in a block, and its share of attention, without the class token.

    The products alone are the model's; what comes after them is float32, or float64.
    """
    full = torch.float64 if heads.q.dtype == torch.float64 else torch.float32
    q, k, v = (part.detach().to(full) for part in (heads.q, heads.k, heads.v))
    query = q[:, :, :1] if first else q.mean(2, keepdim=True)
    attention = _shares((query @ k.mT * heads.scale).softmax(-1).mean((1, 2))[:, first:])
    weight = v.mean(1).abs().sum(-1)[:, first:]
    if not first:
        return attention * weight, attention
    alike = _shares((v[:, :, :1] @ v.mT).softmax(-1).mean((1, 2))[:, first:])
    return (attention + alike) * weight, attention


def _shares(x: Tensor) -> Tensor:
    return x / x.sum(1, keepdim=True)
