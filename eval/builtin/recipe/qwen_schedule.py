"""The phases of ``qwen.py`` in numbers: pictures from small to large, batches, and the learning rate."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .qwen_data import Kind


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


TINY = Drawn(("tiny",), 1, 0, 12, 40, 1.0, 6)
ONE = ("old", "old", "old", "document", "document", "chart", "scene", "scene")
PHASES = (
    Phase(500, 2, 1.0, (TINY,)),
    Phase(500, 2, 0.5, (replace(TINY, share=0.3), Drawn(ONE, 1, 0, 36, 16, 0.7))),
    Phase(800, 2, 0.35, (
        replace(TINY, share=0.08), Drawn(ONE, 1, 0, 36, 16, 0.5), Drawn(ONE, 1, 36, 64, 12, 0.2),
        Drawn(("images",), 2, 0, 36, 10, 0.08), Drawn(("images",), 3, 0, 36, 8, 0.07), Drawn(("screens",), 2, 0, 64, 8, 0.07),
    )),
    Phase(2100, 2, 0.2, (
        Drawn(ONE, 1, 0, 36, 16, 0.3), Drawn(ONE, 1, 36, 64, 12, 0.25), Drawn(ONE, 1, 64, 144, 6, 0.1),
        Drawn(("images",), 2, 0, 64, 8, 0.1), Drawn(("images",), 3, 0, 64, 6, 0.1),
        Drawn(("screens",), 2, 0, 72, 6, 0.08), Drawn(("screens",), 3, 0, 72, 4, 0.07),
    )),
)  # fmt: skip
WARM, DECAY = 60, 0.3  # steps; share of the steps over which the rate falls to nothing


def phase_of(step: float) -> Phase:
    for phase in PHASES:
        if step < phase.steps:
            return phase
        step -= phase.steps
    return PHASES[-1]


def rate(step: int, total: int) -> float:
    """Of the learning rate: a warm-up, a plain, and a straight fall to 2% at the end."""
    return min((step + 1) / WARM, 1.0) * min(1.0, 0.02 + 0.98 * (total - step) / (DECAY * total))
