"""DivPrune's fused kernel picks, index for index, what the loop in torch picks.

Not collected with the other tests: ``test_divprune.py`` runs this file in a process of its own, where Triton interprets
its kernels on the CPU (TRITON_INTERPRET=1, set before Triton is imported), and once more on the GPU if there is one.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

import mllm_efficient as me
from mllm_efficient.compressors import divprune
from mllm_efficient.compressors.divprune import distances, loop
from mllm_efficient.compressors.math.farthest_triton import farthest_first

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


def features(case: int, *, tied: bool) -> tuple[torch.Tensor, int]:
    """(B, N, D), K: random ones; or float64 whole numbers of -2..2, which tie exactly, many rows double, some all zero."""
    rng = np.random.default_rng([case, tied])
    batch, n, width = (int(rng.integers(1, high)) for high in (4, 150, 20))
    k = (1, n, int(rng.integers(1, n + 1)))[case % 3]
    if not tied:
        return torch.from_numpy(rng.standard_normal((batch, n, width), dtype=np.float32)), k
    rows = rng.integers(-2, 3, (max(1, n // 2), 1 + width % 4))
    return torch.from_numpy(rows[rng.integers(0, len(rows), (batch, n))].astype(np.float64)), k


def same(x: torch.Tensor, k: int, metric: str = "cosine") -> None:
    d = distances(x.to(DEVICE), metric)
    expected = torch.stack([loop(image.clone(), k) for image in d])
    picked = farthest_first(d, k)
    assert picked.dtype == torch.long and torch.equal(picked, expected)
    assert all(len(image.unique()) == k for image in picked)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("block", range(4))
def test_picks_are_those_of_the_loop(block, tied):
    for case in range(9 * block, 9 * block + 9):
        same(*features(case, tied=tied))


@pytest.mark.parametrize("n", [1, 2, 3, 63, 64, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("metric", ["cosine", "l2", "l1"])
def test_sizes_around_a_power_of_two(n, dtype, metric):
    x = torch.randn(2, n, 5, generator=torch.Generator().manual_seed(n)).to(dtype)
    for k in {1, (n + 1) // 2, n}:
        same(x, k, metric)


@pytest.mark.parametrize(("batch", "n", "k"), [(2, 576, 57), (1, 2880, 282)])
def test_the_sizes_of_llava(batch, n, k):
    k = k if DEVICE == "cuda" else k // 8  # interpreted, every token that is picked costs as much as the first
    same(torch.randn(batch, n, 32, generator=torch.Generator().manual_seed(n)), k)


@pytest.mark.parametrize("row", [[0.0, 0.0, 0.0], [1.0, -2.0, 0.5]])
def test_rows_that_are_all_alike_are_picked_from_the_front(row):
    d = distances(torch.tensor(row, dtype=torch.float64, device=DEVICE).expand(1, 50, 3))
    assert farthest_first(d, 30).tolist() == [list(range(30))]


@pytest.mark.skipif(DEVICE == "cuda", reason="the tests below are this one on a real GPU")
def test_one_image_and_several_go_through_the_kernel_where_tensors_say_they_are_on_a_gpu(monkeypatch):
    x, k = features(4, tied=True)
    method, used = me.DivPrune(tokens=k, order="picked"), []
    expected = [method.select(image).tolist() for image in x]
    monkeypatch.setattr(
        "mllm_efficient.compressors.math.farthest_triton.farthest_first", lambda d, k: used.append(d) or farthest_first(d, k)
    )
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert [method.select(image).tolist() for image in x] == expected
    done = method.compress_all([me.VisualTokens(image) for image in x], [k] * len(x))
    assert [out.indices.tolist() for out in done] == expected
    assert [len(d) for d in used] == [1, *[1] * len(x), len(x)], "one trial, one for each image, one for all"


@on_a_gpu
def test_the_gpu_uses_the_kernel():
    assert divprune.fused(torch.zeros(1, device=DEVICE).device) is farthest_first


@on_a_gpu
@pytest.mark.parametrize("order", ["raster", "picked"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_batch_on_the_gpu_selects_what_every_image_selects_on_the_cpu(dtype, order):
    """Whole numbers: every product and sum is exact, so that all devices have the same distances to the bit."""
    method = me.DivPrune(keep=0.25, order=order)
    x = [features(3 * i, tied=True)[0][0].to(dtype) for i in range(4)]
    x = [image for image in x for _ in range(3)]
    ks = [max(1, len(image) // 4) for image in x]
    done = method.compress_all([me.VisualTokens(image.to(DEVICE)) for image in x], ks)
    for image, k, out in zip(x, ks, done):
        assert torch.equal(out.indices.cpu(), method.select(image, k))
        assert torch.equal(out.features.cpu(), image[out.indices.cpu()])


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_added_up_in_float32(dtype):
    """1e-4: a float32 sum of 4096 terms, which tensor cores may truncate. A sum in half precision is off by 1e-3 and more."""
    x = torch.randn(2, 64, 4096, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    with torch.autocast("cuda", dtype=dtype):
        d = distances(x)
    assert d.dtype == torch.float32
    torch.testing.assert_close(d, distances(x.double()).float(), rtol=0, atol=1e-4)


@on_a_gpu
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_in_one_image_of_a_batch_raise(bad):
    x = torch.ones(3, 8, 4, dtype=torch.bfloat16, device=DEVICE)
    x[1, 2, 3] = bad
    with pytest.raises(me.MllmEfficientError, match="NaN or infinity"):
        me.DivPrune(tokens=2).compress_all([me.VisualTokens(image) for image in x], [2] * 3)
