"""What an in-decoder method is shown of a layer: its keys and its attention from a few tokens, from its own projections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mllm_efficient.apply.signatures import cache_name


class Heads:
    """Keys of all tokens of a layer's input, and its attention from a few of them.

    states: (S, n, d) about to enter the layer; tables: cos and sin (.., n, head_dim).
    """

    def __init__(self, layer: Any, states: Tensor, tables: Sequence[Tensor]):
        self.attn, self.tables = layer.self_attn, tables
        self.device = states.device
        weight = next(layer.parameters())
        inside = states if weight.is_meta else states.to(weight.device)
        self.x = layer.input_layernorm(inside)
        self.window = window_of(layer)
        self.keys = self._heads("k", self.x, tables)

    def _heads(self, which: str, x: Tensor, tables: Sequence[Tensor]) -> Tensor:
        """(S, heads, m, head_dim) queries or keys of states (S, m, d), rotated."""
        parts = getattr(self.attn, f"{which}_proj")(x).to(self.device).unflatten(-1, (-1, self.attn.head_dim))
        norm = getattr(self.attn, f"{which}_norm", None)
        parts = (parts if norm is None else norm(parts).to(self.device)).transpose(1, 2)
        cos, sin = (t.unsqueeze(1).to(parts.dtype) for t in tables)
        first, second = parts.chunk(2, -1)
        return parts * cos + torch.cat([-second, first], -1) * sin

    def attention(self, columns: Tensor, seen: Tensor) -> Tensor:
        """(S, m, n), the mean over heads of the attention of columns (S, m) to all that are seen, (S, n) bool."""
        n = seen.shape[1]
        x = self.x.gather(1, columns[..., None].expand(-1, -1, self.x.shape[-1]).to(self.x.device))
        tables = [t.expand(len(columns), -1, -1).gather(1, columns[..., None].expand(-1, -1, t.shape[-1])) for t in self.tables]
        queries = self._heads("q", x, tables)
        s, kv, _, width = self.keys.shape
        grouped = queries.reshape(s, kv, -1, width)  # (S, kv heads, queries of the group, width)
        scores = (grouped @ self.keys.transpose(-1, -2) * self.attn.scaling).view(s, -1, columns.shape[1], n)
        place = torch.arange(n, device=columns.device)
        visible = seen[:, None] & (place <= columns[..., None])
        if self.window is not None:
            visible &= place > columns[..., None] - self.window
        scores = scores.float().masked_fill(~visible[:, None], torch.finfo(torch.float32).min)
        return scores.softmax(-1).mean(1)


def window_of(layer: Any) -> int | None:
    """The sliding window of a layer's attention."""
    attn = layer.self_attn
    return attn.sliding_window if hasattr(attn, "sliding_window") else getattr(attn.config, "sliding_window", None)


def causal_mask(config: Any, hidden: Tensor, seen: Tensor | None, cache: Any, index: int, window: int | None) -> Any:
    """The mask of one layer, as wide as that layer's own cache. seen: (B, keys) bool, None for all."""
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    # Without layer_idx the keys would be counted in a layer that has seen this call already (reference, trap 5).
    make = create_causal_mask if window is None else create_sliding_window_causal_mask
    return make(config=config, inputs_embeds=hidden, attention_mask=seen, layer_idx=index, **{cache_name(make): cache})
