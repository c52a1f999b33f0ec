"""Gemma 4: images of any shape, scaled to at most ``max_soft_tokens`` tokens, each pooled from k x k patches; padded to that many.

Layers take embeddings of the ids beside the states, which placeholders have none of; where the configuration says so, tokens of an image
see each other, in layers with a sliding window alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from mllm_efficient.errors import CountMismatchError, MllmEfficientError
from mllm_efficient.lazy import torch
from mllm_efficient.tokens import Grid, Plane, VisualShape

from ..base import Adapter, Encoding, Item, smaller_pixels
from ..rules import Rules, Settings, Size, Views
from ..sizes import ProjectorSize, Tower

if TYPE_CHECKING:
    from torch import Tensor

SOFT_TOKENS = "max_soft_tokens"
USUAL_SOFT_TOKENS = 280
COUNTS = (70, 140, 280, 560, 1120)  # that its processor takes
PIXELS_OF = {"image": "pixel_values", "video": "pixel_values_videos"}
PLACES_OF = {"image": "image_position_ids", "video": "video_position_ids"}
FRAMES = "num_frames_per_video"


class Gemma4Rules(Rules):
    """The shapes of Gemma 4."""

    parts = frozenset({"frame"})
    reads_values = True
    counting = (SOFT_TOKENS,)
    control = SOFT_TOKENS

    @functools.cached_property
    def tower_size(self) -> Tower:
        vision = self.config.vision_config
        return Tower(
            vision.num_hidden_layers, vision.hidden_size, vision.num_attention_heads, vision.intermediate_size, vision.patch_size,
            mlp_matrices=3, pooled=self.pooled**2,
        )  # fmt: skip

    @functools.cached_property
    def projector_size(self) -> ProjectorSize:
        """One matrix, after pooling."""
        return ProjectorSize(0, 0, 0, before=self.tower_size.width * self.decoder_size.width)

    @property
    def pooled(self) -> int:
        """Patches along a side of a token."""
        return self.config.vision_config.pooling_kernel_size

    @property
    def typed(self) -> str:
        return "mm_token_type_ids"

    @property
    def sees_both_ways(self) -> bool:  # type: ignore[override]
        return getattr(self.config.text_config, "use_bidirectional_attention", None) == "vision"

    @property
    def most(self) -> int:
        """Tokens that an image has at most, and is padded to."""
        most = self.settings.get(SOFT_TOKENS) or USUAL_SOFT_TOKENS
        if most not in COUNTS:
            raise MllmEfficientError(f"{SOFT_TOKENS}={most}: {self.name} takes one of {', '.join(map(str, COUNTS))}")
        return int(most)

    def _at(self, grid: Grid, size: Size | None, padded: int) -> Views:
        rows, columns = grid
        step = self.pooled * self.patch
        seen = f"{columns * step}x{rows * step}"
        given = "" if size is None or size == (columns * step, rows * step) else f"{size[0]}x{size[1]} seen as "
        n = rows * columns
        ran = (padded * self.pooled, self.pooled)  # the tower runs on the padding too
        return Views(self.shape("image", 1, grid), grid, 1, ran, n, f"{given}{seen}: {n} tokens", size)

    def shape(self, modality: str, frames: int, grid: Grid) -> VisualShape:
        video = modality == "video"
        return VisualShape(tuple(Plane(*grid, frame=i if video else None) for i in range(frames)), modality)

    def typical(self) -> list[Views]:
        side = math.isqrt(self.most)
        return [self._at((side, side), None, self.most)]

    def of_size(self, size: Size) -> Views:
        """The largest image of its shape within the budget, both sides a multiple of a token."""
        return self._at(grid_of(size, self.most), size, self.most)

    def of_tokens(self, n: int, exact: bool) -> list[Views]:
        """The image nearest to a square."""
        rows = max(r for r in range(1, math.isqrt(n) + 1) if n % r == 0)
        if n <= self.most and n <= 4 * rows * rows:
            return [self._at((rows, n // rows), None, self.most)]
        if exact:
            raise MllmEfficientError(f"no picture near to a square has {n} tokens on {self.name}: give --image-size WxH instead")
        return [self.unknown(n, self.typical()[0], f"{n} tokens")]

    def smaller(self, image: Views, unit: Grid) -> Views:
        return self._at(unit, None, math.prod(unit))

    def controls(self, size: Size, k: int) -> Iterable[Settings]:
        return [{SOFT_TOKENS: count} for count in COUNTS]


def grid_of(size: Size, most: int) -> Grid:
    """(rows, columns) of tokens of an image of (width, height) pixels: at most ``most``, as many as its shape allows."""
    width, height = size
    scale = math.sqrt(most / (width * height))
    rows, columns = math.floor(height * scale), math.floor(width * scale)
    if rows == 0:
        return 1, min(width // height, most)
    if columns == 0:
        return min(height // width, most), 1
    return rows, columns


class Gemma4Adapter(Adapter, Gemma4Rules):
    """What the wrapper needs to know of one Gemma 4 model."""

    encode_keys = (*PIXELS_OF.values(), *PLACES_OF.values(), FRAMES)

    def items(self, inputs: dict[str, Any]) -> list[Item]:
        return [item for modality in PIXELS_OF for item in self._items(modality, inputs)]

    def _items(self, modality: str, inputs: dict[str, Any]) -> list[Item]:
        pixels, places = inputs.get(PIXELS_OF[modality]), inputs.get(PLACES_OF[modality])
        if pixels is None:
            return []
        if places is None or places.shape[:2] != pixels.shape[:2]:
            raise CountMismatchError(f"{PIXELS_OF[modality]} without their {PLACES_OF[modality]}: pass both as the processor gives them")
        counts = [1] * len(pixels) if modality == "image" else self._frames(inputs, len(pixels))
        grids = [self._grid(p) for p in places.cpu()]
        out, start = [], 0
        for count in counts:
            own = slice(start, start + count)
            if len(set(grids[own])) != 1:
                raise CountMismatchError(f"frames of one video have the grids {grids[own]}: they must be alike")
            arguments = {PIXELS_OF[modality]: pixels[own], PLACES_OF[modality]: places[own]}
            out.append(Item(arguments, self.shape(modality, count, grids[start])))
            start += count
        return out

    def _frames(self, inputs: dict[str, Any], frames: int) -> list[int]:
        counts = [int(n) for n in inputs.get(FRAMES, ())]
        if sum(counts) != frames:
            raise CountMismatchError(f"{FRAMES} {counts} do not fit {frames} frames: pass what the processor gives")
        return counts

    def _grid(self, places: Tensor) -> Grid:
        """(rows, columns) in tokens of (column, row) of each patch; -1 is padding."""
        across, down = (int(side) + 1 for side in places.amax(0))
        return down // self.pooled, across // self.pooled

    def shape_at(self, item: Item, grid: Grid) -> VisualShape:
        return self.shape(item.shape.modality, len(item.shape.planes), grid)

    def run(self, modality: str, items: list[Item], needs: frozenset[str], grid: Grid | None) -> list[Encoding]:
        pixels = [i.arguments[PIXELS_OF[modality]] for i in items]
        places = [i.arguments[PLACES_OF[modality]] for i in items]
        shapes = [i.shape for i in items]
        if grid is not None:
            shapes = [self.shape_at(i, grid) for i in items]
            pixels = [self._smaller(p, i.shape.planes[0], grid) for p, i in zip(pixels, items)]
            places = [self._places(grid, len(p)).to(p.device) for p in pixels]
        call = {PIXELS_OF[modality]: torch.cat(pixels), PLACES_OF[modality]: torch.cat(places)}
        if modality == "video":
            call[FRAMES] = torch.tensor([len(p) for p in pixels])
        out = getattr(self.base, f"get_{modality}_features")(**call, return_dict=True).pooler_output
        return [Encoding(features, shape) for features, shape in zip(out, shapes)]

    def _places(self, grid: Grid, frames: int) -> Tensor:
        """(frames, patches, 2), the (column, row) of each patch, row by row."""
        down, across = (torch.arange(side * self.pooled) for side in grid)
        return torch.stack(torch.meshgrid(across, down, indexing="xy"), -1).reshape(1, -1, 2).expand(frames, -1, -1)

    def _smaller(self, pixels: Tensor, plane: Plane, grid: Grid) -> Tensor:
        """(frames, patches, values) of pictures made smaller, without padding. pixels: patches row by row, channels last in each."""
        p = self.patch
        rows, columns = plane.rows * self.pooled, plane.columns * self.pooled
        h, w = (side * self.pooled for side in grid)
        picture = pixels[:, : rows * columns].view(-1, rows, columns, p, p, 3).permute(0, 5, 1, 3, 2, 4)
        small = smaller_pixels(picture.reshape(-1, 3, rows * p, columns * p), h * p, w * p)
        return small.view(-1, 3, h, p, w, p).permute(0, 2, 4, 3, 5, 1).reshape(len(pixels), h * w, -1)

    def example(self, images: Sequence[Views], pixels: Callable[..., Tensor]) -> dict[str, Any]:
        length = max(math.prod(image.patches) for image in images)
        places = torch.full((len(images), length, 2), -1)
        for row, image in zip(places, images):
            own = self._places(image.unit, 1)[0]
            row[: len(own)] = own
        return {"pixel_values": pixels(len(images), length, 3 * self.patch**2), "image_position_ids": places}
