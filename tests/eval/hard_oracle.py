"""Answers questions of the harder benchmark from what is drawn, by other means than the generator's."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from mllm_efficient.eval.builtin.hard import FORMS, Question
from mllm_efficient.eval.builtin.hard.canvas import Patch, Picture, Text
from mllm_efficient.eval.builtin.scenes import COLOURS, Box, Thing

Slots = dict[str, str]
ORDER = ("first", "second", "third")


def slots_of(question: Question) -> Slots:
    """What fills the slots of a question's form, read back from its text."""
    pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\w+)", re.escape(FORMS[question.form].template))
    match = re.fullmatch(pattern, question.text)
    assert match is not None, question.text
    return match.groupdict()


def answer(question: Question, pictures: Sequence[Picture]) -> str | None:
    """What the pictures say; None where they do not have what the question is about."""
    try:
        found = READERS[question.form](list(pictures), slots_of(question))
    except (StopIteration, IndexError, ValueError, KeyError, ZeroDivisionError):
        return None
    return str(found)


def overlapping(box: Box, others: Sequence[Box]) -> bool:
    return any(box.left < o.right and box.right > o.left and box.top < o.bottom and box.bottom > o.top for o in others)


def within(picture: Picture, boxes: Sequence[Box], inside: bool = True) -> Picture:
    """The picture with those marks alone that overlap the boxes, or without them."""
    return replace(picture, marks=tuple(m for m in picture.marks if overlapping(m.box, boxes) is inside))


def texts(picture: Picture) -> list[Text]:
    return [m for m in picture.marks if isinstance(m, Text)]


def things(picture: Picture) -> list[Thing]:
    return [m for m in picture.marks if isinstance(m, Thing)]


def only(found):
    (one,) = found
    return one


# ------------------------------------------------------------------------------------------------ documents and charts


def beside(picture: Picture, word: str) -> str:
    line = next(t for t in texts(picture) if t.text == word)
    return next(t.text for t in texts(picture) if t.top == line.top and t is not line)


def cell(picture: Picture, number: str, column: str) -> str:
    head = next(t for t in texts(picture) if t.text == column)
    row = next(t for t in texts(picture) if t.text == number and t.left < head.left and t.left < 8)
    return next(t.text for t in texts(picture) if (t.left, t.top) == (head.left, row.top))


def bars(picture: Picture) -> dict[str, int]:
    """Heights by colour, in units."""
    names = {rgb: name for name, rgb in COLOURS.items()}
    return {names[m.rgb]: m.box.bottom - m.box.top for m in picture.marks if isinstance(m, Patch) and m.rgb in names}


def value(picture: Picture, colour: str) -> int:
    tops = {t.text: t.top for t in texts(picture)}
    return bars(picture)[colour] // (tops["1"] - tops["2"])


def best(picture: Picture, sign: int) -> str:
    found = bars(picture)
    return only(name for name, height in found.items() if sign * height == max(sign * h for h in found.values()))


def higher(picture: Picture, colour: str, other: str) -> str:
    found = bars(picture)
    return "yes" if found[colour] > found[other] else "no"


# ------------------------------------------------------------------------------------------------ scenes and several images


def of(picture: Picture, colour: str) -> list[Thing]:
    return [t for t in things(picture) if t.colour == colour]


def biggest(picture: Picture) -> str:
    return max(things(picture), key=lambda t: t.radius).colour


def has(picture: Picture, colour: str, shape: str) -> bool:
    return any(t.shape == shape for t in of(picture, colour))


def looks(picture: Picture) -> set[tuple]:
    return {(t.shape, t.colour, t.x, t.y) for t in things(picture)}


def new_in(pictures: list[Picture]) -> tuple:
    """(shape, colour, x, y) of the thing that the second picture alone has."""
    return only(looks(pictures[1]) - looks(pictures[0]))


def which(pictures: list[Picture], colour: str, shape: str) -> str:
    return ORDER[only(i for i, p in enumerate(pictures) if has(p, colour, shape))]


def odd(pictures: list[Picture]) -> str:
    each = [looks(p) for p in pictures]
    return ORDER[only(i for i in range(len(each)) if each.count(each[i]) == 1)]


def more(pictures: list[Picture]) -> str:
    counts = [len(things(p)) for p in pictures]
    return ORDER[only(i for i, n in enumerate(counts) if n == max(counts))]


# ------------------------------------------------------------------------------------------------ screens


def title(picture: Picture) -> str:
    return only(t.text for t in texts(picture) if t.top == 14 and t.cell == 2)


def number(picture: Picture) -> str:
    return only(t.text for t in texts(picture) if t.cell == 3)


def label(picture: Picture, colour: str) -> str:
    face = only(m.box for m in picture.marks if isinstance(m, Patch) and m.rgb == COLOURS[colour])
    return only(t.text for t in texts(picture) if overlapping(t.box, [face]))


def full(picture: Picture) -> str:
    frame = next(m.box for m in picture.marks if isinstance(m, Patch) and m.box.right - m.box.left == m.box.bottom - m.box.top == 40)
    inner = [m for m in picture.marks if isinstance(m, Patch) and m.box.right - m.box.left == 20 and overlapping(m.box, [frame])]
    return "yes" if inner else "no"


def changed(pictures: list[Picture]) -> str:
    """The element of the last picture that is not as it was."""
    before, after = (set(p.marks) for p in pictures[-2:])
    new = before ^ after
    words = [m for m in new if isinstance(m, Text)]
    if not words:
        return "box" if new else only(())
    return "number" if words[0].cell == 3 else "title" if words[0].top == 14 else "button"


def at(pictures: list[Picture], order: str) -> Picture:
    return pictures[0 if order == "first" else -1]


# ------------------------------------------------------------------------------------------------ video


def way(frames: list[Picture], colour: str) -> str:
    first, last = (only(of(frames[i], colour)) for i in (0, -1))
    dx, dy = last.x - first.x, last.y - first.y
    return {(1, 0): "right", (-1, 0): "left", (0, 1): "down", (0, -1): "up"}[(dx > 0) - (dx < 0), (dy > 0) - (dy < 0)]


def came(frames: list[Picture], colour: str) -> int:
    return next(i for i, frame in enumerate(frames) if of(frame, colour))


def colours(frames: list[Picture]) -> set[str]:
    return {t.colour for frame in frames for t in things(frame)}


def earliest(frames: list[Picture]) -> str:
    when = {colour: came(frames, colour) for colour in colours(frames)}
    return only(colour for colour, i in when.items() if i == min(when.values()))


READERS: dict[str, Callable[[list[Picture], Slots], object]] = {
    "field": lambda p, s: beside(p[0], s["name"]),
    "owner": lambda p, s: beside(p[0], s["number"]),
    "cell": lambda p, s: cell(p[0], s["number"], s["column"]),
    "value": lambda p, s: value(p[0], s["colour"]),
    "highest": lambda p, s: best(p[0], 1),
    "lowest": lambda p, s: best(p[0], -1),
    "higher": lambda p, s: higher(p[0], s["colour"], s["other"]),
    "bars": lambda p, s: len(bars(p[0])),
    "total": lambda p, s: len(things(p[0])),
    "few": lambda p, s: len(of(p[0], s["colour"])),
    "shape": lambda p, s: only(of(p[0], s["colour"])).shape,
    "biggest": lambda p, s: biggest(p[0]),
    "presence": lambda p, s: "yes" if has(p[0], s["colour"], s["shape"]) else "no",
    "side": lambda p, s: "left" if only(of(p[0], s["colour"])).x < p[0].width else "right",
    "height": lambda p, s: "top" if only(of(p[0], s["colour"])).y < p[0].height else "bottom",
    "same": lambda p, s: "yes" if looks(p[0]) == looks(p[1]) else "no",
    "changed": lambda p, s: new_in(p)[0],
    "new": lambda p, s: new_in(p)[1],
    "which": lambda p, s: which(p, s["colour"], s["shape"]),
    "odd": lambda p, s: odd(p),
    "more": lambda p, s: more(p),
    "element": lambda p, s: changed(p),
    "title": lambda p, s: title(at(p, s["order"])),
    "label": lambda p, s: label(at(p, s["order"]), s["colour"]),
    "number": lambda p, s: number(at(p, s["order"])),
    "box": lambda p, s: full(at(p, s["order"])),
    "motion": lambda p, s: way(p, s["colour"]),
    "earliest": lambda p, s: earliest(p),
    "before": lambda p, s: "yes" if came(p, s["colour"]) < came(p, s["other"]) else "no",
    "appeared": lambda p, s: len(colours(p)),
}
