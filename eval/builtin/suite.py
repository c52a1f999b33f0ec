"""The embedded benchmark as a list of samples."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .questions import CATEGORIES, Question, benchmark_questions
from .scenes import UNITS, make_scene

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

    from mllm_efficient.tokens import Plane

SCENES = 900  # of a split; about 6,000 questions
ROUNDING = 1e-6  # units


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

    def picture(self, size: int) -> Picture:
        return _picture(self.split, self.image, size)

    def region(self, planes: Sequence[Plane]) -> np.ndarray:
        """(N,) which tokens the answer depends on: those whose cells overlap the question's boxes.

        planes: the rectangles that the tokens form, placed on the picture.
        """
        return np.concatenate([self._cells(plane).ravel() for plane in planes])

    def _cells(self, plane: Plane) -> np.ndarray:
        """(rows, columns) of a plane."""
        top, left, bottom, right = (UNITS * side for side in plane.box)
        y = np.linspace(top, bottom, plane.rows + 1)
        x = np.linspace(left, right, plane.columns + 1)
        inside = np.zeros((plane.rows, plane.columns), dtype=bool)
        for box in self.question.region:  # a touching edge, up to rounding, is no overlap
            rows = (y[:-1] < min(box.bottom, UNITS) - ROUNDING) & (y[1:] > max(box.top, 0) + ROUNDING)
            columns = (x[:-1] < min(box.right, UNITS) - ROUNDING) & (x[1:] > max(box.left, 0) + ROUNDING)
            inside |= rows[:, None] & columns
        return inside


@functools.lru_cache(maxsize=64)
def _picture(split: str, index: int, size: int) -> Picture:
    from PIL import Image

    return Image.fromarray(make_scene(split, index).draw(size))


def samples(split: str = "test", limit: int | None = None, scenes: int = SCENES) -> list[Sample]:
    """The questions of a split, image after image, of which ``limit`` takes the first by ``round_robin``."""
    return sorted(round_robin(split, limit, scenes), key=lambda s: (s.image, CATEGORIES.index(s.task)))


def round_robin(split: str = "test", limit: int | None = None, scenes: int = SCENES) -> list[Sample]:
    """The first question of each category, then the second of each, and so on."""
    by_category: dict[str, list[Sample]] = {c: [] for c in CATEGORIES}
    for index in range(scenes):
        for question in benchmark_questions(make_scene(split, index)):
            by_category[question.category].append(Sample(split, index, question))
        if limit is not None and all(len(v) * len(CATEGORIES) >= limit for v in by_category.values()):
            break
    longest = max(len(v) for v in by_category.values())
    return [v[i] for i in range(longest) for v in by_category.values() if i < len(v)][:limit]
