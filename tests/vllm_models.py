"""Small models whose heads vLLM takes, and what tests of the plugin share."""

from __future__ import annotations

import copy
import importlib.util
import os

import pytest
import torch
import transformers

from . import families
from .families import MROPE_IDS, PINPOINTS, VOCABULARY, mrope_text

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
    if name.startswith("qwen"):
        return _qwen(name)
    return transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**{**vision, "image_size": 25, "patch_size": 5}, vision_use_head=False),
        text_config=transformers.Qwen2Config(**text), image_token_index=VOCABULARY["<image>"], video_token_index=VOCABULARY["<video>"],
        image_grid_pinpoints=[[h // 24 * 25, w // 24 * 25] for h, w in PINPOINTS], vision_aspect_ratio="anyres_max_9",
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip


def _qwen(name):
    text = mrope_text(head_dim=32) if name == "qwen3_vl" else mrope_text()
    text |= {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "eos_token_id": 2}
    text["rope_parameters"] = {**text["rope_parameters"], "mrope_section": [8, 4, 4]}
    vision = {
        "depth": 3, "hidden_size": 64, "out_hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    if name == "qwen3_vl":
        text["rope_parameters"]["mrope_interleaved"] = True
        vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
        return transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **MROPE_IDS)
    vision |= {"window_size": 16, "fullatt_block_indexes": [1], "tokens_per_second": 2}
    return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **MROPE_IDS)


def processor_of(name):
    """The family's, as the config above has it; to be saved, with a video processor of its own."""
    out = copy.deepcopy(families.FAMILIES[name].processor("left"))
    if name == "llava_onevision":
        out.vision_aspect_ratio = "anyres_max_9"
    return out


def saved_processor_of(name):
    """The same with a class that its folder can name."""
    processor = processor_of(name)
    if name.startswith("qwen"):
        videos = transformers.Qwen3VLVideoProcessor if name == "qwen3_vl" else transformers.Qwen2VLVideoProcessor
        cls = transformers.Qwen3VLProcessor if name == "qwen3_vl" else transformers.Qwen2_5_VLProcessor
        return cls(
            image_processor=processor.image_processor, tokenizer=processor.tokenizer,
            video_processor=videos(patch_size=4, merge_size=2, temporal_patch_size=2),
        )  # fmt: skip
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


class W8A8(torch.nn.Module):
    """A linear layer of whole numbers: weights rounded for each output, inputs for each token, both between -127 and 127."""

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.data.float()
        self.scale = weight.abs().amax(dim=1, keepdim=True) / 127
        self.whole = (weight / self.scale).round()

    def forward(self, x):
        scale = x.float().abs().amax(dim=-1, keepdim=True) / 127
        return ((x.float() / scale).round() @ self.whole.T * scale * self.scale[:, 0]).to(x.dtype)


def quantized(model, folder, plain):
    """Rounds the decoder's layers of a model in place, and writes them as compressed-tensors W8A8, with the other files of ``plain``."""
    import json
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(plain, folder)
    weights = load_file(folder / "model.safetensors")
    layers = model.get_submodule("model.language_model.layers")
    for name, linear in [(n, m) for n, m in layers.named_modules() if isinstance(m, torch.nn.Linear)]:
        rounded, (parent, _, own) = W8A8(linear), name.rpartition(".")
        setattr(layers.get_submodule(parent), own, rounded)
        (key,) = [k for k in weights if k.endswith(f"layers.{name}.weight") and "language_model" in k]
        weights |= {key: rounded.whole.to(torch.int8), f"{key}_scale": rounded.scale}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    of_weights = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, "strategy": "channel"}
    group = {"targets": ["Linear"], "weights": of_weights, "input_activations": {**of_weights, "dynamic": True, "strategy": "token"}}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"], "config_groups": {"group_0": group},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
