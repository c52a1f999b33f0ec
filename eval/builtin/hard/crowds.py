"""Scenes of very different complexity: 1 to 30 objects before a flat, shaded or noisy ground."""

from __future__ import annotations

from ..scenes import COLOURS, SHAPES, Box, Stream, Thing
from .canvas import PIXEL, RGB, Ground, Picture, side, thing
from .forms import MAX_FEW, MAX_TOTAL, Question, ask

MOST = 30
SMALL, BIG = (7 * PIXEL, 10 * PIXEL), (17 * PIXEL, 21 * PIXEL)  # radii, in units
APART = 3 * PIXEL  # between two objects
ROOM = 40  # units from the middle within which nothing is left or right of it
SMALLEST_SIDE = {4: 112, 9: 140, 16: 196, MOST: 252}  # pixels, by the number of objects


def crowd(rng: Stream) -> tuple[list[Picture], list[Question]]:
    """Half of the scenes have 1 to 9 objects, half have more. The first is the biggest.

    One colour is that of exactly one object, another that of 0 to 5; the others share the rest.
    """
    count = rng.between(1, MAX_TOTAL) if rng.below(2) else rng.between(MAX_TOTAL + 1, MOST)
    low = next(pixels for most, pixels in SMALLEST_SIDE.items() if count <= most)
    height, width = side(rng, low, 336), side(rng, low, 336)
    alone, few, *rest = rng.shuffled(COLOURS)
    number = rng.between(0, MAX_FEW) if count > MAX_FEW else 0
    colours = rng.shuffled([alone, *[few] * number, *(rng.choice(rest) for _ in range(count - 1 - number))])
    things = placed(rng, height, width, [(rng.choice(SHAPES), colour) for colour in colours], biggest=True)
    questions = _questions(rng, things, height, width, alone, few)
    return [Picture(height, width, ground(rng), tuple(things))], questions


def _questions(rng: Stream, things: list[Thing], height: int, width: int, alone: str, few: str) -> list[Question]:
    boxes = {t: t.box for t in things}
    (one,) = [t for t in things if t.colour == alone]
    out = [
        ask("shape", one.shape, ((boxes[one],),), colour=alone),
        ask("biggest", things[0].colour, ((boxes[things[0]],),)),
    ]
    if len(things) <= MAX_TOTAL:
        out.append(ask("total", len(things), (tuple(boxes.values()),)))
    if len(things) > MAX_FEW:
        those = tuple(boxes[t] for t in things if t.colour == few)
        out.append(ask("few", len(those), (those,), colour=few))
    out.append(_presence(rng, things))
    if abs(one.x - width) >= ROOM:
        out.append(ask("side", "left" if one.x < width else "right", ((boxes[one],),), colour=alone))
    if abs(one.y - height) >= ROOM:
        out.append(ask("height", "top" if one.y < height else "bottom", ((boxes[one],),), colour=alone))
    return out


def _presence(rng: Stream, things: list[Thing]) -> Question:
    """Yes as often as no; a "no" names an object's colour with another shape, or its shape with another colour."""
    there = {(t.colour, t.shape) for t in things}
    chosen = rng.choice(things)
    colour, shape = chosen.colour, chosen.shape
    if rng.below(2):
        boxes: tuple[Box, ...] = tuple(t.box for t in things if (t.colour, t.shape) == (colour, shape))
        return ask("presence", "yes", (boxes,), colour=colour, shape=shape)
    while (colour, shape) in there:
        colour, shape = rng.choice(((colour, rng.choice(SHAPES)), (rng.choice(list(COLOURS)), shape)))
    return ask("presence", "no", ((),), colour=colour, shape=shape)


def ground(rng: Stream) -> Ground:
    """Flat, shaded, or shaded with noise; nearly grey, so that every colour stands out."""
    level = rng.between(70, 180)
    base = (level + rng.between(-25, 25), level + rng.between(-25, 25), level + rng.between(-25, 25))
    kind = rng.below(3)
    slope = (rng.between(-50, 50), rng.between(-50, 50)) if kind else (0, 0)
    return Ground(base, slope, rng.between(8, 26) if kind == 2 else 0, (79, rng.below(1 << 30)))


def tinted(rng: Stream, colour: str) -> RGB:
    """A colour, a little off."""
    r, g, b = (c + rng.between(-14, 14) for c in COLOURS[colour])
    return r, g, b


def placed(rng: Stream, height: int, width: int, kinds: list[tuple[str, str]], biggest: bool = False) -> list[Thing]:
    """Things of given (shape, colour) that do not touch. biggest: the first is bigger than all others."""
    while True:
        out: list[Thing] = []
        for shape, colour in kinds:
            radius = rng.between(*(BIG if biggest and not out else SMALL))
            for _ in range(60):
                x, y = (rng.between(radius + PIXEL, PIXEL * (side - 1) - radius) for side in (width, height))
                if all((x - t.x) ** 2 + (y - t.y) ** 2 >= (radius + t.radius + APART) ** 2 for t in out):
                    out.append(thing(shape, colour, x, y, radius, tinted(rng, colour)))
                    break
            else:
                break
        if len(out) == len(kinds):
            return out
