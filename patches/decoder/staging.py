"""What is to be done to the prompts of a call inside the decoder, and what a cache remembers of it: pure data."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from mllm_efficient.compressors.reducer import Reducer
from mllm_efficient.tokens import Grid

from .weighing import Weights


@dataclass(frozen=True)
class StagedImage:
    """The visual tokens of one image in a prompt. row: of the batch. columns: (N,), separators: (S,) where they stand.

    places: (N, 4) image within its row, plane, row and column. counts: tokens left after each stage. keep_separators:
    whether newline columns stay where tokens go. origin: (N,) the number of each among all tokens of the image, or among what
    those were merged to before they came here. grids: (rows, columns) of the rectangles they fill, None where they fill none.
    key: for methods that draw. held: (N,) how many tokens each holds, None for one each.
    """

    row: int
    columns: Tensor
    separators: Tensor
    places: Tensor
    counts: tuple[int, ...]
    origin: Tensor
    keep_separators: bool = False
    grids: tuple[Grid, ...] | None = None
    key: int | str = 0
    held: Tensor | None = None


@dataclass(frozen=True)
class Staging:
    """What is done to the prompts of one call. The same object serves every forward of a ``generate``.

    stages: the layers at whose input tokens go. positions: "renumber" or "keep". mask: (B, P) bool, the prompts without
    padding. last: (B,) the column of each instruction's last token. text: of each row the columns of its text tokens up to
    there; read: of each row the columns that a router reads. All on the CPU. outcome: filled in by the forward that
    shortens: ``indices`` (k,) of each image at the end, ``left`` after each stage of each image, ``decided`` at each stage,
    ``watches`` (``Stopwatch``, one for each stage).
    estimator: how a method that routes draws in training, and what gives its router a gradient; generator: what it draws from.
    meter: what is entered while the method and the model on its behalf compute.
    """

    method: Reducer
    stages: tuple[int, ...]
    positions: str
    mask: Tensor
    last: Tensor
    text: tuple[Tensor, ...]
    read: tuple[Tensor, ...]
    images: tuple[StagedImage, ...]
    estimator: str = "scaling"
    generator: Any = None
    meter: Callable[[], AbstractContextManager[Any]] = nullcontext
    outcome: dict[str, Any] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return self.mask.shape[1]


@dataclass(frozen=True)
class Segment:
    """The prompts as the layers from ``first`` on see them. mask: (S, n) bool on the CPU, padding on the left.

    columns: (S, n) the column of the full prompt that each slot holds, or held the first of; anything where it is padding.
    """

    first: int
    mask: Tensor
    columns: Tensor

    @cached_property
    def lengths(self) -> Tensor:
        return self.mask.sum(1)


@dataclass
class Shortened:
    """What a cache remembers of the prompts in it. length: columns of the full prompts; segments: in layer order.

    weights: what is added to the attention that their columns get.
    """

    length: int
    positions: str
    segments: list[Segment] = field(default_factory=list)
    weights: Weights | None = None
