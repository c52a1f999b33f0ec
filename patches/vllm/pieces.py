"""How an image of any family lies in its prompt: runs of placeholders, with the family's own text around and between them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mllm_efficient.apply.plan import Plan, plan
from mllm_efficient.compressors.base import Compressor
from mllm_efficient.errors import CountMismatchError, UnsupportedModelError
from mllm_efficient.tokens import Plane, VisualShape

from ..base import Item
from ..facts import FACTS
from ..rules import FAMILIES, rules_class
from . import PREFIX
from .settings import KEY


@dataclass(frozen=True)
class Pieces:
    """What a method does to an image: a plan for each of its parts, and the placeholders of each run after it.

    plans: of consecutive rows of the tower's output. runs: placeholders that each run of the prompt keeps; None where the text between
    them goes, so that one run is left. A run of 0 goes with the text between it and the next.
    """

    plans: tuple[Plan, ...]
    runs: tuple[int, ...] | None

    @property
    def kept(self) -> int:
        return sum(p.kept for p in self.plans)


def rules_of(config: Any, settings: Any) -> Any:
    """What is known of a family from its configuration and the settings of its image processor. Raises ``UnsupportedModelError``."""
    kind = config.model_type
    name = (config.architectures or [kind])[0].removeprefix(PREFIX)
    if kind in FAMILIES:
        return rules_class(kind)(name, config, settings)
    if kind not in FACTS:
        raise UnsupportedModelError(f"{KEY}: {kind} is not known; mllm-efficient doctor --all names the types that are")
    from ..families.generic import ByRow

    return ByRow(name, config, settings)


def kept_of_row(rules: Any, method: Compressor, tokens: int) -> int:
    """Tokens left of an image of which nothing but their number is known."""
    with torch.device("cpu"):
        return plan(rules, method, Item({}, VisualShape((Plane(1, tokens, placed=False),)))).kept


def runs_of(ids: Sequence[int], token: int) -> tuple[int, ...]:
    """Lengths of the runs of a token."""
    return tuple(len(list(run)) for found, run in itertools.groupby(ids) if found == token)


def shapes_of(rules: Any, runs: Sequence[int], size: tuple[int, int], grid: Sequence[int]) -> tuple[VisualShape, ...]:
    """The shapes of an image's parts, which have budgets of their own: one where the model's family or its grid says how it lies.

    runs: its placeholders in the uncompressed prompt. size: (height, width) in pixels. grid: (t, h, w) in patches, empty where a call
    says none. Raises ``CountMismatchError`` where these disagree.
    """
    total = sum(runs)
    if rules.config.model_type in FAMILIES:
        shape = rules.shape("image", 1, tuple(side // rules.merge for side in grid[1:])) if grid else rules.of_size(size[::-1]).shape
    elif grid:
        shape = rules.gridded("image", *grid)
    else:
        return tuple(VisualShape((Plane(1, n, placed=False),)) for n in runs)
    if shape.length != total:
        raise CountMismatchError(f"a picture of {size[1]}x{size[0]} has {total} tokens in its prompt and {shape.length} by its size")
    return (shape,)


def pieces_of(rules: Any, method: Compressor, shapes: Sequence[VisualShape], runs: Sequence[int]) -> Pieces:
    """What a method does to an image. Raises ``UnsupportedModelError`` where the prompt would depend on which tokens stay."""
    with torch.device("cpu"):
        plans = tuple(plan(rules, method, Item({}, shape)) for shape in shapes)
    if len(plans) > 1:
        return Pieces(plans, tuple(p.kept for p in plans))
    (only,) = plans
    if only.untouched:
        return Pieces(plans, tuple(runs))
    if len(runs) == 1:
        return Pieces(plans, (only.kept,))
    left = _of_runs(only, runs)
    if left is None and "tile" in rules.parts:
        raise UnsupportedModelError(
            f"{method.name}: {rules.name} has text between the tiles of an image, and how many tokens a tile keeps must be known before: "
            "write per=tile"
        )
    return Pieces(plans, left)


def _of_runs(planned: Plan, runs: Sequence[int]) -> tuple[int, ...] | None:
    """Tokens that each run keeps; None where a budget is shared by several, so that this depends on the picture."""
    ends = torch.tensor(list(itertools.accumulate(runs)))
    kept = [0] * len(runs)
    for group in planned.groups:
        tokens = torch.arange(planned.shape.n) if group.indices is None else group.indices
        where = torch.bucketize(planned.shape.token_slots[tokens.cpu()], ends, right=True).unique()
        if len(where) > 1:
            return None
        kept[int(where[0])] += group.kept
    return tuple(kept)


def shortened_ids(ids: Sequence[int], token: int, pieces: Pieces) -> list[int]:
    """The tokens that stand for an image, with fewer placeholders."""
    first, last = ids.index(token), len(ids) - 1 - list(reversed(ids)).index(token)
    if pieces.runs is None:
        return [*ids[:first], *[token] * pieces.kept, *ids[last + 1 :]]
    out, left = list[int](), iter(pieces.runs)
    for found, run in itertools.groupby(ids):
        out += [token] * next(left) if found == token else list(run)
    return out
