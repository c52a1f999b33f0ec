"""The embedded model's shape, vocabulary and processor: a real ``LlavaForConditionalGeneration``, about 1.6 M parameters."""

from __future__ import annotations

from .scenes import COLOURS, SHAPES

IMAGE_SIZE, PATCH = 144, 12
GRID = IMAGE_SIZE // PATCH
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
WORDS = (
    *"user assistant : ? . , what is the there a an how many are in on of or than at".split(),
    *"colour shape shapes object big small digit digits corner half left right top bottom above below".split(),
    *"larger more answer with one word none yes no".split(),
    *(str(i) for i in range(10)),
    *COLOURS,
    *SHAPES,
)
VOCABULARY = {token: i for i, token in enumerate((*SPECIAL, *WORDS))}
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ ' ' }}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
MEAN, STD = (0.45, 0.45, 0.45), (0.25, 0.25, 0.25)


def build_config(hidden: int = 128, layers: int = 4, vision_layers: int = 4, mlp: int = 384):
    """The model's ``LlavaConfig``. Heads are 32 wide, which every attention kernel (vLLM's CPU one too) takes."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=vision_layers, num_attention_heads=hidden // 32,
        image_size=IMAGE_SIZE, patch_size=PATCH, hidden_act="gelu", projection_dim=hidden,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 32, max_position_embeddings=2048,
        tie_word_embeddings=True, bos_token_id=VOCABULARY["<s>"], eos_token_id=VOCABULARY["</s>"],
        pad_token_id=VOCABULARY["<pad>"],
    )  # fmt: skip
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=VOCABULARY["<image>"], image_seq_length=GRID * GRID,
        vision_feature_layer=-1, vision_feature_select_strategy="default", tie_word_embeddings=True,
    )  # fmt: skip


def build_processor():
    """Tokenizer, image processor and chat template of the embedded model."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", VOCABULARY["<s>"])])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        additional_special_tokens=["<image>"], padding_side="left", model_max_length=2048,
    )  # fmt: skip
    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=MEAN, image_std=STD, do_convert_rgb=True,
    )  # fmt: skip
    return LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE, image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip
