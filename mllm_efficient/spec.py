"""The one grammar of specifications: ``"tokenflex:tokens=144 | divprune:keep=0.5"`` to names and settings, and back.

::

    specification = stage { "|" stage }
    stage         = name [ ":" [ setting { "," setting } ] ]  |  "none@" stage
    setting       = name "=" value
    value         = "quoted" or 'quoted', as in YAML: text, in which , and | are letters
                  | [list] or {mapping}, as in YAML
                  | anything else up to the next , or |

White space around each part has no meaning. What a bare value is depends on the setting: for one whose field is annotated ``str``
or ``str | None`` it is that text, whatever it looks like (``weights=2024``), and None where it is empty, ``null`` or ``~``; for any
other it is what YAML makes of it, or a number. ``none@tokenflex:weights=DIR`` is ``none`` with the setting ``on``.

Here are names and text alone: ``registry`` makes methods of them.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import BadSettingError, MllmEfficientError
from .parsing import parse_yaml

BASELINE_ON = "none@"  # before the trained method on whose weights the baseline runs
FILES = (".yaml", ".yml")  # endings of what is no specification but a file of one
NULL = ("", "null", "Null", "NULL", "~")
OPENS, CLOSES = "[{", "]}"
QUOTED = r'"(?:[^"\\]|\\.)*"|' + r"'(?:[^']|'')*'"
TOKEN = re.compile(rf"{QUOTED}|[\[\]{{}}]", re.DOTALL)
SEPARATOR = re.compile(r"""[|,]|=\s*(?=["'\[{])""")  # or the beginning of a value in which a separator is a letter


@dataclass(frozen=True)
class Stage:
    """One method as it is written. settings: their values as they are written, see ``value_of``."""

    name: str
    settings: dict[str, str]


def parse(text: str) -> list[Stage]:
    """The stages of a specification, as they follow each other.

    Raises:
        BadSettingError: a part that is not name=value, a name that is given twice.
    """
    return [_stage(part.strip()) for part in _cut(text, "|")]


def _stage(text: str) -> Stage:
    if text.startswith(BASELINE_ON):
        return Stage("none", {"on": _quoted(text.removeprefix(BASELINE_ON).strip())})
    name, _, rest = text.partition(":")
    settings: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in _cut(rest, ","))):
        key, equals, value = (p.strip() for p in part.partition("="))
        if not equals:
            raise BadSettingError(f"{text!r}: {part!r} is not name=value, as in 'divprune:keep=0.1'")
        if key in settings or key == "method":
            raise BadSettingError(f"{text!r}: {key} is given twice")
        settings[key] = value
    return Stage(name.strip(), settings)


def _cut(text: str, separator: str) -> list[str]:
    """The parts of a text between separators, those within a quoted value, a list or a mapping left alone."""
    parts, start, at = [], 0, 0
    while (found := SEPARATOR.search(text, at)) is not None:
        at = found.end()
        if found.group().startswith("="):
            at = _end_of_value(text, at)
        elif found.group() == separator:
            parts.append(text[start : found.start()])
            start = at
    return [*parts, text[start:]]


def _end_of_value(text: str, at: int) -> int:
    """Where a quoted value, a list or a mapping that begins at a place ends; the end of the text where it is not closed."""
    if TOKEN.match(text, at) is None:
        return len(text)
    depth = 0
    for token in TOKEN.finditer(text, at):
        depth += (token.group() in OPENS) - (token.group() in CLOSES)
        if depth <= 0:
            return token.end()
    return len(text)


def value_of(written: str, text: bool) -> Any:
    """The value of a setting as it is written. text: whether its field is text.

    Raises:
        MllmEfficientError: YAML can make nothing of it.
    """
    if text and not written.startswith(("'", '"', *OPENS)):
        return None if written in NULL else written
    value = parse_yaml(written)
    if isinstance(value, str):  # YAML 1.1 reads 1e-1, nan and inf as text; a user means numbers
        try:
            return float(written)
        except ValueError:
            return value
    return value


def text_fields(cls: type) -> frozenset[str]:
    """The settings of a method's class that are text and nothing else, or None."""
    names = {f.name: set(re.findall(r"\w+", _annotation(f.type))) for f in dataclasses.fields(cls)}
    return frozenset(name for name, said in names.items() if "str" in said and said <= {"str", "None", "NoneType", "Optional", "typing"})


def _annotation(kind: Any) -> str:
    return kind if isinstance(kind, str) else kind.__name__ if isinstance(kind, type) else str(kind)


# ------------------------------------------------------------------------------------------------------------ writing


def write(name: str, settings: Mapping[str, Any], text: Collection[str] = ()) -> str:
    """One stage, which ``parse`` and ``value_of`` read back. text: the settings whose fields are text."""
    parts = [f"{key}={_written(value, key in text)}" for key, value in settings.items()]
    return f"{name}:{','.join(parts)}" if parts else name


def _written(value: Any, text: bool) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return value if _reads_back(value, text) else _quoted(value)
    if isinstance(value, (list, tuple, dict)):
        return json.dumps(value, default=str)  # which is YAML too
    return str(value)


def _reads_back(value: str, text: bool) -> bool:
    """Whether a text stays what it is where it is written bare, first and last in a specification."""
    if not value.isprintable() or value.endswith(FILES):
        return False
    try:
        return parse(f"a:b={value},c=1 | d") == [Stage("a", {"b": value, "c": "1"}), Stage("d", {})] and value_of(value, text) == value
    except MllmEfficientError:
        return False


def _quoted(value: str) -> str:
    import yaml

    return yaml.safe_dump(value, default_style='"', width=float("inf"), allow_unicode=True).strip()


def without(text: str, names: Collection[str]) -> str:
    """A specification that leaves these settings out; every other part is as it was written."""
    return " | ".join(_stage_without(part.strip(), names) for part in _cut(text, "|"))


def _stage_without(text: str, names: Collection[str]) -> str:
    head, _, rest = text.partition(":")
    kept = [part.strip() for part in _cut(rest, ",") if part.strip() and part.partition("=")[0].strip() not in names]
    return f"{head}:{','.join(kept)}" if kept else head
