"""Pictures as a base view and tiles (LLaVA-NeXT, LLaVA-OneVision), and videos of pooled frames (LLaVA-NeXT-Video)."""

from __future__ import annotations

import math
from dataclasses import replace

from ..errors import MllmEfficientError, UnsupportedModelError
from ..patches.rules import ASPECT_RATIO, PINPOINTS, canvas_of, most_tiles
from ..tokens import Plane, VisualShape
from .pictures import Grid, Picture, Pictures, Size
from .shapes import ModelShape


class Anyres(Pictures):
    """LLaVA-NeXT: a base view and tiles, whose tokens on padding are cut off, a newline behind each row."""

    gives = frozenset({"attention", "keys", "text", "grid"})
    parts = frozenset({"tile"})
    separators = True
    projects = True

    @property
    def tile(self) -> int:
        return self.model.vision["image_size"]

    @property
    def side(self) -> int:
        return self.tile // self.patch

    def typical(self) -> list[Picture]:
        return [self.of_size((2 * self.tile, 2 * self.tile))]

    def of_size(self, size: Size) -> Picture:
        return self._at(size, self.side)

    def of_tokens(self, n: int, exact: bool) -> list[Picture]:
        """As many tokens do not say how many tiles: those of the smallest square picture with at least n. No newlines."""
        squares = [self.of_size((i * self.tile, i * self.tile)) for i in range(1, 7)]
        enough = [p for p in squares if p.shape.n >= n]
        if not enough:
            most = max(p.shape.n for p in squares)
            if exact:
                raise MllmEfficientError(f"{n} visual tokens: a picture has at most {most} on {self.model.name}")
            return [self.unknown(n, squares[-1], f"{n} tokens")]
        one = enough[0]
        if one.shape.n == n:
            return [self._without_newlines(one)]
        return [self.unknown(n, one, f"{n} tokens, vision cost of {one.says}")]

    @staticmethod
    def _without_newlines(picture: Picture) -> Picture:
        shape = VisualShape(tuple(replace(p, newline=False) for p in picture.shape.planes))
        return replace(picture, shape=shape, says=picture.says.partition(" and ")[0])

    def smaller(self, picture: Picture, unit: Grid) -> Picture:
        assert picture.size is not None
        small = self._at(picture.size, unit[0])
        return small if picture.shape.separators else self._without_newlines(small)

    def tiling(self, size: Size) -> Grid:
        """(rows, columns) of tiles. Raises where the processor and the model would not tile alike."""
        canvas = canvas_of(size, self.model.config[PINPOINTS])
        given = self.model.processor.get(PINPOINTS)
        if given is not None and canvas_of(size, given) != canvas:
            raise MllmEfficientError(
                f"{self.model.name}: its processor and its config.json have other {PINPOINTS}, so it cannot take a picture of "
                f"{size[0]}x{size[1]}: make them alike"
            )
        return canvas[0] // self.tile, canvas[1] // self.tile

    def _at(self, size: Size, side: int) -> Picture:
        """With tiles of side x side tokens."""
        down, across = self.tiling(size)
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
        return Picture(shape, (side, side), views, (side, side), side * side, says, size)

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


class OneVision(Anyres):
    """LLaVA-OneVision: a map of more than about ``anyres_max_9`` times a tile is shrunk."""

    parts = frozenset({"tile", "frame"})

    def _shrunk(self, rows: int, columns: int, side: int) -> Grid:
        tiles = most_tiles(self.model.processor.get(ASPECT_RATIO) or self.model.config[ASPECT_RATIO])
        over = math.sqrt(rows * columns / (tiles * side**2))
        return (int(rows // over), int(columns // over)) if over > 1.1 else (rows, columns)

    def together(self, picture: Picture, n: int) -> list[Picture]:
        """Several pictures of one prompt are not tiled."""
        return [self._untiled(picture.size, self.side)] * n if n > 1 else [picture]

    def _untiled(self, size: Size | None, side: int) -> Picture:
        shape = VisualShape((Plane(side, side),), closing=1)
        pixels = self.tile if side == self.side else side * self.patch
        says = f"a view of {pixels}x{pixels}, {shape.n} tokens and a newline"
        return Picture(shape, (side, side), 1, (side, side), side * side, says, size)

    def smaller(self, picture: Picture, unit: Grid) -> Picture:
        return self._untiled(picture.size, unit[0]) if len(picture.shape.planes) == 1 else super().smaller(picture, unit)


class Video(Anyres):
    """LLaVA-NeXT-Video: videos, whose frames are pooled before the projector; pictures as LLaVA-NeXT has them."""

    parts = frozenset({"tile", "frame"})
    FRAMES = 8

    def __init__(self, model: ModelShape):
        super().__init__(model)
        self.stride = model.config["spatial_pool_stride"]
        if model.config["spatial_pool_mode"] == "conv":
            raise UnsupportedModelError(f"{model.name} pools frames by a convolution, whose FLOPs are not known here")

    def video(self, frames: int, side: int | None = None) -> Picture:
        """A video of so many frames, each side x side patches."""
        side = self.side if side is None else side
        n = side // self.stride
        shape = VisualShape(tuple(Plane(n, n, frame=i) for i in range(frames)), "video")
        says = f"{frames} frames of {side * self.patch}x{side * self.patch}, {shape.n} tokens"
        return Picture(shape, (side, side), frames, (side, side), n * n, says)

    def typical(self) -> list[Picture]:
        return [self.video(self.FRAMES)]

    def of_tokens(self, n: int, exact: bool) -> list[Picture]:
        each = self.video(1).shape.n
        if n % each == 0:
            return [self.video(n // each)]
        if exact:
            raise MllmEfficientError(
                f"{n} visual tokens: every frame gives {each} on {self.model.name}, so ask for a multiple, or for a picture by --image-size"
            )
        return [self.unknown(n, self.video(1), f"{n} tokens")]

    def smaller(self, picture: Picture, unit: Grid) -> Picture:
        if picture.shape.modality == "video":
            return self.video(picture.views, unit[0])
        return super().smaller(picture, unit)
