"""PixelPrune: what its rule drops, that nothing is lost, and the towers of Qwen-VL on the patches that stay."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import mllm_efficient as me
from mllm_efficient.compressors.pixelprune import predicted
from mllm_efficient.patches import adapter_for

from ..families import EVERY, noise, process, tiny

FAMILIES = ("qwen2_5_vl", "qwen3_vl")


def reference(pixels, tau):
    """Token by token, from what LOCO-I's edge rule says of it."""
    rows, columns, _ = pixels.shape
    same = lambda a, b: bool(((a - b).abs() <= tau).all())  # noqa: E731
    out = torch.zeros(rows, columns, dtype=torch.bool)
    for r in range(rows):
        for c in range(columns):
            if (r, c) == (0, 0):
                continue
            if r == 0:
                says = pixels[r, c - 1]
            elif c == 0:
                says = pixels[r - 1, c]
            else:
                corner, left, above = pixels[r - 1, c - 1], pixels[r, c - 1], pixels[r - 1, c]
                says = above if same(corner, left) and not same(corner, above) else left
            out[r, c] = same(pixels[r, c], says)
    return out.flatten()


def rebuilt(kept, dropped, rows, columns):
    """The whole picture from the tokens that stay and where they stood, by the same rule on what is rebuilt already."""
    out, left = torch.full((rows, columns, kept.shape[1]), float("nan")), iter(kept)
    for i, gone in enumerate(dropped.tolist()):
        r, c = divmod(i, columns)
        out[r, c] = said_by_neighbours(out, r, c) if gone else next(left)
    return out


def said_by_neighbours(out, r, c):
    """What the rule says of a token that is left out, not the first, from a picture that is rebuilt up to it."""
    if r == 0 or c == 0:
        return out[r, c - 1] if r == 0 else out[r - 1, c]
    corner, before, above = out[r - 1, c - 1], out[r, c - 1], out[r - 1, c]
    return above if torch.equal(corner, before) and not torch.equal(corner, above) else before


@pytest.mark.parametrize("seed", range(20))
def test_the_rule_is_the_slow_one_and_loses_nothing(seed):
    """Pictures of few colours in a few shapes, on which every case of the rule comes up."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (1 + int(torch.randint(9, (1,), generator=generator)) for _ in range(2))
    pixels = torch.randint(0, 2, (rows, columns, 1), generator=generator).float().expand(-1, -1, 3).clone()
    pixels[: rows // 2, : columns // 2] = 0.5
    dropped = predicted(pixels, 0.0)
    assert torch.equal(dropped, reference(pixels, 0.0)) and not dropped[0]
    assert torch.equal(rebuilt(pixels.flatten(0, 1)[~dropped], dropped, rows, columns), pixels)
    near = pixels + 0.01 * torch.rand(pixels.shape, generator=generator)
    assert torch.equal(predicted(near, 0.02), reference(near, 0.02)) and not predicted(near, 0.0)[1:].any()


def document(width=96, height=64):
    """A white page with two blocks of noise on it."""
    page = Image.new("RGB", (width, height), "white")
    page.paste(noise(1, 17, 13), (20, 9))
    page.paste(noise(2, 30, 8), (41, 40))
    return page


def inputs_of(name, picture):
    return process(name, ["user : I what is the big ring ? assistant :"], [[picture]])


def plain_run(model, name, inputs, stay):
    """The stock tower's blocks on tokens that stay, each with its own rotation, under a mask instead of lengths: a slow reference."""
    visual, merge = model.model.visual, 2
    grid = inputs["image_grid_thw"]
    _, height, width = grid[0].tolist()
    seen = {}

    def keep(module, args, kwargs):
        seen.setdefault("calls", []).append((args, kwargs))

    handle = visual.blocks[0].register_forward_pre_hook(keep, with_kwargs=True)
    visual(inputs["pixel_values"], grid_thw=grid)
    handle.remove()
    (x,), how = seen["calls"][0]
    order = torch.arange(height * width // merge**2)
    windows = torch.zeros(len(order), dtype=torch.long)
    if name == "qwen2_5_vl":
        side = visual.window_size // merge // visual.patch_size
        rows, columns = order // (width // merge), order % (width // merge)
        windows = rows // side * 1000 + columns // side
        order = torch.argsort(windows, stable=True)
    patches = stay[order].repeat_interleave(merge**2)
    own = windows[order].repeat_interleave(merge**2)[patches]
    x, rotation = x[patches], tuple(part[patches] for part in how["position_embeddings"])
    deep = []
    for i, block in enumerate(visual.blocks):
        whole = name == "qwen3_vl" or i in visual.fullatt_block_indexes
        groups = [torch.ones(len(x), dtype=torch.bool)] if whole else [own == w for w in own.unique_consecutive()]
        out = torch.empty_like(x)
        for group in groups:
            n = int(group.sum())
            part = tuple(p[group] for p in rotation)
            out[group] = block(x[group], cu_seqlens=torch.tensor([0, n], dtype=torch.int32), max_seqlen=n, position_embeddings=part)
        x = out
        if name == "qwen3_vl" and i in visual.deepstack_visual_indexes:
            deep.append(visual.deepstack_merger_list[visual.deepstack_visual_indexes.index(i)](x))
    return visual.merger(x)[order[stay[order]].argsort()], deep


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_tower_runs_on_what_stays_where_it_stood(name):
    model, inputs = tiny(name), inputs_of(name, document())
    adapter = adapter_for(model)
    (item,) = adapter.items(inputs)
    planned = me.PixelPrune().plan(adapter, item)
    stay = torch.zeros(item.shape.n, dtype=torch.bool)
    stay[list(planned.stay)] = True
    assert 4 < planned.kept < item.shape.n
    (found,) = adapter.reduce_in_tower(me.PixelPrune(), [item], [planned])
    features, deep = plain_run(model, name, inputs, stay)
    torch.testing.assert_close(found.features, features, rtol=1e-4, atol=1e-5)
    for own, other in zip(found.deep, deep, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_prompts_keep_the_tokens_that_stay_with_their_positions(name):
    model, inputs = tiny(name), inputs_of(name, document())
    places = model.model.get_rope_index(
        inputs["input_ids"], mm_token_type_ids=inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )[0]  # fmt: skip
    prepared = me.prepare(model, "pixelprune", **inputs)
    (image,) = prepared.report.images
    token = EVERY[name].image_token
    visual = (inputs["input_ids"][0] == token).nonzero()[:, 0]
    columns = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool)
    columns[visual] = False
    columns[visual[image.indices]] = True
    assert (prepared.model_kwargs["input_ids"][0] == token).sum() == image.kept < image.full
    assert torch.equal(prepared.model_kwargs["position_ids"][-3:, 0], places[:, 0, columns])
    with me.compressed(model, "pixelprune"):
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert me.last_report(model).images[0].kept == image.kept
    assert out.shape[1] == inputs["input_ids"].shape[1] + 4


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_picture_without_repetition_is_left_alone_and_a_batch_is_its_rows(name):
    model = tiny(name)
    alone = inputs_of(name, noise(0, 40, 40))
    with me.compressed(model, "pixelprune"):
        compressed = model(**alone).logits
    assert torch.equal(compressed, model(**alone).logits)
    pictures, text = [noise(0, 40, 40), document(), document(48, 64)], "user : I what is the big ring ? assistant :"
    both = process(name, [text] * 3, [[p] for p in pictures])
    kept = [i.kept for i in me.prepare(model, "pixelprune", **both).report.images]
    assert kept == [me.prepare(model, "pixelprune", **inputs_of(name, p)).report.images[0].kept for p in pictures]
    with me.compressed(model, "pixelprune"):
        said = model.generate(**both, max_new_tokens=4, do_sample=False)[:, -4:]
        one = [model.generate(**inputs_of(name, p), max_new_tokens=4, do_sample=False)[0, -4:] for p in pictures]
    assert torch.equal(said, torch.stack(one))


def test_what_it_cannot_do_is_refused():
    for settings in ({"keep": 0.5}, {"tokens": 9}, {"keep": 1.0, "tokens": 3}):
        with pytest.raises(me.BadBudgetError, match="takes no budget"):
            me.PixelPrune(**settings)
    for settings in ({"tau": -1}, {"tau": True}, {"tau": float("nan")}, {"per": "frame"}):
        with pytest.raises(me.MllmEfficientError):
            me.PixelPrune(**settings)
    with pytest.raises(me.UnsupportedModelError, match="before the tower of Qwen2.5-VL or Qwen3-VL"):
        me.wrap(tiny("llava_next"), "pixelprune")
    model = tiny("qwen3_vl")
    adapter = adapter_for(model)
    with pytest.raises(me.BadBudgetError, match="depends on the pixels"):
        me.PixelPrune().plan(adapter, adapter.of_size((64, 64)))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_another_method_chooses_among_what_stays(name):
    """As by hand: the tower on what stays, the method on its tokens, and what it chooses at its places in the whole picture."""
    model, inputs = tiny(name), inputs_of(name, document())
    adapter = adapter_for(model)
    (item,) = adapter.items(inputs)
    planned = me.PixelPrune().plan(adapter, item)
    (found,) = adapter.reduce_in_tower(me.PixelPrune(), [item], [planned])
    k = round(0.4 * planned.kept)
    chosen = me.DivPrune(tokens=k).select(found.features)
    prepared = me.prepare(model, "divprune:keep=0.4 | pixelprune", **inputs)
    (image,) = prepared.report.images
    assert (image.full, image.kept, image.indices.tolist()) == (item.shape.n, k, found.kept[chosen].tolist())
    assert [stage["method"] for stage in prepared.report.stages] == ["pixelprune", "divprune"]
    (_, features, deep), *_ = prepared.features
    assert torch.equal(features, found.features[chosen]) and all(torch.equal(d, o[chosen]) for d, o in zip(deep, found.deep))
    whole = me.prepare(model, "none", **inputs).model_kwargs["input_ids"][0]
    columns = torch.ones(len(whole), dtype=torch.bool)
    columns[(whole == EVERY[name].image_token).nonzero()[:, 0]] = False
    columns[(whole == EVERY[name].image_token).nonzero()[:, 0][image.indices]] = True
    assert torch.equal(prepared.model_kwargs["input_ids"][0], whole[columns])
    plain = inputs_of(name, noise(0, 40, 40))  # nothing to drop: the second alone
    alone, after = (
        me.prepare(model, spec, **plain).report.images[0].indices for spec in ("divprune:keep=0.4", "pixelprune | divprune:keep=0.4")
    )
    assert torch.equal(alone, after)
    all_of_it = me.prepare(model, "pixelprune | divprune:keep=1", **inputs).report.images[0].indices
    assert all_of_it.tolist() == list(planned.stay)


@torch.no_grad()
def test_in_front_of_a_method_inside_the_decoder():
    model, inputs = tiny("qwen2_5_vl"), inputs_of("qwen2_5_vl", document())
    with me.compressed(model, "pixelprune | random:keep=0.5 | fastv:layer=1,keep=0.8"):
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
        (image,) = me.last_report(model).images
    first = me.prepare(model, "pixelprune | random:keep=0.5", **inputs).report.images[0].kept
    assert image.per_layer[0] == first > image.per_layer[-1]


@pytest.mark.parametrize(
    "spec, says",
    [
        ("pixelprune | visionzip:keep=0.5", "needs attention, keys of the whole picture, of which pixelprune leaves a part"),
        ("pixelprune | divmerge:keep=0.5", "divmerge makes new ones"),
        ("pixelprune:positions=keep | divprune:keep=0.5", "pixelprune: positions='keep' has no effect where divprune follows"),
        ("pixelprune | divprune:keep=0.5,per=frame", "per='frame' has no effect"),
    ],
)
def test_what_cannot_follow_is_refused(spec, says):
    with pytest.raises(me.UnsupportedModelError, match=says):
        me.wrap(tiny("qwen3_vl"), spec)
    with pytest.raises(me.MllmEfficientError, match="of one kind"):
        me.build("pixelprune | divprune:keep=0.5 | uniform:keep=0.5")
