"""cdpruner, tome, spp and pooling by generalised means equal slow transcriptions of their published rules.

The transcriptions are plain loops in float64 and share no code with the package. The random cases are given in float64
too, so that rounding differs from theirs by about 1e-15 and decides nothing unless two scores are as near as that. Those of
equal rows are, which methods and transcriptions therefore take for equal: the lowest index wins. Float32 and bfloat16
input is tested by what is reached (the determinant) or with cases whose scores are far apart.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mllm_efficient as me
from mllm_efficient.compressors.base import query_aware
from mllm_efficient.compressors.spp import levels

from ..families import FAMILIES, make, tiny
from ..families_reference import visuals
from ..pairs import for_all

SEEDS = range(200)


def drawn(seed: int, most: int = 40) -> tuple[np.ndarray, np.ndarray, int]:
    """Features (N, D), text (T, D) and K; of every third case some rows are copies of others."""
    draw = np.random.default_rng(seed)
    n, d = int(draw.integers(2, most)), int(draw.integers(2, 24))
    x = draw.normal(size=(n, d)) + draw.normal(size=d) * draw.integers(0, 3)
    if seed % 3 == 0:
        x[draw.integers(0, n, n // 3)] = x[draw.integers(0, n)]
    return x, draw.normal(size=(int(draw.integers(1, 9)), d)), int(draw.integers(1, n + 1))


def tokens(x: np.ndarray, text: np.ndarray | None = None, **more: Any) -> me.VisualTokens:
    return me.VisualTokens(torch.tensor(x), text=None if text is None else torch.tensor(text), **more)


# cdpruner ------------------------------------------------------------------------------------------------------------


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    lengths = math.sqrt(sum(v * v for v in a)) * math.sqrt(sum(v * v for v in b))
    return sum(p * q for p, q in zip(a, b)) / lengths if lengths else 0.0


def kernel(x: np.ndarray, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(r, S): relevance in [0, 1] and cosines, entry by entry."""
    mean = [sum(row[c] for row in text) / len(text) for c in range(text.shape[1])]
    relevance = [cosine(row, mean) for row in x]
    least, most = min(relevance), max(relevance)
    r = np.array([(one - least) / (most - least) if most > least + 1e-6 else 1.0 for one in relevance])
    return r, np.array([[cosine(a, b) for b in x] for a in x])


def slow_dpp(r: np.ndarray, s: np.ndarray, k: int) -> list[int]:
    """Greedy MAP by determinants: what is in no span of the chosen and relevant first, then by relevance."""
    chosen: list[int] = []
    while len(chosen) < k:
        gains = {}
        for i in sorted(set(range(len(r))) - set(chosen)):
            inverse = np.linalg.pinv(s[np.ix_(chosen, chosen)], rcond=1e-9) if chosen else np.zeros((0, 0))
            left = s[i, i] - s[i, chosen] @ inverse @ s[chosen, i]
            gains[i] = (1, r[i] ** 2 * left) if left > 1e-6 and r[i] > 1e-6 else (0, r[i])
        best = max(gains.values())
        near = [i for i, gain in gains.items() if gain[0] == best[0] and gain[1] > best[1] * (1 - 1e-9) - 1e-15]
        chosen.append(near[0])
    return chosen


@pytest.mark.once
@for_all("seed", SEEDS)
def test_cdpruner_is_the_slow_greedy_choice_by_determinants(seed):
    x, text, k = drawn(seed)
    found = me.CDPruner(tokens=k).select(tokens(x, text)).tolist()
    assert len(set(found)) == k and found == sorted(found)
    assert found == sorted(slow_dpp(*kernel(x, text), k))


@pytest.mark.once
@for_all("seed", range(50))
def test_cdpruner_in_float32_reaches_the_determinant_of_float64(seed):
    """Of rows in general position and K below D. Float32 may take another token where two are alike to seven digits."""
    draw = np.random.default_rng(seed)
    x, text = draw.normal(size=(60, 32)).astype(np.float32), draw.normal(size=(5, 32)).astype(np.float32)
    k = int(draw.integers(1, 20))
    r, s = kernel(x.astype(np.float64), text.astype(np.float64))
    total = r[:, None] * s * r

    def volume(chosen: list[int]) -> float:
        return np.linalg.slogdet(total[np.ix_(chosen, chosen)])[1]

    found = me.CDPruner(tokens=k).select(tokens(x, text)).tolist()
    assert volume(found) == pytest.approx(volume(slow_dpp(r, s, k)), abs=1e-3)


def test_one_token_is_the_most_relevant_and_all_are_all():
    x, text, _ = drawn(1)
    v = tokens(x, text)
    assert me.CDPruner(tokens=1).select(v).tolist() == [int(np.argmax(kernel(x, text)[0]))]
    assert me.CDPruner(keep=1.0).select(v).tolist() == list(range(len(x)))


def test_diversity_is_weighed_against_relevance():
    """Two copies of the most relevant token, one that is less relevant and one of no relevance: by hand."""
    x = np.array([[1.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]])
    text = np.array([[1.0, 0.5, 0]])
    choices = [me.CDPruner(tokens=k).select(tokens(x, text)).tolist() for k in (1, 2, 3, 4)]
    assert choices == [[0], [0, 2], [0, 1, 2], [0, 1, 2, 3]], "the copy has relevance 1, the last token 0"


def test_equal_tokens_and_zero_tokens_give_the_lowest_indices():
    text = np.ones((2, 4))
    assert me.CDPruner(tokens=3).select(tokens(np.ones((7, 4)), text)).tolist() == [0, 1, 2]
    assert me.CDPruner(tokens=3).select(tokens(np.zeros((7, 4)), text)).tolist() == [0, 1, 2]
    assert me.CDPruner(tokens=3).select(tokens(np.eye(7), np.ones((2, 7)))).tolist() == [0, 1, 2], "orthogonal, equally relevant"
    rays = np.outer(np.linspace(0.1, 7, 40), np.random.default_rng(0).normal(size=4))
    assert me.CDPruner(tokens=3).select(tokens(rays, text)).tolist() == [0, 1, 2], "one direction, many lengths: rounding is no relevance"
    assert me.CDPruner(tokens=1).select(tokens(np.array([[0.0, 0], [0, 0], [3, 1]]), text[:, :2])).tolist() == [2]


@given(
    st.integers(1, 30), st.integers(1, 6), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(0, 99), st.data()
)
def test_cdpruner_keeps_exactly_k_of_any_rows(n, d, dtype, seed, data):
    """Small whole numbers: many equal, opposite, zero and dependent rows."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, (n, d), generator=draw).to(dtype)
    k = data.draw(st.integers(1, n))
    found = me.CDPruner(tokens=k).select(me.VisualTokens(x, text=torch.randint(-2, 3, (3, d), generator=draw).to(dtype)))
    assert len(set(found.tolist())) == k and found.tolist() == sorted(found.tolist())


def test_cdpruner_in_half_precision_chooses_as_in_float32():
    draw = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        x, text = torch.randn(40, 16, generator=draw).to(dtype), torch.randn(4, 16, generator=draw).to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = me.CDPruner(tokens=9).select(me.VisualTokens(x, text=text))
        assert torch.equal(found, me.CDPruner(tokens=9).select(me.VisualTokens(x.float(), text=text.float())))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_no_scale_of_the_features_changes_the_choice(scale):
    x, text, k = drawn(4)
    expected = me.CDPruner(tokens=k).select(tokens(x.astype(np.float32), text.astype(np.float32)))
    scaled = tokens((x * scale).astype(np.float32), (text * scale).astype(np.float32))
    assert torch.equal(me.CDPruner(tokens=k).select(scaled), expected)


@for_all("seed", range(20))
def test_rounding_of_the_features_does_not_decide_beyond_their_rank(seed):
    """30 of 60 rows of rank 8: from the ninth token on what is left of S_ii is nothing but rounding, and must not be ranked."""
    draw = np.random.default_rng(seed)
    x, text = draw.normal(size=(60, 8)).astype(np.float32), draw.normal(size=(5, 8)).astype(np.float32)
    other = (x * (1 + 1e-7 * draw.normal(size=x.shape))).astype(np.float32)
    assert (x != other).any()
    assert torch.equal(me.CDPruner(tokens=30).select(tokens(x, text)), me.CDPruner(tokens=30).select(tokens(other, text)))


@pytest.mark.parametrize("where", ["features", "text"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_cdpruner_refuses_nan_and_infinity(where, bad):
    x, text, _ = drawn(2)
    (x if where == "features" else text)[0, 0] = bad
    with pytest.raises(me.CountMismatchError, match="cdpruner: the visual tokens or the text hold NaN or infinity"):
        me.CDPruner(tokens=1).select(tokens(x, text))


@pytest.mark.parametrize("text", [None, np.zeros((0, 3))])
def test_cdpruner_refuses_a_row_without_text(text):
    with pytest.raises(me.CountMismatchError, match="this row has none"):
        me.CDPruner(tokens=1).select(tokens(np.ones((4, 3)), text))


def test_the_relevance_is_named():
    assert query_aware(me.CDPruner) and me.build("cdpruner:keep=0.25").spec() == "cdpruner:keep=0.25,relevance=llm"
    assert me.CDPruner(keep=0.25).to_dict() == {"method": "cdpruner", "keep": 0.25, "relevance": "llm"}
    with pytest.raises(me.BadBudgetError, match="relevance='clip' needs clip=DIR, the CLIP model that the tower is from"):
        me.build("cdpruner:keep=0.25,relevance=clip")
    with pytest.raises(me.BadBudgetError, match="clip= has no effect without relevance=clip"):
        me.build("cdpruner:keep=0.25,clip=openai/clip-vit-large-patch14-336")
    with pytest.raises(me.BadBudgetError, match="relevance='attention' is not one of 'llm', 'clip'"):
        me.build("cdpruner:keep=0.25,relevance=attention")


@pytest.mark.parametrize("name", ["cdpruner:tokens=5", "tome:tokens=5", "spp:tokens=5", "pool:tokens=5,op=gem"])
def test_other_images_of_a_batch_change_no_bit(name):
    method, draw = me.build(name), torch.Generator().manual_seed(0)
    images = [
        me.VisualTokens(torch.randn(r * c, 16, generator=draw), grid=(r, c), text=torch.randn(3, 16, generator=draw))
        for r, c in [(4, 5), (6, 6), (4, 5), (3, 7)]
    ]
    together = method.compress_all(images, [5] * 4)
    for order in itertools.permutations(range(4), 2):
        for i, out in zip(order, method.compress_all([images[i] for i in order], [5, 5])):
            assert torch.equal(out.features, together[i].features)
            assert (out.indices is None) == (together[i].indices is None)
            assert out.indices is None or torch.equal(out.indices, together[i].indices)


@pytest.mark.parametrize("most", [1, 2**27], ids=["memory for one", "memory for all"])
def test_images_that_share_a_loop_get_what_each_gets_alone(monkeypatch, most):
    """What a CUDA device does with a batch, here on the CPU: equal sizes together, others by themselves, the order kept."""
    monkeypatch.setattr("mllm_efficient.compressors.sharing.TOGETHER", most)
    cases = [drawn(seed) for seed in range(60)]
    cases += [(x + 0.1, text, k) for x, text, k in cases[::2]]
    parts, ks = [tokens(x, text) for x, text, _ in cases], [k for *_, k in cases]
    method = me.CDPruner(keep=0.5)
    for one, k, out in zip(parts, ks, method.compress_alike(parts, ks)):
        assert torch.equal(out.indices, method.select(one, k)) and torch.equal(out.features, one.features[out.indices])
    with pytest.raises(me.BadBudgetError, match="cdpruner: 9 of 4 tokens cannot be kept"):
        method.compress_alike([tokens(np.ones((4, 3)), np.ones((1, 3)))], [9])


# What a method is shown of the question ------------------------------------------------------------------------------


def shown(name: str, inputs: dict[str, Any], labels: torch.Tensor | None = None) -> list[torch.Tensor]:
    """The text embeddings that cdpruner is given for each image of a call."""
    found = []

    class Spy(me.CDPruner):
        def select(self, v, k):
            found.append(v.text)
            return torch.arange(k)

    Spy.name = "spy"
    more = {} if labels is None else {"labels": labels}
    me.prepare(tiny(name), Spy(keep=0.3), **inputs, **more)
    return found


def plain_text(name: str, model: Any, inputs: dict, upto: int | None = None) -> torch.Tensor:
    ids, mask = inputs["input_ids"][0, :upto], inputs["attention_mask"][0, :upto]
    visual = (FAMILIES[name].image_token, FAMILIES[name].video_token)
    marks = [column for v in visuals(name, model, inputs) for column, _ in v.marks] if FAMILIES[name].marked else []
    stays = [int(i) for at, (i, m) in enumerate(zip(ids, mask)) if m and int(i) not in visual and at not in marks]
    return model.get_input_embeddings()(torch.tensor(stays))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_text_is_that_of_the_images_own_row_alone(name, side):
    """Without placeholders and padding: a batch of all kinds of rows shows what each row alone does."""
    model, rows = tiny(name), FAMILIES[name].mixed
    together = shown(name, make(name, *rows, padding_side=side))
    alone = []
    for row in rows:
        inputs = make(name, row)
        here = shown(name, inputs)
        expected = plain_text(name, model, inputs)
        assert all(torch.equal(text, expected) for text in here)
        alone += [(row, text) for text in here]
    assert len(together) == len(alone) > 0
    key = lambda text: (len(text), text.sum().item())  # noqa: E731  (images come before videos in a batch)
    assert sorted(map(key, together)) == sorted(key(text) for _, text in alone)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_in_the_prompt_is_not_shown(name):
    """As in training: what a label says is the answer, and the method sees what it would see when it generates."""
    inputs = make(name, "one image")
    ids = inputs["input_ids"]
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = ids[:, -2:]
    (text,) = shown(name, inputs, labels)
    assert torch.equal(text, plain_text(name, tiny(name), inputs, -2))
    assert len(shown(name, inputs)[0]) == len(text) + 2


# tome ----------------------------------------------------------------------------------------------------------------


def slow_tome(x: np.ndarray, k: int, r: int | None = None) -> tuple[list[np.ndarray], list[list[int]]]:
    """Tokens as (features, original members), merged round after round."""
    now = [(row, [i]) for i, row in enumerate(x)]
    while len(now) > k:
        n = len(now)
        a, b = range(0, n, 2), range(1, n, 2)
        links = []
        for i in a:
            similarity = [cosine(now[i][0], now[j][0]) for j in b]
            best = max(similarity)
            partner = next(j for j, s in zip(b, similarity) if s > best - 1e-9)
            links.append((best, i, partner))
        links.sort(key=lambda link: (-round(link[0], 9), link[1]))
        gone, joined = set(), {j: [j] for j in b}
        for _, i, j in links[: min(n - k, n // 2, r or math.ceil((len(x) - k) / 24))]:
            gone.add(i)
            joined[j].append(i)
        after = []
        for i in range(n):
            if i in gone:
                continue
            parts = [now[m] for m in joined.get(i, [i])]
            weight = sum(len(members) for _, members in parts)
            mean = sum(row * len(members) for row, members in parts) / weight
            after.append((mean, sorted(m for _, members in parts for m in members)))
        now = after
    return [row for row, _ in now], [members for _, members in now]


@pytest.mark.once
@for_all("seed", SEEDS)
def test_tome_is_the_slow_matching(seed):
    x, _, k = drawn(seed)
    r = None if seed % 2 else 1 + seed % 5
    expected, members = slow_tome(x, k, r)
    assert sorted(m for group in members for m in group) == list(range(len(x)))
    out = me.ToMe(tokens=k, r=r).compress(tokens(x), k)
    assert len(out) == k and out.indices is None
    # 1e-12: float64; the order of a weighted mean of values of about 1 is free.
    torch.testing.assert_close(out.features, torch.tensor(np.array(expected)), rtol=0, atol=1e-12)


def test_tome_to_one_token_is_the_mean_and_to_all_is_the_identity():
    x, _, _ = drawn(5)
    v = tokens(x)
    torch.testing.assert_close(me.ToMe(tokens=1).compress(v, 1).features[0], v.features.mean(0), rtol=0, atol=1e-12)
    assert torch.equal(me.ToMe(keep=1.0).compress(v, len(x)).features, v.features)


def test_tome_merges_copies_first_and_ties_by_the_lowest_index():
    x = np.eye(8)[[0, 0, 1, 1, 2, 2, 3, 3]]
    assert torch.equal(me.ToMe(tokens=4).compress(tokens(x), 4).features, torch.eye(8)[:4].double())
    assert torch.equal(me.ToMe(tokens=7).compress(tokens(x), 7).features, torch.tensor(x[1:])), "the first of four equal links"
    out = me.ToMe(tokens=2).compress(tokens(np.zeros((3, 2))), 2)
    assert torch.equal(out.features, torch.zeros(2, 2).double())


def test_tome_keeps_the_dtype_and_adds_up_in_float32():
    x = torch.full((512, 4), 1.0, dtype=torch.bfloat16)
    x[::4] += 2**-7  # the mean is 2^-9 above 1, which no bfloat16 is
    out = me.ToMe(tokens=1).compress(me.VisualTokens(x), 1).features
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, x.float().mean(0, keepdim=True).bfloat16())
    mixed = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = me.ToMe(tokens=9).compress(me.VisualTokens(mixed), 9).features
    assert torch.equal(found, me.ToMe(tokens=9).compress(me.VisualTokens(mixed.float()), 9).features.half())


def test_tome_counts_its_rounds():
    assert me.ToMe(tokens=1, r=9).rounds(7, 1) == [3, 2, 1] and me.ToMe(tokens=1, r=2).rounds(7, 1) == [2, 2, 1, 1]
    assert me.ToMe(keep=0.25).rounds(576, 144) == [18] * 24 and me.ToMe(tokens=5).rounds(5, 5) == []
    assert me.ToMe(keep=0.5).rounds(100, 50) == [3] * 16 + [2] and me.ToMe(tokens=1).rounds(576, 1) == [24] * 23 + [12, 6, 3, 1, 1]


def test_tome_of_many_images_at_once_is_that_of_each():
    """As on a CUDA device: images of one size share their rounds, others do not; one is left as it is."""
    method = me.ToMe(keep=0.4)
    parts = [tokens(drawn(seed)[0]) for seed in (3, 4, 5, 6)]
    parts += [tokens(-parts[0].features.numpy()), tokens(parts[1].features.numpy()[::-1].copy()), parts[2]]
    ks = [max(1, len(v) // 2) for v in parts[:-1]] + [len(parts[-1])]
    for one, k, out in zip(parts, ks, method.compress_alike(parts, ks)):
        assert torch.equal(out.features, method.compress_batch([one], k)[0].features)
        torch.testing.assert_close(out.features, method.compress(one, k).features, rtol=1e-12, atol=1e-12)


def test_tome_passes_gradients_on():
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    me.ToMe(tokens=2).compress(me.VisualTokens(x), 2).features.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and (x.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("r", [0, -1, True, 2.0, "2"])
def test_tome_refuses_what_is_no_number_of_pairs(r):
    with pytest.raises(me.BadBudgetError, match="tome: r=.* is not a whole number of pairs"):
        me.ToMe(keep=0.5, r=r)


@pytest.mark.parametrize("name", ["tome:tokens=2", "pool:tokens=2,op=gem", "spp:tokens=5,op=ggem,p=1/2"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_mergers_refuse_nan_and_infinity(name, bad):
    x = torch.ones(9, 4)
    x[3, 1] = bad
    with pytest.raises(me.CountMismatchError, match="the visual tokens hold NaN or infinity"):
        method = me.build(name)
        method.compress(me.VisualTokens(x, grid=(3, 3)), method.tokens)


def test_tome_is_refused_where_features_are_added_later():
    with pytest.raises(me.UnsupportedModelError, match="tome merges by content"):
        me.wrap(tiny("qwen3_vl"), "tome:keep=0.3")


# gem and ggem --------------------------------------------------------------------------------------------------------


def slow_mean(x: np.ndarray, grid: tuple[int, int], size: tuple[int, int], powers: list[float] | str) -> np.ndarray:
    """Cell by cell, channel by channel: (mean of max(x, 1e-6)^p)^(1/p), the mean or the maximum."""
    (rows, columns), (h, w), width = grid, size, x.shape[1]
    out = []
    for i in range(h):
        for j in range(w):
            cell = [
                x[y * columns + z]
                for y in range(i * rows // h, -(-(i + 1) * rows // h))
                for z in range(j * columns // w, -(-(j + 1) * columns // w))
            ]
            row = []
            for c in range(width):
                values = [float(one[c]) for one in cell]
                if isinstance(powers, str):
                    row.append(sum(values) / len(values) if powers == "avg" else max(values))
                    continue
                p = powers[c * len(powers) // width]
                row.append((sum(max(value, 1e-6) ** p for value in values) / len(values)) ** (1 / p))
            out.append(row)
    return np.array(out)


def drawn_grid(seed: int) -> tuple[np.ndarray, tuple[int, int], int, list[float]]:
    draw = np.random.default_rng(seed)
    grid = (int(draw.integers(1, 8)), int(draw.integers(1, 8)))
    groups = int(draw.integers(2, 5))
    x = draw.normal(size=(math.prod(grid), groups * int(draw.integers(1, 4)))) * 3
    return x, grid, int(draw.integers(1, math.prod(grid) + 1)), [round(float(p), 2) for p in draw.uniform(0.3, 6, groups)]


@pytest.mark.once
@for_all("seed", SEEDS)
def test_pooling_is_the_slow_loop_in_every_operation(seed):
    x, grid, k, powers = drawn_grid(seed)
    v = tokens(x, grid=grid)
    for op, p, slow in [
        ("avg", None, "avg"), ("max", None, "max"), ("gem", powers[0], powers[:1]), ("ggem", "/".join(map(str, powers)), powers)
    ]:  # fmt: skip
        for name in ("pool", "spp"):
            method = me.build({"method": name, "tokens": k, "op": op, "p": p})
            out = method.compress(v, k)
            assert len(out) == method.count(len(x), grid) <= k
            if k == len(x):
                assert torch.equal(out.features, v.features) and out.grid == grid
                continue
            sizes = [method.target(grid, k)] if name == "pool" else [(side, side) for side in slow_levels(k)]
            expected = np.concatenate([x if size == grid else slow_mean(x, grid, size, slow) for size in sizes])
            torch.testing.assert_close(out.features, torch.tensor(expected), rtol=1e-9, atol=1e-12)


def test_gem_goes_from_the_mean_to_the_maximum():
    x = torch.rand(16, 3, generator=torch.Generator().manual_seed(0)) + 0.1
    v = me.VisualTokens(x, grid=(4, 4))
    one = {op: me.build({"method": "pool", "tokens": 1, **op_p}).compress(v, 1).features for op, op_p in {
        "avg": {"op": "avg"}, "p=1": {"op": "gem", "p": 1}, "p=3": {"op": "gem"}, "p=9": {"op": "gem", "p": 9},
        "p=1e4": {"op": "gem", "p": 1e4}, "max": {"op": "max"},
    }.items()}  # fmt: skip
    torch.testing.assert_close(one["p=1"], one["avg"])
    torch.testing.assert_close(one["p=1e4"], one["max"], rtol=1e-3, atol=0)
    assert (one["avg"] < one["p=3"]).all() and (one["p=3"] < one["p=9"]).all() and (one["p=9"] < one["max"]).all()


def test_no_power_overflows_in_half_precision():
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.full((16, 2), 30000.0, dtype=dtype)
        for p in (0.01, 3, 50):
            out = me.build({"method": "pool", "tokens": 4, "op": "gem", "p": p}).compress(me.VisualTokens(x, grid=(4, 4)), 4).features
            assert out.dtype == dtype
            torch.testing.assert_close(out, x[:4], rtol=2e-2, atol=0)


def test_negative_features_become_the_published_least():
    x = -torch.ones(16, 2)
    out = me.Pool(tokens=4, op="gem").compress(me.VisualTokens(x, grid=(4, 4)), 4).features
    torch.testing.assert_close(out, torch.full((4, 2), 1e-6), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("given_settings", "message"), [
    ({"op": "gem", "p": 0}, "p=0 is not a power above 0 of gem, such as p=3"),
    ({"op": "gem", "p": "1/2"}, "p='1/2' is not a power above 0 of gem"),
    ({"op": "gem", "p": True}, "p=True is not a power"),
    ({"op": "gem", "p": math.inf}, "p=inf is not a power"),
    ({"op": "avg", "p": 2}, "p=2 has no effect with op=avg"),
    ({"op": "max", "p": 2}, "p=2 has no effect with op=max"),
    ({"op": "ggem"}, "op='ggem' needs the power of each group of channels, such as p=1/3/5"),
    ({"op": "ggem", "p": 3}, "op='ggem' needs the power of each group"),
    ({"op": "ggem", "p": "1/x"}, "p='1/x' is not a power above 0 of ggem, such as p=1/3/5"),
    ({"op": "ggem", "p": "1/-2"}, "p='1/-2' is not a power"),
    ({"op": "median"}, "op='median' is not one of"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["pool", "spp"])
def test_settings_of_pooling_that_mean_nothing_are_refused(name, given_settings, message):
    with pytest.raises(me.BadBudgetError, match=message):
        me.build({"method": name, "keep": 0.5, **given_settings})


def test_groups_divide_the_channels():
    method = me.build("pool:tokens=4,op=ggem,p=1/2/3")
    assert method.p == "1/2/3" and me.build(method.spec()) == method
    with pytest.raises(me.BadBudgetError, match="pool: 4 channels do not divide into 3 equal groups"):
        method.compress(me.VisualTokens(torch.ones(16, 4), grid=(4, 4)), 4)


def test_the_operation_by_its_earlier_name():
    assert me.build("pool:keep=0.5,mode=max") == me.Pool(keep=0.5, op="max") and me.Pool(keep=0.5, mode="avg") == me.Pool(keep=0.5)
    assert me.Pool(keep=0.5, mode="max").spec() == "pool:keep=0.5,op=max"
    with pytest.raises(me.BadBudgetError, match="two names of one setting"):
        me.Pool(keep=0.5, op="max", mode="max")
    with pytest.raises(me.BadBudgetError, match="op='mean' is not one of"):
        me.Pool(keep=0.5, mode="mean")


# spp -----------------------------------------------------------------------------------------------------------------


def slow_levels(k: int) -> list[int]:
    """Of all sets of sides in which each is at least twice the one before, beginning with 1, by trying every set."""
    sides = range(1, math.isqrt(k) + 1)
    best: list[int] = []
    for count in range(1, 1 + len(sides)):
        fits = [
            list(some)
            for some in itertools.combinations(sides, count)
            if some[0] == 1 and all(b >= 2 * a for a, b in itertools.pairwise(some)) and sum(s * s for s in some) <= k
        ]
        if not fits:
            break
        # Combinations come with the smallest sides first, and max takes the first of equals.
        most = max(fits, key=lambda some: sum(s * s for s in some))
        best = most if sum(s * s for s in most) >= sum(s * s for s in best) else best
    return best


def test_a_pyramid_is_the_best_of_all():
    for k in range(1, 200):
        assert list(levels(k)) == slow_levels(k), k
    assert levels(85) == (1, 2, 4, 8) and levels(64) == (1, 3, 7) and levels(4) == (1,)


def test_the_count_depends_on_the_budget_alone():
    for k in (1, 4, 5, 21, 64):
        counts = {me.SpatialPyramidPooling(tokens=k).count(r * c, (r, c)) for r, c in [(24, 24), (9, 30), (5, 13), (1, 65)]}
        assert counts == {sum(s * s for s in slow_levels(k))}


def test_a_pyramid_over_a_single_row_repeats_its_cells():
    x = torch.arange(8.0)[:, None]
    out = me.SpatialPyramidPooling(tokens=5).compress(me.VisualTokens(x, grid=(1, 8)), 5)
    assert out.features[:, 0].tolist() == [3.5, 1.5, 5.5, 1.5, 5.5] and out.grid is None
