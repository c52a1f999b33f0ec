"""DPN: the wrapped model against a slow reference, its router's decisions, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import mllm_efficient as me
from mllm_efficient.compressors.dpn import DPN
from mllm_efficient.measure import counter
from mllm_efficient.measure.flops import cost, load_shape, shape_of
from mllm_efficient.patches import adapter_for, transformers_version
from mllm_efficient.tokens import LayerTokens
from mllm_efficient.trained import folder as trained
from mllm_efficient.trained.base_model import base_of

from .. import families
from ..patches.test_decoder import DECODERS, NEW, ROWS, new_tokens, rows_of, run, slow_beams, slow_greedy, start, tiny, windows, without
from .test_reducers import plane_windows

every_decoder = pytest.mark.parametrize("kind", list(DECODERS))
both_positions = pytest.mark.parametrize("positions", ["renumber", "keep"])
OFF = "dpn:weights=random,routing=fixed,kernel=1x1,scaling=false"


def router_of(model):
    return model.model.language_model.visual_router


def stir(model, seed=5):
    """Makes the routers decided, and the stages decide differently."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in router_of(model).parameters():
            parameter += torch.randn(parameter.shape, generator=generator)


# ------------------------------------------------------------------------------------------------ a slow reference


def chances(router, stage, question, temperature, allowed):
    """Layer by layer, number by number where it is short."""
    norm, down, _, up = router.stages[stage]
    x = (question - question.mean()) / (question.var(unbiased=False) + norm.eps).sqrt() * norm.weight + norm.bias
    hidden = [0.5 * h * (1 + math.erf(h / math.sqrt(2))) for h in (down.weight @ x).tolist()]
    logits = [sum(w * h for w, h in zip(row, hidden)) / temperature for row in up.weight.tolist()]
    total = sum(math.exp(v) for v, ok in zip(logits, allowed) if ok)
    return [math.exp(v) / total if ok else 0.0 for v, ok in zip(logits, allowed)]


def slow_stage(model, stage, *, kernels, least, temperature=10.0, pool="max", scaling=True, seen=None):
    def do(s):
        question, hidden, gone, kept = s.hidden[s.last], s.hidden.clone(), set(), []
        for i, slots in enumerate(s.images):
            left = [len(windows(s.places[i], kernel)) for kernel in kernels]
            fits = [kernel == (1, 1) or n >= least for kernel, n in zip(kernels, left)]
            if not any(fits):
                kept.append(slots)
                continue
            p = chances(router_of(model), stage, question, temperature, fits)
            chosen = max(range(len(p)), key=lambda e: (p[e], -e))
            if seen is not None:
                seen.append(kernels[chosen])
            found = windows(s.places[i], kernels[chosen])
            first = [members[0] for members in found.values()]
            for members in found.values():
                states = s.hidden[[slots[j] for j in members]]
                hidden[slots[members[0]]] = (states.amax(0) if pool == "max" else states.mean(0)) * (p[chosen] if scaling else 1)
            gone |= {slot for j, slot in enumerate(slots) if j not in first}
            kept.append([slots[j] for j in first])
            places = s.places[i][first].clone()
            places[:, 2:] = torch.tensor(list(found))
            s.places[i] = places
        s.hidden = hidden
        return without(s, gone, kept)

    return do


def slow_stages(model, layers=(1, 3, 4), **how):
    return {layer: slow_stage(model, number, **how) for number, layer in enumerate(layers)}


CASES = {
    "as published": ("min_tokens=4", dict(kernels=[(1, 1), (1, 2), (2, 2)], least=4)),
    "average, no factor": (
        "min_tokens=2,pool=avg,scaling=false,temperature=1,at=2/4",
        dict(kernels=[(1, 1), (1, 2), (2, 2)], least=2, pool="avg", scaling=False, temperature=1.0, layers=(2, 4)),
    ),
    "no 1x1": ("min_tokens=4,kernels=1x2/3x1/2x3,at=1/4", dict(kernels=[(1, 2), (3, 1), (2, 3)], least=4, layers=(1, 4))),
}


@every_decoder
@both_positions
@pytest.mark.parametrize("case", list(CASES))
def test_a_padded_batch_equals_the_reference(make_batch, kind, positions, case):
    batch, model, (settings, how) = make_batch(*ROWS), tiny(kind), CASES[case]
    me.wrap(model, f"dpn:weights=random,positions={positions},{settings}")
    stir(model)
    seen, out = [], model.generate(**batch, max_new_tokens=NEW)
    chosen = [k for image in me.last_report(model).images for k in image.kernels]
    expected = [slow_greedy(model, ids, f, slow_stages(model, seen=seen, **how), positions) for ids, f in rows_of(model, batch)]
    assert new_tokens(out, batch) == expected
    assert len(set(seen)) > 1 and {f"{r}x{c}" for r, c in seen} == set(chosen)


@both_positions
def test_beams_equal_the_reference(make_batch, positions):
    batch, model, (settings, how) = make_batch(*ROWS), tiny(), CASES["as published"]
    me.wrap(model, f"dpn:weights=random,positions={positions},{settings}")
    stir(model)
    out = model.generate(**batch, max_new_tokens=3, num_beams=3, length_penalty=0.0)
    stages = slow_stages(model, **how)
    assert new_tokens(out, batch) == [slow_beams(model, ids, f, stages, positions, new=3) for ids, f in rows_of(model, batch)]


def test_without_a_cache_by_lookup_and_on_the_second_turn_it_is_the_same(make_batch, processor, picture):
    one = processor(images=picture(3), text="user : <image> is the ring red ? is the ring", return_tensors="pt")
    batch, model = make_batch(*ROWS), tiny()
    me.wrap(model, f"dpn:weights=random,{CASES['as published'][0]}")
    stir(model)
    assert torch.equal(model.generate(**batch, max_new_tokens=4), model.generate(**batch, max_new_tokens=4, use_cache=False))
    done = model.generate(**one, max_new_tokens=4, return_dict_in_generate=True)
    assert torch.equal(done.sequences, model.generate(**one, max_new_tokens=4, prompt_lookup_num_tokens=3))
    more = torch.cat([done.sequences, torch.tensor([[7, 9, 11]])], 1)
    went_on = model.generate(input_ids=more, past_key_values=done.past_key_values, max_new_tokens=3)
    # the kernels that the first question chose stay: said at once, where the instruction's end is marked
    ids, features = rows_of(model, one)[0]
    expected, stages = [], slow_stages(model, **CASES["as published"][1])
    for _ in range(3):
        with torch.no_grad():
            logits, _, _ = run(model, start(model, ids, features, [*more[0, len(ids) :].tolist(), *expected]), stages, "renumber")
        expected.append(int(logits[-1].argmax()))
    assert went_on[0, more.shape[1] :].tolist() == expected


@every_decoder
def test_kernel_one_without_the_factor_is_the_stock_model_bit_for_bit(make_batch, kind):
    model, one, batch = tiny(kind), make_batch("one image"), make_batch(*ROWS)
    call = dict(max_new_tokens=NEW, do_sample=False)
    with torch.no_grad():
        logits, tokens = model(**one).logits, model.generate(**batch, **call)
    me.wrap(model, OFF)
    with torch.no_grad():
        assert torch.equal(model(**one).logits, logits)
    assert torch.equal(model.generate(**batch, **call), tokens)


def test_unwrap_leaves_no_trace(make_batch):
    model, one = tiny(), make_batch("one image")
    with torch.no_grad():
        logits, names, hooks = model(**one).logits, list(model.state_dict()), [len(m._forward_pre_hooks) for m in model.modules()]
        me.wrap(model, "dpn:weights=random,min_tokens=4")
        assert not torch.equal(model(**one).logits, logits)
        me.unwrap(model)
        assert torch.equal(model(**one).logits, logits)
    assert list(model.state_dict()) == names and [len(m._forward_pre_hooks) for m in model.modules()] == hooks


def test_gradients_are_those_of_the_reference(make_batch):
    """Of the router too, which learns through the factor."""
    one, model = make_batch("one image"), tiny()
    me.wrap(model, "dpn:weights=random,min_tokens=4,temperature=1")
    stir(model)
    out = model(**one, labels=one["input_ids"])
    out.loss.backward()
    up = router_of(model).stages[0][3].weight
    grad = up.grad.clone()
    assert grad.abs().max() > 0
    model.zero_grad()
    losses = []
    for shift in (1e-2, -1e-2):
        with torch.no_grad():
            up[1, 0] += shift
            losses.append(float(model(**one, labels=one["input_ids"]).loss))
            up[1, 0] -= shift
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(grad[1, 0].item(), rel=0.05, abs=1e-5)


# ------------------------------------------------------------------------------------------------ decisions


def method(**settings):
    return DPN(weights="random", **settings)


def test_the_likeliest_kernel_is_taken_and_its_probability_is_of_the_tempered_softmax():
    logits = torch.tensor([[0.0, 20.0, 10.0], [30.0, 0.0, 0.0]])
    done = method().decide(0, logits, [[(24, 24)]] * 2, [0, 1])
    assert done.kernels == ((1, 2), (1, 1)) and done.experts == (1, 0)
    expected = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]]).softmax(-1)
    assert torch.allclose(done.chances, expected) and torch.allclose(done.factors, expected[[0, 1], [1, 0]])
    assert method(scaling=False).decide(0, logits, [[(24, 24)]] * 2, [0, 1]).factors is None


@pytest.mark.parametrize("grids, allowed", [
    ([(24, 24)], (True, True, True)), ([(6, 6)], (True, True, False)), ([(4, 4)], (True, False, False)), ([(1, 40)], (True, True, False)),
    ([(6, 6), (6, 6)], (True, True, True)),
])  # fmt: skip
def test_kernels_that_leave_too_few_tokens_have_no_probability(grids, allowed):
    done = method().decide(0, torch.zeros(1, 3), [grids], [0])
    assert tuple((done.chances[0] > 0).tolist()) == allowed and done.chances.sum() == pytest.approx(1)


def test_an_image_that_no_kernel_is_for_stays_as_it_is():
    coarse = method(kernels="4x4/8x8")
    done = coarse.decide(0, torch.randn(1, 2), [[(6, 6)]], [0])
    v = LayerTokens(torch.randn(36, 8), torch.randn(2, 8), torch.randn(8), torch.arange(36), torch.zeros(36, 4), grids=((6, 6),))
    left = coarse.reduce(dataclasses.replace(v, kernel=done.kernels[0], factor=done.factors[0]), 1)
    assert done.kernels == (None,) and left.features is None and len(left) == 36


@pytest.mark.parametrize("drawn", ["scaling", "straight_through", "gumbel", "reinforce"])
def test_training_draws_kernels_as_often_as_they_are_likely(drawn):
    torch.manual_seed(0)
    m, logits = method(temperature=1.0, scaling=drawn == "scaling"), torch.tensor([[1.0, 0.0, 2.0]]).repeat(20_000, 1)
    done = m.decide(0, logits, [[(24, 24)]] * len(logits), [0] * len(logits), drawn)
    often = torch.bincount(torch.tensor(done.experts), minlength=3) / len(logits)
    assert torch.allclose(often, logits[0].softmax(-1), atol=0.012)


@pytest.mark.parametrize("drawn", ["straight_through", "gumbel"])
def test_a_straight_through_factor_is_one_with_a_gradient(drawn):
    logits = torch.randn(5, 3, requires_grad=True)
    done = method(scaling=False, temperature=1.0).decide(0, logits, [[(24, 24)]] * 5, [0] * 5, drawn)
    assert torch.equal(done.factors, torch.ones(5))
    done.factors.sum().backward()
    assert logits.grad.abs().max() > 0
    if drawn == "straight_through":
        own = logits.detach().clone().requires_grad_()
        own.softmax(-1)[torch.arange(5), list(done.experts)].sum().backward()
        assert torch.allclose(logits.grad, own.grad)


def test_random_routing_is_even_and_repeatable():
    m = method(routing="random")
    first = m.decide(0, None, [[(24, 24)]] * 3000, list(range(3000)))
    often = torch.bincount(torch.tensor(first.experts), minlength=3) / 3000
    assert torch.allclose(often, torch.full((3,), 1 / 3), atol=0.03)
    assert first.experts == m.decide(0, None, [[(24, 24)]] * 3000, list(range(3000))).experts
    assert first.experts != dataclasses.replace(m, seed=1).decide(0, None, [[(24, 24)]] * 3000, list(range(3000))).experts


@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("kernel", [(1, 1), (1, 2), (2, 2), (3, 2), (4, 4)])
def test_pooling_equals_windows_on_every_plane(pool, kernel):
    grids, parts = ((5, 7), (4, 4)), []
    for plane, (rows, columns) in enumerate(grids):
        parts += [[0, plane, r, c] for r in range(rows) for c in range(columns)]
    places, hidden = torch.tensor(parts), torch.randn(len(parts), 6)
    v = LayerTokens(hidden, hidden[:2], hidden[0], torch.arange(len(parts)), places, grids=grids, kernel=kernel, factor=torch.tensor(0.5))
    left = method(pool=pool).reduce(v, 1)
    features, indices, at = [], [], []
    for plane in (0, 1):
        members = (places[:, 1] == plane).nonzero()[:, 0]
        for (row, column), window in windows(places[members], kernel).items():
            states = hidden[members[window]]
            features.append((states.amax(0) if pool == "max" else states.mean(0)) / 2)
            indices.append(int(members[window[0]]))
            at.append([0, plane, row, column])
    assert torch.allclose(left.features, torch.stack(features)) and left.indices.tolist() == indices
    assert (left.places if left.places is not None else places).tolist() == at
    assert left.grids == tuple((r // kernel[0], c // kernel[1]) for r, c in grids)


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "llava_next_video", "internvl"])
def test_every_view_of_a_picture_is_pooled_by_itself(registered, name):
    """Against the toy of test_reducers, which reads the places of the tokens and equals a slow reference there."""

    @registered("by_places")
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class ByPlaces(me.Reducer):
        merges = True

        def layers(self, depth):
            return (1,)

        def reduce(self, v, k):
            found = plane_windows(v.places, (1, 2))
            features = torch.stack([v.hidden[members].mean(0) for members in found])
            places = v.places[[m[0] for m in found]] // torch.tensor([1, 1, 1, 2])
            return me.ReducedTokens(torch.tensor([members[0] for members in found]), features, places)

    model, batch = families.tiny(name), families.make(name, *families.FAMILIES[name].mixed)
    forced = "dpn:weights=random,at=1,routing=fixed,kernel=1x2,min_tokens=1,pool=avg,scaling=false"
    outs, reports = [], []
    for spec in ("by_places:ratio=1", forced):
        with me.compressed(model, spec):
            outs.append(model.generate(**batch, max_new_tokens=4))
            reports.append(me.last_report(model))
    assert torch.equal(*outs) and reports[0].tokens_per_layer == reports[1].tokens_per_layer
    for image in reports[1].images:
        assert sum(len(p) for p in image.kept_planes) == image.per_layer[-1] < image.full


# ------------------------------------------------------------------------------------------------ the router's token


def test_a_routers_token_is_read_in_place_of_the_last_one(make_batch, processor, picture):
    token = processor.tokenizer.convert_tokens_to_ids("ring")
    model = tiny()
    me.wrap(model, f"dpn:weights=random,min_tokens=4,router_token={token},at=2")
    stir(model)
    shown = []
    router_of(model).register_forward_pre_hook(lambda module, args: shown.append(args[1].clone()))
    text = ["user : <image> what is the big ring and the ring ? assistant :", "user : <image> what is a ring ? assistant :"]
    batch = processor(images=[picture(1), picture(2)], text=text, return_tensors="pt", padding=True)
    with torch.no_grad():
        model(**batch)
    for row, (ids, features) in enumerate(rows_of(model, batch)):
        states = []
        run(model, start(model, ids, features), {}, "renumber", lambda n, layer, s, states=states: states.append(s.hidden.detach()))
        assert torch.allclose(shown[0][row], states[2][ids == token].mean(0), atol=1e-5)
    with pytest.raises(me.CountMismatchError, match="a prompt has none: append it to the question"):
        model(**make_batch("long text", "one image"))


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("settings, message", [
    ("keep=0.5", "keep= has no effect: its router says how many tokens stay"),
    ("tokens=36", "tokens= has no effect"),
    ("ratio=0.5", "ratio= has no effect"),
    ("kernels=2y2", "are no kernels, rows x columns"),
    ("kernels=1x0", "are no kernels"),
    ("kernels=2/2x2", "names a kernel twice"),
    ("at=first", "are no decoder layers"),
    ("pool=min", "is not one of max, avg"),
    ("routing=none", "is not one of learned, random, fixed"),
    ("routing=fixed", "kernel= and routing=fixed go together"),
    ("kernel=2x2", "kernel= and routing=fixed go together"),
    ("temperature=0", "is no positive number"),
    ("temperature=hot", "is no positive number"),
    ("min_tokens=0", "is no number of tokens from 1"),
    ("min_tokens=few", "is no number of tokens from 1"),
    ("router_token=abc", "is no token id"),
    ("router_token=-3", "is no token id"),
    ("seed=4", "seed= has no effect with routing=learned"),
    ("scaling=2", "is not true or false"),
    ("routing=random,temperature=1", "temperature= has no effect with routing=random"),
    ("routing=fixed,kernel=2,router_token=3", "router_token= has no effect with routing=fixed"),
    ("per=tile", "has no effect inside the decoder"),
])  # fmt: skip
def test_bad_settings_are_one_line(settings, message):
    with pytest.raises(me.BadBudgetError, match=message):
        me.build(f"dpn:weights=random,{settings}")


@pytest.mark.parametrize("spec, message", [
    ("dpn", "no weights of it ship for this model"),
    ("dpn:weights=random,at=0", "tokens cannot go at layer 0"),
    ("dpn:weights=random,at=4/2", "ascending"),
    ("dpn:weights=random,routing=fixed,kernel=2/2", "kernel=2x2/2x2 for 3 stages"),
    ("divprune:keep=0.5 | dpn:weights=random", "divprune leaves none: use one of them"),
    ("tokenflex:tokens=9,weights=random | dpn:weights=random", "each bring trained weights"),
    ("none@dpn:weights=nowhere", "no config.json there"),
])  # fmt: skip
def test_what_cannot_run_is_one_line(spec, message):
    model = tiny()
    with pytest.raises(me.MllmEfficientError, match=message):
        me.wrap(model, spec)
    assert me.wrap(model, OFF) is model  # nothing was left on it


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_pooling_inside_m_rope_decoders_is_refused(name):
    with pytest.raises(me.UnsupportedModelError, match="dpn merges tokens, and a merged token has no place"):
        me.wrap(families.tiny(name), "dpn:weights=random")


# ------------------------------------------------------------------------------------------------ saved and loaded


def saved(folder, model, **settings):
    """A trained folder with a stirred router."""
    m = DPN(weights="random", **settings)
    depth, width = model.config.text_config.num_hidden_layers, model.config.text_config.hidden_size
    router = m.module(width, width, **m.sizes(depth))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter += torch.randn(parameter.shape, generator=generator)
    trained.save(folder, m, router, base_of(model), {**m.as_trained, "kept": [0.5] * len(m.stages(depth))})
    return router


def test_saved_routers_come_back_with_their_settings(tmp_path, make_batch):
    model, batch = tiny(), make_batch(*ROWS)
    router = saved(tmp_path, model, kernels="1/3", at="2", min_tokens=4, temperature=2.0, scaling=False)
    loaded = me.load(tmp_path)
    assert loaded == me.build(f"dpn:weights={tmp_path}")
    assert loaded.settled["kernels"] == "1x1/3x3" and loaded.settled["temperature"] == 2.0 and not loaded.settled["scaling"]
    with me.compressed(model, loaded):
        for name, value in router_of(model).state_dict().items():
            assert torch.equal(value, router.state_dict()[name])
        first = model.generate(**batch, max_new_tokens=4)
    by_hand = "dpn:weights=random,kernels=1/3,at=2,min_tokens=4,temperature=2,scaling=false"
    with me.compressed(model, by_hand):
        router_of(model).load_state_dict(router.state_dict())
        assert torch.equal(model.generate(**batch, max_new_tokens=4), first)
    with me.compressed(model, f"dpn:weights={tmp_path},routing=fixed,kernel=3x3"):
        model.generate(**batch, max_new_tokens=1)
        assert {image.kernels for image in me.last_report(model).images} == {("3x3",)}
    assert loaded.counts(36, 6) == (18,)


def test_a_router_of_another_width_or_number_is_refused(tmp_path):
    model = tiny()
    saved(tmp_path, model, min_tokens=4)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"inputs": 64, "outputs": 64}, "is a router 64 -> 64, and .* needs 32 -> 32"),
        ({"stages": 2}, "has routers for"),
    ):
        wrong = {**config, "sizes": {**config["sizes"], **change}}
        (tmp_path / "config.json").write_text(json.dumps(wrong))
        with pytest.raises(me.MllmEfficientError, match=message):
            me.wrap(model, f"dpn:weights={tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(me.BadBudgetError, match="for a router that was trained with 1x1/1x2/2x2: leave it out"):
        me.wrap(model, f"dpn:weights={tmp_path},kernels=1/2")
    state = load_file(tmp_path / "compressor.safetensors")
    del state["stages.0.1.weight"]
    save_file(state, tmp_path / "compressor.safetensors")
    with pytest.raises(me.MllmEfficientError, match=r"lacks stages\.0\.1\.weight"):
        me.wrap(model, f"dpn:weights={tmp_path}")


# ------------------------------------------------------------------------------------------------ cost


@pytest.mark.parametrize("kernel", ["1x1", "1x2", "2x2", "1x2/2x2/1x1"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_fixed_kernel_costs_what_torch_counts(kind, kernel):
    model, spec = tiny(kind), f"dpn:weights=random,routing=fixed,kernel={kernel},min_tokens=4"
    shape = shape_of(model.config, "tiny")
    found = counter.count(model, shape, me.build(spec), text_tokens=11, visual_tokens=36, new_tokens=2)
    closed = cost(shape, method=spec, text_tokens=11, visual_tokens=36, new_tokens=2)
    assert found == counter.Counted(closed.vision, closed.compress, closed.prefill, closed.decode)


def test_a_learned_routing_costs_what_torch_counts():
    model, spec = tiny(), "dpn:weights=random,min_tokens=4"
    shape = shape_of(model.config, "tiny")
    found = counter.count(model, shape, me.build(spec), text_tokens=11, visual_tokens=36)
    router = 3 * 2 * (32 * 8 + 8 * 3)
    assert found.compress == router == cost(shape, method=spec, text_tokens=11, visual_tokens=36).compress
    seen = [cost(shape, method=spec, text_tokens=11, visual_per_layer=layers).prefill for layers in paths()]
    assert found.prefill in seen


def paths():
    """Tokens per layer of every way through the three stages from a grid of 6 x 6."""
    found = {((6, 6),)}
    for layer in range(1, 6):
        kernels = [(1, 1), (1, 2), (2, 2)] if layer in (1, 3, 4) else [(1, 1)]
        found = {(*p, (p[-1][0] // high, p[-1][1] // wide)) for p in found for high, wide in kernels}
    return [[r * c for r, c in path] for path in sorted(found)]


@pytest.mark.parametrize("path, percent", [
    ("1x2/1x2/1x2", 51.4), ("1x2/2x2/2x2", 46.5), ("2x2/1x2/1x1", 43.0), ("2x2/2x2/1x1", 40.2), ("2x2/2x2/1x2", 39.5),
    ("2x2/2x2/2x2", 39.1),
])  # fmt: skip
def test_the_bounds_of_the_published_placement_on_a_7b_model(path, percent):
    """The paper's 56% saved lies near the coarsest path; 61% is the most that its placement can."""
    spec, shape = f"dpn:weights=random,routing=fixed,kernel={path},min_tokens=1", load_shape("llava-1.5-7b")
    call = dict(text_tokens=60, visual_tokens=576, convention="divprune")
    assert 100 * cost(shape, method=spec, **call).prefill / cost(shape, method="none", **call).prefill == pytest.approx(percent, abs=0.05)


def test_what_ships_is_of_the_embedded_model_alone():
    """Another model's cost is that of the published placement, whatever the embedded model's router was trained under."""
    found = cost("llava-1.5-7b", method="dpn")
    assert found.visual_per_layer == DPN(weights="random").per_layer(576, 32, grids=[(24, 24)])
    assert found.visual_per_layer[7] == 576 > found.visual_per_layer[8] > found.visual_per_layer[16] > found.visual_per_layer[24]


@pytest.mark.parametrize("n, grids, expected", [
    (576, None, (288, 144, 72)), (1000, None, (500, 250, 125)), (40, [(5, 8)], (20, 20, 20)), (40, [(5, 8), (5, 4)], (30, 30, 30)),
])  # fmt: skip
def test_counts_of_a_fixed_kernel(n, grids, expected):
    n = n if grids is None else sum(r * c for r, c in grids)
    assert method(routing="fixed", kernel="1x2").counts(n, 32, grids=grids) == expected


def test_too_small_images_are_estimated_as_they_are():
    assert method(kernels="1x1/4x4").counts(16, 32) == (16, 16, 16)


def test_default_layers_are_the_published_ones():
    assert DPN(weights="random").layers(32) == (8, 16, 24) and DPN(weights="random").layers(4) == (1, 2, 3)
    assert DPN(weights="random").layers(3) == (1, 2)


def test_the_adapter_names_what_it_holds(make_batch):
    model = tiny()
    adapter = adapter_for(model)
    assert trained.held(adapter) is None
    with me.compressed(model, "dpn:weights=random"):
        assert trained.held(adapter) == "dpn:weights=random,at=None,kernels=1x1/1x2/2x2"
        with pytest.raises(me.MllmEfficientError, match="the model holds dpn:weights=random,at=None"):
            model.generate(**make_batch("one image"), max_new_tokens=1, compression="dpn:weights=random,at=2")
        with pytest.raises(me.MllmEfficientError, match="inside me.compressed already"):
            me.wrap(model, "dpn:weights=random")
    assert trained.held(adapter) is None


# ------------------------------------------------------------------------------------------------ hosts


@pytest.mark.parametrize("before", [True, False], ids=["offloaded first", "wrapped first"])
def test_weights_offloaded_to_the_cpu(make_batch, before):
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    batch, spec = make_batch(*ROWS), "dpn:weights=random,min_tokens=4"
    expected = me.wrap(tiny(), spec).generate(**batch, max_new_tokens=NEW)
    model = tiny()
    steps = [lambda: cpu_offload(model, torch.device("cpu")), lambda: me.wrap(model, spec)]
    for step in steps if before else reversed(steps):
        step()
    assert torch.equal(model.generate(**batch, max_new_tokens=NEW), expected)
    me.unwrap(model)
    remove_hook_from_submodules(model)


def test_under_peft(make_batch):
    peft = pytest.importorskip("peft")
    batch, spec, model = make_batch(*ROWS), "dpn:weights=random,min_tokens=4", tiny()
    expected = me.wrap(model, spec).generate(**batch, max_new_tokens=NEW)
    me.unwrap(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "k_proj"], r=2))
    me.wrap(adapted, spec)
    assert torch.equal(adapted.generate(**batch, max_new_tokens=NEW), expected)
    adapted(**batch, labels=batch["input_ids"]).loss.backward()
    assert any(p.grad is not None and p.grad.any() for n, p in adapted.named_parameters() if "lora_B" in n)


def test_half_precision_and_an_eager_decoder(make_batch):
    batch, spec = make_batch(*ROWS), "dpn:weights=random,min_tokens=4"
    half = me.wrap(tiny().to(torch.bfloat16), spec)
    out = half.generate(**{k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in batch.items()}, max_new_tokens=2)
    assert out.shape[1] == batch["input_ids"].shape[1] + 2
    eager = tiny()
    eager.set_attn_implementation("eager")
    assert torch.equal(
        me.wrap(eager, spec).generate(**batch, max_new_tokens=NEW), me.wrap(tiny(), spec).generate(**batch, max_new_tokens=NEW)
    )


@pytest.mark.skipif(transformers_version() < (5, 23), reason="in-decoder methods refuse gradient checkpointing before transformers 5.23")
def test_gradient_checkpointing_gives_the_same_gradients(make_batch):
    batch, grads = make_batch(*ROWS), []
    for checkpointing in (False, True):
        model = me.wrap(tiny(), "dpn:weights=random,min_tokens=4,temperature=1")
        stir(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        router_of(model).eval()  # the likeliest kernels, the same both times
        model(**batch, labels=batch["input_ids"]).loss.backward()
        grads.append([p.grad.clone() for p in router_of(model).parameters() if p.grad is not None])
    assert any(g.any() for g in grads[0])
    for own_name, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(own_name, theirs)
