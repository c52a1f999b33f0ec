"""Documents: a list of names with values, or a table, in small text."""

from __future__ import annotations

from ..scenes import Stream
from .canvas import PIXEL, RGB, STEP, Ground, Picture, Text, ink, side
from .forms import COLUMNS, NAMES, NUMBERS, Question, ask

CELL = 2  # pixels of a glyph's cell: text is 14 pixels high
GRID = 14  # pixels: words begin at multiples of it
COLUMN, LINE = GRID * PIXEL, STEP * PIXEL  # units; typeset text lies on a grid, which small models learn to read sooner
INDENT, ABOVE = 2 * PIXEL, 7 * PIXEL  # units before a word and above its line
LONGEST = 4  # columns that a name takes at most, with the gap after it
PITCH = 3  # columns from one cell of a table to the next
MOST_LINES, MOST_ROWS = 10, 8
PAPERS = ((250, 250, 250), (240, 232, 210), (214, 228, 240), (30, 34, 44), (46, 40, 34))


def document(rng: Stream) -> tuple[list[Picture], list[Question]]:
    """A list or a table, as often as each other."""
    return _table(rng) if rng.below(2) else _list(rng)


def _text(word: str, column: int, line: int, paper: RGB) -> Text:
    """A word at a place of the grid."""
    return Text(word, column * COLUMN + INDENT, line * LINE + ABOVE, CELL, ink(paper))


def _list(rng: Stream) -> tuple[list[Picture], list[Question]]:
    height, width = side(rng, 112, 336), side(rng, 112, 336)
    paper, lines = rng.choice(PAPERS), height // STEP
    count = rng.between(2, min(MOST_LINES, lines))
    names, values = rng.shuffled(NAMES)[:count], [rng.choice(NUMBERS) for _ in range(count)]
    column, top = rng.between(LONGEST, width // GRID - 2), rng.between(0, lines - count)
    rows = [(_text(n, 0, top + i, paper), _text(v, column, top + i, paper)) for i, (n, v) in enumerate(zip(names, values))]
    boxes = [(name.box, value.box) for name, value in rows]
    questions = [ask("field", values[i], (boxes[i],), name=names[i]) for i in rng.shuffled(range(count))]
    once = [i for i in rng.shuffled(range(count)) if values.count(values[i]) == 1]
    questions += [ask("owner", names[i], (boxes[i],), number=values[i]) for i in once]
    return [Picture(height, width, Ground(paper), tuple(mark for row in rows for mark in row))], questions


def _table(rng: Stream) -> tuple[list[Picture], list[Question]]:
    height, width = side(rng, 112, 336), side(rng, 112, 336)
    paper = rng.choice(PAPERS)
    columns = rng.between(2, min(len(COLUMNS), (width // GRID - 1) // PITCH))
    rows = rng.between(2, min(MOST_ROWS, height // STEP - 1))
    places = [2 + PITCH * c for c in range(columns)]
    heads = [_text(COLUMNS[c], places[c], 0, paper) for c in range(columns)]
    sides = [_text(str(r + 1), 0, r + 1, paper) for r in range(rows)]
    cells = {(r, c): _text(rng.choice(NUMBERS), places[c], r + 1, paper) for r in range(rows) for c in range(columns)}
    questions = []
    for r, c in rng.shuffled(cells):
        region = ((heads[c].box, sides[r].box, cells[r, c].box),)
        questions.append(ask("cell", cells[r, c].text, region, number=str(r + 1), column=COLUMNS[c]))
    return [Picture(height, width, Ground(paper), (*heads, *sides, *cells.values()))], questions
