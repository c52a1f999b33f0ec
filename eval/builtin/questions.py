"""The seven question categories of the embedded benchmark, each with a one-word answer and the region that matters."""

from __future__ import annotations

from dataclasses import dataclass

from .scenes import COLOURS, CORNER_ZONE, CORNERS, SHAPES, SPLITS, UNITS, Box, Scene, Stream, Thing

CATEGORIES = ("object", "attribute", "count", "position", "presence", "reading", "comparison")
MARGIN = 150  # units: two things closer than this along an axis are not compared along it
SUFFIX = " Answer with one word."


@dataclass(frozen=True)
class Question:
    """One question about a scene.

    ``region`` are the boxes (canvas units) that the answer depends on; empty when the answer is that something is
    absent everywhere. ``natural`` is the form for other models; the embedded model is asked ``text``.
    """

    category: str
    text: str
    answer: str
    region: tuple[Box, ...]

    @property
    def natural(self) -> str:
        return self.text + SUFFIX


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _corner_box(corner: str) -> Box:
    far = UNITS - CORNER_ZONE
    left, top = (0 if "left" in corner else far), (0 if "top" in corner else far)
    return Box(left, top, left + CORNER_ZONE, top + CORNER_ZONE)


def _boxes(*things: Thing) -> tuple[Box, ...]:
    return tuple(t.box for t in things)


def _unique(scene: Scene) -> list[Thing]:
    """Things that no other thing of the scene shares both colour and shape with."""
    names = [t.name for t in scene.things]
    return [t for t in scene.things if names.count(t.name) == 1]


def object_questions(scene: Scene) -> list[Question]:
    big = scene.big
    return [
        Question("object", "What colour is the big object?", big.colour, _boxes(big)),
        Question("object", "What shape is the big object?", big.shape, _boxes(big)),
    ]


def attribute_questions(scene: Scene) -> list[Question]:
    colours, shapes = [t.colour for t in scene.small], [t.shape for t in scene.small]
    out = []
    for t in scene.small:
        if colours.count(t.colour) == 1:
            out.append(Question("attribute", f"What shape is the small {t.colour} object?", t.shape, _boxes(t)))
        if shapes.count(t.shape) == 1:
            out.append(Question("attribute", f"What colour is the small {t.shape}?", t.colour, _boxes(t)))
    return out


def count_questions(scene: Scene) -> list[Question]:
    boxes = _boxes(*scene.small)
    return [Question("count", "How many small shapes are there?", str(len(scene.small)), boxes)]


def position_questions(scene: Scene) -> list[Question]:
    out, half, things = [], UNITS // 2, _unique(scene)
    for t in things:
        if abs(t.x - half) >= MARGIN:
            side = "left" if t.x < half else "right"
            out.append(Question("position", f"Is the {t.name} in the left or right half?", side, _boxes(t)))
        if abs(t.y - half) >= MARGIN:
            side = "top" if t.y < half else "bottom"
            out.append(Question("position", f"Is the {t.name} in the top or bottom half?", side, _boxes(t)))
    for t in things:
        for u in things:
            if t is not u and abs(t.x - u.x) >= MARGIN:
                side = "left" if t.x < u.x else "right"
                out.append(Question("position", f"Is the {t.name} left or right of the {u.name}?", side, _boxes(t, u)))
            if t is not u and abs(t.y - u.y) >= MARGIN:
                side = "above" if t.y < u.y else "below"
                out.append(Question("position", f"Is the {t.name} above or below the {u.name}?", side, _boxes(t, u)))
    return out


def presence_questions(scene: Scene, rng: Stream) -> list[Question]:
    """Half yes, half no; three of four "no" questions name a real colour or a real shape of the scene."""
    out = []
    there = {t.name for t in scene.things}
    for thing in scene.things:
        colour, shape = thing.colour, thing.shape
        out.append(Question("presence", f"Is there {_a(colour)} {shape}?", "yes", _boxes(thing)))
        while True:
            kind = rng.below(4)
            if kind in (0, 3):
                colour = rng.choice(list(COLOURS))
            if kind in (1, 2, 3):
                shape = rng.choice(SHAPES)
            if f"{colour} {shape}" not in there:
                break
        out.append(Question("presence", f"Is there {_a(colour)} {shape}?", "no", ()))
    return out


def reading_questions(scene: Scene) -> list[Question]:
    out = []
    for corner in CORNERS:
        digit = scene.digit(corner)
        answer, region = (str(digit.value), digit.box) if digit else ("none", _corner_box(corner))
        out.append(Question("reading", f"What digit is in the {corner} corner?", answer, (region,)))
    return out


def comparison_questions(scene: Scene) -> list[Question]:
    out, half = [], UNITS // 2
    for a in scene.digits:
        for b in scene.digits:
            if a.value != b.value:
                answer = "yes" if a.value > b.value else "no"
                text = f"Is the {a.corner} digit larger than the {b.corner} digit?"
                out.append(Question("comparison", text, answer, (a.box, b.box)))
    boxes = _boxes(*scene.small)
    left, top = sum(t.x < half for t in scene.small), sum(t.y < half for t in scene.small)
    right, bottom = len(scene.small) - left, len(scene.small) - top
    if left != right and all(abs(t.x - half) >= 40 for t in scene.small):
        answer = "left" if left > right else "right"
        out.append(Question("comparison", "Are there more small shapes on the left or right?", answer, boxes))
    if top != bottom and all(abs(t.y - half) >= 40 for t in scene.small):
        answer = "top" if top > bottom else "bottom"
        out.append(Question("comparison", "Are there more small shapes at the top or bottom?", answer, boxes))
    return out


def all_questions(scene: Scene, rng: Stream) -> dict[str, list[Question]]:
    """Every question that the scene admits, by category."""
    return {
        "object": object_questions(scene),
        "attribute": attribute_questions(scene),
        "count": count_questions(scene),
        "position": position_questions(scene),
        "presence": presence_questions(scene, rng),
        "reading": reading_questions(scene),
        "comparison": comparison_questions(scene),
    }


def _draw(category: str, questions: list[Question], rng: Stream) -> Question | None:
    """One question of a category; presence is balanced over its answers, position and comparison over their kinds."""
    if not questions:
        return None
    if category == "presence":
        wanted = rng.choice(("yes", "no"))
        questions = [q for q in questions if q.answer == wanted]
    if category == "position":  # as many two-thing relations as halves
        relation = [q for q in questions if len(q.region) == 2]
        if relation and rng.below(2):
            questions = relation
        else:
            questions = [q for q in questions if len(q.region) == 1] or questions
    if category == "comparison":  # as many about digits as about shapes
        shapes = [q for q in questions if "shapes" in q.text]
        digits = [q for q in questions if "digit" in q.text]
        if shapes and digits:
            questions = rng.choice((shapes, digits))
    return rng.choice(questions)


def benchmark_questions(scene: Scene) -> list[Question]:
    """The benchmark's questions about a scene: at most one per category, in the order of ``CATEGORIES``."""
    rng = Stream(31, SPLITS[scene.split], scene.index)
    by_category = all_questions(scene, rng)
    picked = (_draw(c, by_category[c], rng) for c in CATEGORIES)
    return [q for q in picked if q is not None]
