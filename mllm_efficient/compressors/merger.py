"""Mergers make new tokens out of N."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import CountMismatchError
from ..tokens import CompressedTokens, VisualTokens
from .base import Compressor


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
