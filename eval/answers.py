"""Answers compared as people compare them: without case, punctuation, articles, or numbers spelled out."""

from __future__ import annotations

import re

from .builtin.scenes import COLOURS, SHAPES

LABELS = (
    set(COLOURS), set(SHAPES), {*map(str, range(10)), "none"}, {"yes", "no"}, {"left", "right"}, {"top", "bottom"}, {"above", "below"},
)  # fmt: skip
SYNONYMS = {"gray": "grey", "violet": "purple", "upper": "top", "lower": "bottom", "over": "above", "under": "below", "plus": "cross"}
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
WORDS = {word: str(i) for i, word in enumerate(NUMBERS)}
ARTICLES = {"a", "an", "the"}


def normalised(text: str) -> str:
    """Lower case, words and numbers alone, articles left out, numbers up to twelve in digits."""
    words = re.findall(r"(?:(?<!\w)-(?=\d))?[^\W_]+(?:\.\d+)?", text.lower())
    kept = [w for w in words if w not in ARTICLES] or words  # "A" is an answer where nothing else is said
    return " ".join(WORDS.get(w, w) for w in kept)


def holds(text: str, answer: str) -> bool:
    """Whether an answer says what is asked for: the same text, or a longer one that begins with it."""
    said, wanted = normalised(text).split(), normalised(answer).split()
    return bool(wanted) and said[: len(wanted)] == wanted


def label(text: str, answer: str) -> str:
    """The first word of an answer that could be one to the question that ``answer`` is right for, else its first word.

    So that "The big object is red." is red, and "There are three." is 3.
    """
    words = [SYNONYMS.get(w, w) for w in normalised(text).split()]
    possible = next((labels for labels in LABELS if answer in labels), {answer})
    if "none" in possible:
        words = ["none" if w in ("no", "nothing", "empty") else w for w in words]
    return next((w for w in words if w in possible), words[0] if words else "")
