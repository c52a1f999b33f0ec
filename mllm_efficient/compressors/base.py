"""The base class of all methods. A new one overrides one function (docs/add-a-method.md shows one in 40 lines)."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ..budget import Budget
from ..errors import BadSettingError
from ..lazy import torch
from ..plans import Plan
from ..spec import BASELINE_ON, text_fields, write
from ..tokens import CompressedTokens, Grid, VisualShape, VisualTokens, grids_of
from . import fit, sharing
from .grouping import groups_of, plan_of
from .kinds import IN_LLM, PRE_LLM, OldFamily, read_old_family

if TYPE_CHECKING:
    from ..family import Family
    from .projector import Projector
    from .reducer import Reducer
    from .resizer import Resizer

RANDOM = "random"  # in place of a folder of weights: ones that are drawn, for timing alone
# What a method has that does not declare a setting of this name. No class attributes: a dataclass would take them for defaults.
UNDECLARED = {"order": "raster", "seed": 0, "clip": None, "weights": None}
CHOICES = frozenset({"score", "select", "merge", "compress"})  # what a subclass that chooses in another way overrides
BUDGET_FIELDS = ("keep", "tokens", "prune", "min_tokens", "max_tokens")


@dataclass(frozen=True, kw_only=True)
class Compressor:
    """What every method has: a name, a budget, a position rule. Frozen; nothing of a call is kept on it.

    keep, tokens, prune: fraction kept, count kept, fraction removed; exactly one. min_tokens, max_tokens bound a fraction's count.
    positions: None is the model family's default ("renumber" on 1-D RoPE, "keep" on M-RoPE), "keep" leaves every kept token at its place in
    the uncompressed prompt. per: what the budget is for: every "image" (or video), every "tile" of an anyres image, every "frame" of a
    video. newline: None drops the newline and separator columns of an image that loses tokens, and text between tokens (a row's break, a
    tile's name) with its last token; "keep" keeps all. kind: where it works: "projector" in the place of the model's, "pre_llm" on the
    tokens before the language model, "in_llm" between its layers. needs: what it asks for beside the features. trained: whether it has
    weights. merges: whether its tokens are new ones. in_place: whether each of these has the place of one of the tokens that it was merged
    from (``CompressedTokens.places``), so that it can keep that one's position. channelwise: whether it merges every channel by itself, by
    places, attention and keys alone, so that features which some models add in later layers (deepstack) can be merged alike. routes:
    whether it decides image by image what is done. sets_processor: whether it is a setting of the model's own image processor, which
    commands make (``measure.native``) and no wrapped model can. by_pixels: whether pixels alone say how many tokens stay. shares_work:
    whether ``compress_batch`` is cheaper on a GPU than image after image; a subclass that chooses in another way says so anew. says_counts:
    whether it says how many tokens each that is left holds. counts_by_content: whether the
    tower must run before it is known how many stay (``ByContent``).

    Settings that some methods declare and all can be asked for: order ("raster", or "picked" for the order of choice), seed, clip (a
    CLIP model's folder or hub id), weights (a folder or hub id of trained weights). What a kind of method means for an image's plan, for
    a model and in words are methods of that kind. Everything named ``adapter`` is a ``patches.base.Adapter``, or a shape's rules.
    """

    name: ClassVar[str] = ""
    kind: ClassVar[str] = PRE_LLM
    family = OldFamily()
    needs: ClassVar[Any] = frozenset()
    trained: ClassVar[bool] = False
    paper: ClassVar[str] = ""
    merges: ClassVar[bool] = False
    in_place: ClassVar[bool] = False
    channelwise: ClassVar[bool] = False
    routes: ClassVar[bool] = False
    sets_processor: ClassVar[bool] = False
    by_pixels: ClassVar[bool] = False
    shares_work: ClassVar[bool] = False
    says_counts: ClassVar[bool] = False
    counts_by_content: ClassVar[bool] = False

    keep: float | None = None
    tokens: int | None = None
    prune: float | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    positions: str | None = None
    per: str = "image"
    newline: str | None = None

    if TYPE_CHECKING:

        @property
        def order(self) -> str: ...
        @property
        def seed(self) -> int: ...
        @property
        def clip(self) -> str | None: ...
        @property
        def weights(self) -> str | None: ...
    else:

        def __getattr__(self, name: str) -> Any:
            if name in UNDECLARED:
                return UNDECLARED[name]
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        read_old_family(cls)
        if "shares_work" not in cls.__dict__ and not CHOICES.isdisjoint(cls.__dict__):
            cls.shares_work = False

    def __post_init__(self) -> None:
        self.budget  # noqa: B018  (raises on a bad budget)
        if self.positions not in (None, "renumber", "keep"):
            raise BadSettingError(f"positions={self.positions!r} is not one of 'renumber', 'keep'")
        in_place = self.in_place or self.kind == IN_LLM  # inside the decoder a merged token takes the place of one of them
        if self.positions == "keep" and self.merges and not in_place:
            raise BadSettingError(f"{self.name} merges tokens, and a merged token has no old position: leave positions=")
        if self.per not in ("image", "tile", "frame"):
            raise BadSettingError(f"per={self.per!r} is not one of 'image', 'tile', 'frame'")
        if self.newline not in (None, "keep"):
            raise BadSettingError(f"newline={self.newline!r} is not 'keep': leave it out to drop newline columns")

    @property
    def budget(self) -> Budget:
        return Budget(self.keep, self.tokens, self.prune, self.min_tokens, self.max_tokens)

    @property
    def fraction(self) -> float | None:
        """The share of an image's tokens that the budget asks for; None where it asks in another way."""
        return self.budget.fraction

    @property
    def full_is_identity(self) -> bool:
        """Whether keeping all N tokens returns them as they were, so that the call can be left alone."""
        return True

    @property
    def in_tower(self) -> bool:
        """Whether the method works in the blocks of the tower: it defines what ``in_tower.WorksInTower`` has."""
        return False

    @property
    def installs(self) -> Compressor | None:
        """The trained method whose weights a model holds under this one."""
        return None

    @property
    def same_weights(self) -> str | None:
        """Specification of the baseline with all tokens on a trained method's weights: ``none@tokenflex``."""
        if self.installs is not self:
            return None
        return BASELINE_ON + write(self.name, {"weights": self.weights} if self.weights else {}, text_fields(type(self)))

    def count(self, n: int, grid: tuple[int, int] | None, *, fixed: bool = True) -> int:
        """K of an image with n tokens on one grid, known before any pixel is looked at."""
        return self.yields(self.budget.count(n, fixed=fixed), grid)

    def wanted(self, shape: VisualShape, *, fixed: bool) -> int:
        """K of an image or video of this shape, where ``per`` asks for so many of the whole of it."""
        return self.budget.count(shape.n, fixed=fixed)

    def yields(self, k: int, grid: tuple[int, int] | None) -> int:
        """How many tokens a budget of k gives on a grid."""
        return k

    def flops(self, n: int, d: int, k: int) -> int:
        """FLOPs of choosing or making k of n tokens of width d: twice the multiply-adds of its matrix products alone.

        d is the keys' width for a method that needs keys.
        That is what torch's ``FlopCounterMode`` counts: sorting, pooling, norms and comparisons are nothing to it. A
        method that multiplies matrices overrides this.
        """
        return 0

    def text_flops(self, n: int, d: int, text: int, decoder: Any) -> int:
        """FLOPs of what is computed with ``text`` tokens of text for n tokens of width d; decoder: the sizes of the decoder."""
        return 0

    def merge_flops(self, n: int, d: int, k: int) -> int:
        """FLOPs of merging into k of n tokens of width d what was not kept: the products that come on top of ``flops``."""
        return 0

    def compress_all(self, parts: Sequence[VisualTokens], ks: Sequence[int]) -> list[CompressedTokens]:
        """Every part as by itself, with its own K."""
        if self.shares_work and sharing.pays(parts):
            return self.compress_alike(parts, ks)
        return [self.compress(v, k) for v, k in zip(parts, ks)]  # type: ignore[attr-defined]

    def compress_alike(self, parts: Sequence[VisualTokens], ks: Sequence[int]) -> list[CompressedTokens]:
        """The same, ``compress_batch`` for all that are alike in size, K, dtype and device, as far as memory allows."""
        done: dict[int, CompressedTokens] = {}
        for some, k in sharing.alike(self.name, parts, ks, self.batch_entries):
            done |= zip(some, self.compress_batch([parts[i] for i in some], k))
        return [done[i] for i in range(len(parts))]

    def compress_batch(self, parts: list[VisualTokens], k: int) -> list[CompressedTokens]:
        """K tokens of each of some parts that are alike, at once: what ``compress`` gives for each, to the bit."""
        raise TypeError(f"{type(self).__name__} sets shares_work and must define compress_batch(parts, k)")

    def batch_entries(self, n: int, d: int) -> int:
        """The numbers that a part of n tokens of width d keeps in memory meanwhile."""
        return n * n

    # ------------------------------------------------------------------------------ what a kind is

    @property
    def parts(self) -> tuple[Compressor, ...]:
        """The methods that run, in their order: itself, or the stages of a composition."""
        return (self,)

    def map_parts(self, change: Callable[[Compressor], Compressor]) -> Compressor:
        """The same with every one of ``parts`` changed."""
        return change(self)

    @property
    def as_projector(self) -> Projector | None:
        """The part that takes the projector's place."""
        return None

    @property
    def as_reducer(self) -> Reducer | None:
        """The part that works inside the decoder."""
        return None

    @property
    def as_resizer(self) -> Resizer | None:
        """The method itself where it makes the image smaller instead of its tokens fewer."""
        return None

    @property
    def merges_tokens(self) -> bool:
        """Whether tokens of the image as it came are merged, so that their rows and contents are lost."""
        return self.merges

    @property
    def fills_rectangles(self) -> bool:
        """Whether what is left of an image are rectangles of tokens, each over its own part of the image."""
        return False

    # ------------------------------------------------------------------------------ what it will do to an image

    def plan(self, adapter: Family, item: Any) -> Plan:
        """What becomes of an item of the adapter, before its tower runs. Raises ``BadBudgetError`` where it cannot be done."""
        shape: VisualShape = item.shape
        groups = groups_of(self, shape, self.wanted(shape, fixed=adapter.fixed_count))
        clamped = self.tokens is not None and any(self.tokens > g.n for g in groups)
        return plan_of(self, shape, groups, clamped)

    def plans(self, adapter: Any, item: Any) -> list[Plan]:
        """The plan after each of ``parts``, all of the item's own shape."""
        return [self.plan(adapter, item)]

    def untouched_plan(self, shape: VisualShape) -> Plan:
        """The plan that leaves everything as it is."""
        return Plan(shape, shape.n, separators=shape.separators, all_marks=True, untouched=True, clamped=(self.tokens or 0) > shape.n)

    def plan_after(self, adapter: Family, item: Any, before: Compressor, done: Plan) -> Plan:
        """``plan`` of what the stage ``before`` leaves by its plan ``done``."""
        then = self.plan(adapter, replace(item, shape=done.seen))
        return replace(then, shape=done.shape, side=done.side, after=done.after, untouched=False)

    def grids_left(self, planned: Plan) -> tuple[Grid, ...] | None:
        """The rectangles that the tokens fill that are left, None where they fill none."""
        return None if planned.groups else grids_of(planned.seen.planes)

    # ------------------------------------------------------------------------------ which models it runs in

    def check(self, adapter: Family) -> None:
        """Raises ``UnsupportedModelError`` or ``BadBudgetError`` where a model cannot run it at all, before any call is made."""
        fit.require_slot(self, adapter)
        self.check_needs(adapter)
        self.check_parts(adapter)
        fit.require_newlines(self, adapter)
        fit.require_positions(self, adapter, self.position_rule(adapter))
        fit.require_later_layers(self, adapter)
        usual = adapter.usual()
        if usual is not None:
            self.check_budget(adapter, usual)

    def check_needs(self, adapter: Family) -> None:
        fit.require_needs(self, adapter)

    def check_parts(self, adapter: Family) -> None:
        fit.require_parts(self, adapter)

    def check_budget(self, adapter: Family, usual: VisualShape) -> None:
        """Raises ``BadBudgetError`` where the budget cannot be met on the shape that every image has."""
        self.wanted(usual, fixed=adapter.fixed_count)

    def position_rule(self, adapter: Family) -> str:
        """ "renumber" or "keep": the method's own rule, else the model's. A token merged in no one's place has no position to keep."""
        return self.positions or ("renumber" if self.merges and not self.in_place else adapter.positions)

    # ------------------------------------------------------------------------------ in words

    def describe(self, shape: VisualShape | None, adapter: Family) -> str:
        """``divprune keeps 56 of 576 tokens per image (removes 90.3%)``; without a shape what it keeps of any image."""
        if shape is None:
            return self.describe_any()
        planned = self.plan(adapter, adapter.item_of(shape))
        return f"{self.describe_plan(planned, adapter)} (removes {100 * (1 - planned.kept / shape.n):.1f}%)"

    def describe_any(self) -> str:
        each = {"image": "image or video", "tile": "tile", "frame": "frame"}[self.per]
        if self.tokens is not None:
            return f"{self.name} keeps up to {self.tokens} tokens per {each}"
        if (fraction := self.budget.fraction or 0.0) == 1:
            return f"{self.name} keeps every token"
        return f"{self.name} keeps {100 * fraction:.1f}% of the tokens per {each} (removes {100 * (1 - fraction):.1f}%)"

    def describe_plan(self, planned: Plan, adapter: Family, first: bool = True) -> str:
        """What a plan says, as the first stage of a composition or a later one."""
        of_all = f"keeps {planned.kept} of {planned.shape.n} tokens per {planned.shape.modality}"
        return f"{self.name} {of_all if first else f'{planned.kept} of them'}"

    def to_dict(self) -> dict[str, Any]:
        """The method as ``me.build`` takes it back: its name and every setting that is not the default."""
        settings = {field.name: (getattr(self, field.name), field.default) for field in dataclasses.fields(self)}
        return {"method": self.name, **{name: value for name, (value, default) in settings.items() if value != default}}

    def spec(self) -> str:
        """The method as a specification, ``divprune:keep=0.1``, of which ``me.build`` makes an equal one."""
        return write(self.name, {k: v for k, v in self.to_dict().items() if k != "method"}, text_fields(type(self)))


def query_aware(cls: type[Compressor]) -> bool:
    """Whether a method looks at the question. All that in-decoder methods can be shown depends on it."""
    return bool(cls.needs) or cls.routes if cls.kind == IN_LLM else bool({"text", "clip_text"} & set(cls.needs))


def generator_for(compressor: Compressor, key: int | str) -> torch.Generator:
    """A CPU generator of its own for (the method's seed, the image's key): batches never change a result."""
    text = f"{compressor.seed}/{key}".encode()
    seed = int.from_bytes(hashlib.sha256(text).digest()[:7], "big")
    return torch.Generator().manual_seed(seed)


def parameters(cls: type[Compressor]) -> dict[str, Any]:
    """The settings a method takes and their defaults."""
    return {f.name: f.default for f in dataclasses.fields(cls) if f.init}


def one_line(cls: type) -> str:
    """The first line of a class's docstring."""
    return (inspect.getdoc(cls) or "").split("\n")[0]


def __getattr__(name: str) -> Any:
    from ..moved import moved_name

    return moved_name("compressors.base", name)
