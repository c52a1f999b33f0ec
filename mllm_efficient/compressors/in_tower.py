"""What methods share that make tokens fewer between the blocks of the vision tower, so that the tower gets cheaper too.

A token is what the language model gets: one patch, or the patches that the model's projector puts together to one (InternVL), which
stay or go, or are merged, as one. Every tile of an image is a run of the tower with its own share of the budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..budget import apportion
from ..errors import UnsupportedModelError
from ..plans import Plan
from ..tokens import Plane, VisualShape
from .base import Compressor

if TYPE_CHECKING:
    from torch import Tensor

    from ..family import Family


@dataclass(frozen=True)
class Run:
    """One run of a tower over views that are alike.

    rounds: how many tokens each block takes off a view, where that is known before. first: class tokens in front, 0 or 1.
    unit: patches of a token, which stand one after another.
    """

    rounds: tuple[int, ...]
    first: int = 0
    unit: int = 1


@dataclass(frozen=True)
class Heads:
    """Queries, keys and values (views, heads, patches, d) of a block, the class token's in front; scale: of their products."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float


class Steps(Protocol):
    """A method on one run of a tower. kept: (views, K) the places of the tokens that stay, None where tokens are merged."""

    @property
    def kept(self) -> Tensor | None: ...

    def bias(self, dtype: Any) -> Tensor | None:
        """What is added to the logits of attention, broadcast to (views, heads, patches, patches)."""

    def after_attention(self, block: int, x: Tensor, heads: Heads) -> Tensor:
        """What the MLP of a block is given of x (views, patches, D)."""

    def after_block(self, block: int, x: Tensor, heads: Heads) -> Tensor:
        """What the next block is given."""

    def done(self, x: Tensor) -> Tensor:
        """x in the order of the tokens' places."""


class WorksInTower(Protocol):
    """What a method in the tower defines."""

    def in_blocks(self, n: int, k: int, blocks: int) -> tuple[int, ...]:
        """Tokens that each of so many blocks takes off, on the way from n to k; all that is known where a view's contents decide."""

    def steps(self, run: Run, x: Tensor) -> Steps:
        """The method on what the first block is given, (views, patches, D)."""

    def block_flops(self, n: int, width: int, heads: int, run: Run, block: int) -> tuple[int, int, int]:
        """(products that choosing takes in a block, patches that its MLP is given, those that the next block is given), of n patches."""


def plan_in_tower(method: Any, adapter: Family, item: Any) -> Plan:
    """The plan of a method in the tower. Raises ``BadBudgetError`` where a tile would be left without a token."""
    shape: VisualShape = item.shape
    untouched: Plan = method.untouched_plan(shape)
    sizes = [len(plane) for plane in shape.planes]
    if method.per == "tile":
        shares = [method.budget.count(n, fixed=False) for n in sizes]
    else:
        shares = _shares(method.budget.count(shape.n, fixed=adapter.fixed_count), sizes)
    kept = sum(shares)
    if kept == shape.n:
        return untouched
    rounds = tuple(method.in_blocks(n, share, adapter.tower_blocks) for n, share in zip(sizes, shares))
    planes = tuple(Plane(1, k, tile=plane.tile, placed=False) for plane, k in zip(shape.planes, shares))
    return Plan(shape, kept, after=VisualShape(planes), rounds=rounds, clamped=untouched.clamped)


def _shares(k: int, sizes: list[int]) -> list[int]:
    """Exactly k tokens shared out to tiles in proportion, what is left over one by one from the first tile on."""
    shares = apportion(k, sizes)
    while sum(shares) < k:
        for i, n in enumerate(sizes):
            shares[i] += shares[i] < n and sum(shares) < k
    return shares


def check_tower(method: Compressor, adapter: Family, says: str) -> None:
    """Raises ``UnsupportedModelError`` for a model whose tower it cannot work in. says: what the user can do."""
    usual = adapter.usual()
    if not adapter.tower_blocks or (usual is not None and len(usual.planes) > 1):
        raise UnsupportedModelError(
            f"{method.name} works in the tower of a LLaVA-1.5, InternVL or Cohere2 Vision that gives the patches of one layer, "
            f"which {adapter.name} has not: {says}"
        )


def check_tower_budget(method: Any, adapter: Family, usual: VisualShape) -> None:
    """Raises ``BadBudgetError`` where the tower's blocks cannot leave K of the tokens that every image has."""
    k = method.budget.count(usual.n, fixed=adapter.fixed_count)
    if k < usual.n:
        method.in_blocks(usual.n, k, adapter.tower_blocks)
