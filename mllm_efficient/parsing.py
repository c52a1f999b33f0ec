"""JSON and YAML of users, read so that whatever is wrong with them is one clear line."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NoReturn

from .errors import MllmEfficientError, shortened

DEPTH = 64  # levels of lists and mappings; what people write has fewer than ten
NODES = 1_000_000  # values in a YAML file, those that aliases repeat counted each time
SPACE = re.compile(r"[ \t\r\n]*")


def parse_json(text: str | bytes) -> Any:
    """The value in a JSON text.

    Raises ``MllmEfficientError`` for what is no JSON, NaN and Infinity (which JSON has not), a key that stands twice in an object, more
    than ``DEPTH`` levels and integers that Python does not read.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise MllmEfficientError(f"not UTF-8 text: {_said(error)}") from None
    value, at = json_value(text, after_space(text, 0))
    if text[at:].strip():
        line = text.count("\n", 0, at) + 1
        raise MllmEfficientError(f"not JSON: it ends here, and more follows (line {line} column {at - text.rfind(chr(10), 0, at)})")
    return value


def json_value(text: str, at: int) -> tuple[Any, int]:
    """The JSON value that begins at a place of a text, and where it ends. Raises as ``parse_json`` does."""
    try:
        value, end = DECODER.raw_decode(text, at)
    except MllmEfficientError:
        raise
    except json.JSONDecodeError as error:
        raise MllmEfficientError(f"not JSON: {error.msg} (line {error.lineno} column {error.colno})") from None
    except RecursionError:
        raise MllmEfficientError(f"not JSON that can be read: more than {DEPTH} levels") from None
    except ValueError as error:  # an integer of thousands of digits
        raise MllmEfficientError(f"not JSON that can be read: {_said(error)}") from None
    if text.count("[", at, end) + text.count("{", at, end) > DEPTH:
        _check_size(value, "not JSON that can be read")
    return value, end


def after_space(text: str, at: int) -> int:
    """The first place from ``at`` on that is no JSON white space."""
    found = SPACE.match(text, at)
    return at if found is None else found.end()


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises ``OSError``, and ``MllmEfficientError`` that names the file."""
    try:
        return parse_json(path.read_bytes())
    except MllmEfficientError as error:
        raise MllmEfficientError(f"{path}: {error}") from None


def parse_yaml(text: str | bytes) -> Any:
    """The value in a YAML text, plain data alone.

    Raises ``MllmEfficientError`` for what is no YAML, a key that stands twice in a mapping, more than ``DEPTH`` levels (a list that
    holds itself has any number) and values that cannot be made.
    """
    import yaml

    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = yaml.load(text, Loader=_yaml_loader())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MllmEfficientError(f"not YAML: {_said(error)}") from None
    except RecursionError:
        raise MllmEfficientError(f"not YAML that can be read: more than {DEPTH} levels") from None
    except Exception as error:  # PyYAML leaves to Python what a number, a date or a tag may look like
        raise MllmEfficientError(f"not YAML that can be read: {_said(error)}") from None
    _check_size(value, "not YAML that can be read", NODES)
    return value


def read_yaml(path: Path) -> Any:
    """The value in a YAML file. Raises ``OSError``, and ``MllmEfficientError`` that names the file."""
    try:
        return parse_yaml(path.read_bytes())
    except MllmEfficientError as error:
        raise MllmEfficientError(f"{path} is {error}") from None


def finished_lines(path: Path) -> list[bytes]:
    """The lines of a file to which lines are appended, each with its end; none of a file that is not there.

    A last one without its end is torn (the writer was killed in mid-write) and left out. Raises ``OSError``.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return lines if not lines or lines[-1].endswith(b"\n") else lines[:-1]


# ------------------------------------------------------------------------------------------------ guards


def _no_constant(name: str) -> NoReturn:
    raise MllmEfficientError(f"not JSON: {name} is no number in JSON (write null, or leave it out)")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise MllmEfficientError(f"not JSON that can be read: the key {shortened(twice)!r} stands twice in one object")
    return out


DECODER = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_once)


def _check_size(value: Any, what: str, most: float = math.inf) -> None:
    """Raises where lists and mappings go too deep, or are too many for what follows to walk through (aliases can repeat a value)."""
    level, nodes = [value], 0
    for _ in range(DEPTH):
        level = [v for e in level if isinstance(e, dict | list) for v in (e.values() if isinstance(e, dict) else e)]
        nodes += len(level)
        if not level:
            return
        if nodes > most:
            raise MllmEfficientError(f"{what}: more than {most:,} values")
    raise MllmEfficientError(f"{what}: more than {DEPTH} levels")


def _yaml_loader() -> Any:
    """PyYAML's safe loader that refuses a key that stands twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[Any] = set()
            for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    name = (key.tag, key.value)
                    if name in seen:
                        raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
                    seen.add(name)
            return super().construct_mapping(node, deep)

    return Loader


def _said(error: Exception) -> str:
    """A parser's message in one line."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or " ".join(str(error).split()) or type(error).__name__
    return shortened(problem, 160) + (f" (line {mark.line + 1} column {mark.column + 1})" if mark is not None else "")
