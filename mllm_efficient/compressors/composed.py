"""Several methods, one after the other, that commands and ``wrap`` take as one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

from ..budget import Budget
from ..errors import BadBudgetError, MllmEfficientError, UnsupportedModelError
from ..trained.files import RANDOM
from .base import Compressor
from .projector import Projector
from .reducer import Reducer

Method = TypeVar("Method", bound=Compressor)


@dataclass(frozen=True, kw_only=True)
class Composed(Compressor):
    """At most one method of each family, in the order J (projector), P (before the language model), L (in the decoder).

    Each has a budget of its own, of what the one before it leaves. ``me.build("tokenflex:tokens=144 | divprune:keep=0.5")``
    makes one. name and family are those of the stages together; needs, per and newline are those of the stage of family P.
    """

    stages: tuple[Compressor, ...] = ()

    def __post_init__(self):
        if len(self.stages) < 2 or list(self.stages) != sorted(self.stages, key=_place):
            raise MllmEfficientError("a composition has two stages or more, in the order J, P, L: me.build makes one")
        for family in {stage.family for stage in self.stages}:
            same = [stage.name for stage in self.stages if stage.family == family]
            if len(same) > 1:
                raise MllmEfficientError(f"{' and '.join(same)} are of one family ({family}): at most one of each can run")
        trained = [stage.name for stage in self.stages if stage.installs is not None]
        if len(trained) > 1:
            raise UnsupportedModelError(f"{trained[0]} and {trained[1]} each bring trained weights: one of them can run")
        of_whole: dict[str, Any] = {
            "name": " | ".join(stage.name for stage in self.stages),
            "family": "".join(stage.family for stage in self.stages),
            "needs": frozenset().union(*(stage.needs for stage in self.stages if not isinstance(stage, Reducer))),
            "merges": any(stage.merges for stage in self.stages),
            "trained": any(stage.trained for stage in self.stages),
        }
        of_tokens = next((stage for stage in self.stages if stage.family == "P"), None)
        if of_tokens is not None:
            of_whole |= {"per": of_tokens.per, "newline": of_tokens.newline}
        for name, value in of_whole.items():
            object.__setattr__(self, name, value)

    @property
    def budget(self) -> Budget:
        raise BadBudgetError(f"{self.name} has a budget for each of its stages, and none for all")

    @property
    def fraction(self) -> float | None:
        return None

    @property
    def full_is_identity(self) -> bool:
        return all(stage.full_is_identity for stage in self.stages)

    @property
    def installs(self) -> Compressor | None:
        return next((stage.installs for stage in self.stages if stage.installs is not None), None)

    @property
    def same_weights(self) -> str | None:
        return next((stage.same_weights for stage in self.stages if stage.same_weights is not None), None)

    def to_dict(self) -> dict[str, Any]:
        return {"stages": [stage.to_dict() for stage in self.stages]}

    def spec(self) -> str:
        return " | ".join(stage.spec() for stage in self.stages)


def compose(stages: list[Compressor]) -> Compressor:
    """The stages in the order they run, as one method; a single one as it is."""
    parts = [part for stage in stages for part in stages_of(stage)]
    parts = sorted(parts, key=_place)
    return parts[0] if len(parts) == 1 else Composed(stages=tuple(parts))


def _place(stage: Compressor) -> int:
    return "JPL".index(stage.family) if stage.family in tuple("JPL") else len("JPL")


def runnable(compressor: Any) -> Compressor:
    """What ``build`` makes of it. Raises ``UnsupportedModelError`` for a stage of a family other than J, P and L."""
    from ..registry import build

    method = build(compressor)
    for stage in stages_of(method):
        if stage.family != "P" and not isinstance(stage, (Projector, Reducer)):
            raise UnsupportedModelError(f"{stage.name} is of family {stage.family}, which this version does not run")
    return method


def stages_of(method: Compressor) -> tuple[Compressor, ...]:
    """The methods that run, in their order."""
    return method.stages if isinstance(method, Composed) else (method,)


def projector_of(method: Compressor) -> Projector | None:
    """The stage that takes the projector's place."""
    return next((stage for stage in stages_of(method) if isinstance(stage, Projector)), None)


def inside_of(method: Compressor) -> Reducer | None:
    """The stage inside the decoder."""
    return next((stage for stage in stages_of(method) if isinstance(stage, Reducer)), None)


def before_of(method: Compressor) -> Compressor | None:
    """What runs before the decoder: a projector, a method on its tokens, or one after the other."""
    before = [stage for stage in stages_of(method) if not isinstance(stage, Reducer)]
    return compose(before) if before else None


def or_random(method: Method) -> Method:
    """The method with random weights where it has none: for shapes without weights, whose cost does not depend on them."""
    if isinstance(method, Composed):
        return dataclasses.replace(method, stages=tuple(or_random(stage) for stage in method.stages))
    fresh = method.trained and getattr(method, "weights", None) is None
    return dataclasses.replace(method, weights=RANDOM) if fresh else method  # type: ignore[call-arg]
