"""Recipes from YAML files with ``key=value`` overrides."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from pathlib import Path
from typing import Any

from ..errors import MllmEfficientError, did_you_mean, quoted, shortened
from ..parsing import parse_yaml, read_yaml
from .check_recipe import check
from .config import Recipe

LARGEST = 2**63 - 1
BELONG = (("counts", "sampling"), ("settings", "distill"))  # settings of the training that are written among others


def read(path: Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML file, or one that ships by its name alone, ``tokenflex_builtin``.

    overrides: ``"seed=1"``, ``"stages.0.steps=10"``, ``"data.path=d.json"``.

    Raises ``MllmEfficientError`` naming the key that is wrong, and the nearest that is known.
    """
    path = path if path.exists() or path.suffix else _shipped(path.name)
    try:
        content = read_yaml(path)
    except OSError as error:
        raise MllmEfficientError(f"cannot read the recipe {path}: {error.strerror}") from None
    if not isinstance(content, dict):
        raise MllmEfficientError(f"{path}: a recipe is a mapping with model, method, output_dir, data and stages")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise MllmEfficientError(f"{override!r} is not key=value, as in seed=1 or stages.0.steps=10")
        try:
            read = parse_yaml(value)
        except MllmEfficientError as error:
            raise MllmEfficientError(f"{shortened(override)!r}: {error}") from None
        _put(content, key.strip().split("."), read, shortened(override))
    for section, name in BELONG:
        if isinstance(content.get(section), dict) and name in content[section]:
            content[section] = dict(content[section])
            content[name] = content[section].pop(name)
    recipe = _make(Recipe, content, "")
    check(recipe)
    return recipe


def _shipped(name: str) -> Path:
    from importlib.resources import files

    folder = Path(str(files("mllm_efficient.configs"))) / "train"
    path, known = folder / f"{name}.yaml", sorted(p.stem for p in folder.glob("*.yaml"))
    if not path.is_file():
        raise MllmEfficientError(f"no recipe {name}{did_you_mean(name, known)} (shipped: {', '.join(known)}; or a YAML file)")
    return path


def _put(content: Any, keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        if isinstance(content, list):
            if not _number(key) or int(key) >= len(content):
                raise MllmEfficientError(f"{override!r}: there is no stage {key}, they are numbered 0 to {len(content) - 1}")
            content = content[int(key)]
        else:
            content = content.setdefault(key, {})
        if not isinstance(content, dict | list):
            raise MllmEfficientError(f"{override!r}: {key} has no settings of its own")
    last: Any = keys[-1]
    if isinstance(content, list):
        if not _number(last) or int(last) >= len(content):
            raise MllmEfficientError(f"{override!r}: there is no entry {last}")
        last = int(last)
    elif _number(last):
        last = int(last)
    content[last] = value


def _number(key: str) -> bool:
    return key.isascii() and key.isdigit() and len(key) < 10


def _make(cls: Any, content: Any, where: str) -> Any:
    """A dataclass from plain data, every value checked for its type."""
    if not isinstance(content, dict):
        raise MllmEfficientError(f"{where.rstrip('.')}: a mapping is wanted, not {quoted(content)}")
    hints, fields = typing.get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    for key in content:
        if key not in fields:
            hint = did_you_mean(str(key), fields)
            raise MllmEfficientError(f"the recipe has no setting {where}{shortened(key)}{hint}")
    missing = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING and n not in content]
    if missing:
        raise MllmEfficientError(f"the recipe lacks {', '.join(where + name for name in missing)}")
    return cls(**{key: _value(hints[key], value, f"{where}{key}") for key, value in content.items()})


def _value(kind: Any, value: Any, where: str) -> Any:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType or origin is typing.Union:
        if value is None and type(None) in inner:
            return None
        return _value(next(k for k in inner if k is not type(None)), value, where)
    if dataclasses.is_dataclass(kind):
        return _make(kind, value, f"{where}.")
    if origin is tuple:
        if not isinstance(value, list):
            raise MllmEfficientError(f"{where}={quoted(value)}: a list is wanted")
        return tuple(_value(inner[0], v, f"{where}.{i}") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise MllmEfficientError(f"{where}={quoted(value)}: a mapping is wanted")
        return {_value(inner[0], k, where): _value(inner[1], v, f"{where}.{k}") for k, v in value.items()}
    if kind is Any:
        return value
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string
        try:
            value = float(value)
        except ValueError:
            raise MllmEfficientError(f"{where}={quoted(value)}: a number is wanted") from None
    if isinstance(value, int) and not -LARGEST <= value <= LARGEST:
        raise MllmEfficientError(f"{where}={quoted(value)}: a number that large has no use here")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise MllmEfficientError(f"{where}={quoted(value)}: {kind.__name__} is wanted")
    if isinstance(value, float) and not math.isfinite(value):
        raise MllmEfficientError(f"{where}={quoted(value)}: a finite number is wanted")
    return value
