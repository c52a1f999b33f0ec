"""LLaVA-NeXT-Video: images as LLaVA-NeXT has them, videos of frames pooled by a stride."""

from __future__ import annotations

from .llava_onevision import VideoFrames


class LlavaNextVideoAdapter(VideoFrames):
    """What the wrapper needs to know of one LLaVA-NeXT-Video model."""

    def pooled(self, side: int) -> int:
        return side // self.config.spatial_pool_stride
