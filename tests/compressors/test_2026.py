"""The methods of 2026 equal slow transcriptions of their rules.

As in test_attentive.py: plain loops in float64 that share no code with the package, rows that are copies in every third case, attention of
few values in every second. Scores that differ by less than rounding in float32 are ties, and the lowest index wins.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

import mllm_efficient as me

from ..pairs import for_all
from .test_attentive import by_attention, cosine, drawn, tokens
from .test_merging import slow_merge

SEEDS = range(200)
METHODS = [me.MMTok, me.ApET, me.PruneSID, me.OTPrune]


def case(seed):
    """Visual tokens with text, their parts as arrays, and K."""
    x, attention, keys, k = drawn(seed)
    draw = np.random.default_rng(1000 + seed)
    text = draw.normal(size=(int(draw.integers(1, 8)), x.shape[1]))
    v = tokens(x, attention, keys)
    return me.VisualTokens(v.features, attention=v.attention, text=torch.tensor(text)), x, attention, text, k


def best(scores: dict[int, float]) -> int:
    """The index with the largest score, the lowest of those that are equal but for rounding."""
    most = max(scores.values())
    return min(i for i, score in scores.items() if score >= most - 1e-9 * abs(most))


def softmax(values, temperature):
    powers = [math.exp((v - max(values)) / temperature) for v in values]
    return [p / math.fsum(powers) for p in powers]


def slow_mmtok(x, text, k, alpha, of_text, of_image):
    of_rows = [(softmax([cosine(t, row) for row in x], of_text), 1 / len(text)) for t in text]
    of_rows += [(softmax([cosine(u, row) for row in x], of_image), alpha / len(x)) for u in x]
    cover, chosen = [0.0] * len(of_rows), []
    for _ in range(k):
        gains = {
            j: math.fsum(weight * max(0.0, shares[j] - c) for (shares, weight), c in zip(of_rows, cover))
            for j in range(len(x)) if j not in chosen
        }  # fmt: skip
        chosen.append(best(gains))
        cover = [max(c, shares[chosen[-1]]) for (shares, _), c in zip(of_rows, cover)]
    return chosen


@pytest.mark.once
@for_all("seed", SEEDS)
def test_mmtok_is_the_slow_coverage(seed):
    v, x, _, text, k = case(seed)
    k = min(k, 12)  # after which what is left to cover is rounding
    for settings in ((0.5, 0.02, 0.2), (0.0, 0.5, 0.1), (2.0, 0.1, 1.0))[: 1 + seed % 3]:
        method = me.MMTok(tokens=k, alpha=settings[0], text_temperature=settings[1], vision_temperature=settings[2])
        assert method.select(v).tolist() == sorted(slow_mmtok(x, text, k, *settings)), settings


def slow_apet(x, k, count):
    far, basis = {i: float(row @ row) for i, row in enumerate(x)}, []
    while len(basis) < min(count, k):
        basis.append(best({i: d for i, d in far.items() if i not in basis}))
        far = {i: min(float((row - x[j]) @ (row - x[j])) for j in basis) for i, row in enumerate(x)}
    b = x[basis]
    wide = np.concatenate([b.T, math.sqrt(1e-5) * np.eye(len(b))])
    missed = {}
    for i, row in enumerate(x):
        combination = np.linalg.lstsq(wide, np.concatenate([row, np.zeros(len(b))]), rcond=None)[0]
        rest = np.concatenate([row - combination @ b, [0.0]])
        missed[i] = float(np.linalg.norm(rest))
    while len(basis) < k:
        basis.append(best({i: m for i, m in missed.items() if i not in basis}))
    return basis


@pytest.mark.once
@for_all("seed", SEEDS)
def test_apet_is_the_slow_residuals(seed):
    v, x, _, _, k = case(seed)
    for count in (10, 1, 3):
        out = me.ApET(tokens=k, basis=count).compress(v, k)
        assert out.indices.tolist() == sorted(slow_apet(x, k, count)), count
        rows, _ = slow_merge(x, out.indices.tolist(), "mean")
        np.testing.assert_allclose(out.features.numpy(), np.stack(rows), rtol=1e-12, atol=1e-12)


def slow_otprune(x, k, gamma):
    lengths = [math.sqrt(math.fsum(v * v for v in column)) for column in x.T]
    x = np.stack([column / (length or 1) for column, length in zip(x.T, lengths)]).T
    g = np.array([[math.fsum(a * b) for b in x] for a in x])
    kernel = np.eye(len(x)) + gamma * np.array([[math.fsum(a * b) for b in g] for a in g])
    chosen = []
    while len(chosen) < k:
        so_far, more = np.linalg.slogdet(kernel[np.ix_(chosen, chosen)])[1] if chosen else 0.0, {}
        for i in range(len(x)):
            if i not in chosen:
                some = [*chosen, i]
                more[i] = math.exp(np.linalg.slogdet(kernel[np.ix_(some, some)])[1] - so_far)
        chosen.append(best(more))
    return chosen


@pytest.mark.once
@for_all("seed", SEEDS)
def test_otprune_is_the_slow_determinant(seed):
    v, x, _, _, k = case(seed)
    for gamma in (0.01, 10.0):
        assert me.OTPrune(tokens=k, gamma=gamma).select(v).tolist() == sorted(slow_otprune(x, k, gamma)), gamma


def slow_prunesid(x, attention, k):
    n = len(x)
    if k == n:
        return range(n)
    s = 1 / (1 + np.exp(-x))
    s = s - s.mean(1, keepdims=True)
    _, singular, right = np.linalg.svd(s.T, full_matrices=False)  # channels are the samples
    count = sum(value**2 > 1e-10 * singular[0] ** 2 for value in singular[: max(1, k // 4)])
    loadings = np.round(np.abs(right[: max(1, count)]) * 2**30)
    group = [int(np.argmax(loadings[:, i])) for i in range(n)]
    mean = math.fsum(cosine(x[i], x[j]) for i in range(n) for j in range(i)) / (n * (n - 1) / 2)
    kept, passed = {}, {}
    for i in by_attention(attention):
        own = kept.setdefault(group[i], [])
        alike = any(cosine(x[i], x[j]) > k / 32 * mean for j in own)
        (passed.setdefault(group[i], []) if alike else own).append(i)
    ranked = [[*kept.get(g, []), *passed.get(g, [])] for g in range(max(group) + 1)]
    least = [min(1, len(r)) for r in ranked]
    most = [min(5 * math.ceil(k / 64), len(kept.get(g, []))) for g in range(len(ranked))]
    while sum(most) < k:
        most = [min(m + 1, len(r)) for m, r in zip(most, ranked)]
    rest, total = max(0, k - sum(least)), sum(map(len, kept.values()))
    steps = [round(sum(len(kept.get(g, [])) for g in range(h + 1)) * rest / total) for h in range(len(ranked))]
    quota = [min(low + b - a, high) for low, a, b, high in zip(least, [0, *steps], steps, most)]
    for g in sorted(range(len(ranked)), key=lambda g: (-len(kept.get(g, [])), g)):
        while sum(quota) < k and quota[g] < most[g]:
            quota[g] += 1
    return [i for r, q in zip(ranked, quota) for i in r[:q]]


@pytest.mark.once
@for_all("seed", SEEDS)
def test_prunesid_is_the_slow_suppression(seed):
    v, x, attention, _, k = case(seed)
    assert me.PruneSID(tokens=k).select(v).tolist() == sorted(slow_prunesid(x, attention, k))


@pytest.mark.parametrize("cls", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_rows_leave_exactly_k(cls, dtype):
    """Equal, zero and few rows, equal attention, K = 1 and K = N."""
    for x in (torch.ones(9, 4), torch.zeros(9, 4), torch.eye(9), torch.randint(-2, 3, (9, 4)), torch.full((9, 4), 6e4)):
        for attention in (torch.ones(9), torch.zeros(9), torch.rand(9)):
            v = me.VisualTokens(x.to(dtype), attention=attention, text=torch.randn(3, x.shape[1]))
            for k in (1, 2, 5, 9):
                out = cls(tokens=k).compress(v, k)
                assert len(out) == k and out.features.dtype == dtype and out.features.isfinite().all()
                assert out.indices.tolist() == sorted(set(out.indices.tolist()))


@pytest.mark.parametrize("cls", METHODS)
def test_copies_go_to_the_lowest_index(cls):
    """Sixteen tokens four times over, of equal attention: the first of each come before any second one, or the choice is by index."""
    x = torch.randn(16, 12, generator=torch.Generator().manual_seed(1)).repeat(4, 1)
    v = me.VisualTokens(x, attention=torch.ones(64), text=torch.randn(3, 12, generator=torch.Generator().manual_seed(2)))
    for k in (4, 9, 16):
        kept = cls(tokens=k).select(v)
        for i in kept.tolist():
            assert all(j in kept for j in range(i % 16, i, 16)), "a later copy without the one before it"


@pytest.mark.parametrize("cls", METHODS)
def test_nan_is_refused(cls):
    for name in ("features", "attention", "text"):
        v = {"features": torch.randn(9, 4), "attention": torch.rand(9), "text": torch.randn(3, 4)}
        v[name][2] = float("nan")
        if name == "features" or name in cls.needs:
            with pytest.raises(me.NotFiniteError, match=f"{cls.name}.* NaN or infinity"):
                cls(tokens=4).compress(me.VisualTokens(**v), 4)


def test_mmtok_needs_text():
    with pytest.raises(me.CountMismatchError, match="this row has none"):
        me.MMTok(tokens=2).select(me.VisualTokens(torch.randn(4, 3), text=torch.zeros(0, 3)))


@pytest.mark.parametrize(
    "spec, says",
    [
        ("mmtok:tokens=9,alpha=-1", "alpha=-1 is not a number of at least 0"),
        ("mmtok:tokens=9,text_temperature=0", "text_temperature=0 is not a number above 0"),
        ("apet:tokens=9,basis=0", "basis=0 is not a whole number of at least 1"),
        ("otprune:tokens=9,gamma=0", "gamma=0 is not a number above 0"),
    ],
)
def test_parameters_out_of_range_are_refused(spec, says):
    with pytest.raises(me.BadSettingError, match=says):
        me.build(spec)


# ------------------------------------------------------------------------------------------------ hawk


def slow_hawk(heads, weights):
    score = [0.0] * len(heads[0])
    for row, weight in zip(heads, weights):
        length = math.sqrt(math.fsum(float(p) ** 2 for p in row))
        score = [s + (weight * float(p) / length if length else 0.0) for s, p in zip(score, row)]
    return score


@pytest.mark.once
@for_all("seed", SEEDS)
def test_hawk_is_the_slow_sum_over_heads(seed, tmp_path):
    draw = np.random.default_rng(seed)
    n, h = int(draw.integers(2, 40)), int(draw.integers(1, 9))
    k, heads, weights = int(draw.integers(1, n + 1)), draw.normal(size=(h, n)), draw.random(h)
    if seed % 3 == 0:
        heads[:, draw.integers(0, n, n // 3)] = heads[:, :1]
    v = me.VisualTokens(torch.randn(n, 4), text=torch.randn(2, 4), heads=torch.tensor(heads))
    if seed % 2:
        path = tmp_path / f"{seed}.json"
        path.write_text(str(weights.tolist()))
    else:
        from safetensors.torch import save_file

        path = tmp_path / f"{seed}.safetensors"
        save_file({"head_weights": torch.tensor(weights)}, path)
        weights = torch.tensor(weights).float().tolist()
    for given, of_heads in ((None, [1 / h] * h), (str(path), weights)):
        score = slow_hawk(heads, of_heads)
        chosen: list[int] = []
        while len(chosen) < k:
            chosen.append(best({i: s + 100 for i, s in enumerate(score) if i not in chosen}))
        assert me.Hawk(tokens=k, head_weights=given).select(v).tolist() == sorted(chosen)


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_hawk_sees_the_first_layers_queries_and_keys(name, registered):
    """Against every text token's product with every visual token, row by row of a padded batch."""
    from ..families import FAMILIES, make, tiny

    got = []

    @registered("asking")
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Asking(me.Selector):
        needs = frozenset({"text", "heads"})

        def score(self, v):
            got.append(v)
            return v.heads.sum(0)

    model, inputs = tiny(name), make(name, *FAMILIES[name].mixed)
    report = me.prepare(model, "asking:keep=0.5", **inputs).report
    layer = model.model.language_model.layers[0]
    attention = layer.self_attn
    assert len(got) == len(report.images)
    for v in got:
        with torch.no_grad():
            q, k = (getattr(attention, f"{which}_proj")(layer.input_layernorm(x)) for which, x in (("q", v.text), ("k", v.features)))
        q, k = (part.view(len(part), -1, attention.head_dim) for part in (q, k))
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q).detach(), attention.k_norm(k).detach()
        times = q.shape[1] // k.shape[1]
        for h in range(q.shape[1]):
            expected = torch.stack([k[:, h // times] @ t[h] for t in q]).mean(0) / math.sqrt(attention.head_dim)
            torch.testing.assert_close(v.heads[h], expected, atol=1e-5, rtol=1e-4)


def test_a_file_of_head_weights_has_to_fit(tmp_path):
    v = me.VisualTokens(torch.randn(4, 3), text=torch.randn(2, 3), heads=torch.randn(3, 4))
    (tmp_path / "two.json").write_text("[1, 2]")
    (tmp_path / "none.json").write_text("{")
    with pytest.raises(me.BadSettingError, match="has weights of 2 heads, and the model's first layer has 3"):
        me.Hawk(tokens=2, head_weights=str(tmp_path / "two.json")).select(v)
    with pytest.raises(me.BadSettingError, match="is no JSON list or safetensors with 'head_weights'"):
        me.Hawk(tokens=2, head_weights=str(tmp_path / "none.json")).select(v)
    with pytest.raises(me.CountMismatchError, match="this row has none"):
        me.Hawk(tokens=2).select(dataclasses.replace(v, text=torch.zeros(0, 3)))
