"""Decoders whose layers differ: what each layer costs, read from the configuration of the language model. No torch, no transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Scan:
    """Linear attention by the gated delta rule: a short convolution over ``channels``, then a state of (heads, keys, values).

    A prompt is taken in chunks of ``chunk`` tokens, the last one filled up. Counted are matrix products and the convolution; the
    triangular systems inside a chunk, and one new token's steps, which are element by element, are not (as torch's counter has it).
    """

    heads: int
    keys: int
    values: int
    channels: int
    kernel: int
    chunk: int = 64

    def flops(self, tokens: int, first: bool) -> int:
        """tokens: new ones. first: whether nothing was before them."""
        if not first:  # the convolution runs over the kept inputs and the new one, and its last position is used
            return 2 * self.channels * self.kernel * 2
        chunks = -(-tokens // self.chunk)
        inside = self.chunk * self.chunk * (2 * self.keys + self.values)
        across = 3 * self.chunk * self.keys * self.values
        return 2 * self.channels * self.kernel * (tokens + self.kernel - 1) + 2 * chunks * self.heads * (inside + across)

    def state_bytes(self, width: int) -> int:
        """What is kept of a prompt of any length. width: bytes of a value of the model's dtype; the state itself is in float32."""
        return 4 * self.heads * self.keys * self.values + width * self.channels * self.kernel


@dataclass(frozen=True)
class Layer:
    """One decoder layer.

    weights: multiply-adds of a token through its matrices. wide: values of all query heads of a token, 0 where it does not attend.
    cached: values that it keeps of a token, 0 where it keeps none or reads those of another layer. scan: of linear attention. shares:
    whether it reads those of another layer: in a prefill it then runs for the last token alone.
    """

    weights: int
    wide: int
    cached: int
    scan: Scan | None = None
    shares: bool = False

    def flops(self, queries: int, keys: int, heads: int = 0) -> int:
        """``queries`` tokens that see ``keys``, themselves among them; in full where attention is causal. heads: how many of them the
        head is for, 0 for all."""
        queries = heads if heads and self.shares else queries
        scanned = 0 if self.scan is None else self.scan.flops(queries, queries == keys)
        return 2 * queries * self.weights + 4 * self.wide * queries * keys + scanned


def delta_net_layers(text: Any) -> tuple[Layer, ...]:
    """Qwen3.5's: three layers of linear attention to one of full attention with an output gate; a dense or a sparse MLP."""
    d, mlp = text.hidden_size, _mlp(text)
    wide, narrow = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    full = Layer(3 * d * wide + 2 * d * narrow + mlp, wide, 2 * narrow)  # queries and their gates
    heads, keys = text.linear_num_value_heads, text.linear_num_key_heads * text.linear_key_head_dim
    values = heads * text.linear_value_head_dim
    scan = Scan(heads, text.linear_key_head_dim, text.linear_value_head_dim, 2 * keys + values, text.linear_conv_kernel_dim)
    linear = Layer(d * (2 * keys + 3 * values + 2 * heads) + mlp, 0, 0, scan)
    return tuple(linear if kind == "linear_attention" else full for kind in text.layer_types)


def _mlp(text: Any) -> int:
    """Multiply-adds of a token through the MLP: of the experts that it goes to, the shared one and the routers, where they are sparse."""
    d = text.hidden_size
    if not hasattr(text, "num_experts"):
        return int(3 * d * text.intermediate_size)
    experts, shared = text.num_experts_per_tok * text.moe_intermediate_size, text.shared_expert_intermediate_size
    return int(3 * d * (experts + shared) + d * text.num_experts + d)


def glm_moe_layers(text: Any) -> tuple[Layer, ...]:
    """GLM-4.5V's: the first layers have a dense MLP, the others experts."""
    d = text.hidden_size
    head = getattr(text, "head_dim", None) or d // text.num_attention_heads
    wide, narrow = text.num_attention_heads * head, text.num_key_value_heads * head
    sparse = 3 * d * text.moe_intermediate_size * (text.num_experts_per_tok + text.n_shared_experts) + d * text.n_routed_experts
    mlps = [3 * d * text.intermediate_size if i < text.first_k_dense_replace else sparse for i in range(text.num_hidden_layers)]
    return tuple(Layer(2 * d * (wide + narrow) + mlp, wide, 2 * narrow) for mlp in mlps)


def gemma4_layers(text: Any) -> tuple[Layer, ...]:
    """Gemma 4's: heads of another width in layers that see all, keys shared by the last layers, per-layer inputs, experts by the MLP."""
    d, extra = text.hidden_size, 2 * text.hidden_size * (text.hidden_size_per_layer_input or 0)
    first_shared = text.num_hidden_layers - (text.num_kv_shared_layers or 0)
    if text.enable_moe_block:
        extra += 3 * d * text.moe_intermediate_size * text.top_k_experts + d * text.num_experts
    out = []
    for i, kind in enumerate(text.layer_types):
        full, shares = kind == "full_attention", i >= first_shared
        head, kv_heads = _gemma4_heads(text, i) if full else (text.head_dim, text.num_key_value_heads)
        wide, narrow = text.num_attention_heads * head, 0 if shares else kv_heads * head
        keys = narrow if full and text.attention_k_eq_v else 2 * narrow
        mlp = 3 * d * text.intermediate_size * (2 if shares and text.use_double_wide_mlp else 1)
        out.append(Layer(d * (2 * wide + keys) + mlp + extra, wide, 2 * narrow, shares=shares))
    return tuple(out)


def _gemma4_heads(text: Any, layer: int) -> tuple[int, int]:
    """(width of a head, key-value heads) of a layer that sees all: of a file, or as transformers has put it into ``per_layer_config``."""
    own = getattr(text, "per_layer_config", None)
    if own is not None:
        by_layer = {int(number): entry for number, entry in (own if isinstance(own, dict) else vars(own)).items()}  # a file says "05"
        own = by_layer[layer] if isinstance(by_layer[layer], dict) else vars(by_layer[layer])
        return own["head_dim"], own.get("num_key_value_heads") or text.num_key_value_heads
    fewer = text.attention_k_eq_v and getattr(text, "num_global_key_value_heads", None)
    return text.global_head_dim, fewer or text.num_key_value_heads


def llama4_layers(text: Any) -> tuple[Layer, ...]:
    """Llama 4's: dense layers, and layers of experts, of which transformers runs all on every token and multiplies most by zero."""
    d = text.hidden_size
    wide, narrow = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    sparse = 3 * d * text.intermediate_size * (text.num_local_experts + 1) + d * text.num_local_experts
    mlps = [sparse if i in text.moe_layers else 3 * d * text.intermediate_size_mlp for i in range(text.num_hidden_layers)]
    return tuple(Layer(2 * d * (wide + narrow) + mlp, wide, 2 * narrow) for mlp in mlps)


UNLIKE: dict[str, Callable[[Any], tuple[Layer, ...]]] = {
    "qwen3_5_text": delta_net_layers,
    "qwen3_5_moe_text": delta_net_layers,
    "glm4v_moe_text": glm_moe_layers,
    "gemma4_text": gemma4_layers,
    "llama4_text": llama4_layers,
}
