"""The embedded benchmarks by name: what each asks, and whether a model takes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mllm_efficient.errors import MllmEfficientError
from mllm_efficient.loading.processor import why_no_videos

from . import architecture, chat, questions, suite
from .architecture import WORDS
from .hard import forms, vocabulary
from .hard import suite as hard
from .hard.floor import floors

if TYPE_CHECKING:
    from PIL.Image import Image

    from mllm_efficient.tokens import Plane

# of the embedded models, which are trained on these benchmarks alone: vocabulary, and pixels of the first benchmark's square pictures
TRAINED = (
    (architecture.VOCABULARY, architecture.IMAGE_SIZE),
    (chat.VOCABULARY, chat.IMAGE_SIZE),
)
VIDEO = "video"  # the category of videos


class AnyQuestion(Protocol):
    """What an evaluation needs of a question."""

    text: str
    answer: str

    @property
    def category(self) -> str: ...

    @property
    def natural(self) -> str: ...


class AnySample(Protocol):
    """What an evaluation needs of a question about one image, several, or a video."""

    @property
    def question(self) -> Any: ...  # an AnyQuestion

    @property
    def image(self) -> Any: ...

    @property
    def id(self) -> str: ...

    @property
    def task(self) -> str: ...

    @property
    def video(self) -> bool: ...

    @property
    def keys(self) -> list[str]: ...

    def sizes(self, size: int) -> list[tuple[int, int]]: ...

    def pictures(self, size: int) -> list[Image]: ...

    def region(self, planes: Sequence[Plane], number: int = 0) -> np.ndarray: ...


@dataclass(frozen=True)
class Suite:
    """One embedded benchmark. words: all of its questions and answers. samples: of (split, limit, categories)."""

    name: str
    categories: tuple[str, ...]
    words: frozenset[str]
    samples: Callable[[str, int | None, Sequence[str]], Sequence[AnySample]]
    floors: Callable[[Sequence[Any]], dict[str, Any]] | None = None

    def blind(self, asked: Sequence[AnySample]) -> dict[str, Any]:
        """What a results file says of what can be scored without images by answers learnt from the training split, where that is known."""
        return {} if self.floors is None else {"blind_floor": self.floors([s.question for s in asked])}

    def spoken_by(self, tokenizer: Any) -> bool:
        """Whether a tokenizer is that of a model trained on this benchmark, which is asked the questions as they are."""
        known = tokenizer.get_vocab()
        return any(known == own for own, _ in TRAINED) and self.words <= known.keys()

    def note(self, tokenizer: Any) -> str | None:
        """A line on words of the benchmark that a tokenizer does not have at all."""
        unknown = tokenizer.unk_token_id
        missing = (
            [] if unknown is None else [w for w in sorted(self.words) if unknown in tokenizer(w, add_special_tokens=False)["input_ids"]]
        )
        few = f"{', '.join(missing[:3])} and {len(missing) - 3} more" if len(missing) > 4 else ", ".join(missing)
        return f"this model's vocabulary lacks words of {self.name} ({few}): it was not trained for it" if missing else None

    def chosen(self, categories: str | None, processor: Any) -> tuple[tuple[str, ...], str | None]:
        """The categories of ``a,b`` (None: all that a model takes), and a line on one that is left out.

        Raises:
            MllmEfficientError: a category that there is not, or that was asked for and the model does not take.
        """
        able = getattr(processor, "video_processor", None) is not None
        if categories is None:
            missing = VIDEO in self.categories and not able
            kept = tuple(c for c in self.categories if able or c != VIDEO)
            return kept, f"without the category {VIDEO}: {why_no_videos(processor)}" if missing else None
        names = tuple(dict.fromkeys(part.strip() for part in categories.split(",") if part.strip()))
        unknown = [name for name in names if name not in self.categories]
        if unknown or not names:
            raise MllmEfficientError(f"--categories {categories!r}: {self.name} has {', '.join(self.categories)}")
        if VIDEO in names and not able:
            raise MllmEfficientError(f"--categories {categories!r}: {why_no_videos(processor)}")
        return tuple(c for c in self.categories if c in names), None

    def asks(self, categories: str | None, processor: Any, say: Callable[[str], None]) -> tuple[str, ...]:
        """``chosen``; says what is left out and which words the model does not know."""
        kept, left_out = self.chosen(categories, processor)
        for line in filter(None, (left_out, self.note(processor.tokenizer))):
            say(line)
        return kept


BUILTIN = Suite(
    "builtin", questions.CATEGORIES, frozenset(WORDS), lambda split, limit, chosen: suite.samples(split, limit, categories=chosen)
)
HARD = Suite("builtin-hard", forms.CATEGORIES, frozenset(vocabulary()), hard.samples, floors)
SUITES = {s.name: s for s in (BUILTIN, HARD)}


def asked_size(tokenizer: Any) -> int | None:
    """Pixels of the first benchmark's square pictures, as an embedded model is asked it; None for any other model."""
    known = tokenizer.get_vocab()
    return next((size for own, size in TRAINED if known == own), None)


def embedded_suite(name: str | None) -> Suite:
    """A suite by its name; None is the first."""
    return BUILTIN if name is None else SUITES[name]
