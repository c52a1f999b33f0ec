"""``pipe(..., compression=...)``: transformers' pipelines give words they do not know to the processor, which ignores them."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

PIPELINES = {"image_text_to_text": "ImageTextToTextPipeline", "any_to_any": "AnyToAnyPipeline"}
_UNSET: Any = object()


@functools.cache
def teach_pipelines() -> None:
    """Lets the pipelines that call ``generate`` hand ``compression=`` to it, once per process; nothing else of them changes.

    It stays when models are unwrapped: their ``generate`` then refuses the argument, where the processor would have ignored it.
    """
    for module, name in PIPELINES.items():
        pipeline = getattr(importlib.import_module(f"transformers.pipelines.{module}"), name)
        pipeline._sanitize_parameters = _with_compression(pipeline._sanitize_parameters)


def _with_compression(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def sanitize(self: Any, *args: Any, compression: Any = _UNSET, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        preprocess, forward, postprocess = stock(self, *args, **kwargs)
        if compression is _UNSET and forward.get("generate_kwargs") is not None:  # which take the place of those of the constructor
            held = getattr(self, "_forward_params", {}).get("generate_kwargs") or {}
            compression = held.get("compression", _UNSET)
        if compression is not _UNSET:
            forward["generate_kwargs"] = {**(forward.get("generate_kwargs") or {}), "compression": compression}
        return preprocess, forward, postprocess

    return sanitize
