"""The language of the embedded models that came after the first: words, tokenizer and chat template, in Qwen's manner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .architecture import SPECIAL as LLAVA_SPECIAL
from .architecture import VOCABULARY as LLAVA_VOCABULARY
from .hard import vocabulary

IMAGE_SIZE = 224  # pixels at which the first benchmark's scenes are asked
CELL = 28  # pixels: the harder benchmark's pictures are multiples of it
GROUNDING = ("word", "height", "side", "middle")  # words of questions that only training asks
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
WORDS = tuple(w for w in LLAVA_VOCABULARY if w not in LLAVA_SPECIAL)
VOCABULARY = {token: i for i, token in enumerate(dict.fromkeys((*SPECIAL, *WORDS, *vocabulary(), *GROUNDING)))}
USER = ("<|im_start|>", "user")  # before the pictures
TURN = ("<|im_end|>", "<|im_start|>", "assistant")  # between a question and its answer
END, PAD = "<|im_end|>", "<|endoftext|>"


def chat_template(image: str, video: str) -> str:
    """image, video: what stands for one in a prompt."""
    return (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}"
        f"{{% if part['type'] == 'image' %}}{image}{{% elif part['type'] == 'video' %}}{video}"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def build_tokenizer() -> Any:
    """A word-level tokenizer with the names of Qwen's special tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=END, pad_token=PAD, unk_token="<unk>", padding_side="left", model_max_length=4096,
        additional_special_tokens=[t for t in SPECIAL if t not in (END, PAD, "<unk>")],
    )  # fmt: skip


def text_settings(hidden: int, layers: int) -> dict[str, Any]:
    """Of a decoder's configuration. Heads are 32 wide, which every attention kernel (vLLM's CPU one too) takes."""
    return {
        "vocab_size": len(VOCABULARY), "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": hidden // 32, "num_key_value_heads": hidden // 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
        "pad_token_id": VOCABULARY[PAD], "bos_token_id": None, "eos_token_id": VOCABULARY[END], "tie_word_embeddings": True,
    }  # fmt: skip


def save_processor(folder: Path, template: str, **config: Any) -> None:
    """Writes what a processor class reads. By hand, because saving one with its video processor needs torchvision.

    config: the content of ``processor_config.json``.
    """
    build_tokenizer().save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template)
    (folder / "processor_config.json").write_text(json.dumps(config, indent=2) + "\n")
