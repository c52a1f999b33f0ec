"""The base classes of pre-LLM methods. A new method overrides one function (CONTRIBUTING.md shows one in 40 lines)."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..budget import Budget
from ..errors import BadSettingError
from ..lazy import torch
from ..tokens import CompressedTokens, VisualTokens

if TYPE_CHECKING:
    pass

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


def __getattr__(name: str) -> Any:
    from ..moved import moved_name

    return moved_name("compressors.base", name)
