"""What the vision side made of pictures and frames, kept for later calls: ``wrap(model, method, cache="512MB")``.

An entry is found by everything that it depends on: the pixels, how the method has them seen, settings of model and call, and the weights.
What misses goes through the tower alone, never together with what else misses. So an encoding does not depend on what was kept before it,
down to the last bit, and windows of a video that overlap share their frames.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import BadSettingError, UnsupportedModelError
from ..report import CacheUse

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
STATE_OF_PEFT = ("_disable_adapters", "active_adapters", "merged_adapters", "scaling")  # of an adapted layer, beside its tensors
PLAIN = (str, int, float, bool, type(None), torch.Size)  # arguments that their repr tells apart
OFFLOADED = "cache= needs the weights of the vision side on a device, and some are offloaded: load the model without, or leave cache= out"


@dataclass(frozen=True)
class Part:
    """What the tower sees together: an item, or a frame of one. key: of all that its encoding depends on."""

    item: Any
    key: str


class VisionCache:
    """Encodings by keys, the least recently used leaving first. For any number of threads.

    limit: bytes of tensors, on the device that they were made on. Two threads that miss the same key both run the tower.
    """

    def __init__(self, limit: int | str) -> None:
        self.limit, self.bytes = bytes_of(limit), 0
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, tuple[Any, int]] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return VisionCache, (self.limit,)  # a copy of the model fills its own

    def encoded(self, parts: Sequence[Part], run: Callable[[Any], Any]) -> tuple[list[Any], CacheUse]:
        """The encodings of parts, and how they were come by: copies, which a method may write into. run: that of one part's item."""
        found, runs = dict[str, Any](), 0
        for part in parts:
            if part.key in found:
                continue
            known = self._get(part.key)
            if known is None:
                known = self._put(part.key, run(part.item))
                runs += 1
            found[part.key] = known
        return [_alone(found[part.key])[0] for part in parts], CacheUse(len(parts) - runs, runs, self.bytes, self.limit)

    def _get(self, key: str) -> Any:
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def _put(self, key: str, encoding: Any) -> Any:
        """The encoding as it is kept: without the memory of others that its tensors are views of."""
        encoding, size = _alone(encoding)
        with self._lock:
            if key not in self._kept and size <= self.limit:
                self._kept[key], self.bytes = (encoding, size), self.bytes + size
                while self.bytes > self.limit:
                    self.bytes -= self._kept.popitem(last=False)[1][1]
        return encoding


def bytes_of(limit: int | str) -> int:
    """``"512MB"``, ``"2GiB"`` or a whole number of bytes, as a number. Raises ``BadSettingError``."""
    said = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([A-Z]*)", str(limit).strip().upper())
    if isinstance(limit, bool) or said is None or said[2] not in UNITS or int(float(said[1]) * UNITS[said[2]]) < 1:
        raise BadSettingError(f"cache={limit!r} is no size in bytes: write 512MB, 2GB or a whole number")
    return int(float(said[1]) * UNITS[said[2]])


def made_for(adapter: Any, limit: int | str | None) -> VisionCache | None:
    """A cache for a model, None where none is asked for. Raises as ``bytes_of``, ``state_of``, and for images not seen alone."""
    if limit is None:
        return None
    if not adapter.items_apart:
        raise UnsupportedModelError(f"cache= needs images that are encoded one by one, and {adapter.name} takes those of a call together")
    cache = VisionCache(limit)
    state_of(adapter)  # so that weights that cannot be read are refused here
    return cache


def usable(adapter: Any) -> bool:
    """Whether encodings of this call may be kept and found: nothing is differentiated, and no part of the vision side is in training."""
    return not torch.is_grad_enabled() and not any(module.training for module in adapter.vision_modules())


def state_of(adapter: Any, beside: Any = None) -> str:
    """Everything that an encoding depends on but its item and method: a digest of weights, adapters, hooks, configuration and precision.

    Weights count by their content, which is read at every call: what is written through ``.data``, as PEFT merges, leaves no trace in a
    tensor's version. beside: a module that is not in the model.

    Raises:
        UnsupportedModelError: weights that are offloaded, sharded or of a kind whose bits cannot be read.
    """
    modules = [*adapter.vision_modules(), *([] if beside is None else beside.modules())]
    kinds = {"float32": torch.get_float32_matmul_precision()}
    for device in {t.device.type for t in adapter.vision_tensors()} - {"meta"}:
        kinds[device] = f"{torch.is_autocast_enabled(device)} {torch.get_autocast_dtype(device)}"
    config = adapter.config
    parts = [config, *(getattr(config, name) for name in config.sub_configs if getattr(config, name, None) is not None)]
    out = hashlib.sha256(repr([kinds, config.to_dict(), [getattr(part, "_attn_implementation", None) for part in parts]]).encode())
    out.update(repr([_python_state(module) for module in modules]).encode())
    out.update(repr(_contents([*adapter.vision_tensors(), *([] if beside is None else beside.state_dict().values())])).encode())
    return out.hexdigest()


def key_of(item: Any, *rest: Any) -> str:
    """A digest of an item's arguments and of what else an encoding depends on."""
    out = hashlib.sha256(repr((item.shape, *rest)).encode())
    for name in sorted(item.arguments):
        _add(out, name, item.arguments[name])
    return out.hexdigest()


def together(encodings: Sequence[Any], shape: Any) -> Any:
    """One encoding of those of an item's frames. shape: of the whole."""
    if len(encodings) == 1:
        return replace(encodings[0], shape=shape)
    own = [slice(0, len(e.features) - (shape.closing if i + 1 < len(encodings) else 0)) for i, e in enumerate(encodings)]
    deep = tuple(torch.cat(layer) for layer in zip(*([layer[s] for layer in e.deep] for e, s in zip(encodings, own))))
    return replace(encodings[0], features=torch.cat([e.features[s] for e, s in zip(encodings, own)]), deep=deep, shape=shape)


def _add(out: Any, name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        raw = value.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        out.update(f"{name} {value.dtype} {tuple(value.shape)} {value.device}".encode())
        out.update(raw.numpy())
    elif isinstance(value, (list, tuple)):
        out.update(f"{name} {len(value)}".encode())
        for one in value:
            _add(out, name, one)
    elif isinstance(value, PLAIN):
        out.update(f"{name} {value!r}".encode())
    else:
        raise UnsupportedModelError(f"cache= cannot tell values of {name} apart, a {type(value).__name__}: leave cache= out")


def _alone(encoding: Any) -> tuple[Any, int]:
    """An encoding of tensors that share no memory with others, and their bytes."""
    size, own = 0, dict[str, Any]()
    for field in fields(encoding):
        value = getattr(encoding, field.name)
        if isinstance(value, Tensor):
            own[field.name] = value.detach().clone()
            size += own[field.name].nbytes
        elif field.name == "deep":
            own["deep"] = tuple(layer.detach().clone() for layer in value)
            size += sum(layer.nbytes for layer in own["deep"])
    return replace(encoding, **own), size


def _python_state(module: Any) -> Any:
    """What of a module changes its output and is no tensor. Keys of hooks are never given twice in a process."""
    adapted = [repr(getattr(module, name)) for name in STATE_OF_PEFT] if hasattr(module, "_disable_adapters") else None
    hooks = [key for there in (module._forward_hooks, module._forward_pre_hooks) for key, hook in [*there.items()] if not _watches(hook)]
    own = [repr(module.__dict__[name]) for name in ("forward", "__call__") if name in module.__dict__]
    return type(module).__qualname__, own, hooks, adapted


def _watches(hook: Any) -> bool:
    """Whether a hook is one that transformers puts on at a first call, or this package during one, to see what goes by."""
    return str(getattr(hook, "__module__", "")).split(".")[0] in ("transformers", __package__.split(".")[0])


def _contents(tensors: Iterable[Tensor]) -> list[Any]:
    """Of each tensor its kind, version and a sum of its bits in which places count differently. The host waits once for each device."""
    known, sums = list[Any](), dict[torch.device, list[Tensor]]()
    for tensor in tensors:
        if tensor.is_meta:
            raise UnsupportedModelError(OFFLOADED)
        try:
            bits = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            raise UnsupportedModelError(f"cache= cannot read the bits of a {type(tensor).__name__}: leave cache= out") from error
        known.append((tensor.dtype, tuple(tensor.shape), tensor.device, 0 if tensor.is_inference() else tensor._version))
        if len(bits):
            sums.setdefault(tensor.device, []).append(_sum_of_bits(bits, len(tensor) if tensor.ndim > 1 else 1))
    return [*known, *(torch.stack(values).tolist() for values in sums.values())]


def _sum_of_bits(bits: Tensor, rows: int) -> Tensor:
    """A whole number of bytes (n,), in words of eight where they go up in rows: of every row and of every column of words its sum, times an
    odd number of its own."""
    wide = len(bits) % (8 * rows) == 0 and bits.data_ptr() % 8 == 0 and bits.storage_offset() % 8 == 0
    words = (bits.view(torch.int64) if wide else bits).view(rows, -1)
    sums = torch.cat([words.sum(axis, dtype=torch.int64) for axis in (1, 0)])
    return (sums * torch.arange(1, 2 * len(sums), 2, device=bits.device)).sum()
