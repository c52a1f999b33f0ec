"""The base class of in-decoder methods: fewer visual tokens from one decoder layer to the next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ..budget import Budget
from ..errors import BadBudgetError, BadSettingError, CountMismatchError
from ..plans import Plan
from ..tokens import Decision, Grid, LayerTokens, ReducedTokens, VisualShape, grids_of
from .base import Compressor
from .kinds import IN_LLM
from .math.finite import read_found, require_scores

if TYPE_CHECKING:
    from torch import Tensor

    from ..family import Family


@dataclass(frozen=True, kw_only=True)
class Reducer(Compressor):
    """Keeps fewer visual tokens from some decoder layers on. Override ``layers`` and ``score`` (or ``select``).

    keep, tokens, prune: the **layer average** of an image's visual tokens over all decoder layers, for which the stages
    are solved: each leaves the same share of what reaches it, and the last one makes up for the rounding. Instead of
    them, ratio: the share that every stage leaves of what reaches it; ratios: ``0.5/0.25/0.125``, the share of the N
    tokens that is left after each stage.

    needs: of attention, text_attention, keys, entry (see ``LayerTokens``). A method that merges sets ``merges`` and
    overrides ``reduce``; one that decides image by image what is done sets ``routes`` and overrides ``decide``. weighs: whether
    attention is told how many tokens each holds.
    """

    kind: ClassVar[str] = IN_LLM
    weighs: ClassVar[bool] = False

    ratio: float | None = None
    ratios: str | None = None

    def __post_init__(self) -> None:
        native = [name for name in ("ratio", "ratios") if getattr(self, name) is not None]
        asked = [name for name in ("keep", "tokens", "prune", "min_tokens", "max_tokens") if getattr(self, name) is not None]
        if native and (asked or len(native) > 1):
            raise BadBudgetError(
                f"{self.name}: {' and '.join([*native, *asked])} together: give one of keep=, tokens=, prune=, ratio=, ratios="
            )
        if self.ratios is not None:
            object.__setattr__(self, "ratios", "/".join(f"{r:g}" for r in _shares(self.name, self.ratios)))
        if self.ratio is not None:
            _share(self.name, "ratio", self.ratio)
        super().__post_init__()
        if self.per != "image":
            raise BadSettingError(f"{self.name}: per={self.per!r} has no effect inside the decoder: leave it out")

    @property
    def budget(self) -> Budget:
        """What keep, tokens or prune ask for; everything where ratio or ratios say what stays."""
        if self.ratio is not None or self.ratios is not None:
            return Budget(keep=1.0)
        return super().budget

    @property
    def fraction(self) -> float | None:
        return None if self.ratio is not None or self.ratios is not None else super().fraction

    def layers(self, depth: int) -> tuple[int, ...]:
        """The decoder layers (from 0, ascending) at whose input tokens go, in a decoder of ``depth`` layers."""
        raise TypeError(f"{type(self).__name__} must define layers(depth)")

    @property
    def has_router(self) -> bool:
        """Whether a trained router says what is decided."""
        return False

    @property
    def read_token(self) -> int | None:
        """The token whose states a router reads, None for the instruction's last one."""
        return None

    def rater(self, layer: int) -> int:
        """The layer whose attention and keys a stage at ``layer`` is shown: ``layer`` itself or the one before it."""
        return layer

    def score(self, v: LayerTokens) -> Tensor:
        """One score per token, (n,); the highest stay, ties go to the lowest index."""
        raise TypeError(f"{type(self).__name__} must define score(v) or select(v, k)")

    def select(self, v: LayerTokens, k: int) -> Tensor:
        """Indices (k,) of the tokens that stay, in any order."""
        scores = self.score(v)
        if scores.shape != (len(v),):
            raise CountMismatchError(f"{self.name}: score gave {tuple(scores.shape)} for {len(v)} tokens: one each")
        require_scores(scores, self.name)
        return scores.sort(descending=True, stable=True).indices[:k]

    def reduce(self, v: LayerTokens, k: int) -> ReducedTokens:
        """What a stage leaves of the tokens. k: how many, of a method that selects exactly, of one that merges at most."""
        indices = self.select(v, k)
        if indices.shape != (k,):
            raise CountMismatchError(f"{self.name}: select gave {tuple(indices.shape)} indices where {k} were asked")
        ordered = indices.sort().values
        # score cannot go wrong, so that a GPU need not be waited for
        if (
            type(self).select is not Reducer.select
            and not v.hidden.is_meta
            and not bool((ordered.diff() > 0).all() & (ordered[0] >= 0) & (ordered[-1] < len(v)))
        ):
            read_found()
            raise CountMismatchError(f"{self.name}: select gave an index twice, or one outside 0..{len(v) - 1}")
        return ReducedTokens(ordered)

    def decide(
        self,
        stage: int,
        logits: Tensor | None,
        grids: Sequence[Sequence[Grid]],
        keys: Sequence[int | str],
        drawn: str | None = None,
        generator: Any = None,
    ) -> Decision:
        """What stage ``stage`` does to each image. logits: what the method's router says, (images, experts).

        grids: rectangles that each image's tokens fill. keys: of the images. drawn: in training, the estimator's name, and
        generator what to draw from.
        """
        raise TypeError(f"{type(self).__name__} must define decide(stage, logits, grids, keys)")

    def choice_flops(self, n: int, k: int, text: int, d: int, full: int) -> int:
        """FLOPs of the method's own products: k of an image's n tokens, of ``full`` at first, beside ``text`` text tokens of width d.

        What the model does for it (attention, keys) is not among them.
        """
        return 0

    def router_flops(self, d: int) -> int:
        """FLOPs of a trained router, for one image at one stage."""
        return 0

    def stages(self, depth: int) -> tuple[int, ...]:
        """``layers(depth)``, checked. Raises ``BadBudgetError`` for layers that the decoder has not."""
        layers = tuple(self.layers(depth))
        if not layers or any(not 1 <= layer < depth for layer in layers) or list(layers) != sorted(set(layers)):
            asked = ", ".join(map(str, layers)) or "none"
            raise BadSettingError(
                f"{self.name}: tokens cannot go at layer {asked} of a decoder of {depth}: use 1 to {depth - 1}, ascending"
            )
        for layer in layers:
            if self.rater(layer) not in (layer - 1, layer):
                raise BadSettingError(
                    f"{self.name}: layer {self.rater(layer)} cannot rate for a stage at {layer}: use {layer - 1} or {layer}"
                )
        return layers

    def counts(self, n: int, depth: int, *, fixed: bool = True, grids: Sequence[Grid] | None = None) -> tuple[int, ...]:
        """Tokens left after each stage, of an image with n, known before any layer has run. grids: the rectangles they fill.

        Raises ``BadBudgetError`` for a layer average that cannot be reached, naming the smallest that can.
        """
        stages = self.stages(depth)
        if self.ratios is not None:
            shares = _shares(self.name, self.ratios)
            if len(shares) != len(stages):
                raise BadBudgetError(f"{self.name}: {len(shares)} ratios for {len(stages)} stages of a decoder of {depth} layers: one each")
            return tuple(max(1, round(n * share)) for share in shares)
        if self.ratio is not None:
            return tuple(max(1, round(n * self.ratio**i)) for i in range(1, len(stages) + 1))
        return solve(self.name, self.budget.count(n, fixed=fixed), n, stages, depth)

    def per_layer(self, n: int, depth: int, *, fixed: bool = True, grids: Sequence[Grid] | None = None) -> tuple[int, ...]:
        """Visual tokens of an image with n at each decoder layer."""
        return spread_out(n, self.stages(depth), self.counts(n, depth, fixed=fixed, grids=grids), depth)

    # ------------------------------------------------------------------------------ as a kind of method

    @property
    def as_reducer(self) -> Reducer:
        return self

    def plan(self, adapter: Family, item: Any) -> Plan:
        return self._reduced(adapter, self.untouched_plan(item.shape), grids_of(item.shape.planes))

    def plan_after(self, adapter: Family, item: Any, before: Compressor, done: Plan) -> Plan:
        return self._reduced(adapter, done, before.grids_left(done))

    def _reduced(self, adapter: Family, before: Plan, grids: tuple[Grid, ...] | None) -> Plan:
        """What becomes of the tokens that ``before`` leaves, which fill ``grids``."""
        depth, n = adapter.decoder_layers, before.kept
        layers, counts = self.stages(depth), self.counts(n, depth, fixed=adapter.fixed_count, grids=grids)
        per_layer = spread_out(n, layers, counts, depth)
        untouched = min(counts) == n and not self.merges
        return replace(
            before, kept=round(sum(per_layer) / depth), separators=before.separators if untouched or self.newline == "keep" else 0,
            untouched=before.untouched and untouched, clamped=before.clamped or (self.tokens is not None and self.tokens > n),
            stages=tuple(zip(layers, counts)), per_layer=per_layer, entering=before.separators,
        )  # fmt: skip

    def check_needs(self, adapter: Family) -> None:
        adapter.check_inside(self)

    def check_budget(self, adapter: Family, usual: VisualShape) -> None:
        self.counts(usual.n, adapter.decoder_layers, fixed=adapter.fixed_count)

    def describe(self, shape: VisualShape | None, adapter: Family) -> str:
        if shape is not None and not self.routes:
            return self.describe_plan(self.plan(adapter, adapter.item_of(shape)), adapter)
        layers = ", ".join(map(str, self.stages(adapter.decoder_layers)))
        if self.routes:
            return f"{self.name} pools the tokens of each image in front of layer {layers}"
        return f"{self.name} drops tokens of each image at layer {layers}"

    def describe_plan(self, planned: Plan, adapter: Family, first: bool = True) -> str:
        """``fastv keeps 576 tokens up to layer 2, then 115 (layer average 143.8)``."""
        if self.routes:
            return self.describe(None, adapter)
        counts = [planned.per_layer[0], *(count for _, count in planned.stages)]
        if min(counts) == counts[0]:
            return f"{self.name} keeps every token"
        spans = [f"{count} up to layer {layer}" for count, (layer, _) in zip(counts, planned.stages)]
        spans[0] = spans[0].replace(" up", " tokens up", 1)
        average = sum(planned.per_layer) / len(planned.per_layer)
        return f"{self.name} keeps {', then '.join([*spans, str(counts[-1])])} (layer average {average:.1f})"


@dataclass(frozen=True, kw_only=True)
class OneStage(Reducer):
    """Tokens go once, after ``layer`` decoder layers, by what the last of those layers shows."""

    layer: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 1:
            raise BadSettingError(f"{self.name}: layer={self.layer!r} is not a whole number of layers that see every token, such as 2")

    def layers(self, depth: int) -> tuple[int, ...]:
        return (self.layer,)

    def rater(self, layer: int) -> int:
        return layer - 1


def spread_out(n: int, stages: Sequence[int], counts: Sequence[int], depth: int) -> tuple[int, ...]:
    """Tokens at each of ``depth`` layers: n up to the first stage, ``counts[i]`` from stage i on."""
    reached = [sum(layer >= stage for stage in stages) for layer in range(depth)]
    return tuple(n if r == 0 else counts[r - 1] for r in reached)


def solve(name: str, average: int, n: int, stages: Sequence[int], depth: int) -> tuple[int, ...]:
    """Tokens after each stage whose mean over all layers is ``average``, as near as whole numbers allow."""
    if average >= n:
        return (n,) * len(stages)
    spans = [b - a for a, b in zip(stages, [*stages[1:], depth])]
    rest = average * depth - stages[0] * n
    if rest < sum(spans):
        least = math.ceil((stages[0] * n + sum(spans)) / depth)
        raise BadBudgetError(
            f"{name}: a layer average of {average} of {n} tokens cannot be reached where {stages[0]} of {depth} layers see them all: "
            f"the smallest is {least} (tokens={least})"
        )
    low, high = 0.0, 1.0
    for _ in range(60):
        share = (low + high) / 2
        total = sum(span * max(1.0, n * share ** (i + 1)) for i, span in enumerate(spans))
        low, high = (share, high) if total < rest else (low, share)
    counts = [max(1, round(n * high ** (i + 1))) for i in range(len(spans) - 1)]
    last = round((rest - sum(span * count for span, count in zip(spans, counts))) / spans[-1])
    return (*counts, max(1, min(last, counts[-1] if counts else n)))


def _shares(name: str, given: Any) -> tuple[float, ...]:
    """The numbers in ``0.5/0.25``, a list or a single number."""
    parts = given.split("/") if isinstance(given, str) else list(given) if isinstance(given, (list, tuple)) else [given]
    try:
        shares = tuple(float(part) for part in parts)
    except (TypeError, ValueError):
        raise BadBudgetError(f"{name}: ratios={given!r} are not shares, such as ratios=0.5/0.25/0.125") from None
    for share in shares:
        _share(name, "ratios", share)
    if list(shares) != sorted(shares, reverse=True):
        raise BadBudgetError(f"{name}: ratios={given} grow: each is the share of all tokens that is left after a stage")
    return shares


def _share(name: str, field: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise BadBudgetError(f"{name}: {field}={value!r} is not a share in (0, 1]")
