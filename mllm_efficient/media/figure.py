"""Figures of several methods side by side, as PNG, PDF or SVG: the original first, each method with its counts, videos as film strips."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import MllmEfficientError
from ..report import by_layer
from .overlay import Pixels, Result, Subject, View, fit, render, views

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 200
ENDINGS = (".png", ".pdf", ".svg")
CONTENT, MARGIN, GAP, SEAM, NARROW = 2400, 40, 40, 10, 330  # pixels: widest row, page edge, between blocks, between panels, title
FRAMES = 8  # in a row of a film strip
FONT = "DejaVu Sans"  # comes with matplotlib: the same picture everywhere
INK, GREY = "#16181d", "#5f6570"


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
                panels.append(_panel(frame, found[-1] if found else View("", ()), shown, False, dim))
            else:
                panels += [_panel(frame, view, shown, result is None, dim) for view in found]
        across = per_line if video else len(panels) if height > width else 1
        text = (
            [(result.title, TITLE), (result.counts, NOTE), (by_layer(result.per_layer), NOTE)]
            if result
            else [("Original", TITLE), (subject.note, NOTE), (f"“{subject.question}”" * bool(subject.question), NOTE)]
        )
        rows = [panels[i : i + across] for i in range(0, len(panels), across)]
        blocks.append(_Block([t for t in text if t[0]], rows))
    return blocks


def _panel(frame: Pixels, view: View, result: Result, everything: bool, dim: str) -> Panel:
    planes, indices, merged = view.of(result)
    n = sum(len(p) for p in planes)
    if everything:
        return render(frame, planes, dim=dim), f"{view.name}, {n:,} tokens"
    areas = view.areas_of(result)
    made = n if merged is None else sum(len(p) for p in merged)
    k = len(indices) if indices is not None else made if areas is None else len({a for a in areas if a >= 0})
    return render(frame, planes, indices, merged, areas=areas, dim=dim), f"{view.name}, {k:,} of {n:,}" if view.name else ""


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
    """Writes the figure: a PNG pixel for pixel, a PDF or SVG with the same pixels and text as text.

    An existing file is replaced in one step, its folder is created. Raises ``MllmEfficientError`` as ``check_target`` does, or if the file
    cannot be written.
    """
    path = Path(path)
    check_target(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a file's name can have letters that the font lacks
            (_write_png if path.suffix.lower() == ".png" else _write_vector)(figure, partial, path.suffix.lower()[1:])
        os.replace(partial, path)
    except OSError as error:
        raise MllmEfficientError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)


def _write_png(figure: Figure, path: Path, kind: str) -> None:
    from PIL import Image

    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]  # type: ignore[attr-defined]
    Image.fromarray(pixels).save(path, format="PNG", dpi=(DPI, DPI))


def _write_vector(figure: Figure, path: Path, kind: str) -> None:
    """Panels become axes, because a vector file knows no pixels of a page; afterwards they are what they were."""
    from matplotlib import rc_context

    width, height = figure.get_size_inches() * DPI
    panels: list[Any] = [*figure.images]
    figure.images, axes = [], []
    for panel in panels:
        pixels = panel.get_array()
        down, across = pixels.shape[:2]
        own = figure.add_axes((panel.ox / width, panel.oy / height, across / width, down / height))
        own.imshow(pixels, interpolation="none", aspect="auto")
        own.axis("off")
        axes.append(own)
    try:
        with rc_context({"pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "mllm-efficient"}):
            figure.savefig(path, format=kind, dpi=DPI, metadata={"CreationDate": None} if kind == "pdf" else {"Date": None})
    finally:
        for own in axes:
            own.remove()
        figure.images = panels


def check_target(path: Path) -> None:
    """Raises ``MllmEfficientError`` where ``save`` would not be able to write: another ending, a folder, no permission."""
    if path.suffix.lower() not in ENDINGS:
        raise MllmEfficientError(f"{path} does not end in {', '.join(ENDINGS)}: figures are written as these")
    if path.is_dir():
        raise MllmEfficientError(f"{path} is a folder: give a file name that ends in .png, .pdf or .svg")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise MllmEfficientError(f"cannot write {path}: {folder} is not a folder that can be written to")
