"""``torch``, imported at its first use, so that listing the methods and ``--help`` take no second of import time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
else:

    class _Lazy:
        def __init__(self, name: str):
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            return getattr(__import__(self._name), attribute)  # quicker than importlib's, and as safe in threads

    torch = _Lazy("torch")
