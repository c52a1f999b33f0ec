"""Cohere2 Vision (Command A Vision): tiles of the image and a thumbnail, in the prompt a line break after each of them."""

from __future__ import annotations

import functools
import itertools
import math
from typing import TYPE_CHECKING, Any

from mllm_efficient.lazy import torch
from mllm_efficient.tokens import Grid

from ..base import Item
from ..rules import Settings, Size
from ..sizes import ProjectorSize, Tower, clip_or_siglip
from ..tower.attention import positions_at_hand, tower_of
from ..tower.merge import run_inside
from .internvl import USUAL_TILES, InternVLAdapter, InternVLRules

if TYPE_CHECKING:
    from torch import Tensor


class Cohere2VisionRules(InternVLRules):
    """The shapes of Cohere2 Vision. A prompt has two tokens between images, end and start, and one between tiles."""

    counting = ("max_patches",)  # its processor does not read min_patches
    text_between = 2

    @functools.cached_property
    def tower_size(self) -> Tower:
        return clip_or_siglip(self.config.vision_config, self.name)

    @functools.cached_property
    def projector_size(self) -> ProjectorSize:
        width = self.tower_size.width * self.shrunk**2
        return ProjectorSize(width, self.config.alignment_intermediate_size, self.decoder_size.width, gated=True)

    @property
    def tower_blocks(self) -> int:
        return self.tower_size.layers

    @property
    def shrunk(self) -> int:
        return self.config.downsample_factor

    def tiling(self, size: Size, settings: Settings) -> Grid:
        """The canvas that takes the least enlarging, or, where all are too small, the least shrinking; of equals the fewest tiles."""
        (width, height), (across, down) = size, self.tile_size(settings)
        most = settings.get("max_patches") or USUAL_TILES[1]
        canvases = [(r, c) for c in range(1, most + 1) for r in range(1, most + 1) if r * c <= most]
        scales = {(r, c): min(c * across / width, r * down / height) for r, c in sorted(canvases, key=math.prod)}
        enough = {canvas: scale for canvas, scale in scales.items() if scale >= 1}
        return min(enough, key=enough.__getitem__) if enough else max(scales, key=scales.__getitem__)


class Cohere2VisionAdapter(InternVLAdapter, Cohere2VisionRules):
    """What the wrapper needs to know of one Cohere2 Vision model.

    Its SigLIP tower has no class token: a token's attention is the mean that its patches receive, added up, its key theirs in the mean.
    """

    encode_keys = ("pixel_values",)

    def features(self, pixels: Tensor, resized: bool, **call: Any) -> Tensor:
        if not resized:
            return super().features(pixels, resized, **call)
        with positions_at_hand(tower_of(self.model)):
            return super().features(pixels, resized, interpolate_pos_encoding=True, **call)

    def inside(self, method: Any, item: Item, pixels: Tensor, rounds: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        patches = torch.arange(math.prod(int(n // self.patch) for n in pixels.shape[-2:]))
        cells = self.shuffled(patches[None, :, None])[0, :, :, 0].sort(1).values
        tower = tower_of(self.model)
        hidden, steps = run_inside(method, tower, pixels, rounds, cells)
        return self.of_patches(tower.post_layernorm(hidden).unflatten(1, (-1, cells.shape[1]))), steps.kept

    def of_patches(self, tokens: Tensor) -> Tensor:
        return self.model.model.multi_modal_projector(tokens.flatten(0, 1)).flatten(1).unflatten(0, tokens.shape[:2])

    def taken(self, call: dict[str, Any]) -> tuple[Any, str]:
        return -1, "full"

    def shuffled(self, patches: Tensor) -> Tensor:
        tokens = self.model.model.multi_modal_projector.pixel_shuffle(patches)
        return tokens.flatten(1, 2).unflatten(2, (-1, patches.shape[2]))

    def placeholder_runs(self, row: list[bool]) -> list[int]:
        """Runs with a single token between them are tiles of one image."""
        out: list[int] = []
        gap = 0
        for is_image, group in itertools.groupby(row):
            length = len(list(group))
            if not is_image:
                gap = length
            elif out and gap == 1:
                out[-1] += length
            else:
                out.append(length)
        return out
