"""Choosing on a CPU: by old scores, lists of neighbours and sums of products, as by looking at everything again; and its memory."""

from __future__ import annotations

import dataclasses
import tracemalloc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mllm_efficient as me
from mllm_efficient.cli.options import import_files
from mllm_efficient.compressors.math import cosine, lazy, matching

pytestmark = pytest.mark.once

NAIVE = Path(__file__).parents[2] / "benchmarks" / "naive.py"
METHODS = ("cdpruner", "vispruner", "scope", "prumerge_plus", "visionzip", "tome")
OVER_FRAMES = ("evs", "vidcom2", "vcast", "fastvid")


def tokens(seed: int, n: int = 0, d: int = 0, dtype: torch.dtype = torch.float32) -> me.VisualTokens:
    """Noise, rows close together, copies, whole numbers or a smooth picture, by the seed; of 2 to 250 tokens unless said."""
    draw = torch.Generator().manual_seed(seed)
    n = n or int(torch.randint(2, 250, (), generator=draw))
    d = d or int(torch.randint(2, 96, (), generator=draw))
    x = torch.randn(n, d, generator=draw)
    if seed % 5 == 1:
        x = x + 3 * torch.randn(d, generator=draw)
    elif seed % 5 == 2:
        x = x[torch.randint(0, max(1, n // 3), (n,), generator=draw)]
    elif seed % 5 == 3:
        x = torch.randint(-2, 3, (n, d), generator=draw).float()
    elif seed % 5 == 4:
        coarse = torch.randn(1, d, 4, 4, generator=draw)
        x = torch.nn.functional.interpolate(coarse, (16, -(-n // 16)), mode="bilinear")[0].flatten(1).T[:n] + x / 10
    attention = torch.rand(n, generator=draw) if seed % 3 else torch.randint(0, 5, (n,), generator=draw) / 8
    keys, text = torch.randn(n, 32, generator=draw), torch.randn(7, d, generator=draw)
    return me.VisualTokens(x.to(dtype), attention=attention, keys=keys.to(dtype), text=text.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["cdpruner", "vispruner", "scope"])
def test_what_is_chosen_is_what_looking_at_all_tokens_again_chooses(name, dtype):
    """``select_batch`` is the loop of a GPU."""
    for seed in range(40):
        v = tokens(seed, dtype=dtype)
        for k in sorted({max(1, len(v) // 9), max(1, len(v) // 2)}):
            method: Any = me.build({"method": name, "tokens": k})
            assert torch.equal(method.select(v, k), method.select_batch([v], k)[0].sort().values), (seed, k)


def test_what_is_merged_is_what_products_made_anew_merge():
    """In float64, where rounding decides nothing; the last case has pairs that cancel, whose products are made anew."""
    for seed in range(40):
        v = tokens(seed, dtype=torch.float64)
        if seed % 5 != 3:
            for k in sorted({1, max(1, len(v) // 9), max(1, len(v) // 2)}):
                method = me.ToMe(tokens=k)
                torch.testing.assert_close(
                    method.compress(v, k).features, method.compress_batch([v], k)[0].features, rtol=1e-9, atol=1e-9, msg=f"{seed} {k}"
                )


def test_sums_that_cancel_are_made_anew(monkeypatch):
    """Opposite tokens that must merge: their sum is 0 to the last digit, and is like nothing."""
    draw, calls = torch.Generator().manual_seed(0), list[int]()
    similarity = cosine.similarity
    monkeypatch.setattr(matching, "similarity", lambda x, *names: calls.append(len(x)) or similarity(x, *names))
    half = torch.randn(1, 8, generator=draw, dtype=torch.float64)
    x = torch.cat([half, -half, torch.randn(6, 8, generator=draw, dtype=torch.float64)])
    x[2::2], x[3::2] = half, -half
    v = me.VisualTokens(x)
    for k in (1, 2, 3):
        method = me.ToMe(tokens=k)
        torch.testing.assert_close(method.compress(v, k).features, method.compress_batch([v], k)[0].features, rtol=1e-9, atol=1e-9)
    assert min(calls) < len(x) == calls[0]


@pytest.mark.parametrize("few", [1, 3, 4])
def test_the_greedy_choice_takes_the_lowest_of_equal_scores(few):
    """Scores of few values that fall by whole steps, against a loop over all of them."""
    for seed in range(50):
        draw = np.random.default_rng(seed)
        falls = draw.integers(0, 2, (40, 40)).astype(np.float64)
        first = draw.integers(3, 6, 40).astype(np.float64)
        chosen: list[int] = []

        def now(some, _, first=first, falls=falls, chosen=chosen):
            return first[some] - falls[chosen][:, some].sum(0)

        expected: list[int] = []
        for _ in range(30):
            scores = first - falls[expected].sum(0)
            scores[expected] = -np.inf
            expected.append(int(scores.argmax()))
        found = lazy.greedy(first.copy(), 30, now, lambda token, _, chosen=chosen: chosen.append(token), few)
        assert found.tolist() == expected


def test_one_half_of_a_product_mirrored_is_the_product():
    for n in (1, 191, 192, 193, 500):
        x = torch.randn(n, 24, generator=torch.Generator().manual_seed(n))
        found = cosine.gram(x)
        torch.testing.assert_close(found, x @ x.T, rtol=1e-5, atol=1e-5)
        assert torch.equal(found, found.T)
    rows, lengths = cosine.unit_rows(x, "a", "rows", 512.0)
    assert torch.equal(rows, cosine.unit(x) * 512)
    norm = x.double().norm(dim=1)
    torch.testing.assert_close(lengths / lengths[0], norm / norm[0], rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------------------ memory


class Live(TorchDispatchMode):
    """Bytes of tensors made inside that are still there, and the most that they and numpy's arrays ever were together."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.most = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        old = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.seen | old:
                    self.seen.add(storage._cdata)
                    self._change(storage.nbytes())
                    weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())
        return out

    def _drop(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self._change(-size)

    def _change(self, size: int) -> None:
        self.most = max(self.most, self.bytes + tracemalloc.get_traced_memory()[1])
        tracemalloc.reset_peak()
        self.bytes += size


def most_bytes(work) -> int:
    """Of torch's tensors and numpy's arrays together, at their peak. What the first call imports is no part of it."""
    with Live():
        work()
    tracemalloc.start()
    try:
        with Live() as live:
            work()
            live._change(0)
        return live.most
    finally:
        tracemalloc.stop()


def test_the_bytes_counted_are_those_alive_at_a_time():
    def work():
        x = torch.zeros(1000, 1000)
        y = x[:10].view(-1) + 1
        np.zeros((500, 1000), dtype=np.float32)
        del x
        np.zeros((250, 1000), dtype=np.float32)
        return torch.zeros(500, 1000), y

    assert 6e6 < most_bytes(work) < 6.2e6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*METHODS, "divprune", *OVER_FRAMES])
def test_choosing_takes_the_similarities_and_one_copy_of_the_features(name, dtype):
    n, d, k = 1500, 1024, 150
    v, method = tokens(0, n, d, dtype), me.build({"method": name, "tokens": k})
    if name in OVER_FRAMES:
        v = dataclasses.replace(v, frame=torch.arange(n) // 150)
    assert most_bytes(lambda: method.compress(v, k)) <= 1.2 * 4 * n * n + 4 * n * d


# ------------------------------------------------------------------------------------------------ the loops of the benchmark


@pytest.mark.parametrize("name", METHODS)
def test_the_naive_loops_of_the_benchmark_do_the_same(name, registered):
    """Of noise, where no two scores are as near as float32's last digits."""
    import_files([NAIVE])
    for seed in (0, 5, 10, 20):
        v = tokens(seed + 5000, 120, 48)
        v = me.VisualTokens(v.features, attention=torch.rand(120, generator=torch.Generator().manual_seed(seed)), keys=v.keys, text=v.text)
        ours, naive = (me.build({"method": which, "tokens": 16}).compress(v, 16) for which in (name, f"naive_{name}"))
        if ours.indices is not None:
            assert torch.equal(ours.indices, naive.indices)
        torch.testing.assert_close(ours.features, naive.features, rtol=1e-4, atol=1e-5)
