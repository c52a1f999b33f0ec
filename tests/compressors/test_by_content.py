"""Budgets by content: a radius, one budget for all pictures of a call; each against a slow reference, and in real calls."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mllm_efficient as me
from mllm_efficient.apply.plan import check, describe
from mllm_efficient.eval.api import require_runnable
from mllm_efficient.loading.models import ModelOptions, load
from mllm_efficient.patches import adapter_for
from mllm_efficient.patches.vllm.settings import require_served

from ..families import FAMILIES, make, tiny

NAMES = ("divprune", "divmerge")


def tokens(n: int, seed: int, spread: float = 1.0, width: int = 6) -> torch.Tensor:
    """n rows around a common direction, as far from it as ``spread`` says."""
    draw = torch.Generator().manual_seed(seed)
    return torch.ones(n, width) + spread * torch.randn(n, width, generator=draw)


def slow_order(x: torch.Tensor) -> tuple[list[int], list[float]]:
    """DivPrune's order and how far each pick was from those before it, one token after the other."""
    x = torch.nn.functional.normalize(x.double(), dim=1)
    d = 1 - x @ x.T
    others = [min((float(d[i, j]) for j in range(len(x)) if j != i), default=0.0) for i in range(len(x))]
    order, gains = [max(range(len(x)), key=lambda i: (others[i], -i))], [float("inf")]
    while len(order) < len(x):
        far = {i: min(float(d[j, i]) for j in order) for i in range(len(x)) if i not in order}
        best = max(far, key=lambda i: (far[i], -i))
        order.append(best)
        gains.append(far[best])
    return order, gains


def slow_radius(x: torch.Tensor, radius: float) -> list[int]:
    """The first of the order that leave no token farther than the radius from all of them."""
    order, _ = slow_order(x)
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    for k in range(1, len(x) + 1):
        if float((1 - unit @ unit[order[:k]].T).amin(1).max()) <= radius:
            return sorted(order[:k])
    return sorted(order)


@pytest.mark.parametrize("radius", [0.02, 0.1, 0.3, 0.9])
@given(n=st.integers(1, 24), seed=st.integers(0, 9), spread=st.sampled_from([0.1, 0.5, 2.0]))
def test_a_radius_keeps_as_many_as_it_takes(radius, n, seed, spread):
    x = tokens(n, seed, spread)
    assert me.DivPrune(radius=radius).select(x).tolist() == slow_radius(x, radius)


def test_duplicates_cost_one_token():
    x = tokens(4, 0, 2.0).repeat(5, 1)
    assert len(me.DivPrune(radius=1e-3).select(x)) == 4


def test_bounds_of_a_radius_hold():
    x = tokens(20, 1)
    free = len(me.DivPrune(radius=0.1).select(x))
    assert 3 < free < 18
    assert len(me.DivPrune(radius=0.1, max_tokens=3).select(x)) == 3
    assert len(me.DivPrune(radius=0.1, min_tokens=18).select(x)) == 18


@pytest.mark.parametrize("name", NAMES)
def test_a_radius_is_the_same_in_a_batch(name):
    method, parts = me.build(f"{name}:radius=0.1"), [me.VisualTokens(tokens(n, n, n / 20)) for n in (5, 9, 9, 24)]
    together = method.compress_all(parts, [len(v) for v in parts])
    for v, done in zip(parts, together):
        (alone,) = method.compress_all([v], [len(v)])
        assert torch.equal(done.indices, alone.indices) and torch.equal(done.features, alone.features)
    assert len({len(done) for done in together}) > 2


@pytest.mark.parametrize("name", NAMES)
@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4), keep=st.sampled_from([0.2, 0.5, 0.8]), seed=st.integers(0, 5))
def test_a_set_spends_its_sum_where_it_adds_most(name, sizes, keep, seed):
    parts = [me.VisualTokens(tokens(n, seed + i, (0.1, 1.0, 3.0, 0.5)[i])) for i, n in enumerate(sizes)]
    ks = [max(1, round(keep * n)) for n in sizes]
    done = me.build(f"{name}:keep={keep},spend=set").compress_all(parts, ks)
    counts = [1] * len(parts)  # one each, then the token that is farthest from what its picture has
    orders = [slow_order(v.features) for v in parts]
    for _ in range(sum(ks) - len(parts)):
        open_ = [i for i, n in enumerate(sizes) if counts[i] < n]
        counts[max(open_, key=lambda i: (orders[i][1][counts[i]], -i))] += 1
    assert [len(d) for d in done] == counts
    assert [d.indices.tolist() for d in done] == [sorted(order[:k]) for (order, _), k in zip(orders, counts)]


def test_bounds_of_a_set_hold_for_each():
    parts = [me.VisualTokens(tokens(20, 0, 0.01)), me.VisualTokens(tokens(20, 1, 3.0))]
    assert [len(d) for d in me.build("divprune:keep=0.5,spend=set").compress_all(parts, [10, 10])] == [1, 19]
    bounded = me.build("divprune:keep=0.5,spend=set,min_tokens=4,max_tokens=15")
    assert [len(d) for d in bounded.compress_all(parts, [10, 10])] == [5, 15]


def test_order_picked_stays_in_the_order_of_choice():
    x = tokens(12, 3)
    method = me.DivPrune(radius=0.1, order="picked")
    (done,) = method.compress_all([me.VisualTokens(x)], [12])
    assert done.indices.tolist() == slow_order(x)[0][: len(done)] == method.select(x).tolist()


# ------------------------------------------------------------------------------------------------ in calls


@pytest.fixture(scope="module")
def loaded():
    return load(ModelOptions(device="cpu"))


def questions(loaded, pictures):
    prompts = [loaded.prompt("What colour is the big object?", 1, 0)] * len(pictures)
    return loaded.inputs(prompts, [[p] for p in pictures])


@pytest.fixture(scope="module")
def pictures():
    """A flat one, and scenes."""
    from PIL import Image

    from mllm_efficient.eval.builtin.suite import samples

    scenes = {s.image: s.pictures(144)[0] for s in samples("val", 28)}
    return [Image.new("RGB", (144, 144), (90, 90, 90)), *list(scenes.values())[:3]]


def test_a_call_keeps_what_each_picture_takes_and_the_report_says_so(loaded, pictures):
    prepared = me.prepare(loaded.model, "divprune:radius=0.4", **questions(loaded, pictures))
    kept = [image.kept for image in prepared.report.images]
    assert kept[0] < min(kept[1:]) and max(kept) < 144
    assert [len(image.indices) for image in prepared.report.images] == kept
    visual = prepared.tensors["input_ids"] == loaded.model.config.image_token_id
    assert visual.sum(1).tolist() == kept
    for picture, n in zip(pictures, kept):
        alone = me.prepare(loaded.model, "divprune:radius=0.4", **questions(loaded, [picture]))
        assert [image.kept for image in alone.report.images] == [n]


@pytest.mark.parametrize("spec", ["divprune:radius=0.4", "divmerge:keep=0.2,spend=set", "divprune:radius=0.4,positions=keep"])
def test_the_wrapped_model_answers_as_the_explicit_path(loaded, pictures, spec):
    batch = questions(loaded, pictures)
    how = {"max_new_tokens": 4, "do_sample": False}
    kwargs = me.prepare(loaded.model, spec, **batch).model_kwargs
    explicit = loaded.model.generate(**kwargs, **how)[:, kwargs["input_ids"].shape[1] :]
    with me.compressed(loaded.model, spec):
        wrapped = loaded.model.generate(**batch, **how)[:, batch["input_ids"].shape[1] :]
        report = me.last_report(loaded.model)
    assert torch.equal(explicit, wrapped)
    assert len({image.kept for image in report.images}) > 1


def test_the_average_of_a_set_is_exact(loaded, pictures):
    report = me.prepare(loaded.model, "divprune:tokens=20,spend=set", **questions(loaded, pictures)).report
    assert report.visual_tokens_kept == 20 * len(pictures)
    one = me.prepare(loaded.model, "divprune:tokens=20,spend=set", **questions(loaded, pictures[:1])).report
    assert one.visual_tokens_kept == 20


def test_a_radius_that_keeps_everything_changes_nothing(loaded, pictures):
    batch = questions(loaded, pictures[1:])
    method = me.DivPrune(radius=1e-6, min_tokens=144)
    prepared = me.prepare(loaded.model, method, **batch)
    assert prepared.report.visual_tokens_kept == prepared.report.visual_tokens_full
    with torch.no_grad():
        assert torch.equal(loaded.model(**prepared.model_kwargs).logits, loaded.model(**batch).logits)


@pytest.mark.parametrize("name", ["llava_next", "qwen3_vl"])
def test_other_families_too(name):
    model, batch = tiny(name), make(name, *FAMILIES[name].mixed)
    report = me.prepare(model, "divmerge:radius=0.5,min_tokens=2", **batch).report
    assert all(2 <= image.kept <= image.full for image in report.images) and report.visual_tokens_kept < report.visual_tokens_full
    spent = me.prepare(model, "divprune:keep=0.3,spend=set", **batch).report
    each = me.prepare(model, "divprune:keep=0.3", **batch).report
    assert spent.visual_tokens_kept == each.visual_tokens_kept and spent.positions == each.positions


# ------------------------------------------------------------------------------------------------ refused, in words


@pytest.mark.parametrize(
    "spec, said",
    [
        ("divprune:radius=0.2,keep=0.5", "leave keep= out"),
        ("divprune:radius=0", "not a cosine distance"),
        ("divprune:radius=2", "not a cosine distance"),
        ("divprune:radius=true", "not a cosine distance"),
        ("divprune:radius=.nan", "not a cosine distance"),
        ("divprune:radius=0.2,metric=l2", "leave it out"),
        ("divprune:radius=0.2,spend=set", "leave one of them out"),
        ("divprune:keep=1.0,spend=set", "no effect where every token stays"),
        ("divprune:radius=0.2,age=0.5", "leave it out"),
        ("divprune:keep=0.5,spend=set,age=0.5", "leave it out"),
        ("pixelprune | divprune:radius=0.2", "give it alone"),
        ("divprune:keep=0.5,spend=all", "is not 'set'"),
        ("divprune:spend=set", "no budget"),
        ("divprune:radius=0.2 | fastv:layer=1,keep=0.5", "give it alone"),
        ("random:radius=0.2", "radius"),
        ("fastv:radius=0.2", "radius"),
    ],
)
def test_what_has_no_meaning_is_refused(spec, said):
    with pytest.raises(me.MllmEfficientError, match=said):
        me.build(spec)


def test_a_size_alone_is_refused_for_a_radius_and_the_mean_of_a_set(loaded):
    adapter = adapter_for(loaded.model)
    item = adapter.item_of(adapter.usual())
    with pytest.raises(me.MllmEfficientError, match="depends on the picture"):
        me.build("divprune:radius=0.2").plan(adapter, item)
    assert me.build("divprune:keep=0.25,spend=set").plan(adapter, item).kept == 36
    with pytest.raises(me.MllmEfficientError, match="depends on the picture"):
        me.flops("builtin", "divprune:radius=0.2")


@pytest.mark.parametrize("spec", ["divprune:radius=0.2", "divprune:keep=0.2,spend=set"])
def test_a_server_refuses_it_by_name(spec):
    with pytest.raises(me.MllmEfficientError, match="divprune with radius= or spend="):
        require_served(me.build(spec))


def test_it_says_what_it_will_do(loaded):
    adapter = adapter_for(loaded.model)
    for spec, said in (
        ("divprune:radius=0.2,max_tokens=50", "within a cosine distance of 0.2 of each, at most 50"),
        ("divprune:keep=0.25,spend=set", "keeps 36 of 144 tokens per image (removes 75.0%), on average over the pictures of a call"),
    ):
        method = me.build(spec)
        check(adapter, method)
        assert said in describe(method, adapter.usual(), adapter) and said in require_runnable(loaded, [method])[0]
        assert me.build(method.spec()) == method == me.build(method.to_dict())
