"""The only code that knows a model's internals. One file per model family, and a line in the table of ``rules``."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mllm_efficient.errors import UnsupportedModelError

from . import facts, rules

if TYPE_CHECKING:
    from .base import Adapter

FAMILIES = {cls: model_type for model_type, (cls, _) in rules.FAMILIES.items()}  # the classes of transformers
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


def require_present(model_type: str) -> None:
    """Raises ``UnsupportedModelError`` for a family that the installed transformers does not have."""
    from transformers.models.auto import configuration_auto

    if model_type not in configuration_auto.CONFIG_MAPPING:
        version = ".".join(map(str, transformers_version()))
        raise UnsupportedModelError(f"transformers {version} has no {model_type}: a newer one is needed")


def require_whole(model_type: str) -> None:
    """Raises ``UnsupportedModelError`` for a family that the installed transformers has otherwise, or whose every call raises there."""
    row = facts.FACTS.get(model_type)
    if row is not None and (why := row.refusal(transformers_version())):
        raise UnsupportedModelError(f"{model_type} is not supported: {why}")


def adapter_for(model: Any) -> Adapter:
    """The adapter of a model's family. Raises ``UnsupportedModelError`` naming the supported ones."""
    transformers_version()
    inner = inner_model(model)
    for cls in type(inner).__mro__:
        if cls.__name__ in FAMILIES:
            require_whole(FAMILIES[cls.__name__])
            return rules.adapter_class(FAMILIES[cls.__name__])(inner)
    kind = getattr(getattr(inner, "config", None), "model_type", "")
    if _by_its_row(kind):
        refusal = facts.FACTS[kind].refusal(transformers_version())
        if refusal:
            raise UnsupportedModelError(f"{type(inner).__name__} is not supported: {refusal}")
        return importlib.import_module(f"{__name__}.families.generic").GenericAdapter(inner)
    raise UnsupportedModelError(f"{type(inner).__name__} is not supported{advice_on(type(inner).__name__, kind)}")


def learn(model: Any) -> None:
    """Makes a type of model known for this process, if it is not, by a row guessed from its class.

    Raises ``UnsupportedModelError``, which shows the row, where the row does not hold on a tiny model of the same configuration.
    """
    inner = inner_model(model)
    kind = getattr(getattr(inner, "config", None), "model_type", "")
    if is_supported([cls.__name__ for cls in type(inner).__mro__], kind):
        return
    if kind in facts.REFUSED:
        raise UnsupportedModelError(f"{type(inner).__name__} is not supported: {facts.REFUSED[kind]}")
    contract = importlib.import_module(f"{__name__}.contract")  # which wraps models itself
    row = contract.guess(inner)
    facts.FACTS[kind], wrong = row, {"a tiny model": "was not built"}
    try:
        wrong = {name: why for name, why in contract.keeps(inner.config, row).items() if why}
    except Exception as error:  # whatever a tiny model of an unknown type raises
        wrong = {"a tiny model": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    finally:
        if wrong:
            del facts.FACTS[kind]
    if wrong:
        said = "; ".join(f"{name}: {why}" for name, why in wrong.items())
        raise UnsupportedModelError(
            f"{type(inner).__name__} is not supported, and the row that was tried does not hold ({said}). "
            f'What is missing is a right one in patches/facts.py: "{kind}": {row.written()}'
        )


def is_supported(classes: Iterable[str], model_type: str) -> bool:
    """Whether a model of one of these classes, or of this type, can be compressed."""
    return bool(set(classes) & set(FAMILIES)) or _by_its_row(model_type)


def _by_its_row(model_type: str) -> bool:
    """Whether a type has a row and no family of its own, whose classes are then the only ones."""
    return model_type in facts.FACTS and model_type not in rules.FAMILIES


def advice_on(name: str, model_type: str = "") -> str:
    """What to use instead of a model of an unknown class, or why it cannot be compressed, after "is not supported"."""
    if model_type in facts.REFUSED:
        return f": {facts.REFUSED[model_type]}"
    twin = ORIGINALS.get(name)
    if twin is not None:
        return f": it is in the format of its own repository, so use its twin for transformers, whose name ends in -hf (such as {twin})"
    return f": the model must be one of {', '.join(FAMILIES)}, or of a type with a row (mllm-efficient doctor --all names them)"
