"""Training prompts of the embedded models: benchmark pictures drawn as they are needed, never twice, with their questions packed.

Besides the benchmark's own questions, training asks where things are and what is beside what ("colour at the top left?",
"word right of sun?"), as VLMs are trained to ground what they say. That is language alone: no loss looks at the tower's tokens.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..chat import CELL, END, TURN, VOCABULARY
from ..hard import make_item
from ..hard.canvas import PIXEL, Ground, Picture, Text, ink, thing
from ..hard.crowds import ground, placed, tinted
from ..hard.forms import NAMES, NUMBERS
from ..questions import CATEGORIES as OLD
from ..questions import all_questions, benchmark_questions
from ..scenes import COLOURS, SHAPES, UNITS, Stream, Thing, make_scene

VIDEO = "video"
HARD = ("document", "chart", "scene", "images", "screens")
CATEGORIES = (*OLD, *HARD)
OLD_SIZES = (168, 196, 224)  # pixels at which the first benchmark's scenes are drawn in training
BLOCK = 17  # tokens of a packed question: at most 12 of text, <|im_end|> <|im_start|> assistant, the answer, <|im_end|>
QUESTIONS = 10  # of a prompt
WRITTEN = (*NAMES, *NUMBERS)
GROUND = "grounding"
ORDER = ("first", "second", "third")
Asked = tuple[str, str, str]  # category, question, answer


@dataclass(frozen=True)
class Prompt:
    """Pictures of one size, drawn when they are needed, and what may be asked about them."""

    height: int
    width: int
    draw: tuple[Callable[[], np.ndarray], ...]
    questions: tuple[Asked, ...]
    grounding: tuple[Asked, ...] = ()

    @property
    def tokens(self) -> int:
        """Visual tokens of a picture."""
        return self.height * self.width // CELL**2


def encode(text: str) -> list[int]:
    """The token ids that the processor gives a question."""
    return [VOCABULARY[w] for w in re.findall(r"\w+|[^\w\s]", text.lower())]


@functools.lru_cache(maxsize=200_000)
def pack(question: str, answer: str) -> tuple[int, ...]:
    """One question as ``BLOCK`` ids, padded on the left."""
    ids = [*encode(question), *(VOCABULARY[w] for w in (*TURN, answer, END))]
    if len(ids) > BLOCK:
        raise ValueError(f"longer than {BLOCK} tokens: {question}")
    return (*[0] * (BLOCK - len(ids)), *ids)


@dataclass(frozen=True)
class Seen:
    """Something in a picture: its middle in fractions of the picture, and its names by what they are: a word, or a colour and a shape."""

    y: float
    x: float
    names: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        return " ".join(name for _, name in self.names)

    @property
    def zone(self) -> str:
        """One of nine."""
        return f"{('top', 'middle', 'bottom')[int(3 * self.y)]} {('left', 'middle', 'right')[int(3 * self.x)]}"


def grounded(seen: Sequence[Seen], rng: np.random.Generator, behind: str = "") -> list[Asked]:
    """What is where, what is beside what, and what there is. behind: what tells one picture of several."""
    names, zones = [s.name for s in seen], [s.zone for s in seen]
    out = []
    for s in seen:
        if zones.count(s.zone) == 1:
            out += [f"{kind} at the {s.zone}{behind}? {name}" for kind, name in s.names]
        for (kind, name), (other, wanted) in zip(s.names, s.names[::-1]):
            if len(s.names) > 1 and sum((kind, name) in t.names for t in seen) == 1:
                out.append(f"{other} of {name}{behind}? {wanted}")
        if names.count(s.name) == 1:
            out += [f"side of {s.name}{behind}? {'left' if s.x < 0.5 else 'right'}"] if abs(s.x - 0.5) > 0.08 else []
            out += [f"height of {s.name}{behind}? {'top' if s.y < 0.5 else 'bottom'}"] if abs(s.y - 0.5) > 0.08 else []
        other = _another(s, rng)
        out += [f"is there {s.name}{behind}? yes", f"is there {other}{behind}? {'yes' if other in names else 'no'}"]
    out += _beside([s for s in seen if s.names[0][0] == "word" and names.count(s.name) == 1], seen, behind)
    return [(GROUND, question, answer) for question, _, answer in (line.rpartition(" ") for line in out)]


def _another(s: Seen, rng: np.random.Generator) -> str:
    """A name of the same kind, of which one part is another."""
    among = {"word": WRITTEN, "colour": tuple(COLOURS), "shape": SHAPES}
    changed = int(rng.integers(len(s.names)))
    return " ".join(str(rng.choice(among[kind])) if i == changed else name for i, (kind, name) in enumerate(s.names))


def _beside(words: Sequence[Seen], seen: Sequence[Seen], behind: str) -> list[str]:
    """The next word to the right of a word and below it."""
    out = []
    for s in words:
        right = [t for t in seen if t.names[0][0] == "word" and abs(t.y - s.y) < 0.02 and t.x > s.x + 0.02]
        below = [t for t in seen if t.names[0][0] == "word" and abs(t.x - s.x) < 0.02 and t.y > s.y + 0.02]
        out += [f"word right of {s.name}{behind}? {min(right, key=lambda t: t.x).name}"] if right else []
        out += [f"word below {s.name}{behind}? {min(below, key=lambda t: t.y).name}"] if below else []
    return out


def _of_mark(mark: Any, picture: Picture) -> Seen | None:
    height, width = PIXEL * picture.height, PIXEL * picture.width
    if isinstance(mark, Text):
        word, box = mark.text.lower(), mark.box
        left = box.left + 5 * PIXEL  # the first letter's middle: words of one column are of different lengths
        return Seen((box.top + box.bottom) / 2 / height, left / width, (("word", word),)) if word in VOCABULARY else None
    if isinstance(mark, Thing):
        return Seen(mark.y / height, mark.x / width, (("colour", mark.colour), ("shape", mark.shape)))
    return None


def _all_seen(picture: Picture) -> list[Seen]:
    return [s for s in (_of_mark(mark, picture) for mark in picture.marks) if s is not None]


def hard_prompt(index: int, category: str, rng: np.random.Generator, split: str = "train") -> Prompt:
    item = make_item(split, index, category)
    first = item.pictures[0]
    asked = item.questions if split == "train" else item.benchmark
    grounding: list[Asked] = []
    for order, picture in zip(ORDER, item.pictures) if split == "train" and not item.video else ():
        grounding += grounded(_all_seen(picture), rng, f" in the {order} image" if len(item.pictures) > 1 else "")
    draw = tuple(picture.draw for picture in item.pictures)
    forms = split == "train" and category == VIDEO  # of a video in training, one for each form of question
    own = tuple((f"{category} {q.form}" if forms else category, q.text, q.answer) for q in asked)
    return Prompt(first.height, first.width, draw, own, tuple(grounding))


def old_prompt(index: int, size: int, rng: np.random.Generator, split: str = "train") -> Prompt:
    """A scene of the first benchmark."""
    scene = make_scene(split, index)
    if split == "train":
        found = all_questions(scene, Stream(41, index))
        asked = [(c, q.text, q.answer) for c, questions in found.items() for q in questions]
    else:
        asked = [(q.category, q.text, q.answer) for q in benchmark_questions(scene)]
    seen = [Seen(t.y / UNITS, t.x / UNITS, (("colour", t.colour), ("shape", t.shape))) for t in scene.things]
    for d in scene.digits:
        seen.append(Seen((d.box.top + d.box.bottom) / 2 / UNITS, (d.box.left + d.box.right) / 2 / UNITS, (("word", str(d.value)),)))
    grounding = grounded(seen, rng) if split == "train" else []
    return Prompt(size, size, (functools.partial(scene.draw, size),), tuple(asked), tuple(grounding))


def _words(stream: Stream, rows: int, columns: int, behind: Ground) -> Iterator[Text]:
    """One to four words on lines of cells, each with two cells of its own and in line with its patches, as documents are set."""
    places = stream.shuffled([(row, half) for row in range(rows) for half in range(columns // 2)])
    for row, half in places[: stream.between(1, 4)]:
        left = half * 2 * CELL + 2 + CELL // 2 * stream.below(2)
        yield Text(stream.choice(WRITTEN), PIXEL * left, PIXEL * (row * CELL + 7), 2, ink(behind.rgb))


def tiny_prompt(index: int, rng: np.random.Generator) -> Prompt:
    """A picture of a few cells with one to four marks, to begin with: objects, or words on the lines of a document."""
    stream = Stream(43, index)
    rows, columns = stream.between(1, 3), stream.between(2, 4)
    height, width = rows * CELL, columns * CELL
    behind = ground(stream)
    if stream.below(2):
        kinds = [(stream.choice(SHAPES), stream.choice(list(COLOURS))) for _ in range(stream.between(1, min(4, rows * columns // 2)))]
        marks: tuple[Any, ...] = tuple(placed(stream, height, width, kinds))
    else:
        marks = tuple(_words(stream, rows, columns, behind))
    picture = Picture(height, width, behind, marks)
    asked = grounded(_all_seen(picture), rng)
    return Prompt(height, width, (picture.draw,), tuple(asked), tuple(asked))


def large_prompt(index: int, rng: np.random.Generator) -> Prompt:
    """A picture with one object of any size that it holds, and its shape: what a tower sees last, and sees sooner where it is large."""
    stream = Stream(45, index)
    height, width = (CELL * stream.between(2, 3) for _ in range(2))
    radius = PIXEL * stream.between(8, min(height, width) // 2 - 2)
    x, y = (stream.between(radius + PIXEL, PIXEL * (side - 1) - radius) for side in (width, height))
    colour, shape = stream.choice(list(COLOURS)), stream.choice(SHAPES)
    picture = Picture(height, width, ground(stream), (thing(shape, colour, x, y, radius, tinted(stream, colour)),))
    texts = ("What shape is the big object?", f"What shape is the {colour} object?", f"shape of {colour}?", "shape of the object?")
    asked = [(GROUND, text, shape) for text in texts]
    return Prompt(height, width, (picture.draw,), tuple(asked), tuple(asked))


WEIGHTS = {"object": 0.4, "attribute": 1.3, "count": 0.8, "position": 1.5, "presence": 1.3, "reading": 1.0, "comparison": 1.3} | {
    "video motion": 1.5, "video appeared": 3.0, "video before": 0.7,
}  # fmt: skip


def picked(prompt: Prompt, grounding: float, rng: np.random.Generator, count: int = QUESTIONS) -> list[tuple[str, tuple[int, ...], float]]:
    """Some questions of a prompt as (category, block, weight): a share of grounding, and of the rest as much of each category as
    there is of others."""
    own, about = list(prompt.questions), list(prompt.grounding)
    by_category: dict[str, list[Asked]] = {}
    for asked in own:
        by_category.setdefault(asked[0], []).append(asked)
    chosen: list[Asked] = []
    wanted = count - int(rng.binomial(count, grounding)) if about else count
    piles = [list(pile) for pile in by_category.values()]
    for pile in piles:
        rng.shuffle(pile)
    while len(chosen) < wanted and any(piles):
        chosen += [pile.pop() for pile in piles if pile]
    chosen = chosen[:wanted]
    rng.shuffle(about)
    while len(chosen) < count:
        pool = about or own
        chosen += pool[: count - len(chosen)]
    return [(c, pack(q, a), WEIGHTS.get(c, 1.0)) for c, q, a in chosen]


SMALL = {"tiny": tiny_prompt, "large": large_prompt}


@dataclass(frozen=True)
class Kind:
    """What one micro-batch is drawn from: prompts of some categories with the same number of pictures and at most so many tokens.

    whole: one side of a picture is a multiple of so many pixels, so that a processor that cuts tiles of them does not scale it.
    """

    categories: tuple[str, ...]
    pictures: int
    low: int
    high: int
    whole: int = field(default=0, kw_only=True)

    def takes(self, height: int, width: int) -> bool:
        fits = not self.whole or height % self.whole == 0 or width % self.whole == 0
        return fits and self.low < height * width // CELL**2 <= self.high


def draw_prompt(kind: Kind, rng: np.random.Generator) -> Prompt:
    """A random training prompt of a kind."""
    while True:
        category = kind.categories[int(rng.integers(len(kind.categories)))]
        index = int(rng.integers(1 << 30))
        if category in SMALL:
            prompt = SMALL[category](index, rng)
            if kind.takes(prompt.height, prompt.width):
                return prompt
            continue
        if category == "old":
            sizes = [s for s in (140, *OLD_SIZES) if kind.takes(s, s)]
            if sizes:
                return old_prompt(index, sizes[int(rng.integers(len(sizes)))], rng)
            continue
        for _ in range(400):
            item = make_item("train", index, category)
            first = item.pictures[0]
            if len(item.pictures) == kind.pictures and kind.takes(first.height, first.width):
                return hard_prompt(index, category, rng)
            index = int(rng.integers(1 << 30))
