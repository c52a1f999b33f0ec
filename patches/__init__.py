"""Adapters: the only code that knows a host's internals. One file per model family, found by the model's class name."""

from __future__ import annotations

import functools
import importlib
import warnings
from typing import Any

from mllm_efficient.errors import UnsupportedModelError

FAMILIES = {
    "LlavaForConditionalGeneration": "llava:LlavaAdapter",
    "LlavaNextForConditionalGeneration": "llava_next:LlavaNextAdapter",
    "LlavaNextVideoForConditionalGeneration": "llava_next_video:LlavaNextVideoAdapter",
    "LlavaOnevisionForConditionalGeneration": "llava_onevision:LlavaOnevisionAdapter",
    "Qwen2VLForConditionalGeneration": "qwen_vl:QwenVLAdapter",
    "Qwen2_5_VLForConditionalGeneration": "qwen_vl:QwenVLAdapter",
    "Qwen3VLForConditionalGeneration": "qwen_vl:Qwen3VLAdapter",
    "InternVLForConditionalGeneration": "internvl:InternVLAdapter",
}
# Checkpoints in the format of a model's own repository, and one of those that transformers reads.
ORIGINALS = {
    "LlavaLlamaForCausalLM": "llava-hf/llava-1.5-7b-hf", "LlavaMistralForCausalLM": "llava-hf/llava-v1.6-mistral-7b-hf",
    "LlavaQwenForCausalLM": "llava-hf/llava-onevision-qwen2-7b-ov-hf", "InternVLChatModel": "OpenGVLab/InternVL3-8B-hf",
}  # fmt: skip
_WRAPPERS = {
    "DistributedDataParallel": "DDP", "DataParallel": "DataParallel", "FullyShardedDataParallel": "FSDP",
    "OptimizedModule": "torch.compile",
}  # fmt: skip


WRAPPED = "compresses_visual_tokens"  # an attribute of the classes that ``wrap`` makes
NEWEST_TESTED = (5, 24)


@functools.cache
def transformers_version() -> tuple[int, int]:
    """(major, minor) of the installed transformers; one warning if it is newer than what the tests run on."""
    from importlib.metadata import version

    major, minor = (int(part) for part in version("transformers").split(".")[:2])
    if (major, minor) > NEWEST_TESTED:
        newest = ".".join(map(str, NEWEST_TESTED))
        warnings.warn(f"transformers {major}.{minor} is newer than {newest}, the newest tested with mllm-efficient", stacklevel=3)
    return major, minor


def inner_model(model: Any) -> Any:
    """The transformers model itself, out of a PEFT model. Raises for DDP, FSDP and compiled wrappers."""
    kinds = [c.__name__ for c in type(model).__mro__]
    for name, what in _WRAPPERS.items():
        if name in kinds:
            raise UnsupportedModelError(f"this is a {what} wrapper: wrap the model inside it first, then apply {what}")
    if "FSDPModule" in kinds and not getattr(type(model), WRAPPED, False):
        raise UnsupportedModelError("this model is sharded by FSDP: wrap it first, then shard")
    if hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
        return inner_model(model.get_base_model())
    return model


def adapter_for(model: Any):
    """The adapter of a model's family. Raises ``UnsupportedModelError`` naming the supported ones."""
    transformers_version()
    inner = inner_model(model)
    for cls in type(inner).__mro__:
        if cls.__name__ in FAMILIES:
            module, _, name = FAMILIES[cls.__name__].partition(":")
            return getattr(importlib.import_module(f"{__name__}.families.{module}"), name)(inner)
    raise UnsupportedModelError(f"{type(inner).__name__} is not supported{advice_on(type(inner).__name__)}")


def advice_on(name: str) -> str:
    """What to use instead of a model of an unknown class, behind "is not supported"."""
    twin = ORIGINALS.get(name)
    if twin is not None:
        return f": it is in the format of its own repository, so use its twin for transformers, whose name ends in -hf (such as {twin})"
    return f": the model must be one of {', '.join(FAMILIES)}"
