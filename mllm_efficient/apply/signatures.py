"""How the installed transformers names what passes between a caller, a model and its decoder layers.

The names are read from the model's own signatures: transformers 5.24 renamed ``past_key_values`` to ``cache`` in every
``forward``, and a hook that reads the old name finds nothing and answers wrongly without a word.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import UnsupportedModelError

CACHE_NAMES = ("cache", "past_key_values")  # since 5.24, and before
LAYER_ARGUMENTS = ("hidden_states", "attention_mask", "position_embeddings")  # what in-decoder methods replace


@functools.cache
def parameters_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of a method's parameters without ``self``, those of the function that decorators wrap."""
    return tuple(name for name in inspect.signature(function).parameters if name != "self")


def cache_name(function: Callable[..., Any]) -> str:
    """The name under which a model's ``forward`` takes its cache.

    Raises:
        UnsupportedModelError: it has none of the names this package knows.
    """
    found = next((name for name in CACHE_NAMES if name in parameters_of(function)), None)
    if found is None:
        where = getattr(function, "__qualname__", str(function))
        raise UnsupportedModelError(f"{where} takes its cache under none of the names {', '.join(CACHE_NAMES)}: {_advice()}")
    return found


def cache_of(given: Mapping[str, Any]) -> Any:
    """The cache among a call's arguments or in an output, whatever it is called there; None where there is none."""
    names = list(given)  # an output of 5.24 answers to the old name as well, with a warning
    return next((given[name] for name in CACHE_NAMES if name in names and given[name] is not None), None)


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """The keyword argument under which a model, and its ``generate``, takes a cache."""
    return {cache_name(type(model).forward): cache}


def check_layer(layer: type) -> None:
    """Raises ``UnsupportedModelError`` for a class of decoder layers whose ``forward`` does not take what hooks replace."""
    names = parameters_of(layer.forward)  # type: ignore[attr-defined]
    missing = [name for name in LAYER_ARGUMENTS if name not in names]
    if missing:
        raise UnsupportedModelError(f"{layer.__name__}.forward takes no {', '.join(missing)}: {_advice()}")
    cache_name(layer.forward)  # type: ignore[attr-defined]


def _advice() -> str:
    import transformers

    return f"transformers {transformers.__version__} is not known to this version of mllm-efficient: mllm-efficient doctor says what holds"
