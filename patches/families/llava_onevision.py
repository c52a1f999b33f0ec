"""LLaVA-OneVision: anyres images whose map is shrunk above a size, several untiled images, videos of pooled frames."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mllm_efficient.compressors.fit import OF_TOWER
from mllm_efficient.errors import CountMismatchError, UnsupportedModelError
from mllm_efficient.lazy import torch
from mllm_efficient.tokens import Grid, Plane, VisualShape

from ..base import Encoding, Item, smaller_pixels, uncropped
from ..pictures import ASPECT_RATIO, SHARED
from ..rules import Size, Views
from ..running import at_hand, input_of
from ..tower.attention import positions_at_hand, tower_of
from .anyres import AnyresRules
from .llava_next import LlavaNextAdapter

if TYPE_CHECKING:
    from torch import Tensor


class VideoRules(AnyresRules):
    """What LLaVA-OneVision and LLaVA-NeXT-Video share: images as LLaVA-NeXT has them, and videos of pooled frames.

    closing: separators after a video.
    """

    parts = frozenset({"tile", "frame"})
    closing = 0

    def pooled(self, side: int) -> int:
        """Tokens along a side of a frame of ``side`` x ``side`` patches."""
        raise TypeError(f"{type(self).__name__} must define pooled")

    def taken(self, item: Any) -> Grid:
        """(rows, columns) of what the projector is given of each frame of a video."""
        return self.side, self.side

    def video_shape(self, frames: int, side: int) -> VisualShape:
        """Of a video of so many frames of ``side`` x ``side`` patches."""
        n = self.pooled(side)
        return VisualShape(tuple(Plane(n, n, frame=i) for i in range(frames)), "video", closing=self.closing)


class VideoFrames(LlavaNextAdapter, VideoRules):
    """The adapters' side of it."""

    encode_keys = (*LlavaNextAdapter.encode_keys, "pixel_values_videos")

    def items(self, inputs: dict[str, Any]) -> list[Item]:
        return [*super().items(inputs), *self.videos(inputs)]

    def videos(self, inputs: dict[str, Any]) -> list[Item]:
        pixels = inputs.get("pixel_values_videos")
        if pixels is None:
            return []
        if not isinstance(pixels, torch.Tensor) or pixels.ndim != 5:
            raise CountMismatchError("pixel_values_videos must be one tensor (videos, frames, channels, height, width)")
        shared = {k: inputs[k] for k in self.call_settings if inputs.get(k) is not None}
        shape = self.video_shape(pixels.shape[1], self.side)
        return [Item({"pixel_values_videos": pixels[i : i + 1], **shared}, shape) for i in range(len(pixels))]

    def frames_apart(self, item: Item) -> list[Item]:
        pixels = item.arguments.get("pixel_values_videos")
        if pixels is None:
            return [item]
        shape = self.video_shape(1, self.side)
        return [Item({**item.arguments, "pixel_values_videos": frame}, shape) for frame in pixels.split(1, 1)]

    def example(self, images: Sequence[Views], pixels: Callable[..., Tensor]) -> dict[str, Any]:
        if images[0].shape.modality == "image":
            return super().example(images, pixels)
        width, height = self.view_size
        return {"pixel_values_videos": pixels(len(images), images[0].views, self.tower_size.channels, height, width)}

    def unit(self, item: Item) -> Grid:
        return self.side, self.side

    def views_of(self, item: Item) -> int:
        return super().views_of(item) if item.shape.modality == "image" else item.arguments["pixel_values_videos"].shape[1]

    def before_projector(self, items: list[Item]) -> Tensor:
        if items[0].shape.modality == "image":
            return super().before_projector(items)
        call = {k: v for k, v in items[0].arguments.items() if k in LlavaNextAdapter.call_settings}
        pixels = torch.cat([i.arguments["pixel_values_videos"].flatten(0, 1) for i in items])[None]  # frames are seen apart
        features = input_of(getattr(*self.projector_at), lambda: self.model.model.get_video_features(pixels, return_dict=True, **call))
        return features.flatten(0, -3)[:, features.shape[-2] - math.prod(self.taken(items[0])) :]

    def shape_at(self, item: Item, grid: Grid) -> VisualShape:
        if item.shape.modality == "image":
            return super().shape_at(item, grid)
        return self.video_shape(len(item.shape.planes), grid[0])

    def run(self, modality: str, items: list[Item], needs: frozenset[str], grid: Grid | None) -> list[Encoding]:
        if modality == "image":
            return super().run(modality, items, needs, grid)
        if needs & OF_TOWER:
            raise UnsupportedModelError(f"frames of a video are pooled, and have no {' and '.join(sorted(needs))} of the tower's own")
        pixels = torch.cat([i.arguments["pixel_values_videos"] for i in items])
        inner, more, shapes = self.model.model, {}, [i.shape for i in items]
        if grid is not None:
            size = grid[0] * self.config.vision_config.patch_size
            pixels = smaller_pixels(pixels.flatten(0, 1), size, size).unflatten(0, pixels.shape[:2])
            inner, more = self.resized_model(grid[0], {"image_sizes": (1, 1)}), {"interpolate_pos_encoding": True}
            shapes = [self.shape_at(i, grid) for i in items]
        call = {k: v for k, v in items[0].arguments.items() if k in ("vision_feature_layer", "vision_feature_select_strategy")}
        with at_hand(inner), contextlib.nullcontext() if grid is None else positions_at_hand(tower_of(self.model)):
            features = inner.get_video_features(pixels, return_dict=True, **call, **more).pooler_output
        # (frames * tokens, d) each, or (frames, tokens, d) where transformers is older
        return [Encoding(f.flatten(0, -2), shape) for f, shape in zip(features, shapes)]

    def place(self, planes: tuple[Plane, ...], size: tuple[int, int], image_processor: Any) -> tuple[Plane, ...]:
        return uncropped(planes, size, image_processor) if planes[0].frame is not None else planes


def unpadded(planes: tuple[Plane, ...], size: tuple[int, int]) -> tuple[Plane, ...]:
    """The planes on the original image of ``size`` (width, height), which the model saw in the middle of a square."""
    (width, height), side = size, max(size)
    left, top = -((side - width) // 2) / width, -((side - height) // 2) / height
    return tuple(replace(p, box=(top, left, top + side / height, left + side / width)) for p in planes)


class LlavaOnevisionRules(VideoRules):
    """The shapes of LLaVA-OneVision: a map of more than about ``anyres_max_9`` times a tile is shrunk."""

    counting = SHARED
    closing = 1

    def pooled(self, side: int) -> int:
        return math.ceil(side / 2)

    def _shrunk(self, rows: int, columns: int, side: int) -> Grid:
        tiles = most_tiles(self.settings.get(ASPECT_RATIO) or self.config.vision_aspect_ratio)
        over = math.sqrt(rows * columns / (tiles * side**2))
        return (int(rows // over), int(columns // over)) if over > 1.1 else (rows, columns)

    def together(self, image: Views, n: int) -> list[Views]:
        """Several images of one prompt are not tiled."""
        return [self._untiled(image.size, self.side)] * n if n > 1 else [image]

    def _untiled(self, size: Size | None, side: int) -> Views:
        shape = VisualShape((Plane(side, side),), closing=1)
        pixels = self.tile if side == self.side else side * self.patch
        says = f"a view of {pixels}x{pixels}, {shape.n} tokens and a newline"
        return Views(shape, (side, side), 1, (side, side), side * side, says, size)

    def smaller(self, image: Views, unit: Grid) -> Views:
        return self._untiled(image.size, unit[0]) if len(image.shape.planes) == 1 else super().smaller(image, unit)


def most_tiles(ratio: str) -> int:
    """The 9 of "anyres_max_9": a map of more than about so many tiles is shrunk."""
    return int(ratio.removeprefix("anyres_max_"))


class LlavaOnevisionAdapter(VideoFrames, LlavaOnevisionRules):
    """What the wrapper needs to know of one LLaVA-OneVision model."""

    encode_keys = (*VideoFrames.encode_keys, "image_sizes_videos", "vision_aspect_ratio", "batch_num_images")
    call_settings = (*LlavaNextAdapter.call_settings, "vision_aspect_ratio")

    def example(self, images: Sequence[Views], pixels: Callable[..., Tensor]) -> dict[str, Any]:
        several = {"batch_num_images": torch.tensor([len(images)])} if len(images) > 1 else {}
        return {**super().example(images, pixels), **several}

    def items(self, inputs: dict[str, Any]) -> list[Item]:
        numbers = inputs.get("batch_num_images")
        if inputs.get("pixel_values") is None or numbers is None:
            return super().items(inputs)
        # Several images of one prompt are not tiled. Rows without an image count too where the processor lists them.
        tiled = [int(n) == 1 for n in numbers for _ in range(int(n))]
        return [*self.images(inputs, tiled), *self.videos(inputs)]

    def pack_tiles(self, inner: Any, features: Tensor, size: tuple[int, int], newline: Tensor, arguments: dict[str, Any]) -> Tensor:
        ratio = arguments.get("vision_aspect_ratio") or self.config.vision_aspect_ratio
        packed, _ = inner.pack_image_features([features], torch.tensor([size]), image_newline=newline, vision_aspect_ratio=ratio)
        return packed[0]

    def as_run(self, items: list[Item]) -> tuple[list[Item], list[int], list[int]]:
        # The model tiles an image that is alone in its prompt. Untiled ones are handed over as prompts of two or more.
        numbers: list[int] = []
        padded: list[Item] = []
        wanted: list[int] = []
        for untiled, group in itertools.groupby(items, key=lambda i: len(i.arguments["pixel_values"]) == 1):
            run = list(group)
            wanted += range(len(padded), len(padded) + len(run))
            numbers += [max(len(run), 2)] if untiled else [1] * len(run)
            padded += run * 2 if untiled and len(run) == 1 else run
        return padded, wanted, numbers

    def features(self, inner: Any, items: list[Item], **more: Any) -> list[Tensor]:
        padded, wanted, numbers = self.as_run(items)
        found = super().features(inner, padded, batch_num_images=torch.tensor(numbers), **more)
        return [found[i] for i in wanted]

    def container(self, modality: str, features: list[Tensor], deep: list[tuple[Tensor, ...]]) -> Any:
        from .ragged import ragged_output

        return super().container(modality, features, deep) if modality == "image" else ragged_output(features)

    def place(self, planes: tuple[Plane, ...], size: tuple[int, int], image_processor: Any) -> tuple[Plane, ...]:
        alone = len(planes) == 1 and planes[0].frame is None  # one of several images of a prompt
        return unpadded(planes, size) if alone else super().place(planes, size, image_processor)
