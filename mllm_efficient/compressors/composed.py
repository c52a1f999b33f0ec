"""Several methods, one after the other, that commands and ``wrap`` take as one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..budget import Budget
from ..errors import BadBudgetError, MllmEfficientError, UnsupportedModelError
from ..plans import Plan
from ..tokens import VisualShape
from .base import RANDOM, Compressor
from .fit import OF_TOWER, require_chooser, require_counts
from .kinds import JOIN, ORDER, PRE_LLM

if TYPE_CHECKING:
    from ..family import Family
    from .projector import Projector
    from .reducer import Reducer


@dataclass(frozen=True, kw_only=True)
class Composed(Compressor):
    """At most one method of each kind, in the order projector, pre_llm, in_llm, and one that looks at pixels before the second.

    Each has a budget of its own, of what the one before it leaves. ``me.build("tokenflex:tokens=144 | divprune:keep=0.5")``
    makes one. name and kind are those of the stages together; needs, per and newline are those of the ``pre_llm`` stage.
    """

    stages: tuple[Compressor, ...] = ()

    def __post_init__(self) -> None:
        self._check_stages()
        of_whole: dict[str, Any] = {
            "name": JOIN.join(stage.name for stage in self.stages),
            "kind": JOIN.join(stage.kind for stage in self.stages),
            "needs": frozenset().union(*(stage.needs for stage in self.stages if stage.as_reducer is None)),
            "merges": any(stage.merges for stage in self.stages),
            "trained": any(stage.trained for stage in self.stages),
        }
        of_tokens = next((stage for stage in reversed(self.stages) if stage.kind == PRE_LLM), None)
        if of_tokens is not None:
            of_whole |= {"per": of_tokens.per, "newline": of_tokens.newline}
        for name, value in of_whole.items():
            object.__setattr__(self, name, value)

    def _check_stages(self) -> None:
        """Raises for stages that cannot run one after the other in any model."""
        if len(self.stages) < 2 or list(self.stages) != sorted(self.stages, key=_place):
            raise MllmEfficientError("a composition has two stages or more, in the order projector, pre_llm, in_llm: me.build makes one")
        for kind, by_pixels in {(stage.kind, stage.by_pixels) for stage in self.stages}:
            same = [stage.name for stage in self.stages if (stage.kind, stage.by_pixels) == (kind, by_pixels)]
            if len(same) > 1:
                raise MllmEfficientError(f"{' and '.join(same)} are of one kind ({kind}): at most one of each can run")
        alone = [stage.name for stage in self.stages if stage.sets_processor]
        if alone:
            raise UnsupportedModelError(f"{alone[0]} sets the model's own processor and runs no method: give it alone")
        counting = [stage.name for stage in self.stages if stage.counts_by_content]
        if counting:
            raise UnsupportedModelError(f"{counting[0]} with radius= or spend= decides how many tokens stay as it runs: give it alone")
        trained = [stage.name for stage in self.stages if stage.installs is not None]
        if len(trained) > 1:
            raise UnsupportedModelError(f"{trained[0]} and {trained[1]} each bring trained weights: one of them can run")

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

    @property
    def parts(self) -> tuple[Compressor, ...]:
        return self.stages

    def map_parts(self, change: Callable[[Compressor], Compressor]) -> Compressor:
        return dataclasses.replace(self, stages=tuple(stage.map_parts(change) for stage in self.stages))

    @property
    def as_projector(self) -> Projector | None:
        return next((stage.as_projector for stage in self.stages if stage.as_projector is not None), None)

    @property
    def as_reducer(self) -> Reducer | None:
        return next((stage.as_reducer for stage in self.stages if stage.as_reducer is not None), None)

    def plans(self, adapter: Family, item: Any) -> list[Plan]:
        """The plan after each stage, all of the item's own shape."""
        out = [self.stages[0].plan(adapter, item)]
        for before, stage in zip(self.stages, self.stages[1:]):
            done = out[-1]
            if before.by_pixels and stage.kind == PRE_LLM and done.untouched:
                out.append(stage.plan(adapter, item))
            else:
                out.append(dataclasses.replace(stage.plan_after(adapter, item, before, done), stay=done.stay))
        return out

    def position_rule(self, adapter: Family) -> str:
        """That of the last stage that chooses tokens before the decoder, where there are two."""
        two = [stage for stage in self.stages if stage.kind == PRE_LLM]
        return two[1].position_rule(adapter) if len(two) == 2 else super().position_rule(adapter)

    def plan(self, adapter: Family, item: Any) -> Plan:
        return self.plans(adapter, item)[-1]

    def check(self, adapter: Family) -> None:
        for stage in self.stages:
            if stage.as_reducer is None:
                stage.check(adapter)
        if self.as_reducer is not None:
            self._check_in_llm(adapter, self.as_reducer)
        if self.as_projector is not None and self.stages[1].as_reducer is None:
            self._check_after(self.as_projector, self.stages[1])
        for before, stage in zip(self.stages, self.stages[1:]):
            if before.by_pixels and stage.kind == PRE_LLM:
                require_chooser(stage, before)
        usual = adapter.usual()
        if usual is not None:
            self.plan(adapter, adapter.item_of(usual))

    def _check_in_llm(self, adapter: Family, reducer: Reducer) -> None:
        """Raises where the last stage cannot work on what the one before it leaves."""
        adapter.check_inside(reducer)
        before = self.stages[-2]
        require_counts(reducer, before)
        if reducer.routes and not before.fills_rectangles:
            raise UnsupportedModelError(f"{reducer.name} pools rectangles of tokens, and {before.name} leaves none: use one of them")
        keeps_newlines = before.newline == "keep" or (before.kind == PRE_LLM and before.fraction == 1)
        if reducer.newline == "keep" and not keeps_newlines:
            raise UnsupportedModelError(
                f"{reducer.name}: newline='keep' has no effect after {before.name}, which leaves none: leave it out"
            )

    def _check_after(self, projector: Projector, stage: Compressor) -> None:
        """Raises where a stage cannot work on the tokens of a trained projector."""
        if stage.as_resizer is not None or stage.in_tower:
            does = f"{'merges' if stage.merges else 'drops'} in the tower" if stage.in_tower else "makes the picture smaller"
            raise UnsupportedModelError(f"{stage.name} {does}, and {projector.name} gives as many tokens: use one of them")
        tokens, lacking = f"the tokens of {projector.name}", sorted(OF_TOWER & set(stage.needs))
        if lacking:
            raise UnsupportedModelError(f"{stage.name} needs {', '.join(lacking)} of the tower's tokens, which {tokens} have not")
        if stage.positions == "keep" or stage.newline == "keep":
            given = "positions" if stage.positions == "keep" else "newline"
            raise UnsupportedModelError(f"{stage.name}: {given}='keep' has no effect on {tokens}: leave it out")

    def describe(self, shape: VisualShape | None, adapter: Family) -> str:
        """``tokenflex keeps 144 of 576 tokens per image, then divprune 72 of them (removes 87.5%)``."""
        if shape is None:
            return ", then ".join(stage.describe(None, adapter) for stage in self.stages)
        plans = self.plans(adapter, adapter.item_of(shape))
        parts = [stage.describe_plan(done, adapter, first=i == 0) for i, (stage, done) in enumerate(zip(self.stages, plans))]
        return f"{', then '.join(parts)} (removes {100 * (1 - plans[-1].kept / shape.n):.1f}%)"


def compose(stages: list[Compressor]) -> Compressor:
    """The stages in the order they run, as one method; a single one as it is."""
    parts = [part for stage in stages for part in stages_of(stage)]
    parts = sorted(parts, key=_place)
    return parts[0] if len(parts) == 1 else Composed(stages=tuple(parts))


def _place(stage: Compressor) -> tuple[int, bool]:
    """Of its kind, and what looks at pixels before what looks at tokens."""
    return ORDER.index(stage.kind) if stage.kind in ORDER else len(ORDER), not stage.by_pixels


def stages_of(method: Compressor) -> tuple[Compressor, ...]:
    """The methods that run, in their order."""
    return method.parts


def projector_of(method: Compressor) -> Projector | None:
    """The stage that takes the projector's place."""
    return method.as_projector


def inside_of(method: Compressor) -> Reducer | None:
    """The stage inside the decoder."""
    return method.as_reducer


def before_of(method: Compressor) -> Compressor | None:
    """What runs before the decoder: a projector, a method on its tokens, or one after the other."""
    before = [stage for stage in stages_of(method) if stage.as_reducer is None]
    return compose(before) if before else None


def or_random(method: Compressor) -> Compressor:
    """The method with random weights where it has none: for shapes without weights, whose cost does not depend on them."""

    def drawn(stage: Compressor) -> Compressor:
        fresh = stage.trained and stage.weights is None
        return dataclasses.replace(stage, weights=RANDOM) if fresh else stage  # type: ignore[call-arg]

    return method.map_parts(drawn)


def __getattr__(name: str) -> Any:
    from mllm_efficient.moved import moved_name

    return moved_name("compressors.composed", name)
