"""LLaVA-NeXT-Video: images as LLaVA-NeXT has them, videos of frames pooled by a stride."""

from __future__ import annotations

from typing import Any

from mllm_efficient.errors import MllmEfficientError, UnsupportedModelError
from mllm_efficient.tokens import Grid

from ..rules import Views
from .llava_onevision import VideoFrames, VideoRules


class LlavaNextVideoRules(VideoRules):
    """The shapes of LLaVA-NeXT-Video."""

    FRAMES = 8

    def pooled(self, side: int) -> int:
        return side // self.config.spatial_pool_stride

    def video(self, frames: int, side: int | None = None) -> Views:
        """A video of so many frames, each side x side patches."""
        if self.config.spatial_pool_mode == "conv":
            raise UnsupportedModelError(f"{self.name} pools frames by a convolution, whose FLOPs are not known here")
        side = self.side if side is None else side
        shape, n = self.video_shape(frames, side), self.pooled(side)
        says = f"{frames} frames of {side * self.patch}x{side * self.patch}, {shape.n} tokens"
        return Views(shape, (side, side), frames, (side, side), n * n, says)

    def typical(self) -> list[Views]:
        return [self.video(self.FRAMES)]

    def taken(self, item: Any) -> Grid:
        return item.shape.planes[0].rows, item.shape.planes[0].columns  # frames are pooled before

    def of_tokens(self, n: int, exact: bool) -> list[Views]:
        each = self.video(1).shape.n
        if n % each == 0:
            return [self.video(n // each)]
        if exact:
            raise MllmEfficientError(
                f"{n} visual tokens: every frame gives {each} on {self.name}, so ask for a multiple, or for a picture by --image-size"
            )
        return [self.unknown(n, self.video(1), f"{n} tokens")]

    def smaller(self, image: Views, unit: Grid) -> Views:
        if image.shape.modality == "video":
            return self.video(image.views, unit[0])
        return super().smaller(image, unit)


class LlavaNextVideoAdapter(VideoFrames, LlavaNextVideoRules):
    """What the wrapper needs to know of one LLaVA-NeXT-Video model."""
