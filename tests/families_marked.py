"""Tiny models and processors of the families with text between the tokens of an image. ``families`` has the table of all."""

from __future__ import annotations

import copy
import functools
from typing import Any

import transformers

from . import families as base

MINICPM_NAMES = {
    "image_token": "<image>", "video_token": "<video>", "image_start_token": "<img>", "image_end_token": "</img>",
    "slice_start_token": "<|vision_start|>", "slice_end_token": "<|vision_end|>", "image_id_start_token": "<|image_pad|>",
    "image_id_end_token": "<|video_pad|>",
}  # fmt: skip


def pixtral(**settings: Any):
    return transformers.PixtralVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=12,
        image_size=48,
        patch_size=4,
        **settings,
    )


def mistral3():
    text = transformers.MistralConfig(
        **{**base.llama(vocab_size=len(base.MARKED)).to_dict(), "head_dim": 16, "sliding_window": None, "model_type": "mistral"}
    )
    config = transformers.Mistral3Config(
        vision_config=pixtral(),
        text_config=text,
        image_token_index=base.VOCABULARY["<image>"],
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    return transformers.Mistral3ForConditionalGeneration(config)


def idefics3():
    vision = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=4)
    config = transformers.Idefics3Config(
        vision_config=vision,
        text_config=base.llama(vocab_size=len(base.MARKED)),
        image_token_id=base.VOCABULARY["<image>"],
        scale_factor=2,
        tie_word_embeddings=False,
    )
    return transformers.Idefics3ForConditionalGeneration(config)


@functools.cache
def pixtral_tokenizer(padding_side: str):
    names = {"image_token": "<image>", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
    return base.named(base.tokenizer(padding_side, marked=True), names)


@functools.cache
def row_breaks() -> type:
    """Stands in for Pixtral's processor, which needs torchvision: that of LightOnOCR, and a break after every row."""
    from transformers.models.lighton_ocr.processing_lighton_ocr import LightOnOcrProcessor

    class RowBreaks(LightOnOcrProcessor):
        def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
            height, width = (int(side) // self.effective_patch_size for side in image_inputs["image_sizes"][image_idx])
            rows = [self.image_token * width] * height
            return self.image_break_token.join(rows) + self.image_end_token

    return RowBreaks


def mistral3_processor(side: str):
    pictures = transformers.PixtralImageProcessorPil(size={"longest_edge": 48}, patch_size={"height": 8, "width": 8})
    return row_breaks()(image_processor=pictures, tokenizer=pixtral_tokenizer(side), patch_size=4, spatial_merge_size=2)


def minicpm():
    config = transformers.MiniCPMV4_6Config(
        text_config=dict(
            vocab_size=len(base.MARKED),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            max_position_embeddings=4096,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=base.PAD,
            model_type="qwen3_5_text",
        ),
        vision_config=dict(
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=64,
            patch_size=4,
            model_type="minicpmv4_6_vision",
        ),
        insert_layer_id=0,
        image_size=32,
        image_token_id=base.VOCABULARY["<image>"],
        video_token_id=base.VOCABULARY["<video>"],
    )
    return transformers.MiniCPMV4_6ForConditionalGeneration(config)


def minicpm_processor(side: str):
    pictures = transformers.MiniCPMV4_6ImageProcessorPil(scale_resolution=32, patch_size=4, max_slice_nums=6, use_image_id=False)
    videos = base.Videos()
    videos.slice_mode, videos.downsample_mode = False, "16x"
    return base.standing_in(transformers.MiniCPMV4_6Processor)(
        image_processor=pictures, tokenizer=base.named(base.tokenizer(side, marked=True), MINICPM_NAMES), video_processor=videos
    )


def idefics3_processor(side: str):
    pictures = transformers.Idefics3ImageProcessorPil(size={"longest_edge": 48}, max_image_size={"longest_edge": 24})
    text = copy.deepcopy(base.tokenizer(side, marked=True))
    return transformers.Idefics3Processor(image_processor=pictures, tokenizer=text, image_seq_len=9)
