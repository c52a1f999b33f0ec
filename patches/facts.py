"""What the generic family must know of a model type: one row each, nothing else to write.

A row says how visual features enter the language model, where that differs from most: features that replace placeholders one by one,
plain positions, and causal attention. ``families.generic`` is driven by it; ``mllm-efficient doctor --all`` checks every row on a tiny
model. A type that stands in ``REFUSED`` cannot be compressed, for the reason given there. Types of ``rules.FAMILIES`` have a family of
their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from .controls import IMAGE_TOKENS, PIXELS

Version = tuple[int, int]  # (major, minor)


@dataclass(frozen=True)
class Facts:
    """One model type.

    grids: the argument of a call that says (frames, rows, columns) of each image in patches; "" where a call says nothing, so that
        every run of placeholders counts as an image.
    merge: patches along a side of a token; 0: as the configuration says.
    mrope: rows of positions, 0 where there is one. text_row: whether one more stands in front, the places in the prompt.
    deepstack: whether later layers add features, as ``deepstack_features``.
    beside: parts of the tower's output that are no tokens and that the language model takes as they are.
    read: the part of the tower's output that the language model takes.
    recurrent: whether layers of the decoder carry a state along (linear attention, convolution, Mamba), which a masked token changes.
    gaps: whether positions can be given, so that kept tokens may keep theirs.
    bidirectional: whether the tokens of an image attend to all of it.
    control: the settings by which its processor gives pictures fewer tokens, a name of ``controls.CONTROLS``.
    since: the first version of transformers that the row is right for. broken: one whose own model of the type raises at every call.
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
    bidirectional: bool = False
    control: str = ""
    since: Version = (5, 19)
    broken: Version | None = None
    example: str = "square"
    tiny: Mapping[str, Any] = field(default_factory=dict)

    def refusal(self, version: Version) -> str:
        """Why a version of transformers cannot run a model of this type compressed, "" if it can."""
        name, need = (".".join(map(str, v)) for v in (version, self.since))
        if version < self.since:
            return f"transformers {name} has it otherwise: {need} or newer is needed"
        return f"every call of it raises in transformers {name} itself: use another version" if version == self.broken else ""

    def written(self) -> str:
        """The row as it stands in ``FACTS``: what differs from most types."""
        plain = Facts()
        said = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != getattr(plain, f.name)]
        return f"Facts({', '.join(said)})"


THW = "image_grid_thw"


def _flat(**more: Any) -> Facts:
    """Flat patches, with the grid of each image beside them."""
    return Facts(**{"grids": THW, "example": "patches", **more})


# Settings of tiny models beyond what ``tiny`` makes small by itself.
ROPE = {"rope_type": "default", "rope_theta": 100.0}
MROPE = {"text_config": {"rope_parameters": {**ROPE, "mrope_section": [4, 2, 2]}}}
GLM_ROPE = {"text_config": {"rope_parameters": {**ROPE, "partial_rotary_factor": 1.0, "mrope_section": [4, 2, 2]}}}
TWO_DEEP = {"vision_config": {"deepstack_visual_indexes": [0, 1]}}
FOUR_LAYERS = {"text_config": {"num_hidden_layers": 4}}  # of which the last attends
COMPASS = {
    **TWO_DEEP,
    "text_config": {"rope_parameters": {k: {**ROPE, "mrope_section": [4, 2, 2]} for k in ("full_attention", "sliding_attention")}},
}
SAM = {
    "vision_config": {
        "sam_config": {
            "num_hidden_layers": 1, "patch_size": 16, "image_size": 1024, "global_attn_indexes": [], "downsample_channels": [16, 32],
        },
    },
}  # fmt: skip
DEEPSEEK_OCR = {
    **SAM,
    "text_config": {"mlp_layer_types": ["dense", "sparse", "sparse"], "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
}
GLM5 = {"text_config": {"num_hidden_layers": 4, "linear_head_dim": 16, "linear_num_heads": 2, "indexer_types": ["full"] * 4}}
HUNYUAN = {"text_config": {"head_dim": 16, "rope_parameters": {**ROPE, "mrope_section": [2, 2, 2, 2]}}}
INKLING = {"text_config": {"unpadded_vocab_size": 160}}
LLAMA4 = {"vision_config": {"intermediate_size": 128, "vision_output_dim": 32}}
MAMBA = {"text_config": {"ssm_state_size": 16, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "use_mamba_kernels": False}}
MINICPM = {"text_config": {"num_hidden_layers": 4}, "vision_config": {"insert_layer_id": 1}, "insert_layer_id": 1}
MUSE = {"text_config": {"layer_rope_theta": [1e4, 1e4, 0]}, "vision_config": {"patch_temporal": 1}, "out_hidden_size": 128}
QWEN4 = {
    "text_config": {
        "num_hidden_layers": 4, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 256,
        "indexer_compress_ratio": 1,
    },
}  # fmt: skip
UNIFIED = {"vision_config": {"model_type": "gemma4_unified_vision"}}

FACTS: dict[str, Facts] = {
    "aria": Facts(tiny={"projector_patch_to_query_dict": {"64": 16}}),
    "aya_vision": Facts(),
    "cohere2_vision": Facts(tiny={"vision_config": {"model_type": "siglip_vision_model"}, "alignment_intermediate_size": 64}),
    "cohere_compass": _flat(mrope=3, deepstack=True, tiny=COMPASS),
    "cosmos3_edge": _flat(mrope=3, since=(5, 24)),
    "cosmos3_omni": _flat(mrope=3, deepstack=True, tiny=TWO_DEEP),
    "deepseek_ocr2": Facts(example="large", tiny=DEEPSEEK_OCR),
    "deepseek_vl": Facts(),
    "deepseek_vl_hybrid": Facts(example="two_resolutions"),
    "ernie4_5_vl_moe": _flat(mrope=3, tiny={"text_config": {"rope_parameters": {**ROPE, "mrope_section": [3, 3, 2]}}}),
    "exaone4_5": _flat(),
    "fuyu": Facts(read="last_hidden_state", example="linear", since=(5, 24)),
    "gemma3": Facts(tiny={"mm_tokens_per_image": 16}, bidirectional=True),
    "gemma4": Facts(example="positions", tiny={"vision_config": {"model_type": "gemma4_vision"}}, bidirectional=True, since=(5, 24)),
    "gemma4_unified": Facts(example="tokens_with_positions", tiny=UNIFIED, bidirectional=True),
    "glm46v": _flat(mrope=3, tiny=GLM_ROPE),
    "glm4v": _flat(mrope=3, tiny=GLM_ROPE),
    "glm4v_moe": _flat(mrope=3, tiny=GLM_ROPE),
    "glm5_next": _flat(recurrent=True, tiny=GLM5),
    "glm_ocr": _flat(mrope=3, tiny=GLM_ROPE),
    "got_ocr2": Facts(),
    "granite_docling": Facts(example="tiles", deepstack=True, beside=("router_logits",), tiny=TWO_DEEP),
    "hunyuan_vl": Facts(example="patches", mrope=4, text_row=False, since=(5, 24), tiny=HUNYUAN),
    "hy_v4_vl": Facts(example="patches", mrope=3, tiny={"text_config": {"rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}}}),
    "hyperclovax_vision_v2": _flat(),
    "idefics2": Facts(example="padded"),
    "idefics3": Facts(example="padded"),
    "inkling2": _flat(gaps=False, merge=1, example="token_images", recurrent=True, tiny=INKLING),
    "inkling2_loop": _flat(gaps=False, merge=1, example="token_images", recurrent=True, tiny=INKLING),
    "internvl": Facts(),
    "janus": Facts(),
    "kimi_k25": _flat(example="patch_images"),
    "lfm2_vl": Facts(example="shapes", recurrent=True, control=IMAGE_TOKENS),
    "lfm3_vl": _flat(recurrent=True),
    "lighton_ocr": Facts(example="sizes"),
    "llama4": Facts(read="last_hidden_state", broken=(5, 24), tiny=LLAMA4),
    "llava": Facts(tiny={"vision_feature_layer": -1}),
    "llava_next": Facts(example="anyres"),
    "llava_next_video": Facts(example="anyres"),
    "llava_onevision": Facts(example="anyres"),
    "minicpm_ocr": Facts(example="targets", recurrent=True, tiny=MINICPM),
    "minicpmv4_6": Facts(example="targets", recurrent=True, tiny=MINICPM),
    "minicpmv4_7": Facts(example="targets", mrope=3, recurrent=True, tiny=MINICPM),
    "minimax_m3_vl": _flat(since=(5, 24)),
    "mistral3": Facts(example="sizes"),
    "mistral_large4": Facts(example="sizes"),
    "muse_glimmer": _flat(tiny=MUSE),
    "muse_spark": _flat(tiny={"vision_config": {"patch_temporal": 1}, "out_hidden_size": 128}),
    "nemotron_h_omni": Facts(recurrent=True, gaps=False, example="patches_hw", tiny=MAMBA),
    "ovis2": Facts(beside=("visual_indicator_features",)),
    "paddleocr_vl": _flat(mrope=3, control=PIXELS, example="patch_images", tiny=MROPE),
    "paligemma": Facts(bidirectional=True),
    "pp_chart2table": Facts(),
    "qianfan_ocr": Facts(),
    "qwen2_5_vl": _flat(mrope=3, tiny=MROPE),
    "qwen2_vl": _flat(mrope=3, tiny=MROPE),
    "qwen3_5": _flat(mrope=3, recurrent=True, tiny=FOUR_LAYERS),
    "qwen3_5_moe": _flat(mrope=3, recurrent=True, tiny=FOUR_LAYERS),
    "qwen3_vl": _flat(mrope=3, deepstack=True, tiny=TWO_DEEP),
    "qwen3_vl_moe": _flat(mrope=3, deepstack=True, control=PIXELS, tiny=TWO_DEEP),
    "qwen4_exp": _flat(mrope=3, recurrent=True, tiny=QWEN4),
    "shieldgemma2": Facts(tiny={"mm_tokens_per_image": 16}, bidirectional=True),
    "smolvlm": Facts(example="padded", since=(5, 24)),
    "step3p7": Facts(tiny={"text_config": {"sliding_window": 512}}),
    "unlimited_ocr": Facts(example="large", tiny=SAM),
    "video_llama_3": Facts(example="merged_patches"),
    "video_llava": Facts(since=(5, 24)),
    "vipllava": Facts(tiny={"vision_feature_layers": [-2, -1]}),
}  # fmt: skip

CODEBOOK = "its pictures are words of a codebook, which the model looks up like text"
BESIDE_TEXT = "its pictures go through an encoder together with the text"
NO_CHECK = "no tiny model of it can be built to check a row on"
TIMM = "its tower needs timm, without which no row was checked"

# Types of transformers whose models take features by ``mm_encoder_outputs`` and that have no row.
REFUSED: dict[str, str] = {
    "apertus1p5": CODEBOOK,
    "blip_2": "its pictures become a fixed number of queries by a Q-Former, and there is little to remove",
    "chameleon": CODEBOOK,
    "diffusion_gemma": "it writes by diffusion, not token by token",
    "dots3_note": NO_CHECK,
    "embedding_gemma2": "it gives embeddings, not text",
    "emu3": CODEBOOK,
    "fast_vlm": TIMM,
    "florence2": BESIDE_TEXT,
    "gemma3n": TIMM,
    "glm_image": "it makes pictures",
    "granite4_vision": "its visual features are added between layers of the decoder alone, and nothing of them enters with the prompt",
    "inkling": NO_CHECK,
    "instructblip": "its pictures become a fixed number of queries by a Q-Former, and there is little to remove",
    "instructblipvideo": "its videos become a fixed number of queries by a Q-Former, and there is little to remove",
    "molmo2": NO_CHECK,
    "pe_audio_video": "it gives embeddings, not text",
    "perception_lm": TIMM,
    "qwen2_5_omni": "its thinker is a model inside another, which no row reaches",
    "qwen3_omni_moe": "its thinker is a model inside another, which no row reaches",
    "t5gemma2": BESIDE_TEXT,
}
