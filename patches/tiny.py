"""Any configuration made small enough that a model of random weights is built and run in a fraction of a second.

What transformers' own classes name alike is made alike small; ids of special tokens are moved into the small vocabulary.
What one model type needs beyond that stands in its row of ``facts``.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

PAD, BOS, EOS, FIRST = 0, 1, 2, 4  # token ids of a tiny model; other special tokens from FIRST on
TEXT = 100  # the first id that stands for a word
WIDTH, HEADS, LAYERS = 32, 2, 3

DEPTHS = ("num_hidden_layers", "depth", "num_layers", "n_layer")

SMALL: dict[str, int] = {
    **dict.fromkeys(
        ("hidden_size", "embed_dim", "d_model", "dim", "n_embd", "width", "hidden_dim", "out_hidden_size", "output_hidden_size",
         "output_dim", "projection_dim", "projection_hidden_dim", "projection_hidden_size", "projector_hidden_size", "projector_input_dim",
         "projector_output_dim", "text_hidden_size", "decoder_hidden_size", "vision_hidden_size", "mm_hidden_size"), WIDTH),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "mlp_dim", "ffn_hidden_size", "intermediate_size_mlp"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 32),
    **dict.fromkeys(DEPTHS, LAYERS),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "attention_heads"), HEADS),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "swa_head_dim"), 16),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "swa_num_attention_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k"), 2),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 8), **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "v_head_dim"), 16),
    **dict.fromkeys(("n_group", "topk_group"), 1), "index_n_heads": 2, "index_head_dim": 16, "index_topk": 512,
    "encoder_layers": 2, "decoder_layers": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 160, "max_position_embeddings": 1024,
    "vocab_size_per_layer_input": 160, "hidden_size_per_layer_input": 16, "position_embedding_size": 64,
    "patch_size": 4, "spatial_patch_size": 4, "image_size": 32,
}  # fmt: skip
MADE_ANEW = ("layer_types", "mlp_layer_types", "no_rope_layers", "moe_layers", "per_layer_config")  # by transformers, from the rest
ENDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
PLACEHOLDERS = ("image_token_id", "video_token_id")  # which some configurations leave to the processor
SPECIAL = re.compile(r"(.*)_token_(?:id|index|ids)")


def tiny_config(config: Any, own: Mapping[str, Any] | None = None) -> Any:
    """A configuration of the same class, tiny. own: settings on top, those of a part under its name: ``{"text_config": {...}}``."""
    own = own or {}
    whole = config.to_dict()
    absent = {name: part for name, part in own.items() if isinstance(part, Mapping) and whole.get(name) is None}
    if absent:  # a part that the configuration leaves out by default
        whole = type(config).from_dict({**whole, **absent}).to_dict()
    settings = _small(whole)
    _move_ids(settings, {})
    return type(config).from_dict(_with(settings, own))


def _small(settings: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    layers = next((settings[name] for name in DEPTHS if isinstance(settings.get(name), int)), None)
    for name, value in settings.items():
        if name in MADE_ANEW:
            continue
        if isinstance(value, dict) and name.endswith("config"):
            out[name] = _small(value)
        elif isinstance(value, (list, tuple)) and len(value) == layers:  # one for each layer
            out[name] = copy.deepcopy(value[:LAYERS])
        elif name in SMALL and value and not isinstance(value, bool):
            out[name] = [SMALL[name]] * len(value) if isinstance(value, (list, tuple)) else SMALL[name]
        elif name == "rope_parameters" and isinstance(value, dict):
            out[name] = _small_rope(value)
        else:
            out[name] = copy.deepcopy(value)
    if "kv_lora_rank" in out:  # latent attention has keys of its own for every head
        out |= {"num_key_value_heads": HEADS, "head_dim": SMALL["qk_rope_head_dim"] if out.get("head_dim") else out.get("head_dim")}
    return out


def _small_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of M-RoPE that fill half a head; of each kind of layer where they differ."""
    out = {name: _small_rope(value) if isinstance(value, dict) else value for name, value in rope.items()}
    if out.get("mrope_section"):
        axes, half = len(out["mrope_section"]), SMALL["head_dim"] // 2
        out["mrope_section"] = [half - (axes - 1) * (half // (axes + 1)), *[half // (axes + 1)] * (axes - 1)]
    return out


def _move_ids(settings: dict[str, Any], known: dict[str, int]) -> None:
    """Special tokens of one name get one id, whatever part of the configuration names them."""
    for name, value in settings.items():
        special = SPECIAL.fullmatch(name) if isinstance(name, str) else None
        if isinstance(value, dict):
            _move_ids(value, known)
        elif name in ENDS and value is not None:
            settings[name] = ENDS[name]
        elif special and (name in PLACEHOLDERS or isinstance(value, int)) and not isinstance(value, (bool, list, tuple)):
            settings[name] = known.setdefault(special[1], FIRST + len(known))
        elif special and isinstance(value, (list, tuple)) and value and all(isinstance(token, int) for token in value):
            settings[name] = [known.setdefault(f"{special[1]}_{i}", FIRST + len(known)) for i in range(len(value))]


def _with(settings: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(settings)
    for name, value in own.items():
        out[name] = _with(out[name], value) if isinstance(value, Mapping) and isinstance(out.get(name), dict) else value
    return out
