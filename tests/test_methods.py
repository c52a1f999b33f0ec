"""Every listed method keeps the promises of its kind. A new method is tested by being listed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import mllm_efficient as me
from mllm_efficient.apply.prepare import check
from mllm_efficient.budget import fit_grid
from mllm_efficient.compressors.base import Compressor, generator_for, one_line, parameters, query_aware
from mllm_efficient.compressors.math.finite import Watch
from mllm_efficient.compressors.resizer import Resizer
from mllm_efficient.patches.base import Adapter

pytestmark = pytest.mark.once

settings.register_profile("patient", deadline=None)  # no test asserts a time
settings.load_profile("patient")

CLASSES = {name: me.get_method(name) for name in me.list_methods() if me.get_method(name).kind == "pre_llm"}
SELECTORS = [name for name, cls in CLASSES.items() if issubclass(cls, me.Selector)]
MERGERS = [name for name, cls in CLASSES.items() if issubclass(cls, me.Merger)]
RESIZERS = [name for name, cls in CLASSES.items() if issubclass(cls, Resizer)]
BUDGETED = [name for name in CLASSES if name != "none"]  # the baseline keeps everything and takes no budget
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
    "divprune": ({"keep": 0.25, "metric": "l2"}, {"tokens": 7, "metric": "l1", "order": "picked"}),
    "cdpruner": ({"keep": 0.25, "relevance": "llm", "per": "tile"},),
    "pool": ({"keep": 0.25, "op": "max"}, {"keep": 0.25, "op": "gem", "p": 2}, {"tokens": 7, "op": "ggem", "p": "1/2.5"}),
    "spp": ({"keep": 0.25, "op": "gem"}, {"tokens": 7, "op": "max"}),
    "tome": ({"keep": 0.25, "r": 4},),
    "vispruner": ({"keep": 0.25, "r": 0.2},),
    "visionzip": ({"keep": 0.25, "contextual": 0.4},),
    "scope": ({"keep": 0.25, "alpha": 2},),
    "prumerge_plus": ({"keep": 0.25, "uniform": 0.25, "neighbours": 3},),
    "uniform": ({"keep": 0.25, "raster": True},),
    "random": ({"keep": 0.25, "seed": 3}, {"tokens": 7, "seed": -1}),
}


ALWAYS_SAID = {"cdpruner": {"relevance": "llm"}}  # settings that a method names even where they are the default


def settings_of(name: str) -> list[dict]:
    """Settings to try a method with: every kind of budget, and what is its own."""
    if name == "none":
        return [{}, {"positions": "keep"}]
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
        keys=torch.randn(n, 4, generator=draw), text=torch.randn(6, width, generator=draw), clip_text=torch.randn(4, generator=draw),
        tile=torch.zeros(n, dtype=torch.long), frame=torch.zeros(n, dtype=torch.long), **more,
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
    assert set(cls.needs) <= {"attention", "keys", "text", "clip_text", "grid"}
    assert query_aware(cls) == bool(set(cls.needs) & {"text", "clip_text"})
    assert isinstance(cls.trained, bool) and isinstance(cls.paper, str)


@pytest.mark.parametrize("name", [*MERGERS, *RESIZERS])
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


def test_uniform_takes_the_middle_of_each_of_k_equal_parts():
    for n in range(1, 61):
        features = torch.zeros(n, 1)
        for k in range(1, n + 1):
            middles = [math.floor(Fraction(2 * i + 1, 2) * n / k) for i in range(k)]
            assert me.Uniform(tokens=k, raster=True).select(features).tolist() == middles, f"{k} of {n}"
            assert me.Uniform(tokens=k).select(features).tolist() == middles  # no grid is known


@pytest.mark.parametrize("grid", [(12, 12), (24, 24), (5, 9), (9, 5), (1, 7), (7, 1), (2, 30)])
def test_uniform_is_a_lattice_of_exactly_k_that_is_as_even_as_whole_numbers_allow(grid):
    rows, columns = grid
    v = me.VisualTokens(torch.zeros(rows * columns, 1), grid=grid)
    for k in range(1, rows * columns + 1):
        chosen = me.Uniform(tokens=k).select(v, k).tolist()
        assert len(set(chosen)) == k and chosen == sorted(chosen)
        by_row = {r: [c % columns for c in chosen if c // columns == r] for r in {c // columns for c in chosen}}
        taken = sorted(by_row)
        assert max(map(len, by_row.values())) - min(map(len, by_row.values())) <= 1
        assert taken == [math.floor(Fraction(2 * j + 1, 2) * rows / len(taken)) for j in range(len(taken))]
        for places in by_row.values():
            assert places == [math.floor(Fraction(2 * i + 1, 2) * columns / len(places)) for i in range(len(places))]
        ideal = math.sqrt(k * rows / columns)  # square cells, where so many rows and columns are there
        assert abs(len(taken) - ideal) <= 0.5 or len(taken) in (1, rows, k, math.ceil(k / columns))


def test_a_quarter_of_a_square_grid_is_every_second_row_and_column():
    chosen = me.Uniform(keep=0.25).select(me.VisualTokens(torch.zeros(144, 1), grid=(12, 12)), 36).tolist()
    assert chosen == [12 * r + c for r in range(1, 12, 2) for c in range(1, 12, 2)]


# pool ----------------------------------------------------------------------------------------------------------------


def slow_pool(features: torch.Tensor, grid: tuple[int, int], h: int, w: int, mode: str) -> torch.Tensor:
    """Bin i of h covers the rows floor(i * rows / h) to ceil((i + 1) * rows / h), columns likewise."""
    rows, cols = grid
    plane = features.reshape(rows, cols, -1)
    out = []
    for i in range(h):
        for j in range(w):
            top, bottom = math.floor(Fraction(i * rows, h)), math.ceil(Fraction((i + 1) * rows, h))
            left, right = math.floor(Fraction(j * cols, w)), math.ceil(Fraction((j + 1) * cols, w))
            cells = [plane[y, x] for y in range(top, bottom) for x in range(left, right)]
            out.append(sum(cells) / len(cells) if mode == "avg" else torch.stack(cells).max(0).values)
    return torch.stack(out)


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("grid", [(5, 7), (7, 5), (9, 9), (1, 11), (13, 3), (6, 6)])
def test_pool_is_adaptive_pooling_by_the_slow_loop(grid, mode):
    v = visual_tokens(grid, dtype=torch.float64)
    for budget in range(1, len(v) + 1):
        method = me.Pool(tokens=budget, op=mode)
        out = method.compress(v, budget)
        assert out.indices is None and len(out) == method.count(len(v), grid)
        assert out.grid == fit_grid(grid, budget)
        expected = slow_pool(v.features, grid, *out.grid, mode)
        # 1e-14: float64, the order of a sum of values of about 1 is free.
        torch.testing.assert_close(out.features, expected, rtol=0, atol=1e-14 if mode == "avg" else 0)


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pool_keeps_the_dtype_and_at_full_size_the_values(mode, dtype):
    v = visual_tokens((3, 4), dtype=dtype)
    out = me.Pool(keep=1.0, op=mode).compress(v, 12)
    assert torch.equal(out.features, v.features) and out.features.dtype == dtype and out.grid == (3, 4)
    assert me.Pool(keep=0.5, op=mode).compress(v, me.Pool(keep=0.5).count(12, (3, 4))).features.dtype == dtype


def test_pool_keeps_a_square_count_on_a_square_grid():
    assert [me.Pool(tokens=k).count(576, (24, 24)) for k in (1, 4, 64, 144, 256, 576)] == [1, 4, 64, 144, 256, 576]


def test_pool_refuses_an_operation_that_does_not_exist():
    with pytest.raises(me.BadBudgetError, match="pool: op='mean' is not one of 'avg', 'max', 'gem', 'ggem'"):
        me.Pool(keep=0.5, op="mean")


# resize --------------------------------------------------------------------------------------------------------------


def round_half_up(x: Fraction) -> int:
    return math.floor(x + Fraction(1, 2))


def scaled(grid: tuple[int, int], scale: Fraction) -> tuple[int, int]:
    """The picture made smaller by ``scale``, no side below one token."""
    return max(1, round_half_up(grid[0] * scale)), max(1, round_half_up(grid[1] * scale))


def sizes(grid: tuple[int, int]) -> list[tuple[int, int]]:
    """All grids of the picture at scales up to 1, the larger the later: they change only where a side crosses a half."""
    crossings = {Fraction(2 * i + 1, 2 * side) for side in grid for i in range(side)} | {Fraction(1)}
    return [scaled(grid, Fraction(0)), *(scaled(grid, s) for s in sorted(crossings) if s <= 1)]


@given(st.tuples(st.integers(1, 40), st.integers(1, 40)), st.integers(1, 1600))
def test_resize_gives_at_most_k_tokens_of_the_same_picture(grid, k):
    h, w = me.Resize(keep=1.0).target(grid, k)
    assert h * w <= k
    assert (h, w) in sizes(grid), "both sides are those of one scale, so the aspect is kept"


@given(st.tuples(st.integers(1, 40), st.integers(1, 40)), st.integers(1, 1600))
def test_resize_takes_the_largest_such_picture(grid, k):
    assert me.Resize(keep=1.0).target(grid, k) == [size for size in sizes(grid) if size[0] * size[1] <= k][-1]


@given(st.tuples(st.integers(1, 40), st.integers(1, 40)), st.integers(1, 1600))
def test_resize_counts_the_cells_of_its_target(grid, k):
    n = grid[0] * grid[1]
    method = me.Resize(tokens=k)
    assert method.count(n, grid, fixed=False) == math.prod(method.target(grid, min(k, n)))


@given(st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_resize_with_every_token_leaves_the_picture_alone(grid):
    assert me.Resize(keep=1.0).target(grid, grid[0] * grid[1]) == grid


def test_resize_on_the_square_grid_of_llava_takes_the_largest_square():
    assert [me.Resize(tokens=k).target((24, 24), k) for k in (576, 575, 144, 64, 63, 1)] == [
        (24, 24), (23, 23), (12, 12), (8, 8), (7, 7), (1, 1)
    ]  # fmt: skip


@pytest.mark.parametrize("name", RESIZERS)
def test_a_resizer_never_enlarges(name):
    method = me.build({"method": name, "keep": 0.5})
    for grid in [(1, 1), (3, 7), (24, 24), (40, 2)]:
        for k in range(1, grid[0] * grid[1] + 1):
            h, w = method.target(grid, k)
            assert h * w <= k and 1 <= h <= grid[0] and 1 <= w <= grid[1]


# A third party's method ----------------------------------------------------------------------------------------------


def test_the_contracts_example_is_the_whole_of_a_new_method(registered):
    @registered("mine")
    @dataclasses.dataclass(frozen=True)
    class Mine(me.Selector):
        """Most attended tokens."""

        needs = {"attention"}  # noqa: RUF012  (a plain set, as a user writes it)

        def score(self, v):
            return v.attention

    assert "mine" in me.list_methods() and me.get_method("mine") is Mine and Mine.name == "mine"
    method = me.build("mine:tokens=3")
    v = me.VisualTokens(torch.zeros(6, 2), attention=torch.tensor([0.1, 0.5, 0.3, 0.5, 0.0, 0.3]))
    assert method.select(v).tolist() == [1, 2, 3], "the highest three, and of the two 0.3 the first"
    assert torch.equal(method.compress(v, 3).indices, torch.tensor([1, 2, 3]))
    assert hash(method) == hash(me.build(method.to_dict())) and me.build(method.spec()) == method
    assert not query_aware(Mine)


def test_needs_may_be_a_plain_set(registered):
    @registered("mine")
    @dataclasses.dataclass(frozen=True)
    class Mine(me.Selector):
        needs = {"clip_text", "grid"}  # noqa: RUF012
        clip: str = "somewhere"

    assert query_aware(Mine)
    family = Adapter(SimpleNamespace(config=None))
    family.gives = frozenset({"grid", "keys"})
    with pytest.raises(me.UnsupportedModelError, match="mine needs clip_text, which SimpleNamespace does not give"):
        check(family, me.build("mine:tokens=3"))
    family.gives = {"grid", "clip_text"}
    check(family, me.build("mine:tokens=3"))


def test_scores_tie_to_the_lowest_index_and_minus_infinity_is_last(registered):
    @registered("mine")
    @dataclasses.dataclass(frozen=True)
    class Mine(me.Selector):
        def score(self, v):
            return v.features[:, 0]

    features = torch.tensor([[-torch.inf], [0.0], [1.0], [0.0], [-torch.inf], [0.0]])
    kept = [me.build({"method": "mine", "tokens": k}).select(features).tolist() for k in range(1, 7)]
    assert kept == [[2], [1, 2], [1, 2, 3], [1, 2, 3, 5], [0, 1, 2, 3, 5], [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("scores", [torch.zeros(5), torch.zeros(7), torch.zeros(6, 1), torch.zeros(())], ids=lambda s: str(tuple(s.shape)))
def test_scores_that_are_not_one_per_token_are_refused(registered, scores):
    @registered("mine")
    @dataclasses.dataclass(frozen=True)
    class Mine(me.Selector):
        def score(self, v):
            return scores

    with pytest.raises(me.CountMismatchError, match=r"mine: score gave .* for 6 tokens"):
        me.build("mine:tokens=3").select(torch.zeros(6, 2))


def test_a_nan_score_is_refused(registered):
    @registered("mine")
    @dataclasses.dataclass(frozen=True)
    class Mine(me.Selector):
        def score(self, v):
            return v.features.sum(1) / 0

    with pytest.raises(me.MllmEfficientError, match="mine: score gave NaN"):
        me.build("mine:tokens=3").select(torch.zeros(6, 2))


def test_select_may_return_any_order(registered):
    @registered("mine")
    @dataclasses.dataclass(frozen=True)
    class Mine(me.Selector):
        def select(self, v, k):
            return torch.arange(len(v)).flip(0)[:k]

    v = visual_tokens((2, 3))
    assert me.build("mine:tokens=3").select(v).tolist() == [3, 4, 5]
    assert me.build("mine:tokens=3").compress(v, 3).indices.tolist() == [3, 4, 5]


@pytest.mark.parametrize("decorate", [lambda f: f, torch.no_grad(), torch.inference_mode()], ids=["bare", "no_grad", "inference_mode"])
@pytest.mark.parametrize("more", [-1, 1])
def test_select_that_gives_another_count_is_refused(registered, decorate, more):
    @registered("mine")
    @dataclasses.dataclass(frozen=True)
    class Mine(me.Selector):
        @decorate
        def select(self, v, k):
            return torch.arange(k + more)

    with pytest.raises(me.CountMismatchError, match=f"mine: select gave .*{3 + more}.* where 3 were asked"):
        me.build("mine:tokens=3").select(visual_tokens((2, 3)), 3)
    with pytest.raises(me.CountMismatchError, match="where 3 were asked"):
        me.build("mine:tokens=3").compress(visual_tokens((2, 3)), 3)


@pytest.mark.parametrize("decorate", [torch.no_grad(), torch.inference_mode()], ids=["no_grad", "inference_mode"])
def test_a_decorated_select_is_called_like_any_other(registered, decorate):
    @registered("mine")
    @dataclasses.dataclass(frozen=True)
    class Mine(me.Selector):
        @decorate
        def select(self, v, k):
            return torch.arange(len(v)).flip(0)[:k]

    assert me.build("mine:tokens=3").select(torch.zeros(6, 2)).tolist() == [3, 4, 5]


def test_a_merger_that_gives_another_count_is_refused(registered):
    @registered("mine")
    @dataclasses.dataclass(frozen=True)
    class Mine(me.Merger):
        def merge(self, v, k):
            return me.CompressedTokens(v.features[: k + 1])

    with pytest.raises(me.CountMismatchError, match="mine: merge gave 4 tokens where 3 were asked"):
        me.build("mine:tokens=3").compress(visual_tokens((2, 3)), 3)
    with pytest.raises(me.MllmEfficientError, match="mine merges tokens"):
        me.build("mine:tokens=3,positions=keep")


@pytest.mark.parametrize("value", [True, 3, -0.25, 1e-07, "mean", None], ids=str)
def test_the_settings_of_a_new_method_survive_dict_and_specification(registered, value):
    @registered("mine")
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(me.Selector):
        knob: object = 2

    method = me.build({"method": "mine", "keep": 0.5, "knob": value})
    for again in (me.build(method.to_dict()), me.build(method.spec())):
        assert again == method and type(again.knob) is type(value)


def test_a_new_method_draws_from_its_own_seed(registered):
    @registered("mine")
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(me.Selector):
        seed: int = 0

        def score(self, v):
            return torch.rand(len(v), generator=v.generator)

    draws = [tuple(me.build({"method": "mine", "tokens": 64, "seed": seed}).select(torch.zeros(576, 1)).tolist()) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_numpy_numbers_of_a_sweep_are_fractions_too():
    assert me.DivPrune(keep=np.float64(0.5)).count(576, None) == 288


class Waits(TorchDispatchMode):
    """Counts what makes the CPU wait for a GPU: a number read out of a tensor, a size that depends on values, a copy to the CPU."""

    WAITING = ("_local_scalar_dense", "is_nonzero", "nonzero", "unique", "masked_select", "equal")

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name.startswith(self.WAITING):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_the_base_class_waits_for_nothing():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Longest(me.Selector):
        def score(self, v):
            return v.features.norm(dim=1)

    v = me.VisualTokens(torch.randn(30, 8, generator=torch.Generator().manual_seed(0)))
    with Watch() as watch, Waits() as waits:
        (out,) = Longest(tokens=7).compress_all([v], [7])
    assert waits.seen == []
    watch.read()
    assert out.indices.tolist() == sorted(v.features.norm(dim=1).topk(7).indices.tolist())
    with Waits() as waits, pytest.raises(RuntimeError):  # what is counted is what waits, and a list of values is refused here
        bool(v.features.sum() > 0)
        v.features.to("meta").tolist()
    assert waits.seen == ["_local_scalar_dense"]
    with Watch():
        (out,) = Longest(tokens=7).compress_all([me.VisualTokens(v.features.to("meta"))], [7])
    assert out.features.shape == (7, 8)


@pytest.mark.parametrize("index", [-1, 9])
def test_an_index_outside_is_said_after_the_one_wait(index):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Outside(me.Selector):
        def select(self, v, k):
            return torch.tensor([0, index])

    v = me.VisualTokens(torch.zeros(9, 2))
    with Watch() as watch:
        Outside(tokens=2).compress(v, 2)
    with pytest.raises(me.CountMismatchError, match=r"select gave an index outside 0\.\.8"):
        watch.read()
    with pytest.raises(me.CountMismatchError, match=r"select gave an index outside 0\.\.8"):
        Outside(tokens=2).select(v)


def test_a_subclass_shares_work_only_where_it_says_so():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Other(me.DivPrune):
        def select(self, v, k):
            return torch.arange(k)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Same(me.DivPrune):
        extra: int = 1

    assert me.DivPrune.shares_work and Same.shares_work and not Other.shares_work
