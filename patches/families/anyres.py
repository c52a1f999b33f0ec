"""Anyres, what the LLaVA families of tiles share: a base view and tiles of the image, put together to a map without its padding."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from mllm_efficient.errors import MllmEfficientError
from mllm_efficient.tokens import Grid, Plane, VisualShape

from ..pictures import PINPOINTS
from ..rules import Rules, Size, Views
from ..sizes import ProjectorSize, Tower, clip_or_siglip, projector_after


class AnyresRules(Rules):
    """A base view and tiles, whose tokens on padding are cut off, a newline after each row."""

    gives = frozenset({"attention", "early_attention", "keys", "text", "grid"})
    parts = frozenset({"tile"})
    separators = True
    projects = True
    counting: ClassVar[tuple[str, ...]] = (PINPOINTS,)

    @functools.cached_property
    def tower_size(self) -> Tower:
        return clip_or_siglip(self.config.vision_config, self.name)

    @functools.cached_property
    def projector_size(self) -> ProjectorSize:
        return projector_after(self.config.vision_feature_layer, self.tower_size, self.decoder_size.width)

    @property
    def tile(self) -> int:
        """Pixels along a side of a tile."""
        return self.config.vision_config.image_size

    @property
    def side(self) -> int:
        """Tokens along a side of a tile."""
        return self.tile // self.config.vision_config.patch_size

    def typical(self) -> list[Views]:
        return [self.of_size((2 * self.tile, 2 * self.tile))]

    def of_size(self, size: Size) -> Views:
        return self._at(size, self.side)

    def of_tokens(self, n: int, exact: bool) -> list[Views]:
        """As many tokens do not say how many tiles: those of the smallest square image with at least n. No newlines."""
        squares = [self.of_size((i * self.tile, i * self.tile)) for i in range(1, 7)]
        enough = [p for p in squares if p.shape.n >= n]
        if not enough:
            most = max(p.shape.n for p in squares)
            if exact:
                raise MllmEfficientError(f"{n} visual tokens: a picture has at most {most} on {self.name}")
            return [self.unknown(n, squares[-1], f"{n} tokens")]
        one = enough[0]
        if one.shape.n == n:
            return [self._without_newlines(one)]
        return [self.unknown(n, one, f"{n} tokens, vision cost of {one.says}")]

    @staticmethod
    def _without_newlines(image: Views) -> Views:
        shape = VisualShape(tuple(replace(p, newline=False) for p in image.shape.planes))
        return replace(image, shape=shape, says=image.says.partition(" and ")[0])

    def smaller(self, image: Views, unit: Grid) -> Views:
        assert image.size is not None
        small = self._at(image.size, unit[0])
        return small if image.shape.separators else self._without_newlines(small)

    def tiles(self, size: Size) -> Grid:
        """(rows, columns) of tiles. Raises where the processor and the model would not tile alike."""
        canvas = canvas_of(size, self.config.image_grid_pinpoints)
        given = self.settings.get(PINPOINTS)
        if given is not None and canvas_of(size, given) != canvas:
            raise MllmEfficientError(
                f"{self.name}: its processor and its config.json have other {PINPOINTS}, so it cannot take a picture of "
                f"{size[0]}x{size[1]}: make them alike"
            )
        return canvas[0] // self.tile, canvas[1] // self.tile

    def _at(self, size: Size, side: int) -> Views:
        """With tiles of side x side tokens."""
        down, across = self.tiles(size)
        top, height, left, width = self._shown(size, down * side, across * side)
        rows, columns = self._shrunk(height, width, side)
        plane = Plane(
            rows, columns, tile=1, newline=True,
            row_tiles=tuple(int((top + (i + 0.5) * height / rows) // side) * across for i in range(rows)),
            column_tiles=tuple(int((left + (i + 0.5) * width / columns) // side) for i in range(columns)),
        )  # fmt: skip
        shape = VisualShape((Plane(side, side), plane))
        views, pixels = 1 + down * across, self.tile if side == self.side else side * self.patch
        says = f"{size[0]}x{size[1]}: {views} views of {pixels}x{pixels}, {shape.n} tokens and {shape.separators} newlines"
        return Views(shape, (side, side), views, (side, side), side * side, says, size)

    @staticmethod
    def _shown(size: Size, rows: int, columns: int) -> tuple[int, int, int, int]:
        """(top, height, left, width) in tokens of the canvas that is not padding; transformers' own rounding."""
        width, height = size
        if width / height > columns / rows:
            pad = (rows - int(round(height * (columns / width), 7))) // 2
            return pad, rows - 2 * pad, 0, columns
        pad = (columns - int(round(width * (rows / height), 7))) // 2
        return 0, rows, pad, columns - 2 * pad

    def _shrunk(self, rows: int, columns: int, side: int) -> Grid:
        """What becomes of a map of rows x columns tokens."""
        return rows, columns


def canvas_of(size: Size, pinpoints: Sequence[Sequence[int]]) -> Size:
    """(height, width) of the pinpoint that shows most of the image, among equals the smallest."""
    width, height = size

    def rank(canvas: Sequence[int]) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - canvas[0] * canvas[1]

    rows, columns = max(pinpoints, key=rank)
    return rows, columns
