"""Bar charts: bars of different colours over an axis of small integers."""

from __future__ import annotations

from ..scenes import COLOURS, Box, Stream
from .canvas import PIXEL, Ground, Patch, Picture, Text, ink, side
from .forms import MAX_BARS, TOP, Question, ask

AXIS = 14 * PIXEL  # units at the left, for the numbers of the axis
PAD = 6 * PIXEL
NARROWEST = 14  # pixels of a bar with the gap beside it
PAPERS = ((250, 250, 250), (236, 236, 240), (30, 34, 44))


def chart(rng: Stream) -> tuple[list[Picture], list[Question]]:
    """A bar chart; lines behind the bars in half of the charts, numbers on the axis in all."""
    count = rng.between(2, MAX_BARS)
    height, width = side(rng, 112, 336), side(rng, 24 + NARROWEST * count, 336) if count > 6 else side(rng, 112, 336)
    paper, lined = rng.choice(PAPERS), bool(rng.below(2))
    unit = (height - 20) // TOP * PIXEL
    foot = PIXEL * (height - 8)
    grey = tuple((3 * p + i) // 4 for p, i in zip(paper, ink(paper)))
    marks: list[Patch | Text] = []
    for value in range(TOP + 1):
        y = foot - value * unit
        if lined or not value:
            marks.append(Patch(Box(AXIS, y, PIXEL * width - PAD, y + PIXEL), grey))
        if value:
            marks.append(Text(str(value), PAD - 2 * PIXEL, y - 3 * PIXEL, 1, ink(paper)))
    slot = (PIXEL * width - AXIS - PAD) // count
    colours, values = rng.shuffled(COLOURS)[:count], [rng.between(1, TOP) for _ in range(count)]
    bars = []
    for i, (colour, value) in enumerate(zip(colours, values)):
        left = AXIS + i * slot + slot // 6
        bars.append(Patch(Box(left, foot - value * unit, left + 2 * slot // 3, foot), COLOURS[colour]))
    numbers = [mark.box for mark in marks if isinstance(mark, Text)]
    axis = Box(0, numbers[-1].top, AXIS, numbers[0].bottom)
    return [Picture(height, width, Ground(paper), (*marks, *bars))], _questions(rng, colours, values, [bar.box for bar in bars], axis)


def _questions(rng: Stream, colours: list[str], values: list[int], boxes: list[Box], axis: Box) -> list[Question]:
    everything, order = (tuple(boxes),), rng.shuffled(range(len(values)))
    out = [ask("value", values[i], ((boxes[i], axis),), colour=colours[i]) for i in order]
    for form, best in (("highest", max(values)), ("lowest", min(values))):
        if values.count(best) == 1:
            out.append(ask(form, colours[values.index(best)], everything))
    for i in rng.shuffled(range(len(values))):
        j = order[(order.index(i) + 1) % len(order)]
        if values[i] != values[j]:
            answer = "yes" if values[i] > values[j] else "no"
            out.append(ask("higher", answer, ((boxes[i], boxes[j]),), colour=colours[i], other=colours[j]))
    out.append(ask("bars", len(values), everything))
    return out
