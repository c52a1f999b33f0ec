"""Pictures with something wrong: noise, blur, JPEG, a watermark, and a patch that attracts attention. For ``eval --corrupt``.

All but JPEG, which is Pillow's, are integer arithmetic on a frozen random stream, so that a corrupted picture is the same everywhere. The
stream's key is the picture's name: every method sees the same picture. noise, blur, jpeg and watermark act on the whole picture, what the
question is about included; the patch lies where it covers least of that.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mllm_efficient.errors import MllmEfficientError, did_you_mean

from .hard.font import ROWS, bitmap
from .scenes import COLOURS, Stream

if TYPE_CHECKING:
    from PIL.Image import Image

    from mllm_efficient.tokens import Plane

Boxes = Sequence[tuple[float, float, float, float]]  # (top, left, bottom, right) in fractions of a picture

NOISE = 52  # times a sum of four centred bytes / 256: a standard deviation of 30 of 255
BLUR = 8  # binomial kernel of 2 n + 1 taps: a standard deviation of sqrt(n / 2) = 2 pixels
QUALITY = 10
WATERMARK, COLUMNS, LINES = "SAMPLE", 42, 3  # text, cells of its width and a gap over the picture's width, lines
PALETTE = ((0, 0, 0), (255, 255, 255), *COLOURS.values())
# Of the patch: a tile of 4 x 4 cells by their places in PALETTE, row by row, 3 x 3 times. What ``attracting`` finds.
TILE = "0726362727115310"
TILES, PLACES = 3, 4  # tiles along a side of the patch; its side is a quarter of the picture's, which it can stand in at 4 x 4 places
_SEED = 2028


@dataclass(frozen=True)
class Corrupted:
    """A question about corrupted pictures: the sample, all that is asked of it, under another name. ``image`` is the clean one's."""

    sample: Any
    corruption: str

    @property
    def question(self) -> Any:
        return self.sample.question

    @property
    def image(self) -> Any:
        return self.sample.image

    @property
    def id(self) -> str:
        return f"{self.sample.id}+{self.corruption}"

    @property
    def task(self) -> str:
        return self.sample.task

    @property
    def video(self) -> bool:
        return self.sample.video

    @property
    def keys(self) -> list[str]:
        names = [f"{key}+{self.corruption}" for key in self.sample.keys]
        return names if self.corruption != "patch" else [f"{name}{self._place(i)}" for i, name in enumerate(names)]

    def sizes(self, size: int) -> list[tuple[int, int]]:
        return self.sample.sizes(size)

    def boxes(self, number: int = 0) -> Boxes:
        return self.sample.boxes(number)

    def region(self, planes: Sequence[Plane], number: int = 0) -> np.ndarray:
        return self.sample.region(planes, number)

    def pictures(self, size: int) -> list[Image]:
        from PIL import Image

        out = []
        for i, picture in enumerate(self.sample.pictures(size)):
            own = 0 if self.video else i
            key = f"{self.sample.keys[own]}/{i}"
            made = corrupted(np.asarray(picture.convert("RGB")), self.corruption, key, self._place(own))
            out.append(Image.fromarray(made))
        return out

    def _place(self, number: int) -> int:
        """Where the patch of a picture (of a video) lies: of the 4 x 4 places one that covers least of what the question is about."""
        return free_place(self.boxes(number), self.sample.keys[number])


def corrupted(picture: np.ndarray, corruption: str, key: str, place: int = 0) -> np.ndarray:
    """A picture, uint8 (h, w, 3), under one of ``CORRUPTIONS``. key: of what is drawn. place: of the patch, row by row."""
    if corruption == "noise":
        return noise(picture, key)
    if corruption == "blur":
        return blur(picture)
    if corruption == "jpeg":
        return jpeg(picture)
    return watermark(picture, key) if corruption == "watermark" else patched(picture, place)


CORRUPTIONS = {
    "noise": "Gaussian noise, standard deviation 30 of 255",
    "blur": "Gaussian blur, standard deviation 2 pixels",
    "jpeg": f"JPEG of quality {QUALITY}",
    "watermark": f"{LINES} lines of '{WATERMARK}' over the whole width, half transparent",
    "patch": "a patch on a sixteenth of the picture that attracts the class token's attention of the embedded tower, beside what is asked",
}


def corruptions_of(text: str | None, turns: int = 1) -> tuple[str, ...]:
    """The corruptions of ``a,b``, each once; none of None.

    Raises:
        MllmEfficientError: one that there is not, or second turns beside them.
    """
    found = () if text is None else tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in found:
        if name not in CORRUPTIONS:
            raise MllmEfficientError(f"no corruption {name!r}{did_you_mean(name, list(CORRUPTIONS))} (there are {', '.join(CORRUPTIONS)})")
    if text is not None and not found:
        raise MllmEfficientError(f"no corruption is named (there are {', '.join(CORRUPTIONS)})")
    if found and turns > 1:
        raise MllmEfficientError("corrupted pictures are asked about once: leave out second turns, or the corruptions")
    return found


def stream(key: str) -> Stream:
    return Stream(_SEED, int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big"))


def noise(picture: np.ndarray, key: str) -> np.ndarray:
    """Approximately Gaussian: a sum of four bytes, centred, times ``NOISE`` / 256, for every channel of every pixel."""
    halves = stream(key).block((picture.size + 1) // 2).astype("<u8", copy=False).view("<u4")[: picture.size]
    bytes_of = [(halves >> np.uint32(shift) & np.uint32(255)).astype(np.int32) for shift in (0, 8, 16, 24)]
    grain = (np.sum(bytes_of, axis=0) - 510) * NOISE // 256
    return np.clip(picture.astype(np.int32) + grain.reshape(picture.shape), 0, 255).astype(np.uint8)


def blur(picture: np.ndarray) -> np.ndarray:
    """The binomial kernel along both axes, each rounded to whole values; the edge goes on outside."""
    weights = [math.comb(2 * BLUR, i) for i in range(2 * BLUR + 1)]
    out = picture.astype(np.int64)
    for axis in (0, 1):
        sides = [(BLUR, BLUR) if i == axis else (0, 0) for i in range(3)]
        wide, n = np.pad(out, sides, mode="edge"), out.shape[axis]
        sums = np.sum([w * wide.take(range(i, i + n), axis) for i, w in enumerate(weights)], axis=0)
        out = (sums + (1 << 2 * BLUR - 1)) >> 2 * BLUR
    return out.astype(np.uint8)


def jpeg(picture: np.ndarray) -> np.ndarray:
    """As Pillow writes and reads it."""
    from PIL import Image

    with io.BytesIO() as file:
        Image.fromarray(picture).save(file, "JPEG", quality=QUALITY)
        return np.asarray(Image.open(file).convert("RGB"))


def watermark(picture: np.ndarray, key: str) -> np.ndarray:
    """Lines of text, halfway to white, evenly from top to bottom; each begins somewhere else and goes on at the other side."""
    height, width = picture.shape[:2]
    cells, rng, out = bitmap(WATERMARK), stream(key), picture.copy()
    cells = np.pad(cells, ((0, 0), (0, COLUMNS - cells.shape[1])))
    side = max(1, width // COLUMNS)
    for line in range(LINES):
        top = max(0, (2 * line + 1) * height // (2 * LINES) - ROWS * side // 2)
        rows = np.arange(min(ROWS * side, height - top)) // side
        columns = (np.arange(width) + rng.below(width)) % width * COLUMNS // width
        marked = cells[rows[:, None], columns[None, :]]
        part = out[top : top + len(rows)]
        part[marked] = (part[marked].astype(np.uint16) + 255) // 2
    return out


def texture(tile: str = TILE) -> np.ndarray:
    """uint8 (12, 12, 3), a colour for each cell of the patch."""
    cells = np.array([int(c, 16) for c in tile]).reshape(4, 4)
    return np.array(PALETTE, np.uint8)[np.tile(cells, (TILES, TILES))]


def patched(picture: np.ndarray, place: int, tile: str = TILE) -> np.ndarray:
    """The picture with a patch at one of its 4 x 4 places."""
    height, width = picture.shape[:2]
    (top, bottom), (left, right) = ((at * n // PLACES, (at + 1) * n // PLACES) for at, n in zip(divmod(place, PLACES), (height, width)))
    cells, out = texture(tile), picture.copy()
    rows, columns = (np.arange(n) * len(cells) // max(1, n) for n in (bottom - top, right - left))
    out[top:bottom, left:right] = cells[rows[:, None], columns[None, :]]
    return out


def free_place(boxes: Boxes, key: str) -> int:
    """The place that covers least of the boxes; of several any, by the key."""
    order = stream(key).shuffled(range(PLACES * PLACES))
    return min(order, key=lambda place: round(covered(place, boxes), 9))


def covered(place: int, boxes: Boxes) -> float:
    """How much of boxes lies under the patch at a place, as shares of the picture."""
    top, left = (at / PLACES for at in divmod(place, PLACES))
    side = 1 / PLACES
    return sum(max(0.0, min(b, top + side) - max(t, top)) * max(0.0, min(r, left + side) - max(lo, left)) for t, lo, b, r in boxes)
