"""Image files to RGB pictures: turned upright, transparency on white, 16 bits scaled to 8; anything odd is one clear line."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import MllmEfficientError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

MIN_SIDE = 8
MAX_ASPECT = 100
MAX_PIXELS = 89_478_485  # Pillow's own limit against decompression bombs


def load_image(path: str | Path) -> Picture:
    """The picture in a file as RGB.

    Raises ``MllmEfficientError`` for a file that is missing or no image, a side under 8 pixels, an aspect ratio above
    100:1 or more than 89 megapixels.
    """
    from PIL import Image, UnidentifiedImageError

    path = Path(path)
    try:
        there = path.is_file()
    except OSError as error:  # a name that is too long
        raise MllmEfficientError(f"{str(path)[:80]} cannot be read as an image: {error.strerror}") from None
    if not there:
        raise MllmEfficientError(f"no image file {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(path)
            _check_size(path, *picture.size)
            picture.load()
        return to_rgb(picture)
    except UnidentifiedImageError:
        raise MllmEfficientError(f"{path} is not an image that Pillow can read") from None
    except Image.DecompressionBombError:
        raise MllmEfficientError(f"{path} has more than {MAX_PIXELS / 1e6:.0f} megapixels: make it smaller first") from None
    except MllmEfficientError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise MllmEfficientError(f"{path} cannot be read as an image: {error}") from None


def _check_size(path: Path, width: int, height: int) -> None:
    if min(width, height) < MIN_SIDE:
        raise MllmEfficientError(f"{path} is {width} x {height} pixels: each side needs at least {MIN_SIDE}")
    if width * height > MAX_PIXELS:
        raise MllmEfficientError(
            f"{path} has {width * height / 1e6:.0f} megapixels, more than {MAX_PIXELS / 1e6:.0f}: make it smaller first"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise MllmEfficientError(f"{path} is {width} x {height} pixels, an aspect ratio above {MAX_ASPECT}:1: crop it first")


def to_rgb(picture: Picture) -> Picture:
    """Any Pillow mode as upright 8-bit RGB; transparent pixels show white."""
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        picture = _to_eight_bits(picture)
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def _to_eight_bits(picture: Picture) -> Picture:
    """Single-channel integers of 16 bits or more scaled to 0..255; plain ``convert`` would clip them to white."""
    import numpy as np
    from PIL import Image

    if picture.mode == "F":
        raise MllmEfficientError("a floating-point image has no fixed range: convert it to 8 or 16 bits first")
    values = np.asarray(picture).astype(np.int64)
    top = 65535 if picture.mode != "I" or values.max() <= 65535 else 2**31 - 1
    if picture.mode == "I" and values.max() <= 255:
        top = 255
    return Image.fromarray((np.clip(values, 0, top) * 255 // top).astype(np.uint8))
