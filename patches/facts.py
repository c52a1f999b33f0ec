"""What the generic family must know of a model type: one row each, nothing else to write.

A row says how visual features enter the language model, where that differs from most: features that replace placeholders one by one,
plain positions, and causal attention. ``families.generic`` is driven by it; ``mllm-efficient doctor --all`` checks every row on a tiny
model. A type that stands in ``REFUSED`` cannot be compressed, for the reason given there. Types of ``rules.FAMILIES`` have a family of
their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Facts:
    """One model type.

    grids: the argument of a call that says (frames, rows, columns) of each image in patches, ``merge`` x ``merge`` of which are a
    token (0: as the configuration says); "" where a call says nothing, so that every run of placeholders counts as an image. mrope: rows of positions, 0 where there
    is one; text_row: whether one more stands in front, the places in the prompt. deepstack: whether later layers add features, as ``deepstack_features``. beside: parts of the tower's output that are no
    tokens and that the language model takes as they are. read: the part of the tower's output that the language model takes.
    recurrent: whether layers of the decoder carry a state along (linear attention, convolution, Mamba), which a masked token changes.
    gaps: whether positions can be given, so that kept tokens may keep theirs.
    example: how the pixels of one call look, a name of ``examples``. tiny: settings of the tiny model on which the row is checked.
    """

    grids: str = ""
    merge: int = 0
    mrope: int = 0
    text_row: bool = True
    deepstack: bool = False
    beside: tuple[str, ...] = ()
    read: str = "pooler_output"
    recurrent: bool = False
    gaps: bool = True
    example: str = "square"
    tiny: Mapping[str, Any] = field(default_factory=dict)


THW = "image_grid_thw"


def _flat(**more: Any) -> Facts:
    """Flat patches, with the grid of each image beside them."""
    return Facts(**{"grids": THW, "example": "patches", **more})


ROPE = {"rope_type": "default", "rope_theta": 100.0}
MROPE = {"text_config": {"rope_parameters": {**ROPE, "mrope_section": [4, 2, 2]}}}
GLM_ROPE = {"text_config": {"rope_parameters": {**ROPE, "partial_rotary_factor": 1.0, "mrope_section": [4, 2, 2]}}}
MINICPM = {"text_config": {"num_hidden_layers": 4}, "vision_config": {"insert_layer_id": 1}, "insert_layer_id": 1}
MAMBA = {"text_config": {"ssm_state_size": 16, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "use_mamba_kernels": False}}
TWO_DEEP = {"vision_config": {"deepstack_visual_indexes": [0, 1]}}
FOUR_LAYERS = {"text_config": {"num_hidden_layers": 4}}  # of which the last attends

FACTS: dict[str, Facts] = {
    "apertus1p5": Facts(),
    "aria": Facts(tiny={"projector_patch_to_query_dict": {"64": 16}}),
    "aya_vision": Facts(),
    "chameleon": Facts(),
    "cohere2_vision": Facts(tiny={"vision_config": {"model_type": "siglip_vision_model"}, "alignment_intermediate_size": 64}),
    "cohere_compass": _flat(mrope=3, deepstack=True, tiny={**TWO_DEEP, "text_config": {"rope_parameters": {"full_attention": {**ROPE, "mrope_section": [4, 2, 2]}, "sliding_attention": {**ROPE, "mrope_section": [4, 2, 2]}}}}),
    "cosmos3_edge": _flat(mrope=3),
    "cosmos3_omni": _flat(mrope=3, deepstack=True, tiny=TWO_DEEP),
    "deepseek_ocr2": Facts(),
    "deepseek_vl": Facts(),
    "deepseek_vl_hybrid": Facts(example="two_resolutions"),
    "dots3_note": _flat(),
    "emu3": Facts(example="sizes"),
    "ernie4_5_vl_moe": _flat(mrope=3, tiny={"text_config": {"rope_parameters": {**ROPE, "mrope_section": [3, 3, 2]}}}),
    "exaone4_5": _flat(),
    "fuyu": Facts(),
    "gemma3": Facts(tiny={"mm_tokens_per_image": 16}),
    "gemma4": Facts(example="positions", tiny={"vision_config": {"model_type": "gemma4_vision"}}),
    "gemma4_unified": Facts(example="tokens_with_positions", tiny={"vision_config": {"model_type": "gemma4_unified_vision"}}),
    "glm46v": _flat(mrope=3, tiny=GLM_ROPE),
    "glm4v": _flat(mrope=3, tiny=GLM_ROPE),
    "glm4v_moe": _flat(mrope=3, tiny=GLM_ROPE),
    "glm5_next": _flat(recurrent=True, tiny={"text_config": {"num_hidden_layers": 4, "linear_head_dim": 16, "linear_num_heads": 2}}),
    "glm_ocr": _flat(mrope=3, tiny=GLM_ROPE),
    "got_ocr2": Facts(),
    "granite_docling": Facts(example="tiles", deepstack=True, beside=("router_logits",), tiny=TWO_DEEP),
    "hunyuan_vl": Facts(example="patches", mrope=4, text_row=False, tiny={"text_config": {"head_dim": 16, "rope_parameters": {**ROPE, "mrope_section": [2, 2, 2, 2]}}}),
    "hy_v4_vl": Facts(example="patches", mrope=3, tiny={"text_config": {"rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}}}),
    "hyperclovax_vision_v2": _flat(),
    "idefics2": Facts(example="padded"),
    "idefics3": Facts(example="padded"),
    "inkling2": _flat(gaps=False, merge=1, example="token_images", recurrent=True, tiny={"text_config": {"unpadded_vocab_size": 160}}),
    "inkling2_loop": _flat(gaps=False, merge=1, example="token_images", recurrent=True, tiny={"text_config": {"unpadded_vocab_size": 160}}),
    "internvl": Facts(),
    "janus": Facts(),
    "kimi_k25": _flat(example="patch_images"),
    "lfm2_vl": Facts(example="shapes", recurrent=True),
    "lfm3_vl": _flat(recurrent=True),
    "lighton_ocr": Facts(example="sizes"),
    "llama4": Facts(read="last_hidden_state", tiny={"vision_config": {"intermediate_size": 128, "vision_output_dim": 32}}),
    "llava": Facts(tiny={"vision_feature_layer": -1}),
    "llava_next": Facts(example="anyres"),
    "llava_next_video": Facts(example="anyres"),
    "llava_onevision": Facts(example="anyres"),
    "minicpm_ocr": Facts(example="targets", recurrent=True, tiny=MINICPM),
    "minicpmv4_6": Facts(example="targets", recurrent=True, tiny=MINICPM),
    "minicpmv4_7": Facts(example="targets", mrope=3, recurrent=True, tiny=MINICPM),
    "minimax_m3_vl": _flat(),
    "mistral3": Facts(example="sizes"),
    "mistral_large4": Facts(example="sizes"),
    "molmo2": Facts(),
    "muse_glimmer": _flat(tiny={"text_config": {"layer_rope_theta": [1e4, 1e4, 0]}, "vision_config": {"patch_temporal": 1}, "out_hidden_size": 128}),
    "muse_spark": _flat(tiny={"vision_config": {"patch_temporal": 1}, "out_hidden_size": 128}),
    "nemotron_h_omni": Facts(recurrent=True, gaps=False, example="patches_hw", tiny=MAMBA),
    "ovis2": Facts(beside=("visual_indicator_features",)),
    "paddleocr_vl": _flat(mrope=3, example="patch_images", tiny=MROPE),
    "paligemma": Facts(),
    "pp_chart2table": Facts(),
    "qianfan_ocr": Facts(),
    "qwen2_5_vl": _flat(mrope=3, tiny=MROPE),
    "qwen2_vl": _flat(mrope=3, tiny=MROPE),
    "qwen3_5": _flat(mrope=3, recurrent=True, tiny=FOUR_LAYERS),
    "qwen3_5_moe": _flat(mrope=3, recurrent=True, tiny=FOUR_LAYERS),
    "qwen3_vl": _flat(mrope=3, deepstack=True, tiny=TWO_DEEP),
    "qwen3_vl_moe": _flat(mrope=3, deepstack=True, tiny=TWO_DEEP),
    "qwen4_exp": _flat(mrope=3, recurrent=True, tiny={"text_config": {"num_hidden_layers": 4, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 256, "indexer_compress_ratio": 1}}),
    "shieldgemma2": Facts(tiny={"mm_tokens_per_image": 16}),
    "smolvlm": Facts(example="padded"),
    "step3p7": Facts(tiny={"text_config": {"sliding_window": 512}}),
    "unlimited_ocr": Facts(),
    "video_llama_3": Facts(example="merged_patches"),
    "video_llava": Facts(),
    "vipllava": Facts(tiny={"vision_feature_layers": [-2, -1]}),
}  # fmt: skip

REFUSED: dict[str, str] = {}
