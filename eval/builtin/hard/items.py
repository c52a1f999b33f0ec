"""Items: the pictures of one prompt and the questions about them, drawn from a seeded stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..scenes import SPLITS, Stream
from .canvas import Picture
from .charts import chart
from .comparisons import comparison
from .crowds import crowd
from .documents import document
from .forms import CATEGORIES, Question
from .screens import session
from .videos import video

MAKERS: dict[str, Callable[[Stream], tuple[list[Picture], list[Question]]]] = {
    "document": document, "chart": chart, "scene": crowd, "images": comparison, "screens": session, "video": video,
}  # fmt: skip
_SEED = 2027


@dataclass(frozen=True)
class Item:
    """The pictures of a prompt, in its order, and the questions about them. video: the pictures are the frames of one video.

    Questions of one form stand in random order, so that the first of each is as good as any.
    """

    split: str
    index: int
    category: str
    pictures: tuple[Picture, ...]
    questions: tuple[Question, ...]

    @property
    def video(self) -> bool:
        return self.category == "video"

    @property
    def benchmark(self) -> tuple[Question, ...]:
        """The questions of the benchmark: the first of each form."""
        return tuple({q.form: q for q in reversed(self.questions)}.values())[::-1]


def make_item(split: str, index: int, category: str) -> Item:
    """Item number ``index`` of a category in a split ("train", "val" or "test"). The splits use different keys of the stream."""
    pictures, questions = MAKERS[category](Stream(_SEED, SPLITS[split], CATEGORIES.index(category), index))
    return Item(split, index, category, tuple(pictures), tuple(questions))
