"""InternVL: tiles of the picture and a thumbnail, each a grid of pixel-shuffled tokens; one tensor of all tiles."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mllm_efficient.errors import CountMismatchError
from mllm_efficient.tokens import Plane, VisualShape

from ..base import Adapter, Encoding, Grid, Item, smaller_pixels
from .ragged import ragged_output


class InternVLAdapter(Adapter):
    """What the wrapper needs to know of one InternVL model. Frames of a video are images to the model."""

    parts = frozenset({"tile"})
    encode_keys = ("pixel_values", "vision_feature_layer", "vision_feature_select_strategy")

    def __init__(self, model: Any):
        super().__init__(model)
        height, width = self.config.vision_config.patch_size
        self.patch = (height, width)

    def items(self, inputs: dict[str, Any]) -> list[Item]:
        """The model is given all tiles in one row; which belong to one image stands in the prompt alone."""
        pixels, ids = inputs.get("pixel_values"), inputs["input_ids"]
        if pixels is None:
            return []
        if not isinstance(pixels, Tensor) or pixels.ndim != 4:
            raise CountMismatchError("pixel_values must be one tensor (tiles, channels, height, width)")
        down, across = (int(size // patch * self.config.downsample_ratio) for size, patch in zip(pixels.shape[-2:], self.patch))
        grid = (down, across)
        n = grid[0] * grid[1]
        runs = [
            len(list(run)) for row in (ids == self.config.image_token_id).tolist() for is_image, run in itertools.groupby(row) if is_image
        ]
        odd = [run for run in runs if run % n]
        if odd or sum(runs) != n * len(pixels):
            raise CountMismatchError(
                f"the prompt has runs of {runs} image placeholders and {len(pixels)} tile(s) give {n} tokens each: "
                "use the processor that belongs to the model, and one image token per image"
            )
        shared = {k: inputs[k] for k in self.encode_keys[1:] if inputs.get(k) is not None}
        parts = pixels.split([run // n for run in runs])
        return [Item({"pixel_values": part, **shared}, self._shape(len(part), grid)) for part in parts]

    def _shape(self, tiles: int, grid: Grid) -> VisualShape:
        return VisualShape(tuple(Plane(*grid, tile=i) for i in range(tiles)))

    def shape_at(self, item: Item, grid: Grid) -> VisualShape:
        return self._shape(len(item.shape.planes), grid)

    def run(self, modality: str, items: list[Item], needs: frozenset[str], grid: Grid | None) -> list[Encoding]:
        pixels = torch.cat([i.arguments["pixel_values"] for i in items])
        shapes = [i.shape for i in items]
        if grid is not None:
            sides = [int(g / self.config.downsample_ratio) * patch for g, patch in zip(grid, self.patch)]
            pixels = smaller_pixels(pixels, *sides)
            shapes = [self.shape_at(i, grid) for i in items]
        call = {k: v for k, v in items[0].arguments.items() if k != "pixel_values"}
        features = self.model.model.get_image_features(pixel_values=pixels, return_dict=True, **call).pooler_output
        parts = features.split([len(s.planes) for s in shapes])
        return [Encoding(part.flatten(0, 1), shape) for part, shape in zip(parts, shapes)]

    def container(self, modality: str, features: list[Tensor], deep: list[tuple[Tensor, ...]]) -> Any:
        return ragged_output(features)

    def place(self, planes: tuple[Plane, ...], size: tuple[int, int], image_processor: Any) -> tuple[Plane, ...]:
        """Tiles stand row by row on the grid that is nearest the picture's aspect; the thumbnail behind them sees it all."""
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

        if len(planes) == 1:
            return planes
        width, height = size
        tile = image_processor.size["height"], image_processor.size["width"]
        columns, rows = get_optimal_tiled_canvas((height, width), tile, image_processor.min_patches, image_processor.max_patches)
        if rows * columns not in (len(planes), len(planes) - 1):
            raise CountMismatchError(f"a picture of {width} x {height} has {columns} x {rows} tiles, and {len(planes)} were given")
        placed = []
        for i, plane in enumerate(planes[: rows * columns]):
            r, c = divmod(i, columns)
            placed.append(replace(plane, box=(r / rows, c / columns, (r + 1) / rows, (c + 1) / columns)))
        return (*placed, *planes[rows * columns :])
