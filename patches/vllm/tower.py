"""What vLLM's CLIP and SigLIP towers attend to: of their last layer, which is the one whose output the model takes.

The same numbers as ``patches.tower.attention`` has them in transformers; here queries, keys and values are one matrix product.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mllm_efficient.errors import UnsupportedModelError

from ..tower.attention import received
from .settings import KEY

GIVEN = frozenset({"attention", "keys"})


def require_watchable(vllm_config: Any, name: str) -> None:
    """Raises where a process sees a part of the heads alone, or the model takes another layer's output."""
    ranks = vllm_config.parallel_config.tensor_parallel_size
    if ranks > 1:
        raise UnsupportedModelError(f"{KEY}: {name} asks the tower for attention, whose heads {ranks} ranks share: use one, or divprune")
    layer = vllm_config.model_config.hf_config.vision_feature_layer
    if not isinstance(layer, int):
        raise UnsupportedModelError(f"{KEY}: {name} asks the tower for the attention of one layer, and this model takes {len(layer)}")


@contextlib.contextmanager
def watching(tower: Any, strategy: str, into: dict[str, Tensor]) -> Iterator[None]:
    """Puts attention (views, N) and keys (views, N, d) of the views that run inside into the dictionary.

    tower: vLLM's. strategy: the model's ``vision_feature_select_strategy``.
    """
    inner = getattr(tower, "vision_model", tower)
    attention = inner.encoder.layers[-1].self_attn
    has_class = hasattr(inner.embeddings, "class_embedding")
    first = 1 if has_class and strategy == "default" else 0

    @torch.no_grad()
    def record(module: Any, args: Any, output: Any) -> None:
        q, k, _ = (part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2).float() for part in output[0].chunk(3, dim=-1))
        if has_class:
            weights = (q[:, :, :1] @ k.transpose(-1, -2) * k.shape[-1] ** -0.5).softmax(-1)
            into["attention"] = weights.mean((1, 2))[:, first:]
        else:
            into["attention"] = torch.stack([received(*view) for view in zip(q, k)]) / k.shape[2]
        into["keys"] = k.mean(1)[:, first:]

    handle = attention.qkv_proj.register_forward_hook(record)
    try:
        yield
    finally:
        handle.remove()
