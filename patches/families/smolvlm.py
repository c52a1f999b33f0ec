"""SmolVLM and Idefics3: tiles of the image and the whole of it, each named by text in the prompt, line breaks after a row of tiles."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mllm_efficient.errors import CountMismatchError
from mllm_efficient.lazy import torch
from mllm_efficient.tokens import Grid, Mark, Plane, VisualShape

from ..base import Adapter, Encoding, Item, smaller_pixels
from ..rules import Settings, Size, Views
from ..sizes import ProjectorSize, Tower
from .internvl import InternVLAdapter, InternVLRules

if TYPE_CHECKING:
    from torch import Tensor

MOST_PIXELS = 4096  # along the longer side, whatever the settings say
FAKE, WHOLE, NEWLINE = "<fake_token_around_image>", "<global-img>", "\n"


class SmolVLMRules(InternVLRules):
    """The shapes of SmolVLM and Idefics3. A tile's name leaves a prompt with the tile's last token, a line break with its row of tiles."""

    gives = frozenset({"text", "grid"})
    marks = True
    counting = ("size", "max_image_size", "do_image_splitting")
    control = "size (longest_edge of a picture before it is split)"

    @functools.cached_property
    def tower_size(self) -> Tower:
        vision = self.config.vision_config
        sizes = vision.num_hidden_layers, vision.hidden_size, vision.num_attention_heads, vision.intermediate_size
        return Tower(*sizes, vision.patch_size, getattr(vision, "num_channels", 3))

    @functools.cached_property
    def projector_size(self) -> ProjectorSize:
        return ProjectorSize(self.tower_size.width * self.shrunk**2, self.decoder_size.width, 0)

    @property
    def tower_blocks(self) -> int:
        return 0

    @property
    def shrunk(self) -> int:
        return self.config.scale_factor

    def tiling(self, size: Size, settings: Settings) -> Grid:
        """The image's longer side is made as long as the settings say, then both sides whole tiles."""
        if settings.get("do_image_splitting") is False:
            return 1, 1
        tile = (settings.get("max_image_size") or {}).get("longest_edge") or self.view_size[0]
        width, height = _longest(size, (settings.get("size") or {}).get("longest_edge") or 4 * tile)
        if width >= height:
            across = math.ceil(width / tile)
            return math.ceil(int(across * tile / (width / height)) / tile), across
        down = math.ceil(height / tile)
        return down, math.ceil(int(down * tile * (width / height)) / tile)

    def shape(self, tiles: int, grid: Grid, rows: int | None = None) -> VisualShape:
        """rows: of tiles; where that is not known, those of the squarest picture."""
        if rows is None:
            rows = max(r for r in range(1, math.isqrt(max(1, tiles - 1)) + 1) if (tiles - 1) % r == 0)
        planes = tuple(Plane(*grid, tile=i) for i in range(tiles))
        return VisualShape(planes, marks=tile_names(tiles, grid[0] * grid[1], rows))

    def of_size(self, size: Size) -> Views:
        image, tiling = super().of_size(size), self.tiling(size, self.settings)
        return replace(image, shape=self.shape(image.views, image.unit, tiling[0]))

    def smaller(self, image: Views, unit: Grid) -> Views:
        return replace(super().smaller(image, unit), shape=self.shape(image.views, unit, rows_of(image.shape)))

    def controls(self, size: Size, k: int) -> Iterable[Settings]:
        if self.settings.get("do_image_splitting") is False:
            return
        tile = (self.settings.get("max_image_size") or {}).get("longest_edge") or self.view_size[0]
        longest = (self.settings.get("size") or {}).get("longest_edge") or 4 * tile
        yield from ({"size": {"longest_edge": tiles * tile}} for tiles in range(math.ceil(longest / tile), 0, -1))


def _longest(size: Size, longest: int) -> Size:
    """(width, height) with a longer side of ``longest``, the other even, none above ``MOST_PIXELS``."""
    for limit, even in ((longest, True), (MOST_PIXELS, False)):
        aspect = size[0] / size[1]
        if even or max(size) > limit:
            wide = size[0] >= size[1]
            other = int(limit / aspect) if wide else int(limit * aspect)
            other = max(1, other + (other % 2 if even else 0))
            size = (limit, other) if wide else (other, limit)
    return size


def tile_names(tiles: int, n: int, rows: int, breaks: Sequence[int] = ()) -> tuple[Mark, ...]:
    """What a prompt has around the n placeholders of each tile. tiles: the whole image is the last of them, after ``rows`` rows.

    breaks: columns of the line break after each row, 1 where nothing else is known: some tokenizers take the two after the last for one.
    """
    out, columns = [], (tiles - 1) // rows
    for tile in range(tiles):
        row, column = divmod(tile, columns) if tiles > 1 else (rows, 0)
        first, whole = tile * n, tile == tiles - 1
        if tile and column == 0:
            lines = (NEWLINE,) * (breaks[row - 1] if breaks else 1)
            between = ((first - columns * n, first), (first, (tiles - 1) * n))
            out.append(Mark(first, lines, ((0, first),) if whole else between))
        name = WHOLE if whole else f"<row_{row + 1}_col_{column + 1}>"
        out.append(Mark(first, (FAKE, name), ((first, first + n),)))
    return (*out, Mark(tiles * n, (FAKE,), ()))


def rows_of(shape: VisualShape) -> int:
    """Rows of tiles of a shape."""
    return sum(NEWLINE in mark.words for mark in shape.marks) or 1


class SmolVLMAdapter(InternVLAdapter, SmolVLMRules):
    """What the wrapper needs to know of one SmolVLM or Idefics3 model. Frames of a video are images to the model."""

    encode_keys = ("pixel_values", "pixel_attention_mask")

    def items(self, inputs: dict[str, Any]) -> list[Item]:
        """The model is given the tiles of each row of a batch; which belong to one image stands in the prompt alone."""
        pixels, mask = inputs.get("pixel_values"), inputs.get("pixel_attention_mask")
        if pixels is None:
            return []
        if not isinstance(pixels, torch.Tensor) or pixels.ndim != 5:
            raise CountMismatchError("pixel_values must be one tensor (batch, tiles, channels, height, width)")
        down, across = (int(side // self.patch) // self.shrunk for side in pixels.shape[-2:])
        grid = (down, across)
        n, out = grid[0] * grid[1], list[Item]()
        there = torch.ones(pixels.shape[:2], dtype=torch.bool) if pixels.is_meta else (pixels != 0).flatten(2).any(-1).cpu()
        for row, tiles, ids in zip(range(len(pixels)), there, inputs["input_ids"].tolist()):
            shapes = images_of(ids, self.placeholders["image"], grid, self)
            counts, given = [len(shape.planes) for shape in shapes], tiles.nonzero()[:, 0]
            if sum(counts) != len(given):
                raise CountMismatchError(
                    f"a prompt has {n * sum(counts)} image placeholders, its {len(given)} tile(s) give {n} tokens each: use the processor "
                    "that belongs to the model, and one image token per image"
                )
            for shape, own in zip(shapes, given.split(counts)):
                arguments = {"pixel_values": pixels[row, own]}
                out.append(Item(arguments if mask is None else {**arguments, "pixel_attention_mask": mask[row, own]}, shape))
        return out

    def shape_at(self, item: Item, grid: Grid) -> VisualShape:
        shape = self.shape(len(item.shape.planes), grid, rows_of(item.shape))
        lines = [len(mark.words) for mark in item.shape.marks if NEWLINE in mark.words]
        return replace(shape, marks=tile_names(len(shape.planes), len(shape.planes[0]), rows_of(shape), lines) if item.shape.marks else ())

    def run(self, modality: str, items: list[Item], needs: frozenset[str], grid: Grid | None) -> list[Encoding]:
        call = {key: torch.cat([i.arguments[key] for i in items])[None] for key in items[0].arguments}
        shapes = [i.shape for i in items]
        if grid is not None:
            sides = [side * self.shrunk * self.patch for side in grid]
            call = {"pixel_values": smaller_pixels(call["pixel_values"][0], *sides)[None]}
            shapes = [self.shape_at(i, grid) for i in items]
        features = self._features(call)
        return [Encoding(part, shape) for part, shape in zip(features.split([shape.n for shape in shapes]), shapes)]

    def _features(self, call: dict[str, Tensor]) -> Tensor:
        """(tokens of all tiles, D) of the model's own, which looks for tiles of zeros and so cannot run without values."""
        pixels = call["pixel_values"]
        if pixels.is_meta:
            seen = torch.ones(pixels.shape[1], *(side // self.patch for side in pixels.shape[-2:]), dtype=torch.bool)
            states = self.base.vision_model(pixels[0], patch_attention_mask=seen, return_dict=True).last_hidden_state
            return self.base.connector(states).flatten(0, 1)
        return torch.cat(list(self.base.get_image_features(**call, return_dict=True).pooler_output))

    def example(self, images: Sequence[Views], pixels: Callable[..., Tensor]) -> dict[str, Any]:
        return {"pixel_values": Adapter.example(self, images, pixels)["pixel_values"][None]}

    def place(self, planes: tuple[Plane, ...], size: tuple[int, int], image_processor: Any) -> tuple[Plane, ...]:
        """Tiles row by row; the last sees the whole image."""
        settings = {name: getattr(image_processor, name, None) for name in self.counting}
        rows, columns = self.tiling(size, settings)
        if len(planes) != rows * columns + (rows * columns > 1):
            raise CountMismatchError(f"a picture of {size[0]} x {size[1]} has {columns} x {rows} tiles, and {len(planes) - 1} were given")
        cells = [(r / rows, c / columns, (r + 1) / rows, (c + 1) / columns) for r in range(rows) for c in range(columns)]
        return tuple(replace(plane, box=box) for plane, box in zip(planes, [*cells, (0.0, 0.0, 1.0, 1.0)] if len(cells) > 1 else cells))


def images_of(ids: list[int], placeholder: int, grid: Grid, rules: SmolVLMRules) -> list[VisualShape]:
    """The images of a prompt, by the text around their tiles: the same token stands in front of every tile's name and after the last.

    A run of placeholders without that text around it is an image of as many tiles.
    """
    n, runs, at = grid[0] * grid[1], [], 0
    for token, group in itertools.groupby(ids):
        length = len(list(group))
        if token == placeholder:
            runs.append((at, at + length))
        at += length
    out = list[VisualShape]()
    while runs:
        fake, lines = ids[runs[0][0] - 2] if runs[0][0] > 1 else None, [0]
        for (_, stop), (start, _) in itertools.pairwise(runs):
            gap = ids[stop:start]
            named = 2 <= len(gap) <= 4 and gap[-2] == fake
            if not named or (len(gap) > 2 and gap[0] == fake):
                break
            lines.append(len(gap) - 2)
        own, runs = runs[: len(lines)], runs[len(lines) :]
        rows = [i for i, count in enumerate(lines) if count]
        tiles = len(own)
        columns = rows[0] if rows else 1
        regular = rows == list(range(columns, tiles, columns)) and (tiles - 1) % columns == 0
        marked = own[-1][1] < len(ids) and ids[own[-1][1]] == fake and all(stop - start == n for start, stop in own)
        if marked and (tiles == 1 or (regular and rows)):
            breaks = [lines[i] for i in rows]
            shape = rules.shape(tiles, grid, max(1, len(rows)))
            out.append(replace(shape, marks=tile_names(tiles, n, max(1, len(rows)), breaks)))
            continue
        if any((stop - start) % n for start, stop in own):
            raise CountMismatchError(f"a prompt has {own[0][1] - own[0][0]} image placeholders in a row, and a tile gives {n} tokens")
        out += [replace(rules.shape((stop - start) // n, grid), marks=()) for start, stop in own]
    return out


class Idefics3Rules(SmolVLMRules):
    """Idefics3."""


class Idefics3Adapter(SmolVLMAdapter, Idefics3Rules):
    """One Idefics3 model."""
