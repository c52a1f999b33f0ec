"""Peak memory of a call, the size of its KV cache, and the largest batch that fits. MB = 1e6 bytes."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from .timing import free

T = TypeVar("T")
MB = 1e6
ON_CUDA = "torch.cuda.max_memory_allocated over one generate, weights included, summed over the devices"
ON_LINUX = (
    "high-water mark of the process's resident memory over one generate (VmHWM, reset before it), "
    "weights, Python and libraries included: compare arms, not machines"
)
NOT_MEASURED = "this system has no high-water mark of resident memory that can be reset: null"
_PROC = Path("/proc/self")


def peak_memory(devices: Sequence[torch.device], work: Callable[[], T]) -> tuple[float | None, str, T]:
    """MB at the highest point of ``work``, what was measured, and what ``work`` returns.

    devices: the model's accelerators; none means the CPU.
    """
    if devices and all(d.type == "cuda" for d in devices):
        torch.cuda.empty_cache()
        for device in devices:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        out = work()
        return sum(torch.cuda.max_memory_allocated(d) for d in devices) / MB, ON_CUDA, out
    if devices or not _reset_high_water_mark():
        return None, NOT_MEASURED, work()
    out = work()
    return _high_water_mark() / MB, ON_LINUX, out


def _reset_high_water_mark() -> bool:
    """Whether the kernel set this process's high-water mark to what is resident now, freed memory given back first."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        (_PROC / "clear_refs").write_text("5")
        return _high_water_mark() > 0
    except OSError:
        return False


def _high_water_mark() -> int:
    """Bytes; 0 where the kernel does not say."""
    for line in (_PROC / "status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def weights_mb(model: Any) -> float:
    """MB of a model's parameters and buffers, shared ones counted once."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        for part in _parts(tensor):
            storages[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
    return sum(storages.values()) / MB


def _parts(tensor: Any) -> Iterator[torch.Tensor]:
    """The plain tensors that a tensor consists of; a quantized one holds several."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from _parts(getattr(tensor, name))
    else:
        yield tensor


def cache_mb(cache: Any) -> float | None:
    """MB of the keys and values that a transformers cache holds; None for a cache of another kind."""
    total = 0
    for layer in getattr(cache, "layers", ()):
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if isinstance(tensor, torch.Tensor):
                total += tensor.numel() * tensor.element_size()
    return total / MB if total else None


def largest_batch(fits: Callable[[int], bool], limit: int) -> int:
    """The largest batch from 1 to ``limit`` that fits, by doubling and then halving the gap; 0 if one row does not."""
    good, bad = 0, limit + 1
    size = 1
    while size < bad:
        if fits(size):
            good, size = size, min(size * 2, limit)
            if good == limit:
                return limit
        else:
            bad = size
    while bad - good > 1:
        middle = (good + bad) // 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good


def fits_in_memory(work: Callable[[], object]) -> bool:
    """Whether ``work`` ends without running out of the device's memory. Other errors are raised."""
    try:
        work()
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        fitted = False
    else:
        fitted = True
    free()  # outside of the except block, whose traceback holds the tensors
    return fitted


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device's memory is used up."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in said or "CUBLAS_STATUS_ALLOC_FAILED" in said
