"""``builtin-qwen``: a real ``Qwen3VLForConditionalGeneration`` of about 2.0 M parameters.

Qwen3-VL rather than Qwen2.5-VL: its queries and keys are normalised, which lets Muon's large steps train from nothing, its
deepstack features give the decoder a short path back into the tower, and full attention inside a picture packs into one
dense batch, where windows would need a reordering for each size. It is also the one of the two with deepstack to measure.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .chat import CELL, VOCABULARY, chat_template, save_processor, text_settings

PATCH, MERGE = 14, 2
SIDE = 12  # of the grid of learned positions, resampled to each picture's; and the largest picture's side in tokens


def build_config(hidden: int = 128, layers: int = 4, vision: int = 96, vision_layers: int = 4) -> Any:
    """The model's ``Qwen3VLConfig``."""
    from transformers import Qwen3VLConfig

    tower = {
        "depth": vision_layers, "hidden_size": vision, "intermediate_size": 3 * vision, "num_heads": vision // 32,
        "out_hidden_size": hidden, "patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": 2,
        "num_position_embeddings": SIDE * SIDE, "deepstack_visual_indexes": [1, 2],
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    return Qwen3VLConfig(
        text_config={**text_settings(hidden, layers), "head_dim": 32, "rope_parameters": rope}, vision_config=tower,
        image_token_id=VOCABULARY["<|image_pad|>"], video_token_id=VOCABULARY["<|video_pad|>"],
        vision_start_token_id=VOCABULARY["<|vision_start|>"], vision_end_token_id=VOCABULARY["<|vision_end|>"], tie_word_embeddings=True,
    )  # fmt: skip


def build_model() -> Any:
    """Random weights, of torch's seed."""
    from transformers import Qwen3VLForConditionalGeneration

    return Qwen3VLForConditionalGeneration(build_config())


def save(folder: Path) -> None:
    """Writes what ``Qwen3VLProcessor`` reads."""
    own = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2}
    images = {
        "image_processor_type": "Qwen2VLImageProcessor", **own, "size": {"shortest_edge": CELL**2 * 4, "longest_edge": CELL**2 * SIDE**2},
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_resize": True, "do_rescale": True, "do_normalize": True,
        "do_convert_rgb": True, "resample": 3,
    }  # fmt: skip
    template = chat_template(*(f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video")))
    videos = {"video_processor_type": "Qwen3VLVideoProcessor", **own}
    save_processor(folder, template, processor_class="Qwen3VLProcessor", image_processor=images, video_processor=videos)
