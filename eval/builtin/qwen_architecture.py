"""``builtin-qwen``: shape, vocabulary and processor of a real ``Qwen3VLForConditionalGeneration`` of about 2.1 M parameters.

Qwen3-VL rather than Qwen2.5-VL: its queries and keys are normalised, which lets Muon's large steps train from nothing, its
deepstack features give the decoder a short path back into the tower, and full attention inside a picture packs into one
dense batch, where windows would need a reordering for each size. It is also the one of the two with deepstack to measure.
"""

from __future__ import annotations

import json
from pathlib import Path

from .architecture import SPECIAL as LLAVA_SPECIAL
from .architecture import VOCABULARY as LLAVA_VOCABULARY
from .hard import vocabulary

GROUNDING = ("word", "height", "side", "middle")  # words of the questions that only training asks

PATCH, MERGE = 14, 2
IMAGE_SIZE = 224  # pixels at which the first benchmark's scenes are asked
SIDE = 12  # of the grid of learned positions, resampled to each picture's
CELL = PATCH * MERGE  # pixels of a picture's side that one visual token covers
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
WORDS = tuple(w for w in LLAVA_VOCABULARY if w not in LLAVA_SPECIAL)
VOCABULARY = {token: i for i, token in enumerate(dict.fromkeys((*SPECIAL, *WORDS, *vocabulary(), *GROUNDING)))}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_config(hidden: int = 128, layers: int = 4, vision: int = 96, vision_layers: int = 4):
    """The model's ``Qwen3VLConfig``. Heads are 32 wide, which every attention kernel (vLLM's CPU one too) takes."""
    from transformers import Qwen3VLConfig

    tower = {
        "depth": vision_layers, "hidden_size": vision, "intermediate_size": 3 * vision, "num_heads": vision // 32,
        "out_hidden_size": hidden, "patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": 2,
        "num_position_embeddings": SIDE * SIDE, "deepstack_visual_indexes": [1, 2],
    }  # fmt: skip
    text = {
        "vocab_size": len(VOCABULARY), "hidden_size": hidden, "intermediate_size": 384, "num_hidden_layers": layers,
        "num_attention_heads": hidden // 32, "num_key_value_heads": hidden // 32, "head_dim": 32, "max_position_embeddings": 4096,
        "pad_token_id": VOCABULARY["<|endoftext|>"], "bos_token_id": None, "eos_token_id": VOCABULARY["<|im_end|>"],
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True},
    }  # fmt: skip
    return Qwen3VLConfig(
        text_config=text, vision_config=tower, image_token_id=VOCABULARY["<|image_pad|>"], video_token_id=VOCABULARY["<|video_pad|>"],
        vision_start_token_id=VOCABULARY["<|vision_start|>"], vision_end_token_id=VOCABULARY["<|vision_end|>"], tie_word_embeddings=True,
    )  # fmt: skip


def build_tokenizer():
    """A word-level tokenizer with the names of Qwen's special tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<unk>",
        additional_special_tokens=[t for t in SPECIAL if t not in ("<|im_end|>", "<|endoftext|>", "<unk>")],
        padding_side="left", model_max_length=4096,
    )  # fmt: skip


def save_processor(folder: Path) -> None:
    """Writes what ``Qwen3VLProcessor`` reads. By hand, because saving one with its video processor needs torchvision."""
    build_tokenizer().save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    images = {
        "image_processor_type": "Qwen2VLImageProcessor", "patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2,
        "size": {"shortest_edge": CELL**2 * 4, "longest_edge": CELL**2 * SIDE**2}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 3,
    }  # fmt: skip
    videos = {
        "video_processor_type": "Qwen3VLVideoProcessor",
        **{k: images[k] for k in ("patch_size", "merge_size", "temporal_patch_size")},
    }
    config = {"processor_class": "Qwen3VLProcessor", "image_processor": images, "video_processor": videos}
    (folder / "processor_config.json").write_text(json.dumps(config, indent=2) + "\n")
