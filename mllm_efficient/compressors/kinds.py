"""The kinds of method, in the order in which they run, and the letters that named them up to version 0.1."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import Compressor

PROJECTOR, PRE_LLM, IN_LLM = "projector", "pre_llm", "in_llm"
ORDER = (PROJECTOR, PRE_LLM, IN_LLM)
LETTERS = dict(zip(ORDER, "JPL"))
JOIN = " | "  # between the kinds of a composition


def letters_of(kind: str) -> str:
    """``"P"`` of ``"pre_llm"``, ``"JL"`` of ``"projector | in_llm"``; a kind that is none of ours stays as it is."""
    return "".join(LETTERS.get(part, part) for part in kind.split(JOIN))


class OldFamily:
    """``family`` of a method or of its class, the letters of its ``kind``. Reading it warns; it goes with version 0.3."""

    def __get__(self, method: Compressor | None, cls: type[Compressor]) -> str:
        warnings.warn("family is now kind: pre_llm, projector or in_llm; it goes with version 0.3", DeprecationWarning, stacklevel=2)
        return letters_of((cls if method is None else method).kind)


def read_old_family(cls: Any) -> None:
    """Gives a class whose body sets ``family = "L"`` the ``kind`` that this letter meant, with a warning."""
    letter = cls.__dict__.get("family")
    if not isinstance(letter, str):
        return
    cls.kind = next((kind for kind, known in LETTERS.items() if known == letter), letter)
    above = sum("__init_subclass__" in vars(base) for base in cls.__mro__[1:-1])  # each of which has called the next
    warnings.warn(
        f"{cls.__name__}: family={letter!r} is now kind={cls.kind!r}, and the old name goes with version 0.3",
        DeprecationWarning,
        stacklevel=2 + above,
    )
