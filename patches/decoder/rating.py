"""What an in-decoder method is shown of a layer: its keys and its attention from a few tokens, from its own projections."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mllm_efficient.apply.signatures import cache_name, parameters_of
from mllm_efficient.errors import UnsupportedModelError

from ..rules import PLAIN_LAYERS
from ..running import at_hand


def heads_of(layer: Any, states: Tensor, tables: Sequence[Tensor]) -> Heads:
    """What the attention of a layer makes of its input. states: (S, n, d) about to enter it; tables: cos and sin (.., n, head_dim)."""
    weight = next(layer.parameters())
    inside = states if weight.is_meta else states.to(weight.device)
    x = layer.input_layernorm(inside) if hasattr(layer, "input_layernorm") else inside  # OLMo 2 norms what attention gives instead
    kind = Heads if type(layer).__name__ in PLAIN_LAYERS else RecordedHeads
    return kind(layer, x, tables, states.device)


class Heads:
    """Keys of all tokens that enter a layer's attention, and its attention from a few of them.

    x: (S, n, d) what enters it; tables: cos and sin (.., n, head_dim); device: where the result shall be.
    """

    softcap: float | None = None
    sinks: Tensor | None = None

    def __init__(self, layer: Any, x: Tensor, tables: Sequence[Tensor], device: torch.device):
        self.attn, self.tables, self.x, self.device = layer.self_attn, tables, x, device
        self.window, self.scaling = window_of(layer), layer.self_attn.scaling
        self.keys = self._heads("k", self.x, tables)

    def _heads(self, which: str, x: Tensor, tables: Sequence[Tensor]) -> Tensor:
        """(S, heads, m, head_dim) queries or keys of states (S, m, d), rotated."""
        parts = getattr(self.attn, f"{which}_proj")(x).to(self.device).unflatten(-1, (-1, self.attn.head_dim))
        norm = getattr(self.attn, f"{which}_norm", None)
        parts = (parts if norm is None else norm(parts).to(self.device)).transpose(1, 2)
        cos, sin = (t.unsqueeze(1).to(parts.dtype) for t in tables)
        first, second = parts.chunk(2, -1)
        return parts * cos + torch.cat([-second, first], -1) * sin

    def queries(self, columns: Tensor) -> Tensor:
        """(S, heads, m, head_dim), rotated, of columns (S, m)."""
        x = self.x.gather(1, columns[..., None].expand(-1, -1, self.x.shape[-1]).to(self.x.device))
        tables = [t.expand(len(columns), -1, -1).gather(1, columns[..., None].expand(-1, -1, t.shape[-1])) for t in self.tables]
        return self._heads("q", x, tables)

    def attention(self, columns: Tensor, seen: Tensor) -> Tensor:
        """(S, m, n), the mean over heads of the attention of columns (S, m) to all that are seen, (S, n) bool."""
        n, queries = seen.shape[1], self.queries(columns)
        s, kv, _, width = self.keys.shape
        grouped = queries.reshape(s, kv, -1, width)  # (S, kv heads, queries of the group, width)
        scores = (grouped @ self.keys.transpose(-1, -2) * self.scaling).view(s, -1, columns.shape[1], n)
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        place = torch.arange(n, device=columns.device)
        visible = seen[:, None] & (place <= columns[..., None])
        if self.window is not None:
            visible &= place > columns[..., None] - self.window
        scores = scores.float().masked_fill(~visible[:, None], torch.finfo(torch.float32).min)
        if self.sinks is not None:  # what every head can attend to beside the tokens
            sinks = self.sinks.to(scores).reshape(1, -1, 1, 1).expand(s, -1, columns.shape[1], 1)
            return torch.cat([scores, sinks], -1).softmax(-1)[..., :n].mean(1)
        return scores.softmax(-1).mean(1)


class _Recorded(Exception):
    """The attention function was reached."""


class RecordedHeads(Heads):
    """The same of any layer: its own attention runs up to the attention function, which is handed queries and keys as the layer makes them.

    A shallow copy of the module runs, whose configuration names our function, so that nothing of the model is changed.
    """

    def __init__(self, layer: Any, x: Tensor, tables: Sequence[Tensor], device: torch.device):
        attn = copy.copy(layer.self_attn)
        attn.config = copy.copy(attn.config)
        attn.config._attn_implementation = _recorder()
        inside = tuple(t.to(x.device) for t in tables)
        self.window, made = window_of(layer), dict[str, Any]()
        reset = _recording.set(made)
        try:
            with at_hand(layer.self_attn), contextlib.suppress(_Recorded):
                type(layer.self_attn).forward(attn, hidden_states=x, position_embeddings=inside, attention_mask=None)
        finally:
            _recording.reset(reset)
        if not made:
            raise UnsupportedModelError(
                f"{type(attn).__name__} asks for attention in another way than other decoders: no method can rate it"
            )
        self.scaling, self.softcap, self.sinks = made["scaling"], made["softcap"], made["sinks"]
        self.all_queries, self.keys = made["queries"].to(device), made["keys"].to(device)

    def queries(self, columns: Tensor) -> Tensor:
        at = columns[:, None, :, None].expand(-1, self.all_queries.shape[1], -1, self.all_queries.shape[-1])
        return self.all_queries.gather(2, at)


_recording: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar("recording", default=None)


def _record(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    made = _recording.get()
    assert made is not None
    scaling = kwargs.get("scaling")
    made |= {"queries": query, "keys": key, "scaling": query.shape[-1] ** -0.5 if scaling is None else scaling}
    made |= {"softcap": kwargs.get("softcap"), "sinks": kwargs.get("s_aux")}
    raise _Recorded


@functools.cache
def _recorder() -> str:
    """The name of an attention function that keeps what it is given and ends the call."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("mllm_efficient_recorder", _record)
    return "mllm_efficient_recorder"


def window_of(layer: Any) -> int | None:
    """The sliding window of a layer's attention."""
    attn = layer.self_attn
    if hasattr(attn, "sliding_window"):
        return attn.sliding_window or None
    whole = kind_of(layer) == "full_attention"
    return None if whole else getattr(attn.config, "sliding_window", None) or None


def kind_of(layer: Any) -> str | None:
    """The kind of a layer's attention, on models whose layers of different kinds have different rotary positions."""
    kinds = getattr(layer.self_attn.config, "layer_types", None)
    return kinds[layer.self_attn.layer_idx] if kinds else None


def rotary_tables(decoder: Any, layer: Any, hidden: Tensor, places: Tensor) -> tuple[Tensor, ...]:
    """cos and sin (B, length, d) of a layer for positions (B, length)."""
    rotary = decoder.rotary_emb
    kind = {"layer_type": kind_of(layer)} if "layer_type" in parameters_of(type(rotary).forward) else {}
    return tuple(part.to(hidden.device) for part in rotary(hidden, position_ids=places, **kind))


def causal_mask(config: Any, hidden: Tensor, seen: Tensor | None, cache: Any, index: int, window: int | None) -> Any:
    """The mask of one layer, as wide as that layer's own cache. seen: (B, keys) bool, None for all."""
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    # Without layer_idx the keys would be counted in a layer that has seen this call already (reference, trap 5).
    make = create_causal_mask if window is None else create_sliding_window_causal_mask
    return make(config=config, inputs_embeds=hidden, attention_mask=seen, layer_idx=index, **{cache_name(make): cache})
