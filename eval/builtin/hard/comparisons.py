"""Two or three images: equal or not, which one holds something, which one differs and how."""

from __future__ import annotations

from dataclasses import replace

from ..scenes import COLOURS, SHAPES, Box, Stream, Thing
from .canvas import Picture, side
from .crowds import ground, placed, tinted
from .forms import ORDER, Question, ask

FEWEST, MOST = 2, 6  # objects of an image


def comparison(rng: Stream) -> tuple[list[Picture], list[Question]]:
    """One of four kinds: a pair that is equal or not, a pair to count, three to search, three of which one is different."""
    return rng.choice((_pair, _counted, _searched, _odd))(rng)


def _kinds(rng: Stream, count: int) -> list[tuple[str, str]]:
    return [(rng.choice(SHAPES), rng.choice(list(COLOURS))) for _ in range(count)]


def _size(rng: Stream) -> tuple[int, int]:
    return side(rng, 112, 224), side(rng, 112, 224)


def _recoloured(rng: Stream, things: list[Thing]) -> tuple[list[Thing], int]:
    """The things with one in another colour, and which."""
    at = rng.below(len(things))
    colour = rng.choice([c for c in COLOURS if c != things[at].colour])
    return [replace(t, colour=colour, rgb=tinted(rng, colour)) if i == at else t for i, t in enumerate(things)], at


def _boxes(things: list[Thing]) -> tuple[Box, ...]:
    return tuple(t.box for t in things)


def _pair(rng: Stream) -> tuple[list[Picture], list[Question]]:
    (height, width), behind = _size(rng), ground(rng)
    first = placed(rng, height, width, _kinds(rng, rng.between(FEWEST, MOST)))
    equal = bool(rng.below(2))
    second, at = (first, 0) if equal else _recoloured(rng, first)
    pictures = [Picture(height, width, behind, tuple(things)) for things in (first, second)]
    if equal:
        return pictures, [ask("same", "yes", (_boxes(first), _boxes(second)))]
    where = ((first[at].box,), (second[at].box,))
    questions = [
        ask("same", "no", where),
        ask("changed", first[at].shape, where),
        ask("new", second[at].colour, where),
    ]
    return pictures, questions


def _counted(rng: Stream) -> tuple[list[Picture], list[Question]]:
    (height, width), few = _size(rng), rng.between(1, MOST - 1)
    counts = rng.shuffled((few, rng.between(few + 1, MOST)))
    scenes = [placed(rng, height, width, _kinds(rng, n)) for n in counts]
    pictures = [Picture(height, width, ground(rng), tuple(things)) for things in scenes]
    return pictures, [ask("more", ORDER[int(counts[1] > counts[0])], tuple(map(_boxes, scenes)))]


def _searched(rng: Stream) -> tuple[list[Picture], list[Question]]:
    """Three scenes in which no two objects are of one colour and shape, so that each is in one image alone."""
    height, width = _size(rng)
    counts = [rng.between(FEWEST, MOST - 2) for _ in ORDER]
    every = rng.shuffled([(shape, colour) for shape in SHAPES for colour in COLOURS])
    scenes = []
    for n in counts:
        scenes.append(placed(rng, height, width, every[:n]))
        every = every[n:]
    pictures = [Picture(height, width, ground(rng), tuple(things)) for things in scenes]
    questions = []
    for at in rng.shuffled(range(len(ORDER))):
        chosen = rng.choice(scenes[at])
        regions = tuple((chosen.box,) if i == at else () for i in range(len(ORDER)))
        questions.append(ask("which", ORDER[at], regions, colour=chosen.colour, shape=chosen.shape))
    return pictures, questions


def _odd(rng: Stream) -> tuple[list[Picture], list[Question]]:
    (height, width), behind = _size(rng), ground(rng)
    common = placed(rng, height, width, _kinds(rng, rng.between(FEWEST, MOST)))
    other, at = _recoloured(rng, common)
    odd = rng.below(len(ORDER))
    scenes = [other if i == odd else common for i in range(len(ORDER))]
    pictures = [Picture(height, width, behind, tuple(things)) for things in scenes]
    return pictures, [ask("odd", ORDER[odd], tuple((things[at].box,) for things in scenes))]
