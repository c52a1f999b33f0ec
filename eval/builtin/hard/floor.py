"""What can be scored on the harder benchmark without its images. Prints it for every category:

    python -m mllm_efficient.eval.builtin.hard.floor [SPLIT]

Two answerers that see no image learn from the training split and are asked the other: one gives the most frequent answer of each form
of question, the other that of each exact text. The floor of a category is the better score of both, ``upper`` the end of its 95%
interval, for all categories at once. ``chance`` is the score of drawing among the answers of a form.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from mllm_efficient.errors import MllmEfficientError, run_as_command
from mllm_efficient.stats import TAIL, proportion

from .forms import CATEGORIES, Question
from .items import make_item
from .suite import samples

TRAIN_ITEMS = 1500  # of each category
Answerer = Callable[[Question], str]


@dataclass(frozen=True)
class Floor:
    """One category's floor, in percent."""

    category: str
    questions: int
    chance: float
    by_form: float
    by_text: float
    upper: float

    @property
    def floor(self) -> float:
        return max(self.by_form, self.by_text)


def learnt(seen: Iterable[Question], key: Callable[[Question], str], otherwise: Answerer | None = None) -> Answerer:
    """Answers with what was most frequent among the seen questions of the same key. otherwise: where the key is new."""
    counts: dict[str, Counter[str]] = {}
    for question in seen:
        counts.setdefault(key(question), Counter())[question.answer] += 1
    best = {k: count.most_common(1)[0][0] for k, count in counts.items()}

    def answer(question: Question) -> str:
        known = best.get(key(question))
        return known if known is not None else otherwise(question) if otherwise is not None else question.answers[0]

    return answer


def accuracy(answerer: Answerer, asked: Sequence[Question]) -> float:
    """Percent right."""
    return 100 * sum(answerer(q) == q.answer for q in asked) / len(asked)


def blind(category: str, items: int = TRAIN_ITEMS) -> tuple[Answerer, Answerer]:
    """The answerers of a category, by form and by text."""
    seen = [q for index in range(items) for q in make_item("train", index, category).questions]
    by_form = learnt(seen, lambda q: q.form)
    return by_form, learnt(seen, lambda q: q.text, by_form)


def floor_of(category: str, asked: Sequence[Question], items: int = TRAIN_ITEMS) -> Floor:
    """The floor of questions of one category."""
    by_form, by_text = (accuracy(answerer, asked) for answerer in blind(category, items))
    chance = 100 * sum(1 / len(q.answers) for q in asked) / len(asked)
    right = max(by_form, by_text) * len(asked) / 100
    upper = 100 * proportion(right, len(asked), TAIL / len(CATEGORIES))[1]
    return Floor(category, len(asked), chance, by_form, by_text, upper)


def floors(asked: Sequence[Question]) -> dict[str, dict[str, float]]:
    """Floor, the upper end of its interval, and chance of each category that there are questions of, in percent."""
    by_category = {c: [q for q in asked if q.category == c] for c in CATEGORIES}
    found = [floor_of(category, own) for category, own in by_category.items() if own]
    return {f.category: {"floor": round(f.floor, 2), "upper": round(f.upper, 2), "chance": round(f.chance, 2)} for f in found}


def main(argv: Sequence[str]) -> int:
    split = argv[0] if argv else "test"
    if len(argv) > 1 or split not in ("test", "val"):
        raise MllmEfficientError("usage: python -m mllm_efficient.eval.builtin.hard.floor [test | val]")
    print(f"{'category':<12}{'questions':>10}{'chance':>9}{'by form':>9}{'by text':>9}{'floor':>8}{'upper':>8}")
    for category in CATEGORIES:
        f = floor_of(category, [s.question for s in samples(split, categories=[category])])
        print(f"{category:<12}{f.questions:>10}{f.chance:>9.1f}{f.by_form:>9.1f}{f.by_text:>9.1f}{f.floor:>8.1f}{f.upper:>8.1f}")
    return 0


if __name__ == "__main__":
    run_as_command(main)
