"""Whether an answer in a model's own words is the right one.

Case, punctuation, articles and the spelling of numbers never matter. For a question of the embedded benchmark the answer
is looked for in what the model says, among the choices that the question leaves.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING

from .builtin.hard import Question as HardQuestion

if TYPE_CHECKING:
    from .builtin.suites import AnyQuestion

NORMALISATION = "words/1"  # another number whenever a rule here changes: answers judged by different rules are not mixed
ARTICLES = frozenset({"a", "an", "the"})
_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
).split()
_TENS = {word: 10 * i for i, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), start=2)}
NUMBERS = {word: i for i, word in enumerate(_UNITS)} | _TENS
_WORD = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?!\w)|\w+")
_PART = re.compile(r"[.:;()!?\n]+(?!\d)")  # parts of a text; a comma only lists
PAUSE = "|"
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation, numbers in digits: ``["there", "are", "21"]``."""
    text = unicodedata.normalize("NFKC", text).lower().replace("\u2019", "'").replace("cannot", "can not")
    text = re.sub(r"n't\b", " not", text).replace("'", "")
    out: list[str] = []
    tens = None  # the "twenty" of "twenty-one", which units may follow
    for match in _WORD.finditer(text):
        word = match.group()
        value = NUMBERS.get(word)
        if value is None:
            digits = word.replace(",", "")
            out.append(f"{Decimal(digits).normalize():f}" if _NUMBER.fullmatch(digits) else word)
        elif tens is not None and 1 <= value <= 9:
            out[-1] = str(tens + value)
        else:
            out.append(str(value))
        tens = _TENS.get(word)
    return out


def normalise(text: str) -> str:
    """``"The two cats."`` is ``"2 cats"``. A text without a word, or of articles alone, keeps what it has."""
    found = words(text)
    return " ".join([w for w in found if w not in ARTICLES] or found) or text.strip()


def matches(answer: str, expected: Sequence[str]) -> bool:
    """Whether an answer equals one of those expected after normalisation, or begins with it (``"Yes, it is."``)."""
    said, bare = words(answer), normalise(answer).split()
    for one in expected:
        wanted, short = words(one), normalise(one).split()
        if normalise(answer) == normalise(one) or (wanted and wanted == said[: len(wanted)]) or (wanted and short == bare[: len(short)]):
            return True
    return False


# ------------------------------------------------------------------------------ questions of the embedded benchmark

Choices = dict[str, tuple[str, ...]]
COLOUR_NAMES: Choices = {
    "red": (), "green": (), "blue": (), "yellow": (), "orange": (), "pink": (),
    "purple": ("violet",), "cyan": ("turquoise", "aqua", "teal", "light blue", "sky blue"),
}  # fmt: skip
SHAPE_NAMES: Choices = {
    "circle": ("disc", "disk", "dot", "circular"), "square": (), "triangle": ("triangular",), "cross": ("plus", "plus sign"),
    "ring": ("donut", "doughnut", "annulus"),
}  # fmt: skip
SIDES: Choices = {"left": ("leftmost", "lefthand"), "right": ("rightmost", "righthand")}
HALVES: Choices = {"top": ("upper", "uppermost", "topmost", "higher"), "bottom": ("lower", "lowermost", "bottommost")}
RELATIONS: Choices = {
    "above": ("over", "higher", "on top", "top", "upper"), "below": ("under", "underneath", "beneath", "lower", "bottom"),
}  # fmt: skip
DIGITS: Choices = {str(i): () for i in range(10)} | {
    "none": ("no", "nothing", "nil", "empty", "blank", "not any", "not a digit", "not a number", "not visible", "not present"),
}
COUNTS: Choices = {str(i): () for i in range(100)} | {"0": ("no", "none"), "1": ("single",)}
YES_NO: Choices = {"yes": ("yeah", "yep", "true", "correct"), "no": ("nope", "false", "incorrect", "not", "none")}
LARGER: Choices = {
    "yes": (*YES_NO["yes"], "larger", "bigger", "greater", "not smaller", "not less"),
    "no": (*YES_NO["no"], "smaller", "less", "equal", "same", "not larger", "not bigger", "not greater"),
}
ELEMENTS: Choices = {"box": ("checkbox", "check box"), "button": ("label",), "number": ("counter",), "title": ("heading", "header")}
PLACES: Choices = {"first": ("1", "1st"), "second": ("2", "2nd"), "third": ("3", "3rd")}
WAYS: Choices = {**SIDES, "up": ("upward", "upwards", "top"), "down": ("downward", "downwards", "bottom")}
# of the harder benchmark, whose questions say themselves which answers they leave
OTHER_NAMES: Choices = {**COUNTS, **COLOUR_NAMES, **SHAPE_NAMES, **WAYS, **HALVES, **YES_NO, **ELEMENTS, **PLACES}

UNSURE = ("no idea", "not sure", "not certain", "not clear", "not know", "not tell", "not determine")  # "no" and "not" of no answer
NEGATIONS = frozenset({"not", "neither", "nor"})
BETWEEN = frozenset({"or", "and", "nor", *ARTICLES})
AFFIRMATIVE = frozenset({("there", "is"), ("there", "are"), ("theres",), ("i", "see")})


def choices(question: AnyQuestion) -> Choices:
    """The answers that a question leaves, each with its other names."""
    if isinstance(question, HardQuestion):
        return {answer: OTHER_NAMES.get(answer, ()) for answer in question.answers}
    text = question.text
    if question.category in ("object", "attribute"):
        return COLOUR_NAMES if "colour" in text else SHAPE_NAMES
    if question.category == "reading":
        return DIGITS
    if question.category == "count":
        return COUNTS
    for marker, found in (("left or right", SIDES), ("top or bottom", HALVES), ("above or below", RELATIONS), ("larger", LARGER)):
        if marker in text:
            return found
    return YES_NO


def judge(question: AnyQuestion, text: str) -> tuple[str, bool]:
    """The answer found in a text, by its name in the benchmark (or the text itself, normalised), and whether it is right."""
    found = said(text, choices(question), question.text)
    return (normalise(text)[:80] if found is None else found), found == question.answer


def said(text: str, among: Choices, question: str = "") -> str | None:
    """The choice that a text names first, or None.

    A question that is repeated in front is passed over. Named but not meant: what follows "not" (unless the choices
    have a "no"), and choices listed side by side in one part of a sentence ("left or right", "red, blue").
    """
    spoken, echo = [w for part in _PART.split(text) for w in (*words(part), PAUSE)], words(question)
    if echo and spoken[: len(echo)] == echo:
        spoken = spoken[len(echo) + 1 :]
    found = list(_mentions(spoken, among))
    if not found:
        begins = any(tuple(spoken[: len(start)]) == start for start in AFFIRMATIVE)
        return "yes" if begins and "yes" in among else None
    name, _, end = found[0]
    for other, start, _ in found[1:]:
        if other != name:
            return None if all(w in BETWEEN for w in spoken[end:start]) else name
    return name


def _mentions(spoken: list[str], among: Choices) -> Iterator[tuple[str, int, int]]:
    """(choice, start, end) of every choice that is named and meant; the longest name at each place."""
    names = _table(tuple((choice, *others) for choice, others in among.items()))
    negated, at = False, 0
    while at < len(spoken):
        found, length = None, 1
        for n in (3, 2, 1):
            part = " ".join(spoken[at : at + n]) if at + n <= len(spoken) else ""
            found = next((names[form] for form in _forms(part) if form in names), None)
            if found is not None:
                length = n
                break
        if found == "1" and at and spoken[at - 1] in ("the", "this", "that"):  # "the one on the left"
            found = None
        if found is None:
            negated = negated or spoken[at] in NEGATIONS
        elif negated:
            negated = False
        elif found:
            yield found, at, at + length
        at += length


def _forms(word: str) -> tuple[str, ...]:
    """A word and what it is the plural of."""
    return (word, word[:-1], word[:-2]) if word.endswith("es") else (word, word[:-1]) if word.endswith("s") else (word,)


@functools.cache
def _table(names: tuple[tuple[str, ...], ...]) -> dict[str, str]:
    return {name: choice for choice, *others in names for name in (choice, *others)} | dict.fromkeys(UNSURE, "")
