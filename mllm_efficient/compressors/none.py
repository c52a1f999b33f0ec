"""The uncompressed baseline as a method, so that every command can name it."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import BadBudgetError, BadSettingError
from ..lazy import torch
from ..registry import build, register
from ..tokens import VisualTokens
from .base import Compressor
from .selector import Selector

if TYPE_CHECKING:
    from torch import Tensor


@register("none")
@dataclass(frozen=True, kw_only=True)
class NoCompression(Selector):
    """All visual tokens, untouched: the baseline.

    on: a trained method whose weights the model holds meanwhile; ``none@tokenflex`` says it short.
    """

    keep: float | None = 1.0
    on: str | None = None

    def __post_init__(self) -> None:
        if (self.keep, self.tokens, self.prune, self.min_tokens, self.max_tokens) != (1.0, None, None, None, None):
            raise BadBudgetError("none keeps every token and takes no budget")
        if (self.per, self.newline) != ("image", None):
            raise BadSettingError("none keeps every token and newline column: per= and newline= have no effect")
        super().__post_init__()
        if self.on is not None and re.search(r"(^|[:,])\s*(keep|tokens|prune)\s*=|^$", self.on):
            raise BadSettingError(f"none@{self.on}: a method without its budget is wanted, such as none@tokenflex")
        if self.on is not None and self.positions is not None:
            raise BadSettingError(f"none@{self.on}: positions= has no effect where every token stays")
        if self.on is not None and self.installs is None:
            raise BadSettingError(f"none@{self.on}: {self.on} has no weights of its own")

    @functools.cached_property
    def installs(self) -> Compressor | None:
        if self.on is None:
            return None
        return build(f"{self.on}{',' if ':' in self.on else ':'}keep=1").installs

    def spec(self) -> str:
        return super().spec() if self.on is None else f"{self.name}@{self.on}"

    def select(self, v: VisualTokens, k: int) -> Tensor:  # type: ignore[override]
        return torch.arange(k, device=v.features.device)
