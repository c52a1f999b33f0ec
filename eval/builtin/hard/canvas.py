"""Pictures as lists of marks, and the integer rasteriser that draws them at any size.

Coordinates are integers in half pixels of the picture's own size: edges of pixels are even numbers and centres odd ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..scenes import Box, Stream, Thing
from .font import ROWS, bitmap, text_width

RGB = tuple[int, int, int]
STEP = 28  # pixels: sides are multiples of it, the cell of a merged token in Qwen-VL
PIXEL = 2  # units


class Mark(Protocol):
    """Something drawn in one colour."""

    @property
    def rgb(self) -> RGB: ...

    @property
    def box(self) -> Box: ...

    def covers(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Which of the points (x (1, w), y (h, 1)) lie inside: bool (h, w)."""


@dataclass(frozen=True)
class Patch:
    """A filled rectangle."""

    box: Box
    rgb: RGB

    def covers(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x >= self.box.left) & (x < self.box.right) & (y >= self.box.top) & (y < self.box.bottom)


@dataclass(frozen=True)
class Text:
    """A line of text, ``cell`` pixels to a cell of its glyphs, which are 5 x 7 cells."""

    text: str
    left: int
    top: int
    cell: int
    rgb: RGB

    @property
    def box(self) -> Box:
        side = self.cell * PIXEL
        return Box(self.left, self.top, self.left + side * text_width(self.text), self.top + side * ROWS)

    def covers(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        side, cells = self.cell * PIXEL, bitmap(self.text)
        column, row = (x - self.left) // side, (y - self.top) // side
        inside = (column >= 0) & (column < cells.shape[1]) & (row >= 0) & (row < ROWS)
        return inside & cells[np.clip(row, 0, ROWS - 1), np.clip(column, 0, cells.shape[1] - 1)]


@dataclass(frozen=True)
class Ground:
    """What lies behind the marks. slope: change of brightness over the picture, right and down. noise: its amplitude; 0 is exactly flat.

    key: of the noise.
    """

    rgb: RGB
    slope: tuple[int, int] = (0, 0)
    noise: int = 0
    key: tuple[int, ...] = ()

    def paint(self, x: np.ndarray, y: np.ndarray, width: int, height: int) -> np.ndarray:
        """int16 (h, w, 3) at the points x (1, w), y (h, 1) of a picture of width x height units."""
        shade = (self.slope[0] * (2 * x - width) // (2 * width)) + (self.slope[1] * (2 * y - height) // (2 * height))
        return (np.array(self.rgb, np.int16) + shade[..., None]).astype(np.int16)

    def grain(self, shape: tuple[int, ...]) -> np.ndarray:
        """Approximately Gaussian integer noise: the sum of four bytes, centred, times ``noise`` / 256."""
        n = int(np.prod(shape))
        halves = Stream(*self.key).block((n + 1) // 2).astype("<u8", copy=False).view("<u4")[:n]
        pairs = (halves & np.uint32(0x00FF00FF)) + ((halves >> np.uint32(8)) & np.uint32(0x00FF00FF))
        sums = ((pairs & np.uint32(0xFFFF)) + (pairs >> np.uint32(16))).astype(np.int32)
        return ((sums - 510) * self.noise // 256).astype(np.int16).reshape(shape)


@dataclass(frozen=True)
class Picture:
    """One image. height, width: its own size in pixels; marks are drawn in their order."""

    height: int
    width: int
    ground: Ground
    marks: tuple[Mark, ...]

    def draw(self, height: int | None = None, width: int | None = None) -> np.ndarray:
        """uint8 RGB (height, width, 3), by default at its own size: every pixel has the colour of the point at its centre."""
        height, width = height or self.height, width or self.width
        across = (2 * np.arange(width) + 1) * self.width // width
        down = (2 * np.arange(height) + 1) * self.height // height
        x, y = across[None, :], down[:, None]
        image = self.ground.paint(x, y, PIXEL * self.width, PIXEL * self.height)
        for mark in self.marks:
            box = mark.box
            left, right = np.searchsorted(across, (box.left, box.right + 1))
            top, bottom = np.searchsorted(down, (box.top, box.bottom + 1))
            if left < right and top < bottom:
                image[top:bottom, left:right][mark.covers(x[:, left:right], y[top:bottom])] = mark.rgb
        if self.ground.noise:
            image += self.ground.grain(image.shape)
        return np.clip(image, 0, 255).astype(np.uint8)

    def fraction(self, box: Box) -> tuple[float, float, float, float]:
        """A box as (top, left, bottom, right) in fractions of the picture, cut at its edges."""
        height, width = PIXEL * self.height, PIXEL * self.width
        top, left = max(box.top, 0) / height, max(box.left, 0) / width
        return top, left, min(box.bottom, height) / height, min(box.right, width) / width


def thing(shape: str, colour: str, x: int, y: int, radius: int, rgb: RGB) -> Thing:
    """A shape at a place, in units."""
    return Thing(shape, colour, False, x, y, radius, rgb)


def side(rng: Stream, low: int, high: int) -> int:
    """A side in pixels between two multiples of ``STEP``, all of which are equally likely."""
    return STEP * rng.between(-(-low // STEP), high // STEP)


def ink(rgb: RGB) -> RGB:
    """Black or white, whichever stands out from a colour."""
    return (250, 250, 250) if 3 * rgb[0] + 6 * rgb[1] + rgb[2] < 1280 else (12, 12, 12)
