"""A folder that a server can open of any LLaVA shape, without weights: the config, a processor, and a vocabulary of numbered words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UnsupportedModelError

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)


def random_folder(config: Any, folder: Path) -> None:
    """Writes the folder, for ``vllm serve FOLDER --load-format dummy``.

    config: of transformers, LLaVA-1.5 or LLaVA-NeXT; ``UnsupportedModelError`` for another family.
    """
    import transformers as t

    vision = config.vision_config
    side, patch = vision.image_size, vision.patch_size
    cls = "clip" in vision.model_type
    if config.model_type == "llava":
        sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        pictures, processor = (t.CLIPImageProcessor if cls else t.SiglipImageProcessor), t.LlavaProcessor
        sizes = sizes if cls else {"size": {"height": side, "width": side}}
    elif config.model_type == "llava_next":
        sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        sizes |= {"image_grid_pinpoints": config.image_grid_pinpoints}
        pictures, processor = t.LlavaNextImageProcessor, t.LlavaNextProcessor
    else:
        raise UnsupportedModelError(
            f"--random-weights on a server: {config.model_type} has no made-up processor; llava and llava_next have"
        )
    made = processor(
        image_processor=pictures(**sizes), tokenizer=_tokenizer(config), patch_size=patch, chat_template=TEMPLATE, image_token="<image>",
        vision_feature_select_strategy=config.vision_feature_select_strategy, num_additional_image_tokens=1 if cls else 0,
    )  # fmt: skip
    config.save_pretrained(folder)
    made.save_pretrained(folder)


def _tokenizer(config: Any) -> Any:
    """One word for each number of the vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    image, size = config.image_token_index, config.get_text_config().vocab_size
    special = {0: "<unk>", 1: "<s>", 2: "</s>", image: "<image>"}
    core = Tokenizer(models.WordLevel({special.get(i, f"w{i}"): i for i in range(max(size, image + 1))}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "<unk>", "pad_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, additional_special_tokens=["<image>"], clean_up_tokenization_spaces=False, **names
    )
