"""The sizes of a model's parts that its cost depends on, and how a configuration tells them. No torch, no transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mllm_efficient.errors import UnsupportedModelError

from .layers import UNLIKE, Layer

# Matrices in the MLP of a decoder layer: gate, up and down, or up and down.
MLP_MATRICES = {
    "glm4v_text": 3, "glm4v_moe_text": 3, "glm_ocr_text": 3, "gemma3_text": 3, "gemma4_text": 3,
    "llama": 3, "mistral": 3, "qwen2": 3, "qwen3": 3, "gemma": 3, "gemma2": 3, "phi3": 3, "cohere2": 3,
    "qwen2_vl_text": 3, "qwen2_5_vl_text": 3, "qwen3_vl_text": 3, "phi": 2, "gpt_neox": 2, "qwen3_5_text": 3, "qwen3_5_moe_text": 3,
    "llama4_text": 3, "cohere": 3, "ernie4_5": 3, "glm": 3, "glm4": 3, "granite": 3, "helium": 3, "olmo2": 3, "smollm3": 3,
}  # fmt: skip
# whose layers have a sliding window if the configuration names one
SLIDING = ("mistral", "phi3", "gemma2", "gemma3_text", "gemma4_text", "cohere2")
# Kinds of text models whose attention is Llama's: separate projections, rotary positions in two halves, nothing more. Of others, in-decoder
# methods are shown what the layer's own attention makes.
PLAIN = (
    "llama", "mistral", "qwen2", "qwen3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma", "granite", "qwen2_moe", "qwen3_moe", "mixtral",
    "starcoder2",
)  # fmt: skip
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}


class MissingSetting(AttributeError):
    """A configuration does not say what is asked of it."""


class Plain:
    """A configuration read from a file, its entries as attributes, as transformers has them. Raises ``MissingSetting``."""

    def __init__(self, content: Mapping[str, Any]):
        self.__dict__.update({str(k): Plain(v) if isinstance(v, Mapping) else v for k, v in content.items()})

    def __getattr__(self, name: str) -> Any:
        raise MissingSetting(repr(name))


@dataclass(frozen=True)
class Decoder:
    """A language model: ``layers`` alike, grouped heads, an MLP of two or three matrices, a head (tied or not).

    unlike: each layer by itself, where they are not alike; the sizes are then those of a layer with full attention.
    before: multiply-adds of a token in front of all layers.
    width: d, mlp_width: m, vocabulary: rows of the head. dtype: of the weights and the KV cache. windows: of each layer with
    sliding-window attention, the tokens that a token sees, itself among them; 0 for a layer that sees all. Empty: all do.
    plain: whether keys of a layer can be made without its queries and values, by a method that is shown them.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    vocabulary: int
    mlp_matrices: int = 3
    dtype: str = "float16"
    windows: tuple[int, ...] = ()
    plain: bool = True
    unlike: tuple[Layer, ...] = ()
    before: int = 0

    @property
    def each(self) -> tuple[Layer, ...]:
        """Every layer."""
        if self.unlike:
            return self.unlike
        wide, narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        weights = 2 * self.width * (wide + narrow) + self.mlp_matrices * self.width * self.mlp_width
        return (Layer(weights, wide, 2 * narrow),) * self.layers

    def cached(self, lengths: Sequence[int]) -> list[int]:
        """What is left in the cache of each layer after ``lengths[i]`` tokens: a window holds what its next token will see."""
        windows = self.windows or (0,) * len(lengths)
        return [min(n, window - 1) if window else n for n, window in zip(lengths, windows)]

    def cache_bytes(self, lengths: Sequence[int]) -> int:
        """What is kept after ``lengths[i]`` tokens in layer i: a key and a value for every key-value head, or a state."""
        width = BYTES[self.dtype]
        kept = sum(n * layer.cached * width for n, layer in zip(self.cached(lengths), self.each))
        return kept + sum(layer.scan.state_bytes(width) for layer in self.each if layer.scan is not None)


@dataclass(frozen=True)
class Merger:
    """What merges side x side patches into one between two layers of a tower: attention inside each such window, then two matrices.

    after: the layer that it follows. hidden: the width between the matrices.
    """

    after: int
    side: int
    hidden: int


@dataclass(frozen=True)
class Tower:
    """A vision transformer over patches of ``patch`` x ``patch`` pixels.

    frames: images that one patch spans (Qwen-VL takes a still twice). class_token: one more token than patches.
    mlp_matrices: 2, or 3 with a gate. pooling_head: SigLIP's attention pooling, which runs although nothing uses it.
    window: side of an attention window in patches, 0 for none; ``full_layers`` attend without it. fused: queries, keys and values
    come of one matrix, and a method that asks for attention or keys gets those that the tower has computed. pooled: patches that a token
    is the mean of, where a product with weights makes it. merger: works where a token is more patches than the projector alone merges.
    """

    layers: int
    width: int
    heads: int
    mlp_width: int
    patch: int
    channels: int = 3
    frames: int = 1
    class_token: bool = False
    mlp_matrices: int = 2
    pooling_head: bool = False
    window: int = 0
    full_layers: tuple[int, ...] = ()
    fused: bool = False
    pooled: int = 0
    merger: Merger | None = None


@dataclass(frozen=True)
class ProjectorSize:
    """Two matrices from ``inputs`` over ``hidden`` to ``outputs`` per visual token, or one to ``hidden`` where ``outputs`` is 0;
    ``copies`` of it (deepstack).

    gated: one half of the hidden width gates the other, so that the second matrix takes half of it (SwiGLU). before: multiply-adds of
    a token in what comes before both matrices. inside: of a token that the model's forward takes, in its own matrix in front of the layers.
    """

    inputs: int
    hidden: int
    outputs: int
    copies: int = 1
    gated: bool = False
    before: int = 0
    inside: int = 0


def decoder_of(config: Any, name: str) -> Decoder:
    """The language model of a configuration. Raises ``UnsupportedModelError`` for one whose layers are not known."""
    text = config.text_config
    kind = text.model_type
    if kind not in MLP_MATRICES:
        raise UnsupportedModelError(f"{name} has a {kind} decoder: FLOPs are known for {', '.join(MLP_MATRICES)}")
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) if kind in ("phi", "gpt_neox") else text.num_key_value_heads
    dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or getattr(text, "dtype", None)
    dtype = str(dtype).removeprefix("torch.")
    unlike = UNLIKE[kind](text) if kind in UNLIKE else ()
    return Decoder(
        text.num_hidden_layers, text.hidden_size, heads, kv_heads or heads, getattr(text, "head_dim", None) or text.hidden_size // heads,
        mlp_width(text), text.vocab_size, MLP_MATRICES[kind], dtype if dtype in BYTES else "float16", _windows(text),
        kind.removesuffix("_text") in PLAIN, unlike,
        text.hidden_size * text.hidden_size_per_layer_input * len(unlike) if kind == "gemma4_text" else 0,
    )  # fmt: skip


def mlp_width(text: Any) -> int:
    """Of a dense MLP, or of all experts together that a token goes to."""
    if not hasattr(text, "num_experts_per_tok"):
        return int(text.intermediate_size)
    if text.model_type == "llama4_text":
        return int((text.num_experts_per_tok + 1) * text.intermediate_size)
    shared = getattr(text, "n_shared_experts", 0) * text.moe_intermediate_size or text.shared_expert_intermediate_size
    return int(text.num_experts_per_tok * text.moe_intermediate_size + shared)


def _windows(text: Any) -> tuple[int, ...]:
    """The sliding window of each layer, as transformers takes it from the configuration."""
    kind, layers = text.model_type, text.num_hidden_layers
    if kind.startswith("qwen"):
        window = text.sliding_window if getattr(text, "use_sliding_window", False) else None
    elif kind == "llama4_text":
        window = text.attention_chunk_size
    else:
        window = text.sliding_window if kind in SLIDING else None
    if not window:
        return ()
    types = getattr(text, "layer_types", None)
    if types is None and kind.startswith("qwen"):
        types = ["sliding_attention" if i >= text.max_window_layers else "full_attention" for i in range(layers)]
    elif types is None and kind in ("gemma2", "gemma3_text", "gemma4_text", "cohere2", "llama4_text"):
        raise MissingSetting("'layer_types'")
    windows = tuple(window if types is None or types[i] in ("sliding_attention", "chunked_attention") else 0 for i in range(layers))
    return windows if any(windows) else ()


def clip_or_siglip(vision: Any, name: str) -> Tower:
    """The CLIP or SigLIP tower of a configuration. Raises ``UnsupportedModelError`` for another one."""
    kind = vision.model_type
    if kind not in ("clip_vision_model", "siglip_vision_model"):
        raise UnsupportedModelError(f"{name} has a {kind} tower: FLOPs are known for clip_vision_model and siglip_vision_model")
    return Tower(
        vision.num_hidden_layers, vision.hidden_size, vision.num_attention_heads, vision.intermediate_size,
        vision.patch_size, getattr(vision, "num_channels", 3), class_token=kind == "clip_vision_model",
        pooling_head=kind == "siglip_vision_model" and getattr(vision, "vision_use_head", True),
    )  # fmt: skip


def projector_after(layers: int | Sequence[int], tower: Tower, width: int) -> ProjectorSize:
    """LLaVA's: two matrices from the outputs of ``layers`` of the tower, side by side, to the language model's width."""
    return ProjectorSize(tower.width * (1 if isinstance(layers, int) else len(layers)), width, width)
