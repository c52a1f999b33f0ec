"""Small models whose heads vLLM takes, and what tests of the plugin share."""

from __future__ import annotations

import copy
import importlib.util
import os

import pytest
import torch
import transformers

from . import families
from .families import PINPOINTS, VOCABULARY

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm: make test-integration")
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}


def config_of(name):
    """Of a small model whose heads vLLM takes."""
    text = {"vocab_size": len(VOCABULARY), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
    vision = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 24,
        "patch_size": 6,
    }
    if name == "llava_next":
        return transformers.LlavaNextConfig(
            vision_config=transformers.CLIPVisionConfig(**vision), text_config=transformers.LlamaConfig(**text),
            image_token_index=VOCABULARY["<image>"], image_grid_pinpoints=PINPOINTS, vision_feature_layer=-2,
            vision_feature_select_strategy="default", image_seq_length=16,
        )  # fmt: skip
    return transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**{**vision, "image_size": 25, "patch_size": 5}, vision_use_head=False),
        text_config=transformers.Qwen2Config(**text), image_token_index=VOCABULARY["<image>"], video_token_index=VOCABULARY["<video>"],
        image_grid_pinpoints=[[h // 24 * 25, w // 24 * 25] for h, w in PINPOINTS], vision_aspect_ratio="anyres_max_9",
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip


def processor_of(name):
    """The family's, as the config above has it; to be saved, with a video processor of its own."""
    out = copy.deepcopy(families.FAMILIES[name].processor("left"))
    if name == "llava_onevision":
        out.vision_aspect_ratio = "anyres_max_9"
    return out


def saved_processor_of(name):
    """The same with a class that its folder can name."""
    processor = processor_of(name)
    if name != "llava_onevision":
        return processor
    return transformers.LlavaOnevisionProcessor(
        image_processor=processor.image_processor, tokenizer=processor.tokenizer, num_image_tokens=25,
        video_processor=transformers.LlavaOnevisionVideoProcessor(), vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
    )  # fmt: skip


def model_of(name):
    """A random model."""
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config_of(name)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    return model
