"""Arguments of the commands in Python: what they may be, and errors in words for what they may not. Nothing here asks a model."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

from mllm_efficient.compressors.base import Compressor
from mllm_efficient.errors import BadSettingError, MllmEfficientError
from mllm_efficient.media.images import RANGES

Method = str | dict[str, Any] | Compressor
Methods = Method | Sequence[Method]
Many = int | Sequence[int]
P = ParamSpec("P")
R = TypeVar("R")


def named_as_arguments(*more: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """For a command in Python: an error of what lies below that names ``--an-option`` names ``an_option`` instead. more: what
    ``**kwargs`` may hold."""

    def decorated(run: Callable[P, R]) -> Callable[P, R]:
        names = {f"--{name.replace('_', '-')}": name for name in (*inspect.signature(run).parameters, *more)}
        names["--method"] = names["--methods"]

        @functools.wraps(run)
        def called(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return run(*args, **kwargs)
            except MllmEfficientError as error:
                said = re.sub(r"--[a-z]+(-[a-z]+)*", lambda found: names.get(found[0], found[0]), str(error))
                if said != str(error):
                    error.args = (said,)
                raise

        return called

    return decorated


def require_effect(public: bool, data: Any, of_tasks: dict[str, Any], **given: Any) -> None:
    """Raises for an argument that has no effect on what is asked."""
    source = "public tasks" if public else "data" if data is not None else "the embedded benchmark"
    without = {
        "public tasks": ("categories", "split", "turns", "corrupt", "against"),
        "data": ("categories", "split", "turns", "corrupt"),
        "the embedded benchmark": ("max_new_tokens", "image_range"),
    }
    for name in (*without[source], *(() if public else of_tasks)):
        if given.get(name, of_tasks.get(name)) is not None:
            raise BadSettingError(f"{name}= has no effect on {source}: leave it out")


def require_sources(**given: Any) -> None:
    """Raises where a suite, tasks and data are given together."""
    there = [name for name, value in given.items() if value is not None]
    if len(there) > 1:
        raise BadSettingError(f"{' and '.join(there)} say each what is asked: give one of them")


def require_whole(least: int = 1, **given: Any) -> None:
    """Raises for an argument that is given and no whole number from ``least``."""
    for name, value in given.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise BadSettingError(f"{name}={value!r} is not a whole number from {least}")


def one_of(name: str, value: Any, among: Sequence[Any]) -> Any:
    """The value. Raises ``BadSettingError`` for one that is not among some."""
    if value not in among:
        raise BadSettingError(f"{name}={value!r} is not one of {', '.join(map(repr, among))}")
    return value


def several(name: str, value: Many, least: int) -> list[int]:
    """One whole number or several as a list. Raises ``BadSettingError`` for any below ``least``."""
    values = list(value) if isinstance(value, Sequence) else [value]
    if not values or any(isinstance(v, bool) or not isinstance(v, int) or v < least for v in values):
        raise BadSettingError(f"{name}={value!r} is not a whole number from {least} or a list of such")
    return values


def budgets(keep: float | Sequence[float] | None, tokens: Many | None) -> list[str]:
    """``keep=[0.5]`` as ``["keep=0.5"]``; each is tried as a budget."""
    from mllm_efficient.budget import Budget

    if keep is not None and tokens is not None:
        raise BadSettingError("keep and tokens are two ways to say one thing: give one of them")
    name, given = ("keep", keep) if tokens is None else ("tokens", tokens)
    values: Sequence[Any] = () if given is None else given if isinstance(given, Sequence) else [given]
    for value in values:
        Budget(**{name: value})
    return list(dict.fromkeys(f"{name}={value}" for value in values))


def many(methods: Methods) -> list[Any]:
    """Methods as a list; one alone is a list of one."""
    return [methods] if isinstance(methods, str | dict | Compressor) else list(methods)


def or_usual(value: Any, usual: Any) -> Any:
    """What is given; the usual value for None, and for None alone."""
    return usual if value is None else value


def unusual_range(image_range: str) -> str | None:
    """How pictures of more than 8 bits are read; None where it is the usual way. Raises ``BadSettingError`` for one there is not."""
    return None if one_of("image_range", image_range, RANGES) == "full" else image_range


def listed(names: Sequence[str] | None) -> str | None:
    """Names with commas between them."""
    return names if names is None or isinstance(names, str) else ",".join(names)
