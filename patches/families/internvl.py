"""InternVL: tiles of the image and a thumbnail, each a grid of pixel-shuffled tokens; one tensor of all tiles."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from mllm_efficient.compressors.fit import OF_TOWER
from mllm_efficient.compressors.tome import blocks_of
from mllm_efficient.errors import CountMismatchError, MllmEfficientError
from mllm_efficient.lazy import torch
from mllm_efficient.tokens import Grid, Plane, VisualShape

from ..base import Adapter, Encoding, Item, smaller_pixels
from ..rules import Rules, Settings, Size, Views
from ..sizes import ProjectorSize, Tower
from ..tower.attention import tower_of, watched
from ..tower.merge import require_own, run_inside

if TYPE_CHECKING:
    from torch import Tensor

USUAL_TILES = (1, 12)


class InternVLRules(Rules):
    """The shapes of InternVL."""

    gives = frozenset({"attention", "keys", "text", "grid"})
    parts = frozenset({"tile"})
    counting: ClassVar[tuple[str, ...]] = ("min_patches", "max_patches")
    control = "max_patches"
    clip_tower = False

    @functools.cached_property
    def tower_size(self) -> Tower:
        vision = self.config.vision_config
        patch = vision.patch_size
        return Tower(
            vision.num_hidden_layers, vision.hidden_size, vision.num_attention_heads, vision.intermediate_size,
            patch if isinstance(patch, int) else patch[0], getattr(vision, "num_channels", 3), class_token=True,
        )  # fmt: skip

    @functools.cached_property
    def projector_size(self) -> ProjectorSize:
        width = self.decoder_size.width
        return ProjectorSize(self.tower_size.width * self.shrunk**2, width, width)

    @property
    def shrunk(self) -> int:
        """Patches along a side of a token."""
        return int(1 / self.config.downsample_ratio)

    @property
    def tower_blocks(self) -> int:
        return blocks_of(self.tower_size.layers, self.config.vision_feature_layer)

    @property
    def side(self) -> int:
        """Tokens along a side of a tile."""
        return self.view_size[0] // self.patch // self.shrunk

    def tiling(self, size: Size, settings: Settings) -> Grid:
        """(rows, columns) of the tiles of an image of (width, height) pixels, by the processor's settings."""
        limits = tile_limits(settings)
        return tiles_of(size, self.tile_size(settings), limits) if limits[1] > 1 else (1, 1)

    def tile_size(self, settings: Settings) -> Size:
        """(width, height) in pixels of what the processor cuts."""
        given = settings.get("size") or {}
        return given.get("width") or self.view_size[0], given.get("height") or self.view_size[1]

    def shape(self, tiles: int, grid: Grid) -> VisualShape:
        """Of an image in so many tiles, the thumbnail among them, each a grid of tokens."""
        return VisualShape(tuple(Plane(*grid, tile=i) for i in range(tiles)))

    def _at(self, views: int, side: int, says: str, size: Size | None = None) -> Views:
        """So many views of side x side tokens."""
        shape, patches = self.shape(views, (side, side)), side * self.shrunk
        said = f"{says}{views} views of {patches * self.patch}x{patches * self.patch}, {shape.n} tokens"
        return Views(shape, (side, side), views, (patches, patches), side * side, said, size)

    def typical(self) -> list[Views]:
        tile = self.view_size[0]
        return [self.of_size((2 * tile, 2 * tile))]

    def of_size(self, size: Size) -> Views:
        tiles = math.prod(self.tiling(size, self.settings))
        return self._at(tiles + (tiles > 1), self.side, f"{size[0]}x{size[1]}: ", size)

    def of_tokens(self, n: int, exact: bool) -> list[Views]:
        each = self.side**2
        if n % each == 0:
            return [self._at(n // each, self.side, "")]
        if exact:
            raise MllmEfficientError(f"{n} visual tokens: every view gives {each} on {self.name}, so ask for a multiple of that")
        return [self.unknown(n, self._at(1, self.side, ""), f"{n} tokens")]

    def smaller(self, image: Views, unit: Grid) -> Views:
        return self._at(image.views, unit[0], "")

    def controls(self, size: Size, k: int) -> Iterable[Settings]:
        most = self.settings.get("max_patches") or USUAL_TILES[1]
        fewest = {"min_patches": 1} if "min_patches" in self.counting else {}
        return [{**fewest, "max_patches": tiles} for tiles in range(most, 0, -1)]


def tile_limits(settings: Settings) -> tuple[int, int]:
    """(fewest, most) tiles of an image."""
    fewest, most = settings.get("min_patches") or USUAL_TILES[0], settings.get("max_patches") or USUAL_TILES[1]
    if fewest > most:
        raise MllmEfficientError(f"min_patches={fewest} is more than max_patches={most}")
    return fewest, most


def tiles_of(size: Size, tile: Size, limits: tuple[int, int]) -> Grid:
    """(rows, columns) of tiles: the canvas whose shape is nearest the image's. Of equally near ones a larger one is taken while
    the image has more than half its pixels."""
    width, height = size
    best, nearest = (1, 1), math.inf
    for rows, columns in _canvases(*limits):
        apart = abs(width / height - columns / rows)
        if apart < nearest or (apart == nearest and width * height > 0.5 * tile[0] * tile[1] * rows * columns):
            best, nearest = (rows, columns), apart
    return best


@functools.cache
def _canvases(fewest: int, most: int) -> list[Grid]:
    """(rows, columns) with so many tiles, smallest canvas first, among equals the narrowest."""
    every = [(n // columns, columns) for n in range(fewest, most + 1) for columns in range(1, n + 1) if n % columns == 0]
    return every


class InternVLAdapter(Adapter, InternVLRules):
    """What the wrapper needs to know of one InternVL model. Frames of a video are images to the model.

    A token is pixel-shuffled from 2 x 2 patches: its attention, the class token's of the layer whose output the model takes, is the sum
    of theirs, its key their mean.
    """

    encode_keys: tuple[str, ...] = ("pixel_values", "vision_feature_layer", "vision_feature_select_strategy")

    def items(self, inputs: dict[str, Any]) -> list[Item]:
        """The model is given all tiles in one row; which belong to one image stands in the prompt alone."""
        pixels = inputs.get("pixel_values")
        if pixels is None:
            return []
        if not isinstance(pixels, torch.Tensor) or pixels.ndim != 4:
            raise CountMismatchError("pixel_values must be one tensor (tiles, channels, height, width)")
        down, across = (int(size // self.patch) // self.shrunk for size in pixels.shape[-2:])
        n = down * across
        runs = self.runs_of(inputs["input_ids"], n)
        if any(run % n for run in runs) or sum(runs) != n * len(pixels):
            raise CountMismatchError(
                f"the prompt has runs of {runs} image placeholders and {len(pixels)} tile(s) give {n} tokens each: "
                "use the processor that belongs to the model, and one image token per image"
            )
        shared = {k: inputs[k] for k in self.encode_keys[1:] if inputs.get(k) is not None}
        parts = pixels.split([run // n for run in runs])
        return [Item({"pixel_values": part, **shared}, self.shape(len(part), (down, across))) for part in parts]

    def runs_of(self, ids: Tensor, n: int) -> list[int]:
        """Placeholders of each image of a batch. n: of a tile."""
        return [run for row in (ids == self.placeholders["image"]).tolist() for run in self.placeholder_runs(row)]

    def placeholder_runs(self, row: list[bool]) -> list[int]:
        """Placeholders of each image in a row of a prompt. row: where its placeholders are."""
        return [len(list(run)) for is_image, run in itertools.groupby(row) if is_image]

    def shape_at(self, item: Item, grid: Grid) -> VisualShape:
        return self.shape(len(item.shape.planes), grid)

    def run(self, modality: str, items: list[Item], needs: frozenset[str], grid: Grid | None) -> list[Encoding]:
        pixels = torch.cat([i.arguments["pixel_values"] for i in items])
        shapes = [i.shape for i in items]
        if grid is not None:
            sides = [g * self.shrunk * self.patch for g in grid]
            pixels = smaller_pixels(pixels, *sides)
            shapes = [self.shape_at(i, grid) for i in items]
        call = {k: v for k, v in items[0].arguments.items() if k != "pixel_values"}
        beside: dict[str, Tensor] = {}
        if needs & OF_TOWER:
            features, seen = watched(
                tower_of(self.model), lambda: self.features(pixels, grid is not None, **call), *self.taken(call), needs
            )
            beside = {"attention": self.shuffled(seen["attention"][..., None]).sum((2, 3)), "keys": self.shuffled(seen["keys"]).mean(2)}
        else:
            features = self.features(pixels, resized=grid is not None, **call)
        tiles = [len(s.planes) for s in shapes]
        own = [dict(zip(beside, of_item)) for of_item in zip(*(v.to(features.device).split(tiles) for v in beside.values()))]
        return [
            Encoding(part.flatten(0, 1), shape, **{name: value.flatten(0, 1) for name, value in more.items()})
            for part, shape, more in zip(features.split(tiles), shapes, own or [{}] * len(shapes))
        ]

    def taken(self, call: dict[str, Any]) -> tuple[Any, str]:
        """The layer of the tower whose output the model takes, and whether the class token is left out ("default")."""
        layer, strategy = (
            getattr(self.config, k) if call.get(k) is None else call[k] for k in ("vision_feature_layer", "vision_feature_select_strategy")
        )
        return layer, str(strategy)

    def inside(self, method: Any, item: Item, pixels: Tensor, rounds: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        require_own(self, self.taken({k: v for k, v in item.arguments.items() if k != "pixel_values"}))
        patches = torch.arange(math.prod(int(n // self.patch) for n in pixels.shape[-2:]))
        cells = self.shuffled(patches[None, :, None])[0, :, :, 0].sort(1).values
        tower = tower_of(self.model)
        hidden, steps = run_inside(method, tower, pixels.to(self.model.dtype), rounds, cells)
        if self.tower_blocks == self.tower_size.layers and self.config.vision_feature_layer == -1:
            hidden = tower.layernorm(hidden)  # which hidden states that are asked for by their number have not
        return self.of_patches(hidden[:, int(self.class_token) :].unflatten(1, (-1, cells.shape[1]))), steps.kept

    def of_patches(self, tokens: Tensor) -> Tensor:
        """(views, K, D) of the patches (views, K, m, d) of tokens: each is shuffled and projected as an image of one token."""
        small = tokens.flatten(0, 1).unflatten(1, (self.shrunk, self.shrunk))
        shuffled = self.model.model.pixel_shuffle(small, scale_factor=self.config.downsample_ratio)
        return self.model.model.multi_modal_projector(shuffled.flatten(1)).unflatten(0, tokens.shape[:2])

    def shuffled(self, patches: Tensor) -> Tensor:
        """(tiles, N, m, d) of (tiles, P, d): the m patches of every token, as the model's own function puts them together."""
        side, width = math.isqrt(patches.shape[1]), patches.shape[2]
        grid = patches.view(len(patches), side, side, width)
        tokens = self.model.model.pixel_shuffle(grid, scale_factor=self.config.downsample_ratio)
        return tokens.flatten(1, 2).unflatten(2, (-1, width))

    def features(self, pixels: Tensor, resized: bool, **call: Any) -> Tensor:
        """(tiles, N, D) of the model's own for (tiles, C, H, W). resized: whether they are not of the tower's own size."""
        return self.model.model.get_image_features(pixel_values=pixels, return_dict=True, **call).pooler_output

    def container(self, modality: str, features: list[Tensor], deep: list[tuple[Tensor, ...]]) -> Any:
        from .ragged import ragged_output

        return ragged_output(features)

    def place(self, planes: tuple[Plane, ...], size: tuple[int, int], image_processor: Any) -> tuple[Plane, ...]:
        """Tiles stand row by row on their canvas; the thumbnail after them sees it all."""
        if len(planes) == 1:
            return planes
        settings = {name: getattr(image_processor, name) for name in ("min_patches", "max_patches")}
        tile = {side: image_processor.size[side] for side in ("height", "width")}
        rows, columns = self.tiling(size, {**settings, "size": tile})
        if rows * columns not in (len(planes), len(planes) - 1):
            raise CountMismatchError(f"a picture of {size[0]} x {size[1]} has {columns} x {rows} tiles, and {len(planes)} were given")
        placed = []
        for i, plane in enumerate(planes[: rows * columns]):
            r, c = divmod(i, columns)
            placed.append(replace(plane, box=(r / rows, c / columns, (r + 1) / rows, (c + 1) / columns)))
        return (*placed, *planes[rows * columns :])
