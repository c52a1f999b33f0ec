"""In-decoder methods: one after the other, FLOPs, recycling."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mllm_efficient as me
from mllm_efficient.measure import counter
from mllm_efficient.measure.flops import cost, load_shape, shape_of
from mllm_efficient.patches import adapter_for

from .. import families
from ..patches.test_decoder import (
    NEW,
    ROWS,
    new_tokens,
    run,
    start,
    tiny,
)
from .test_reducers import (
    EVERY,
    METHODS,
    both_positions,
    slow,
)


@pytest.mark.parametrize("positions", ["null", "keep"])
@pytest.mark.parametrize("before", ["divprune:tokens=20", "pool:tokens=9", "uniform:keep=0.25"])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_method_before_the_decoder_and_one_inside(make_batch, before, positions, beams):
    if before.startswith("pool") and positions == "keep":
        positions = "null"
    batch, model = make_batch(*ROWS), tiny()
    spec = f"{before},positions={positions} | fastv:ratio=0.4"
    expected, counts = [], []
    for kind in ROWS:
        prepared = me.prepare(model, f"{before},positions={positions}", **make_batch(kind))
        ids, features = prepared.model_kwargs["input_ids"][0], [f for _, f, _ in prepared.features or ()]
        rule = "renumber" if positions == "null" else "keep"
        n = len(features[0]) if features else 36
        stages, seen = slow(model, me.build("fastv:ratio=0.4"), rule, n)
        said = []
        for _ in range(3):
            s = start(model, ids, features, said)
            if prepared.layout is not None and rule == "keep":
                full = prepared.layout.full_length
                s.columns = [*prepared.layout.columns[0].tolist(), *range(full, full + len(said))]
            with torch.no_grad():
                logits, s, _ = run(model, s, stages, rule, seen)
            said.append(int(logits[-1].argmax()))
        expected.append(said)
        counts += [len(place) for place in s.places]
    me.wrap(model, spec)
    if beams > 1:
        one_by_one = [model.generate(**make_batch(kind), max_new_tokens=3, num_beams=beams)[0, -3:].tolist() for kind in ROWS]
        assert new_tokens(model.generate(**batch, max_new_tokens=3, num_beams=beams), batch) == one_by_one
        return
    out = model.generate(**batch, max_new_tokens=3, return_dict_in_generate=True)
    assert new_tokens(out.sequences, batch) == expected
    report = out.compression
    assert [s["method"] for s in report.stages] == [before.split(":")[0], "fastv"]
    assert [i.per_layer[-1] for i in report.images] == counts and [i.full for i in report.images] == [36] * 4
    pruned = len(features[0])
    assert report.tokens_per_layer[:2] == [4 * pruned] * 2
    for image in report.images:
        assert (image.indices is None) == before.startswith("pool")
    with torch.no_grad():
        logits = model(**make_batch("one image")).logits
        assert logits.shape[1] == int(batch["attention_mask"][0].sum()) - 36 + pruned
        assert int(logits[0, -1].argmax()) == expected[0][0]
    more = torch.cat([out.sequences, torch.tensor([[20, 21]] * 4)], 1)
    mask = torch.cat([batch["attention_mask"], torch.ones(4, 5, dtype=torch.long)], 1)
    model.generate(input_ids=more, attention_mask=mask, past_key_values=out.past_key_values, max_new_tokens=2)
    me.unwrap(model)
    assert not adapter_for(model).reached_inside


@pytest.mark.parametrize("call", [{"new_tokens": 3}, {"batch_size": 2}], ids=["decode", "batch"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("name, budget", EVERY)
def test_a_real_call_costs_what_torch_counts(kind, name, budget, call):
    """Every phase; compress is what the method and its raters compute, of which the prefill is free."""
    model, spec = tiny(kind), f"{name}:{budget}"
    shape = shape_of(model.config, kind)
    found = counter.count(model, shape, me.build(spec), text_tokens=11, visual_tokens=72, **call)
    closed = cost(shape, text_tokens=11, visual_tokens=72, method=spec, **call)
    for phase in ("vision", "compress", "prefill", "decode", "total"):
        assert getattr(found, phase) == getattr(closed, phase), phase
    assert closed.compress > 0 and not adapter_for(model).reached_inside


@pytest.mark.parametrize("newline", ["null", "keep"])
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "llava_next_video"])
def test_newline_columns_are_counted_where_they_are(name, newline):
    model, spec = families.tiny(name), f"fastv:layer=1,ratio=0.3,newline={newline}"
    shape = shape_of(model.config, name)
    found = counter.count(model, shape, me.build(spec), text_tokens=9, image_size=(70, 50), new_tokens=2)
    assert found == counter.Counted(
        *(
            getattr(cost(shape, text_tokens=9, image_size=(70, 50), method=spec, new_tokens=2), p)
            for p in ("vision", "compress", "prefill", "decode")
        )
    )


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_m_rope_families_cost_what_torch_counts(name):
    model, spec = families.tiny(name), "dart:layer=2,ratio=0.3"
    shape = shape_of(model.config, name)
    found = counter.count(model, shape, me.build(spec), text_tokens=9, image_size=(96, 60), new_tokens=2)
    closed = cost(shape, text_tokens=9, image_size=(96, 60), method=spec, new_tokens=2)
    assert found == counter.Counted(closed.vision, closed.compress, closed.prefill, closed.decode)


@pytest.mark.parametrize("spec", ["fastv:tokens=64", "pyramiddrop:ratio=0.5", "sparsevlm:tokens=128", "dart:tokens=64"])
def test_a_7b_shape_costs_what_torch_counts_without_weights(spec):
    from ..measure.test_flops import on_meta

    shape = load_shape("llava-1.5-7b")
    found, closed = counter.count(on_meta("llava-1.5-7b"), shape, me.build(spec)), cost(shape, method=spec)
    assert (found.compress, found.prefill) == (closed.compress, closed.prefill)
    assert closed.total < cost(shape).total and closed.kv_cache_bytes < cost(shape).kv_cache_bytes
    assert closed.visual_tokens_kept == round(sum(me.build(spec).per_layer(576, 32)) / 32)


def test_a_prefill_at_the_layer_average_costs_about_the_same_wherever_tokens_go():
    """Layers cost nearly in proportion to their tokens, which is why the layer average is the budget."""
    costs = [cost("llava-1.5-7b", method=f"{name}:tokens=192").prefill for name in ("divprune", *METHODS)]
    assert max(costs) / min(costs) < 1.01


def slow_peaks(states, groups):
    """Density peaks, token by token."""
    n, width = states.shape
    distance = [[float((a - b).pow(2).sum() / width) ** 0.5 for b in states] for a in states]
    density = []
    for i in range(n):
        others = sorted(distance[i][j] ** 2 for j in range(n) if j != i)[:5]
        density.append(math.exp(-sum(others) / len(others)))
    rank = sorted(range(n), key=lambda i: (-density[i], i))
    apart = [max(map(max, distance)) if r == 0 else 0.0 for r in range(n)]
    for r, i in enumerate(rank):
        apart[i] = min((distance[i][j] for j in rank[:r]), default=max(map(max, distance)))
    peaks = sorted(range(n), key=lambda i: (-density[i] * apart[i], i))[:groups]
    sums = [torch.zeros(width) for _ in peaks]
    for i in range(n):
        nearest = peaks.index(i) if i in peaks else min(range(groups), key=lambda g: (distance[i][peaks[g]], g))
        sums[nearest] += states[i]
    return peaks, torch.stack(sums)


@pytest.mark.parametrize("n, groups", [(2, 1), (9, 3), (30, 4), (40, 40)])
def test_density_peaks_equal_the_slow_ones(n, groups):
    from mllm_efficient.compressors.sparsevlm import aggregate

    states = torch.randn(n, 12, generator=torch.Generator().manual_seed(n))
    peaks, sums = aggregate(states, groups)
    expected, totals = slow_peaks(states, groups)
    assert peaks.tolist() == expected
    torch.testing.assert_close(sums, totals)


@given(st.integers(2, 700), st.data(), st.floats(0.01, 1), st.floats(0.01, 1))
@settings(max_examples=200, deadline=None)
def test_recycling_stays_within_the_budget(n, data, recycle, clusters):
    k = data.draw(st.integers(1, n - 1))
    stay, recycled, groups = me.SparseVLM(ratio=0.5, recycle=recycle, clusters=clusters).split(n, k)
    assert stay + groups == k and stay >= 1 and groups <= recycled <= n - stay


@both_positions
def test_recycled_tokens_go_on_in_the_decoder(make_batch, positions):
    """A padded batch is its rows one by one, the count is that of the budget, and dropping them answers otherwise."""
    batch, model = make_batch(*ROWS), tiny("llama")
    spec = f"sparsevlm:ratio=0.5,recycle=0.5,clusters=0.3,positions={positions}"
    with me.compressed(model, spec):
        out = new_tokens(model.generate(**batch, max_new_tokens=NEW), batch)
        layers = me.last_report(model).images[0].per_layer
        for row, name in enumerate(ROWS):
            one = make_batch(name) if name != "long text" else None
            if one is not None and name != "text only":
                assert new_tokens(model.generate(**one, max_new_tokens=NEW), one)[0] == out[row]
    with me.compressed(model, f"sparsevlm:ratio=0.5,positions={positions}"):
        dropped = new_tokens(model.generate(**batch, max_new_tokens=NEW), batch)
        assert me.last_report(model).images[0].per_layer == layers
    assert dropped != out


@pytest.mark.parametrize("settings, message", [
    ("recycle=2", r"is not a share in \[0, 1\]"), ("recycle=0.3,clusters=0", r"is not a share in \(0, 1\]"),
    ("clusters=0.3", "no effect without recycle="),
])  # fmt: skip
def test_bad_recycling_is_one_line(settings, message):
    with pytest.raises(me.BadBudgetError, match=message):
        me.build(f"sparsevlm:ratio=0.5,{settings}")


def test_recycling_merges_so_m_rope_refuses_it_and_the_cost_is_counted():
    with pytest.raises(me.UnsupportedModelError, match="sparsevlm merges tokens"):
        me.wrap(families.tiny("qwen2_5_vl"), "sparsevlm:ratio=0.5,recycle=0.3")
    model, spec = tiny("llama"), "sparsevlm:ratio=0.5,recycle=0.5,clusters=0.3"
    shape = shape_of(model.config, "tiny")
    found = counter.count(model, shape, me.build(spec), text_tokens=11, visual_tokens=36)
    closed = cost(shape, text_tokens=11, visual_tokens=36, method=spec)
    assert (found.compress, found.prefill) == (closed.compress, closed.prefill)
