"""How often each token count is drawn, and how much a small count learns from the largest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

GAP = 0.05  # of the range of FLOPs, within which counts are of one group
RAMP = 0.05  # of the steps, over which the consistency loss grows to its weight


def by_flops(shares: Mapping[int, float], costs: Mapping[int, float]) -> dict[int, float]:
    """How likely each count is where groups of about equal FLOPs are equally likely, and shares tell within a group.

    A group ends where a cost is more than 5% of the range above its first. Source: SN-Netv2's resource-constrained sampling
    (arXiv 2307.00154), which has gaps in GFLOPs.
    """
    order = sorted(shares, key=lambda count: costs[count])
    groups, gap = [[order[0]]], GAP * (costs[order[-1]] - costs[order[0]])
    for count in order[1:]:
        if costs[count] - costs[groups[-1][0]] > gap:
            groups.append([])
        groups[-1].append(count)
    return {count: shares[count] / sum(shares[c] for c in group) / len(groups) for group in groups for count in group}


def likelihoods(recipe: Any, config: Any) -> dict[int, float]:
    """How likely each count of a recipe is drawn, on a model of this configuration."""
    if recipe.sampling != "flops":
        return dict(recipe.counts)
    from ..measure.flops import cost, shape_of
    from ..registry import build
    from ..trained.files import RANDOM

    shape, named = shape_of(config), {"method": recipe.method, "weights": RANDOM}
    return by_flops(recipe.counts, {c: cost(shape, method=build({**named, "tokens": c})).total for c in recipe.counts})


def ramped(weight: float, step: int, steps: int) -> float:
    """The weight of the consistency loss at a step: it grows over the first twentieth of the training."""
    return weight * min(1.0, (step + 1) / max(1.0, RAMP * steps))


def consistency(student: Tensor, teacher: Tensor, wanted: Tensor) -> Tensor:
    """KL(teacher || student) of logits (A, V), the mean over the answer tokens (A,) that the teacher guesses; 0 where it guesses none.

    Source: MDCS (arXiv 2308.09922), whose teacher is the same network on a weaker augmentation of the picture.
    """
    right = teacher.argmax(-1) == wanted
    each = F.kl_div(student.log_softmax(-1), teacher.detach().log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return torch.where(right, each, 0.0).sum() / right.sum().clamp(min=1)
