"""The rules of uniform, pool and resize, and what a third party's method is held to."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import mllm_efficient as me
from mllm_efficient.apply.prepare import check
from mllm_efficient.budget import fit_grid
from mllm_efficient.compressors.base import query_aware
from mllm_efficient.compressors.math.finite import Watch
from mllm_efficient.patches.base import Adapter

from .test_methods import (
    RESIZERS,
    visual_tokens,
)

pytestmark = pytest.mark.once


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
    family = Adapter(SimpleNamespace(config=None, get_decoder=lambda: SimpleNamespace(layers=[None])))
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
