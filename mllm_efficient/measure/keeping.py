"""What a method keeps of an image that is known by its size or its number of tokens: ``mllm_efficient.apply.plan``, without torch."""

from __future__ import annotations

from dataclasses import dataclass

from ..apply.plan import plan
from ..compressors.base import Compressor
from ..compressors.composed import inside_of
from ..errors import MllmEfficientError
from ..patches.rules import Rules, Views


@dataclass(frozen=True)
class Kept:
    """A method on one image. tokens, separators: what is left. groups: (n, k) of tokens compressed together, k the budget.

    picture: what the tower sees, a smaller one under ``resize``. side, rounds, stages, per_layer, entering: as in a ``Plan``.
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

    def at(self, layer: int) -> int:
        """Tokens and separators of the image that decoder layer ``layer`` sees. Separators go with the first tokens."""
        if not self.per_layer:
            return self.tokens + self.separators
        whole = self.per_layer[layer] == self.per_layer[0]
        return self.per_layer[layer] + (self.entering if whole else self.separators)


def keep(rules: Rules, method: Compressor, picture: Views) -> Kept:
    """Raises ``BadBudgetError`` where the budget cannot be met, ``MllmEfficientError`` where the grid is not known."""
    n = picture.shape.n
    p = plan(rules, method, picture)
    inside = inside_of(method)
    by_place = method.per != "image" or "grid" in method.needs or (inside is not None and inside.routes)
    if not picture.whole and by_place and not p.untouched:
        raise MllmEfficientError(f"{method.name} needs the grid of the tokens, which {n} alone do not tell: give --image-size WxH")
    seen = picture if p.smaller is None else rules.smaller(picture, p.smaller)
    return Kept(seen, p.kept, p.separators, tuple((g.n, g.k) for g in p.groups), p.stages, p.per_layer, p.side, p.entering, p.rounds)
