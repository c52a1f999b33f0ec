"""What a model can be asked at all, known from its kind and sizes alone: the same for an adapter (``wrap``) and for a shape (``flops``).

No torch. A host here is whatever says ``name``, ``decoder``, ``mrope``, ``deep_layers`` and ``decoder_layers``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mllm_efficient.errors import UnsupportedModelError

if TYPE_CHECKING:
    from mllm_efficient.compressors.reducer import Reducer

# kind of a text model: the class of its layers, in which in-decoder methods work
DECODERS = {
    "llama": "LlamaDecoderLayer", "mistral": "MistralDecoderLayer", "qwen2": "Qwen2DecoderLayer", "qwen3": "Qwen3DecoderLayer",
    "qwen2_vl": "Qwen2VLDecoderLayer", "qwen2_5_vl": "Qwen2_5_VLDecoderLayer", "qwen3_vl": "Qwen3VLTextDecoderLayer",
}  # fmt: skip


def check_reducer(host: Any, method: Reducer) -> None:
    """Raises ``UnsupportedModelError`` for a decoder that an in-decoder method cannot work in.

    host.decoder: the class of its layers.
    """
    if host.decoder not in DECODERS.values():
        kind = host.decoder
        raise UnsupportedModelError(f"{method.name} works inside the decoders of Llama, Qwen and Mistral, and this one is of {kind}")
    if not host.mrope:
        return
    if method.merges:
        raise UnsupportedModelError(f"{method.name} merges tokens, and a merged token has no place in the positions of {host.name}")
    if method.positions == "renumber":
        raise UnsupportedModelError(
            f"{method.name}: positions='renumber' has no meaning inside {host.name}, whose positions have three rows"
        )
    first, deep = method.stages(host.decoder_layers)[0], host.deep_layers
    if first < deep:
        raise UnsupportedModelError(
            f"{method.name} drops tokens at layer {first}, and {host.name} adds visual features up to layer {deep}: drop there or later"
        )
