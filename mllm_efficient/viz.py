"""Pictures of what a method kept: tokens on the picture's own patch grid, and figures of several methods side by side.

Works on pictures, planes and indices alone; no model is needed. A *view* is a set of planes that do not overlap, so that
one panel can show them: a base view and a map of tiles are two views, the tiles of one picture are one.
"""

from __future__ import annotations

import itertools
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import MllmEfficientError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image as Picture

    from .tokens import Plane

DPI = 200
CONTENT, MARGIN, GAP, SEAM, NARROW = 2400, 40, 40, 10, 330  # pixels: widest row, page edge, between blocks, between panels, title
FRAMES = 8  # in a row of a film strip
FONT = "DejaVu Sans"  # comes with matplotlib: the same picture everywhere
INK, GREY = "#16181d", "#5f6570"
WHITE, DARK = np.float32(255), np.float32(24)
DIMS = ("light", "dark")
CROWDED = 6  # pixels: cells narrower than this have lines around kept tokens only
Pixels = NDArray[np.uint8]
Edges = NDArray[np.int64]


@dataclass(frozen=True)
class View:
    """Planes of one panel. name: empty where a picture has one view. starts: each plane's first token among the N."""

    name: str
    members: tuple[int, ...]
    starts: tuple[int, ...]

    def of(self, result: Result) -> tuple[list[Plane], list[int] | None, list[Plane] | None]:
        """The result's planes, indices and kept planes in this view; indices count over its planes alone."""
        planes = [result.planes[m] for m in self.members]
        kept = None if result.kept_planes is None else [result.kept_planes[m] for m in self.members]
        if result.indices is None:
            return planes, None, kept
        indices, before = [], 0
        for plane, start in zip(planes, self.starts):
            n = len(plane)
            indices += [i - start + before for i in result.indices if start <= i < start + n]
            before += n
        return planes, indices, kept


@dataclass(frozen=True)
class Result:
    """What one method kept of one picture or video; the fields of an ``ImageReport``.

    planes: of the full picture, boxes in fractions of it. indices: kept ones of the N tokens, None where tokens were
    merged; then kept_planes: the merged planes, one for each of ``planes``.
    """

    title: str
    full: int
    kept: int
    planes: Sequence[Plane]
    indices: Sequence[int] | None = None
    kept_planes: Sequence[Plane] | None = None

    @property
    def counts(self) -> str:
        """``56 of 576 tokens (9.7%)``."""
        return f"{self.kept:,} of {self.full:,} tokens ({100 * self.kept / self.full:.1f}%)"


@dataclass(frozen=True)
class Subject:
    """A picture (one frame) or a video with the results of every method. note: below "Original". labels: of the frames."""

    frames: Sequence[Picture]
    results: Sequence[Result]
    note: str = ""
    labels: Sequence[str] = ()


def views(planes: Sequence[Plane], members: Sequence[int] | None = None) -> list[View]:
    """The planes of a picture (of a video: those ``members`` that show one frame) in as few panels as can show them all."""
    starts = [0, *itertools.accumulate(len(p) for p in planes)]
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
    return [View(name, tuple(group), tuple(starts[i] for i in group)) for name, group in zip(names, groups)]


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
    dim: str = "light",
    lines: bool = True,
) -> Pixels:
    """One panel of the picture's own size, (height, width, 3) RGB.

    Kept tokens show the picture's exact colours; dropped ones lose most of their saturation and go towards white
    (``dim="light"``) or black (``"dark"``). What lies outside all planes was never seen by the model and is hatched.
    Cells of ``kept_planes`` show the mean colour of their area. Edges of cells lie on whole pixels; a line one pixel
    wide takes the first row or column of the cell below or to the right of an edge, but none of a kept cell's pixels
    beside a dropped one.

    Args:
        picture: RGB; ``fit`` gives it the size wanted.
        planes: planes that do not overlap, boxes (top, left, bottom, right) in fractions of the picture.
        indices: kept tokens, counted over these planes one after the other; None keeps all (or see kept_planes).
        kept_planes: merged planes to draw instead, where tokens were merged.
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
    lit, grid = np.zeros((height, width), bool), np.zeros((height, width), np.float32)
    chosen = np.ones(sum(len(p) for p in planes), bool)
    if indices is not None:
        chosen[:] = False
        chosen[np.asarray(indices, dtype=np.int64)] = True
    start = 0
    for plane in planes if kept_planes is None else kept_planes:
        y, x = _edges(plane, height, width)
        inside = np.s_[y[0] : y[-1], x[0] : x[-1]]
        if kept_planes is None:
            cells = chosen[start : start + len(plane)].reshape(plane.rows, plane.columns)
            out[inside] = np.where(_spread(cells, y, x)[..., None], pixels[inside], faded[inside])
        else:
            cells = np.ones((plane.rows, plane.columns), bool)
            out[inside] = _spread(_means(pixels, plane), y, x)
        lit[inside] = _spread(cells, y, x)
        _rule(grid, plane, y, x)
        start += len(plane)
    if lines:
        _draw_lines(out, lit, grid, paper, ink)
    return out.round().clip(0, 255).astype(np.uint8)


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


def figure(subjects: Sequence[Subject], *, long_edge: int | None = None, dim: str = "light", caption: str = "") -> Figure:
    """All results on one page: the original first, every method beside it, videos as one film strip for each method.

    Args:
        subjects: pictures and videos from top to bottom.
        long_edge: pixels of the longer side of each panel; None chooses what its aspect and its cells need.
        dim: "light" or "dark", how dropped tokens look. caption: small print at the bottom.

    Returns: a matplotlib figure at 200 dpi on which every pixel of a panel is one pixel. No state of pyplot is touched.
    """
    page, top = _Page(), MARGIN
    for i, subject in enumerate(subjects):
        blocks = _blocks(subject, long_edge, dim)
        for block in blocks:
            block.width = max(sum(page.slot(p) + SEAM for p in row) - SEAM for row in block.rows)
            block.text = [(line, style) for text, style in block.text for line in page.wrapped(text, style, max(block.width, NARROW))]
            block.width = max(block.width, *(page.width_of(*line) for line in block.text))
        column = max(b.width for b in blocks)
        fitting = 1 if len(subject.frames) > 1 else max(1, (CONTENT + GAP) // (column + GAP))
        per_row = math.ceil(len(blocks) / math.ceil(len(blocks) / fitting))
        top += 2 * GAP if i else 0
        for first in range(0, len(blocks), per_row):
            row = blocks[first : first + per_row]
            top += GAP if first else 0
            head = max(b.head for b in row)
            for j, block in enumerate(row):
                page.put(block, MARGIN + j * (column + GAP), top, head)
            top += head + max(b.body for b in row)
    top += GAP if caption else 0
    for line in page.wrapped(caption, LABEL, page.right - MARGIN) if caption else ():
        page.write(line, LABEL, MARGIN, top)
        top += LABEL.line
    return page.finish(top + MARGIN)


@dataclass(frozen=True)
class _Style:
    """Text of ``size`` points."""

    size: float
    colour: str
    weight: str = "normal"

    @property
    def line(self) -> int:
        """Pixels from one line to the next."""
        return round(self.size * DPI / 72 * 1.3)


TITLE, NOTE, LABEL = _Style(11.5, INK, "bold"), _Style(10.5, GREY), _Style(9, GREY)
Panel = tuple[Pixels, str]  # with the label above it


@dataclass
class _Block:
    """Text above rows of panels."""

    text: list[tuple[str, _Style]]
    rows: list[list[Panel]]
    width: int = 0

    @property
    def head(self) -> int:
        return sum(style.line for _, style in self.text)

    @property
    def body(self) -> int:
        return sum(_label_height(row) + SEAM + max(len(p) for p, _ in row) for row in self.rows)


def _label_height(row: list[Panel]) -> int:
    return LABEL.line if any(label for _, label in row) else 0


def _blocks(subject: Subject, long_edge: int | None, dim: str) -> list[_Block]:
    """The original and each method. Views of a picture stand one below the other, or beside each other where it is upright."""
    (width, height), video = subject.frames[0].size, len(subject.frames) > 1
    per_line = math.ceil(len(subject.frames) / math.ceil(len(subject.frames) / FRAMES))
    in_line = (CONTENT + SEAM) // per_line - SEAM  # pixels across that a frame can have
    edge = min(long_edge or 560, in_line * max(width, height) // width) if video else long_edge or _long_edge(subject)
    frames = [np.asarray(fit(frame, edge)) for frame in subject.frames]
    blocks = []
    for result in (None, *subject.results):
        panels: list[Panel] = []
        for f, frame in enumerate(frames):
            shown = result or subject.results[0]
            found = views(shown.planes, [i for i, p in enumerate(shown.planes) if not video or p.frame == f])
            if result is None and (video or len(found) < 2):
                panels.append((frame, subject.labels[f] if subject.labels else ""))
            elif video:  # one panel for each frame, hatched where the model did not see it
                panels.append(_panel(frame, found[-1] if found else View("", (), ()), shown, False, dim))
            else:
                panels += [_panel(frame, view, shown, result is None, dim) for view in found]
        across = per_line if video else len(panels) if height > width else 1
        text = [(result.title, TITLE), (result.counts, NOTE)] if result else [("Original", TITLE), (subject.note, NOTE)]
        rows = [panels[i : i + across] for i in range(0, len(panels), across)]
        blocks.append(_Block([t for t in text if t[0]], rows))
    return blocks


def _panel(frame: Pixels, view: View, result: Result, everything: bool, dim: str) -> Panel:
    planes, indices, merged = view.of(result)
    n = sum(len(p) for p in planes)
    if everything:
        return render(frame, planes, dim=dim), f"{view.name}, {n:,} tokens"
    k = sum(len(p) for p in merged) if merged is not None else n if indices is None else len(indices)
    return render(frame, planes, indices, merged, dim=dim), f"{view.name}, {k:,} of {n:,}" if view.name else ""


def _long_edge(subject: Subject) -> int:
    """Pixels that give every cell 13 and the shorter side 320, between 560 and 1600."""
    width, height = subject.frames[0].size
    planes = [p for p in subject.results[0].planes if len(p)]
    across = max(p.columns / (p.box[3] - p.box[1]) / width for p in planes)
    down = max(p.rows / (p.box[2] - p.box[0]) / height for p in planes)
    return round(min(1600, max(560, max(width, height) * max(320 / min(width, height), 13 * across, 13 * down))))


class _Page:
    """Pictures and text placed in pixels from the top left; the size is known when all is placed."""

    def __init__(self):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.figure = Figure(dpi=DPI, facecolor="white")
        self.renderer = FigureCanvasAgg(self.figure).get_renderer()
        self.images: list[tuple[Pixels, int, int]] = []
        self.texts: list[tuple[str, _Style, int, int]] = []
        self.right = 0

    def width_of(self, text: str, style: _Style) -> int:
        from matplotlib.font_manager import FontProperties

        font = FontProperties(family=FONT, size=style.size, weight=style.weight)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return math.ceil(self.renderer.get_text_width_height_descent(text, font, False)[0])

    def slot(self, panel: Panel) -> int:
        """Pixels across that a panel and its label need."""
        return max(panel[0].shape[1], self.width_of(panel[1], LABEL) + SEAM if panel[1] else 0)

    def wrapped(self, text: str, style: _Style, width: int) -> list[str]:
        lines = [""]
        for word in text.split(" "):
            longer = f"{lines[-1]} {word}".strip()
            lines[-1:] = [longer] if not lines[-1] or self.width_of(longer, style) <= width else [lines[-1], word]
        return lines

    def write(self, text: str, style: _Style, left: int, top: int) -> None:
        self.texts.append((text, style, left, top))

    def put(self, block: _Block, left: int, top: int, head: int) -> None:
        """Places a block whose panels begin ``head`` pixels below its first line of text."""
        y = top
        for text, style in block.text:
            self.write(text, style, left, y)
            y += style.line
        y = top + head
        for row in block.rows:
            x, y = left, y + _label_height(row) + SEAM
            for pixels, text in row:
                self.write(text, LABEL, x, y - LABEL.line - 2)
                self.images.append((pixels, x, y))
                x += self.slot((pixels, text)) + SEAM
            y += max(len(p) for p, _ in row)
        self.right = max(self.right, left + block.width)

    def finish(self, height: int) -> Figure:
        width = self.right + MARGIN
        self.figure.set_size_inches((width + 0.01) / DPI, (height + 0.01) / DPI)
        for pixels, x, y in self.images:
            self.figure.figimage(pixels, x, height - y - pixels.shape[0], origin="upper")
        for text, style, x, y in self.texts:
            self.figure.text(
                x / width, 1 - (y + 0.8 * style.line) / height, text, size=style.size, weight=style.weight, color=style.colour,
                family=FONT, va="baseline", parse_math=False, usetex=False,
            )  # fmt: skip
        return self.figure


def save(figure: Figure, path: str | Path) -> None:
    """Writes the figure as a PNG, pixel for pixel; an existing file is replaced in one step, its folder is created.

    Raises ``MllmEfficientError`` as ``check_target`` does, or if the file cannot be written.
    """
    from PIL import Image

    path = Path(path)
    check_target(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a file's name can have letters that the font lacks
        figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]  # type: ignore[attr-defined]
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            Image.fromarray(pixels).save(partial, format="PNG", dpi=(DPI, DPI))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise MllmEfficientError(f"cannot write {path}: {error.strerror or error}") from None


def check_target(path: Path) -> None:
    """Raises ``MllmEfficientError`` where ``save`` would not be able to write: another ending, a folder, no permission."""
    if path.suffix.lower() != ".png":
        raise MllmEfficientError(f"{path} does not end in .png: figures are written as PNG")
    if path.is_dir():
        raise MllmEfficientError(f"{path} is a folder: give a file name that ends in .png")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise MllmEfficientError(f"cannot write {path}: {folder} is not a folder that can be written to")
