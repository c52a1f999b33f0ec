"""The embedded benchmark as a list of samples."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .questions import CATEGORIES, Question, benchmark_questions
from .regions import cells_over
from .scenes import UNITS, make_scene

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

    from mllm_efficient.tokens import Plane

SCENES = 900  # of a split; about 6,000 questions


@dataclass(frozen=True)
class Sample:
    """One question about one image. ``image`` names the image, for resampling; ``key`` seeds methods that draw."""

    split: str
    image: int
    question: Question

    @property
    def id(self) -> str:
        return f"{self.split}/{self.image}/{self.question.category}"

    @property
    def key(self) -> str:
        return f"builtin/{self.split}/{self.image}"

    @property
    def task(self) -> str:
        return self.question.category

    @property
    def video(self) -> bool:
        return False

    @property
    def keys(self) -> list[str]:
        """A name for each image of the prompt."""
        return [self.key]

    def picture(self, size: int) -> Picture:
        return _picture(self.split, self.image, size)

    def sizes(self, size: int) -> list[tuple[int, int]]:
        """(width, height) of each picture."""
        return [(size, size)]

    def pictures(self, size: int) -> list[Picture]:
        return [self.picture(size)]

    def region(self, planes: Sequence[Plane], number: int = 0) -> np.ndarray:
        """(N,) which tokens the answer depends on: those whose cells overlap the question's boxes.

        planes: the rectangles that the tokens form, placed on the picture, which is the only one of the prompt.
        """
        return np.concatenate([cells_over(plane, self.boxes()).ravel() for plane in planes])

    def boxes(self, number: int = 0) -> list[tuple[float, float, float, float]]:
        """What the answer depends on, (top, left, bottom, right) in fractions of the picture."""
        return [(b.top / UNITS, b.left / UNITS, b.bottom / UNITS, b.right / UNITS) for b in self.question.region]


@functools.lru_cache(maxsize=64)
def _picture(split: str, index: int, size: int) -> Picture:
    from PIL import Image

    return Image.fromarray(make_scene(split, index).draw(size))


def samples(
    split: str = "test", limit: int | None = None, scenes: int = SCENES, categories: Sequence[str] = CATEGORIES
) -> list[Sample]:  # fmt: skip
    """The questions of a split, image after image, of which ``limit`` takes the first by ``round_robin``."""
    return sorted(round_robin(split, limit, scenes, categories), key=lambda s: (s.image, CATEGORIES.index(s.task)))


def round_robin(
    split: str = "test", limit: int | None = None, scenes: int = SCENES, categories: Sequence[str] = CATEGORIES
) -> list[Sample]:  # fmt: skip
    """The first question of each category, then the second of each, and so on."""
    by_category: dict[str, list[Sample]] = {c: [] for c in categories}
    for index in range(scenes):
        for question in benchmark_questions(make_scene(split, index)):
            if question.category in by_category:
                by_category[question.category].append(Sample(split, index, question))
        if limit is not None and all(len(v) * len(categories) >= limit for v in by_category.values()):
            break
    longest = max(len(v) for v in by_category.values())
    return [v[i] for i in range(longest) for v in by_category.values() if i < len(v)][:limit]
