"""The base classes of pre-LLM methods. A new method overrides one function (CONTRIBUTING.md shows one in 40 lines)."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..budget import Budget
from ..errors import BadBudgetError, BadSettingError, CountMismatchError
from ..lazy import torch
from ..tokens import CompressedTokens, VisualTokens
from ._finite import require_scores

if TYPE_CHECKING:
    from torch import Tensor

TOGETHER = 2**27  # entries in memory at a time: 512 MB of float32, 1 GB of float64
BUDGET_FIELDS = ("keep", "tokens", "prune", "min_tokens", "max_tokens")


@dataclass(frozen=True, kw_only=True)
class Compressor:
    """What every method has: a name, a budget, a position rule. Frozen; nothing of a call is kept on it.

    keep, tokens, prune: fraction kept, count kept, fraction removed; exactly one. min_tokens, max_tokens bound a
    fraction's count. positions: None is the model family's default ("renumber" on 1-D RoPE, "keep" on M-RoPE), "keep"
    leaves every kept token at its place in the uncompressed prompt. per: what the budget is for: every "image" (or
    video), every "tile" of an anyres image, every "frame" of a video. newline: None drops the newline and separator
    columns of an image that loses tokens, "keep" keeps them all.
    """

    name: ClassVar[str] = ""
    family: ClassVar[str] = "P"
    needs: ClassVar[Any] = frozenset()
    trained: ClassVar[bool] = False
    paper: ClassVar[str] = ""
    merges: ClassVar[bool] = False

    keep: float | None = None
    tokens: int | None = None
    prune: float | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    positions: str | None = None
    per: str = "image"
    newline: str | None = None

    def __post_init__(self):
        self.budget  # noqa: B018  (raises on a bad budget)
        if self.positions not in (None, "renumber", "keep"):
            raise BadSettingError(f"positions={self.positions!r} is not one of 'renumber', 'keep'")
        if self.positions == "keep" and self.merges and self.family != "L":  # inside the decoder it takes the place of one of them
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
        """Whether the method merges in the blocks of the tower: it defines ``in_blocks(n, k, blocks)``, the pairs in each."""
        return False

    def in_blocks(self, n: int, k: int, blocks: int) -> tuple[int, ...]:
        raise TypeError(f"{type(self).__name__} must define in_blocks(n, k, blocks)")

    @property
    def installs(self) -> Compressor | None:
        """The trained method whose weights a model holds under this one."""
        return None

    @property
    def same_weights(self) -> str | None:
        """Specification of the baseline with all tokens on a trained method's weights: ``none@tokenflex``."""
        weights = getattr(self, "weights", None)
        return None if self.installs is not self else f"none@{self.name}" + (f":weights={weights}" if weights else "")

    def count(self, n: int, grid: tuple[int, int] | None, *, fixed: bool = True) -> int:
        """K of an image with n tokens on one grid, known before any pixel is looked at."""
        return self.yields(self.budget.count(n, fixed=fixed), grid)

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

    def compress_all(self, parts: Sequence[VisualTokens], ks: Sequence[int]) -> list[CompressedTokens]:
        """Every part by itself, with its own K. For a method that can share work between images: it overrides this."""
        return [self.compress(v, k) for v, k in zip(parts, ks)]  # type: ignore[attr-defined]

    def to_dict(self) -> dict[str, Any]:
        """The method as ``me.build`` takes it back: its name and every setting that is not the default."""
        out: dict[str, Any] = {"method": self.name}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                out[field.name] = value
        return out

    def spec(self) -> str:
        """The method as a specification string, ``divprune:keep=0.1``."""
        settings = ",".join(f"{k}={'null' if v is None else v}" for k, v in self.to_dict().items() if k != "method")
        return f"{self.name}:{settings}" if settings else self.name


def query_aware(cls: type[Compressor]) -> bool:
    """Whether a method looks at the question. All that in-decoder methods can be shown depends on it."""
    return bool(cls.needs) or getattr(cls, "routes", False) if cls.family == "L" else bool({"text", "clip_text"} & set(cls.needs))


@dataclass(frozen=True, kw_only=True)
class Selector(Compressor):
    """Keeps K of the N tokens as they are. Override ``score`` (the K highest stay) or ``select``.

    ``select(v, k)`` may return any order; callers get raster order. It may be called with a tensor (N, D) and
    without k, which is then computed from the budget.
    """

    def score(self, v: VisualTokens) -> Tensor:
        """One score per token, (N,); the highest stay, ties go to the lowest index."""
        raise TypeError(f"{type(self).__name__} must define score(v) or select(v, k)")

    def select(self, v: VisualTokens | Tensor, k: int | None = None) -> Tensor:
        """Indices of the tokens to keep, LongTensor (K,)."""
        assert isinstance(v, VisualTokens)
        scores = self.score(v)
        if scores.shape != (len(v),):
            raise CountMismatchError(f"{self.name}: score gave {tuple(scores.shape)} for {len(v)} tokens: one each")
        require_scores(scores, self.name)
        return scores.sort(descending=True, stable=True).indices[:k]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "select" in cls.__dict__:
            cls.select = _checked(cls.select)  # type: ignore[method-assign]

    def compress(self, v: VisualTokens, k: int) -> CompressedTokens:
        indices = self.select(v, k)
        return CompressedTokens(v.features[indices], indices)

    def compress_alike(
        self,
        parts: Sequence[VisualTokens],
        ks: Sequence[int],
        choose: Callable[[list[VisualTokens], int], Tensor],
        entries: Callable[[int, int], int],
    ) -> list[CompressedTokens]:
        """``compress_all`` that hands ``choose`` all parts that are alike in size, K, dtype and device, as far as memory allows.

        choose: (parts, k) -> (B, k) indices. entries: (n, d) -> the numbers that a part of n tokens of width d keeps in memory.
        """
        done: dict[int, CompressedTokens] = {}
        for some, k in alike(self.name, parts, ks, entries):
            indices = choose([parts[i] for i in some], k)
            if getattr(self, "order", "raster") == "raster":
                indices = indices.sort(dim=1).values
            done |= {i: CompressedTokens(parts[i].features[index], index) for i, index in zip(some, indices)}
        return [done[i] for i in range(len(parts))]


def alike(
    name: str, parts: Sequence[VisualTokens], ks: Sequence[int], entries: Callable[[int, int], int]
) -> Iterator[tuple[list[int], int]]:
    """Numbers of the parts that are alike in size, K, dtype and device, as many at a time as memory allows, and their K."""
    groups: dict[Any, list[int]] = {}
    for i, (v, k) in enumerate(zip(parts, ks)):
        if not 1 <= k <= len(v):
            raise BadBudgetError(f"{name}: {k} of {len(v)} tokens cannot be kept")
        groups.setdefault((v.features.shape, v.features.dtype, v.features.device, k), []).append(i)
    for ((n, d), *_, k), members in groups.items():
        most = max(1, TOGETHER // entries(n, d))
        yield from ((members[start : start + most], k) for start in range(0, len(members), most))


def _checked(select: Callable) -> Callable:
    """``select`` that takes a bare tensor too, and returns exactly k indices in raster order."""

    @functools.wraps(select)
    def checked(self, v, k=None):
        if not isinstance(v, VisualTokens):
            if v.ndim != 2:
                raise CountMismatchError(f"{self.name}: features must be (tokens, width), not {tuple(v.shape)}")
            v = VisualTokens(v, generator=generator_for(self, 0))
        k = self.count(len(v), v.grid) if k is None else k
        if not 1 <= k <= len(v):
            raise BadBudgetError(f"{self.name}: {k} of {len(v)} tokens cannot be kept")
        indices = select(self, v, k)
        if indices.shape != (k,):
            raise CountMismatchError(f"{self.name}: select gave {tuple(indices.shape)} indices where {k} were asked")
        if indices.min() < 0 or indices.max() >= len(v):
            raise CountMismatchError(f"{self.name}: select gave an index outside 0..{len(v) - 1}")
        return indices if getattr(self, "order", "raster") == "picked" else indices.sort().values

    return checked


Selector.select = _checked(Selector.select)  # type: ignore[method-assign]


@dataclass(frozen=True, kw_only=True)
class Merger(Compressor):
    """Makes new tokens out of N. Override ``merge(v, k) -> CompressedTokens``, and ``yields`` where it gives fewer than k.

    channelwise: whether every channel is merged by itself and by places alone, as pooling does, so that the features
    that some models add in later layers (deepstack) can be merged alike.
    """

    merges: ClassVar[bool] = True
    channelwise: ClassVar[bool] = False

    def merge(self, v: VisualTokens, k: int) -> CompressedTokens:
        raise TypeError(f"{type(self).__name__} must define merge(v, k)")

    def target(self, grid: tuple[int, int] | None, k: int) -> tuple[int, int]:
        """The grid that the merged tokens fill: a row of them where they fill none."""
        return 1, self.yields(k, grid)

    def compress(self, v: VisualTokens, k: int) -> CompressedTokens:
        out, wanted = self.merge(v, k), self.yields(k, v.grid)
        if len(out) != wanted:
            raise CountMismatchError(f"{self.name}: merge gave {len(out)} tokens where {wanted} were asked")
        return out


@dataclass(frozen=True, kw_only=True)
class Resizer(Compressor):
    """Changes the picture instead of its tokens. ``target(grid, k, tokens)`` gives the smaller grid the tower shall see.

    grid is one the picture (or each of its tiles) has now; ``tokens(smaller)`` is the image's count with a smaller one.
    """

    merges: ClassVar[bool] = True

    def target(self, grid: tuple[int, int], k: int, tokens: Callable[[tuple[int, int]], int] = lambda g: g[0] * g[1]) -> tuple[int, int]:
        raise TypeError(f"{type(self).__name__} must define target(grid, k)")


@dataclass(frozen=True, kw_only=True)
class Projector(Compressor):
    """Replaces the model's projector by a trained one that gives side x side tokens per picture, side chosen at run time.

    Override ``module(inputs, outputs)`` and ``projector_flops``. The budget is of one picture, or of each tile of an anyres
    picture: the largest square of at most K tokens. weights: a folder that ``mllm-efficient train`` wrote, or a hub id;
    "random" draws them, for timing alone; None is what ships for the embedded model.
    """

    family: ClassVar[str] = "J"
    trained: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    weights: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.per != "image" or self.newline is not None:
            raise BadSettingError(f"{self.name} gives every tile its tokens and keeps no newline columns: leave per= and newline= out")
        if self.weights is not None and not isinstance(self.weights, str):
            raise BadSettingError(f"{self.name}: weights={self.weights!r} is no folder or hub id")
        if self.tokens is not None and math.isqrt(self.tokens) ** 2 != self.tokens:
            near = math.isqrt(self.tokens)
            raise BadBudgetError(f"{self.name}: tokens={self.tokens} is no square: {near**2} and {(near + 1) ** 2} are")

    @property
    def full_is_identity(self) -> bool:
        return False

    @property
    def installs(self) -> Projector | None:
        return self

    def yields(self, k: int, grid: tuple[int, int] | None) -> int:
        return math.isqrt(k) ** 2

    def side(self, grid: tuple[int, int]) -> int:
        """Tokens along a side of what a tile of this grid becomes."""
        return math.isqrt(self.budget.count(grid[0] * grid[1], fixed=True))

    def module(self, inputs: int, outputs: int, **config: Any) -> Any:
        """A projector from tower width to language-model width, its weights not loaded yet."""
        raise TypeError(f"{type(self).__name__} must define module(inputs, outputs)")

    def projector_flops(self, inputs: int, outputs: int, n: int) -> int:
        """FLOPs of making n tokens, matrix products alone."""
        raise TypeError(f"{type(self).__name__} must define projector_flops(inputs, outputs, n)")


def generator_for(compressor: Compressor, key: int | str) -> torch.Generator:
    """A CPU generator of its own for (the method's seed, the image's key): batches never change a result."""
    import hashlib

    text = f"{getattr(compressor, 'seed', 0)}/{key}".encode()
    seed = int.from_bytes(hashlib.sha256(text).digest()[:7], "big")
    return torch.Generator().manual_seed(seed)


def parameters(cls: type[Compressor]) -> dict[str, Any]:
    """The settings a method takes and their defaults."""
    return {f.name: f.default for f in dataclasses.fields(cls) if f.init}


def one_line(cls: type) -> str:
    """The first line of a class's docstring."""
    return (inspect.getdoc(cls) or "").split("\n")[0]
