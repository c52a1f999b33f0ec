"""The harder benchmark as a list of samples."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mllm_efficient.errors import BadSettingError

from ..regions import cells_over
from .canvas import Picture
from .forms import CATEGORIES, FORMS, Question
from .items import Item, make_item

if TYPE_CHECKING:
    from PIL.Image import Image

    from mllm_efficient.tokens import Plane

QUESTIONS = 1000  # of each category of a split
SLACK = 1  # an answer is passed over while its form has had it more often than the mean of its answers and this


@dataclass(frozen=True)
class HardSample:
    """One question about the pictures of one item. ``image`` names the item, for resampling; ``keys`` seed methods that draw.

    instead: an item whose pictures are shown in place of its own, in which nothing is known to matter.
    """

    item: Item
    question: Question
    instead: Item | None = None

    @property
    def shown(self) -> Item:
        return self.instead or self.item

    @property
    def image(self) -> str:
        return f"{self.item.category}/{self.item.index}"

    @property
    def id(self) -> str:
        return f"{self.item.split}/{self.image}/{self.question.form}"

    @property
    def task(self) -> str:
        return self.item.category

    @property
    def video(self) -> bool:
        """Whether the pictures are the frames of one video."""
        return self.shown.video

    @property
    def keys(self) -> list[str]:
        """A name for each image or video of the prompt."""
        name = f"builtin-hard/{self.shown.split}/{self.shown.category}/{self.shown.index}"
        return [name] if self.video else [f"{name}/{i}" for i in range(len(self.shown.pictures))]

    def sizes(self, size: int = 0) -> list[tuple[int, int]]:
        """(width, height) of each picture: its own, whatever a model takes."""
        return [(p.width, p.height) for p in self.shown.pictures]

    def pictures(self, size: int = 0) -> list[Image]:
        return list(_drawn(self.shown.pictures))

    def region(self, planes: Sequence[Plane], number: int = 0) -> np.ndarray:
        """(N,) which tokens of an image (of the video) the answer depends on: those whose cells overlap the question's boxes.

        planes: the rectangles that the tokens form, placed on the picture. number: of the image in the prompt.
        """
        if self.instead is not None:
            return np.zeros(sum(map(len, planes)), dtype=bool)
        frames = 1 + max((plane.frame or 0 for plane in planes), default=0)
        each = len(self.item.pictures) // frames  # frames of the video that a plane looks at
        out = []
        for plane in planes:
            first = (plane.frame or 0) * each if self.video else number
            seen = range(first, first + (each if self.video else 1))
            boxes = [box for i in seen for box in self._boxes(i)]
            out.append(cells_over(plane, boxes).ravel())
        return np.concatenate(out)

    def boxes(self, number: int = 0) -> list[tuple[float, float, float, float]]:
        """What the answer depends on in an image (in all frames of the video), (top, left, bottom, right) in fractions of it."""
        if self.instead is not None:
            return []
        return [box for i in (range(len(self.item.pictures)) if self.video else (number,)) for box in self._boxes(i)]

    def _boxes(self, number: int) -> list[tuple[float, float, float, float]]:
        return [self.item.pictures[number].fraction(box) for box in self.question.regions[number]]


@functools.lru_cache(maxsize=64)
def _drawn(pictures: tuple[Picture, ...]) -> tuple[Image, ...]:
    from PIL import Image

    return tuple(Image.fromarray(picture.draw()) for picture in pictures)


def samples(split: str = "test", limit: int | None = None, categories: Sequence[str] = CATEGORIES) -> list[HardSample]:
    """The questions of a split, item after item, of which ``limit`` takes the first by ``round_robin``."""
    return sorted(round_robin(split, limit, categories), key=lambda s: (CATEGORIES.index(s.task), s.item.index))


def round_robin(split: str = "test", limit: int | None = None, categories: Sequence[str] = CATEGORIES) -> list[HardSample]:
    """The first question of each category, then the second of each, and so on; all of an item's before those of the next."""
    each = QUESTIONS if limit is None else min(QUESTIONS, -(-limit // len(categories)))
    found = [_first(split, category, each) for category in categories]
    return [sample for together in zip(*found) for sample in together][:limit]


def shuffled(asked: Sequence[HardSample]) -> list[HardSample]:
    """The same questions, those of every item about the pictures of the next item of its category.

    Raises:
        BadSettingError: a category has one item alone.
    """
    following: dict[Item, Item] = {}
    for category in dict.fromkeys(s.task for s in asked):
        own = list(dict.fromkeys(s.item for s in asked if s.task == category))
        if len(own) == 1:
            raise BadSettingError(f"the questions of {category} are about one item, whose pictures cannot be another's: ask more of them")
        following |= zip(own, own[1:] + own[:1])
    return [replace(s, instead=following[s.item]) for s in asked]


def _first(split: str, category: str, count: int) -> list[HardSample]:
    """The first questions of a category, without those whose answer its form has had more often than others, so that none pays."""
    out: list[HardSample] = []
    had = {name: dict.fromkeys(form.answers, 0) for name, form in FORMS.items()}
    index = 0
    while len(out) < count:
        item = make_item(split, index, category)
        for question in item.benchmark:
            counts = had[question.form]
            if counts[question.answer] <= sum(counts.values()) / len(counts) + SLACK:
                counts[question.answer] += 1
                out.append(HardSample(item, question))
        index += 1
    return out[:count]
