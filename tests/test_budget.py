"""How many tokens are kept: one rounding rule, and an error for every budget that cannot be honoured."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mllm_efficient as me
from mllm_efficient.budget import Budget, fit_grid

pytestmark = pytest.mark.once

settings.register_profile("patient", deadline=None)  # no test asserts a time
settings.load_profile("patient")

FRACTIONS = st.floats(min_value=0, max_value=1, exclude_min=True)


def refused(**budget) -> str:
    """The message of the error that these settings raise, as a budget and as a method's settings alike."""
    with pytest.raises(me.BadBudgetError) as by_budget:
        Budget(**budget)
    with pytest.raises(me.BadBudgetError) as by_method:
        me.DivPrune(**budget)
    assert str(by_budget.value) == str(by_method.value)
    assert "\n" not in str(by_budget.value)
    assert isinstance(by_budget.value, me.MllmEfficientError) and isinstance(by_budget.value, ValueError)
    return str(by_budget.value)


# Rounding ------------------------------------------------------------------------------------------------------------


def test_the_papers_budget_keeps_56_of_576_and_115_of_1152():
    assert Budget(keep=0.098).count(576) == 56
    assert Budget(keep=0.1).count(1152) == 115


@pytest.mark.parametrize(
    ("keep", "n", "k"),
    # A half goes to the even neighbour, as Python's round has it: 2.5 -> 2, 3.5 -> 4.
    [(0.5, 5, 2), (0.5, 7, 4), (0.5, 3, 2), (0.25, 6, 2), (0.25, 10, 2), (0.25, 14, 4), (0.75, 6, 4), (0.125, 20, 2), (0.125, 28, 4)],
)
def test_halves_round_to_even(keep, n, k):
    assert keep * n % 1 == 0.5
    assert Budget(keep=keep).count(n) == k


def test_at_least_one_token_is_kept():
    assert Budget(keep=0.001).count(576) == 1
    assert Budget(keep=0.5).count(1) == 1, "0.5 rounds to 0"
    assert Budget(prune=0.999).count(2) == 1


@given(FRACTIONS, st.integers(1, 10_000))
def test_a_fraction_keeps_its_rounded_share_between_1_and_n(keep, n):
    k = Budget(keep=keep).count(n)
    assert k == min(n, max(1, round(keep * n)))


@given(st.integers(1, 10_000))
def test_keep_1_and_prune_0_keep_everything(n):
    assert Budget(keep=1).count(n) == Budget(keep=1.0).count(n) == Budget(prune=0).count(n) == n


@given(FRACTIONS, st.integers(1, 5000), st.integers(1, 600), st.integers(1, 600))
def test_bounds_clamp_the_rounded_share(keep, n, a, b):
    low, high = sorted((a, b))
    k = Budget(keep=keep, min_tokens=low, max_tokens=high).count(n)
    assert k == max(1, min(n, max(low, min(high, round(keep * n)))))
    assert k <= n, "an image with fewer tokens than min_tokens keeps what it has"


def test_bounds_alone_or_equal_are_fine():
    assert Budget(keep=0.1, min_tokens=64).count(576) == 64
    assert Budget(keep=0.1, max_tokens=32).count(576) == 32
    assert Budget(keep=0.1, min_tokens=40, max_tokens=40).count(576) == 40
    assert Budget(keep=0.1, min_tokens=64).count(16) == 16
    assert Budget(prune=0.9, max_tokens=32).count(576) == 32


# prune ---------------------------------------------------------------------------------------------------------------


@given(st.floats(min_value=0, max_value=0.999), st.integers(1, 10_000))
def test_prune_counts_what_is_removed(prune, n):
    budget = Budget(prune=prune)
    assert budget.fraction == pytest.approx(1 - prune, abs=1e-12)  # rounded there, so that prune=0.9 is keep=0.1
    assert budget.count(n) == Budget(keep=round(1 - prune, 12)).count(n)


def test_prune_09_keeps_58_of_576_as_keep_01_does():
    assert Budget(prune=0.9).count(576) == Budget(keep=0.1).count(576) == 58
    assert all(Budget(prune=0.9).count(n) == Budget(keep=0.1).count(n) for n in range(1, 600))


@pytest.mark.parametrize("prune", [1, 1.0, 1.5, -0.1, float("nan"), float("inf"), True, "0.9"])
def test_prune_outside_0_to_1_is_refused(prune):
    assert "prune=" in refused(prune=prune)


# tokens --------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_tokens_are_kept_exactly_and_never_more_than_there_are(tokens, n):
    budget = Budget(tokens=tokens)
    assert budget.count(n, fixed=False) == min(tokens, n)
    if tokens <= n:
        assert budget.count(n) == tokens


def test_tokens_above_n_raise_where_every_image_has_n():
    with pytest.raises(me.BadBudgetError, match="tokens=577 is more than the 576 an image has: use at most 576"):
        Budget(tokens=577).count(576)
    with pytest.raises(me.BadBudgetError, match="tokens=577 is more than the 576 an image has: use at most 576"):
        me.DivPrune(tokens=577).count(576, (24, 24))


def test_tokens_above_n_keep_all_where_images_differ():
    assert Budget(tokens=577).count(576, fixed=False) == 576
    assert me.DivPrune(tokens=577).count(576, (24, 24), fixed=False) == 576


@pytest.mark.parametrize("n", [0, -1])
def test_an_image_without_tokens_is_refused(n):
    for budget in (Budget(keep=0.5), Budget(tokens=1), Budget(prune=0.5)):
        with pytest.raises(me.BadBudgetError, match="visual tokens"):
            budget.count(n)


# What is refused -----------------------------------------------------------------------------------------------------


def test_no_budget_is_refused():
    assert "exactly one of keep=0.1, tokens=64 or prune=0.9" in refused()
    assert "exactly one" in refused(min_tokens=4)


@pytest.mark.parametrize(
    "two",
    [{"keep": 0.5, "tokens": 4}, {"keep": 0.5, "prune": 0.5}, {"tokens": 4, "prune": 0.5}, {"keep": 0.5, "tokens": 4, "prune": 0.5}],
    ids=" and ".join,
)
def test_two_of_the_three_are_refused_by_name(two):
    message = refused(**two)
    assert " and ".join(two) in message and "exactly one" in message


@pytest.mark.parametrize(
    "keep",
    [0, 0.0, -0.1, 1.5, 2, 1.0000001, float("nan"), float("inf"), float("-inf"), True, False, "0.1", [0.1], 0.5 + 0j, 10**400],
    ids=lambda keep: str(keep)[:10],
)
def test_keep_outside_0_to_1_is_refused(keep):
    assert "keep=" in refused(keep=keep)


@pytest.mark.parametrize("tokens", [0, -3, 2.5, 2.0, float("nan"), True, False, "64", [64]])
def test_tokens_that_are_no_count_are_refused(tokens):
    assert f"tokens={tokens!r}" in refused(tokens=tokens)


@pytest.mark.parametrize("bound", ["min_tokens", "max_tokens"])
@pytest.mark.parametrize("value", [0, -1, 2.5, 2.0, float("nan"), True, "2"])
def test_bounds_that_are_no_count_are_refused(bound, value):
    assert f"{bound}={value!r}" in refused(keep=0.5, **{bound: value})


@pytest.mark.parametrize("bounds", [{"min_tokens": 1}, {"max_tokens": 9}, {"min_tokens": 1, "max_tokens": 9}])
def test_bounds_with_tokens_have_no_effect_and_are_refused(bounds):
    assert "no effect with tokens=" in refused(tokens=4, **bounds)


def test_bounds_that_cross_are_refused():
    assert refused(keep=0.5, min_tokens=9, max_tokens=8) == "min_tokens=9 is above max_tokens=8"


@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers()), st.complex_numbers()))
def test_whatever_is_given_is_honoured_or_refused(value):
    """No other exception leaves the class, and what is accepted is in range."""
    for name in ("keep", "tokens", "prune"):
        try:
            budget = Budget(**{name: value})
        except me.BadBudgetError:
            continue
        assert not isinstance(value, bool) and 1 <= budget.count(100, fixed=False) <= 100


def test_a_budget_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Budget(keep=0.5).keep = 0.1


# The smaller grid ----------------------------------------------------------------------------------------------------

GRIDS = st.tuples(st.integers(1, 40), st.integers(1, 40))


def grows(grid: tuple[int, int], h: int, w: int, k: int) -> bool:
    """Whether a row or a column could be added to h x w within k cells and the grid."""
    return (h < grid[0] and (h + 1) * w <= k) or (w < grid[1] and h * (w + 1) <= k)


@given(GRIDS, st.integers(1, 1600))
def test_fit_grid_is_within_the_budget_and_the_grid_and_cannot_grow(grid, k):
    h, w = fit_grid(grid, k)
    assert h * w <= k
    assert 1 <= h <= grid[0] and 1 <= w <= grid[1]
    assert not grows(grid, h, w, k)


def rank(grid: tuple[int, int], h: int, w: int) -> tuple[Fraction, int, int]:
    """Nearest aspect first, then most cells, then widest; in whole numbers, so that 7 x 9 and 9 x 7 tie on a square grid."""
    aspect = Fraction(w * grid[0], h * grid[1])
    return max(aspect, 1 / aspect), -h * w, -w


@given(GRIDS, st.integers(1, 1600))
def test_fit_grid_is_the_nearest_aspect_of_all_that_cannot_grow(grid, k):
    every = [(h, w) for h in range(1, grid[0] + 1) for w in range(1, grid[1] + 1) if h * w <= k and not grows(grid, h, w, k)]
    h, w = fit_grid(grid, k)
    assert rank(grid, h, w)[0] == min(rank(grid, *other)[0] for other in every)


@given(GRIDS, st.integers(1, 1600))
def test_of_equally_near_aspects_the_larger_wins_then_the_wider(grid, k):
    every = [(h, w) for h in range(1, grid[0] + 1) for w in range(1, grid[1] + 1) if h * w <= k and not grows(grid, h, w, k)]
    assert fit_grid(grid, k) == min(every, key=lambda other: rank(grid, *other))


@given(st.integers(1, 40), st.data())
def test_a_square_count_on_a_square_grid_is_exact(side, data):
    root = data.draw(st.integers(1, side))
    assert fit_grid((side, side), root * root) == (root, root)


@given(GRIDS, st.integers(0, 100))
def test_all_tokens_keep_the_grid(grid, more):
    assert fit_grid(grid, grid[0] * grid[1] + more) == grid


@given(GRIDS)
def test_one_token_is_a_grid_of_one_cell(grid):
    assert fit_grid(grid, 1) == (1, 1)


@pytest.mark.parametrize(
    ("grid", "k", "fit"),
    [
        ((24, 24), 144, (12, 12)),
        ((24, 24), 64, (8, 8)),
        ((24, 24), 63, (7, 9)),  # 7 x 9 = 63 and 9 x 7; not 7 x 7, which two columns can join
        ((12, 12), 18, (4, 4)),
        ((12, 24), 72, (6, 12)),
        ((24, 12), 72, (12, 6)),
        ((1, 24), 5, (1, 5)),
    ],
)
def test_fit_grid_cases_by_hand(grid, k, fit):
    assert fit_grid(grid, k) == fit
