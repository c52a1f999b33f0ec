"""Lets torchvision's CUDA build be imported beside a CPU build of torch.

The wheel that package indexes hold for Linux is the CUDA build. Beside a CPU-only torch its library does not load, and
``import torchvision`` stops at operators that were then never declared; with it stop transformers, lmms-eval and vLLM. Its
image operations need none of that. ``declare`` declares the operators, which leaves them without an implementation.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.metadata import PackageNotFoundError, version
from typing import Any

OPERATORS = ("nms", "qnms")
_kept: list[Any] = []  # the declarations, which end with their library


def declare() -> None:
    """Declares what torchvision expects, if it is installed, has not been imported and torch has no CUDA."""
    if _kept or "torchvision" in sys.modules:
        return
    try:
        version("torchvision")
    except PackageNotFoundError:
        return
    import torch

    if torch.version.cuda is not None or (hasattr(torch.version, "hip") and torch.version.hip is not None):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in OPERATORS:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)


class _Before(MetaPathFinder):
    """Declares when torchvision is about to be imported; finds nothing itself."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            declare()


def at_import() -> None:
    """Declares as soon as somebody imports torchvision; costs nothing until then."""
    if "torchvision" not in sys.modules and not any(isinstance(f, _Before) for f in sys.meta_path):
        sys.meta_path.insert(0, _Before())
