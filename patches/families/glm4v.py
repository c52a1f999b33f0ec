"""GLM-4.6V and its kin (GLM-4.1V, GLM-4.5V, GLM-OCR): images of any size, M-RoPE; a video is a run of placeholders for every time step.

Between the time steps of a video stands text, and their placeholders are those of images: the token types alone tell them apart.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from mllm_efficient.errors import CountMismatchError

from ..base import Item
from ..controls import pixel_controls
from ..rules import Settings, Size, Views
from ..sizes import ProjectorSize, Tower
from .qwen_vl import PIXELS_OF, QwenVLAdapter, QwenVLRules, grid_of, pixel_limits


class Glm4VRules(QwenVLRules):
    """The shapes of GLM-4.1V, 4.5V and 4.6V: a convolution joins the patches of a token, and a gated projector follows."""

    pixels = (112 * 112, 28 * 28 * 12288)
    usual_pixels = (112 * 112, 28 * 28 * 15000)

    @functools.cached_property
    def tower_size(self) -> Tower:
        return replace(super().tower_size, mlp_width=self._tower_mlp, mlp_matrices=3)

    @property
    def _tower_mlp(self) -> int:
        return self.config.vision_config.out_hidden_size

    @functools.cached_property
    def projector_size(self) -> ProjectorSize:
        width = self.config.vision_config.out_hidden_size
        joined = self.tower_size.width * self.merge**2 * width
        return ProjectorSize(width, 2 * self._projector_mlp, width, gated=True, before=joined + width * width)

    @property
    def _projector_mlp(self) -> int:
        return self.config.vision_config.intermediate_size

    def of_size(self, size: Size) -> Views:
        """As in Qwen-VL, but limits are of both frames that a still is taken for, and a side below a token's is made that long first."""
        limits = pixel_limits(self.pixels, self.settings, self.usual_pixels)
        scale = max(1.0, *(self.step / side for side in size))
        seen = (int(size[0] * scale), int(size[1] * scale)) if scale > 1 else size
        fewest, most = (limit / self.tower_size.frames for limit in limits)
        return self._at(grid_of(seen, self.step, (fewest, most), self.name), size)

    def controls(self, size: Size, k: int) -> Iterable[Settings]:
        fewest, _ = pixel_limits(self.pixels, self.settings, self.usual_pixels)
        return pixel_controls(k, self.step**2 * self.tower_size.frames, fewest)


class GlmOcrRules(Glm4VRules):
    """GLM-OCR's tower and projector have inner widths of their own."""

    @property
    def _tower_mlp(self) -> int:
        return self.config.vision_config.intermediate_size

    @property
    def _projector_mlp(self) -> int:
        return self.config.vision_config.out_hidden_size * self.tower_size.channels


class Glm4VAdapter(QwenVLAdapter, Glm4VRules):
    """One GLM-4.1V, 4.5V or 4.6V model."""

    @property
    def placeholders(self) -> dict[str, int]:
        """One token for both: transformers looks for videos at the image token too."""
        return dict.fromkeys(("image", "video"), self.config.image_token_id)

    def items(self, inputs: dict[str, Any]) -> list[Item]:
        if all(inputs.get(pixels) is not None for pixels in PIXELS_OF.values()):
            raise CountMismatchError(
                f"images and videos in one call have one placeholder on {self.name}, which tells them not apart: a call each"
            )
        return super().items(inputs)


class GlmOcrAdapter(Glm4VAdapter, GlmOcrRules):
    """One GLM-OCR model."""
