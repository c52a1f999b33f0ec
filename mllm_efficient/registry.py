"""Names to methods: ``"divprune:keep=0.1"``, a dict or a YAML file to an object and back.

Built-in and registered methods are found by name; installed packages add theirs through the entry-point group
``mllm_efficient.compressors`` (name = class), which is loaded only when the name is asked for.
"""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from collections.abc import Callable, Iterable
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from . import spec
from .compressors.base import Compressor, parameters
from .compressors.composed import compose, stages_of
from .compressors.kinds import PRE_LLM
from .errors import (
    BadSettingError,
    MissingBudgetError,
    MllmEfficientError,
    UnknownMethodError,
    UnsupportedModelError,
    did_you_mean,
    quoted,
)
from .parsing import read_yaml

GROUP = "mllm_efficient.compressors"
INSIDE = ("fastv", "pyramiddrop", "sparsevlm", "dart", "dpn", "proportional")
CONDITIONED = ("cdpruner", "spp", "tome")
IN_TOWER = ("flowcut", "pixelprune")
ATTENTIVE = ("fastervlm", "vispruner", "visionzip", "scope", "prumerge_plus")
OF_2026 = ("mmtok", "apet", "prunesid", "otprune", "hawk", "vscan")
OF_VIDEO = ("evs", "vidcom2", "vcast", "fastvid")
BUILTIN = {
    name: f"mllm_efficient.compressors.{name}"
    for name in (
        *("none", "random", "uniform", "pool", "resize", "native", "divprune", "divmerge", "tokenflex"),
        *(*INSIDE, *CONDITIONED, *ATTENTIVE, *IN_TOWER, *OF_2026, *OF_VIDEO),
    )
}
_registered: dict[str, type] = {}


def register(name: str) -> Callable[[type], type]:
    """Class decorator: makes a method known by ``name`` to every function and command."""

    def decorate(cls: type) -> type:
        _require_method_class(cls)
        _require_settings(cls)
        _require_name(name)
        old = _registered.get(name)
        owner = f"{old.__module__}.{old.__qualname__}" if old else BUILTIN.get(name)
        own = f"{cls.__module__}.{cls.__qualname__}" if old else cls.__module__
        if owner is not None and owner != own:
            raise MllmEfficientError(f"method {name!r} is already registered by {owner}")
        cls.name = name  # type: ignore[attr-defined]
        _registered[name] = cls
        return cls

    return decorate


def _require_method_class(cls: Any) -> None:
    if isinstance(cls, type) and "__dataclass_params__" not in cls.__dict__:  # the class's own settings would be lost
        raise MllmEfficientError(f"{cls.__name__}: put @dataclass(frozen=True) between @register and the class")
    if not isinstance(cls, type) or not issubclass(cls, Compressor):
        raise MllmEfficientError(f"{getattr(cls, '__name__', cls)!s} is not a method: derive it from me.Selector, me.Merger or me.Reducer")


def _require_settings(cls: type[Compressor]) -> None:
    """Raises for a setting by the name of something that every method is asked for."""
    own = {field.name for field in dataclasses.fields(Compressor)}
    taken = [field.name for field in dataclasses.fields(cls) if field.name not in own and hasattr(Compressor, field.name)]
    if taken:
        raise MllmEfficientError(f"{cls.__name__}: a setting cannot be named {taken[0]!r}, which every method has: use another name")


def _require_name(name: str) -> None:
    if spec.parse(f"{name}:a=1 | b") != [spec.Stage(name, {"a": "1"}), spec.Stage("b", {})] or not name or name.endswith(spec.FILES):
        raise MllmEfficientError(f"{name!r} cannot be a method's name: a specification such as 'divprune:keep=0.1' could not hold it")


@lru_cache(maxsize=1)
def _installed() -> dict[str, Any]:
    return {ep.name: ep for ep in entry_points(group=GROUP)}


def list_methods() -> list[str]:
    """Names of all methods. An entry point that cannot be loaded is reported as a warning and left out."""
    names = [*BUILTIN, *_registered]
    for name in _installed():
        if name not in names:
            try:
                get_method(name)
            except MllmEfficientError as error:
                warnings.warn(str(error), stacklevel=2)
                continue
        names.append(name)
    return list(dict.fromkeys(names))


def get_method(name: str) -> type[Compressor]:
    """The class of a method. Raises ``UnknownMethodError`` with the nearest names."""
    if name in BUILTIN and name not in _registered:
        importlib.import_module(BUILTIN[name])
    if name not in _registered and name in _installed():
        _load_entry_point(name)
    if name not in _registered:
        known = {*BUILTIN, *_registered, *_installed()}
        hint = did_you_mean(name, known)
        raise UnknownMethodError(f"unknown method {name!r}{hint} (mllm-efficient methods lists all)")
    return _registered[name]


def _load_entry_point(name: str) -> None:
    entry = _installed()[name]
    package = entry.dist.name if entry.dist else entry.value
    try:
        cls = entry.load()
        if name not in _registered:
            register(name)(cls)
    except Exception as error:
        reason = str(error) if isinstance(error, MllmEfficientError) else f"{type(error).__name__}: {error}"
        raise MllmEfficientError(" ".join(f"method {name!r} of package {package} does not load: {reason}".split())) from error


def build(what: str | dict | Path | Compressor | Iterable) -> Compressor:
    """A method from a specification string, a dict (``to_dict()``), a YAML file or an object.

    ``"a:x=1 | b:y=2"``, a list, or ``{"stages": [...]}`` compose: at most one method of each kind, run in the order
    projector, pre_llm (before the language model), in_llm (between its layers); the result is then one ``Composed`` of these ``stages``.
    """
    return what if isinstance(what, Compressor) else _composed([_made(part) for part in described(what)])


def runnable(what: Any) -> Compressor:
    """What ``build`` makes of it. Raises ``UnsupportedModelError`` for a stage of a kind that this version does not run."""
    method = build(what)
    for stage in stages_of(method):
        if stage.kind != PRE_LLM and stage.as_projector is None and stage.as_reducer is None:
            raise UnsupportedModelError(f"{stage.name} is of kind {stage.kind}, which this version does not run")
    return method


def without_budget(what: str | dict | Path | Compressor | Iterable) -> list[str]:
    """The names of the stages that need a budget and have none. Raises as ``build`` does for whatever else is wrong with one."""
    lacking = list[str]()
    for part in described(what):
        try:
            _made(part)
        except MissingBudgetError:
            lacking += [str(part["method"])] if isinstance(part, dict) else []
    return lacking


def with_budget(what: str | dict | Path | Compressor | Iterable, **budget: Any) -> Compressor:
    """What ``build`` makes of it, the stages that have no budget of their own at this one: ``with_budget("divprune", keep=0.1)``."""

    def stage(part: dict[str, Any] | Compressor) -> Compressor:
        try:
            return _made(part)
        except MissingBudgetError:
            if isinstance(part, Compressor):
                raise
            return _made({**part, **budget})

    return _composed([stage(part) for part in described(what)])


def described(what: Any) -> list[dict[str, Any] | Compressor]:
    """The stages that something describes, each as the name of its method and its settings (or as it is), as yet unchecked."""
    if isinstance(what, Compressor):
        return [what]
    if isinstance(what, Path) or (isinstance(what, str) and what.endswith(spec.FILES)):
        return described(_read_yaml(Path(what)))
    if isinstance(what, str):
        return [*settings_in(what)]
    if isinstance(what, dict):
        if "stages" not in what:
            return [what]
        if set(what) != {"stages"}:
            raise MllmEfficientError(f"a dict with 'stages' has nothing else: {sorted(set(what) - {'stages'})}")
        return described(what["stages"])
    if isinstance(what, Iterable):
        return [part for one in what for part in described(one)]
    raise MllmEfficientError(f"cannot build a method from {quoted(what)}: give 'divprune:keep=0.1', a dict or a YAML file")


def _composed(parts: list[Compressor]) -> Compressor:
    if not parts:
        raise MllmEfficientError("no method given: 'divprune:keep=0.1' is one")
    return parts[0] if len(parts) == 1 else compose([p for p in parts if p.spec() != "none"] or parts[:1])


def settings_in(text: str) -> list[dict[str, Any]]:
    """The stages of a specification string as dicts: ``method``, its name, and its settings, as yet unchecked."""
    out = []
    for stage in spec.parse(text):
        fields = spec.text_fields(get_method(stage.name)) if stage.name else frozenset()
        settings: dict[str, Any] = {"method": stage.name}
        for key, written in stage.settings.items():
            try:
                settings[key] = spec.value_of(written, key in fields)
            except MllmEfficientError:
                raise BadSettingError(f"{text.strip()!r}: {written!r} is not a value") from None
        out.append(settings)
    return out


def _made(part: dict[str, Any] | Compressor) -> Compressor:
    if isinstance(part, Compressor):
        return part
    settings = dict(part)
    name = settings.pop("method", None)
    if not isinstance(name, str) or not name:
        raise MllmEfficientError(f"{settings or 'an empty specification'}: no method named; 'divprune:keep=0.1' is one")
    cls = get_method(name)
    known = parameters(cls)
    for key in settings:
        if key not in known:
            hint = did_you_mean(str(key), known)
            raise BadSettingError(f"{name} has no parameter {key!r}{hint} (it takes {', '.join(known)})")
    return cls(**settings)


def _read_yaml(path: Path) -> dict | list:
    try:
        content = read_yaml(path)
    except OSError as error:
        raise MllmEfficientError(f"cannot read the method file {path}: {error.strerror}") from error
    if not isinstance(content, (dict, list)):
        raise MllmEfficientError(f"{path}: expected 'method: divprune' and its settings, or a list of such")
    return content
