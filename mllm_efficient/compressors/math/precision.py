"""Matrix products in the precision that is asked for."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from ...lazy import torch

_precision = threading.Lock()  # the setting is the process's, and several threads may select at once


@contextlib.contextmanager
def full_float32(device_type: str) -> Iterator[None]:
    """Float32 matrix products in float32: no TF32 on CUDA, no bfloat16 on CPUs that have units for it.

    By whichever of torch's two settings this version has.
    """
    matmul: Any = {"cuda": torch.backends.cuda, "cpu": torch.backends.mkldnn}.get(device_type)
    matmul = getattr(matmul, "matmul", None)
    name, off = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    if not hasattr(matmul, name):  # a device without reduced precision, or a torch that has no setting for it
        yield
        return
    with _precision:
        before = getattr(matmul, name)
        setattr(matmul, name, off)
        try:
            yield
        finally:
            setattr(matmul, name, before)
