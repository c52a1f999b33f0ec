"""Labels at the points of a plot, where they cover neither points nor whiskers nor each other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GAP = 2.5  # points between a marker and its label
STEP = 3  # pixels between two boxes on a line
Box = tuple[float, float, float, float]  # left, bottom, right, top in pixels


@dataclass(frozen=True)
class Mark:
    """A point with its label, which may be empty, and the lengths of its whiskers, in units of the axes."""

    text: str
    x: float
    y: float
    colour: str
    low: float
    high: float
    left: float
    right: float


def label_points(
    figure: Figure, axes: Axes, marks: Sequence[Mark], lines: Sequence[Sequence[tuple[float, float]]], letters: float, marker: float
) -> None:  # fmt: skip
    """Writes each label beside its point, in the place nearest to it that is free; over ``lines`` through points where no other is.

    One without a free place is left out. letters, marker: sizes in points.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()  # places what the layout places
    unit = figure.dpi / 72
    inside = axes.get_window_extent(renderer)
    taken = [box for mark in marks for box in _covered(axes, mark, unit * marker / 2)]
    crossed = [box for line in lines for box in _along(axes, line)]
    for mark in filter(lambda mark: mark.text, marks):
        text = axes.annotate(
            mark.text, (mark.x, mark.y), (0, 0), textcoords="offset points", size=letters, color=mark.colour, parse_math=False, zorder=6,
            annotation_clip=False,
        )  # fmt: skip
        extent = text.get_window_extent(renderer)
        x, y = axes.transData.transform((mark.x, mark.y))
        around = [*_around(extent.width / unit, extent.height / unit, marker / 2 + GAP)]
        for (dx, dy), free_of in [*((at, taken + crossed) for at in around), *((at, taken) for at in around)]:
            box = (x + unit * dx, y + unit * dy, x + unit * dx + extent.width, y + unit * dy + extent.height)
            within = inside.x0 <= box[0] and box[2] <= inside.x1 and inside.y0 <= box[1] and box[3] <= inside.y1
            if within and not any(_overlap(box, other) for other in free_of):
                text.set_position((dx, dy))
                taken.append(box)
                break
        else:
            text.remove()


def _around(width: float, height: float, gap: float) -> Iterator[tuple[float, float]]:
    """Offsets of a label's lower left corner from its point: the four corners, then the sides, then all of these farther away."""
    for far in (gap, 2.2 * gap, 3.6 * gap):
        right, left, up, down = far, -far - width, far * 0.7, -far * 0.7 - height
        yield from ((right, up), (right, down), (left, up), (left, down))
        yield from ((right, -height / 2), (left, -height / 2), (-width / 2, far), (-width / 2, -far - height))


def _covered(axes: Axes, mark: Mark, radius: float) -> list[Box]:
    """What a point and its whiskers cover, in pixels."""
    x, y = axes.transData.transform((mark.x, mark.y))
    left, low = axes.transData.transform((mark.x - mark.left, mark.y - mark.low))
    right, high = axes.transData.transform((mark.x + mark.right, mark.y + mark.high))
    return [(x - radius, y - radius, x + radius, y + radius), (x - 1, low, x + 1, high), (left, y - 1, right, y + 1)]


def _along(axes: Axes, line: Sequence[tuple[float, float]]) -> Iterator[Box]:
    """Small boxes on the segments of a line, in pixels."""
    points = [axes.transData.transform(point) for point in line]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        steps = max(1, int(max(abs(x1 - x0), abs(y1 - y0)) / STEP))
        for i in range(steps + 1):
            x, y = x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps
            yield x - 1, y - 1, x + 1, y + 1


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
