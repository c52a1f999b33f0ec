"""``builtin-tiles`` and ``builtin-video``: a real LLaVA-NeXT with tiles of any resolution, and a real LLaVA-OneVision for videos.

Of the families with tiles and videos, these two are served by vLLM with fewer tokens as well.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import torch

from .chat import CELL, VOCABULARY, chat_template, save_processor, text_settings

TILE = 112  # pixels: a side of the tower's picture
FRAMED = CELL // 2  # pixels: a patch of a frame, four of which are pooled to one token
# tiles of the largest picture: 3 x 3, as the harder benchmark's have at most 336 pixels a side
PINPOINTS = [[TILE * rows, TILE * columns] for rows, columns in product((1, 2, 3), repeat=2)]
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
LOOK = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3}


def _tower(hidden: int, layers: int, patch: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers, "num_attention_heads": hidden // 32,
        "image_size": TILE, "patch_size": patch,
    }  # fmt: skip


def _text(hidden: int, layers: int) -> Any:
    """Qwen3: its queries and keys are normalised, which lets large steps train from nothing."""
    from transformers import Qwen3Config

    rope = {"rope_type": "default", "rope_theta": 1000.0}
    return Qwen3Config(**text_settings(hidden, layers), head_dim=32, rope_parameters=rope, architectures=["Qwen3ForCausalLM"])


@torch.no_grad()
def placed(model: Any) -> Any:
    """The same model; its tower's learned positions begin as sines of row and column, as large as what a patch shows.

    At random they are a fiftieth of it, and the language model's loss alone takes thousands of steps to find them.
    """
    tower = model.model.vision_tower
    positions = tower.embeddings.position_embedding.weight
    grid = tower.config.image_size // tower.config.patch_size
    angle = 1.5 * torch.arange(grid)[:, None] * (1 / 30) ** torch.linspace(0, 1, positions.shape[1] // 4)
    one = torch.cat([angle.sin(), angle.cos()], 1)
    each = torch.cat([one[:, None].expand(-1, grid, -1), one.expand(grid, -1, -1)], -1).flatten(0, 1)
    positions[len(positions) - len(each) :] = each  # behind the class token, where there is one
    return model


def tiles_model(hidden: int = 128, layers: int = 4, vision: int = 160, vision_layers: int = 4) -> Any:
    """A LLaVA-NeXT of random weights: a CLIP tower whose patches are cells of 28 pixels, Qwen3."""
    from transformers import CLIPVisionConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    tower = CLIPVisionConfig(**_tower(vision, vision_layers, CELL), hidden_act="gelu", projection_dim=hidden)
    config = LlavaNextConfig(
        vision_config=tower, text_config=_text(hidden, layers), image_token_index=VOCABULARY[IMAGE],
        image_grid_pinpoints=PINPOINTS, vision_feature_layer=-1, vision_feature_select_strategy="default",
        image_seq_length=(TILE // CELL) ** 2, tie_word_embeddings=True,
    )  # fmt: skip
    return placed(LlavaNextForConditionalGeneration(config))


def save_tiles(folder: Path) -> None:
    """Writes what ``LlavaNextProcessor`` reads."""
    images = {
        "image_processor_type": "LlavaNextImageProcessor", **LOOK, "size": {"shortest_edge": TILE}, "do_center_crop": True, "do_pad": True,
        "crop_size": {"height": TILE, "width": TILE}, "image_grid_pinpoints": PINPOINTS, "do_convert_rgb": True,
    }  # fmt: skip
    save_processor(
        folder, chat_template(IMAGE, VIDEO), processor_class="LlavaNextProcessor", image_processor=images, image_token=IMAGE,
        patch_size=CELL, vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip


def video_model(hidden: int = 128, layers: int = 4, vision: int = 128, vision_layers: int = 4) -> Any:
    """A LLaVA-OneVision of random weights: a SigLIP tower with patches of 14 pixels, Qwen3."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, SiglipVisionConfig

    tower = SiglipVisionConfig(**_tower(vision, vision_layers, FRAMED), vision_use_head=False)
    config = LlavaOnevisionConfig(
        vision_config=tower, text_config=_text(hidden, layers), image_token_index=VOCABULARY[IMAGE],
        video_token_index=VOCABULARY[VIDEO], image_grid_pinpoints=PINPOINTS, vision_feature_layer=-1,
        vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_9", tie_word_embeddings=True,
    )  # fmt: skip
    return placed(LlavaOnevisionForConditionalGeneration(config))


def save_video(folder: Path) -> None:
    """Writes what ``LlavaOnevisionProcessor`` reads."""
    square = {"height": TILE, "width": TILE}
    images = {
        "image_processor_type": "LlavaOnevisionImageProcessor", **LOOK, "size": square, "do_pad": True, "do_convert_rgb": True,
        "image_grid_pinpoints": PINPOINTS,
    }  # fmt: skip
    videos = {"video_processor_type": "LlavaOnevisionVideoProcessor", **LOOK, "size": square}
    save_processor(
        folder, chat_template(IMAGE, VIDEO), processor_class="LlavaOnevisionProcessor", image_processor=images, video_processor=videos,
        image_token=IMAGE, video_token=VIDEO, num_image_tokens=(TILE // FRAMED) ** 2, vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
    )  # fmt: skip
