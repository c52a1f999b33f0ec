"""What a method keeps of an image that is known by its size or its number of tokens: ``mllm_efficient.apply.plan``, without torch."""

from __future__ import annotations

from dataclasses import dataclass

from ..apply.plan import plan
from ..compressors.base import Compressor
from ..compressors.composed import before_of, inside_of, stages_of
from ..errors import MllmEfficientError
from ..patches.rules import Rules, Views
from ..plans import Plan, room_for


@dataclass(frozen=True)
class Kept:
    """A method on one image. tokens, separators: what is left. groups: (n, k) of tokens compressed together, k the budget.

    marks: text columns between the tokens that are left; where that depends on which tokens are chosen, with a choice that is spread
    evenly over the image, which leaves the most.
    picture: what the tower sees, a smaller one under ``resize`` and ``native``. side, rounds, stages, per_layer, entering: as in a
    ``Plan``.
    """

    picture: Views
    tokens: int
    separators: int
    groups: tuple[tuple[int, int], ...] = ()
    stages: tuple[tuple[int, int], ...] = ()
    per_layer: tuple[int, ...] = ()
    side: int | None = None
    entering: int = 0
    rounds: tuple[tuple[int, ...], ...] = ()
    marks: int = 0

    def at(self, layer: int) -> int:
        """Tokens, separators and marks of the image that decoder layer ``layer`` sees. Separators go with the first tokens."""
        if not self.per_layer:
            return self.tokens + self.separators + self.marks
        whole = self.per_layer[layer] == self.per_layer[0]
        return self.per_layer[layer] + (self.entering if whole else self.separators) + self.marks


def keep(rules: Rules, method: Compressor, picture: Views) -> Kept:
    """Raises ``BadBudgetError`` where the budget cannot be met, ``MllmEfficientError`` where the grid is not known."""
    if method.sets_processor:
        seen = method.seen(rules, picture)  # type: ignore[attr-defined]
        return Kept(seen, seen.shape.n, seen.shape.separators, marks=seen.shape.marked)
    n = picture.shape.n
    p = plan(rules, method, picture)
    inside = inside_of(method)
    by_place = method.per != "image" or "grid" in method.needs or (inside is not None and inside.routes)
    if not picture.whole and by_place and not p.untouched:
        raise MllmEfficientError(f"{method.name} needs the grid of the tokens, which {n} alone do not tell: give --image-size WxH")
    seen = picture if p.smaller is None else rules.smaller(picture, p.smaller)
    groups, marks = tuple((g.n, g.k) for g in p.groups), marks_left(method, p)
    return Kept(seen, p.kept, p.separators, groups, p.stages, p.per_layer, p.side, p.entering, p.rounds, marks)


def marks_left(method: Compressor, p: Plan) -> int:
    """Text columns between an image's tokens that a plan leaves, of a choice spread evenly over the image."""
    shape, before = p.seen, before_of(method)
    if not shape.marks or before is None or p.all_marks or not p.groups:
        return shape.marked
    chooses, slots = stages_of(before)[-1], list[int]()
    for group in p.groups:
        if chooses.fills_rectangles:
            taken = room_for(chooses.target(group.grid, group.k), group.kept, group.grid)  # type: ignore[attr-defined]
        else:
            taken = [(2 * i + 1) * group.n // (2 * group.kept) for i in range(group.kept)]
        slots += [group.places[i] for i in taken]
    return shape.marked_by(sorted(slots))
