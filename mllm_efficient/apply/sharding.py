"""What a wrapped model that is sharded by FSDP2 (``fully_shard``) needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")
CALL = "_visual_call"  # attribute of a sharded model while ``gathered`` runs


def is_sharded(model: Any) -> bool:
    """Whether ``fully_shard`` was applied to the model itself."""
    return any(cls.__name__ == "FSDPModule" for cls in type(model).__mro__)


def has_shards(model: Any) -> bool:
    """Whether any module's weights are kept by FSDP, which puts them back where they were after every call."""
    return any(getattr(module, "_is_fsdp_managed_module", False) for module in model.modules())


def gathered(model: Any, function: Callable[..., Result], **inputs: Any) -> Result:
    """``function(**inputs)`` with the model's weights gathered as in its ``forward``, and the inputs in its precision.

    Tower and projector run before the first ``forward`` of a ``generate``, where a sharded model holds parts of its weights.
    """
    if not is_sharded(model):
        return function(**inputs)
    from torch.distributed.fsdp import register_fsdp_forward_method

    model.__dict__[CALL] = function
    try:
        register_fsdp_forward_method(model, CALL)
        call: Callable[..., Result] = getattr(model, CALL)
        return call(**inputs)
    finally:
        del model.__dict__[CALL]
