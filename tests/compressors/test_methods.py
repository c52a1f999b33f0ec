"""Every listed method keeps the promises of its kind. A new method is tested by being listed."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mllm_efficient as me
from mllm_efficient.compressors.base import Compressor, generator_for, one_line, parameters, query_aware
from mllm_efficient.compressors.resizer import Resizer

pytestmark = pytest.mark.once

settings.register_profile("patient", deadline=None)  # no test asserts a time
settings.load_profile("patient")

CLASSES = {name: me.get_method(name) for name in me.list_methods() if me.get_method(name).kind == "pre_llm"}
SELECTORS = [name for name, cls in CLASSES.items() if issubclass(cls, me.Selector)]
MERGERS = [name for name, cls in CLASSES.items() if issubclass(cls, me.Merger)]
RESIZERS = [name for name, cls in CLASSES.items() if issubclass(cls, Resizer)]
# Of these the baseline keeps everything, and the other what a picture's pixels say.
WITHOUT_BUDGET = {"none": [{}, {"positions": "keep"}], "pixelprune": [{}, {"tau": 0.1}, {"positions": "keep"}]}
BUDGETED = [name for name in CLASSES if name not in WITHOUT_BUDGET]
WITHOUT_NEEDS = [name for name in SELECTORS if not CLASSES[name].needs]

BUDGETS = (
    {"keep": 0.25},
    {"keep": 1e-05},
    {"tokens": 7},
    {"prune": 0.75},
    {"keep": 0.3, "min_tokens": 2, "max_tokens": 9},
    {"tokens": 7, "positions": "renumber"},
)
KEEPS_POSITIONS = {"tokens": 7, "positions": "keep"}
OWN = {
    "divprune": ({"keep": 0.25, "metric": "l2"}, {"tokens": 7, "metric": "l1", "order": "picked"}, {"keep": 0.25, "merge": "mean"}),
    "divmerge": ({"keep": 0.25, "merge": "similarity"},),
    "cdpruner": ({"keep": 0.25, "relevance": "llm", "per": "tile"},),
    "pool": ({"keep": 0.25, "op": "max"}, {"keep": 0.25, "op": "gem", "p": 2}, {"tokens": 7, "op": "ggem", "p": "1/2.5"}),
    "spp": ({"keep": 0.25, "op": "gem"}, {"tokens": 7, "op": "max"}),
    "tome": ({"keep": 0.25, "r": 4},),
    "flowcut": ({"keep": 0.25, "entropy": 0.5},),
    "vispruner": ({"keep": 0.25, "r": 0.2},),
    "visionzip": ({"keep": 0.25, "contextual": 0.4},),
    "fastvid": ({"keep": 0.25, "contextual": 0.5, "threshold": 0.84},),
    "scope": ({"keep": 0.25, "alpha": 2},),
    "prumerge_plus": ({"keep": 0.25, "uniform": 0.25, "neighbours": 3},),
    "uniform": ({"keep": 0.25, "raster": True},),
    "mmtok": ({"keep": 0.25, "alpha": 1.0, "text_temperature": 0.01},),
    "apet": ({"keep": 0.25, "basis": 3}, {"keep": 0.25, "merge": None}),
    "otprune": ({"keep": 0.25, "gamma": 1.0},),
    "vscan": ({"keep": 0.25, "window": 2}, {"keep": 0.25, "merge": None}),
    "random": ({"keep": 0.25, "seed": 3}, {"tokens": 7, "seed": -1}),
}


ALWAYS_SAID = {"cdpruner": {"relevance": "llm"}}  # settings that a method names even where they are the default


def settings_of(name: str) -> list[dict]:
    """Settings to try a method with: every kind of budget, and what is its own."""
    if name in WITHOUT_BUDGET:
        return WITHOUT_BUDGET[name]
    return [*BUDGETS, *([] if CLASSES[name].merges else [KEEPS_POSITIONS]), *OWN.get(name, ())]


EVERY = [(name, given_settings) for name in CLASSES for given_settings in settings_of(name)]
every_setting = pytest.mark.parametrize(
    ("name", "given_settings"), EVERY, ids=lambda value: value if isinstance(value, str) else str(value)
)


def visual_tokens(grid: tuple[int, int], seed: int = 0, width: int = 5, dtype: torch.dtype = torch.float32, **more) -> me.VisualTokens:
    """An image with everything that a method may ask for."""
    n = grid[0] * grid[1]
    draw = torch.Generator().manual_seed(seed)
    return me.VisualTokens(
        torch.randn(n, width, generator=draw).to(dtype), grid=grid, attention=torch.rand(n, generator=draw),
        early_attention=torch.rand(n, generator=torch.Generator().manual_seed(seed + 1)), keys=torch.randn(n, 4, generator=draw),
        text=torch.randn(6, width, generator=draw), clip_text=torch.randn(4, generator=draw),
        heads=torch.randn(3, n, generator=draw), tile=torch.zeros(n, dtype=torch.long), frame=torch.zeros(n, dtype=torch.long), **more,
    )  # fmt: skip


def unique_ascending(indices: torch.Tensor, k: int, n: int) -> bool:
    return indices.dtype == torch.long and indices.shape == (k,) and indices.tolist() == sorted(set(indices.tolist()) & set(range(n)))


# Selectors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in SELECTORS if name != "none"])
@given(grid=st.tuples(st.integers(1, 9), st.integers(1, 9)), dtype=st.sampled_from([torch.float32, torch.bfloat16]), data=st.data())
def test_a_selector_keeps_exactly_k_unique_ascending(name, grid, dtype, data):
    n = grid[0] * grid[1]
    k = data.draw(st.integers(1, n), label="k")
    v = visual_tokens(grid, dtype=dtype)
    method = me.build({"method": name, "tokens": k})
    assert unique_ascending(method.select(v), k, n)
    assert unique_ascending(method.select(v, k), k, n)


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("n", [1, 2, 36])
def test_keeping_all_is_every_index_in_order(name, n):
    method = me.build({"method": name, "keep": 1.0})
    assert method.full_is_identity
    assert method.select(visual_tokens((1, n))).tolist() == list(range(n))


@pytest.mark.parametrize("name", SELECTORS)
def test_a_selector_compresses_to_the_rows_it_selects(name):
    v = visual_tokens((6, 6))
    method = me.build(settings_of(name)[0] | {"method": name})
    k = method.count(36, (6, 6))
    out = method.compress(v, k)
    assert len(out) == k and out.grid is None
    assert torch.equal(out.indices, method.select(v, k))
    if method.merge is None:  # test_merging.py has what is left where the others are merged into them
        assert torch.equal(out.features, v.features[out.indices])


@pytest.mark.parametrize("name", WITHOUT_NEEDS)
def test_a_bare_tensor_and_no_count_select_as_visual_tokens_with_the_count(name):
    v = me.VisualTokens(visual_tokens((6, 6)).features)
    method = me.build(settings_of(name)[0] | {"method": name})
    assert torch.equal(method.select(v.features), method.select(v, method.count(36, None)))


@pytest.mark.parametrize("name", WITHOUT_NEEDS)
def test_features_that_are_no_matrix_are_refused(name):
    method = me.build({"method": name, "keep": 1.0})
    for shape in [(4,), (1, 4, 3)]:
        with pytest.raises(me.CountMismatchError, match="features must be"):
            method.select(torch.zeros(shape))


@pytest.mark.parametrize("name", WITHOUT_NEEDS)
def test_no_tokens_are_refused(name):
    with pytest.raises(me.MllmEfficientError, match="0 visual tokens"):
        me.build({"method": name, "keep": 1.0}).select(torch.zeros(0, 3))


@pytest.mark.parametrize("name", SELECTORS)
def test_more_tokens_than_there_are_cannot_be_selected(name):
    """A token would have to be kept twice."""
    with pytest.raises(me.MllmEfficientError):
        me.build({"method": name, "keep": 1.0}).select(visual_tokens((2, 2)), 5)


@pytest.mark.parametrize("name", SELECTORS)
def test_selecting_twice_gives_the_same_and_leaves_the_input_as_it_was(name):
    method = me.build(settings_of(name)[0] | {"method": name})
    v = visual_tokens((6, 6))
    assert torch.equal(method.select(v), method.select(v))
    fresh = visual_tokens((6, 6))
    for field in dataclasses.fields(v):
        value = getattr(v, field.name)
        assert not isinstance(value, torch.Tensor) or torch.equal(value, getattr(fresh, field.name)), field.name


# Counts --------------------------------------------------------------------------------------------------------------


@every_setting
@given(grid=st.tuples(st.integers(1, 30), st.integers(1, 30)))
def test_the_count_is_the_budgets_or_for_grids_at_most_it(name, given_settings, grid):
    n = grid[0] * grid[1]
    method = me.build({"method": name, **given_settings})
    budget = method.budget.count(n, fixed=False)
    k = method.count(n, grid, fixed=False)
    assert 1 <= k <= budget <= n
    assert k == budget or CLASSES[name].merges


@pytest.mark.parametrize("name", BUDGETED)
def test_more_tokens_than_a_fixed_image_has_raise(name):
    with pytest.raises(me.BadBudgetError, match="tokens=37 is more than the 36"):
        me.build({"method": name, "tokens": 37}).count(36, (6, 6))


@pytest.mark.parametrize("name", [name for name, cls in CLASSES.items() if "grid" in cls.needs])
def test_a_method_that_needs_the_grid_says_so_where_there_is_none(name):
    with pytest.raises(me.CountMismatchError, match=f"{name} needs the token grid"):
        me.build({"method": name, "keep": 0.5}).count(36, None)


# Methods as values ---------------------------------------------------------------------------------------------------


@every_setting
def test_a_method_is_frozen(name, given_settings):
    method = me.build({"method": name, **given_settings})
    for field in (*parameters(type(method)), "something_new"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(method, field, None)


@every_setting
def test_equal_settings_are_equal_methods_and_hash_alike(name, given_settings):
    one, other = (me.build({"method": name, **given_settings}) for _ in range(2))
    assert one is not other and one == other and hash(one) == hash(other)


def test_methods_with_different_settings_or_names_differ():
    methods = [me.build({"method": name, **given_settings}) for name, given_settings in EVERY]
    assert len(set(methods)) == len(methods)
    assert all(a != b for a, b in itertools.combinations(methods, 2))


@every_setting
def test_a_dict_builds_the_method_it_came_from(name, given_settings):
    method = me.build({"method": name, **given_settings})
    settings_dict = method.to_dict()
    assert settings_dict == {"method": name, **given_settings, **ALWAYS_SAID.get(name, {})}, (
        "every setting that is not the default, and no other"
    )
    assert me.build(settings_dict) == method and type(me.build(settings_dict)) is type(method)
    assert me.build(json.loads(json.dumps(settings_dict))) == method


@every_setting
def test_a_specification_builds_the_method_it_came_from(name, given_settings):
    method = me.build({"method": name, **given_settings})
    assert me.build(method.spec()) == method and type(me.build(method.spec())) is type(method)
    assert method.spec().startswith(name)


@given(st.floats(min_value=0, max_value=1, exclude_min=True))
def test_every_fraction_survives_the_specification(keep):
    assert me.build(me.Uniform(keep=keep).spec()).keep == keep


@pytest.mark.parametrize("name", CLASSES)
def test_a_method_says_what_it_is(name):
    cls = CLASSES[name]
    assert cls.name == name and issubclass(cls, Compressor)
    assert one_line(cls) and not one_line(cls).startswith(f"{cls.__name__}("), "its own docstring, not dataclass's"
    assert set(cls.needs) <= {"attention", "early_attention", "keys", "text", "clip_text", "grid", "heads", "frame"}
    assert query_aware(cls) == bool(set(cls.needs) & {"text", "clip_text"})
    assert isinstance(cls.trained, bool) and isinstance(cls.paper, str)


@pytest.mark.parametrize("name", [*(name for name in MERGERS if not me.get_method(name).in_place), *RESIZERS])
def test_merged_tokens_have_no_old_position_to_keep(name):
    with pytest.raises(me.MllmEfficientError, match=f"{name} merges tokens"):
        me.build({"method": name, "keep": 0.5, "positions": "keep"})


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("positions", ["kept", True, 1, ""])
def test_a_position_rule_that_does_not_exist_is_refused(name, positions):
    with pytest.raises(me.BadBudgetError, match=r"positions=.*'renumber', 'keep'"):
        me.build({"method": name, "keep": 1.0, "positions": positions})


@pytest.mark.parametrize("setting", [{"keep": 0.5}, {"tokens": 4}, {"prune": 0.5}, {"min_tokens": 4}, {"max_tokens": 4}])
def test_the_baseline_takes_no_budget(setting):
    with pytest.raises(me.BadBudgetError, match="none keeps every token"):
        me.build({"method": "none", **setting})


# random --------------------------------------------------------------------------------------------------------------


def test_random_depends_on_seed_and_generator_only():
    grid = (6, 6)
    method = me.Random(tokens=9, seed=5)
    expected = method.select(visual_tokens(grid, generator=generator_for(method, 3)))
    for features in (visual_tokens(grid, seed=1), visual_tokens(grid, dtype=torch.bfloat16), visual_tokens(grid, width=2)):
        torch.manual_seed(int(features.features.float().sum() * 1000))
        v = dataclasses.replace(features, attention=None, text=None, generator=generator_for(method, 3))
        assert torch.equal(method.select(v), expected)
    assert torch.equal(me.Random(keep=0.25, seed=5).select(v.features), me.Random(tokens=9, seed=5).select(v.features))


def test_random_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    me.Random(tokens=9).select(torch.zeros(36, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_other_seeds_and_other_images_draw_other_tokens():
    """64 of 576: two draws that agree by chance are as likely as one in 10^86."""
    features = torch.zeros(576, 1)
    by_seed = {tuple(me.Random(tokens=64, seed=seed).select(features).tolist()) for seed in range(50)}
    method = me.Random(tokens=64)
    by_image = {
        tuple(method.select(me.VisualTokens(features, generator=generator_for(method, key))).tolist()) for key in [*range(50), "a", "b"]
    }
    assert len(by_seed) == 50 and len(by_image) == 52


def test_random_draws_every_token_equally_often():
    """Each of 12 tokens in 4 of 12 draws: 1000 +- 26 (one standard deviation) of 3000, for these fixed seeds."""
    drawn = torch.zeros(12)
    for seed in range(3000):
        drawn[me.Random(tokens=4, seed=seed).select(torch.zeros(12, 1))] += 1
    assert ((drawn - 1000).abs() < 4 * 26).all()


# uniform -------------------------------------------------------------------------------------------------------------


# pool ----------------------------------------------------------------------------------------------------------------


# resize --------------------------------------------------------------------------------------------------------------


# A third party's method ----------------------------------------------------------------------------------------------
