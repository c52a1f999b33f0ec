"""Training prompts of ``builtin-qwen``: benchmark pictures drawn as they are needed, never twice, with their questions packed.

Besides the benchmark's own questions, training asks where things are ("row of the red circle?", "word in row 2 column 1?"),
as Qwen-VL is trained to ground what it says. That is language alone: no loss looks at the tower's tokens. The questions
name cells of 28 pixels, counted from 1.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..hard import make_item
from ..hard.canvas import PIXEL, Text
from ..questions import CATEGORIES as OLD
from ..questions import all_questions, benchmark_questions
from ..qwen_architecture import CELL, VOCABULARY
from ..scenes import UNITS, Stream, Thing, make_scene

HARD = ("document", "chart", "scene", "images", "screens")
CATEGORIES = (*OLD, *HARD)
OLD_SIZES = (168, 196, 224)  # pixels at which the first benchmark's scenes are drawn in training
BLOCK = 17  # tokens of a packed question: at most 12 of text, <|im_end|> <|im_start|> assistant, the answer, <|im_end|>
QUESTIONS = 10  # of a prompt
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
    turn = [VOCABULARY[w] for w in ("<|im_end|>", "<|im_start|>", "assistant")]
    ids = [*encode(question), *turn, VOCABULARY[answer], VOCABULARY["<|im_end|>"]]
    if len(ids) > BLOCK:
        raise ValueError(f"longer than {BLOCK} tokens: {question}")
    return (*[0] * (BLOCK - len(ids)), *ids)


@dataclass(frozen=True)
class Seen:
    """Something at a cell of a picture, and its names by what they are: a word, or a colour and a shape."""

    row: int
    column: int
    names: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        return " ".join(name for _, name in self.names)


def grounded(seen: Iterable[Seen], rows: int, columns: int, rng: np.random.Generator, behind: str = "") -> list[Asked]:
    """What is in a cell, and in which cell something is. behind: what tells one picture of several."""
    seen = list(seen)
    places, names = [(s.row, s.column) for s in seen], [s.name for s in seen]
    out = []
    for s in seen:
        if places.count((s.row, s.column)) == 1:
            out += [(GROUND, f"{kind} in row {s.row} column {s.column}{behind}?", name) for kind, name in s.names]
        if names.count(s.name) == 1 and len(s.names) <= 2:
            out += [(GROUND, f"row of {s.name}{behind}?", str(s.row)), (GROUND, f"column of {s.name}{behind}?", str(s.column))]
    kind = "word" if seen and seen[0].names[0][0] == "word" else "shape"
    for _ in range(1 + len(seen) // 4):
        row, column = int(rng.integers(rows)) + 1, int(rng.integers(columns)) + 1
        if all(abs(row - s.row) > 1 or abs(column - s.column) > 2 for s in seen):
            out.append((GROUND, f"{kind} in row {row} column {column}{behind}?", "nothing"))
    return out


def _cell(units: int, per_pixel: float) -> int:
    return int(units / per_pixel // CELL) + 1


def _of_mark(mark: Any) -> Seen | None:
    if isinstance(mark, Text):
        word, box = mark.text.lower(), mark.box
        middle = min(box.right, box.left + CELL * PIXEL) + box.left  # of its first letters
        return Seen(_cell((box.top + box.bottom) // 2, PIXEL), _cell(middle // 2, PIXEL), (("word", word),)) if word in VOCABULARY else None
    if isinstance(mark, Thing):
        return Seen(_cell(mark.y, PIXEL), _cell(mark.x, PIXEL), (("colour", mark.colour), ("shape", mark.shape)))
    return None


def hard_prompt(index: int, category: str, rng: np.random.Generator, split: str = "train") -> Prompt:
    item = make_item(split, index, category)
    first = item.pictures[0]
    asked = item.questions if split == "train" else item.benchmark
    grounding: list[Asked] = []
    for order, picture in zip(ORDER, item.pictures) if split == "train" else ():
        seen = [s for s in map(_of_mark, picture.marks) if s is not None]
        behind = f" of the {order} image" if len(item.pictures) > 1 else ""
        grounding += grounded(seen, picture.height // CELL, picture.width // CELL, rng, behind)
    draw = tuple(picture.draw for picture in item.pictures)
    return Prompt(first.height, first.width, draw, tuple((category, q.text, q.answer) for q in asked), tuple(grounding))


def old_prompt(index: int, size: int, rng: np.random.Generator, split: str = "train") -> Prompt:
    """A scene of the first benchmark."""
    scene, scale = make_scene(split, index), UNITS / size
    if split == "train":
        found = all_questions(scene, Stream(41, index))
        asked = [(c, q.text, q.answer) for c, questions in found.items() for q in questions]
    else:
        asked = [(q.category, q.text, q.answer) for q in benchmark_questions(scene)]
    seen = [Seen(_cell(t.y, scale), _cell(t.x, scale), (("colour", t.colour), ("shape", t.shape))) for t in scene.things]
    for d in scene.digits:
        b = d.box
        seen.append(Seen(_cell((b.top + b.bottom) // 2, scale), _cell((b.left + b.right) // 2, scale), (("word", str(d.value)),)))
    grounding = grounded(seen, size // CELL, size // CELL, rng) if split == "train" else []
    return Prompt(size, size, (functools.partial(scene.draw, size),), tuple(asked), tuple(grounding))


WEIGHTS = {"object": 0.4, "attribute": 1.3, "count": 0.8, "position": 1.5, "presence": 1.3, "reading": 1.0, "comparison": 1.3}


def picked(prompt: Prompt, grounding: float, rng: np.random.Generator) -> list[tuple[str, tuple[int, ...], float]]:
    """``QUESTIONS`` of a prompt as (category, block, weight): a share of grounding, and of the rest as much of each category as
    there is of others."""
    own, ground = list(prompt.questions), list(prompt.grounding)
    by_category: dict[str, list[Asked]] = {}
    for asked in own:
        by_category.setdefault(asked[0], []).append(asked)
    chosen: list[Asked] = []
    wanted = QUESTIONS - int(rng.binomial(QUESTIONS, grounding)) if ground else QUESTIONS
    piles = [list(pile) for pile in by_category.values()]
    for pile in piles:
        rng.shuffle(pile)
    while len(chosen) < wanted and any(piles):
        chosen += [pile.pop() for pile in piles if pile]
    chosen = chosen[:wanted]
    while len(chosen) < QUESTIONS:
        pool = ground or own
        chosen.append(pool[int(rng.integers(len(pool)))])
    return [(c, pack(q, a), WEIGHTS.get(c, 1.0)) for c, q, a in chosen]


@dataclass(frozen=True)
class Kind:
    """What one micro-batch is drawn from: prompts of some categories with the same number of pictures and at most so many tokens."""

    categories: tuple[str, ...]
    pictures: int
    low: int
    high: int


def draw_prompt(kind: Kind, rng: np.random.Generator) -> Prompt:
    """A random training prompt of a kind."""
    while True:
        category = kind.categories[int(rng.integers(len(kind.categories)))]
        index = int(rng.integers(1 << 30))
        if category == "old":
            sizes = [s for s in (140, *OLD_SIZES) if kind.low < (s // CELL) ** 2 <= kind.high]
            if sizes:
                return old_prompt(index, sizes[int(rng.integers(len(sizes)))], rng)
            continue
        for _ in range(400):
            item = make_item("train", index, category)
            size = item.pictures[0].height * item.pictures[0].width // CELL**2
            if len(item.pictures) == kind.pictures and kind.low < size <= kind.high:
                return hard_prompt(index, category, rng)
            index = int(rng.integers(1 << 30))
