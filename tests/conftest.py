"""Tiny random models, their processor, batches of seeded noise, and the slow reference that everything is held against."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: a test never asks the network
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start too: there is a core for each of pytest's own

import copy
import functools
import gc
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from .once import pytest_collection_modifyitems, pytest_runtest_protocol, pytest_runtest_teardown  # noqa: F401

torch.set_num_threads(1)

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
WORDS = "user assistant : ? . , what is the a an how many are in on of left right red blue green ring cross big small yes no".split()
VOCABULARY = {token: i for i, token in enumerate((*SPECIAL, *WORDS))}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
PROMPTS = {
    "one image": ("user : <image> what is the big ring ? assistant :", 1),
    "two images": ("user : <image> is the ring in <image> red or blue ? assistant :", 2),
    "text only": ("user : what is a cross ? assistant :", 0),
    "long text": ("user : <image> " + "how many small blue rings are on the left of the red cross , " * 3 + "? assistant :", 1),
    "touching images": ("user : <image><image> are the rings green ? assistant :", 2),
}
MIXED = ("one image", "two images", "text only", "long text")


def pytest_collection_finish() -> None:
    """What is alive by now stays so, and every full collection of garbage, torch's and the tests' own, would look at all of it."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup() -> None:
    """What measures times lets go of all that is frozen when it is done, and every collection for the rest of the run would take longer."""
    if gc.get_freeze_count() == 0:
        gc.freeze()


@functools.cache
def _llava(tower: str, image_size: int, patch_size: int, hidden: int, layers: int, vision_layers: int, seed: int, settings: tuple):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    kind, strategy = {"clip": (CLIPVisionConfig, "default"), "siglip": (SiglipVisionConfig, "full")}[tower]
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in settings}
    side = image_size // patch_size
    vision = kind(
        hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=vision_layers, num_attention_heads=4,
        image_size=image_size, patch_size=patch_size,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=VOCABULARY["<image>"], image_seq_length=side * side,
        **{"vision_feature_layer": -1, "vision_feature_select_strategy": strategy, **settings},
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        # The decoder's matrices are larger: with 0.1 everywhere greedy decoding falls into short loops.
        for name, parameter in model.named_parameters():
            scale = 0.3 if "language_model" in name and parameter.ndim == 2 else 0.1
            parameter += torch.randn(parameter.shape, generator=generator) * scale
        model.lm_head.weight[[config.image_token_id, 0]] = 0  # answers hold no placeholder and no padding
    # No end of sequence: every row of every call generates the same number of tokens unless a test sets one.
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


@pytest.fixture(scope="session")
def make_llava() -> Callable:
    """A fresh copy of a tiny random LLaVA; ``settings`` go to ``LlavaConfig`` (a list as a tuple)."""

    def make(tower="clip", image_size=48, patch_size=8, hidden=32, layers=3, vision_layers=2, seed=0, **settings):
        settings = tuple(sorted(settings.items()))
        return copy.deepcopy(_llava(tower, image_size, patch_size, hidden, layers, vision_layers, seed, settings))

    return make


@pytest.fixture
def tiny_llava(make_llava):
    """CLIP tower of 6 x 6 = 36 tokens, Llama of 3 layers, both 32 wide, weights that make the output vary."""
    return make_llava()


@pytest.fixture(scope="session")
def make_processor() -> Callable:
    """The processor of a tiny LLaVA of these sizes."""

    @functools.cache
    def make(image_size: int = 48, patch_size: int = 8, padding_side: str = "left"):
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
        from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

        core = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
        core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
        core.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", VOCABULARY["<s>"])])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
            additional_special_tokens=["<image>"], padding_side=padding_side, model_max_length=1024,
        )  # fmt: skip
        images = CLIPImageProcessorPil(
            size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}, do_convert_rgb=True
        )
        return LlavaProcessor(
            image_processor=images, tokenizer=tokenizer, patch_size=patch_size, vision_feature_select_strategy="default",
            chat_template=CHAT_TEMPLATE, image_token="<image>", num_additional_image_tokens=1,
        )  # fmt: skip

    return make


@pytest.fixture(scope="session")
def processor(make_processor):
    """The processor of ``tiny_llava``."""
    return make_processor()


@pytest.fixture(scope="session")
def picture() -> Callable:
    """``picture(seed)``: seeded noise, 48 x 48."""
    return noise


def noise(seed: int, size: int = 48):
    from PIL import Image

    pixels = torch.randint(0, 256, (size, size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@pytest.fixture(scope="session")
def make_batch(make_processor) -> Callable:
    """``make_batch("one image", "text only")``: a batch with these rows (the keys of ``PROMPTS``), one prompt each.

    A row brings the same pictures and text into every batch it is in. Keyword arguments: the sizes, the padding side.
    """

    def make(*rows: str, image_size: int = 48, patch_size: int = 8, padding_side: str = "left"):
        pictures = [noise(10 * list(PROMPTS).index(row) + i, image_size) for row in rows for i in range(PROMPTS[row][1])]
        return make_processor(image_size, patch_size, padding_side)(
            images=pictures or None, text=[PROMPTS[row][0] for row in rows], return_tensors="pt", padding=True
        )

    return make


@pytest.fixture(scope="session")
def reference():
    """The slow path: one row at a time, features put between the text by hand, no cache, no padding."""
    return SimpleNamespace(
        features=image_features, compressed=compressed_by_hand, splice=splice, logits=bare_logits, greedy=slow_greedy, loss=slow_loss
    )


@torch.no_grad()
def image_features(model, pixel_values: Tensor, **call) -> list[Tensor]:
    """What the stock tower and projector make of each picture, (N, D) each."""
    return list(model.model.get_image_features(pixel_values=pixel_values, return_dict=True, **call).pooler_output)


def eager_attention(model, pixels, layer):
    """Attention (images, heads, n, n) and keys (images, n, d) of a tower layer, from an eager copy of the model."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    modules = [m for n, m in eager.model.vision_tower.named_modules() if n.endswith("self_attn")]
    keys = []
    handle = modules[layer].k_proj.register_forward_hook(lambda m, a, out: keys.append(out))
    with torch.no_grad():
        out = eager.model.vision_tower(pixels, output_attentions=True)
    handle.remove()
    heads = modules[layer].num_heads
    return out.attentions[layer], keys[0].unflatten(-1, (heads, -1)).mean(2)


def attention_by_hand(model, pixels: Tensor) -> dict[str, list[Tensor]]:
    """``attention`` and ``keys`` of each picture's patches in the layer whose output the model takes."""
    layer, tower = model.config.vision_feature_layer, model.config.vision_config
    attention, keys = eager_attention(model, pixels, layer - 1 if layer >= 0 else tower.num_hidden_layers + layer)
    if tower.model_type == "clip_vision_model":
        return {"attention": list(attention.mean(1)[:, 0, 1:]), "keys": list(keys[:, 1:])}
    return {"attention": list(attention.mean((1, 2))), "keys": list(keys)}


def compressed_by_hand(model, spec, pixels: Tensor, keys: Sequence | None = None) -> tuple[list[Tensor], list[Tensor] | None]:
    """What ``spec`` leaves of the pictures of one row, and the places the tokens had if their positions are kept.

    Pooling and resizing are written out for 6 x 6 tokens to 3 x 3; other methods are asked picture by picture.
    """
    import mllm_efficient as me
    from mllm_efficient.compressors.base import generator_for

    method = me.build(spec)
    if len(pixels) == 0:
        return [], None
    if method.name == "resize":
        small = torch.nn.functional.interpolate(pixels, (24, 24), mode="bicubic", antialias=True)
        return image_features(model, small, interpolate_pos_encoding=True), None
    full = image_features(model, pixels)
    if method.name == "pool":
        blocks = [f.reshape(3, 2, 3, 2, -1) for f in full]
        return [(b.mean((1, 3)) if method.op == "avg" else b.amax((1, 3))).reshape(9, -1) for b in blocks], None
    if method.merges:  # tested token by token where the method is
        seen = attention_by_hand(model, pixels) if "attention" in method.needs else {}
        extra = [{name: values[i] for name, values in seen.items()} for i in range(len(full))]
        return [method.compress(me.VisualTokens(f, grid=(6, 6), **e), method.tokens).features for f, e in zip(full, extra)], None
    generators = [generator_for(method, key) for key in keys or range(len(full))]
    places = [method.select(me.VisualTokens(f, grid=(6, 6), generator=g)) for f, g in zip(full, generators)]
    return [f[p] for f, p in zip(full, places)], places if method.positions == "keep" else None


def splice(model, ids: Tensor, visual: Sequence[Tensor], n: int, places: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Embeddings and positions (length, D), (length,) of one row: n placeholders give way to the tokens of one image.

    ids: (L,) without padding. places: for each image the places of its tokens among the n; the positions are then
    those of the uncompressed prompt.
    """
    embeds, positions, at, image = [], [], 0, 0
    while at < len(ids):
        if ids[at] != model.config.image_token_id:
            embeds.append(model.get_input_embeddings()(ids[at : at + 1]))
            positions.append(torch.tensor([at]))
            at += 1
            continue
        assert (ids[at : at + n] == model.config.image_token_id).all()
        embeds.append(visual[image])
        positions.append(at + (places[image] if places is not None else torch.zeros(len(visual[image]), dtype=torch.long)))
        at, image = at + n, image + 1
    assert image == len(visual)
    together = torch.cat(embeds)
    return together, torch.cat(positions) if places is not None else torch.arange(len(together))


def bare_logits(model, embeds: Tensor, positions: Tensor) -> Tensor:
    """Logits (length, vocabulary) of the bare language model and head, without a cache."""
    hidden = model.model.language_model(
        inputs_embeds=embeds[None],
        position_ids=positions[None],
        attention_mask=torch.ones(1, len(embeds), dtype=torch.long),
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden)[0]


@torch.no_grad()
def slow_greedy(model, ids: Tensor, visual: Sequence[Tensor], n: int, new: int, places: Sequence[Tensor] | None = None) -> list[int]:
    """The ``new`` greedy tokens after one row, the whole sequence computed afresh for each of them."""
    embeds, positions = splice(model, ids, visual, n, places)
    first = len(ids) if places is not None else len(embeds)
    out: list[int] = []
    for position in range(first, first + new):
        token = bare_logits(model, embeds, positions)[-1].argmax()
        out.append(int(token))
        embeds = torch.cat([embeds, model.get_input_embeddings()(token[None])])
        positions = torch.cat([positions, torch.tensor([position])])
    return out


def slow_loss(model, ids: Tensor, labels: Tensor, visual: Sequence[Tensor], n: int) -> tuple[Tensor, int]:
    """Summed cross entropy of one row and how many tokens are in it. labels: (L,), those of visual tokens unused."""
    embeds, positions = splice(model, ids, visual, n)
    text = ids != model.config.image_token_id
    # A visual token predicts what follows it, but is no target itself.
    targets, at, image = [], 0, 0
    while at < len(ids):
        if text[at]:
            targets.append(labels[at : at + 1])
            at += 1
        else:
            targets.append(torch.full((len(visual[image]),), -100))
            at, image = at + n, image + 1
    target = torch.cat(targets)[1:]
    logits = bare_logits(model, embeds, positions)[:-1]
    return torch.nn.functional.cross_entropy(logits, target, ignore_index=-100, reduction="sum"), int((target != -100).sum())


@pytest.fixture
def registered():
    """``me.register`` whose methods are forgotten after the test."""
    import mllm_efficient as me
    from mllm_efficient import registry

    before = set(registry._registered)
    yield me.register
    for name in set(registry._registered) - before - set(registry.BUILTIN):
        del registry._registered[name]
