"""DivPrune picks what the paper's rule picks (arXiv 2503.02175, section 3; reference/papers.md 1.1)."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mllm_efficient as me
from mllm_efficient.compressors import divprune
from mllm_efficient.compressors.divprune import distances, farthest_first

pytestmark = pytest.mark.once

settings.register_profile("patient", deadline=None)  # no test asserts a time
settings.load_profile("patient")

METRICS = ("cosine", "l2", "l1")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HUGE = {torch.float64: 1e300, torch.float32: 1e30, torch.bfloat16: 3e38, torch.float16: 6e4}


def paper_rule(d: np.ndarray, k: int) -> list[int]:
    """K tokens in the order of choice, by the paper's words over a distance matrix (N, N); slow and obvious.

    First the token whose nearest other token is farthest. Then, again and again, the token not chosen yet whose
    nearest chosen token is farthest. Only a strictly larger distance replaces a candidate: ties go to the lowest index.
    """
    n = len(d)
    rows = d.tolist()
    first, farthest = 0, -np.inf
    for i in range(n):
        nearest = min((rows[i][j] for j in range(n) if j != i), default=0.0)
        if nearest > farthest:
            first, farthest = i, nearest
    chosen, left = [first], [i for i in range(n) if i != first]
    while len(chosen) < k:
        to_chosen = d[chosen].min(axis=0).tolist()
        best, farthest = -1, -np.inf
        for i in left:
            if to_chosen[i] > farthest:
                best, farthest = i, to_chosen[i]
        chosen.append(best)
        left.remove(best)
    return chosen


def plain_cosine(x: torch.Tensor) -> np.ndarray:
    """``1 - x.y / (|x||y|)`` in the tensor's own dtype, so that its rounding is the library's; zero rows at 1."""
    norm = x.norm(dim=1)
    d = 1 - (x @ x.T) / (norm[:, None] * norm[None, :])
    return torch.where(d.isnan(), torch.ones_like(d), d).numpy()


def numpy_distances(x: np.ndarray, metric: str) -> np.ndarray:
    """The distances in float64, one row at a time; nothing shared with the library, not even torch."""
    x = x.astype(np.float64)
    d = np.empty((len(x), len(x)))
    for i, row in enumerate(x):
        if metric == "l1":
            d[i] = np.abs(x - row).sum(axis=1)
        elif metric == "l2":
            d[i] = np.sqrt(((x - row) ** 2).sum(axis=1))
        else:
            d[i] = 1 - (x * row).sum(axis=1) / (np.sqrt((x * x).sum(axis=1)) * np.sqrt((row * row).sum()))
    return d


def closest_pair(d: np.ndarray, chosen: list[int]) -> float:
    """The objective of max-min diversity: the smallest distance within the chosen set."""
    within = d[np.ix_(chosen, chosen)].copy()
    np.fill_diagonal(within, np.inf)
    return float(within.min())


def shortfall(d: np.ndarray, chosen: list[int]) -> float:
    """By how much, at worst, a pick was nearer to those before it than the farthest token then left."""
    other = d.copy()
    np.fill_diagonal(other, np.inf)
    nearest = other.min(axis=1)
    worst = nearest.max() - nearest[chosen[0]]
    to_chosen = other[chosen[0]].copy()
    to_chosen[chosen[0]] = -np.inf
    for pick in chosen[1:]:
        worst = max(worst, to_chosen.max() - to_chosen[pick])
        to_chosen = np.minimum(to_chosen, other[pick])
        to_chosen[pick] = -np.inf
    return float(worst)


def size_of(case: int, rng: np.random.Generator) -> tuple[int, int, int]:
    """(N, K, D): most cases small, one in ten up to 256 tokens, one in fifty up to 1024, K from one token to all."""
    n = int(rng.integers(513, 1025)) if case % 50 == 7 else int(rng.integers(2, 257 if case % 10 == 3 else 49))
    k = (1, n, int(rng.integers(1, n + 1)), int(rng.integers(1, n + 1)))[case % 4]
    return n, k, int(rng.integers(1, 65))


def random_case(case: int) -> tuple[torch.Tensor, int]:
    rng = np.random.default_rng([1, case])
    n, k, width = size_of(case, rng)
    return torch.from_numpy(rng.standard_normal((n, width), dtype=np.float32)), k


def tied_case(case: int) -> tuple[torch.Tensor, int]:
    """Integers of -2..2, so that sums are exact and equal distances are equal to the last bit; rows drawn with
    repetition, so that many are duplicates; sometimes whole rows of zero."""
    rng = np.random.default_rng([2, case])
    n, k, _ = size_of(case, rng)
    rows = rng.integers(-2, 3, (max(1, n // 2), int(rng.integers(1, 5))))
    return torch.from_numpy(rows[rng.integers(0, len(rows), n)].astype(np.float64)), k


def picked(x: torch.Tensor, k: int, metric: str = "cosine") -> list[int]:
    return me.DivPrune(tokens=k, metric=metric, order="picked").select(x).tolist()


# The rule ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", range(10))
def test_selection_is_the_papers_rule_on_500_random_cases(block):
    for case in range(50 * block, 50 * block + 50):
        x, k = random_case(case)
        expected = paper_rule(plain_cosine(x), k)
        assert picked(x, k) == expected, f"case {case}"
        assert me.DivPrune(tokens=k).select(x).tolist() == sorted(expected), f"case {case}"


@pytest.mark.parametrize("block", range(4))
def test_selection_is_the_papers_rule_where_distances_tie(block):
    for case in range(50 * block, 50 * block + 50):
        x, k = tied_case(case)
        expected = paper_rule(plain_cosine(x), k)
        assert picked(x, k) == expected, f"case {case}"
        assert me.DivPrune(tokens=k).select(x).tolist() == sorted(expected), f"case {case}"


def test_taking_the_highest_index_would_change_most_tied_cases():
    """Else the test above would prove nothing about the lowest."""
    changed = 0
    for case in range(100):
        x, k = tied_case(case)
        d = plain_cosine(x)
        changed += [len(x) - 1 - i for i in paper_rule(d[::-1, ::-1], k)] != paper_rule(d, k)
    assert changed > 75


@pytest.mark.parametrize("block", range(10))
def test_every_pick_is_a_farthest_token_in_float64(block):
    """Whatever way float32 distances are rounded, no pick may be off by more than that rounding.

    1e-5: a float32 dot product of 64 terms is off by some 1e-6 of |x||y|, so a distance too.
    """
    for case in range(50 * block, 50 * block + 50):
        x, k = random_case(case)
        assert shortfall(numpy_distances(x.numpy(), "cosine"), picked(x, k)) < 1e-5, f"case {case}"


@pytest.mark.parametrize("block", range(10))
def test_max_min_distance_is_that_of_an_independent_float64_selection(block):
    """1e-5 as above: both selections are measured in float64, and float32 can only have swapped near-equal tokens."""
    for case in range(50 * block, 50 * block + 50):
        x, k = random_case(case)
        if k == 1:
            continue
        d = numpy_distances(x.numpy(), "cosine")
        assert closest_pair(d, picked(x, k)) == pytest.approx(closest_pair(d, paper_rule(d, k)), abs=1e-5), f"case {case}"


def test_a_case_by_hand():
    # Angles 0, 90, 180 and 45 degrees; distance = 1 - cos of the angle between.
    #           t0     t1     t2     t3
    #     t0     -     1      2      0.293    nearest other 0.293
    #     t1     1     -      1      0.293                  0.293
    #     t2     2     1      -      1.707                  1       <- farthest: t2 is first
    #     t3    0.293  0.293  1.707   -                     0.293
    # chosen t2:         t0 2,  t1 1,  t3 1.707               -> t0
    # chosen t2, t0:     t1 min(1, 1) = 1,  t3 min(1.707, 0.293) -> t1
    # chosen t2, t0, t1: t3
    x = torch.tensor([[3.0, 0.0], [0.0, 0.5], [-1.0, 0.0], [2.0, 2.0]])
    assert picked(x, 4) == [2, 0, 1, 3]
    assert [me.DivPrune(tokens=k).select(x).tolist() for k in (1, 2, 3, 4)] == [[2], [0, 2], [0, 1, 2], [0, 1, 2, 3]]


def test_ties_take_the_lowest_index_and_duplicates_give_different_indices():
    # t0 = t1 and t2 = t3, opposite: every nearest other is at 0 -> t0; t2 and t3 both at 2 -> t2; t1 and t3 at 0 -> t1.
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
    assert picked(x, 4) == [0, 2, 1, 3]


def test_a_zero_row_is_at_distance_1_from_everything():
    # Not from itself alone: another zero row is at 1 too, an opposite direction is farther, an equal one nearer.
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
    off_diagonal = ~torch.eye(5, dtype=torch.bool)
    for row in (1, 3):
        assert (distances(x)[row][off_diagonal[row]] == 1).all()
        assert (distances(x)[:, row][off_diagonal[:, row]] == 1).all()
    # Nearest other: t0 0 (t4), t1 1, t2 1, t3 1, t4 0 -> t1; all are then at 1 -> t0; then t2 min(1, 2) and t3 min(1, 1),
    # t4 0 -> t2; then t3.
    assert picked(x, 5) == [1, 0, 2, 3, 4]


def test_all_zero_rows_are_picked_from_the_front():
    assert picked(torch.zeros(6, 3), 4) == [0, 1, 2, 3]


@given(st.integers(2, 30), st.integers(1, 6), st.integers(0, 2**32 - 1), st.data())
def test_zero_rows_among_others_follow_the_rule(n, width, seed, data):
    x = torch.from_numpy(np.random.default_rng(seed).integers(-3, 4, (n, width)).astype(np.float64))
    x[data.draw(st.lists(st.integers(0, n - 1), min_size=1), label="zero rows")] = 0
    assert picked(x, n) == paper_rule(plain_cosine(x), n)


# The other metrics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["l1", "l2"])
def test_l1_and_l2_selections_are_those_of_numpy_distances(metric):
    for case in range(100):
        x, k = random_case(case)
        x = x.double()  # float64 of random values: two ways of summing differ by 1e-15, and no two distances are that near
        assert picked(x, k, metric) == paper_rule(numpy_distances(x.numpy(), metric), k), f"case {case}"


@pytest.mark.parametrize("metric", ["l1", "l2"])
def test_l1_and_l2_ties_take_the_lowest_index(metric):
    for case in range(100):
        x, k = tied_case(case)  # whole numbers: the distances are exact whatever the order of summation
        assert picked(x, k, metric) == paper_rule(numpy_distances(x.numpy(), metric), k), f"case {case}"


@pytest.mark.parametrize("metric", ["l1", "l2"])
def test_l1_and_l2_in_float32_pick_farthest_tokens(metric):
    """1e-5 of the largest distance: float32 rounding of a sum of up to 64 terms."""
    for case in range(100):
        x, k = random_case(case)
        d = numpy_distances(x.numpy(), metric)
        assert shortfall(d, picked(x, k, metric)) <= 1e-5 * d.max(), f"case {case}"


@pytest.mark.parametrize("metric", METRICS)
def test_distances_are_those_of_numpy(metric):
    x = random_case(7)[0].double()
    # 1e-12: float64 sums of 64 terms in another order.
    np.testing.assert_allclose(distances(x, metric).numpy(), numpy_distances(x.numpy(), metric), rtol=1e-12, atol=1e-12)


# Order, dtype, autocast ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
def test_picked_order_sorted_is_raster_order(metric):
    for case in range(40):
        x, k = random_case(case)
        assert sorted(picked(x, k, metric)) == me.DivPrune(tokens=k, metric=metric).select(x).tolist()


def test_fewer_tokens_are_the_first_picks_of_more():
    x, _ = random_case(3)
    everything = picked(x, len(x))
    assert all(picked(x, k) == everything[:k] for k in range(1, len(x) + 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("metric", METRICS)
def test_half_precision_selects_as_float32_of_the_same_values(metric, dtype):
    for case in range(40):
        x, k = random_case(case)
        x = x.to(dtype)
        assert picked(x, k, metric) == picked(x.float(), k, metric), f"case {case}"


@pytest.mark.parametrize("metric", METRICS)
def test_distances_are_float32_at_least(metric):
    for dtype in DTYPES:
        x = torch.eye(3, dtype=dtype)
        assert distances(x, metric).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("metric", METRICS)
def test_autocast_does_not_change_the_selection(metric, dtype):
    x = random_case(3)[0].to(dtype)
    expected = picked(x, len(x), metric)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x.T).dtype == torch.bfloat16, "autocast is on: a bare product would be rounded to 8 bits"
        assert picked(x, len(x), metric) == expected


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_float32_matmul_precision_does_not_change_the_selection(precision):
    """'medium' lets CPUs with bfloat16 units multiply float32 matrices in bfloat16."""
    x = random_case(7)[0]
    expected = picked(x, 64)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert picked(x, 64) == expected
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_change_the_selection(default):
    x = random_case(3)[0] * 1e30
    expected = picked(x, len(x))
    torch.set_default_dtype(default)
    try:
        assert picked(x, len(x)) == expected
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float16, 2.0**-10), (torch.bfloat16, 2.0**126), (torch.float32, 2.0**-126), (torch.float32, 2.0**125)]
    + [(torch.float64, s) for s in (2.0**-300, 2.0**300, 2.0**-990, 2.0**1000)],
)
def test_cosine_does_not_see_the_length_of_a_row(dtype, scale):
    """Scaling by a power of two is exact, so the distances are equal to the bit; squares must neither overflow nor vanish."""
    x = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 1.0], [-1.0, 0.25, 0.0], [1.5, 1.0, 1.0]], dtype=dtype)
    for rows in ([0], [1, 3], [0, 1, 2, 3]):
        scaled = x.clone()
        scaled[rows] *= scale
        assert torch.equal(distances(scaled), distances(x)), f"rows {rows}"


# What is refused, and what is left alone -----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
def test_nan_and_infinity_raise(metric, dtype, bad):
    x = torch.ones(5, 3, dtype=dtype)
    x[4, 1] = bad
    with pytest.raises(me.MllmEfficientError, match="NaN or infinity"):
        me.DivPrune(tokens=2, metric=metric).select(x)


def test_a_metric_or_an_order_that_does_not_exist_raises():
    with pytest.raises(me.MllmEfficientError, match=r"metric='cos' is not one of .*cosine"):
        me.DivPrune(keep=0.1, metric="cos")
    with pytest.raises(me.MllmEfficientError, match=r"order='sorted' is not one of .*raster"):
        me.DivPrune(keep=0.1, order="sorted")
    with pytest.raises(me.MllmEfficientError, match="positions='keep' has no meaning"):
        me.DivPrune(keep=0.1, order="picked", positions="keep")


def test_picked_order_at_full_length_is_no_identity():
    assert me.DivPrune(keep=1.0).full_is_identity
    assert not me.DivPrune(keep=1.0, order="picked").full_is_identity


@pytest.mark.parametrize("metric", METRICS)
def test_selecting_changes_no_feature_and_follows_no_gradient(metric):
    x = random_case(1)[0].requires_grad_()
    before = x.detach().clone()
    indices = me.DivPrune(keep=0.5, metric=metric).select(x)
    assert torch.equal(x, before) and not indices.requires_grad
    kept = me.DivPrune(keep=0.5, metric=metric).compress(me.VisualTokens(x), len(indices)).features
    kept.sum().backward()
    assert x.grad.sum(1).nonzero().flatten().tolist() == indices.tolist()


# Several images -------------------------------------------------------------------------------------------------------


def several() -> tuple[list[me.VisualTokens], list[int]]:
    """Nine images of three sizes, of which two differ in K or dtype alone, in turn; with duplicates and zero rows."""
    rng = np.random.default_rng(0)
    kinds = ((30, torch.float32, 7), (30, torch.float32, 8), (17, torch.float64, 17)) * 3
    rows = [rng.integers(-2, 3, (n, 4)).astype(np.float64) for n, _, _ in kinds]
    return [me.VisualTokens(torch.from_numpy(r).to(dtype)) for r, (_, dtype, _) in zip(rows, kinds)], [k for _, _, k in kinds]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("order", ["raster", "picked"])
@pytest.mark.parametrize("together", [2**26, 2 * 30**2, 1])
def test_images_chosen_together_are_those_chosen_alone(monkeypatch, metric, order, together):
    """What a GPU does, here on the CPU. Whole numbers: the distances are exact whoever shares the product."""
    shapes = []
    monkeypatch.setattr("mllm_efficient.compressors.sharing.TOGETHER", together)
    monkeypatch.setattr(divprune, "distances", lambda x, *how: shapes.append(tuple(x.shape)) or distances(x, *how))
    method, (parts, ks) = me.DivPrune(keep=0.5, metric=metric, order=order), several()
    done = method.compress_alike(parts, ks)
    sizes = {2**26: (3, 3, 3), 2 * 30**2: (2, 1, 2, 1, 3), 1: (1,) * 9}[together]
    assert [s[0] for s in shapes] == list(sizes), "every product is of as many images as may be together"
    for v, k, out in zip(parts, ks, done):
        alone = method.compress(v, k)
        assert torch.equal(out.indices, alone.indices) and torch.equal(out.features, alone.features)


def test_one_bad_image_among_several_raises():
    parts, ks = several()
    parts[3].features[2, 1] = float("nan")
    with pytest.raises(me.MllmEfficientError, match="NaN or infinity"):
        me.DivPrune(keep=0.5).compress_alike(parts, ks)
    with pytest.raises(me.BadBudgetError, match="31 of 30 tokens cannot be kept"):
        me.DivPrune(keep=0.5).compress_alike(parts[:1], [31])


def test_a_batch_with_a_zero_row_scales_only_what_it_must():
    x = torch.from_numpy(np.random.default_rng(1).integers(-3, 4, (3, 20, 5)).astype(np.float64))
    x[1, 4], x[2, 7] = 0, x[2, 7] * 2.0**600
    assert torch.equal(distances(x), torch.stack([distances(image) for image in x]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("odd", ["nothing", "zero row", "huge row", "all zero"])
def test_half_precision_multiplied_as_it_is_gives_the_distances_of_float32(monkeypatch, dtype, odd):
    """As on a GPU, with the product in float32 behind it. Of rows that are longer than usual none is multiplied so."""
    x = torch.from_numpy(np.random.default_rng(2).integers(-3, 4, (2, 20, 5))).to(dtype)
    if odd != "nothing":
        x[1, 3 if odd != "all zero" else slice(None)] = HUGE[dtype] if odd == "huge row" else 0
    expected, multiplied = distances(x), []
    monkeypatch.setattr(divprune, "mixed_precision", lambda t: t.dtype == dtype)
    monkeypatch.setattr(divprune, "products", lambda t: multiplied.append(t.dtype) or t.float() @ t.float().mT)
    assert torch.equal(distances(x), expected)
    usual = odd == "nothing" or (odd == "huge row" and dtype == torch.float16)
    assert multiplied == [dtype if usual else torch.float32]


def test_a_subclass_that_selects_otherwise_is_asked_on_a_gpu_too(monkeypatch):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class First(me.DivPrune):
        def select(self, v, k):
            return torch.arange(k)

    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    (out,) = First(tokens=3).compress_all([me.VisualTokens(random_case(3)[0])], [3])
    assert out.indices.tolist() == [0, 1, 2]


# The kernel -----------------------------------------------------------------------------------------------------------

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed; it has wheels for Linux")


@needs_triton
@pytest.mark.parametrize("where", ["interpreter", "gpu"])
def test_the_fused_kernel_picks_what_the_loop_picks(where):
    """``triton_divprune.py``, in a process of its own: Triton reads the variable when it is imported."""
    if where == "gpu" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    env = {**os.environ, "TRITON_INTERPRET": "1" if where == "interpreter" else "0"}
    file = Path(__file__).parent.parent / "triton_divprune.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=env, cwd=file.parent.parent, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


@needs_triton
@pytest.mark.parametrize("capability", [75, 80, 90, 100])
def test_the_fused_kernel_compiles_for_gpus(capability, tmp_path, monkeypatch):
    """From types to machine code, which the interpreter does not look at; no GPU is needed for that."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mllm_efficient.compressors.math.farthest_triton import _pick

    for number in ("fp32", "fp64"):
        types = {"d": f"*{number}", "nearest_other": f"*{number}", "picked": "*i64", "n": "i32", "k": "i32", "block": "constexpr"}
        compiled = triton.compile(ASTSource(_pick, types, {"block": 1024}), target=GPUTarget("cuda", capability, 32))
        assert compiled.asm["cubin"]


def test_without_triton_the_loop_runs_and_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "mllm_efficient.compressors.math.farthest_triton", None)
    monkeypatch.setattr(divprune, "fused", divprune.fused.__wrapped__)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    x = random_case(3)[0]
    with pytest.warns(UserWarning, match="slower loop on cpu"):
        chosen = farthest_first(distances(x), 5)
    assert chosen.tolist() == paper_rule(plain_cosine(x), 5)


# Properties ----------------------------------------------------------------------------------------------------------


@st.composite
def awkward_features(draw) -> torch.Tensor:
    """(N, D) with what breaks selections: duplicates, constant rows, zero rows, nothing but zeros, one huge row."""
    n, width = draw(st.integers(1, 40)), draw(st.integers(1, 8))
    dtype = draw(st.sampled_from(DTYPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = torch.from_numpy(rng.standard_normal((n, width))).to(dtype)
    kind = draw(st.sampled_from(["random", "duplicates", "constant", "zero rows", "all zero", "huge", "huge and zero"]))
    if kind == "duplicates":
        x = x[torch.from_numpy(rng.integers(0, max(1, n // 4), n))]
    elif kind == "constant":
        x = torch.full_like(x, draw(st.sampled_from([1.0, -0.1, 1e-7])))
    elif kind == "zero rows":
        x[torch.from_numpy(rng.random(n) < 0.5)] = 0
    elif kind == "all zero":
        x = torch.zeros_like(x)
    elif kind.startswith("huge"):
        if kind.endswith("zero"):
            x = torch.zeros_like(x)
        x[int(rng.integers(n))] = HUGE[dtype]
    assert x.isfinite().all()
    return x


@settings(max_examples=400)
@given(x=awkward_features(), metric=st.sampled_from(METRICS), data=st.data())
def test_exactly_k_unique_ascending_indices(x, metric, data):
    k = data.draw(st.integers(1, len(x)), label="k")
    indices = me.DivPrune(tokens=k, metric=metric).select(x)
    assert indices.dtype == torch.long and indices.shape == (k,)
    assert (indices[1:] > indices[:-1]).all()
    assert indices.min() >= 0 and indices.max() < len(x)
    assert sorted(picked(x, k, metric)) == indices.tolist()


@given(x=awkward_features())
def test_cosine_distances_are_finite_and_within_0_and_2(x):
    d = distances(x)
    assert d.isfinite().all()
    assert (d > -1e-5).all() and (d < 2 + 1e-5).all(), "float32 rounding of a cosine, no more"


@given(x=awkward_features())
def test_keeping_all_is_every_index(x):
    assert me.DivPrune(keep=1.0).select(x).tolist() == list(range(len(x)))


def test_one_token_is_kept_whatever_it_is():
    for row in ([0.0, 0.0], [1.0, 2.0], [3e38, -3e38]):
        for metric in METRICS:
            assert picked(torch.tensor([row]), 1, metric) == [0]
