"""Folders of tiny models of all families but those whose processor needs torchvision, as a hub has them: config, weights, processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .families import FAMILIES, tiny

# Without those whose processor needs torchvision, or is put together for tests.
NAMES = ("llava", *(name for name, family in FAMILIES.items() if name != "cohere2_vision" and not family.marked))
VIDEO = {
    "llava_next_video": "LlavaNextVideoVideoProcessor", "llava_onevision": "LlavaOnevisionVideoProcessor",
    "internvl": "InternVLVideoProcessor", "qwen2_vl": "Qwen2VLVideoProcessor", "qwen2_5_vl": "Qwen2VLVideoProcessor",
    "qwen3_vl": "Qwen3VLVideoProcessor", "qwen3_5": "Qwen3VLVideoProcessor", "glm46v": "Glm46VVideoProcessor",
}  # fmt: skip
OF_PROCESSORS = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens", "num_image_tokens", "vision_aspect_ratio",
                 "image_seq_length")  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {% for part in m['content'] %}{% if part['type'] == 'image' %}IMAGE "
    "{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
)
INTERNVL = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}

BY_NAME = {  # what a family's processor asks its tokenizer for by name
    "internvl": INTERNVL,
    "glm46v": {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    "gemma3": {"boi_token": "<img>", "eoi_token": "</img>", "image_token": "<IMG_CONTEXT>"},
}


def placeholder(name: str) -> str:
    """What stands for a picture in a family's prompts."""
    return "<image>" if name == "llava" else FAMILIES[name].image


def parts_of(name: str, make_llava: Any, make_processor: Any) -> tuple[Any, Any]:
    """A family's tiny model and its processor."""
    return (make_llava(), make_processor()) if name == "llava" else (tiny(name), FAMILIES[name].processor("left"))


def save(name: str, folder: Path, model: Any, processor: Any, template: str | None = TEMPLATE, **settings: Any) -> Path:
    """Writes the folder. settings: of the image processor, on top of the tiny one's. Written by hand, because saving a processor
    with its video processor needs torchvision."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    if name in BY_NAME:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "extra_special_tokens": BY_NAME[name]}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template.replace("IMAGE", placeholder(name)))
    config = {"processor_class": type(processor).__name__, "image_processor": {**processor.image_processor.to_dict(), **settings}}
    config["image_processor"] = {k: v for k, v in config["image_processor"].items() if v is not None}
    config |= {k: getattr(processor, k) for k in OF_PROCESSORS if getattr(processor, k, None) is not None}
    if name in VIDEO:
        config["video_processor"] = {"video_processor_type": VIDEO[name]}
    (folder / "processor_config.json").write_text(json.dumps(config, default=dict))
    return folder
