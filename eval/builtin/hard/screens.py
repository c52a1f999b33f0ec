"""Screenshots of a session: large exactly flat areas, and images that differ in one element."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..scenes import COLOURS, Box, Stream
from .canvas import PIXEL, RGB, STEP, Ground, Mark, Patch, Picture, Text, ink, side
from .forms import ELEMENTS, NAMES, NUMBERS, Question, ask

CELL, NUMBER_CELL = 2, 3  # pixels of a glyph's cell
COLUMN = 14  # pixels: of the grid, whose lines are ``STEP`` pixels high
BAR = STEP  # pixels: the title's bar
NUMBER_COLUMNS = 3
BUTTON = (70, 22)  # pixels
BUTTONS = 3
GROUNDS = ((244, 244, 244), (226, 232, 240), (36, 40, 48), (250, 244, 228))
BARS = ((40, 60, 110), (30, 100, 80), (110, 40, 60), (70, 70, 70))


@dataclass(frozen=True)
class Screen:
    """What one screenshot shows; the places of its elements are those of the session."""

    title: str
    labels: tuple[str, ...]
    number: str
    full: bool


@dataclass(frozen=True)
class Layout:
    """What stays during a session. Places are (left, top) in pixels."""

    height: int
    width: int
    ground: RGB
    bar: RGB
    colours: tuple[str, ...]
    buttons: tuple[tuple[int, int], ...]
    number: tuple[int, int]
    box: tuple[int, int]

    def marks(self, screen: Screen) -> tuple[dict[str, tuple[Mark, ...]], tuple[Mark, ...]]:
        """The marks of every element (buttons by their colour), and those that never change."""
        bar = Patch(_box(0, 0, self.width, BAR), self.bar)
        elements: dict[str, tuple[Mark, ...]] = {
            "title": (_text(screen.title, 8, 7, CELL, ink(self.bar)),),
            "number": (_text(screen.number, *self.number, NUMBER_CELL, ink(self.ground)),),
            "box": self._check(screen.full),
        }
        for colour, (left, top), label in zip(self.colours, self.buttons, screen.labels):
            face = Patch(_box(left, top, *BUTTON), COLOURS[colour])
            elements[colour] = (face, _text(label, left + 12, top + 4, CELL, ink(COLOURS[colour])))
        return elements, (bar,)

    def _check(self, full: bool) -> tuple[Mark, ...]:
        """A frame of 20 pixels, with a filled square in it or not."""
        left, top = self.box
        frame = Patch(_box(left, top, 20, 20), ink(self.ground)), Patch(_box(left + 3, top + 3, 14, 14), self.ground)
        return (*frame, Patch(_box(left + 5, top + 5, 10, 10), ink(self.ground))) if full else frame

    def draw(self, screen: Screen) -> Picture:
        elements, constant = self.marks(screen)
        marks = (*constant, *(mark for element in elements.values() for mark in element))
        return Picture(self.height, self.width, Ground(self.ground), marks)

    def boxes(self, screen: Screen) -> dict[str, tuple[Box, ...]]:
        """Where each element of a screen lies."""
        return {name: tuple(mark.box for mark in marks) for name, marks in self.marks(screen)[0].items()}


def session(rng: Stream) -> tuple[list[Picture], list[Question]]:
    """Two or three screenshots; from each to the next, one element changes."""
    layout, screens, changed = _layout(rng), [_screen(rng)], []
    for _ in range(rng.between(1, 2)):
        changed.append((rng.choice(ELEMENTS), rng.below(BUTTONS)))
        screens.append(_changed(rng, screens[-1], *changed[-1]))
    return [layout.draw(screen) for screen in screens], _questions(rng, layout, screens, *changed[-1])


def _layout(rng: Stream) -> Layout:
    """Buttons in one half and the number and the box in the other, all at places of a grid below the bar."""
    height, width = side(rng, 168, 336), side(rng, 168, 336)
    half = width // COLUMN // 2  # columns
    free = range(1, height // STEP)
    tops, others = sorted(rng.shuffled(free)[:BUTTONS]), rng.shuffled(free)[:2]
    left, across = rng.between(0, half - BUTTON[0] // COLUMN), rng.between(0, half - NUMBER_COLUMNS)
    if rng.below(2):
        left += half
    else:
        across += half
    return Layout(
        height, width, rng.choice(GROUNDS), rng.choice(BARS), tuple(rng.shuffled(COLOURS)[:BUTTONS]),
        tuple((left * COLUMN, row * STEP + 3) for row in tops), *((across * COLUMN + 2, row * STEP + 4) for row in others),
    )  # fmt: skip


def _screen(rng: Stream) -> Screen:
    words = [rng.choice(NAMES) for _ in range(BUTTONS + 1)]
    return Screen(words[0], tuple(words[1:]), rng.choice(NUMBERS), bool(rng.below(2)))


def _changed(rng: Stream, screen: Screen, element: str, button: int) -> Screen:
    """A screen with another title, number, mark in the box, or label of one button."""
    if element == "title":
        return replace(screen, title=rng.choice([n for n in NAMES if n != screen.title]))
    if element == "number":
        return replace(screen, number=rng.choice([n for n in NUMBERS if n != screen.number]))
    if element == "box":
        return replace(screen, full=not screen.full)
    labels = list(screen.labels)
    labels[button] = rng.choice([n for n in NAMES if n != labels[button]])
    return replace(screen, labels=tuple(labels))


def _questions(rng: Stream, layout: Layout, screens: list[Screen], element: str, button: int) -> list[Question]:
    boxes, last = [layout.boxes(screen) for screen in screens], len(screens) - 1
    name = layout.colours[button] if element == "button" else element
    out = [ask("element", element, tuple(b[name] if i >= last - 1 else () for i, b in enumerate(boxes)))]
    for at, order in rng.shuffled(((0, "first"), (last, "last"))):

        def region(name: str, at: int = at) -> tuple[tuple[Box, ...], ...]:
            return tuple(b[name] if i == at else () for i, b in enumerate(boxes))

        screen, which = screens[at], rng.below(BUTTONS)
        colour = layout.colours[which]
        out += [
            ask("title", screen.title, region("title"), order=order),
            ask("label", screen.labels[which], region(colour), colour=colour, order=order),
            ask("number", screen.number, region("number"), order=order),
            ask("box", "yes" if screen.full else "no", region("box"), order=order),
        ]
    return out


def _text(text: str, left: int, top: int, cell: int, rgb: RGB) -> Text:
    return Text(text, PIXEL * left, PIXEL * top, cell, rgb)


def _box(left: int, top: int, width: int, height: int) -> Box:
    """A box from its place and size in pixels."""
    return Box(PIXEL * left, PIXEL * top, PIXEL * (left + width), PIXEL * (top + height))
