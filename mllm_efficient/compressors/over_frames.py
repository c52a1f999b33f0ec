"""What methods share that spend one budget over the frames of a video."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import BadBudgetError, BadSettingError, CountMismatchError
from ..lazy import torch
from ..tokens import VisualShape, VisualTokens
from .math.cosine import parts_of
from .selector import Selector

if TYPE_CHECKING:
    from torch import Tensor

    from .base import Compressor


@dataclass(frozen=True, kw_only=True)
class OverFrames(Selector):
    """Keeps K tokens of a whole video and decides how many each frame has. A still image is one frame.

    Override ``select`` and ``least``. Where a fraction of a video is fewer than ``least``, that many stay, as in vLLM; ``tokens`` or
    ``max_tokens`` below it raise.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole_video(self)

    def least(self, frames: int, each: int) -> int:
        """The fewest tokens that stay of so many frames of ``each`` tokens."""
        return frames

    def wanted(self, shape: VisualShape, *, fixed: bool) -> int:
        frames = len(shape.planes) if shape.modality == "video" else 1
        return self._at_least(super().wanted(shape, fixed=fixed), frames, shape.n // max(1, frames))

    def count_of(self, v: VisualTokens) -> int:
        frames, each = frames_of(v, self.name)
        return self._at_least(super().count_of(v), frames, each) if frames > 1 else super().count_of(v)

    def _at_least(self, k: int, frames: int, each: int) -> int:
        least = self.least(frames, each)
        if k >= least:
            return k
        for name, most in (("tokens", self.tokens), ("max_tokens", self.max_tokens)):
            if most is not None and most < least:
                raise BadBudgetError(f"{self.name} keeps at least {least} tokens of a video of {frames} frames: {name}={most} is too few")
        return least


def require_whole_video(method: Compressor) -> None:
    """Raises ``BadSettingError`` where ``per`` asks for a budget for each part of what has one budget."""
    if method.per != "image":
        raise BadSettingError(f"{method.name} shares one budget out to the frames of a video: leave per= out")


def frames_of(v: VisualTokens, name: str) -> tuple[int, int]:
    """(T, P): how many frames there are, and how many tokens each has. Raises ``CountMismatchError`` where one has more than another."""
    if v.frame is None:
        return 1, len(v)
    _, counts = v.frame.unique_consecutive(return_counts=True)
    frames, each = len(counts), len(v) // max(1, len(counts))
    if not bool((counts == each).all()):
        raise CountMismatchError(f"{name}: the frames of the video have {counts.tolist()} tokens: all must have as many")
    return frames, each


def first_of(scores: Tensor, counts: Tensor) -> Tensor:
    """(T, P) bool, the ``counts`` (T,) highest of scores (T, P) in each frame; of equal ones the first."""
    order = scores.sort(dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(scores.shape[1], device=scores.device).expand_as(order))
    return rank < counts[:, None]


def columns_of(x: Tensor) -> Iterator[slice]:
    """Columns of rows (N, D) in parts, as ``parts_of`` has rows."""
    return parts_of(x.T)


def of_rows(parts: Tensor, rows: slice, n: int, each: int) -> Tensor:
    """What belongs to some of n rows, (R, D), or (1, D) where all are one part; ``each`` rows after another share a row of parts (T, D)."""
    return parts if len(parts) == 1 else parts[torch.arange(*rows.indices(n), device=parts.device) // each]


def wide(x: Tensor) -> Tensor:
    """x in float64, where the device has it."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)
