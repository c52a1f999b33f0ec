"""The staged decoder against a slow reference: one row at a time, layer by layer, no cache, no padding, no hooks."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import transformers

import mllm_efficient as me
from mllm_efficient.compressors.reducer import Reducer

from .conftest import VOCABULARY

NEW, STAGES, ROWS = 8, (2, 4), ("one image", "two images", "text only", "long text")
IMAGE, N = VOCABULARY["<image>"], 36
TEXT = dict(
    vocab_size=len(VOCABULARY), hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, max_position_embeddings=1024, bos_token_id=1, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
DECODERS = {
    "llama": lambda: transformers.LlamaConfig(**TEXT),
    "qwen2": lambda: transformers.Qwen2Config(**{k: v for k, v in TEXT.items() if k != "head_dim"}),
    "qwen3": lambda: transformers.Qwen3Config(**TEXT),
    "mistral": lambda: transformers.MistralConfig(**TEXT, sliding_window=None),
    "mistral, window": lambda: transformers.MistralConfig(**TEXT, sliding_window=20),
    "qwen2, some windows": lambda: transformers.Qwen2Config(
        **{k: v for k, v in TEXT.items() if k != "head_dim"}, use_sliding_window=True, sliding_window=20, max_window_layers=3
    ),
}
every_decoder = pytest.mark.parametrize("kind", list(DECODERS))
both_positions = pytest.mark.parametrize("positions", ["renumber", "keep"])


@functools.cache
def _model(kind: str):
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=48, patch_size=8
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=DECODERS[kind](), image_token_index=IMAGE, image_seq_length=N, vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = transformers.LlavaForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.25 if "language_model" in name and parameter.ndim == 2 else 0.1
            parameter += torch.randn(parameter.shape, generator=generator) * scale
        model.lm_head.weight[[IMAGE, 0]] = 0  # answers hold no placeholder and no padding
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def tiny(kind: str = "llama"):
    return copy.deepcopy(_model(kind))


# ------------------------------------------------------------------------------------------------ toy methods


@dataclass(frozen=True, kw_only=True)
class Staged(Reducer):
    """Two stages."""

    def layers(self, depth):
        return STAGES


@pytest.fixture
def toys(registered):
    """``half``: half of what reaches a stage, by a projection of the states. ``kernels``: pooling by 1 x 1, 1 x 2 or 2 x 2, as the
    question's last state says. ``identity``: pooling by 1 x 1."""  # fmt: skip

    @registered("half")
    @dataclass(frozen=True, kw_only=True)
    class Half(Staged):
        ratio: float | None = 0.5

        def score(self, v):
            return v.hidden.sum(-1)

    @registered("kernels")
    @dataclass(frozen=True, kw_only=True)
    class Kernels(Staged):
        merges: ClassVar[bool] = True
        ratio: float | None = 1.0

        def reduce(self, v, k):
            return pooled(v, kernel_of(v.question))

    @registered("identity")
    @dataclass(frozen=True, kw_only=True)
    class Identity(Staged):
        merges: ClassVar[bool] = True
        ratio: float | None = 1.0

        def reduce(self, v, k):
            return me.ReducedTokens(torch.arange(len(v)), v.hidden.clone(), v.places)

    return Half, Kernels, Identity


def kernel_of(question):
    return [(1, 1), (1, 2), (2, 2)][int(question.abs().sum() * 10) % 3]


def windows(places, kernel):
    """Lists of tokens that share a window, in raster order of the windows; floor mode, so what is left over at the edges goes."""
    rows, columns = int(places[:, 2].max()) + 1, int(places[:, 3].max()) + 1
    high, wide = kernel
    found = {}
    for i, (_, _, row, column) in enumerate(places.tolist()):
        if row // high < rows // high and column // wide < columns // wide:
            found.setdefault((row // high, column // wide), []).append(i)
    return dict(sorted(found.items()))


def pooled(v, kernel):
    found = windows(v.places, kernel)
    features = torch.stack([v.hidden[members].mean(0) for members in found.values()])
    first = torch.tensor([members[0] for members in found.values()])
    places = v.places[first].clone()
    places[:, 2:] = torch.tensor(list(found))
    return me.ReducedTokens(first, features, places)


# ------------------------------------------------------------------------------------------------ the slow reference


@dataclass
class Sequence:
    """A row between two layers. columns: of each token in the prompt. images: of each image the slots of its tokens."""

    hidden: torch.Tensor
    columns: list[int]
    images: list[list[int]]
    places: list[torch.Tensor]
    last: int


def start(model, ids, features, new=()):
    """A prompt (L,) with tokens that came after it."""
    whole = torch.cat([ids, torch.tensor(list(new), dtype=torch.long)])
    hidden = model.get_input_embeddings()(whole).clone()
    images, at = [], (ids == IMAGE).nonzero()[:, 0].tolist()
    for feature in features:
        columns, at = at[: len(feature)], at[len(feature) :]
        hidden[columns] = feature
        images.append(columns)
    places = [torch.tensor([[i, 0, j // 6, j % 6] for j in range(len(c))]) for i, c in enumerate(images)]
    return Sequence(hidden, list(range(len(whole))), images, places, len(ids) - 1)


def drop(s, choose):
    """``choose(i, states of image i, sequence)`` gives the slots within image i that stay."""
    gone = set()
    kept = []
    for i, slots in enumerate(s.images):
        stay = choose(i, s.hidden[slots], s)
        gone |= {slot for j, slot in enumerate(slots) if j not in stay}
        kept.append([slots[j] for j in stay])
        s.places[i] = s.places[i][stay]
    return without(s, gone, kept)


def without(s, gone, kept):
    left = [slot for slot in range(len(s.columns)) if slot not in gone]
    where = {slot: new for new, slot in enumerate(left)}
    images = [[where[slot] for slot in slots] for slots in kept]
    return Sequence(s.hidden[left], [s.columns[slot] for slot in left], images, s.places, where[s.last])


def pool(s):
    kernel = kernel_of(s.hidden[s.last])
    hidden, gone, kept = s.hidden.clone(), set(), []
    for i, slots in enumerate(s.images):
        found = windows(s.places[i], kernel)
        first = [members[0] for members in found.values()]
        for members in found.values():
            hidden[slots[members[0]]] = s.hidden[[slots[j] for j in members]].mean(0)
        gone |= {slot for j, slot in enumerate(slots) if j not in first}
        kept.append([slots[j] for j in first])
        places = s.places[i][first].clone()
        places[:, 2:] = torch.tensor(list(found))
        s.places[i] = places
    s.hidden = hidden
    return without(s, gone, kept)


def top(scores, k):
    return sorted(scores.sort(descending=True, stable=True).indices[:k].tolist())


def half(s):
    return drop(s, lambda i, states, _: top(states.sum(-1), max(1, round(len(states) / 2))))


def run(model, s, stages, positions, seen=None):
    """Logits of a row, a stage's function called before its layer. seen: called with (layer number, layer, s) before each."""
    decoder = model.model.language_model
    lengths = []
    for number, layer in enumerate(decoder.layers):
        if seen is not None:
            seen(number, layer, s)
        if number in stages:
            s = stages[number](s)
        at = torch.tensor(s.columns) if positions == "keep" else torch.arange(len(s.columns))
        lengths.append(len(s.columns))
        n, window = len(at), getattr(layer.self_attn, "sliding_window", getattr(decoder.config, "sliding_window", None))
        i, j = torch.arange(n)[:, None], torch.arange(n)[None]
        mask = (j <= i) & (j > i - (window or n + 1))
        mask = torch.zeros(n, n).masked_fill(~mask, torch.finfo(torch.float32).min)[None, None]
        tables = decoder.rotary_emb(s.hidden[None], at[None])
        s.hidden = layer(s.hidden[None], attention_mask=mask, position_embeddings=tables, use_cache=False)[0]
    return model.lm_head(decoder.norm(s.hidden)), s, lengths


@torch.no_grad()
def slow_greedy(model, ids, features, stages, positions, new=NEW):
    out = []
    for _ in range(new):
        logits, _, _ = run(model, start(model, ids, features, out), stages, positions)
        out.append(int(logits[-1].argmax()))
    return out


@torch.no_grad()
def slow_beams(model, ids, features, stages, positions, beams=3, new=NEW):
    paths = [((), 0.0)]
    for _ in range(new):
        more = []
        for path, score in paths:
            logits, _, _ = run(model, start(model, ids, features, path), stages, positions)
            more += [((*path, token), score + float(p)) for token, p in enumerate(logits[-1].log_softmax(-1))]
        paths = sorted(more, key=lambda item: -item[1])[:beams]
    return list(paths[0][0])


def rows_of(model, batch):
    """(ids without padding, features of its images) of each row."""
    pixels = batch["pixel_values"]
    features = list(model.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output)
    out = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"]):
        ids = ids[mask.bool()]
        count = int((ids == IMAGE).sum()) // N
        out.append((ids, features[:count]))
        features = features[count:]
    return out


REFERENCES = {"half": {2: half, 4: half}, "kernels": {2: pool, 4: pool}}


@pytest.fixture
def batch(make_batch):
    return make_batch(*ROWS)


def new_tokens(out, batch):
    return out[:, batch["input_ids"].shape[1] :].tolist()


# ------------------------------------------------------------------------------------------------ identity


@every_decoder
@pytest.mark.parametrize("spec", ["identity", "half:ratio=1", "fastv:keep=1", "fastv:ratio=1"])
def test_nothing_dropped_is_the_stock_model_bit_for_bit(toys, make_batch, kind, spec):
    model, one = tiny(kind), make_batch("one image")
    with torch.no_grad():
        stock = model(**one)
    me.wrap(model, spec)
    with torch.no_grad():
        ours = model(**one)
    assert torch.equal(stock.logits, ours.logits)
    assert ours.visual_keep_mask.all() and ours.visual_keep_mask.shape == one["input_ids"].shape


@every_decoder
@pytest.mark.parametrize("spec", ["identity", "half:ratio=1"])
def test_nothing_dropped_generates_what_the_stock_model_does(toys, batch, kind, spec):
    model = tiny(kind)
    call = dict(max_new_tokens=NEW, do_sample=False)
    stock = model.generate(**batch, **call)
    assert torch.equal(stock, me.wrap(model, spec).generate(**batch, **call))


# ------------------------------------------------------------------------------------------------ the reference


@every_decoder
@both_positions
@pytest.mark.parametrize("name", ["half", "kernels"])
def test_a_padded_batch_equals_the_reference(toys, batch, kind, positions, name):
    model = tiny(kind)
    expected = [slow_greedy(model, ids, f, REFERENCES[name], positions) for ids, f in rows_of(model, batch)]
    me.wrap(model, f"{name}:positions={positions}")
    assert new_tokens(model.generate(**batch, max_new_tokens=NEW), batch) == expected


@every_decoder
@both_positions
def test_beams_equal_the_reference(toys, batch, kind, positions):
    model = tiny(kind)
    expected = [slow_beams(model, ids, f, REFERENCES["half"], positions, new=4) for ids, f in rows_of(model, batch)]
    me.wrap(model, f"half:positions={positions}")
    assert new_tokens(model.generate(**batch, max_new_tokens=4, num_beams=3), batch) == expected


@both_positions
@pytest.mark.parametrize("how", [dict(use_cache=False), dict(prompt_lookup_num_tokens=3), dict(cache_implementation="static")], ids=str)
@pytest.mark.parametrize("name", ["half", "kernels"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_other_ways_to_generate_equal_the_reference(toys, make_batch, kind, positions, how, name):
    model = tiny(kind)
    me.wrap(model, f"{name}:positions={positions}")
    rows = ROWS if "prompt_lookup_num_tokens" not in how else ("long text",)
    batch = make_batch(*rows)
    expected = [slow_greedy(model, ids, f, REFERENCES[name], positions) for ids, f in rows_of(model, batch)]
    assert new_tokens(model.generate(**batch, max_new_tokens=NEW, **how), batch) == expected
