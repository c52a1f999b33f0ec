"""Pictures as one square (LLaVA-1.5), as one grid of any size (Qwen-VL), as tiles and a thumbnail (InternVL)."""

from __future__ import annotations

import math

from ..compressors.tome import blocks_of
from ..errors import MllmEfficientError, UnsupportedModelError
from ..patches.rules import grid_of, pixel_limits, views_of
from ..tokens import Plane, VisualShape
from .pictures import Grid, Picture, Pictures, Size
from .shapes import ModelShape


class Fixed(Pictures):
    """LLaVA-1.5: every picture becomes one square."""

    fixed_count = True
    projects = True
    gives = frozenset({"attention", "keys", "text", "grid"})

    @property
    def tower_blocks(self) -> int:
        return blocks_of(self.model.tower.layers, self.model.config["vision_feature_layer"])

    def _at(self, grid: Grid) -> Picture:
        tower, strategy = self.model.tower, self.model.config["vision_feature_select_strategy"]
        if strategy == "default" and not tower.class_token:
            raise UnsupportedModelError(
                f"{self.model.name}: this tower has no class token: its vision_feature_select_strategy must be 'full'"
            )
        planes = (Plane(1, 1), Plane(*grid)) if tower.class_token and strategy != "default" else (Plane(*grid),)
        shape = VisualShape(planes)
        return Picture(shape, grid, 1, grid, shape.n, f"{grid[1] * self.patch}x{grid[0] * self.patch}: {shape.n} tokens")

    def typical(self) -> list[Picture]:
        side = self.model.vision["image_size"] // self.patch
        return [self._at((side, side))]

    def of_size(self, size: Size) -> Picture:
        n = self.typical()[0].shape.n
        raise MllmEfficientError(f"--image-size has no effect on {self.model.name}: every picture gives {n} tokens")

    def of_tokens(self, n: int, exact: bool) -> list[Picture]:
        (one,) = self.typical()
        if n % one.shape.n == 0:
            return [one] * (n // one.shape.n)
        if exact:
            raise MllmEfficientError(
                f"{n} visual tokens: every picture gives {one.shape.n} on {self.model.name}, so ask for a multiple of that"
            )
        return [self.unknown(n, one, f"{n} tokens")]

    def smaller(self, picture: Picture, unit: Grid) -> Picture:
        return self._at(unit)


class Dynamic(Pictures):
    """Qwen-VL: a picture of any size as one grid, every token merged from ``merge`` x ``merge`` patches."""

    parts = frozenset({"frame"})
    positions = "keep"

    def __init__(self, model: ModelShape):
        super().__init__(model)
        self.deepstack = model.family == "qwen3_vl"
        self.merge: int = model.vision["spatial_merge_size"]
        self.step = self.patch * self.merge

    def _at(self, grid: Grid, size: Size | None) -> Picture:
        rows, columns = grid
        seen = f"{columns * self.step}x{rows * self.step}"
        given = "" if size is None or size == (columns * self.step, rows * self.step) else f"{size[0]}x{size[1]} seen as "
        patches = (rows * self.merge, columns * self.merge)
        return Picture(VisualShape((Plane(*grid),)), grid, 1, patches, rows * columns, f"{given}{seen}: {rows * columns} tokens", size)

    def typical(self) -> list[Picture]:
        return [self._at((24, 24), None)]

    def of_size(self, size: Size) -> Picture:
        """The nearest multiple of a token on both sides, scaled to the processor's limits."""
        limits = pixel_limits(self.model.family, self.model.processor)
        return self._at(grid_of(size, self.step, limits, self.model.name), size)

    def of_tokens(self, n: int, exact: bool) -> list[Picture]:
        """The picture nearest to a square."""
        rows = max(r for r in range(1, math.isqrt(n) + 1) if n % r == 0)
        if n > 4 * rows * rows:
            if exact:
                raise MllmEfficientError(f"no picture near to a square has {n} tokens on {self.model.name}: give --image-size WxH instead")
            return [self.unknown(n, self._at((rows, n // rows), None), f"{n} tokens")]
        return [self._at((rows, n // rows), None)]

    def smaller(self, picture: Picture, unit: Grid) -> Picture:
        return self._at(unit, None)


class Tiled(Pictures):
    """InternVL: tiles of the picture and a thumbnail, each a grid of pixel-shuffled tokens."""

    parts = frozenset({"tile"})

    def __init__(self, model: ModelShape):
        super().__init__(model)
        side = model.vision["image_size"]
        self.tile: int = side if isinstance(side, int) else side[0]
        self.ratio: float = model.config["downsample_ratio"]

    def _at(self, views: int, side: int, says: str, size: Size | None = None) -> Picture:
        """So many views of side x side tokens."""
        shape = VisualShape(tuple(Plane(side, side, tile=i) for i in range(views)))
        patches = int(side / self.ratio)
        said = f"{says}{views} views of {patches * self.patch}x{patches * self.patch}, {shape.n} tokens"
        return Picture(shape, (side, side), views, (patches, patches), side * side, said, size)

    @property
    def side(self) -> int:
        return int(self.tile // self.patch * self.ratio)

    def typical(self) -> list[Picture]:
        return [self.of_size((2 * self.tile, 2 * self.tile))]

    def of_size(self, size: Size) -> Picture:
        tile = self.model.processor.get("size") or {}
        seen = (tile.get("width") or self.tile, tile.get("height") or self.tile)
        return self._at(views_of(size, seen, self.model.processor), self.side, f"{size[0]}x{size[1]}: ", size)

    def of_tokens(self, n: int, exact: bool) -> list[Picture]:
        each = self.side**2
        if n % each == 0:
            return [self._at(n // each, self.side, "")]
        if exact:
            raise MllmEfficientError(f"{n} visual tokens: every view gives {each} on {self.model.name}, so ask for a multiple of that")
        return [self.unknown(n, self._at(1, self.side, ""), f"{n} tokens")]

    def smaller(self, picture: Picture, unit: Grid) -> Picture:
        return self._at(picture.views, unit[0], "")
