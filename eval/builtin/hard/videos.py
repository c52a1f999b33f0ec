"""Videos of 8 frames: objects that move, or that come one after another."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from ..scenes import COLOURS, SHAPES, Box, Stream, Thing
from .canvas import PIXEL, Picture, side, thing
from .crowds import SMALL, ground, placed, tinted
from .forms import MAX_APPEARING, WAYS, Question, ask

FRAMES = 8
STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MAX_MOVING, MAX_STILL = 2, 2
STEP = (4 * PIXEL, 8 * PIXEL)  # units that an object moves from a frame to the next
LATEST = 6  # the last frame in which an object may come
SHORTEST = 2  # frames that it stays


def video(rng: Stream) -> tuple[list[Picture], list[Question]]:
    """Motion or arrivals, as often as each other."""
    height, width, behind = side(rng, 112, 168), side(rng, 112, 168), replace(ground(rng), noise=0)
    things, questions = (_motion if rng.below(2) else _arrivals)(rng, height, width)
    return [Picture(height, width, behind, tuple(frame)) for frame in things], questions


def _regions(frames: list[list[Thing]], *colours: str) -> tuple[tuple[Box, ...], ...]:
    return tuple(tuple(t.box for t in frame if t.colour in colours) for frame in frames)


def _motion(rng: Stream, height: int, width: int) -> tuple[list[list[Thing]], list[Question]]:
    """One or two objects move, up to two others stand still. No two have the same colour."""
    moving, still = rng.between(1, MAX_MOVING), rng.between(0, MAX_STILL)
    colours = rng.shuffled(COLOURS)[: moving + still]
    standing = placed(rng, height, width, [(rng.choice(SHAPES), c) for c in colours[moving:]])
    frames: list[list[Thing]] = [list(standing) for _ in range(FRAMES)]
    questions = []
    for colour in colours[:moving]:
        way = rng.choice(WAYS)
        shape, radius, rgb = rng.choice(SHAPES), rng.between(*SMALL), tinted(rng, colour)
        (dx, dy), step = STEPS[way], rng.between(*STEP)
        # the middle of the way lies where both ends are inside
        spans = [radius + PIXEL + abs(d) * step * (FRAMES - 1) // 2 for d in (dx, dy)]
        x, y = (rng.between(span, PIXEL * length - span) for span, length in zip(spans, (width, height)))
        for i, frame in enumerate(frames):
            along = (2 * i - FRAMES + 1) * step // 2
            frame.append(thing(shape, colour, x + dx * along, y + dy * along, radius, rgb))
        questions.append((colour, way))
    return frames, [ask("motion", way, _regions(frames, colour), colour=colour) for colour, way in questions]


def _arrivals(rng: Stream, height: int, width: int) -> tuple[list[list[Thing]], list[Question]]:
    """One to five objects of different colours come in different frames; in half of the videos they go again."""
    count, stay = rng.between(1, MAX_APPEARING), bool(rng.below(2))
    colours = rng.shuffled(COLOURS)[:count]
    things = placed(rng, height, width, [(rng.choice(SHAPES), c) for c in colours])
    starts = rng.shuffled(range(LATEST + 1))[:count]
    ends = [FRAMES if stay else start + rng.between(SHORTEST, 4) for start in starts]
    frames = [[t for t, start, end in zip(things, starts, ends) if start <= i < end] for i in range(FRAMES)]
    questions = [ask("appeared", count, _regions(frames, *colours))]
    if count > 1:
        first = colours[starts.index(min(starts))]
        questions.append(ask("earliest", first, _regions(frames, first)))
    order = rng.shuffled(range(count))
    for i, j in pairwise(order):
        answer = "yes" if starts[i] < starts[j] else "no"
        regions = _regions(frames, colours[i], colours[j])
        questions.append(ask("before", answer, regions, colour=colours[i], other=colours[j]))
    return frames, questions
