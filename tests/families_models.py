"""Configurations and models of every family, tiny. Nothing here imports the package under test."""

from __future__ import annotations

from typing import Any

import transformers

SPECIAL = (
    "<pad>", "<s>", "</s>", "<unk>", "<image>", "<video>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>",
    "<IMG_CONTEXT>", "<img>", "</img>",
)  # fmt: skip
WORDS = (
    "user assistant : ? . , < > what is the a an how many are in on of left right red blue green ring cross big small yes no frame seconds "
    "0 1 2 3 4 5 6 7 8 9"
).split()
VOCABULARY = {token: i for i, token in enumerate((*SPECIAL, *WORDS))}
PAD = VOCABULARY["<pad>"]
TILE = 24
PINPOINTS = [[TILE * rows, TILE * columns] for rows, columns in ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (2, 3))]


def llama(**settings: Any):
    return transformers.LlamaConfig(
        **{"vocab_size": len(VOCABULARY), **settings}, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=1, eos_token_id=None, pad_token_id=PAD,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )  # fmt: skip


def qwen2(**settings: Any):
    return transformers.Qwen2Config(
        vocab_size=len(VOCABULARY), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=4096, bos_token_id=1, eos_token_id=None, pad_token_id=PAD,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0}, **settings,
    )  # fmt: skip


def clip(image_size: int, patch_size: int):
    return transformers.CLIPVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=image_size, patch_size=patch_size
    )


def siglip(image_size: int, patch_size: int):
    return transformers.SiglipVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=image_size, patch_size=patch_size,
        vision_use_head=False,
    )  # fmt: skip


def llava_next():
    config = transformers.LlavaNextConfig(
        vision_config=clip(TILE, 6), text_config=llama(), image_token_index=VOCABULARY["<image>"], image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2, vision_feature_select_strategy="default", image_seq_length=16,
    )  # fmt: skip
    return transformers.LlavaNextForConditionalGeneration(config)


def llava_next_video():
    config = transformers.LlavaNextVideoConfig(
        vision_config=clip(TILE, 6), text_config=llama(), image_token_index=VOCABULARY["<image>"], video_token_index=VOCABULARY["<video>"],
        image_grid_pinpoints=PINPOINTS, vision_feature_layer=-2, vision_feature_select_strategy="default", spatial_pool_mode="average",
        spatial_pool_stride=2,
    )  # fmt: skip
    return transformers.LlavaNextVideoForConditionalGeneration(config)


def llava_onevision():
    # 25 tokens a tile, 9 a frame: odd sides. The map of six tiles is more than anyres_max_4 allows and is shrunk.
    config = transformers.LlavaOnevisionConfig(
        vision_config=siglip(25, 5), text_config=qwen2(), image_token_index=VOCABULARY["<image>"], video_token_index=VOCABULARY["<video>"],
        image_grid_pinpoints=[[h // TILE * 25, w // TILE * 25] for h, w in PINPOINTS], vision_aspect_ratio="anyres_max_4",
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    return transformers.LlavaOnevisionForConditionalGeneration(config)


def internvl():
    vision = transformers.InternVLVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=[24, 24], patch_size=[4, 4],
    )  # fmt: skip
    config = transformers.InternVLConfig(
        vision_config=vision, text_config=qwen2(), image_token_id=VOCABULARY["<IMG_CONTEXT>"], image_seq_length=9, downsample_ratio=0.5,
        vision_feature_layer=-1, vision_feature_select_strategy="default", tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.InternVLForConditionalGeneration(config)


def cohere2_vision():
    config = transformers.Cohere2VisionConfig(
        vision_config=siglip(24, 4), text_config=llama(), image_token_id=VOCABULARY["<IMG_CONTEXT>"], downsample_factor=2,
        alignment_intermediate_size=40, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.Cohere2VisionForConditionalGeneration(config)


def mrope_text(**settings: Any) -> dict[str, Any]:
    # A small theta makes all three rows of positions matter to the last digit.
    return dict(
        vocab_size=len(VOCABULARY), hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=4096, bos_token_id=1, eos_token_id=None, pad_token_id=PAD, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 20.0, "mrope_section": [4, 2, 2]}, **{"num_hidden_layers": 3, **settings},
    )  # fmt: skip


MROPE_IDS = dict(
    image_token_id=VOCABULARY["<|image_pad|>"], video_token_id=VOCABULARY["<|video_pad|>"],
    vision_start_token_id=VOCABULARY["<|vision_start|>"], vision_end_token_id=VOCABULARY["<|vision_end|>"], tie_word_embeddings=False,
)  # fmt: skip


def qwen2_vl():
    vision = dict(
        depth=2, embed_dim=32, hidden_size=32, mlp_ratio=2, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2
    )
    return transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(text_config=mrope_text(), vision_config=vision, **MROPE_IDS)
    )


def qwen2_5_vl():
    # Windows of 2 x 2 tokens in the first block, full attention in the second.
    vision = dict(
        depth=2, hidden_size=32, out_hidden_size=32, intermediate_size=48, num_heads=2, patch_size=4, spatial_merge_size=2,
        temporal_patch_size=2, window_size=16, fullatt_block_indexes=[1], tokens_per_second=2,
    )  # fmt: skip
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(text_config=mrope_text(), vision_config=vision, **MROPE_IDS)
    )


def qwen3_vl():
    vision = dict(
        depth=3, hidden_size=32, out_hidden_size=32, intermediate_size=48, num_heads=2, patch_size=4, spatial_merge_size=2,
        temporal_patch_size=2, num_position_embeddings=64, deepstack_visual_indexes=[0, 1],
    )  # fmt: skip
    text = mrope_text(head_dim=16)
    text["rope_parameters"]["mrope_interleaved"] = True
    return transformers.Qwen3VLForConditionalGeneration(transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **MROPE_IDS))


QWEN3_5_VISION = dict(
    depth=2, hidden_size=32, out_hidden_size=32, intermediate_size=48, num_heads=2, patch_size=4, spatial_merge_size=2,
    temporal_patch_size=2, num_position_embeddings=64,
)  # fmt: skip


def qwen3_5_text(**settings: Any) -> dict[str, Any]:
    """Two layers of linear attention, one of full attention after each; fewer key heads than value heads."""
    text = mrope_text(
        head_dim=16, linear_key_head_dim=8, linear_value_head_dim=12, linear_num_key_heads=1, linear_num_value_heads=2,
        num_hidden_layers=4, layer_types=["linear_attention", "full_attention"] * 2, **settings,
    )  # fmt: skip
    text["rope_parameters"] |= {"mrope_interleaved": True, "partial_rotary_factor": 1.0}
    return text


def qwen3_5():
    config = transformers.Qwen3_5Config(text_config=qwen3_5_text(), vision_config=QWEN3_5_VISION, **MROPE_IDS)
    return transformers.Qwen3_5ForConditionalGeneration(config)


def qwen3_5_moe():
    experts = dict(moe_intermediate_size=24, shared_expert_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
    config = transformers.Qwen3_5MoeConfig(text_config=qwen3_5_text(**experts), vision_config=QWEN3_5_VISION, **MROPE_IDS)
    return transformers.Qwen3_5MoeForConditionalGeneration(config)


def glm(family: str, **settings: Any):
    """A model of GLM-4.1V's kind. family: what transformers' classes begin with."""
    vision = dict(
        depth=2, hidden_size=24, out_hidden_size=32, intermediate_size=48, num_heads=2, image_size=32, patch_size=4, spatial_merge_size=2,
        temporal_patch_size=2, rope_parameters={"rope_type": "axial", "rope_theta": 100.0},
    )  # fmt: skip
    text = mrope_text(head_dim=16, **settings)
    text["rope_parameters"]["partial_rotary_factor"] = 1.0
    ids = {name: MROPE_IDS[name] for name in ("image_token_id", "video_token_id", "tie_word_embeddings")}
    marks = {"image_start": "<|vision_start|>", "image_end": "<|vision_end|>", "video_start": "<img>", "video_end": "</img>"}
    ids |= {f"{name}_token_id": VOCABULARY[token] for name, token in marks.items()}  # by which generate counts images
    config = getattr(transformers, f"{family}Config")(text_config=text, vision_config=vision, **ids)
    return getattr(transformers, f"{family}ForConditionalGeneration")(config)


def gemma_text(**settings: Any) -> dict[str, Any]:
    """Layers with a sliding window and one without."""
    return dict(
        vocab_size=len(VOCABULARY), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, max_position_embeddings=4096, bos_token_id=1, eos_token_id=None, pad_token_id=PAD, sliding_window=4096,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"], **settings,
    )  # fmt: skip


def gemma3(window: int = 4096):
    """A model of which an image has nine tokens. window: of the sliding layers."""
    rope = {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in (("full_attention", 100.0), ("sliding_attention", 20.0))}
    config = transformers.Gemma3Config(
        vision_config=siglip(24, 4).to_dict(),
        text_config={**gemma_text(query_pre_attn_scalar=16, rope_parameters=rope), "sliding_window": window},
        mm_tokens_per_image=9, boi_token_index=VOCABULARY["<img>"], eoi_token_index=VOCABULARY["</img>"],
        image_token_index=VOCABULARY["<IMG_CONTEXT>"], tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(config)


def gemma4(**settings: Any):
    """A model whose last two layers read the keys of the two before, each layer with inputs of its own; a token is 2 x 2 patches."""
    vision = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16, patch_size=4,
        pooling_kernel_size=2, position_embedding_size=300,
    )  # fmt: skip
    text = gemma_text(
        hidden_size_per_layer_input=8, vocab_size_per_layer_input=len(VOCABULARY), num_kv_shared_layers=2, global_head_dim=24,
        use_bidirectional_attention="vision",
    )  # fmt: skip
    text |= {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, **settings}
    config = transformers.Gemma4Config(
        vision_config=vision, text_config=text, boi_token_id=VOCABULARY["<img>"], eoi_token_id=VOCABULARY["</img>"],
        image_token_id=VOCABULARY["<IMG_CONTEXT>"], video_token_id=VOCABULARY["<video>"], audio_token_id=VOCABULARY["<|vision_end|>"],
        tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.Gemma4ForConditionalGeneration(config)
