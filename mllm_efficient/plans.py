"""What a method will do to an image or video, known before any pixel is looked at: pure data, no model, no method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .lazy import torch
from .tokens import Grid, Plane, VisualShape

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Group:
    """Tokens that are compressed together.

    plane: the rectangle they form, if they form one. n: how many they are. k: the budget handed to the method. kept: the
    tokens it gives for that. whole: whether they are all of the image. corner: the number of the rectangle's first token
    in the image, and what lies between two of its rows.
    """

    plane: Plane | None
    n: int
    k: int
    kept: int
    whole: bool = True
    corner: tuple[int, int] = (0, 0)

    @property
    def indices(self) -> Tensor | None:
        """(n,) of its tokens in the image, None for all of them."""
        if self.whole or self.plane is None:
            return None
        return torch.tensor(self.places)

    @property
    def places(self) -> list[int]:
        """The same as numbers."""
        if self.whole or self.plane is None:
            return list(range(self.n))
        first, stride = self.corner
        return [first + row * stride + column for row in range(self.plane.rows) for column in range(self.plane.columns)]

    @property
    def grid(self) -> tuple[int, int] | None:
        return (self.plane.rows, self.plane.columns) if self.plane else None


def room_for(grid: Grid | None, n: int, within: Grid | None) -> list[int]:
    """The n tokens of a plane whose places n new ones take: the first, or those of its first rows and columns.

    grid: of the new ones, if any. within: (rows, columns) of the plane where its rows are marked, so that they go on being rows.
    """
    if grid is None or within is None or grid[0] > within[0] or grid[1] > within[1]:
        return list(range(n))
    return [row * within[1] + column for row in range(grid[0]) for column in range(grid[1])]


@dataclass(frozen=True)
class Plan:
    """A method on one item of ``shape``.

    groups: of a method that works on tokens. rounds: of one in the tower, for every view, the tokens that each block
    takes off, so far as that is known before. stay: of one before the tower, the tokens that it runs on, ascending.
    smaller: the grid a smaller image is given; side: tokens along a side of
    each tile under another projector; after: the shape that either gives. kept: tokens that are left. separators: newline
    columns and separators that are left. all_marks: whether the text between placeholders stays wherever its row or tile has gone;
    else what is left of it depends on which tokens are. untouched: every token and separator stays as it is. clamped: more tokens were
    asked than there are. stages: of an in-decoder method (layer, tokens from there on); per_layer: its tokens at every layer, of
    which kept is the mean, rounded; entering: separators that the first layer sees. open: how many tokens each group keeps is decided
    when they are there; its kept is what it may be at most, or on average.
    """

    shape: VisualShape
    kept: int
    groups: tuple[Group, ...] = ()
    smaller: tuple[int, int] | None = None
    side: int | None = None
    after: VisualShape | None = None
    separators: int = 0
    all_marks: bool = False
    untouched: bool = False
    clamped: bool = False
    stages: tuple[tuple[int, int], ...] = ()
    per_layer: tuple[int, ...] = ()
    entering: int = 0
    rounds: tuple[tuple[int, ...], ...] = ()
    stay: tuple[int, ...] = ()
    open: bool = False

    @property
    def seen(self) -> VisualShape:
        """The shape of the tokens that ``groups`` are of: after another projector that of what it gives."""
        return self.shape if self.after is None else self.after
