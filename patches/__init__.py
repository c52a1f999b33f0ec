"""Adapters: the only code that knows a host's internals. One file per model family, found by the model's class name."""

from __future__ import annotations

import importlib
from typing import Any

from mllm_efficient.errors import UnsupportedModelError

FAMILIES = {"LlavaForConditionalGeneration": "mllm_efficient.patches.llava:LlavaAdapter"}
_WRAPPERS = {
    "DistributedDataParallel": "DDP", "DataParallel": "DataParallel", "FullyShardedDataParallel": "FSDP",
    "OptimizedModule": "torch.compile",
}  # fmt: skip


def inner_model(model: Any) -> Any:
    """The transformers model itself, out of a PEFT model. Raises for DDP, FSDP and compiled wrappers."""
    kinds = [c.__name__ for c in type(model).__mro__]
    for name, what in _WRAPPERS.items():
        if name in kinds:
            raise UnsupportedModelError(f"this is a {what} wrapper: wrap the model inside it first, then apply {what}")
    if "FSDPModule" in kinds:
        raise UnsupportedModelError("this model is sharded by FSDP: wrap it first, then shard")
    if hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
        return inner_model(model.get_base_model())
    return model


def adapter_for(model: Any):
    """The adapter of a model's family. Raises ``UnsupportedModelError`` naming the supported ones."""
    inner = inner_model(model)
    for cls in type(inner).__mro__:
        if cls.__name__ in FAMILIES:
            module, _, name = FAMILIES[cls.__name__].partition(":")
            return getattr(importlib.import_module(module), name)(inner)
    raise UnsupportedModelError(f"{type(inner).__name__} is not supported: the model must be one of {', '.join(FAMILIES)}")
