"""The embedded benchmark as a list of samples."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .questions import CATEGORIES, Question, benchmark_questions
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

    def picture(self, size: int) -> Picture:
        return _picture(self.split, self.image, size)

    def region(self, grid: tuple[int, int]) -> set[int]:
        """Tokens of a grid that the answer depends on: the cells that the question's boxes overlap."""
        rows, cols = grid
        cells: set[int] = set()
        for box in self.question.region:
            top, bottom = max(box.top, 0) * rows // UNITS, (min(box.bottom, UNITS) - 1) * rows // UNITS
            left, right = max(box.left, 0) * cols // UNITS, (min(box.right, UNITS) - 1) * cols // UNITS
            cells |= {r * cols + c for r in range(top, bottom + 1) for c in range(left, right + 1)}
        return cells

    def region_of(self, planes: Sequence[Plane]) -> set[int]:
        """``region`` of tokens that form several planes, each over a box of the picture."""
        tokens: set[int] = set()
        start = 0
        for plane in planes:
            top, left, bottom, right = plane.box
            high, wide = (bottom - top) * UNITS / max(plane.rows, 1), (right - left) * UNITS / max(plane.columns, 1)
            for box in self.question.region if len(plane) else ():
                rows = _touched(box.top, box.bottom, top * UNITS, high, plane.rows)
                columns = _touched(box.left, box.right, left * UNITS, wide, plane.columns)
                tokens |= {start + r * plane.columns + c for r in rows for c in columns}
            start += len(plane)
        return tokens


def _touched(low: int, high: int, start: float, step: float, cells: int) -> range:
    """Cells of ``step`` units from ``start`` on that overlap [low, high) within the picture."""
    low, high = max(low, 0), min(high, UNITS)
    first, last = math.floor((low - start) / step + 1e-9), math.ceil((high - start) / step - 1e-9)
    return range(max(first, 0), min(last, cells))


@functools.lru_cache(maxsize=64)
def _picture(split: str, index: int, size: int) -> Picture:
    from PIL import Image

    return Image.fromarray(make_scene(split, index).draw(size))


def samples(split: str = "test", limit: int | None = None, scenes: int = SCENES) -> list[Sample]:
    """The questions of a split, image after image; ``limit`` takes them round-robin over the categories first."""
    by_category: dict[str, list[Sample]] = {c: [] for c in CATEGORIES}
    for index in range(scenes):
        for question in benchmark_questions(make_scene(split, index)):
            by_category[question.category].append(Sample(split, index, question))
        if limit is not None and all(len(v) * len(CATEGORIES) >= limit for v in by_category.values()):
            break
    longest = max(len(v) for v in by_category.values())
    chosen = [v[i] for i in range(longest) for v in by_category.values() if i < len(v)][:limit]
    return sorted(chosen, key=lambda s: (s.image, CATEGORIES.index(s.task)))
