"""The in-decoder methods: their scores and choices against slow formulas, their budgets, and every family they run in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mllm_efficient as me
from mllm_efficient.apply.plan import describe
from mllm_efficient.compressors.fastv import FastV
from mllm_efficient.compressors.reducer import Reducer, solve, spread_out
from mllm_efficient.patches import adapter_for

from .. import families, families_reference
from ..patches.test_decoder import (
    DECODERS,
    IMAGE,
    NEW,
    ROWS,
    drop,
    kernel_of,
    new_tokens,
    rows_of,
    run,
    start,
    tables_of,
    tiny,
    top,
    windows,
    without,
)

# dpn, which routes, and proportional, which drops nothing, have tests of their own
INSIDE = {name: me.get_method(name) for name in me.list_methods() if issubclass(me.get_method(name), Reducer)}
METHODS = [name for name, cls in INSIDE.items() if not (cls.routes or cls.weighs)]
both_positions = pytest.mark.parametrize("positions", ["renumber", "keep"])


# ------------------------------------------------------------------------------------------------ slow formulas


def attention_map(model, layer, s, positions):
    """(heads, n, n) of a layer about to be entered, head by head."""
    attn, decoder = layer.self_attn, model.model.language_model
    keys, queries = (rotated(decoder, layer, s, positions, which) for which in "kq")
    n, window = s.hidden.shape[0], getattr(attn, "sliding_window", getattr(decoder.config, "sliding_window", None))
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    hidden = ~((j <= i) & (j > i - (window or n + 1)))
    group = len(queries) // len(keys)
    return torch.stack(
        [(q @ keys[h // group].T / math.sqrt(attn.head_dim)).masked_fill(hidden, float("-inf")).softmax(-1) for h, q in enumerate(queries)]
    )


def rotated(decoder, layer, s, positions, which):
    """(heads, n, head_dim) queries or keys."""
    cos, sin = (t[0] for t in tables_of(decoder, s, positions))
    parts = getattr(layer.self_attn, f"{which}_proj")(layer.input_layernorm(s.hidden))
    parts = parts.view(len(s.hidden), -1, layer.self_attn.head_dim)
    if hasattr(layer.self_attn, f"{which}_norm"):
        parts = getattr(layer.self_attn, f"{which}_norm")(parts)
    parts, half = parts.transpose(0, 1), layer.self_attn.head_dim // 2
    return parts * cos + torch.cat([-parts[..., half:], parts[..., :half]], -1) * sin


def text_of(s):
    visual = {slot for slots in s.images for slot in slots} | {i for i, column in enumerate(s.columns) if column in s.separators}
    return [slot for slot in range(s.last + 1) if slot not in visual]


class Slow:
    """One method's stages for ``run``: what it looks at is recorded before the layer that shows it."""

    def __init__(self, model, method, positions, n=36):
        self.model, self.method, self.positions = model, method, positions
        depth = model.config.text_config.num_hidden_layers
        self.layers = method.layers(depth)
        self.raters = [method.rater(layer) for layer in self.layers]
        self.counts = method.counts(n, depth)
        self.shown = None

    def seen(self, number, layer, s):
        if number == 0:
            self.entry = [s.hidden[slots] for slots in s.images], s.hidden[text_of(s)]
        if number in self.raters:
            self.map = attention_map(self.model, layer, s, self.positions)
            self.keys = rotated(self.model.model.language_model, layer, s, self.positions, "k").transpose(0, 1).flatten(1)

    def __call__(self, number, s):
        k = self.counts[self.layers.index(number)]
        return drop(s, lambda i, states, s: sorted(getattr(self, self.method.name)(i, s, k)))

    def fair(self, i, s, scores):
        """Less the line that fits them best, where that is asked for."""
        if not self.method.debias:
            return scores
        at = (s.places[i][:, 2] * 6 + s.places[i][:, 3]).numpy()
        return scores - torch.from_numpy(np.polyval([np.polyfit(at, scores.double().numpy(), 1)[0], 0], at)).float()

    def fastv(self, i, s, k):
        return top(self.fair(i, s, self.map[:, s.last, s.images[i]].mean(0)), k)

    pyramiddrop = fastv

    def sparsevlm(self, i, s, k):
        visual, text = self.entry[0][i], self.entry[1]
        relevance = torch.zeros(len(text))
        for v in visual:
            relevance += (text @ v).softmax(0) / len(visual)
        raters = [slot for slot, r in zip(text_of(s), relevance) if r >= relevance.mean()]
        return top(self.fair(i, s, self.map[:, raters][:, :, s.images[i]].mean(0).sum(0)), k)

    def dart(self, i, s, k):
        slots, text = s.images[i], text_of(s)
        norms = self.keys.abs().sum(-1)
        pivots = sorted(range(len(slots)), key=lambda j: (-norms[slots[j]], j))[: min(4, k)]
        all_pivots = [slots[j] for j in pivots] + sorted(text, key=lambda t: (-norms[t], t))[:4]
        chosen, rest = list(pivots), k - len(pivots)
        for number, pivot in enumerate(all_pivots):
            share = rest // len(all_pivots) + (number < rest % len(all_pivots))
            left = [j for j in range(len(slots)) if j not in chosen]
            cosine = {j: torch.nn.functional.cosine_similarity(s.hidden[slots[j]], s.hidden[pivot], 0).item() for j in left}
            chosen += sorted(left, key=lambda j: (cosine[j], j))[:share]
        return chosen


def slow(model, method, positions, n=36):
    """The stages of a method, and the callback that records, as ``run`` takes them."""
    stages = Slow(model, method, positions, n)
    return {layer: (lambda s, layer=layer: stages(layer, s)) for layer in stages.layers}, stages.seen


BUDGETS = {
    "fastv": ("ratio=0.25", "layer=3,keep=0.6", "ratio=0.25,debias=true"), "pyramiddrop": ("ratio=0.5", "keep=0.5", "keep=0.5,debias=true"),
    "sparsevlm": ("keep=0.4", "ratios=0.5/0.2", "keep=0.4,debias=true"),
    "dart": ("ratio=0.5", "layer=1,tokens=20", "ratio=0.08"),
}  # fmt: skip
EVERY = [(name, budget) for name in METHODS for budget in BUDGETS[name]]


def test_every_method_has_its_budgets_here():
    assert list(BUDGETS) == METHODS


@pytest.mark.parametrize("kind", list(DECODERS))
@both_positions
@pytest.mark.parametrize("name, budget", EVERY)
def test_a_padded_batch_equals_the_slow_formulas(make_batch, kind, positions, name, budget):
    batch, model = make_batch(*ROWS), tiny(kind)
    method = me.build(f"{name}:positions={positions},{budget}")
    stages, seen = slow(model, method, positions)
    with me.compressed(model, method):
        out = new_tokens(model.generate(**batch, max_new_tokens=2), batch)
        report = me.last_report(model)
    images, tokens = [], []
    for ids, features in rows_of(model, batch):
        said = []
        for _ in range(2):
            with torch.no_grad():
                logits, s, _ = run(model, start(model, ids, features, said), stages, positions, seen)
            said.append(int(logits[-1].argmax()))
        tokens.append(said)
        images += [(place[:, 2] * 6 + place[:, 3]).tolist() for place in s.places]
    assert [i.indices.tolist() for i in report.images] == images
    assert out == tokens


@pytest.mark.parametrize("kind", list(DECODERS))
def test_fastvs_scores_are_the_attentions_of_an_eager_model(registered, make_batch, kind):
    shown = []

    @registered("recording")
    @dataclass(frozen=True, kw_only=True)
    class Recording(FastV):
        def score(self, v):
            shown.append(v.attention)
            return v.attention

    batch, model = make_batch(*ROWS), tiny(kind)
    with me.compressed(model, "recording:ratio=0.5,layer=3"), torch.no_grad():
        model(**batch)
    model.set_attn_implementation({"text_config": "eager"})
    with torch.no_grad():
        attentions = model(**batch, output_attentions=True).attentions[2]
    for i, row in enumerate((0, 1, 1, 3)):
        visual = (batch["input_ids"][row] == IMAGE).nonzero()[:, 0]
        visual = visual[36:] if i == 2 else visual[:36]
        torch.testing.assert_close(shown[i], attentions[row, :, -1, visual].mean(0), atol=1e-5, rtol=0)


def test_a_trend_over_places_is_all_that_debiasing_takes_away():
    from mllm_efficient.compressors.recency import without_trend

    index = torch.tensor([0, 3, 4, 9, 30])
    own = torch.tensor([1.0, -1.0, 0.5, 0.25, -0.5])
    own = without_trend(own, index)
    torch.testing.assert_close(without_trend(own + 0.3 * index, index) - (0.3 * index).mean(), own, atol=1e-5, rtol=0)
    assert without_trend(torch.tensor([0.7]), torch.tensor([5])).tolist() == [0.699999988079071]
    with pytest.raises(me.BadSettingError, match="debias='much' is not true or false"):
        me.build("fastv:ratio=0.5,debias=much")


def test_an_eager_decoder_generates_the_same(make_batch):
    batch, model = make_batch(*ROWS), me.wrap(tiny(), "fastv:ratio=0.5")
    expected = model.generate(**batch, max_new_tokens=NEW)
    model.set_attn_implementation({"text_config": "eager"})
    assert torch.equal(model.generate(**batch, max_new_tokens=NEW), expected)


def test_half_precision_selects_and_generates(make_batch):
    batch, model = make_batch(*ROWS), me.wrap(tiny().to(torch.bfloat16), "sparsevlm:keep=0.5")
    batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
    model.generate(**batch, max_new_tokens=2)
    assert all(len(i.indices) == i.per_layer[-1] for i in me.last_report(model).images)


@pytest.mark.parametrize("name", ["fastv", "dart"])
def test_use_cache_off_equals_the_cache(make_batch, name):
    """Every forward rates by the instruction's end, whatever has been generated behind it."""
    batch, model = make_batch(*ROWS), me.wrap(tiny(), f"{name}:ratio=0.2")
    expected = model.generate(**batch, max_new_tokens=NEW)
    assert torch.equal(model.generate(**batch, max_new_tokens=NEW, use_cache=False), expected)


def test_a_third_party_method_is_a_file_of_a_few_lines(registered, make_batch):
    @registered("mine")
    @dataclass(frozen=True)
    class Mine(me.Reducer):
        needs = frozenset({"attention"})

        def layers(self, depth):
            return (1, 3)

        def score(self, v):
            return v.attention

    model = tiny()
    with me.compressed(model, "mine:keep=0.5"):
        model.generate(**make_batch("one image"), max_new_tokens=2)
        assert me.last_report(model).tokens_per_layer == [36, 20, 20, 11, 11, 11]


@pytest.mark.parametrize("wrong, message", [
    (lambda v, k: torch.zeros(k, dtype=torch.long), "twice"),
    (lambda v, k: torch.arange(k) + 30, "outside"),
    (lambda v, k: torch.arange(k + 1), "19.*where 18"),
])  # fmt: skip
def test_a_wrong_choice_is_one_line(registered, make_batch, wrong, message):
    @registered("wrong")
    @dataclass(frozen=True)
    class Wrong(me.Reducer):
        def layers(self, depth):
            return (2,)

        def select(self, v, k):
            return wrong(v, k)

    with me.compressed(tiny(), "wrong:ratio=0.5") as model, pytest.raises(me.CountMismatchError, match=message):
        model.generate(**make_batch("one image"), max_new_tokens=2)


def test_a_rater_that_has_not_run_or_is_long_past_is_refused(registered):
    @registered("late")
    @dataclass(frozen=True)
    class Late(me.Reducer):
        def layers(self, depth):
            return (2,)

        def rater(self, layer):
            return layer + 1

    with pytest.raises(me.BadBudgetError, match="layer 3 cannot rate for a stage at 2: use 1 or 2"):
        me.wrap(tiny(), "late:ratio=0.5")


# ------------------------------------------------------------------------------------------------ budgets


@pytest.mark.parametrize("tokens, after", [(192, 166), (128, 98), (64, 30)])
def test_fastv_on_a_32_layer_model(tokens, after):
    """2 layers see 576 tokens and 30 the rest: (2 * 576 + 30 * 166) / 32 = 191.6."""
    method = me.FastV(tokens=tokens)
    assert method.counts(576, 32) == (after,)
    assert abs(sum(method.per_layer(576, 32)) / 32 - tokens) <= 15 / 32 + 1e-9


@pytest.mark.parametrize("tokens, fastv, pyramiddrop, sparsevlm", [
    (192, (166,), (146, 37, 9), (334, 194, 112)),
    (128, (98,), None, (258, 115, 52)),
    (64, (30,), None, (130, 29, 7)),
])  # fmt: skip
def test_the_layer_averages_of_the_papers_tables(tokens, fastv, pyramiddrop, sparsevlm):
    expected = {"fastv": fastv, "pyramiddrop": pyramiddrop, "sparsevlm": sparsevlm}
    for name, counts in expected.items():
        method = me.build(f"{name}:tokens={tokens}")
        if counts is None:
            with pytest.raises(me.BadBudgetError, match=r"the smallest is 145 \(tokens=145\)"):
                method.counts(576, 32)
            continue
        assert method.counts(576, 32) == counts
        assert sum(method.per_layer(576, 32)) / 32 == pytest.approx(tokens, abs=0.5)


def test_the_papers_own_schedules():
    assert me.PyramidDrop(ratio=0.5).layers(32) == (8, 16, 24) and me.PyramidDrop(ratio=0.5).counts(576, 32) == (288, 144, 72)
    assert me.PyramidDrop(ratio=0.5).layers(28) == (7, 14, 21) and me.PyramidDrop(ratio=0.5).layers(2) == (1,)
    assert me.SparseVLM(keep=0.5).layers(32) == (2, 6, 15) and me.SparseVLM(keep=0.5).layers(40) == (2, 8, 19)
    assert me.SparseVLM(ratios="0.52/0.35/0.19").counts(576, 32) == (300, 202, 109)
    assert me.FastV(ratio=0.5).counts(576, 32) == (288,)


@settings(deadline=None)
@given(
    n=st.integers(1, 3000), depth=st.integers(2, 48), data=st.data(),
    stages=st.lists(st.integers(1, 47), min_size=1, max_size=4, unique=True),
)  # fmt: skip
def test_any_reachable_average_is_met_within_half_a_token_of_the_last_span(n, depth, data, stages):
    stages = sorted(s for s in stages if s < depth) or [1]
    average = data.draw(st.integers(1, n))
    least = math.ceil((stages[0] * n + depth - stages[0]) / depth)
    if average < least:
        with pytest.raises(me.BadBudgetError, match=f"tokens={least}"):
            solve("m", average, n, stages, depth)
        return
    counts = solve("m", average, n, stages, depth)
    assert len(counts) == len(stages) and all(1 <= b <= a for a, b in zip((n, *counts), counts))
    per_layer = spread_out(n, stages, counts, depth)
    slack = sum(b - a for a, b in zip(stages, [*stages[1:], depth]))  # a whole number of tokens in each span
    assert abs(sum(per_layer) - average * depth) <= slack


def test_specifications_come_back():
    for spec in ("fastv:tokens=64,layer=3", "sparsevlm:ratios=0.5/0.2/0.1", "pyramiddrop:ratio=0.5", "dart:keep=0.3,pivots=2"):
        method = me.build(spec)
        assert me.build(method.spec()) == method and me.build(method.to_dict()) == method
    assert me.SparseVLM(ratios=[0.5, 0.2, 0.1]) == me.build("sparsevlm:ratios=0.5/0.2/0.1")
    assert me.FastV(ratios=0.5) == me.build("fastv:ratios=0.5")


def test_what_is_said_of_a_method():
    adapter = adapter_for(tiny())
    say = [describe(me.build(spec), adapter.usual(), adapter) for spec in ("fastv:keep=0.5", "pyramiddrop:ratio=0.5", "fastv:keep=1")]
    assert say == [
        "fastv keeps 36 tokens up to layer 2, then 9 (layer average 18.0)",
        "pyramiddrop keeps 36 tokens up to layer 1, then 18 up to layer 3, then 9 up to layer 4, then 4 (layer average 14.8)",
        "fastv keeps every token",
    ]


# ------------------------------------------------------------------------------------------------ families


@both_positions
@pytest.mark.parametrize("name, newline", [
    *((name, newline) for name in ("llava_next", "llava_next_video", "llava_onevision") for newline in (None, "keep")), ("internvl", None),
])  # fmt: skip
@pytest.mark.parametrize("spec", ["fastv:layer=1,ratio=0.3", "dart:layer=1,ratio=0.3"])
def test_every_row_of_a_batch_equals_the_slow_formulas(name, spec, positions, newline):
    """Anyres images with newline columns, several images, videos, text alone."""
    family = families.FAMILIES[name]
    method = me.build(f"{spec},positions={positions},newline={newline or 'null'}")
    model, batch = families.tiny(name), families.make(name, *family.mixed)
    with me.compressed(model, method):
        out = new_tokens(model.generate(**batch, max_new_tokens=3), batch)
        report = me.last_report(model)
    for row, kind in enumerate(family.mixed):
        inputs = families.make(name, kind)
        found = families_reference.visuals(name, model, inputs)
        ids = inputs["input_ids"][0]
        stages, seen = slow_rows(model, method, positions, newline)
        said = []
        for _ in range(3):
            s = spliced(model, ids, found, said)
            with torch.no_grad():
                logits, s, _ = run(model, s, stages, positions, seen)
            said.append(int(logits[-1].argmax()))
        assert out[row] == said
        kept = [i for i in report.images if i.row == row]
        assert [i.indices.tolist() for i in kept] == [place[:, 0].tolist() for place in s.places]


def spliced(model, ids, found, said):
    """A row with everything in it; ``places`` hold the number of each token among the N of its image."""
    s = start(model, ids, [], said)
    for visual in found:
        s.hidden[visual.columns] = visual.features
        s.images.append(visual.columns[~visual.newline].tolist())
        s.places.append(torch.arange(visual.n)[:, None])
        s.separators |= set(visual.columns[visual.newline].tolist())
    return s


def slow_rows(model, method, positions, newline, layer=1):
    """A stage at ``layer`` that leaves 0.3 of each image, and of its newline columns all or none."""
    recorded = Slow(model, method, positions)

    def reduce(s):
        kept = [sorted(getattr(recorded, method.name)(i, s, max(1, round(0.3 * len(slots))))) for i, slots in enumerate(s.images)]
        gone = {slot for slots, stay in zip(s.images, kept) for j, slot in enumerate(slots) if j not in stay}
        if newline is None:
            gone |= {slot for slot, column in enumerate(s.columns) if column in s.separators}
        s.places = [place[stay] for place, stay in zip(s.places, kept)]
        return without(s, gone, [[slots[j] for j in stay] for slots, stay in zip(s.images, kept)])

    return {layer: reduce}, recorded.seen


@both_positions
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "llava_next_video", "internvl"])
def test_pooling_knows_the_planes_rows_and_columns_of_every_view(registered, name, positions):
    """A base view, a map of tiles with newline columns, frames: each is pooled by itself, by a kernel that the question picks."""

    @registered("planes")
    @dataclass(frozen=True, kw_only=True)
    class Planes(me.Reducer):
        merges: ClassVar[bool] = True

        def layers(self, depth):
            return (1,)

        def reduce(self, v, k):
            found = plane_windows(v.places, kernel_of(v.question))
            features = torch.stack([v.hidden[members].mean(0) for members in found])
            return me.ReducedTokens(torch.tensor([members[0] for members in found]), features, v.places[[m[0] for m in found]])

    def pool(s):
        kernel, hidden, gone, kept = kernel_of(s.hidden[s.last]), s.hidden.clone(), set(), []
        for slots, places in zip(s.images, s.places):
            found = plane_windows(places, kernel)
            for members in found:
                hidden[slots[members[0]]] = s.hidden[[slots[j] for j in members]].mean(0)
            first = [members[0] for members in found]
            gone |= {slot for j, slot in enumerate(slots) if j not in first}
            kept.append([slots[j] for j in first])
            if len(first) < len(slots):
                gone |= {i for i, c in enumerate(s.columns) if c in s.separators and s.columns[slots[0]] < c <= s.columns[slots[-1]] + 1}
        s.hidden = hidden
        return without(s, gone, kept)

    family = families.FAMILIES[name]
    model, batch = families.tiny(name), families.make(name, *family.mixed)
    with me.compressed(model, f"planes:ratio=1,positions={positions}"):
        out = new_tokens(model.generate(**batch, max_new_tokens=3), batch)
    for row, kind in enumerate(family.mixed):
        inputs = families.make(name, kind)
        found, said = families_reference.visuals(name, model, inputs), []
        for _ in range(3):
            s = spliced(model, inputs["input_ids"][0], found, said)
            s.places = [
                torch.tensor([[i, p, r, c] for p, (rows, columns) in enumerate(v.planes) for r in range(rows) for c in range(columns)])
                for i, v in enumerate(found)
            ]
            with torch.no_grad():
                logits, _, _ = run(model, s, {1: pool}, positions)
            said.append(int(logits[-1].argmax()))
        assert out[row] == said


def plane_windows(places, kernel):
    """Windows of each plane; a plane that is smaller than the kernel stays."""
    out = []
    for plane in places[:, 1].unique().tolist():
        at = (places[:, 1] == plane).nonzero()[:, 0]
        found = windows(places[at], kernel).values()
        out += [at[members].tolist() for members in found] if found else [[i] for i in at.tolist()]
    return out


@pytest.mark.parametrize("name, layer", [("qwen2_vl", 1), ("qwen2_5_vl", 2), ("qwen3_vl", 2)])
@pytest.mark.parametrize("method", ["fastv", "dart"])
def test_m_rope_families_keep_the_places_of_what_stays(name, layer, method):
    """Three rows of positions, videos, and in Qwen3-VL features that the first layers add."""
    family, method = families.FAMILIES[name], me.build(f"{method}:layer={layer},ratio=0.3")
    model, batch = families.tiny(name), families.make(name, *family.mixed)
    with me.compressed(model, method):
        out = model.generate(**batch, max_new_tokens=3, return_dict_in_generate=True)
        more = torch.tensor([[20, 21]] * len(out.sequences))
        mask = torch.cat([batch["attention_mask"], torch.ones(len(more), 5, dtype=torch.long)], 1)
        turn = model.generate(
            input_ids=torch.cat([out.sequences, more], 1), attention_mask=mask, past_key_values=out.past_key_values, max_new_tokens=2
        )
    report = out.compression
    for row, kind in enumerate(family.mixed):
        inputs = families.make(name, kind)
        found = families_reference.visuals(name, model, inputs)
        stages, seen = slow_rows(model, method, "keep", None, layer)
        said = []
        for number in range(5):
            whole = families_reference.splice(name, model, inputs, found, [families_reference.everything(v) for v in found], "keep")
            whole = families_reference.extended(model, whole, torch.tensor(said + ([20, 21] if number == 3 else []), dtype=torch.long))
            s = spliced(model, inputs["input_ids"][0], found, [])
            deep = tuple(torch.zeros_like(whole.embeds[0]) for _ in whole.deep)
            for layer_features, target in zip(whole.deep, deep):
                target[whole.visual[0]] = layer_features
            s.hidden, s.grid, s.deep = whole.embeds[0], whole.positions[:, 0], deep
            s.columns = list(range(len(s.hidden)))
            if number == 3:
                said += [20, 21]
            with torch.no_grad():
                logits, s, _ = run(model, s, stages, "keep", seen)
            said.append(int(logits[-1].argmax()))
        assert out.sequences[row, -3:].tolist() == said[:3]
        assert turn[row, -2:].tolist() == said[-2:]
        kept = [i for i in report.images if i.row == row]
        assert [i.indices.tolist() for i in kept] == [place[:, 0].tolist() for place in s.places]


@pytest.mark.parametrize("name, spec, message", [
    ("qwen3_vl", "fastv:layer=1,ratio=0.5", "adds visual features up to layer 2: drop there or later"),
    ("qwen2_5_vl", "fastv:layer=1,ratio=0.5,positions=renumber", "positions='renumber' has no meaning inside"),
])  # fmt: skip
def test_what_m_rope_cannot_do_is_one_line(name, spec, message):
    with pytest.raises(me.UnsupportedModelError, match=message):
        me.wrap(families.tiny(name), spec)


# ------------------------------------------------------------------------------------------------ one after the other


# ------------------------------------------------------------------------------------------------ FLOPs


# ------------------------------------------------------------------------------------------------ recycling
