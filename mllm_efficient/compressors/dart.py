"""DART: after an early layer, the visual tokens that are least like a few pivots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..errors import BadSettingError
from ..lazy import torch
from ..registry import register
from ..tokens import LayerTokens
from .math.finite import require_finite
from .reducer import OneStage

if TYPE_CHECKING:
    from torch import Tensor


@register("dart")
@dataclass(frozen=True, kw_only=True)
class Dart(OneStage):
    """From ``layer`` on, visual pivots and, in equal shares, the visual tokens least similar to each pivot.

    Pivots are the ``pivots`` visual and the ``text_pivots`` text tokens with the largest L1 norm of their keys in the layer
    before. One pivot after the other, visual ones first, takes its share of the tokens that are left by cosine similarity
    of the states; needs no attention, so any kernel will do. O(n d^2 + pivots n d).
    Source: DART (arXiv 2502.11494).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"keys"})
    paper: ClassVar[str] = "arXiv 2502.11494"

    pivots: int = 4
    text_pivots: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, least in (("pivots", 1), ("text_pivots", 0)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise BadSettingError(f"{self.name}: {field}={value!r} is not a whole number of at least {least}")

    def select(self, v: LayerTokens, k: int) -> Tensor:
        assert v.keys is not None and v.text_keys is not None
        pivots = strongest(v.keys, min(self.pivots, k))
        states = torch.cat([v.hidden[pivots], v.text[strongest(v.text_keys, min(self.text_pivots, len(v.text)))]]).float()
        similarity = torch.nn.functional.normalize(states, dim=-1) @ torch.nn.functional.normalize(v.hidden.float(), dim=-1).T
        require_finite(similarity, self.name, "similarities")
        chosen = [pivots]
        for row, share in zip(similarity, shares(k - len(pivots), len(states))):
            row = row.index_fill(0, torch.cat(chosen), float("inf"))
            chosen.append(row.sort(stable=True).indices[:share])
        return torch.cat(chosen)

    def choice_flops(self, n: int, k: int, text: int, d: int, full: int) -> int:
        return 2 * n * d * (min(self.pivots, k) + min(self.text_pivots, text))


def strongest(keys: Tensor, count: int) -> Tensor:
    """The ``count`` of keys (n, w) with the largest L1 norm; ties go to the lowest index."""
    return keys.float().abs().sum(-1).sort(descending=True, stable=True).indices[:count]


def shares(total: int, parts: int) -> list[int]:
    """``total`` in equal parts, the first ones larger by the rest."""
    return [total // parts + (i < total % parts) for i in range(parts)]
