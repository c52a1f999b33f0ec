"""The forms of question of the harder benchmark: one fixed text each, with slots, and the answers that it may have."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..questions import SUFFIX
from ..scenes import COLOURS, SHAPES, Box

CATEGORIES = ("document", "chart", "scene", "images", "screens", "video")
NAMES = tuple(
    "map sun key cup hat dog pen bus egg fan jar log net owl pig rug tap van web zip fish lamp moon ship".split()
)  # what is written in documents and on screens
NUMBERS = tuple(str(n) for n in range(20))
COLUMNS = tuple("abcdef")  # of tables
ORDER = ("first", "second", "third")
YES_NO = ("yes", "no")
HALVES = ("left", "right", "top", "bottom")
ELEMENTS = ("title", "button", "number", "box")  # of a screen
WAYS = ("left", "right", "up", "down")
MAX_FEW, MAX_TOTAL, MAX_APPEARING, MAX_BARS, TOP = 5, 9, 5, 8, 9

Regions = tuple[tuple[Box, ...], ...]


@dataclass(frozen=True)
class Form:
    """One form of question. answers: all that it may have, whatever fills its slots; as far as possible equally likely."""

    category: str
    template: str
    answers: tuple[str, ...]


FORMS = {
    "field": Form("document", "What is the value of {name}?", NUMBERS),
    "owner": Form("document", "Which name has the value {number}?", NAMES),
    "cell": Form("document", "What is in row {number} column {column}?", NUMBERS),
    "value": Form("chart", "What is the value of the {colour} bar?", NUMBERS[1 : TOP + 1]),
    "highest": Form("chart", "Which bar is highest?", tuple(COLOURS)),
    "lowest": Form("chart", "Which bar is lowest?", tuple(COLOURS)),
    "higher": Form("chart", "Is the {colour} bar higher than the {other} bar?", YES_NO),
    "bars": Form("chart", "How many bars are there?", NUMBERS[2 : MAX_BARS + 1]),
    "total": Form("scene", "How many objects are there?", NUMBERS[1 : MAX_TOTAL + 1]),
    "few": Form("scene", "How many {colour} objects are there?", NUMBERS[: MAX_FEW + 1]),
    "shape": Form("scene", "What shape is the {colour} object?", SHAPES),
    "biggest": Form("scene", "What colour is the biggest object?", tuple(COLOURS)),
    "presence": Form("scene", "Is there {a} {colour} {shape}?", YES_NO),
    "side": Form("scene", "Is the {colour} object on the left or right?", HALVES[:2]),
    "height": Form("scene", "Is the {colour} object at the top or bottom?", HALVES[2:]),
    "same": Form("images", "Are the images the same?", YES_NO),
    "changed": Form("images", "Which shape changed colour?", SHAPES),
    "new": Form("images", "What is the new colour?", tuple(COLOURS)),
    "which": Form("images", "Which image has {a} {colour} {shape}?", ORDER),
    "odd": Form("images", "Which image is different?", ORDER),
    "more": Form("images", "Which image has more objects?", ORDER[:2]),
    "element": Form("screens", "What changed in the last image?", ELEMENTS),
    "title": Form("screens", "What is the title of the {order} image?", NAMES),
    "label": Form("screens", "What is on the {colour} button of the {order} image?", NAMES),
    "number": Form("screens", "What is the number of the {order} image?", NUMBERS),
    "box": Form("screens", "Is the box of the {order} image full?", YES_NO),
    "motion": Form("video", "Which way does the {colour} object move?", WAYS),
    "earliest": Form("video", "Which colour came first?", tuple(COLOURS)),
    "before": Form("video", "Did the {colour} object come before the {other} object?", YES_NO),
    "appeared": Form("video", "How many objects came?", NUMBERS[1 : MAX_APPEARING + 1]),
}


@dataclass(frozen=True)
class Question:
    """One question about an item.

    regions: for each of its pictures, the boxes (in the picture's units) that the answer depends on; none where the answer is that
    something is absent. ``natural`` is the form for other models; those trained on the benchmark are asked ``text``.
    """

    form: str
    text: str
    answer: str
    regions: Regions

    @property
    def category(self) -> str:
        return FORMS[self.form].category

    @property
    def answers(self) -> tuple[str, ...]:
        """All that the form may have."""
        return FORMS[self.form].answers

    @property
    def natural(self) -> str:
        return self.text + SUFFIX


def ask(form: str, answer: str | int, regions: Regions, **slots: str) -> Question:
    """A question of a form, with its slots filled."""
    if "shape" in slots:
        slots["a"] = "an" if slots["colour"][0] in "aeiou" else "a"
    return Question(form, FORMS[form].template.format(**slots), str(answer), regions)


def vocabulary() -> tuple[str, ...]:
    """Every word and sign of a question's ``text`` and of an answer, each once, in an order that does not change."""
    texts = [re.sub(r"{\w+}", " ", form.template).lower() for form in FORMS.values()]
    found = [word for text in texts for word in re.findall(r"\w+|[^\w\s]", text)]
    slots = ("a", "an", "last", *COLOURS, *SHAPES, *NAMES, *NUMBERS, *COLUMNS)
    answers = [answer for form in FORMS.values() for answer in form.answers]
    return tuple(dict.fromkeys([*found, *slots, *answers]))
