"""Pictures as upright 8-bit RGB, however they came: transparency on white, 16 bits scaled to 8; anything odd is one clear line.

One rule for values of more than 8 bits: a picture of 16-bit or 32-bit integers keeps its values where all are at most 255, and is scaled
so that 65,535 is 255 otherwise (2^31 - 1 where some value is above 65,535). Where the highest value is below an eighth of that, the picture
is nearly black, and a warning says so; ``image_range="auto"`` stretches lowest to highest over 0 to 255 instead. Floating-point pictures
have no range of their own: they are refused but under ``"auto"``.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import os
import re
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from ..errors import MllmEfficientError, shortened

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image as Picture

MIN_SIDE = 8
MAX_ASPECT = 100
MAX_PIXELS = 89_478_485  # Pillow's own limit against decompression bombs
RANGES = ("full", "auto")
TOPS = (255, 65_535, 2**31 - 1)  # the first that no value is above is white
STRETCH = "take --image-range auto or, in a recipe, data.image_range=auto"
DARK = 8  # a picture whose highest value is below this part of white is told
SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):", re.IGNORECASE)  # of two letters at least: C: is a drive


# ------------------------------------------------------------------------------------------------ where it is


def find(source: Any, folder: Path | None = None, look: bool = True) -> Path | bytes:
    """The file that a path, ``~``, ``file:`` or ``data:`` URI names; of ``data:`` its content.

    folder: where relative paths begin. look: whether the file must be there. Raises ``MllmEfficientError``; nothing is fetched.
    """
    if not isinstance(source, str | os.PathLike) or not str(source):
        raise MllmEfficientError("image must be a path or a list of paths")
    text = str(source)
    scheme = SCHEME.match(text)
    kind = scheme[1].lower() if scheme else ""
    if kind == "data":
        return _of_data_uri(text)
    if kind in ("http", "https"):
        raise MllmEfficientError(f"{shortened(text)} is not fetched: download it and give its path")
    if kind == "file":
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost"):
            raise MllmEfficientError(f"{shortened(text)} is on another machine: copy it here and give its path")
        text = url2pathname(parts.path)
    elif scheme and text[scheme.end() :].startswith("//"):
        raise MllmEfficientError(f"{shortened(text)} is not fetched: download it and give its path")
    try:
        path = Path(text).expanduser()
        path = path if folder is None else folder / path
        there = not look or path.is_file()
    except (OSError, RuntimeError, ValueError):  # a name that is too long, a ~user who is not there
        there = False
    if not there:
        raise MllmEfficientError(f"no image file {name_of(text if folder is None else os.path.join(folder, text))}")
    return path


def _of_data_uri(text: str) -> bytes:
    head, comma, content = text.partition(",")
    try:
        if not comma:
            raise ValueError("no comma before its content")
        if not head.lower().rstrip().endswith(";base64"):
            return unquote_to_bytes(content)
        return base64.b64decode(re.sub(rb"\s+", b"", unquote_to_bytes(content)), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MllmEfficientError(f"{shortened(text, 40)} is no data: URI: {error}") from None


def name_of(image: Any, folder: Path | None = None) -> str:
    """An image in a message or report: its path, relative to a folder if one is given, or what it is."""
    if isinstance(image, bytes):
        return f"an image of {len(image):,} bytes"
    if not isinstance(image, str | os.PathLike):
        return f"a picture ({type(image).__name__})"
    if folder is None:
        return os.sep.join(shortened(part) for part in str(image)[:1000].split(os.sep))
    try:
        return os.path.relpath(image, folder)
    except ValueError:  # another drive
        return Path(image).name


# ------------------------------------------------------------------------------------------------ opening


_pillow = threading.RLock()  # Pillow's settings are the process's


@contextlib.contextmanager
def whole_files() -> Iterator[None]:
    """Cut files are errors, also after something has told Pillow to fill them up with grey, as importing lmms_eval does for the process."""
    from PIL import ImageFile

    with _pillow:
        before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


@contextlib.contextmanager
def converting(image_range: str = "full") -> Iterator[None]:
    """Other people's code, which makes its pictures RGB by Pillow's ``convert``, does so by this module's rule."""
    from PIL import Image

    def convert(picture: Picture, mode: str | None = None, *args: Any, **kwargs: Any) -> Picture:
        if mode != "RGB" or args or kwargs:
            return stock(picture, mode, *args, **kwargs)
        Image.Image.convert = stock  # type: ignore[method-assign]  # which the rule itself goes through
        try:
            return to_rgb(picture, image_range)
        finally:
            Image.Image.convert = convert  # type: ignore[assignment, method-assign]

    with _pillow:
        stock, Image.Image.convert = Image.Image.convert, convert  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            Image.Image.convert = stock  # type: ignore[method-assign]


def load_image(source: Any, image_range: str = "full") -> Picture:
    """A picture as upright 8-bit RGB.

    source: a path (``~`` is the user's folder), a ``file:`` or ``data:`` URI, the bytes of a file, a PIL picture, or an array (H, W),
    (H, W, 1), (H, W, 3) or (H, W, 4). image_range: "full" or "auto", for values of more than 8 bits (see the module).

    Raises ``MllmEfficientError`` for a file that is missing or no image, a side under 8 pixels, an aspect ratio above
    100:1 or more than 89 megapixels.
    """
    if image_range not in RANGES:
        raise MllmEfficientError(f"image range {shortened(image_range)!r} is not one of {', '.join(RANGES)}")
    name, opened = _opened(source)
    try:
        _check_size(name, *opened.size)
        with whole_files():
            opened.load()
        return to_rgb(opened, image_range, name)
    except MllmEfficientError:
        raise
    except Exception as error:  # a decoder of Pillow's on damaged data: OSError, SyntaxError, ValueError, EOFError, struct.error ...
        raise MllmEfficientError(f"{name} cannot be read as an image: {shortened(error)}") from None


def size_of(source: Any) -> tuple[int, int]:
    """Width and height as they will be once the picture is upright, of the file's header alone.

    Raises ``MllmEfficientError`` for a file that is missing or no image. ``load_image`` refuses more.
    """
    _, opened = _opened(source)
    try:
        turned = opened.getexif().get(0x0112) in (5, 6, 7, 8)
    except Exception:  # a damaged EXIF block, which load_image names
        turned = False
    width, height = opened.size
    return (height, width) if turned else (width, height)


def _opened(source: Any) -> tuple[str, Picture]:
    """A name for messages and the picture, not decoded yet."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(source, Image.Image):
        return f"the picture of mode {source.mode}", source
    if hasattr(source, "__array__") or hasattr(source, "__array_interface__"):
        return "the array", _of_array(source)
    data = bytes(source) if isinstance(source, bytes | bytearray | memoryview) else find(source)
    name = name_of(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return name, Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)
    except UnidentifiedImageError:
        raise MllmEfficientError(f"{name} is not an image that Pillow can read") from None
    except Image.DecompressionBombError:
        raise MllmEfficientError(f"{name} has more than {MAX_PIXELS / 1e6:.0f} megapixels: make it smaller first") from None
    except Exception as error:  # whatever a damaged header makes Pillow's plugins raise
        raise MllmEfficientError(f"{name} cannot be read as an image: {shortened(error)}") from None


def _of_array(source: Any) -> Picture:
    import numpy as np
    from PIL import Image

    array = np.asarray(source)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise MllmEfficientError(f"an array of shape {array.shape} is no picture: (H, W), (H, W, 3) or (H, W, 4) are")
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if array.dtype == np.uint8:
        return Image.fromarray(np.ascontiguousarray(array))
    if array.ndim == 2 and array.dtype.kind in "iu" and array.max(initial=0) <= TOPS[-1]:
        return Image.fromarray(np.maximum(array, 0).astype(np.int32))
    if array.ndim == 2 and array.dtype.kind == "f":
        return Image.fromarray(array.astype(np.float32))
    raise MllmEfficientError(f"an array of {array.dtype} and shape {array.shape} has no known range: give uint8")


def _check_size(name: str, width: int, height: int) -> None:
    if min(width, height) < MIN_SIDE:
        raise MllmEfficientError(f"{name} is {width} x {height} pixels: each side needs at least {MIN_SIDE}")
    if width * height > MAX_PIXELS:
        raise MllmEfficientError(
            f"{name} has {width * height / 1e6:.0f} megapixels, more than {MAX_PIXELS / 1e6:.0f}: make it smaller first"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise MllmEfficientError(f"{name} is {width} x {height} pixels, an aspect ratio above {MAX_ASPECT}:1: crop it first")


# ------------------------------------------------------------------------------------------------ to RGB


def to_rgb(picture: Picture, image_range: str = "full", name: str = "the picture") -> Picture:
    """Any Pillow mode as upright 8-bit RGB; transparent pixels show white."""
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        picture = _to_eight_bits(picture, image_range, name)
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def _to_eight_bits(picture: Picture, image_range: str, name: str) -> Picture:
    """Single-channel values of more than 8 bits by the module's rule; plain ``convert`` would clip them to white."""
    import numpy as np
    from PIL import Image

    values = np.asarray(picture)
    if image_range == "auto":
        return Image.fromarray(_stretched(values, name))
    if picture.mode == "F":
        raise MllmEfficientError(f"{name} has floating-point values, which have no fixed range: convert it, or {STRETCH}")
    values = values.astype(np.int64)
    highest = int(values.max())
    top = next(top for top in TOPS if highest <= top)
    if top > TOPS[0] and highest * DARK < top:
        warnings.warn(
            f"{name} is nearly black: its values go to {highest:,}, and {top:,} is white (to stretch them, {STRETCH})",
            stacklevel=2,
        )
    return Image.fromarray((np.clip(values, 0, top) * 255 // top).astype(np.uint8))


def _stretched(values: np.ndarray, name: str) -> np.ndarray:
    """Lowest to highest over 0 to 255."""
    import numpy as np

    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise MllmEfficientError(f"{name} has values that are NaN or infinite")
    low, high = values.min(), values.max()
    return np.rint((values - low) * (255 / (high - low) if high > low else 0.0)).astype(np.uint8)
