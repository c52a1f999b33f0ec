"""The package's errors. Each message is one line that says what to type instead."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn


class MllmEfficientError(ValueError):
    """Bad input or an unsupported setting; the command line turns it into one line and exit code 2."""


class UnknownMethodError(MllmEfficientError):
    """A method name that nothing registered."""


class BadBudgetError(MllmEfficientError):
    """A token budget that cannot be honoured."""


class MissingBudgetError(BadBudgetError):
    """A method that needs a token budget and was given none."""


class UnsupportedModelError(MllmEfficientError):
    """A model that no adapter knows, or a wrapper around one (DDP, FSDP, torch.compile)."""


class CountMismatchError(MllmEfficientError):
    """Placeholders, features or lengths that do not belong together."""


class NotFiniteError(CountMismatchError):
    """Features, states or scores that hold NaN or infinity, which have no order."""


class BadSettingError(BadBudgetError):
    """A setting of a method, other than its budget, that cannot be honoured."""


class AlreadyWrappedError(MllmEfficientError):
    """``wrap`` on a model that is wrapped."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` - did you mean 'x' or 'y'?`` for the nearest known words, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=2)
    return f" - did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def shortened(value: object, length: int = 80) -> str:
    """A value of the user's in one line of at most so many characters, for a message."""
    text = " ".join(str(value).split()) if not isinstance(value, bytes) else f"{len(value):,} bytes"
    return text if len(text) <= length else text[: length - 1] + "…"


def quoted(value: object, length: int = 80) -> str:
    """A value as Python writes it, in one line of at most so many characters, for a message."""
    try:
        return shortened(repr(value), length)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a list in itself
        return f"a {type(value).__name__} that is too long to show"


def run_as_command(main: Callable[[list[str]], int]) -> NoReturn:
    """Ends the process with what ``main`` gives for its arguments; an error of this package is one line on stderr and exit code 2."""
    try:
        raise SystemExit(main(sys.argv[1:]))
    except MllmEfficientError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
