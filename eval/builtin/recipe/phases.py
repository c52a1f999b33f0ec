"""What a phase of training is: which prompts it draws, how many at a time, and the learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .prompts import Kind


@dataclass(frozen=True)
class Drawn(Kind):
    """batch: prompts of a micro-batch, with so many questions each. share: how likely it is, over those of the phase."""

    batch: int = 16
    share: float = 1.0
    questions: int = 10


@dataclass(frozen=True)
class Phase:
    """steps of ``parts`` micro-batches each. grounding: its share of the questions."""

    steps: int
    parts: int
    grounding: float
    kinds: tuple[Drawn, ...]


WARM, DECAY = 60, 0.25  # steps; share of the steps over which the rate falls to nothing


def phase_of(phases: Sequence[Phase], step: int) -> Phase:
    for phase in phases:
        if step < phase.steps:
            return phase
        step -= phase.steps
    return phases[-1]


def rate(step: int, total: int) -> float:
    """Of the learning rate: a warm-up, a plain, and a straight fall to 2% at the end."""
    return min((step + 1) / WARM, 1.0) * min(1.0, 0.02 + 0.98 * (total - step) / (DECAY * total))
