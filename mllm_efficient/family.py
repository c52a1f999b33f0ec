"""What planning and checking a method ask of a model's family: an adapter answers for a model, rules for a configuration alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from .tokens import Grid, VisualShape

if TYPE_CHECKING:
    from .compressors.reducer import Reducer


class Family(Protocol):
    """The facts of one model that decide what a method does to an image, before any pixel is looked at.

    name: of the model, for messages. gives: what methods may need beyond the features. fixed_count: whether every image has as many
    tokens. positions: the default rule, "renumber" or "keep". parts: what ``per=`` can name. separators: whether there are newline
    columns; marks: whether text stands between the tokens of an image. deepstack: whether later layers add visual features; deep_layers:
    how many do. mrope: whether positions have three rows. control: settings by which the model itself gives
    pictures fewer tokens, in words, "" where it has none. projects: whether another projector can take the place of the model's.
    sees_both_ways: whether the tokens of an image see those after them. decoder: the class of the decoder's layers; recurrent: kinds of
    them that carry a state along. decoder_layers, tower_blocks: how many there are, and blocks of the tower that can merge tokens (0:
    none can).

    drops_patches: whether the tower can run on some patches of an image, in their places.

    An item is one that the same object made: those of an adapter hold pixels, those of rules a size.
    """

    @property
    def name(self) -> str: ...
    @property
    def gives(self) -> frozenset[str]: ...
    @property
    def fixed_count(self) -> bool: ...
    @property
    def positions(self) -> str: ...
    @property
    def parts(self) -> frozenset[str]: ...
    @property
    def separators(self) -> bool: ...
    @property
    def marks(self) -> bool: ...
    @property
    def deepstack(self) -> bool: ...
    @property
    def deep_layers(self) -> int: ...
    @property
    def mrope(self) -> bool: ...
    @property
    def control(self) -> str: ...
    @property
    def projects(self) -> bool: ...
    @property
    def sees_both_ways(self) -> bool: ...
    @property
    def drops_patches(self) -> bool: ...
    @property
    def decoder(self) -> str: ...
    @property
    def recurrent(self) -> tuple[str, ...]: ...
    @property
    def decoder_layers(self) -> int: ...
    @property
    def tower_blocks(self) -> int: ...

    def usual(self) -> VisualShape | None:
        """The shape of every image where all have the same, else None."""

    def item_of(self, shape: VisualShape) -> Any:
        """An item of which nothing but the shape is known."""

    def unit(self, item: Any) -> Grid:
        """The grid of the image, or of each of its tiles, in tokens: what ``resize`` makes smaller."""

    def shape_at(self, item: Any, grid: Grid) -> VisualShape:
        """The shape of the item if its ``unit`` grid were this one."""

    def projected(self, item: Any, side: int) -> VisualShape:
        """The shape of an image, each of whose tiles has side x side tokens."""

    def check_positions(self, rule: str) -> None:
        """Raises ``UnsupportedModelError`` for a rule of positions, "renumber" or "keep", that the model cannot follow."""

    def check_inside(self, method: Reducer) -> None:
        """Raises ``UnsupportedModelError`` where an in-decoder method cannot run in this model."""
