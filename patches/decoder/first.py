"""What the text asks for in the decoder's first layer, before any of it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..running import at_hand


@torch.no_grad()
def text_to_vision(decoder: Any, text: Tensor, features: Tensor) -> Tensor:
    """(heads, N) in float32: products of layer 0's queries of text (T, D) and keys of visual features (N, D), mean over the text.

    Without rotary positions, scaled as the layer's attention is. The mean of the queries is what meets the keys, which is the same.
    """
    layer = decoder.layers[0]
    attention = layer.self_attn
    with at_hand(layer.input_layernorm), at_hand(attention.q_proj), at_hand(attention.k_proj):
        queries, keys = (_heads(attention, which, layer.input_layernorm(x)) for which, x in (("q", text), ("k", features)))
    asked = queries.mean(1)  # (heads, head_dim)
    keys = keys.repeat_interleave(len(asked) // len(keys), 0)
    products: Tensor = (keys @ asked[..., None])[..., 0] * attention.scaling
    return products


def _heads(attention: Any, which: str, x: Tensor) -> Tensor:
    """(heads, n, head_dim) in float32."""
    parts = getattr(attention, f"{which}_proj")(x).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{which}_norm", None)
    heads: Tensor = (parts if norm is None else norm(parts)).transpose(0, 1).float()
    return heads
