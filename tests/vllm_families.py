"""Tiny models with processors that a folder can name: InternVL, and families that vLLM's Transformers backend runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from . import families
from .families import MARKED, tokenizer
from .families_models import siglip

FRAMED = "<|vision_start|><|image_pad|><|vision_end|>"
COHERE = {"boi_token": "<img>", "eoi_token": "</img>", "image_token": "<IMG_CONTEXT>", "img_line_break_token": "<|vision_end|>"}


@dataclass(frozen=True)
class Served:
    """A family. config: of its tiny model, before its heads are made vLLM's. image: in a prompt. spec: of the method that is tried.

    noise: on the decoder's matrices, as much as makes pictures matter and answers no loops.
    """

    config: Callable[[], Any]
    processor: Callable[[], Any]
    image: str = "<image>"
    spec: str = "divprune:keep=0.4"
    noise: float = 0.3

    def model(self) -> Any:
        """A random one, with heads that vLLM takes."""
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(widened(self.config())).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                scale = self.noise if ("language_model" in name or "text_model" in name) and parameter.ndim == 2 else 0.1
                parameter += scale * torch.randn(parameter.shape)
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
        return model


def widened(config: Any) -> Any:
    """The configuration with two heads of 32 in the decoder, and projectors to match."""
    whole = config.to_dict()
    text = whole["text_config"]
    text |= {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": len(MARKED),
             "max_position_embeddings": 2048, "eos_token_id": 2}  # fmt: skip
    if "head_dim" in text:
        text["head_dim"] = 32
    if (text.get("rope_parameters") or {}).get("mrope_section"):
        text["rope_parameters"]["mrope_section"] = [8, 4, 4]
    if "out_hidden_size" in whole["vision_config"]:
        whole["vision_config"]["out_hidden_size"] = 64
    elif whole["model_type"] == "qwen2_vl":
        whole["vision_config"]["hidden_size"] = 64
    return type(config).from_dict(whole)


def words(names: dict[str, str] | None = None) -> Any:
    """The tokenizer of the tests, with a family's own names for its special tokens, which its folder keeps."""
    plain = tokenizer("left", marked=True)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>", padding_side="left",
        extra_special_tokens=list(plain.additional_special_tokens if hasattr(plain, "additional_special_tokens") else []),
        model_specific_special_tokens=names or {}, model_max_length=4096,
    )  # fmt: skip


def of(name: str) -> Callable[[], Any]:
    """The configuration of a family of ``families``."""
    return lambda: families.EVERY[name].build().config


def gemma3() -> Any:
    pictures = transformers.Gemma3ImageProcessorPil(size={"height": 24, "width": 24})
    names = {"boi_token": "<img>", "eoi_token": "</img>", "image_token": "<IMG_CONTEXT>"}
    return transformers.Gemma3Processor(image_processor=pictures, tokenizer=words(names), image_seq_length=9)


def internvl() -> Any:
    pictures = copy.deepcopy(families.EVERY["internvl"].processor("left").image_processor)
    pictures.crop_to_patches = False  # as in released folders: it is the processor of the family that cuts
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    videos = transformers.InternVLVideoProcessor(size={"height": 24, "width": 24})
    return transformers.InternVLProcessor(image_processor=pictures, tokenizer=words(names), video_processor=videos, image_seq_length=9)


def cohere2_vision() -> Any:
    from transformers.models.cohere2_vision.processing_cohere2_vision import Cohere2VisionProcessor

    pictures = transformers.Cohere2VisionImageProcessor(size={"height": 24, "width": 24}, min_patches=1, max_patches=4, patch_size=3)
    return Cohere2VisionProcessor(image_processor=pictures, tokenizer=words(COHERE))


def aya_vision() -> Any:
    pictures = transformers.GotOcr2ImageProcessorPil(size={"height": 24, "width": 24}, crop_to_patches=True, min_patches=1, max_patches=4)
    return transformers.AyaVisionProcessor(
        image_processor=pictures, tokenizer=words(), patch_size=4, img_size=24, downsample_factor=2, image_token="<image>",
        start_of_img_token="<img>", end_of_img_token="</img>", img_patch_token="<IMG_CONTEXT>", img_line_break_token="<|vision_end|>",
    )  # fmt: skip


def aya_config() -> Any:
    return transformers.AyaVisionConfig(
        vision_config=siglip(24, 4), text_config=families.llama(), image_token_index=MARKED["<IMG_CONTEXT>"], downsample_factor=2,
        vision_feature_layer=-1, vision_feature_select_strategy="full", alignment_intermediate_size=40, tie_word_embeddings=False,
    )  # fmt: skip


def idefics3() -> Any:
    pictures = transformers.Idefics3ImageProcessorPil(size={"longest_edge": 48}, max_image_size={"longest_edge": 24})
    return transformers.Idefics3Processor(image_processor=pictures, tokenizer=words(), image_seq_len=9)


def pixtral() -> Any:
    pictures = transformers.PixtralImageProcessorPil(size={"longest_edge": 48}, patch_size={"height": 8, "width": 8})
    return transformers.PixtralProcessor(
        image_processor=pictures, tokenizer=words(), patch_size=4, spatial_merge_size=2, image_token="<image>",
        image_break_token="[IMG_BREAK]", image_end_token="[IMG_END]",
    )  # fmt: skip


def lighton_ocr() -> Any:
    from transformers.models.lighton_ocr.processing_lighton_ocr import LightOnOcrProcessor

    pictures = transformers.PixtralImageProcessorPil(size={"longest_edge": 48}, patch_size={"height": 8, "width": 8})
    names = {"image_token": "<image>", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
    return LightOnOcrProcessor(image_processor=pictures, tokenizer=words(names), patch_size=4, spatial_merge_size=2)


def lighton_config() -> Any:
    whole = of("mistral3")().to_dict()
    kept = {k: whole[k] for k in ("vision_config", "image_token_index", "spatial_merge_size")}
    return transformers.LightOnOcrConfig(
        vision_config=kept["vision_config"], text_config=families.qwen2(), image_token_id=kept["image_token_index"], spatial_merge_size=2,
        tie_word_embeddings=False,
    )  # fmt: skip


def vipllava() -> Any:
    pictures = transformers.CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    return transformers.LlavaProcessor(
        image_processor=pictures, tokenizer=words(), patch_size=6, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def vipllava_config() -> Any:
    vision = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=24, patch_size=6)
    return transformers.VipLlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision), text_config=families.llama(), image_token_index=MARKED["<image>"],
        vision_feature_layers=[-2, -1], image_seq_length=16, tie_word_embeddings=False,
    )  # fmt: skip


def glm() -> Any:
    pictures = transformers.Glm46VImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 2 * 8 * 8 * 4, "longest_edge": 2 * 8 * 8 * 48}
    )
    videos = transformers.Glm46VVideoProcessor(patch_size=4, merge_size=2, temporal_patch_size=2)
    names = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    return transformers.Glm46VProcessor(image_processor=pictures, tokenizer=words(names), video_processor=videos)


def qwen2_vl() -> Any:
    pictures = copy.deepcopy(families.EVERY["qwen2_vl"].processor("left").image_processor)
    videos = transformers.Qwen2VLVideoProcessor(patch_size=4, merge_size=2, temporal_patch_size=2)
    return transformers.Qwen2VLProcessor(image_processor=pictures, tokenizer=words(), video_processor=videos)


def qwen3_5() -> Any:
    pictures = copy.deepcopy(families.EVERY["qwen3_5"].processor("left").image_processor)
    videos = transformers.Qwen3VLVideoProcessor(patch_size=4, merge_size=2, temporal_patch_size=2)
    return transformers.Qwen3VLProcessor(image_processor=pictures, tokenizer=words(), video_processor=videos)


def qwen3_5_config() -> Any:
    """With heads of linear attention as vLLM's kernels for CPUs take them."""
    config = of("qwen3_5")()
    for name in ("linear_key_head_dim", "linear_value_head_dim"):
        setattr(config.text_config, name, 128)
    config.text_config.rope_parameters["partial_rotary_factor"] = 1.0
    return config


SERVED = {
    "aya_vision": Served(aya_config, aya_vision),
    "cohere2_vision": Served(of("cohere2_vision"), cohere2_vision, "<IMG_CONTEXT>", "divprune:keep=0.4,per=tile"),
    "glm46v": Served(of("glm46v"), glm, FRAMED),
    "idefics3": Served(of("idefics3"), idefics3, spec="divprune:keep=0.4,per=tile"),
    "internvl": Served(of("internvl"), internvl, "<IMG_CONTEXT>", "cdpruner:keep=0.4"),
    "lighton_ocr": Served(lighton_config, lighton_ocr),
    "mistral3": Served(of("mistral3"), pixtral),
    "qwen2_vl": Served(of("qwen2_vl"), qwen2_vl, FRAMED),
    "vipllava": Served(vipllava_config, vipllava),
}
OWN = ("internvl",)  # with a class of its own in the plugin
ALIKE = {"lighton_ocr": "mistral3"}  # whose engines do the same as another's: theirs are not started
# What vLLM's runner for CPUs does not do as transformers, whether compressed or not.
NOT_ON_CPUS = {"gemma3": (Served(of("gemma3"), gemma3, "<img>"), "tokens of an image see each other")}
