"""How models themselves give a picture fewer tokens: settings of their image processors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .pictures import merged

Settings = Mapping[str, Any]
Size = tuple[int, int]  # (width, height) in pixels
PIXELS, IMAGE_TOKENS = "size (pixels of a picture)", "max_image_tokens and max_tiles"


class Controlled:
    """What ``Rules`` say of the model's own control. A family that has one overrides ``control`` and ``controls``.

    control: the settings, in words; "" where there is none. counts_by_rule: whether ``of_size`` is known, so that no processor need be
    asked.
    """

    control: str = ""
    counts_by_rule: bool = True

    def controls(self, size: Size, k: int) -> Iterable[Settings]:
        """Settings that give an image of (width, height) pixels about k tokens or fewer, to choose from."""
        return ()

    def under(self, setting: Settings) -> Any:
        """The same rules with a setting of ``controls`` on top of the processor's own."""
        return self.with_settings(merged(self.settings, setting)) if setting else self  # type: ignore[attr-defined]

    def tokens_under(self, size: Size, setting: Settings) -> int:
        """N of an image of (width, height) pixels under a setting of ``controls``."""
        return int(self.under(setting).of_size(size).shape.n)

    def call_under(self, setting: Settings) -> dict[str, Any]:
        """What a call of the model has to say of such a setting."""
        return {}


def pixel_controls(k: int, area: int, fewest: int) -> Iterable[Settings]:
    """Limits of pixels for at most k tokens of ``area`` pixels. fewest: pixels that smaller pictures are enlarged to.

    One pixel less than k + 1 tokens have: at k itself rounding can cost a picture that fits a row of tokens.
    """
    most = (k + 1) * area - 1
    return [{"size": {"shortest_edge": least, "longest_edge": most}} for least in dict.fromkeys((min(fewest, most), 1))]


def _pixels(k: int, step: int, settings: Settings) -> Iterable[Settings]:
    fewest = settings.get("min_pixels") or (settings.get("size") or {}).get("shortest_edge") or 1
    return pixel_controls(k, step**2, fewest)


def _image_tokens(k: int, step: int, settings: Settings) -> Iterable[Settings]:
    """A picture in one piece of at most k tokens, or in fewer tiles. step: unused, the limits are of tokens."""
    whole = {"max_image_tokens": k, "min_image_tokens": min(k, settings.get("min_image_tokens") or k), "do_image_splitting": False}
    tiles = range(settings.get("max_tiles") or 0, 1, -1) if settings.get("do_image_splitting") else ()
    least = settings.get("min_tiles") or 1
    return [whole, *({"max_tiles": most, "min_tiles": min(least, most)} for most in tiles)]


# What the column ``control`` of ``facts`` names: settings for at most k tokens, each of step x step pixels, on top of the processor's own.
CONTROLS = {PIXELS: _pixels, IMAGE_TOKENS: _image_tokens}
