"""LLaVA-NeXT: a base view and tiles of the image, put together to a map without its padding, a newline after each row."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from mllm_efficient.compressors.fit import OF_TOWER
from mllm_efficient.errors import CountMismatchError
from mllm_efficient.lazy import torch
from mllm_efficient.tokens import Grid, Plane, VisualShape

from ..base import Adapter, Encoding, Item, smaller_pixels
from ..rules import Views
from ..running import at_hand, input_of
from ..tower.attention import positions_at_hand, tower_of, watched
from ..tower.blocks import has_class_token
from .anyres import AnyresRules

if TYPE_CHECKING:
    from torch import Tensor


class LlavaNextRules(AnyresRules):
    """The shapes of LLaVA-NeXT."""

    def made_processor(self, tokenizer: Any, **common: Any) -> Any:
        import transformers as t

        side, pinpoints = self.tile, self.config.image_grid_pinpoints
        images = t.LlavaNextImageProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_grid_pinpoints=pinpoints
        )
        return t.LlavaNextProcessor(
            image_processor=images, tokenizer=tokenizer, patch_size=self.patch, num_additional_image_tokens=int(self.class_token),
            vision_feature_select_strategy=self.config.vision_feature_select_strategy, **common,
        )  # fmt: skip


class LlavaNextAdapter(Adapter, LlavaNextRules):
    """What the wrapper needs to know of one LLaVA-NeXT model."""

    encode_keys: tuple[str, ...] = ("pixel_values", "image_sizes", "vision_feature_layer", "vision_feature_select_strategy")
    call_settings: ClassVar[tuple[str, ...]] = ("vision_feature_layer", "vision_feature_select_strategy")

    @property
    def class_token(self) -> bool:
        return has_class_token(tower_of(self.model))

    def items(self, inputs: dict[str, Any]) -> list[Item]:
        return self.images(inputs, [True] * len(_sizes(inputs)))

    def images(self, inputs: dict[str, Any], tiled: list[bool]) -> list[Item]:
        """An item for every image; one that is not ``tiled`` has its base view alone."""
        pixels, sizes = inputs.get("pixel_values"), _sizes(inputs)
        if pixels is None:
            return []
        if not isinstance(pixels, torch.Tensor) or pixels.ndim not in (4, 5):
            raise CountMismatchError("pixel_values must be one tensor (images, tiles, channels, height, width)")
        if len(tiled) != len(sizes):
            raise CountMismatchError(f"{len(sizes)} image_sizes and settings for {len(tiled)} images")
        counts = [1 + math.prod(self.tiling(size)) if t else 1 for size, t in zip(sizes, tiled)]
        if pixels.ndim == 5:
            if len(pixels) != len(sizes) or max(counts, default=0) > pixels.shape[1]:
                raise CountMismatchError(
                    f"pixel_values {tuple(pixels.shape)} do not belong to {len(sizes)} image_sizes: pass both as they come"
                )
            parts = [p[:n] for p, n in zip(pixels, counts)]
        else:
            if len(pixels) != sum(counts):
                raise CountMismatchError(f"pixel_values have {len(pixels)} tiles and image_sizes ask for {sum(counts)}")
            parts = list(pixels.split(counts))
        shared = {k: inputs[k] for k in self.call_settings if inputs.get(k) is not None}
        items = []
        for part, size in zip(parts, sizes):
            arguments = {"pixel_values": part, "image_sizes": size, **shared}
            items.append(Item(arguments, self._shape(arguments, self.side)))
        return items

    def tiling(self, size: tuple[int, int]) -> Grid:
        """(rows, columns) of the tiles of an image of ``size`` (height, width)."""
        module = sys.modules[type(self.model.model).__module__]  # each family has this function beside its model
        return module.get_anyres_image_grid_shape(size, self.config.image_grid_pinpoints, self.config.vision_config.image_size)

    def _shape(self, arguments: dict[str, Any], side: int) -> VisualShape:
        """What the model's own packing makes of an image: it is given the places of the patches instead of their features."""
        tiles, size = len(arguments["pixel_values"]), arguments["image_sizes"]
        base = Plane(side, side)
        if tiles == 1:
            return VisualShape((base,), closing=1)
        down, across = self.tiling(size)
        rows, columns = (torch.arange(n * side, dtype=torch.float32) for n in (down, across))
        canvas = torch.stack([rows[:, None].expand(-1, len(columns)), columns.expand(len(rows), -1), torch.zeros(len(rows), len(columns))])
        places = canvas.reshape(3, down, side, across, side).permute(1, 3, 2, 4, 0).reshape(down * across, side * side, 3)
        places = torch.cat([torch.ones(1, side * side, 3), places])
        packed = self.pack_tiles(self.resized_model(side, arguments), places, size, torch.tensor([0.0, 0.0, -1.0]), arguments)
        packed = packed[side * side :]
        height = int((packed[:, 2] < 0).sum())
        if height == 0:  # an image so long that its map is all padding
            return VisualShape((base, Plane(0, across * side, tile=1, newline=True)))
        width = len(packed) // height - 1
        if width == 0:  # the same for a tall one: its newline column is left
            return VisualShape((base, Plane(height, 0, tile=1, newline=True)))
        # The map may have been shrunk: a token then looks at the middle of several patches.
        y, x = packed[:: width + 1, 0] + 0.5, packed[:width, 1] + 0.5
        step_y, step_x = ((c[-1] - c[0]) / max(len(c) - 1, 1) if len(c) > 1 else torch.tensor(1.0) for c in (y, x))
        edges = [float(v) for v in (y[0] - step_y / 2, x[0] - step_x / 2, y[-1] + step_y / 2, x[-1] + step_x / 2)]
        plane = Plane(
            height, width, tile=1, newline=True,
            row_tiles=tuple(int(v // side) * across for v in y), column_tiles=tuple(int(v // side) for v in x),
            box=_on_picture(edges, (down, across), size, side, self.config.vision_config.image_size),
        )  # fmt: skip
        return VisualShape((base, plane))

    def pack_tiles(self, inner: Any, features: Tensor, size: tuple[int, int], newline: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The model's packing of one image's tiles (tiles, side * side, d) to (length, d)."""
        strategy = arguments.get("vision_feature_select_strategy") or self.config.vision_feature_select_strategy
        packed, _ = inner.pack_image_features(
            [features], torch.tensor([size]), vision_feature_select_strategy=strategy, image_newline=newline
        )
        return packed[0]

    def resized_model(self, side: int, arguments: dict[str, Any]) -> Any:
        """The model, or one that shares its weights and takes tiles of ``side`` x ``side`` tokens of this image's tiling."""
        inner = self.model.model
        if side == self.side:
            return inner
        smaller = copy.copy(inner)
        config = copy.deepcopy(self.config)
        patch = config.vision_config.patch_size
        down, across = self.tiling(arguments["image_sizes"])
        config.vision_config.image_size = side * patch
        config.image_grid_pinpoints = [[down * side * patch, across * side * patch]]
        smaller.config = config
        return smaller

    def unit(self, item: Item) -> Grid:
        return self.side, self.side

    def shape_at(self, item: Item, grid: Grid) -> VisualShape:
        return self._shape(item.arguments, grid[0])

    def run(self, modality: str, items: list[Item], needs: frozenset[str], grid: Grid | None) -> list[Encoding]:
        if grid is None and needs & OF_TOWER:
            return self._watched(items, needs)
        if grid is None:
            features = self.features(self.model.model, items)
            return [Encoding(f, i.shape) for f, i in zip(features, items)]
        side = grid[0]
        alike: dict[Any, list[int]] = {}
        for i, item in enumerate(items):  # a smaller model has one tiling
            tiled = len(item.arguments["pixel_values"]) > 1
            alike.setdefault(self.tiling(item.arguments["image_sizes"]) if tiled else None, []).append(i)
        out: dict[int, Encoding] = {}
        for members in alike.values():
            small = []
            for item in (items[i] for i in members):
                pixels = smaller_pixels(item.arguments["pixel_values"], *(side * self.config.vision_config.patch_size,) * 2)
                small.append(Item({**item.arguments, "pixel_values": pixels}, self.shape_at(item, grid)))
            inner = self.resized_model(side, small[0].arguments)
            with positions_at_hand(tower_of(self.model)):
                features = self.features(inner, small, interpolate_pos_encoding=True)
            out |= {i: Encoding(f, s.shape) for i, f, s in zip(members, features, small)}
        return [out[i] for i in range(len(items))]

    def _watched(self, items: list[Item], needs: frozenset[str]) -> list[Encoding]:
        """Features, and what else is needed of every tile's tokens packed as the model packs their features."""
        first = items[0].arguments
        layer, strategy = (getattr(self.config, k) if first.get(k) is None else first[k] for k in LlavaNextAdapter.call_settings)
        features, capture = watched(tower_of(self.model), lambda: self.features(self.model.model, items), layer, str(strategy), needs)
        captures = {name: value[..., None] if value.ndim == 2 else value for name, value in capture.items()}
        beside = torch.cat([value.float() for value in captures.values()], dim=2)[:, -(self.side**2) :]
        widths = [value.shape[2] for value in captures.values()]
        out = []
        ran, own_places, _ = self.as_run(items)
        of_each = beside.split([len(i.arguments["pixel_values"]) for i in ran])
        for f, item, tiles in zip(features, items, [of_each[i] for i in own_places]):
            newline = tiles.new_zeros(tiles.shape[-1])
            packed = self.pack_tiles(self.model.model, tiles, item.arguments["image_sizes"], newline, item.arguments)
            own = packed[item.shape.token_slots.to(packed.device)].to(f.device)
            parts = dict(zip(captures, own.split(widths, dim=1)))
            parts = {name: value[:, 0] if capture[name].ndim == 2 else value for name, value in parts.items()}
            out.append(Encoding(f, item.shape, **parts))
        return out

    def example(self, images: Sequence[Views], pixels: Callable[..., Tensor]) -> dict[str, Any]:
        views, (width, height) = images[0].views, self.view_size
        sizes = torch.tensor([size[::-1] for size in (image.size for image in images) if size is not None])
        return {"pixel_values": pixels(len(images), views, self.tower_size.channels, height, width), "image_sizes": sizes}

    def projected(self, item: Item, side: int) -> VisualShape:
        """The base view and every tile whole, row by row, without newlines: as the released TokenFLEX model tiles."""
        planes = [Plane(side, side)]
        if len(item.arguments["pixel_values"]) > 1:
            size, image = item.arguments["image_sizes"], self.config.vision_config.image_size
            down, across = self.tiling(size)
            for tile in range(down * across):
                row, column = divmod(tile, across)
                edges = [float(n * self.side) for n in (row, column, row + 1, column + 1)]
                planes.append(Plane(side, side, tile=1 + tile, box=_on_picture(edges, (down, across), size, self.side, image)))
        return VisualShape(tuple(planes))

    def before_projector(self, items: list[Item]) -> Tensor:
        call = {k: v for k, v in items[0].arguments.items() if k in self.call_settings}
        call["pixel_values"] = torch.cat([i.arguments["pixel_values"] for i in items])
        call["image_sizes"] = torch.tensor([i.arguments["image_sizes"] for i in items])
        features = input_of(getattr(*self.projector_at), lambda: self.model.model.get_image_features(**call, return_dict=True))
        return features[:, features.shape[1] - self.side**2 :]

    def as_run(self, items: list[Item]) -> tuple[list[Item], list[int], list[int]]:
        """The items that the tower is given for these, which of them each is, and how many of them are of one prompt."""
        return items, list(range(len(items))), [1] * len(items)

    def features(self, inner: Any, items: list[Item], **more: Any) -> list[Tensor]:
        """(length, D) of each image from the model's ``get_image_features``."""
        first = items[0].arguments
        call = {k: v for k, v in first.items() if k not in ("pixel_values", "image_sizes")}
        pixels = torch.cat([i.arguments["pixel_values"] for i in items])
        sizes = torch.tensor([i.arguments["image_sizes"] for i in items])
        with at_hand(inner):  # the newline embedding is the model's own
            return list(inner.get_image_features(pixel_values=pixels, image_sizes=sizes, return_dict=True, **call, **more).pooler_output)


def _sizes(inputs: dict[str, Any]) -> list[tuple[int, int]]:
    """(height, width) of every image as plain numbers, which the model's own rounding is exact with."""
    sizes = inputs.get("image_sizes")
    if inputs.get("pixel_values") is not None and sizes is None:
        raise CountMismatchError("pixel_values without image_sizes: pass both as the processor gives them")
    return [] if sizes is None else [(int(h), int(w)) for h, w in (sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes)]


def _on_picture(edges: list[float], tiling: Grid, size: tuple[int, int], side: int, tile: int) -> tuple[float, float, float, float]:
    """Edges (top, left, bottom, right) in patches of the canvas as fractions of the image that is centred on it."""
    canvas = tiling[0] * tile, tiling[1] * tile
    scale = min(c / s for c, s in zip(canvas, size))
    shown = [min(math.ceil(s * scale), c) for s, c in zip(size, canvas)]
    start = [(c - s) // 2 for c, s in zip(canvas, shown)]
    pixels = tile / side
    top, left, bottom, right = edges
    return (
        (top * pixels - start[0]) / shown[0], (left * pixels - start[1]) / shown[1],
        (bottom * pixels - start[0]) / shown[0], (right * pixels - start[1]) / shown[1],
    )  # fmt: skip
