"""Gemma 3: every view of a picture is one square, pooled to 256 tokens that see each other.

Which columns are of images, the model reads from ``token_type_ids``. Pan-and-scan makes a long picture into the whole and some crops;
the prompt puts text around each of them and the call does not say which belong together, so each is an image of its own, with a budget of
its own.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mllm_efficient.errors import CountMismatchError, MllmEfficientError
from mllm_efficient.lazy import torch
from mllm_efficient.tokens import Grid, Plane, VisualShape

from ..base import Adapter, Encoding, Item, smaller_pixels
from ..rules import Rules, Settings, Size, Views
from ..running import at_hand
from ..sizes import ProjectorSize, Tower, clip_or_siglip
from ..tower.attention import positions_at_hand, tower_of

if TYPE_CHECKING:
    from torch import Tensor

PAN_AND_SCAN = {"pan_and_scan_min_crop_size": 256, "pan_and_scan_max_num_crops": 4, "pan_and_scan_min_ratio_to_activate": 1.2}


class Gemma3Rules(Rules):
    """The shapes of Gemma 3."""

    fixed_count = True
    counting = ("do_pan_and_scan", *PAN_AND_SCAN)
    sees_both_ways = True

    @property
    def typed(self) -> str:
        return "token_type_ids"

    @functools.cached_property
    def tower_size(self) -> Tower:
        return clip_or_siglip(self.config.vision_config, self.name)

    @functools.cached_property
    def projector_size(self) -> ProjectorSize:
        """One matrix, after pooling."""
        return ProjectorSize(0, 0, 0, before=self.tower_size.width * self.decoder_size.width)

    @property
    def side(self) -> int:
        """Tokens along a side of a view."""
        return math.isqrt(self.config.mm_tokens_per_image)

    @property
    def pooled(self) -> int:
        """Patches along a side of a token."""
        return self.view_size[0] // self.patch // self.side

    def _at(self, side: int, size: Size | None = None) -> Views:
        patches = side * self.pooled
        seen = patches * self.patch
        shape = VisualShape((Plane(side, side),))
        return Views(shape, (side, side), 1, (patches, patches), side * side, f"{seen}x{seen}: {side * side} tokens", size)

    def typical(self) -> list[Views]:
        return [self._at(self.side)]

    def of_size(self, size: Size) -> Views:
        """A view of it; ``together`` has them all."""
        return self._at(self.side, size)

    def together(self, image: Views, n: int) -> list[Views]:
        return [image] * (n * self.views(image.size, self.settings))

    def views(self, size: Size | None, settings: Settings) -> int:
        """Views of an image of (width, height) pixels: itself and its crops."""
        return 1 if size is None or not settings.get("do_pan_and_scan") else 1 + crops(size, settings)

    def prompt(self, tokens: int | None, size: Size | None, exact: bool, images: int = 1) -> list[Views]:
        if size is None or tokens is not None:
            return super().prompt(tokens, size, exact, images)
        return self.together(self.of_size(size), images)

    def of_tokens(self, n: int, exact: bool) -> list[Views]:
        each = self.side**2
        if n % each == 0:
            return self.typical() * (n // each)
        if exact:
            raise MllmEfficientError(f"{n} visual tokens: every picture gives {each} on {self.name}, so ask for a multiple of that")
        return [self.unknown(n, self._at(self.side), f"{n} tokens")]

    def smaller(self, image: Views, unit: Grid) -> Views:
        return self._at(unit[0])


def crops(size: Size, settings: Mapping[str, Any]) -> int:
    """Crops that pan-and-scan cuts from an image of (width, height) pixels, along its longer side; 0 for one that is not long."""
    least, most, ratio = (settings.get(name) or usual for name, usual in PAN_AND_SCAN.items())
    least, most = int(least), int(most)
    long, short = max(size), min(size)
    if long / short < ratio:
        return 0
    n = min(most, max(2, min(long // least, math.floor(long / short + 0.5))))
    return 0 if min(short, math.ceil(long / n)) < least else n


class Gemma3Adapter(Adapter, Gemma3Rules):
    """What the wrapper needs to know of one Gemma 3 model."""

    def items(self, inputs: dict[str, Any]) -> list[Item]:
        pixels = inputs.get("pixel_values")
        if pixels is None:
            return []
        if not isinstance(pixels, torch.Tensor) or pixels.ndim != 4:
            raise CountMismatchError("pixel_values must be one tensor (views, channels, height, width)")
        return [Item({"pixel_values": pixels[i : i + 1]}, self._at(self.side).shape) for i in range(len(pixels))]

    def shape_at(self, item: Item, grid: Grid) -> VisualShape:
        return self._at(grid[0]).shape

    def run(self, modality: str, items: list[Item], needs: frozenset[str], grid: Grid | None) -> list[Encoding]:
        pixels = torch.cat([i.arguments["pixel_values"] for i in items])
        if grid is None:
            features = self.base.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
            return [Encoding(f, i.shape) for f, i in zip(features, items)]
        return [Encoding(f, self.shape_at(i, grid)) for f, i in zip(self._small(pixels, grid[0]), items)]

    def _small(self, pixels: Tensor, side: int) -> Tensor:
        """(views, side * side, D): the projector knows how many patches a view has, so a copy of it is told otherwise."""
        patches = side * self.pooled
        pixels = smaller_pixels(pixels, patches * self.patch, patches * self.patch)
        with positions_at_hand(tower_of(self.model)):
            states = self.base.vision_tower(pixel_values=pixels, interpolate_pos_encoding=True, return_dict=True).last_hidden_state
        with at_hand(self.base.multi_modal_projector):
            projector = copy.copy(self.base.multi_modal_projector)
            projector.patches_per_image = patches
            return type(projector).forward(projector, states)

    def container(self, modality: str, features: list[Tensor], deep: list[tuple[Tensor, ...]]) -> Any:
        from .ragged import ragged_output

        return ragged_output(features)
