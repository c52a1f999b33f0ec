"""Llama 4: tiles of the image and the whole of it, text between tiles and after a row of them; features that its forward projects."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mllm_efficient.errors import CountMismatchError, UnsupportedModelError
from mllm_efficient.tokens import Grid, Mark, Plane, VisualShape

from ..base import runs_in
from ..rules import Settings, Size, Views
from ..sizes import ProjectorSize
from .internvl import InternVLAdapter, InternVLRules

if TYPE_CHECKING:
    from torch import Tensor

MOST_TILES = 16
BETWEEN, ROW_END, WHOLE = "<|tile_x_separator|>", "<|tile_y_separator|>", "<|image|>"


class Llama4Rules(InternVLRules):
    """The shapes of Llama 4. Its features are those in front of the projector, which have no width in common with text."""

    gives = frozenset({"grid"})
    marks = True
    counting = ("max_patches", "resize_to_max_canvas")

    @functools.cached_property
    def projector_size(self) -> ProjectorSize:
        """The adapter at the tower's end, then the matrix that the model's forward multiplies the tokens that are left with."""
        vision = self.config.vision_config
        inside = vision.vision_output_dim * self.decoder_size.width
        return ProjectorSize(vision.intermediate_size, vision.projector_input_dim, vision.projector_output_dim, inside=inside)

    @property
    def tower_blocks(self) -> int:
        return 0

    @property
    def class_token(self) -> bool:
        return True

    @property
    def patch(self) -> int:
        return self.config.vision_config.patch_size

    @property
    def shrunk(self) -> int:
        return round(1 / self.config.vision_config.pixel_shuffle_ratio)

    def tiling(self, size: Size, settings: Settings) -> Grid:
        """The canvas on which the picture need be shrunk least, or enlarged least; of equals the one with the fewest tiles."""
        scales = {}
        for rows, columns in canvases(settings.get("max_patches") or MOST_TILES):
            across, down = (side * count / have for side, count, have in zip(self.tile_size(settings), (columns, rows), size))
            scales[rows, columns] = min(across, down)
        enough = [scale for scale in scales.values() if scale >= 1]
        best = max(scales.values()) if not enough else max(enough) if settings.get("resize_to_max_canvas") else min(enough)
        return min((canvas for canvas, scale in scales.items() if scale == best), key=math.prod)

    def controls(self, size: Size, k: int) -> Iterable[Settings]:
        return [{"max_patches": tiles} for tiles in range(self.settings.get("max_patches") or MOST_TILES, 0, -1)]

    def shape(self, tiles: int, grid: Grid, rows: int | None = None) -> VisualShape:
        """rows: of tiles; where that is not known, those of the squarest picture."""
        if rows is None:
            rows = max(r for r in range(1, math.isqrt(max(1, tiles - 1)) + 1) if (tiles - 1) % r == 0)
        return VisualShape(tuple(Plane(*grid, tile=i) for i in range(tiles)), marks=tile_marks(tiles, grid[0] * grid[1], rows))

    def of_size(self, size: Size) -> Views:
        image, tiling = super().of_size(size), self.tiling(size, self.settings)
        return replace(image, shape=self.shape(image.views, image.unit, tiling[0]))

    def smaller(self, image: Views, unit: Grid) -> Views:
        return replace(super().smaller(image, unit), shape=self.shape(image.views, unit, rows_of(image.shape)))


def canvases(most: int) -> list[Grid]:
    """(rows, columns) with at most so many tiles, in the order in which the processor has them: by shape, shapes as they first come."""
    shapes: dict[float, list[Grid]] = {}
    for count in range(most, 0, -1):
        for rows in range(1, count + 1):
            if count % rows == 0:
                shapes.setdefault(rows / (count // rows), []).append((rows, count // rows))
    return [canvas for alike in shapes.values() for canvas in alike]


def tile_marks(tiles: int, n: int, rows: int) -> tuple[Mark, ...]:
    """What stands between tiles of n tokens. tiles: the whole image is the last of them, after ``rows`` rows.

    A tile is parted from those after it in its row, a row ends with its last tile, and the whole image is named while it is there.
    """
    if tiles == 1:
        return ()
    columns, out = (tiles - 1) // rows, list[Mark]()
    for row, column in itertools.product(range(rows), range(columns)):
        start = row * columns * n
        at, end = start + (column + 1) * n, start + columns * n
        out.append(Mark(at, (ROW_END,), ((start, end),)) if at == end else Mark(at, (BETWEEN,), ((start, at), (at, end))))
    return (*out, Mark(rows * columns * n, (WHOLE,), ((rows * columns * n, tiles * n),)))


def rows_of(shape: VisualShape) -> int:
    """Rows of tiles of a shape."""
    return sum(ROW_END in mark.words for mark in shape.marks) or 1


class Llama4Adapter(InternVLAdapter, Llama4Rules):
    """What the wrapper needs to know of one Llama 4 model."""

    encode_keys = ("pixel_values",)

    def items(self, inputs: dict[str, Any]) -> list[Any]:
        """The model is given all tiles in one row; which belong to one image stands in the prompt alone."""
        shapes = [] if inputs.get("pixel_values") is None else self._images(inputs["input_ids"].tolist(), inputs["pixel_values"])
        return [replace(item, shape=shape) for item, shape in zip(super().items(inputs), shapes)]

    def _images(self, rows: list[list[int]], pixels: Tensor) -> list[VisualShape]:
        high, wide = (int(side // self.patch) // self.shrunk for side in pixels.shape[-2:])
        grid, shapes = (high, wide), list[VisualShape]()
        for ids in rows:
            for tiles, down in images_of(ids, self.placeholders["image"], grid[0] * grid[1]):
                shape = self.shape(tiles, grid, down or 1)
                shapes.append(shape if down else replace(shape, marks=()))
        return shapes

    def runs_of(self, ids: Tensor, n: int) -> list[int]:
        return [tiles * n for row in ids.tolist() for tiles, _ in images_of(row, self.placeholders["image"], n)]

    def shape_at(self, item: Any, grid: Grid) -> VisualShape:
        shape = self.shape(len(item.shape.planes), grid, rows_of(item.shape))
        return shape if item.shape.marks else replace(shape, marks=())

    def features(self, pixels: Tensor, resized: bool, **call: Any) -> Tensor:
        if resized:
            raise UnsupportedModelError(
                f"resize makes tiles smaller, and the tower of {self.name} takes one size: give fewer tiles instead"
            )
        return self.base.get_image_features(pixel_values=pixels, return_dict=True).last_hidden_state

    def example(self, images: Sequence[Views], pixels: Callable[..., Tensor]) -> dict[str, Any]:
        width, height = self.view_size
        return {"pixel_values": pixels(sum(image.views for image in images), self.config.vision_config.num_channels, height, width)}

    def container(self, modality: str, features: list[Tensor], deep: list[tuple[Tensor, ...]]) -> Any:
        from .ragged import ragged_output

        return ragged_output(features, "last_hidden_state")

    def place(self, planes: tuple[Plane, ...], size: tuple[int, int], image_processor: Any) -> tuple[Plane, ...]:
        """Tiles row by row on a canvas that the picture does not fill; the last of several sees the whole picture."""
        settings = {name: getattr(image_processor, name, None) for name in self.counting}
        side = self.tile_size({"size": {name: image_processor.size[name] for name in ("height", "width")}})
        rows, columns = self.tiling(size, settings)
        if rows * columns + (rows * columns > 1) != len(planes):
            raise CountMismatchError(f"a picture of {size[0]} x {size[1]} has {columns} x {rows} tiles, and {len(planes)} views were given")
        limits = (side[0] * columns, side[1] * rows)
        if not settings["resize_to_max_canvas"]:
            limits = min(max(size[0], side[0]), limits[0]), min(max(size[1], side[1]), limits[1])
        scale = min(limit / have for limit, have in zip(limits, size))
        wide, high = (tile / (scale * have) for tile, have in zip(side, size))
        cells = [(r * high, c * wide, (r + 1) * high, (c + 1) * wide) for r in range(rows) for c in range(columns)]
        return tuple(replace(plane, box=box) for plane, box in zip(planes, [*cells, (0.0, 0.0, 1.0, 1.0)]))


def images_of(ids: Sequence[int], placeholder: int, n: int) -> list[tuple[int, int]]:
    """(tiles, rows of tiles) of each image of a prompt, by the text between its runs of n placeholders; 0 rows where it has none.

    An image of several tiles has one token between each two and two in front of the whole, the first of which ends every row.
    """
    runs = runs_in(ids, placeholder)
    out = list[tuple[int, int]]()
    while runs:
        gaps = [ids[stop:start] for (_, stop), (start, _) in itertools.pairwise(runs)]
        tiles = next((i + 1 for i, gap in enumerate(gaps) if len(gap) != 1), len(runs))
        rows, columns = 0, 0
        if 1 < tiles < len(runs) and len(gaps[tiles - 1]) == 2:
            row_end = gaps[tiles - 1][0]
            ends = [i + 1 for i, gap in enumerate(gaps[:tiles]) if gap[0] == row_end]
            columns = ends[0]
            whole = all(stop - start == n for start, stop in runs[: tiles + 1])
            rows = len(ends) if whole and ends == list(range(columns, tiles + 1, columns)) else 0
        if rows:
            out.append((tiles + 1, rows))
            runs = runs[tiles + 1 :]
            continue
        (start, stop), *runs = runs
        if (stop - start) % n:
            raise CountMismatchError(f"a prompt has {stop - start} image placeholders in a row, and a tile gives {n} tokens")
        out.append(((stop - start) // n, 0))
    return out
