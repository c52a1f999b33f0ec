"""The staged decoder against a slow reference: one row at a time, layer by layer, no cache, no padding, no hooks."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
import transformers

import mllm_efficient as me
from mllm_efficient.compressors.reducer import Reducer
from mllm_efficient.patches import transformers_version

from ..conftest import VOCABULARY

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
both_toys = pytest.mark.parametrize("name", ["half", "kernels"])
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
    separators: set[int] = field(default_factory=set)  # columns of the prompt
    grid: torch.Tensor | None = None  # (3, L) positions of every column, M-RoPE
    deep: tuple[torch.Tensor, ...] = ()  # (L, d) what is added behind the first layers


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
    return Sequence(s.hidden[left], [s.columns[slot] for slot in left], images, s.places, where[s.last], s.separators, s.grid, s.deep)


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


def tables_of(decoder, s, positions):
    """cos and sin (1, n, head_dim)."""
    at = torch.tensor(s.columns) if positions == "keep" else torch.arange(len(s.columns))
    return decoder.rotary_emb(s.hidden[None], at[None] if s.grid is None else s.grid[:, None, at])


def run(model, s, stages, positions, seen=None):
    """Logits of a row, a stage's function called before its layer. seen: called with (layer number, layer, s) before each."""
    decoder = model.model.language_model
    lengths = []
    for number, layer in enumerate(decoder.layers):
        if seen is not None:
            seen(number, layer, s)
        if number in stages:
            s = stages[number](s)
        lengths.append(len(s.columns))
        n, window = len(s.columns), getattr(layer.self_attn, "sliding_window", getattr(decoder.config, "sliding_window", None))
        i, j = torch.arange(n)[:, None], torch.arange(n)[None]
        mask = (j <= i) & (j > i - (window or n + 1))
        mask = torch.zeros(n, n).masked_fill(~mask, torch.finfo(torch.float32).min)[None, None]
        tables = tables_of(decoder, s, positions)
        s.hidden = layer(s.hidden[None], attention_mask=mask, position_embeddings=tables, use_cache=False)[0]
        if number < len(s.deep):
            s.hidden = s.hidden + s.deep[number][s.columns]
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
        own = model(**one)
    assert torch.equal(stock.logits, own.logits)
    assert own.visual_keep_mask.all() and own.visual_keep_mask.shape == one["input_ids"].shape


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


@both_positions
@both_toys
def test_a_long_row_without_images_beside_shortened_ones(toys, processor, picture, positions, name):
    """The batch stays as long as it was, and its shortened rows move within it."""
    text = ["user : <image> what is the big ring ? assistant :", "user : " + "what is a cross ? " * 12 + "assistant :"]
    batch, model = processor(images=[picture(3)], text=text, return_tensors="pt", padding=True), tiny()
    expected = reference_of(model, batch, name, positions)
    me.wrap(model, f"{name}:positions={positions}")
    assert new_tokens(model.generate(**batch, max_new_tokens=NEW), batch) == expected
    with torch.no_grad():
        logits = model(**batch).logits
    for (ids, features), row, mask in zip(rows_of(model, batch), logits, batch["attention_mask"].bool()):
        with torch.no_grad():
            alone, s, _ = run(model, start(model, ids, features), REFERENCES[name], positions)
        torch.testing.assert_close(row[mask][s.columns], alone, atol=2e-5, rtol=2e-5)


@every_decoder
@both_positions
def test_beams_equal_the_reference(toys, batch, kind, positions):
    model = tiny(kind)
    expected = [slow_beams(model, ids, f, REFERENCES["half"], positions, new=4) for ids, f in rows_of(model, batch)]
    me.wrap(model, f"half:positions={positions}")
    assert new_tokens(model.generate(**batch, max_new_tokens=4, num_beams=3), batch) == expected


def reference_of(model, batch, name, positions, new=NEW):
    return [slow_greedy(model, ids, f, REFERENCES[name], positions, new) for ids, f in rows_of(model, batch)]


@both_positions
@both_toys
@pytest.mark.parametrize("how", [dict(use_cache=False), dict(cache_implementation="static")], ids=str)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "mistral, window"])
def test_other_ways_to_generate_equal_the_reference(toys, batch, kind, positions, how, name):
    model = me.wrap(tiny(kind), f"{name}:positions={positions}")
    if how.get("cache_implementation") == "static" and "window" in kind:
        with pytest.raises(me.UnsupportedModelError, match="static cache with sliding layers"):
            model.generate(**batch, max_new_tokens=NEW, **how)
        return
    assert new_tokens(model.generate(**batch, max_new_tokens=NEW, **how), batch) == reference_of(model, batch, name, positions)


@both_positions
@both_toys
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral, window"])
def test_prompt_lookup_equals_the_reference(toys, processor, picture, kind, positions, name):
    """Drafts stand behind the prompt in its first forward: the last token there is none of the question's."""
    batch = processor(images=picture(3), text="user : <image> is the ring red ? is the ring", return_tensors="pt")
    model = me.wrap(tiny(kind), f"{name}:positions={positions}")
    out = new_tokens(model.generate(**batch, max_new_tokens=NEW, prompt_lookup_num_tokens=3), batch)
    assert out == reference_of(model, batch, name, positions)


@both_positions
@both_toys
@pytest.mark.parametrize("kind", ["llama", "mistral, window"])
def test_a_second_turn_goes_on_from_the_shortened_cache(toys, batch, kind, positions, name):
    """Turns of different lengths, so the second one is padded between the first answer and itself; a window would count that."""
    model = me.wrap(tiny(kind), f"{name}:positions={positions}")
    first = model.generate(**batch, max_new_tokens=3, return_dict_in_generate=True)
    turn = torch.tensor([[0, 0, 6, 7, 8], [0, 9, 10, 11, 12], [13, 14, 15, 16, 17], [0, 0, 0, 18, 19]])
    turn = turn[:, 3:] if "window" in kind else turn
    ids = torch.cat([first.sequences, turn], 1)
    mask = torch.cat([batch["attention_mask"], torch.ones(4, 3, dtype=torch.long), (turn > 0).long()], 1)
    second = model.generate(input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=4)
    for i, (prompt, features) in enumerate(rows_of(model, batch)):
        said = [*first.sequences[i, -3:].tolist(), *turn[i][turn[i] > 0].tolist()]
        expected = []
        for _ in range(4):
            logits, _, _ = run(model, start(model, prompt, features, said + expected), REFERENCES[name], positions)
            expected.append(int(logits[-1].argmax()))
        assert second[i, ids.shape[1] :].tolist() == expected


def test_sampled_answers_share_their_prompt(toys, batch):
    model = me.wrap(tiny(), "half")
    out = model.generate(**batch, max_new_tokens=4, do_sample=True, top_k=1, num_return_sequences=2)
    assert torch.equal(out[::2], out[1::2]) and torch.equal(out[::2], model.generate(**batch, max_new_tokens=4))


def test_every_layer_has_a_cache_of_its_own_length(toys, batch):
    model = me.wrap(tiny(), "half")
    out = model.generate(**batch, max_new_tokens=3, return_dict_in_generate=True)
    full, text = batch["input_ids"].shape[1], batch["attention_mask"].sum(1) - torch.tensor([36, 72, 0, 36])
    lengths = [full, max((text + torch.tensor([18, 36, 0, 18])).tolist()), max((text + torch.tensor([9, 18, 0, 9])).tolist())]
    assert [layer.get_seq_length() for layer in out.past_key_values.layers] == [n + 2 for n in lengths for _ in range(2)]
    assert out.compression.tokens_per_layer == [144, 144, 72, 72, 36, 36]
    assert [i.per_layer for i in out.compression.images] == [(36, 36, 18, 18, 9, 9)] * 4
    assert out.compression.layer_average == 84 and [i.kept for i in out.compression.images] == [21] * 4


def test_the_report_holds_the_indices_of_the_last_stage(toys, make_batch):
    model, one = tiny(), make_batch("two images")
    ((ids, features),) = rows_of(model, one)
    with torch.no_grad():
        _, s, lengths = run(model, start(model, ids, features), REFERENCES["half"], "renumber")
    expected = [(place[:, 2] * 6 + place[:, 3]).tolist() for place in s.places]
    with me.compressed(model, "half"), torch.no_grad():
        model(**one)
        report = me.last_report(model)
    assert [i.indices.tolist() for i in report.images] == expected
    assert report.tokens_per_layer == [n - (ids != IMAGE).sum() for n in lengths]


# ------------------------------------------------------------------------------------------------ forward


@every_decoder
@both_positions
@both_toys
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_forward_gives_logits_at_every_column(toys, make_batch, kind, positions, name, side):
    batch, model = make_batch(*ROWS, padding_side=side), tiny(kind)
    with me.compressed(model, f"{name}:positions={positions}"), torch.no_grad():
        own = model(**batch)
    assert own.logits.shape[:2] == batch["input_ids"].shape
    for (ids, features), mask, logits in zip(rows_of(model, batch), batch["attention_mask"].bool(), own.logits):
        with torch.no_grad():
            expected, s, _ = run(model, start(model, ids, features), REFERENCES[name], positions)
        torch.testing.assert_close(logits[mask][s.columns], expected, atol=2e-5, rtol=2e-5)
        before = [max(c for c in s.columns if c <= column) for column in range(len(ids))]
        assert torch.equal(logits[mask], logits[mask][before])  # a token that went says what the one before it does


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "not reentrant"])
@both_toys
@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_and_gradients_equal_the_reference(toys, make_batch, name, checkpointing, side):
    batch, model = make_batch(*ROWS, padding_side=side), tiny("llama")
    rows = rows_of(model, batch)
    labels = torch.full_like(batch["input_ids"], -100)
    answers = (2, 5, 4, 7)
    for row, (answer, mask) in enumerate(zip(answers, batch["attention_mask"].bool())):
        at = mask.nonzero()[-answer:, 0]
        labels[row, at] = batch["input_ids"][row, at]
    total, count = 0.0, 0
    for answer, (ids, features) in zip(answers, rows):
        s = start(model, ids, [f.detach() for f in features])
        s.last = len(ids) - answer - 1  # the instruction ends where the answer begins
        logits, s, _ = run(model, s, REFERENCES[name], "renumber")
        total = total + torch.nn.functional.cross_entropy(logits[-answer - 1 : -1], ids[-answer:], reduction="sum")
        count += answer
    (total / count).backward()
    expected = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None and "language_model" in k}
    model.zero_grad()
    me.wrap(model, name)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    model.train()
    if checkpointing is not None and transformers_version() < (5, 23):  # hooks would run again in the backward pass
        with pytest.raises(me.UnsupportedModelError, match="gradient checkpointing need transformers 5.23"):
            model(**batch, labels=labels)
        return
    out = model(**batch, labels=labels)
    out.loss.backward()
    assert out.loss.item() == pytest.approx((total / count).item(), abs=1e-5)
    for key, gradient in expected.items():
        torch.testing.assert_close(dict(model.named_parameters())[key].grad, gradient, atol=1e-5, rtol=1e-3)


def test_labels_of_visual_tokens_are_no_targets(toys, make_batch):
    batch, model = make_batch("one image", "long text"), me.wrap(tiny(), "half")
    every = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        first = model(**batch, labels=every).loss
        assert torch.equal(first, model(**batch, labels=every.masked_fill(every == IMAGE, -100)).loss)
    assert (every == IMAGE).any()  # the caller's own labels are left alone


def test_a_decode_loop_by_hand_equals_generate(toys, batch):
    model = me.wrap(tiny(), "kernels")
    expected = new_tokens(model.generate(**batch, max_new_tokens=4), batch)
    with torch.no_grad():
        out = model(**batch, use_cache=True)
        mask, said = batch["attention_mask"], [out.logits[:, -1].argmax(-1)]
        for _ in range(3):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            out = model(input_ids=said[-1][:, None], attention_mask=mask, past_key_values=out.past_key_values)
            said.append(out.logits[:, -1].argmax(-1))
    assert torch.stack(said, 1).tolist() == expected


# ------------------------------------------------------------------------------------------------ living with others


# ------------------------------------------------------------------------------------------------ errors
