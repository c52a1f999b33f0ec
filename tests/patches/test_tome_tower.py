"""ToMe in the blocks of LLaVA-1.5's tower, against the paper's rule written out token by token in float64."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import mllm_efficient as me
from mllm_efficient.cli import main
from mllm_efficient.measure.counter import Counted, count
from mllm_efficient.measure.flops import cost, shape_of
from mllm_efficient.patches import adapter_for
from mllm_efficient.patches.tower.merge import run_inside
from mllm_efficient.patches.vllm.settings import require_served

from .. import families
from ..conftest import slow_greedy
from ..pairs import for_all

ROWS = ("one image", "two images", "long text", "text only")


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def similarity(a, b):
    lengths = np.sqrt((a * a).sum()) * np.sqrt((b * b).sum())
    return round(float(a @ b) / lengths * 2**30) / 2**30 if lengths else 0.0


@torch.no_grad()
def slow_tower(tower, pixels, rounds):
    """(tokens, D) of one picture. Each token is (row, originals in it, place); those of A that stay come before B."""
    x, has_class = tower.embeddings(pixels), hasattr(tower.embeddings, "class_embedding")
    if hasattr(tower, "pre_layrnorm"):
        x = tower.pre_layrnorm(x)
    tokens = [(row, 1, place) for place, row in enumerate(x[0])]
    for block, pairs in zip(tower.encoder.layers, rounds):
        attention, rows = block.self_attn, torch.stack([row for row, _, _ in tokens])
        normed, heads = block.layer_norm1(rows), attention.num_heads
        q, k, v = (p(normed).unflatten(-1, (heads, -1)).numpy() for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        sizes = np.array([size for _, size, _ in tokens])
        seen = [softmax(q[:, h] @ k[:, h].T / np.sqrt(k.shape[-1]) + np.log(sizes)) @ v[:, h] for h in range(heads)]
        rows = rows + attention.out_proj(torch.tensor(np.concatenate(seen, 1)))
        tokens = [(row, size, place) for row, (_, size, place) in zip(rows, tokens)]
        a, b, keys = list(range(0, len(tokens), 2)), list(range(1, len(tokens), 2)), k.mean(1)
        links = []
        for i in a[1:] if has_class else a:
            found = [similarity(keys[i], keys[j]) for j in b]
            links.append((-max(found), i, b[found.index(max(found))]))
        gone = {i: j for _, i, j in sorted(links)[:pairs]}
        after = [tokens[i] for i in a if i not in gone]
        for j in b:
            parts = [tokens[j], *(tokens[i] for i, into in gone.items() if into == j)]
            size = sum(size for _, size, _ in parts)
            after.append((sum(row * size for row, size, _ in parts) / size, size, tokens[j][2]))
        tokens = [(row + block.mlp(block.layer_norm2(row[None]))[0], size, place) for row, size, place in after]
    assert sum(size for _, size, _ in tokens) == x.shape[1]
    return torch.stack([row for row, _, _ in sorted(tokens, key=lambda token: token[2])])


@for_all("seed", range(200))
def test_it_is_the_slow_matching_in_every_block(make_llava, seed):
    draw = np.random.default_rng(seed)
    kind, layers = ("clip", "siglip")[seed % 2], int(draw.integers(1, 4))
    strategy = {"vision_feature_select_strategy": "full"} if kind == "siglip" else {}
    model = make_llava(kind, image_size=32, vision_layers=layers, seed=seed % 5, **strategy).double()
    tower = adapter_for(model).tower
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if seed % 3 == 0:  # copies, apart from their places
        pixels[..., 16:] = pixels[..., :16]
    k = int(draw.integers(-(-16 // 2**layers), 17))
    rounds = me.ToMe(tokens=k, at="tower").in_blocks(16, k, layers)
    with torch.no_grad():
        found = run_inside(me.ToMe(tokens=k, at="tower"), tower, pixels, rounds)[0][0]
    assert len(found) == k + (kind == "clip")
    torch.testing.assert_close(found, slow_tower(tower, pixels, rounds), rtol=0, atol=1e-9)


@pytest.mark.parametrize("layer", [-1, -2, 1, 0])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_without_pairs_it_is_the_tower(make_llava, kind, layer):
    tower = adapter_for(make_llava(kind, vision_layers=3)).tower
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    blocks = layer if layer >= 0 else 4 + layer
    with torch.no_grad():
        stock = tower(pixels, output_hidden_states=True).hidden_states[layer]
        found, _ = run_inside(me.ToMe(tokens=9, at="tower"), tower, pixels, (0,) * blocks)
        torch.testing.assert_close(found, stock, rtol=1e-5, atol=1e-5)


def test_copies_merge_first_and_the_class_token_never():
    """Four pairs of equal keys in a tower of one block, and a class token like all of them."""
    from mllm_efficient.compressors.tome import match, merged

    keys = torch.eye(4)[[0, 0, 0, 1, 1, 2, 2, 3, 3]][None]
    into, stays = match(keys, 3, first=1)  # A: 0, 2, 4, 6, 8; B: 1, 3, 5, 7
    assert into.tolist() == [[0, 1, 1, 3, 3, 5, 5, 7, 8]] and stays.tolist() == [[0, 8, 1, 3, 5, 7]]
    x, size = merged(torch.arange(9.0).view(1, 9, 1), torch.ones(1, 9, 1), into, stays)
    assert x.flatten().tolist() == [0, 8, 1.5, 3.5, 5.5, 7] and size.flatten().tolist() == [1, 1, 2, 2, 2, 1]
    both = match(torch.cat([keys, keys.flip(1)]), 3, first=1)
    assert torch.equal(both[0][:1], into) and torch.equal(both[1][:1], stays)


def test_pairs_are_spread_over_the_blocks():
    method = me.ToMe(tokens=64, at="tower")
    assert method.in_blocks(576, 64, 23) == (*[23] * 22, 6) and sum(method.in_blocks(576, 1, 23)) == 575
    assert me.ToMe(tokens=64, at="tower", r=100).in_blocks(576, 64, 8) == (100, 100, 100, 100, 88, 24, 0, 0)
    assert method.in_blocks(576, 200, 2) == (188, 188) and method.in_blocks(576, 150, 2) == (276, 150)
    with pytest.raises(me.BadBudgetError, match="r=3 pairs in each of 23 blocks leave 507 of 576 tokens, not 64"):
        me.ToMe(tokens=64, at="tower", r=3).in_blocks(576, 64, 23)
    with pytest.raises(me.BadBudgetError, match="half of the tokens in each of 2 blocks leave 144 of 576 tokens, not 64"):
        method.in_blocks(576, 64, 2)


# ------------------------------------------------------------------------------------------------ in models


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("layer", [-1, -2])
def test_generate_equals_the_slow_reference(make_llava, make_batch, kind, layer):
    model = make_llava(kind, vision_layers=3, vision_feature_layer=layer)
    batch, blocks = make_batch(*ROWS), 4 + layer
    double = copy.deepcopy(model).double()
    rounds = me.ToMe(tokens=10, at="tower").in_blocks(36, 10, blocks)
    me.wrap(model, "tome:tokens=10,at=tower")
    out = model.generate(**batch, max_new_tokens=5)[:, batch["input_ids"].shape[1] :]
    report = me.last_report(model)
    assert [(i.full, i.kept, i.indices, i.kept_planes[0].placed) for i in report.images] == [(36, 10, None, False)] * 4
    assert report.positions == "renumber" and report.stages == ({"method": "tome", "tokens": 10, "at": "tower"},)
    for row, kind_of_row in enumerate(ROWS):
        one = make_batch(kind_of_row)
        pixels = one.get("pixel_values", torch.zeros(0, 3, 48, 48))
        hidden = [slow_tower(adapter_for(double).tower, p[None].double(), rounds) for p in pixels]
        with torch.no_grad():
            visual = [double.model.multi_modal_projector(h[1:] if kind == "clip" else h).float() for h in hidden]
        assert out[row].tolist() == slow_greedy(model, one["input_ids"][0], visual, 36, 5), kind_of_row
    me.unwrap(model)
    with torch.no_grad(), me.compressed(model, "tome:keep=1,at=tower"):
        whole = model(**batch).logits
    assert torch.equal(whole, model(**batch).logits)


def test_beams_a_second_turn_and_half_precision(make_llava, make_batch):
    model, batch = make_llava(), make_batch("one image", "two images")
    with me.compressed(model, "tome:tokens=9,at=tower | fastv:layer=1,ratio=0.5"):
        together = model.generate(**batch, max_new_tokens=4, num_beams=2)[:, batch["input_ids"].shape[1] :]
        for row, kind in enumerate(("one image", "two images")):
            one = make_batch(kind)
            assert torch.equal(together[row], model.generate(**one, max_new_tokens=4, num_beams=2)[0, one["input_ids"].shape[1] :])
        first = model.generate(**batch, max_new_tokens=2, return_dict_in_generate=True)
        assert first.compression.tokens_per_layer == [27, 12, 12]
        more = torch.cat([first.sequences, torch.tensor([[20, 21]] * 2)], 1)
        mask = torch.cat([batch["attention_mask"], torch.ones(2, 4, dtype=torch.long)], 1)
        model.generate(input_ids=more, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=2)
    half = make_llava().bfloat16()
    with me.compressed(half, "tome:tokens=9,at=tower"):
        half.generate(**{k: v.bfloat16() if k == "pixel_values" else v for k, v in batch.items()}, max_new_tokens=2)
        assert [i.kept for i in me.last_report(half).images] == [9] * 3


def test_gradients_reach_the_tower(make_llava, make_batch):
    model, batch = make_llava(), make_batch("one image")
    with me.compressed(model, "tome:tokens=9,at=tower"):
        model(**batch, labels=batch["input_ids"].masked_fill(batch["input_ids"] == model.config.image_token_id, -100)).loss.backward()
    tower = adapter_for(model).tower
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tower.encoder.parameters())


# ------------------------------------------------------------------------------------------------ what cannot be


@pytest.mark.parametrize("name", ["llava_next", "llava_next_video", "llava_onevision", "qwen2_vl", "qwen2_5_vl"])
def test_other_families_refuse_by_name(name):
    with pytest.raises(
        me.UnsupportedModelError, match="tome works in the tower of a LLaVA-1.5, InternVL .* which .* has not: leave at= out"
    ):
        me.wrap(copy.deepcopy(families.tiny(name)), "tome:tokens=4,at=tower")


def test_nan_is_refused(make_llava, make_batch):
    batch = make_batch("one image")
    batch["pixel_values"][0, 0, 0, 0] = torch.nan
    with pytest.raises(me.CountMismatchError, match="the tower's tokens hold NaN or infinity"):
        me.prepare(make_llava(), "tome:tokens=12,at=tower", **batch)


def test_what_cannot_be_is_one_line(make_llava, make_batch, tmp_path, capsys):
    with pytest.raises(me.BadBudgetError, match="at='mlp' is not one of 'projector', 'tower'"):
        me.build("tome:tokens=9,at=mlp")
    for settings in ({"vision_feature_select_strategy": "full"}, {"vision_feature_layer": (-2, -1)}):
        with pytest.raises(me.UnsupportedModelError, match="that gives the patches of one layer"):
            me.wrap(make_llava(**settings), "tome:tokens=9,at=tower")
    with pytest.raises(me.UnsupportedModelError, match="tome merges in the tower, and tokenflex gives as many tokens"):
        me.wrap(make_llava(), "tokenflex:tokens=16,weights=random | tome:tokens=9,at=tower")
    with pytest.raises(me.BadBudgetError, match="half of the tokens in each of 2 blocks leave 9 of 36 tokens, not 4"):
        me.wrap(make_llava(), "tome:tokens=4,at=tower")
    with pytest.raises(me.UnsupportedModelError, match="here are tokens alone"):
        me.build("tome:tokens=4,at=tower").compress(me.VisualTokens(torch.randn(9, 4)), 4)
    with pytest.raises(me.UnsupportedModelError, match="vision_feature_layer=-2 of this call, 'default', is another than"):
        me.prepare(make_llava(), "tome:tokens=9,at=tower", **make_batch("one image"), vision_feature_layer=-2)
    with pytest.raises(me.UnsupportedModelError, match="merges in the tower, which vLLM runs as it is"):
        require_served(me.build("tome:tokens=36,at=tower"))
    assert main(["bench", "--selection", "--method", "tome:at=tower"]) == 2
    assert "does not work on tokens before the language model" in capsys.readouterr().err


def test_show_draws_what_merges_behind_the_tower_and_names_what_merges_inside(picture, tmp_path, capsys):
    picture(3).save(tmp_path / "a.png")
    argv = ["show", "--image", str(tmp_path / "a.png"), "--output", str(tmp_path / "b.png"), "--method"]
    assert main([*argv, "tome:tokens=36,at=tower"]) == 2
    assert "without a place on the picture" in capsys.readouterr().err and not (tmp_path / "b.png").exists()
    assert main([*argv, "tome:tokens=36,at=projector"]) == 0 and (tmp_path / "b.png").exists()


# ------------------------------------------------------------------------------------------------ what it costs


@pytest.mark.parametrize(
    "spec", ["tome:tokens=10,at=tower", "tome:keep=0.5,at=tower,r=9", "tome:tokens=12,at=tower | fastv:layer=1,ratio=0.5"]
)
@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_it_costs_what_torch_counts(make_llava, kind, layer, spec):
    model = make_llava(kind, vision_layers=3, vision_feature_layer=layer)
    shape, call = shape_of(model.config, "tiny"), {"text_tokens": 9, "batch_size": 2, "new_tokens": 2}
    closed = cost(shape, method=spec, **call)
    assert count(model, shape, me.build(spec), **call) == Counted(closed.vision, closed.compress, closed.prefill, closed.decode)
    assert closed.vision < cost(shape, **call).vision


def test_a_7b_shape_costs_what_torch_counts():
    from mllm_efficient.measure.flops import load_shape

    from ..measure.test_flops import on_meta

    shape, method = load_shape("llava-1.5-7b"), me.build("tome:tokens=64,at=tower")
    closed = cost(shape, method=method)
    assert count(on_meta("llava-1.5-7b"), shape, method) == Counted(closed.vision, closed.compress, closed.prefill, closed.decode)
