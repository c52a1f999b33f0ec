"""Pictures of what a method kept: its tokens on the picture's own patch grid.

Works on pictures, planes and indices alone; no model is needed. A *view* is a set of planes that do not overlap, so that
one panel can show them: a base view and a map of tiles are two views, the tiles of one picture are one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import MllmEfficientError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

    from ..tokens import Plane

WHITE, DARK = np.float32(255), np.float32(24)
DIMS = ("light", "dark")
GOLDEN = 0.618033988749895
OUTLINED = 200 * 200  # pixels of a panel above which outlines are two wide
CROWDED = 6  # pixels: cells narrower than this have lines around kept tokens only
Pixels = NDArray[np.uint8]
Edges = NDArray[np.int64]


@dataclass(frozen=True)
class View:
    """Planes of one panel. name: empty where a picture has one view."""

    name: str
    members: tuple[int, ...]

    def areas_of(self, result: Result) -> list[int] | None:
        """The result's areas in this view."""
        if result.areas is None:
            return None
        starts = [0, *itertools.accumulate(len(p) for p in result.planes)]
        return [result.areas[i] for m in self.members for i in range(starts[m], starts[m + 1])]

    def of(self, result: Result) -> tuple[list[Plane], list[int] | None, list[Plane] | None]:
        """The result's planes, indices and kept planes in this view; indices count over its planes alone."""
        planes = [result.planes[m] for m in self.members]
        kept = None if result.kept_planes is None else [result.kept_planes[m] for m in self.members]
        if result.indices is None:
            return planes, None, kept
        drawn = result.planes if result.kept_planes is None else result.kept_planes
        starts, indices, before = [0, *itertools.accumulate(len(p) for p in drawn)], [], 0
        for m in self.members:
            indices += [i - starts[m] + before for i in result.indices if starts[m] <= i < starts[m + 1]]
            before += len(drawn[m])
        return planes, indices, kept


@dataclass(frozen=True)
class Result:
    """What one method kept of one picture or video; the fields of an ``ImageReport``.

    planes: of the full picture, boxes in fractions of it. kept_planes: where tokens were merged the merged planes, one for
    each of ``planes``. indices: what is left of the N tokens, or of the merged ones; None where all are. per_layer: tokens
    at each decoder layer, of a method inside it; what is drawn are those at the end. separators: (before, after), columns of the
    prompt beside the tokens. areas: of each of the N tokens the merged token that it is part of, -1 for none, where these are drawn.
    """

    title: str
    full: int
    kept: int
    planes: Sequence[Plane]
    indices: Sequence[int] | None = None
    kept_planes: Sequence[Plane] | None = None
    per_layer: Sequence[int] = ()
    separators: tuple[int, int] = (0, 0)
    areas: Sequence[int] | None = None

    @property
    def counts(self) -> str:
        """``56 of 576 tokens (9.7%)``."""
        return f"{self.kept:,} of {self.full:,} tokens ({100 * self.kept / self.full:.1f}%)"


@dataclass(frozen=True)
class Subject:
    """A picture (one frame) or a video with the results of every method. note, question: below "Original". labels: of the frames."""

    frames: Sequence[Picture]
    results: Sequence[Result]
    note: str = ""
    labels: Sequence[str] = ()
    question: str = ""


def views(planes: Sequence[Plane], members: Sequence[int] | None = None) -> list[View]:
    """The planes of a picture (of a video: those ``members`` that show one frame) in as few panels as can show them all."""
    groups: list[list[int]] = []
    for i in range(len(planes)) if members is None else members:
        plane = planes[i]
        if len(plane) == 0:
            continue
        if groups and not any(_overlap(plane, planes[j]) for j in groups[-1]):
            groups[-1].append(i)
        else:
            groups.append([i])
    tiles = next((n for n, group in enumerate(groups) if len(group) > 1), len(groups) - 1 if len(groups) > 1 else None)
    names = ["" if tiles is None else "tiles" if n == tiles else "base view" if n < tiles else "thumbnail" for n in range(len(groups))]
    return [View(name, tuple(group)) for name, group in zip(names, groups)]


def _overlap(a: Plane, b: Plane) -> bool:
    """Whether two planes share more than an edge, up to a fraction of a cell."""
    down = min(a.box[2], b.box[2]) - max(a.box[0], b.box[0])
    across = min(a.box[3], b.box[3]) - max(a.box[1], b.box[1])
    cell = min((p.box[2] - p.box[0]) / p.rows for p in (a, b)), min((p.box[3] - p.box[1]) / p.columns for p in (a, b))
    return down > cell[0] / 4 and across > cell[1] / 4


def fit(picture: Picture, long_edge: int) -> Picture:
    """The picture with its longer side at ``long_edge`` pixels, aspect kept."""
    from PIL import Image

    scale = long_edge / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def render(
    picture: Picture | Pixels,
    planes: Sequence[Plane],
    indices: Sequence[int] | None = None,
    kept_planes: Sequence[Plane] | None = None,
    *,
    areas: Sequence[int] | None = None,
    dim: str = "light",
    lines: bool = True,
) -> Pixels:
    """One panel of the picture's own size, (height, width, 3) RGB.

    Kept tokens show the picture's exact colours; dropped ones lose most of their saturation and go towards white
    (``dim="light"``) or black (``"dark"``). What lies outside all planes was never seen by the model and is hatched.
    Cells of ``kept_planes`` show the mean colour of their area, dropped ones are faded. Edges of cells lie on whole pixels; a line
    one pixel wide takes the first row or column of the cell below or to the right of an edge, but none of a kept cell's pixels
    beside a dropped one.

    Args:
        picture: RGB; ``fit`` gives it the size wanted.
        planes: planes that do not overlap, boxes (top, left, bottom, right) in fractions of the picture.
        indices: kept tokens, counted over the planes that are drawn one after the other; None keeps all.
        kept_planes: merged planes to draw instead, where tokens were merged.
        areas: what each token of ``planes`` is part of, -1 for nothing: every area then has its mean colour and an outline in a colour
            of its own, so that parts of one area that lie apart are seen to be one; kept tokens are framed.
        dim: "light" or "dark". lines: whether the grid is drawn.
    """
    if dim not in DIMS:
        raise MllmEfficientError(f"dim={dim!r} is not one of {', '.join(DIMS)}")
    pixels = np.asarray(picture).astype(np.float32)
    height, width = pixels.shape[:2]
    paper, ink = (WHITE, DARK) if dim == "light" else (DARK, WHITE)
    out = _faded(pixels, paper, 0.2, 0.8)
    _hatch(out)
    faded = _faded(pixels, paper, 0.5, 0.66)
    if areas is not None:
        return _of_areas(out, pixels, faded, planes, areas, indices, ink)
    lit, grid = np.zeros((height, width), bool), np.zeros((height, width), np.float32)
    drawn = planes if kept_planes is None else kept_planes
    chosen = np.ones(sum(len(p) for p in drawn), bool)
    if indices is not None:
        chosen[:] = False
        chosen[np.asarray(indices, dtype=np.int64)] = True
    start = 0
    for plane in drawn:
        y, x = _edges(plane, height, width)
        inside = np.s_[y[0] : y[-1], x[0] : x[-1]]
        cells = chosen[start : start + len(plane)].reshape(plane.rows, plane.columns)
        colours = pixels[inside] if kept_planes is None else _spread(_means(pixels, plane), y, x)
        out[inside] = np.where(_spread(cells, y, x)[..., None], colours, faded[inside])
        lit[inside] = _spread(cells, y, x)
        _rule(grid, plane, y, x)
        start += len(plane)
    if lines:
        _draw_lines(out, lit, grid, paper, ink)
    return out.round().clip(0, 255).astype(np.uint8)


def _of_areas(
    out: NDArray[np.float32], pixels: NDArray[np.float32], faded: NDArray[np.float32], planes: Sequence[Plane], areas: Sequence[int],
    indices: Sequence[int] | None, ink: np.float32,
) -> Pixels:  # fmt: skip
    """Every area in its mean colour with an outline of its own colour; the cells of kept tokens framed."""
    height, width = pixels.shape[:2]
    numbers, start = np.unique(np.asarray(areas), return_inverse=True)[1].reshape(-1), 0
    label = np.full((height, width), -1)
    cell, kept = np.full((height, width), -1), set(indices or ())
    for plane in planes:
        y, x = _edges(plane, height, width)
        own = np.arange(start, start + len(plane)).reshape(plane.rows, plane.columns)
        inside = np.s_[y[0] : y[-1], x[0] : x[-1]]
        label[inside] = _spread(np.where(np.asarray(areas)[own] < 0, -1, numbers[own]), y, x)
        cell[inside] = _spread(own, y, x)
        start += len(plane)
    seen, part = cell >= 0, label >= 0
    out[seen & ~part] = faded[seen & ~part]
    sizes = np.bincount(label[part], minlength=int(numbers.max()) + 1).clip(1)
    means = np.stack([np.bincount(label[part], pixels[..., c][part], minlength=len(sizes)) / sizes for c in range(3)], 1)
    out[part] = means[label[part]]
    outline = part & _rim(label, 2 if height * width > OUTLINED else 1)
    out[outline] = _hues(len(sizes))[label[outline]]
    framed = np.isin(cell, list(kept)) & _rim(cell, 2)
    out[framed] += 0.75 * (ink - out[framed])
    return out.round().clip(0, 255).astype(np.uint8)


def _rim(label: NDArray[Any], thick: int) -> NDArray[np.bool_]:
    """The pixels of regions of equal labels that are at most ``thick`` away from another one."""
    rim = np.zeros(label.shape, bool)
    for axis, by in itertools.product((0, 1), range(1, thick + 1)):
        for shift in (by, -by):
            moved = np.roll(label, shift, axis)
            edge = [slice(None)] * 2
            edge[axis] = slice(0, shift) if shift > 0 else slice(shift, None)
            moved[tuple(edge)] = label[tuple(edge)]  # the picture's border is no rim
            rim |= moved != label
    return rim


def _hues(count: int) -> NDArray[np.float32]:
    """(count, 3) colours that differ: hues a golden section apart, three strengths."""
    from colorsys import hsv_to_rgb

    colours = [hsv_to_rgb(i * GOLDEN % 1, (0.95, 0.6, 0.8)[i % 3], (0.95, 0.98, 0.7)[i % 3]) for i in range(count)]
    return 255 * np.asarray(colours, np.float32)


def _edges(plane: Plane, height: int, width: int) -> tuple[Edges, Edges]:
    """Pixel edges of the plane's rows (rows + 1,) and columns, cut at the picture's border."""
    top, left, bottom, right = plane.box
    y = np.linspace(top, bottom, plane.rows + 1) * height
    x = np.linspace(left, right, plane.columns + 1) * width
    return np.floor(y + 0.5).astype(np.int64).clip(0, height), np.floor(x + 0.5).astype(np.int64).clip(0, width)


def _spread(cells: Any, y: Edges, x: Edges) -> Any:
    """Values of cells (rows, columns, ...) at every pixel between the edges."""
    return np.repeat(np.repeat(cells, np.diff(y), axis=0), np.diff(x), axis=1)


def _means(pixels: NDArray[np.float32], plane: Plane) -> NDArray[np.float32]:
    """(rows, columns, 3): the mean colour under each cell, pixels cut by an edge counted by their part."""

    def weights(low: float, high: float, cells: int, size: int) -> NDArray[np.float32]:
        edges = np.linspace(low, high, cells + 1) * size
        at = np.arange(size)
        part = np.minimum(edges[1:, None], at + 1) - np.maximum(edges[:-1, None], at)
        part = part.clip(0, 1)
        return (part / np.maximum(part.sum(1, keepdims=True), 1e-9)).astype(np.float32)

    down = weights(plane.box[0], plane.box[2], plane.rows, pixels.shape[0])
    across = weights(plane.box[1], plane.box[3], plane.columns, pixels.shape[1])
    means: NDArray[np.float32] = np.einsum("rh,hwc,kw->rkc", down, pixels, across, optimize=True)
    return means


def _faded(pixels: NDArray[np.float32], target: np.float32, saturation: float, amount: float) -> NDArray[np.float32]:
    grey = (pixels @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]
    return np.asarray((grey + saturation * (pixels - grey)) * (1 - amount) + target * amount, np.float32)


def _hatch(pixels: NDArray[np.float32]) -> None:
    """Thin diagonal stripes, in place."""
    stripes = np.add.outer(*(np.arange(size) for size in pixels.shape[:2])) % 12 == 0
    pixels[stripes] += 0.35 * (128 - pixels[stripes])


def _rule(grid: NDArray[np.float32], plane: Plane, y: Edges, x: Edges) -> None:
    """Enters the strengths of the plane's lines into ``grid`` (height, width); around tiles they are stronger and wider."""
    for edges, tiles, lines in ((y, plane.row_tiles, grid[:, x[0] : x[-1]]), (x, plane.column_tiles, grid[y[0] : y[-1]].T)):
        crowded = edges[-1] - edges[0] < CROWDED * (len(edges) - 1)
        for i, edge in enumerate(edges):
            outer = i in (0, len(edges) - 1) or bool(tiles and tiles[i] != tiles[i - 1])
            if 0 < edge < len(lines) and (outer or not crowded):
                line = lines[edge - outer : edge + 1]
                np.maximum(line, 1.0 if outer else 0.5, out=line)


def _draw_lines(out: NDArray[np.float32], lit: NDArray[np.bool_], grid: NDArray[np.float32], paper: np.float32, ink: np.float32) -> None:
    """Grid lines in the paper's colour; where a kept cell meets a dropped one, ink on the dropped one's side."""
    around = np.pad(lit, 1, mode="edge")
    sides = (around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:])
    grid = np.where(lit & ~np.logical_and.reduce(sides), 0, grid)  # a kept cell's border pixels stay as they are
    out += grid[..., None] * (paper - out)
    rim = ~lit & np.logical_or.reduce(sides)
    out[rim] += 0.6 * (ink - out[rim])
