"""A folder that a server can open of any LLaVA shape, without weights: the config, a processor, and a vocabulary of numbered words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..patches.rules import rules_class

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)


def random_folder(config: Any, folder: Path) -> None:
    """Writes the folder, for ``vllm serve FOLDER --load-format dummy``.

    config: of transformers, LLaVA-1.5 or LLaVA-NeXT; ``UnsupportedModelError`` for another family.
    """
    rules = rules_class(config.model_type)(config.model_type, config)
    made = rules.made_processor(_tokenizer(config), chat_template=TEMPLATE, image_token="<image>")
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
