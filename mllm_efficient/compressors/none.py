"""The uncompressed baseline as a method, so that every command can name it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import BadBudgetError, BadSettingError
from ..lazy import torch
from ..registry import get_method, register, settings_in, with_budget
from ..spec import BASELINE_ON, text_fields, write
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
        if (self.merge, self.age) != (None, None):
            raise BadSettingError("none keeps every token: merge= and age= have no effect")
        super().__post_init__()
        if self.on is None:
            return
        if not isinstance(self.on, str) or len(stages := settings_in(self.on)) != 1 or not stages[0]["method"] or _budgets(stages[0]):
            raise BadSettingError(f"{BASELINE_ON}{self.on}: a method without its budget is wanted, such as {BASELINE_ON}tokenflex")
        if self.positions is not None:
            raise BadSettingError(f"{BASELINE_ON}{self.on}: positions= has no effect where every token stays")
        if self.installs is None:
            raise BadSettingError(f"{BASELINE_ON}{self.on}: {self.on} has no weights of its own")
        name = stages[0].pop("method")
        object.__setattr__(self, "on", write(name, stages[0], text_fields(get_method(name))))

    @functools.cached_property
    def installs(self) -> Compressor | None:
        return None if self.on is None else with_budget(settings_in(self.on), keep=1).installs

    def spec(self) -> str:
        return super().spec() if self.on is None else f"{BASELINE_ON}{self.on}"

    def select(self, v: VisualTokens, k: int) -> Tensor:  # type: ignore[override]
        return torch.arange(k, device=v.features.device)


def _budgets(settings: dict[str, Any]) -> set[str]:
    return {"keep", "tokens", "prune"} & set(settings)
