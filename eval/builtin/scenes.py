"""Scenes of the embedded benchmark: a frozen random stream, a layout, and an integer rasteriser.

Nothing here depends on a library's fonts, random generators or float rounding, so that an image is the same in every
version of numpy and Pillow. Coordinates are integers on a canvas of ``UNITS`` x ``UNITS``; ``Scene.draw(size)``
rasterises it at any size. At the model's own size (144 px) one pixel is 10 units.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

UNITS = 1440
SPLITS = {"train": 1, "val": 2, "test": 3}
COLOURS = {
    "red": (222, 38, 38),
    "green": (36, 176, 60),
    "blue": (44, 74, 232),
    "yellow": (242, 224, 44),
    "orange": (246, 138, 22),
    "purple": (158, 52, 204),
    "cyan": (48, 214, 222),
    "pink": (250, 142, 196),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
CORNERS = ("top left", "top right", "bottom left", "bottom right")
MAX_SMALL = 5
CORNER_ZONE = 270  # units: the square in each corner that only a digit may enter

# 5 x 7 digit bitmaps, one row per entry, most significant bit at the left.
DIGITS = (
    (0b01110, 0b10001, 0b10011, 0b10101, 0b11001, 0b10001, 0b01110),
    (0b00100, 0b01100, 0b00100, 0b00100, 0b00100, 0b00100, 0b01110),
    (0b01110, 0b10001, 0b00001, 0b00110, 0b01000, 0b10000, 0b11111),
    (0b11111, 0b00010, 0b00100, 0b00010, 0b00001, 0b10001, 0b01110),
    (0b00010, 0b00110, 0b01010, 0b10010, 0b11111, 0b00010, 0b00010),
    (0b11111, 0b10000, 0b11110, 0b00001, 0b00001, 0b10001, 0b01110),
    (0b00110, 0b01000, 0b10000, 0b11110, 0b10001, 0b10001, 0b01110),
    (0b11111, 0b00001, 0b00010, 0b00100, 0b01000, 0b01000, 0b01000),
    (0b01110, 0b10001, 0b10001, 0b01110, 0b10001, 0b10001, 0b01110),
    (0b01110, 0b10001, 0b10001, 0b01111, 0b00001, 0b00010, 0b01100),
)

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


class Stream:
    """SplitMix64 (Steele, Lea and Flood 2014), keyed by integers: the benchmark's only source of randomness."""

    def __init__(self, *key: int):
        self.state = 0
        for k in key:
            self.state = _mix((self.state + _GOLDEN + k) & _MASK)

    def next(self) -> int:
        self.state = (self.state + _GOLDEN) & _MASK
        return _mix(self.state)

    def below(self, n: int) -> int:
        """An integer in [0, n)."""
        return ((self.next() >> 32) * n) >> 32

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return low + self.below(high - low + 1)

    def choice(self, items):
        return items[self.below(len(items))]

    def shuffled(self, items) -> list:
        out = list(items)
        for i in range(len(out) - 1, 0, -1):
            j = self.below(i + 1)
            out[i], out[j] = out[j], out[i]
        return out

    def block(self, n: int) -> np.ndarray:
        """The next n outputs as a uint64 array (n,)."""
        with np.errstate(over="ignore"):
            z = np.uint64(self.state) + np.uint64(_GOLDEN) * np.arange(1, n + 1, dtype=np.uint64)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = z ^ (z >> np.uint64(31))
        self.state = (self.state + n * _GOLDEN) & _MASK
        return z


@dataclass(frozen=True)
class Box:
    """A rectangle in canvas units, right and bottom exclusive."""

    left: int
    top: int
    right: int
    bottom: int


@dataclass(frozen=True)
class Thing:
    """A shape on the canvas."""

    shape: str
    colour: str
    big: bool
    x: int
    y: int
    radius: int
    rgb: tuple[int, int, int]

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def box(self) -> Box:
        return Box(self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius)

    def covers(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Which of the points (x (1, w), y (h, 1), canvas units) lie inside: bool (h, w)."""
        dx, dy, r = x - self.x, y - self.y, self.radius
        if self.shape == "circle":
            return dx * dx + dy * dy <= r * r
        if self.shape == "ring":
            d = dx * dx + dy * dy
            return (d <= r * r) & (25 * d >= 9 * r * r)
        ax, ay = np.abs(dx), np.abs(dy)
        if self.shape == "square":
            return (10 * ax <= 9 * r) & (10 * ay <= 9 * r)
        if self.shape == "triangle":  # apex up, base at +0.9 r
            return (dy <= 9 * r // 10) & (2 * ax <= dy + r)
        return ((3 * ax <= r) & (ay <= r)) | ((3 * ay <= r) & (ax <= r))  # cross


@dataclass(frozen=True)
class Digit:
    """A digit in a corner; its bitmap has 5 x 7 cells of ``cell`` units."""

    value: int
    corner: str
    left: int
    top: int
    cell: int
    bright: bool

    @property
    def box(self) -> Box:
        return Box(self.left, self.top, self.left + 5 * self.cell, self.top + 7 * self.cell)

    def covers(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        col, row = (x - self.left) // self.cell, (y - self.top) // self.cell
        inside = (col >= 0) & (col < 5) & (row >= 0) & (row < 7)
        bitmap = np.array(DIGITS[self.value])
        return inside & ((bitmap[np.clip(row, 0, 6)] >> (4 - np.clip(col, 0, 4))) & 1).astype(bool)


@dataclass(frozen=True)
class Scene:
    """One image of the benchmark: ``things[0]`` is the big object, the others are small."""

    split: str
    index: int
    things: tuple[Thing, ...]
    digits: tuple[Digit, ...]
    base: tuple[int, int, int]
    gradient: tuple[int, int, int]
    stripes: tuple[int, int, int, int, Box] | None
    noise: int

    @property
    def big(self) -> Thing:
        return self.things[0]

    @property
    def small(self) -> tuple[Thing, ...]:
        return self.things[1:]

    def digit(self, corner: str) -> Digit | None:
        return next((d for d in self.digits if d.corner == corner), None)

    def draw(self, size: int = 144) -> np.ndarray:
        """The scene as a uint8 RGB array (size, size, 3)."""
        return self.draw_with_owners(size)[0]

    def draw_with_owners(self, size: int = 144) -> tuple[np.ndarray, np.ndarray]:
        """The image and, per pixel, the index of the thing drawn there (int8 (size, size); -1 is background)."""
        centre = (2 * np.arange(size, dtype=np.int32) + 1) * (UNITS // 2) // size
        x, y = centre[None, :], centre[:, None]
        gx, gy, amount = self.gradient
        shade = (gx * (x - UNITS // 2) + gy * (y - UNITS // 2)) * amount // (10 * UNITS)
        if self.stripes is not None:
            sx, sy, period, depth, box = self.stripes
            wave = ((sx * x + sy * y) // period % 2) * depth
            inside = (x >= box.left) & (x < box.right) & (y >= box.top) & (y < box.bottom)
            shade = shade + np.where(inside, wave, 0)
        image = np.array(self.base, dtype=np.int32) + shade[..., None]
        owners = np.full((size, size), -1, dtype=np.int8)
        for i, thing in enumerate(self.things):
            mask, where = _window(thing, x, y)
            image[where][mask] = thing.rgb
            owners[where][mask] = i
        for digit in self.digits:
            mask, where = _window(digit, x, y)
            image[where][mask] = 250 if digit.bright else 8
        image += self._noise(size)
        return np.clip(image, 0, 255).astype(np.uint8), owners

    def _noise(self, size: int) -> np.ndarray:
        """Approximately Gaussian integer noise: the sum of four bytes, centred, times ``noise`` / 256."""
        n = size * size * 3
        raw = Stream(77, SPLITS[self.split], self.index).block((n + 1) // 2)
        # the sum of the four bytes of each 32-bit half, in two masked additions
        halves = raw.astype("<u8", copy=False).view("<u4")[:n]
        pairs = (halves & np.uint32(0x00FF00FF)) + ((halves >> np.uint32(8)) & np.uint32(0x00FF00FF))
        sums = ((pairs & np.uint32(0xFFFF)) + (pairs >> np.uint32(16))).astype(np.int32)
        return ((sums - 510) * self.noise // 256).reshape(size, size, 3)


def _window(thing: Thing | Digit, x: np.ndarray, y: np.ndarray):
    """The mask of a thing inside its own bounding box, and that box as slices."""
    box = thing.box
    cols = np.flatnonzero((x[0] >= box.left) & (x[0] <= box.right))
    rows = np.flatnonzero((y[:, 0] >= box.top) & (y[:, 0] <= box.bottom))
    if not len(cols) or not len(rows):
        return np.zeros((0, 0), dtype=bool), (slice(0, 0), slice(0, 0))
    where = (slice(rows[0], rows[-1] + 1), slice(cols[0], cols[-1] + 1))
    return thing.covers(x[:, where[1]], y[where[0]]), where


def _tinted(rng: Stream, colour: str) -> tuple[int, int, int]:
    r, g, b = (c + rng.between(-14, 14) for c in COLOURS[colour])
    return r, g, b


def _free(x: int, y: int, r: int, placed: list[Thing]) -> bool:
    zone = CORNER_ZONE + r
    if (x < zone or x > UNITS - zone) and (y < zone or y > UNITS - zone):
        return False
    return all((x - t.x) ** 2 + (y - t.y) ** 2 >= (r + t.radius + 30) ** 2 for t in placed)


def make_scene(split: str, index: int) -> Scene:
    """Scene number ``index`` of a split ("train", "val" or "test"). The splits use different keys of the stream."""
    rng = Stream(2026, SPLITS[split], index)
    colours, radius = list(COLOURS), rng.between(230, 300)
    colour, shape = rng.choice(colours), rng.choice(SHAPES)
    low, high = CORNER_ZONE + 180, UNITS - CORNER_ZONE - 180
    x, y = rng.between(low, high), rng.between(low, high)
    things = [Thing(shape, colour, True, x, y, radius, _tinted(rng, colour))]
    for _ in range(rng.between(0, MAX_SMALL)):
        colour, shape, radius = rng.choice(colours), rng.choice(SHAPES), rng.between(80, 120)
        for _ in range(80):
            x, y = rng.between(radius + 20, UNITS - radius - 20), rng.between(radius + 20, UNITS - radius - 20)
            if _free(x, y, radius, things):
                things.append(Thing(shape, colour, False, x, y, radius, _tinted(rng, colour)))
                break
    base = (rng.between(60, 160), rng.between(60, 160), rng.between(60, 160))
    digits = []
    for corner in CORNERS:
        if rng.below(100) >= 55:
            continue
        cell = rng.between(20, 24)
        dx, dy = rng.between(30, 100), rng.between(30, 90)
        left = dx if "left" in corner else UNITS - dx - 5 * cell
        top = dy if "top" in corner else UNITS - dy - 7 * cell
        digits.append(Digit(rng.below(10), corner, left, top, cell, bright=sum(base) < 330))
    gradient = (rng.between(-10, 10), rng.between(-10, 10), rng.between(10, 60))
    stripes = None
    if rng.below(100) < 40:
        left, top = rng.between(0, 900), rng.between(0, 900)
        box = Box(left, top, left + rng.between(300, 900), top + rng.between(300, 900))
        stripes = (rng.between(-3, 3), rng.between(1, 3), rng.between(80, 240), rng.between(12, 28), box)
    return Scene(split, index, tuple(things), tuple(digits), base, gradient, stripes, noise=rng.between(6, 26))
