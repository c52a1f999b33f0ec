"""FlowCut between the blocks of towers, and ToMe where 2 x 2 patches are a token, against the papers' rules written out in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import mllm_efficient as me
from mllm_efficient.cli import main
from mllm_efficient.compressors.flowcut import ASSUMED, dropped, drops
from mllm_efficient.measure.counter import Counted, count
from mllm_efficient.measure.flops import cost, load_shape, shape_of
from mllm_efficient.patches import adapter_for
from mllm_efficient.patches.tower.attention import tower_of
from mllm_efficient.patches.tower.merge import run_inside
from mllm_efficient.patches.vllm.settings import require_served

from ..conftest import slow_greedy
from ..families import FAMILIES, make, tiny
from ..families_reference import Kept, greedy, merged, splice, visuals
from ..pairs import for_all
from .test_tome_tower import similarity, softmax

ROWS = ("one image", "two images", "long text", "text only")
TILES = ("internvl", "cohere2_vision")


def parts_of(tower, block):
    """(norm, queries, keys, values, after attention, MLP) of a block as functions, by the names that its module has."""
    if hasattr(block, "layernorm_before"):
        a = block.attention
        project = (lambda h: a.q_norm(a.q_proj(h)), lambda h: a.k_norm(a.k_proj(h)), a.v_proj)
        return (
            block.layernorm_before, *project, lambda x, s: x + block.lambda_1 * a.projection_layer(s),
            lambda x: x + block.lambda_2 * block.mlp(block.layernorm_after(x)),
        )  # fmt: skip
    a = block.self_attn
    finish = lambda x: x + block.mlp(block.layer_norm2(x))  # noqa: E731
    return block.layer_norm1, a.q_proj, a.k_proj, a.v_proj, lambda x, s: x + a.out_proj(s), finish


def begin(tower, pixels):
    """(patches, D) with the class token in front, whether there is one, and the tower's blocks."""
    x = tower.embeddings(pixels)
    x = tower.pre_layrnorm(x) if hasattr(tower, "pre_layrnorm") else x
    blocks = tower.encoder.layers if hasattr(tower.encoder, "layers") else tower.encoder.layer
    return x[0], int(hasattr(tower.embeddings, "class_embedding") or hasattr(tower.embeddings, "cls_token")), blocks


def slow_cells(n, m):
    """Patches of every token of a square: rows and columns m by m."""
    side, tokens = math.isqrt(n), math.isqrt(n) // m
    return [[(r * m + i) * side + c * m + j for i in range(m) for j in range(m)] for r in range(tokens) for c in range(tokens)]


def heads_of(parts, rows, heads):
    norm, *project, _, _ = parts
    normed = norm(rows)
    return [p(normed).unflatten(-1, (heads, -1)).transpose(0, 1).numpy() for p in project]


@torch.no_grad()
def slow_flowcut(tower, pixels, k, layers, m, entropy):
    """(rows of what is left, the places of the tokens that stayed): every token is its patches, dropped one after the other."""
    x, first, blocks = begin(tower, pixels)
    cells = slow_cells(len(x) - first, m)
    left = list(range(len(cells)))
    rows = torch.cat([x[:first], *(x[[first + p for p in cells[t]]] for t in left)])
    score, last = {}, max(layers - 2, 0)
    for i, block in enumerate(blocks[:layers]):
        parts = parts_of(tower, block)
        heads = (block.attention if hasattr(block, "layernorm_before") else block.self_attn).num_heads
        q, keys, v = heads_of(parts, rows, heads)
        seen = np.concatenate([softmax(q[h] @ keys[h].T / np.sqrt(q.shape[-1])) @ v[h] for h in range(heads)], 1)
        rows = parts[-1](parts[-2](rows, torch.tensor(seen)))
        if len(left) == k:
            continue
        of_all = range(first, len(rows))
        attention, alike = np.zeros(len(rows)), np.zeros(len(rows))
        for h in range(heads):
            query = q[h][0] if first else q[h].mean(0)
            attention += softmax(keys[h] @ query / np.sqrt(q.shape[-1])) / heads
            alike += softmax(v[h] @ v[h][0]) / heads
        total, all_alike = sum(attention[p] for p in of_all), sum(alike[p] for p in of_all)
        share, flow = {}, {}
        for place, token in enumerate(left):
            own = [first + place * len(cells[token]) + j for j in range(len(cells[token]))]
            share[token] = sum(attention[p] for p in own) / total
            norms = [sum(abs(value) for value in v[:, p].mean(0)) for p in own]
            flow[token] = sum((attention[p] / total + (alike[p] / all_alike if first else 0)) * norm for p, norm in zip(own, norms))
        score = {t: flow[t] if t not in score else (score[t] + flow[t]) / 2 for t in left}
        remaining = last - i
        if remaining < 0 or remaining % 2:
            continue
        h = entropy if entropy is not None else -sum(p * math.log(p) for p in share.values()) / math.log(len(left))
        goes = len(left) - k if remaining == 0 else min(len(left) - k, round((len(left) - k) / math.sqrt(remaining) * (1 - h * h)))
        stay = sorted(sorted(left, key=lambda t: (-score[t], t))[: len(left) - goes])
        keep = [first + left.index(t) * m * m + j for t in stay for j in range(m * m)]
        rows, left = rows[[*range(first), *keep]], stay
    return rows, left


def tower_with(kind, layers, seed, make_llava):
    """A tower in float64, its pixels, and how many patches are a token's side."""
    import transformers

    if kind in ("clip", "siglip"):
        strategy = {"vision_feature_select_strategy": "full"} if kind == "siglip" else {}
        model = make_llava(kind, image_size=32, vision_layers=layers, seed=seed, **strategy).double()
        return adapter_for(model).tower, torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), 1
    config = tiny(kind).config
    config.vision_config.num_hidden_layers = layers
    cls = {"internvl": "InternVLForConditionalGeneration", "cohere2_vision": "Cohere2VisionForConditionalGeneration"}[kind]
    torch.manual_seed(seed)
    model = getattr(transformers, cls)(config).eval().double()
    with torch.no_grad():
        for parameter in model.model.vision_tower.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    pixels = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return tower_of(model), pixels, 2


@for_all("seed", range(200))
def test_it_is_the_slow_rule_in_every_block(make_llava, seed):
    draw = np.random.default_rng(seed)
    kind, layers = ("clip", "siglip", *TILES)[seed % 4], int(draw.integers(1, 7))
    tower, pixels, m = tower_with(kind, layers, seed % 7, make_llava)
    n = 16 if m == 1 else 9
    if seed % 5 == 0:  # copies, apart from their places
        pixels[..., pixels.shape[-1] // 2 :] = pixels[..., : pixels.shape[-1] // 2]
    k, entropy = int(draw.integers(1, n)), None if seed % 3 else float(draw.random())
    method = me.FlowCut(tokens=k, entropy=entropy)
    cells = None if m == 1 else torch.tensor(slow_cells(n * m * m, m))
    with torch.no_grad():
        found, steps = run_inside(method, tower, pixels, method.in_blocks(n, k, layers), cells)
    rows, stayed = slow_flowcut(tower, pixels, k, layers, m, entropy)
    assert steps.kept[0].tolist() == stayed and len(stayed) == k
    torch.testing.assert_close(found[0], rows, rtol=0, atol=1e-9)


@torch.no_grad()
def slow_tome(tower, pixels, rounds, m):
    """Each token is (its patches' rows, originals in it, place); the class token is one of one row."""
    x, first, blocks = begin(tower, pixels)
    tokens = [(x[:first], 1, -1)] if first else []
    tokens += [(x[[first + p for p in cell]], 1, place) for place, cell in enumerate(slow_cells(len(x) - first, m))]
    for block, pairs in zip(blocks, rounds):
        parts = parts_of(tower, block)
        heads = (block.attention if hasattr(block, "layernorm_before") else block.self_attn).num_heads
        lengths = [len(rows) for rows, _, _ in tokens]
        q, k, v = heads_of(parts, torch.cat([rows for rows, _, _ in tokens]), heads)
        sizes = np.repeat([size for _, size, _ in tokens], lengths)
        seen = [softmax(q[h] @ k[h].T / np.sqrt(k.shape[-1]) + np.log(sizes)) @ v[h] for h in range(heads)]
        after = parts[-2](torch.cat([rows for rows, _, _ in tokens]), torch.tensor(np.concatenate(seen, 1))).split(lengths)
        keys = [part.mean(0) for part in np.split(k.mean(0), np.cumsum(lengths)[:-1])]
        tokens = [(rows, size, place) for rows, (_, size, place) in zip(after, tokens)]
        a, b, links = list(range(0, len(tokens), 2)), list(range(1, len(tokens), 2)), []
        for i in a[1:] if first else a:
            alike = [similarity(keys[i], keys[j]) for j in b]
            links.append((-max(alike), i, b[alike.index(max(alike))]))
        gone, left = {i: j for _, i, j in sorted(links)[:pairs]}, []
        left = [tokens[i] for i in a if i not in gone]
        for j in b:
            joined = [tokens[j], *(tokens[i] for i, into in gone.items() if into == j)]
            size = sum(s for _, s, _ in joined)
            left.append((sum(rows * s for rows, s, _ in joined) / size, size, tokens[j][2]))
        tokens = [(parts[-1](rows), size, place) for rows, size, place in left]
    return torch.cat([rows for rows, _, _ in sorted(tokens, key=lambda token: token[2])])


@for_all("seed", range(60))
def test_tome_merges_two_by_two_patches_as_one(make_llava, seed):
    draw = np.random.default_rng(seed)
    kind, layers = TILES[seed % 2], int(draw.integers(1, 4))
    tower, pixels, m = tower_with(kind, layers, seed % 5, make_llava)
    k = int(draw.integers(math.ceil(9 / 2**layers) + 1, 10))
    method, cells = me.ToMe(tokens=k, at="tower"), torch.tensor(slow_cells(36, m))
    rounds = method.in_blocks(9, k, layers)
    with torch.no_grad():
        found = run_inside(method, tower, pixels, rounds, cells)[0][0]
    torch.testing.assert_close(found, slow_tome(tower, pixels, rounds, m), rtol=0, atol=1e-9)


def test_the_schedule_is_the_papers():
    """On LLaVA-1.5, of whose 24 blocks 23 run: every second one from the second on, the last but one to exactly K."""
    assert [block for block, _ in drops(23)] == list(range(1, 22, 2)) and drops(23)[-1] == (21, 0)
    assert drops(1) == [(0, 0)] and drops(2) == [(0, 0)] and drops(3) == [(1, 0)] and drops(4) == [(0, 2), (2, 0)]
    assert dropped(576, 64, 20, 0.9) == round(512 / math.sqrt(20) * (1 - 0.81)) and dropped(70, 64, 1, 0.0) == 6
    method = me.FlowCut(tokens=64)
    rounds = method.in_blocks(576, 64, 23)
    assert sum(rounds) == 512 and rounds == me.FlowCut(tokens=64, entropy=ASSUMED).in_blocks(576, 64, 23) and rounds[22] == 0
    assert me.FlowCut(tokens=64, entropy=1).in_blocks(576, 64, 23)[21] == 512, "attention that is all alike tells nothing"
    assert me.FlowCut(tokens=64, entropy=0).in_blocks(576, 64, 23)[1] == round(512 / math.sqrt(20))


# ------------------------------------------------------------------------------------------------ in models


@pytest.mark.parametrize("kind, layer", [("clip", -1), ("clip", -2), ("siglip", -1)])
@pytest.mark.parametrize("entropy", [None, 0.4])
def test_generate_equals_the_slow_reference(make_llava, make_batch, kind, layer, entropy):
    model = make_llava(kind, vision_layers=4, vision_feature_layer=layer)
    batch, double = make_batch(*ROWS), make_llava(kind, vision_layers=4, vision_feature_layer=layer).double()
    method = me.FlowCut(tokens=10, entropy=entropy)
    with me.compressed(model, method):
        out = model.generate(**batch, max_new_tokens=5)[:, batch["input_ids"].shape[1] :]
        report = me.last_report(model)
    images = iter(report.images)
    for row, kind_of_row in enumerate(ROWS):
        one, visual = make_batch(kind_of_row), []
        for p in one.get("pixel_values", torch.zeros(0, 3, 48, 48)):
            rows, stayed = slow_flowcut(adapter_for(double).tower, p[None].double(), 10, 5 + layer, 1, entropy)
            with torch.no_grad():
                visual.append(double.model.multi_modal_projector(rows[int(kind == "clip") :]).float())
            image = next(images)
            assert (image.full, image.kept, image.indices.tolist()) == (36, 10, stayed)
        assert out[row].tolist() == slow_greedy(model, one["input_ids"][0], visual, 36, 5), kind_of_row
    assert report.positions == "renumber"


def test_kept_positions_and_a_method_in_the_decoder_after_it(make_llava, make_batch):
    model, batch = make_llava(vision_layers=4), make_batch("one image")
    prepared = me.prepare(model, "flowcut:tokens=10,positions=keep", **batch)
    start = int((batch["input_ids"][0] == model.config.image_token_id).nonzero()[0])
    kept = (start + prepared.report.images[0].indices).tolist()
    places = prepared.model_kwargs["position_ids"][0].tolist()
    assert set(kept) <= set(places) and len(places) == batch["input_ids"].shape[1] - 26
    with me.compressed(model, "flowcut:tokens=12 | fastv:layer=1,ratio=0.5"):
        model.generate(**batch, max_new_tokens=2)
        (image,) = me.last_report(model).images
        assert image.per_layer == (12, 6, 6) and set(image.indices.tolist()) <= set(range(36))
    with torch.no_grad():
        stock = model(**batch).logits
        with me.compressed(model, "flowcut:keep=1"):
            assert torch.equal(model(**batch).logits, stock)


@pytest.mark.parametrize(
    "spec", ["flowcut:keep=0.4", "flowcut:keep=0.4,entropy=0.3", "flowcut:tokens=2,per=tile", "tome:keep=0.7,at=tower"]
)
@pytest.mark.parametrize("row", ["one image", "two images"])
@pytest.mark.parametrize("name", TILES)
def test_tiles_equal_the_slow_reference(name, row, spec):
    """Every tile has its share; what is left of each goes through the model's own projector token by token."""
    model, inputs, method = tiny(name), make(name, row), me.build(spec)
    found, left, start = visuals(name, model, inputs), [], 0
    double = tiny(name).double()
    tower, layers = tower_of(double), 2
    for visual in found:
        tiles = len(visual.planes)
        k = round(method.keep * visual.n) if method.tokens is None else method.tokens * tiles
        shares = [k // tiles + (i < k % tiles) for i in range(tiles)]
        rows, stay = [], torch.zeros(visual.n, dtype=torch.bool)
        for tile, share in enumerate(shares):
            pixels = inputs["pixel_values"][start + tile][None].double()
            if spec.startswith("flowcut"):
                hidden, stayed = slow_flowcut(tower, pixels, share, layers, 2, method.entropy)
                stay[[9 * tile + t for t in stayed]] = True
            else:
                hidden = slow_tome(tower, pixels, method.in_blocks(9, share, layers), 2)
            with torch.no_grad():
                if name == "internvl":
                    tokens = tower.layernorm(hidden)[1:].unflatten(0, (share, 2, 2))
                    shuffled = torch.cat([double.model.pixel_shuffle(t[None]).flatten()[None] for t in tokens])
                    rows.append(double.model.multi_modal_projector(shuffled))
                else:
                    tokens = tower.post_layernorm(hidden).unflatten(0, (share, 4))
                    rows += [double.model.multi_modal_projector(t[None]).flatten()[None] for t in tokens]
        start += tiles
        features = torch.cat(rows).float()
        left.append(Kept(stay, features) if spec.startswith("flowcut") else merged(visual, features, shares))
    expected = greedy(model, splice(name, model, inputs, found, left, "renumber"))
    with me.compressed(model, method):
        out = model.generate(**inputs, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
        report = me.last_report(model)
    assert out.tolist() == expected
    for image, kept in zip(report.images, left):
        assert image.kept == len(kept.features) and (image.indices is None) == spec.startswith("tome")
        if image.indices is not None:
            assert torch.equal(image.indices, kept.stay.nonzero()[:, 0])


@pytest.mark.parametrize("spec", ["flowcut:keep=0.4", "flowcut:keep=0.4,entropy=0.3", "tome:keep=0.7,at=tower"])
@pytest.mark.parametrize("name", TILES)
def test_a_batch_of_tiles_equals_one_by_one(name, spec):
    model, rows = tiny(name), ("one image", "two images", "text only", "long text")
    with me.compressed(model, spec):
        batch = make(name, *rows)
        together = model.generate(**batch, max_new_tokens=4, num_beams=2)[:, batch["input_ids"].shape[1] :]
        for row, kind in enumerate(rows):
            one = make(name, kind)
            assert torch.equal(model.generate(**one, max_new_tokens=4, num_beams=2)[0, one["input_ids"].shape[1] :], together[row]), kind


@pytest.mark.parametrize("name", TILES)
def test_one_picture_may_keep_all_and_another_not(name):
    """A budget in tokens that is more than a small picture has: that one goes through the stock tower."""
    model, inputs = tiny(name), make(name, "two images")
    full = [visual.n for visual in visuals(name, model, inputs)]
    assert full == [27, 36]
    prepared = me.prepare(model, "flowcut:tokens=30", **inputs)
    assert [(i.kept, i.clamped) for i in prepared.report.images] == [(27, True), (30, False)]
    stock = adapter_for(model).encode(adapter_for(model).items(inputs))[0].features
    features = prepared.model_kwargs["mm_encoder_outputs"]["image"].pooler_output
    assert torch.equal(next(iter(features)), stock)


# ------------------------------------------------------------------------------------------------ what cannot be


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in TILES])
def test_other_families_refuse_by_name(name):
    with pytest.raises(
        me.UnsupportedModelError, match="flowcut works in the tower of .* InternVL or Cohere2 Vision .* has not: use a method"
    ):
        me.wrap(tiny(name), "flowcut:tokens=4")


def test_what_cannot_be_is_one_line(make_llava, make_batch, capsys):
    for entropy in (True, 1.5, "half", -0.1):
        with pytest.raises(me.BadSettingError, match="entropy=.* is not a share of log N from 0 to 1"):
            me.FlowCut(tokens=9, entropy=entropy)
    with pytest.raises(me.UnsupportedModelError, match="here are tokens alone"):
        me.FlowCut(tokens=4).compress(me.VisualTokens(torch.randn(9, 4)), 4)
    with pytest.raises(me.UnsupportedModelError, match="drops in the tower, which vLLM runs as it is; "):
        require_served(me.build("flowcut:tokens=36"))
    with pytest.raises(me.BadBudgetError, match=r"2 token\(s\) for \d parts of an image"):
        me.prepare(tiny("internvl"), "flowcut:tokens=2", **make("internvl", "one image"))
    with pytest.raises(me.UnsupportedModelError, match="vision_feature_layer=-2 of this call, 'default', is another than"):
        me.prepare(make_llava(), "flowcut:tokens=9", **make_batch("one image"), vision_feature_layer=-2)
    batch = make_batch("one image")
    batch["pixel_values"][0, 0, 0, 0] = torch.nan
    with pytest.raises(me.NotFiniteError, match="hold NaN or infinity"):
        me.prepare(make_llava(), "flowcut:tokens=12", **batch)
    assert main(["bench", "--selection", "--method", "flowcut"]) == 2
    assert "does not work on tokens before the language model" in capsys.readouterr().err


def test_show_draws_what_stayed(picture, tmp_path):
    picture(3).save(tmp_path / "a.png")
    argv = ["show", "--image", str(tmp_path / "a.png"), "--method", "flowcut:tokens=36", "--output", str(tmp_path / "b.png")]
    assert main(argv) == 0 and (tmp_path / "b.png").exists()


# ------------------------------------------------------------------------------------------------ what it costs


@pytest.mark.parametrize(
    "spec", ["flowcut:tokens=10,entropy=0.2", "flowcut:keep=0.5,entropy=0.8", "flowcut:tokens=12,entropy=0 | fastv:layer=1,ratio=0.5"]
)
@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_it_costs_what_torch_counts(make_llava, kind, layer, spec):
    model = make_llava(kind, vision_layers=5, vision_feature_layer=layer)
    shape, call = shape_of(model.config, "tiny"), {"text_tokens": 9, "batch_size": 2, "new_tokens": 2}
    closed = cost(shape, method=spec, **call)
    assert count(model, shape, me.build(spec), **call) == Counted(closed.vision, closed.compress, closed.prefill, closed.decode)
    assert closed.vision < cost(shape, **call).vision


@pytest.mark.parametrize("spec", ["flowcut:keep=0.4,entropy=0.3", "flowcut:tokens=3,per=tile,entropy=0.3", "tome:keep=0.7,at=tower"])
@pytest.mark.parametrize("name", TILES)
def test_tiles_cost_what_torch_counts(name, spec):
    model = tiny(name)
    shape, call = shape_of(model.config, "tiny", FAMILIES[name].settings), {"text_tokens": 9, "batch_size": 2, "new_tokens": 2}
    closed = cost(shape, method=spec, **call)
    assert count(model, shape, me.build(spec), **call) == Counted(closed.vision, closed.compress, closed.prefill, closed.decode)
    assert closed.vision < cost(shape, **call).vision


@pytest.mark.slow
def test_a_7b_shape_costs_what_torch_counts():
    from ..measure.test_flops import on_meta

    shape, method = load_shape("llava-1.5-7b"), me.build("flowcut:tokens=64")
    closed = cost(shape, method=method)
    assert count(on_meta("llava-1.5-7b"), shape, method) == Counted(closed.vision, closed.compress, closed.prefill, closed.decode)
    assert closed.vision < cost(shape).vision
