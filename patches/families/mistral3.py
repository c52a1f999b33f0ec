"""Mistral 3 (Pixtral's processor) and LightOnOCR: images of any size as one grid each; in Mistral's prompts a break after every row."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from mllm_efficient.errors import CountMismatchError, MllmEfficientError
from mllm_efficient.lazy import torch
from mllm_efficient.tokens import Grid, Mark, Plane, VisualShape

from ..base import Adapter, Encoding, Item, smaller_pixels
from ..rules import Settings, Size, Views
from ..sizes import ProjectorSize, Tower
from .qwen_vl import QwenVLRules

if TYPE_CHECKING:
    from torch import Tensor

MOST_PIXELS = 1540  # along the longer side, of the released checkpoints


class Mistral3Rules(QwenVLRules):
    """The shapes of Mistral 3. Of the rows that are left each but the last keeps its break, and the image its end."""

    gives = frozenset({"text", "grid"})
    parts = frozenset()
    positions = "renumber"
    mrope = False
    marks = True
    packed = True
    counting: ClassVar[tuple[str, ...]] = ("size",)
    control = "size (longest_edge of a picture)"

    @property
    def merge(self) -> int:
        return self.config.spatial_merge_size

    @functools.cached_property
    def tower_size(self) -> Tower:
        vision = self.config.vision_config
        sizes = vision.num_hidden_layers, vision.hidden_size, vision.num_attention_heads, vision.intermediate_size
        return Tower(*sizes, vision.patch_size, getattr(vision, "num_channels", 3), mlp_matrices=3)

    @functools.cached_property
    def projector_size(self) -> ProjectorSize:
        """The patch merger and two matrices."""
        layers, tower, width = getattr(self.config, "vision_feature_layer", -1), self.tower_size.width, self.decoder_size.width
        inputs = tower * (1 if isinstance(layers, int) else len(layers))
        return ProjectorSize(inputs, width, width, before=self.merge**2 * tower * inputs)

    def shape(self, modality: str, frames: int, grid: Grid) -> VisualShape:
        return VisualShape((Plane(*grid),), marks=row_breaks(*grid) if self.marks else ())

    def of_size(self, size: Size) -> Views:
        """At most so many pixels along the longer side, then up to the next multiple."""
        width, height = self.resized(size, self.settings)
        if min(width, height) < self.step:
            raise MllmEfficientError(
                f"a picture of {size[0]}x{size[1]} is less than one token on {self.name}: a side has {self.step} pixels"
            )
        return self._at((height // self.step, width // self.step), size)

    def resized(self, size: Size, settings: Settings) -> Size:
        """(width, height) of an image as the tower sees it."""
        given, step = settings.get("size") or {}, self.resize_step(settings)
        longest = given.get("longest_edge") or MOST_PIXELS
        limits = (longest, longest) if "width" not in given else (given["width"], given["height"])
        ratio = max(side / limit for side, limit in zip(size, limits))
        width, height = (math.floor(side / ratio) if ratio > 1 else side for side in size)
        return step * math.ceil(width / step), step * math.ceil(height / step)

    def controls(self, size: Size, k: int) -> Iterable[Settings]:
        longest = max((self.settings.get("size") or {}).values(), default=MOST_PIXELS)
        return [{"size": {"longest_edge": side * self.step}} for side in range(min(longest // self.step, k), 0, -1)]

    def resize_step(self, settings: Settings) -> int:
        """Pixels of which both sides of a resized image are multiples. Its processor takes a token's, whatever its file says."""
        return self.step


class LightOnOcrRules(Mistral3Rules):
    """LightOnOCR has no breaks. Its processor makes sides multiples of a patch: what is less than a token at an edge is not seen."""

    marks = False

    def resize_step(self, settings: Settings) -> int:
        given = settings.get("patch_size") or self.patch
        return given if isinstance(given, int) else given["height"]


def row_breaks(rows: int, columns: int) -> tuple[Mark, ...]:
    """The break after every row but the last, which stands between it and the rows after it, and the end of the image."""
    last = rows * columns
    breaks = [Mark(at, ("[IMG_BREAK]",), ((at - columns, at), (at, last))) for at in range(columns, last, columns)]
    return (*breaks, Mark(last, ("[IMG_END]",), ()))


class Mistral3Adapter(Adapter, Mistral3Rules):
    """What the wrapper needs to know of one Mistral 3 model."""

    encode_keys: tuple[str, ...] = ("pixel_values", "image_sizes", "vision_feature_layer")

    def as_tensors(self, inputs: dict[str, Any]) -> dict[str, Any]:
        sizes = inputs.get("image_sizes")
        return inputs if sizes is None else {**inputs, "image_sizes": torch.as_tensor(sizes)}

    def items(self, inputs: dict[str, Any]) -> list[Item]:
        inputs = self.as_tensors(inputs)
        pixels, sizes = inputs.get("pixel_values"), inputs.get("image_sizes")
        if pixels is None:
            return []
        if sizes is None or len(sizes) != len(pixels):
            raise CountMismatchError("pixel_values without image_sizes of as many images: pass both as the processor gives them")
        grids = [(height // self.step, width // self.step) for height, width in sizes.tolist()]
        shapes = self._as_written(inputs["input_ids"], [self.shape("image", 1, grid) for grid in grids])
        shared = {"vision_feature_layer": layer} if (layer := inputs.get("vision_feature_layer")) is not None else {}
        parts = zip(pixels.split(1), sizes.split(1), shapes)
        return [Item({"pixel_values": part, "image_sizes": size, **shared}, shape) for part, size, shape in parts]

    def _as_written(self, ids: Tensor, shapes: list[VisualShape]) -> list[VisualShape]:
        """The shapes, without marks where a prompt has the placeholders of an image side by side."""
        where, start, out = (ids == self.placeholders["image"]).flatten().nonzero()[:, 0], 0, []
        for shape in shapes:
            own = where[start : start + shape.length]
            start += shape.length
            together = len(own) == shape.length and int(own[-1] - own[0]) + 1 == shape.length and shape.planes[0].rows > 1
            out.append(replace(shape, marks=()) if together else shape)
        return out

    def shape_at(self, item: Item, grid: Grid) -> VisualShape:
        smaller = self.shape("image", 1, grid)
        return smaller if item.shape.marks else replace(smaller, marks=())

    def run(self, modality: str, items: list[Item], needs: frozenset[str], grid: Grid | None) -> list[Encoding]:
        sizes, shapes = torch.cat([i.arguments["image_sizes"] for i in items]), [i.shape for i in items]
        pixels = [i.arguments["pixel_values"] for i in items]
        if grid is not None:
            shown = [part[..., :h, :w] for part, (h, w) in zip(pixels, sizes.tolist())]
            pixels = [smaller_pixels(part, *(side * self.step for side in grid)) for part in shown]
            sizes = torch.tensor([[side * self.step for side in grid]] * len(items), device=sizes.device)
            shapes = [self.shape_at(i, grid) for i in items]
        shared = {k: v for k, v in items[0].arguments.items() if k == "vision_feature_layer"}
        if sum(shape.n for shape in shapes) == 1:  # stock takes a single token's dimension away and fails
            pixels, sizes = [*pixels, *pixels], torch.cat([sizes, sizes])
        out = self.base.get_image_features(pixel_values=torch.cat(pixels), image_sizes=sizes, return_dict=True, **shared)
        return [Encoding(features, shape) for features, shape in zip(out.pooler_output, shapes)]

    def example(self, images: Sequence[Views], pixels: Callable[..., Tensor]) -> dict[str, Any]:
        sizes = [tuple(side * self.patch for side in image.patches) for image in images]
        height, width = (max(sides) for sides in zip(*sizes))
        return {"pixel_values": pixels(len(images), self.tower_size.channels, height, width), "image_sizes": torch.tensor(sizes)}

    def place(self, planes: tuple[Plane, ...], size: tuple[int, int], image_processor: Any) -> tuple[Plane, ...]:
        """Where sides are no multiples of a token's, the tokens end before the image does."""
        names = ("size", "patch_size")
        width, height = self.resized(size, {name: getattr(image_processor, name, None) for name in names})
        seen = (0.0, 0.0, height // self.step * self.step / height, width // self.step * self.step / width)
        return tuple(replace(plane, box=seen) for plane in planes)


class LightOnOcrAdapter(Mistral3Adapter, LightOnOcrRules):
    """One LightOnOCR model."""

    encode_keys = ("pixel_values", "image_sizes")
