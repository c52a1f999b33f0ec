"""Anyres, tiled, video and M-RoPE families: bit-equal where nothing is removed, else equal to a slow reference by hand.

The traps of hooking compressors into transformers, by number, and what would fail without the guard against each:

 1. ``generate`` with beams changes ``mm_encoder_outputs`` in place: test_trap_01 here, for every container the families
    have, and test_prepare.py::test_model_kwargs_serve_two_calls_with_beams.
 2. Features of different lengths joined to one tensor mix up the rows of beams: test_trap_02.
 3. A reduced cache with full ids gives wrong tokens without an error: test_trap_03 for M-RoPE positions, and
    test_wrapper.py::test_wrong_lengths_on_a_compressed_cache_raise_in_forward, ..._raise_in_generate and
    test_a_second_turn_on_the_cache_equals_the_slow_reference.
 4. A 2-D mask wider than the keys is cut without an error: test_trap_04 on rows of different lengths, and
    test_wrapper.py::test_a_decode_loop_over_forward_equals_generate, test_embeddings_on_a_compressed_cache_are_refused.
 5. Masks made in the middle of a forward, and one mask for layers of two kinds: nothing is shortened between layers
    here; test_trap_05 holds mixed sliding and full layers against the reference, in the stock forward.
 6. Prompt lookup and assisted decoding put prompt and draft into one forward: test_trap_06 on M-RoPE positions, and
    test_wrapper.py::test_prompt_lookup_equals_the_slow_reference, test_every_greedy_mode_equals_the_slow_reference.
 7. The first token after left padding would be learned from padding: test_trap_07, and
    test_prepare.py::test_labels_follow_their_tokens.
 8. ``pixel_values`` beside ``mm_encoder_outputs`` is an error, and grids of the full picture beside the reduced prompt
    are another: test_trap_08.
 9. ``base_model`` is another module under PEFT: test_generate_under_lora_equals_the_explicit_path here, and
    test_hosts.py::test_generate_equals_the_explicit_path_on_the_plain_model.
10. Bound methods on an instance survive a deep copy pointing at the old model: test_trap_10, and
    test_hosts.py::test_a_deep_copy_is_wrapped_on_its_own.
11. An image with no token left breaks the matching of images to rows in beams: test_trap_11, and
    test_budget.py::test_at_least_one_token_is_kept.
12. A sliding window counts kept tokens: test_trap_12 holds it as it is documented.
13. Logits processors see the shortened prompt: test_trap_13 holds it as it is documented.
"""

from __future__ import annotations

import copy
import functools
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, adaptive_max_pool2d, cross_entropy, interpolate
from transformers.models.llava_next.modeling_llava_next import unpad_image

import mllm_efficient as me
from mllm_efficient.apply.prepare import encode
from mllm_efficient.budget import fit_grid
from mllm_efficient.compressors.base import generator_for
from mllm_efficient.patches import transformers_version

from .families import (
    ASPECTS,
    FAMILIES,
    MROPE,
    PAD,
    SPECIAL,
    VOCABULARY,
    WITH_VIDEO,
    Kept,
    Row,
    Visual,
    aspect_batch,
    canvas,
    chosen,
    everything,
    extended,
    greedy,
    logits,
    make,
    merged,
    noise,
    patchify,
    process,
    splice,
    tiny,
    unpatchify,
    visuals,
)

NEW = dict(max_new_tokens=6)
TILED = tuple(f.name for f in FAMILIES.values() if f.tiled)
NEWLINES = tuple(f.name for f in FAMILIES.values() if f.newlines)
PARTS = {name: [*(["tile"] if name in TILED else []), *(["frame"] if name in WITH_VIDEO else [])] for name in FAMILIES}


def methods_to_try(keep: float) -> list[str]:
    """A specification of every method these families can run as it is, those that are yet to be written included."""
    out = []
    for name in me.list_methods():
        cls = me.get_method(name)
        if cls.kind == "pre_llm" and not cls.trained and set(cls.needs) <= {"text", "grid"}:
            out.append("none" if name == "none" else f"{name}:keep={keep}")
    return out


METHODS = methods_to_try(0.3)


def answer(model: Any, inputs: dict[str, Any], **how: Any) -> Tensor:
    """The new tokens (B, 6)."""
    return model.generate(**inputs, **{**NEW, **how})[:, inputs["input_ids"].shape[1] :]


def share(method: Any, n: int) -> int:
    """K of n tokens."""
    return min(method.tokens, n) if method.tokens else max(1, round(method.keep * n))


def rectangles(visual: Visual, by_part: bool) -> list[tuple[Tensor, tuple[int, int]]]:
    """Indices among the N tokens and (rows, columns) of every plane, or of what comes from one tile or frame."""
    out, start = [], 0
    for rows, columns in visual.planes:
        own = torch.arange(start, start + rows * columns)
        for part in visual.parts[own].unique() if by_part else [None]:
            here = own if part is None else own[visual.parts[own] == part]
            out.append((here, (len(((here - start) // columns).unique()), len(((here - start) % columns).unique()))))
        start += rows * columns
    return out


def pooled(method: Any, visual: Visual, separately: bool) -> Kept:
    """Adaptive pooling of every plane to its share of the budget."""
    k, areas = share(method, visual.n), rectangles(visual, separately)
    if separately:
        shares = [share(method, len(indices)) for indices, _ in areas]
    else:
        shares = [k] if len(areas) == 1 else [max(1, k * len(indices) // visual.n) for indices, _ in areas]
        while sum(shares) > k:  # the parts that were given the one token they cannot do without
            shares[shares.index(max(shares))] -= 1
    grids = [fit_grid(grid, one) for (_, grid), one in zip(areas, shares)]
    if grids == [grid for _, grid in areas]:
        return everything(visual)
    pooling = adaptive_avg_pool2d if method.op == "avg" else adaptive_max_pool2d

    def smaller(features: Tensor) -> Tensor:
        tokens = features[~visual.newline]
        parts = [pooling(tokens[i].T.reshape(1, -1, *g), small).flatten(2)[0].T for (i, g), small in zip(areas, grids)]
        return torch.cat(parts)

    counts, start = [], 0
    for rows, columns in visual.planes:
        counts.append(sum(h * w for (i, _), (h, w) in zip(areas, grids) if start <= i[0] < start + rows * columns))
        start += rows * columns
    return merged(visual, smaller(visual.features), counts, (len(grids), *grids[0]), [smaller(d) for d in visual.deep])


def refused(spec: str, name: str) -> bool:
    """Whether a method merges by content where later layers add features, which cannot follow."""
    method = me.build(spec)
    return name == "qwen3_vl" and isinstance(method, me.Merger) and not method.channelwise


def merged_anew(method: Any, visual: Visual) -> Kept:
    """A merger asked plane by plane with its share, or, if it needs no grid, once for all of an image."""
    k, areas = share(method, visual.n), rectangles(visual, False)
    if "grid" not in method.needs:
        out, counts = method.merge(me.VisualTokens(visual.tokens), k).features, []
        for rows, columns in visual.planes:  # the first slots of all
            counts.append(min(rows * columns, k - sum(counts)))
        return merged(visual, out, counts, (1, 1, k))
    shares = [max(1, k * len(indices) // visual.n) for indices, _ in areas] if len(areas) > 1 else [k]
    while sum(shares) > k:
        shares[shares.index(max(shares))] -= 1
    sizes = [method.yields(one, grid) for (_, grid), one in zip(areas, shares)]

    def smaller(features: Tensor) -> Tensor:
        tokens = features[~visual.newline]
        return torch.cat([method.merge(me.VisualTokens(tokens[i], grid=g), one).features for (i, g), one in zip(areas, shares)])

    return merged(visual, smaller(visual.features), sizes, (len(sizes), 1, sizes[0]), [smaller(d) for d in visual.deep])


def by_hand(spec: str, visual: Visual, key: int, text: Tensor | None = None) -> Kept:
    """What ``spec`` leaves of one image or video, the ``key``-th of its row. text: (T, D) of the row."""
    method = me.build(spec)
    separately = method.per == ("frame" if visual.modality == "video" else "tile")
    if method.name == "pool":
        return pooled(method, visual, separately)
    if method.merges:
        return merged_anew(method, visual)
    areas = rectangles(visual, separately)
    groups = areas if separately or len(areas) == 1 else [(torch.arange(visual.n), None)]
    generator = generator_for(method, key)
    picked = [
        i[method.select(me.VisualTokens(visual.tokens[i], grid=grid, text=text, generator=generator), share(method, len(i)))]
        for i, grid in groups
    ]
    return chosen(visual, torch.cat(picked).sort().values, method.newline)


def position_rule(name: str, spec: str) -> str:
    return me.build(spec).positions or ("keep" if name in MROPE else "renumber")


def sequence(name: str, model: Any, spec: str, inputs: dict[str, Any]):
    """One row as ``spec`` leaves it, ready for the bare language model."""
    found, ids = visuals(name, model, inputs), inputs["input_ids"][0]
    family = FAMILIES[name]
    text = model.get_input_embeddings()(ids[(ids != family.image_token) & (ids != family.video_token)])
    return splice(name, model, inputs, found, [by_hand(spec, v, i, text) for i, v in enumerate(found)], position_rule(name, spec))


def types(name: str, ids: Tensor) -> dict[str, Tensor]:
    """mm_token_type_ids, where the family's processor gives them."""
    family = FAMILIES[name]
    return {"mm_token_type_ids": (ids == family.image_token).int() + 2 * (ids == family.video_token).int()} if family.mrope else {}


def cases(specs: list[str], families: Any, kinds: tuple[str, ...] | None = None) -> list:
    """(spec, family, row) of every row with an image or a video."""
    return [
        pytest.param(spec, name, row, id=f"{spec}-{name}-{row}")
        for spec in specs
        for name in families
        for row in kinds or FAMILIES[name].rows
        if row != "text only" and row in FAMILIES[name].rows
    ]


# ------------------------------------------------------------------------------------------------ the reference itself


@pytest.mark.parametrize("name", FAMILIES)
def test_the_slow_reference_with_everything_kept_is_stock_generate(name):
    model = tiny(name)
    for row in FAMILIES[name].rows:
        inputs = make(name, row)
        found = visuals(name, model, inputs)
        whole = splice(name, model, inputs, found, [everything(v) for v in found], "keep" if name in MROPE else "renumber")
        assert greedy(model, whole) == answer(model, inputs)[0].tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_slow_reference_tells_methods_positions_and_pictures_apart(name):
    """Otherwise equality with it would say little."""
    model, inputs = tiny(name), make(name, "one image")
    specs = ("uniform:keep=1", "uniform:keep=0.25", "divprune:keep=0.25", "pool:keep=0.25", "uniform:keep=0.25,positions=keep")
    specs += ("uniform:keep=0.25,positions=renumber",) if name in MROPE else ()
    rows = {spec: sequence(name, model, spec, inputs) for spec in specs}
    if name in MROPE:  # the default is one of the two
        del rows["uniform:keep=0.25,positions=keep"]
    found = [logits(model, row)[-1] for row in rows.values()]
    assert all((a - b).abs().max() > 0.05 for i, a in enumerate(found) for b in found[:i])


def test_patches_and_frames_are_each_others_inverse():
    frames = torch.rand(4, 3, 16, 24)
    flat, grid = patchify(frames, 4)
    assert torch.equal(unpatchify(flat, grid, 4), frames)


# ------------------------------------------------------------------------------------------------ identity

IDENTITIES = ("none", "divprune:keep=1", "random:tokens=100000", "pool:keep=1", "resize:keep=1", "uniform:keep=1,positions=keep")


@pytest.mark.parametrize("kind", ["one row", "batch"])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("spec", IDENTITIES)
def test_keeping_everything_leaves_the_call_alone(spec, name, kind):
    model = tiny(name)
    inputs = make(name, *(FAMILIES[name].mixed if kind == "batch" else ["one image"]))
    prepared = me.prepare(model, spec, **inputs)
    assert prepared.layout is None and prepared.visual_keep_mask.all()
    assert prepared.model_kwargs.keys() == inputs.keys() and all(prepared.model_kwargs[k] is inputs[k] for k in inputs)
    assert prepared.report.visual_tokens_kept == prepared.report.visual_tokens_full > 0
    assert all(i.separators_kept == i.separators_full for i in prepared.report.images)
    with torch.no_grad():
        stock, expected = model(**inputs).logits, answer(model, inputs)
        me.wrap(model, spec)
        assert torch.equal(model(**inputs).logits, stock)
        assert torch.equal(answer(model, inputs), expected)


@pytest.mark.parametrize("name", [f for f in FAMILIES if PARTS[f]])
def test_keeping_everything_of_every_part_leaves_the_call_alone(name):
    model, inputs = tiny(name), make(name, *FAMILIES[name].mixed)
    for part in PARTS[name]:
        prepared = me.prepare(model, f"uniform:keep=1,per={part}", **inputs)
        assert all(prepared.model_kwargs[k] is inputs[k] for k in inputs)


@pytest.mark.parametrize("name", FAMILIES)
def test_keeping_everything_through_mm_encoder_outputs_is_bit_equal(name):
    model, inputs = tiny(name), make(name, *FAMILIES[name].mixed)
    prepared = me.prepare(model, "divprune:keep=1", encoded=encode(model, "divprune:keep=1", **inputs), **inputs)
    assert not {"pixel_values", "pixel_values_videos"} & prepared.model_kwargs.keys()
    with torch.no_grad():
        assert torch.equal(model(**prepared.model_kwargs).logits, model(**inputs).logits)
    assert torch.equal(model.generate(**prepared.model_kwargs, **NEW), model.generate(**inputs, **NEW))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_text_only_call_is_untouched(name):
    model, inputs = tiny(name), make(name, "text only", "text only")
    expected = answer(model, inputs)
    assert me.prepare(model, "divprune:keep=0.3", **inputs).report.images == ()
    me.wrap(model, "divprune:keep=0.3")
    assert torch.equal(answer(model, inputs), expected) and me.last_report(model).images == ()


# ------------------------------------------------------------------------------------------------ the slow reference

SELECTORS = ["divprune:keep=0.25", "random:keep=0.25", "uniform:keep=0.25", "divprune:tokens=7", "cdpruner:keep=0.25"]
MERGERS = ["tome:keep=0.3", "spp:keep=0.3"]
POOLS = ["pool:keep=0.3", "pool:keep=0.3,op=max"]
ONE = ("one image", "two images", "video and image")
FRAMED = ("video", "video and image")


def equals_reference(spec: str, name: str, row: str) -> None:
    model, inputs = tiny(name), make(name, row)
    expected = sequence(name, model, spec, inputs)
    prepared = me.prepare(model, spec, **inputs)
    mask = torch.zeros(inputs["input_ids"].shape[1], dtype=torch.bool)
    mask[expected.columns] = True
    if not me.build(spec).merges:
        assert torch.equal(prepared.visual_keep_mask[0], mask)
    with torch.no_grad():
        # One pass with a cache against one without: the order of summation differs.
        torch.testing.assert_close(model(**prepared.model_kwargs).logits[0], logits(model, expected), atol=1e-4, rtol=1e-4)
    wanted = greedy(model, expected)
    assert answer(me.wrap(model, spec), inputs)[0].tolist() == wanted


@pytest.mark.parametrize("spec, name, row", cases(SELECTORS, FAMILIES))
def test_greedy_of_a_selector_equals_the_slow_reference(spec, name, row):
    equals_reference(spec, name, row)


@pytest.mark.parametrize("spec, name, row", [c for c in cases(MERGERS, FAMILIES) if not refused(*c.values[:2])])
def test_greedy_of_a_merger_equals_the_slow_reference(spec, name, row):
    equals_reference(spec, name, row)


@pytest.mark.parametrize("spec, name, row", cases(POOLS, FAMILIES))
def test_greedy_of_pooling_equals_the_slow_reference(spec, name, row):
    equals_reference(spec, name, row)


@pytest.mark.parametrize(
    "spec, name, row", cases(["divprune:keep=0.25,newline=keep", "uniform:keep=0.5,newline=keep,positions=keep"], NEWLINES)
)
def test_greedy_with_newline_columns_kept_equals_the_slow_reference(spec, name, row):
    equals_reference(spec, name, row)


@pytest.mark.parametrize("spec, name, row", [
    *cases([f"{spec},per=tile" for spec in ("divprune:keep=0.25", "random:tokens=2", "pool:keep=0.3")], TILED, ONE),
    *cases([f"{spec},per=frame" for spec in ("divprune:keep=0.25", "random:tokens=2", "pool:keep=0.5")], WITH_VIDEO, FRAMED),
])  # fmt: skip
def test_greedy_with_a_budget_for_each_part_equals_the_slow_reference(spec, name, row):
    equals_reference(spec, name, row)


@pytest.mark.parametrize("spec, name, row", [
    *cases(["divprune:keep=0.25,positions=keep"], [f for f in FAMILIES if f not in MROPE]),
    *cases(["divprune:keep=0.25,positions=renumber", "uniform:tokens=1,positions=renumber"], MROPE),
    *cases(["divprune:keep=0.25,positions=keep"], MROPE, ONE),
])  # fmt: skip
def test_greedy_with_the_other_position_rule_equals_the_slow_reference(spec, name, row):
    equals_reference(spec, name, row)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("spec", ["divprune:keep=0.3", "pool:keep=0.3"])
def test_every_row_of_a_padded_batch_equals_the_slow_reference(spec, name):
    model, rows = tiny(name), FAMILIES[name].mixed
    expected = [greedy(model, sequence(name, model, spec, make(name, row))) for row in rows]
    assert answer(me.wrap(model, spec), make(name, *rows)).tolist() == expected


# ------------------------------------------------------------------------------------------------ resize


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("keep", [0.6, 0.3])
def test_resize_keeps_at_most_its_budget_and_repeats_itself(name, keep):
    model = tiny(name)
    for row in FAMILIES[name].rows:
        inputs = make(name, row)
        report = me.prepare(model, f"resize:keep={keep}", **inputs).report
        assert all(1 <= i.kept <= max(1, round(keep * i.full)) and i.indices is None for i in report.images)
        assert [i.full for i in report.images] == [v.n for v in visuals(name, model, inputs)]
        with me.compressed(model, f"resize:keep={keep}"):
            assert torch.equal(answer(model, inputs), answer(model, inputs))


@pytest.mark.parametrize("spec, name, row", cases(["resize:keep=0.5", "resize:tokens=4"], MROPE))
def test_resize_on_mrope_is_the_stock_model_on_the_smaller_picture(spec, name, row):
    model, inputs = tiny(name), make(name, row)
    found = visuals(name, model, inputs)
    small, stays = dict(inputs), torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool)
    pixels: dict[str, list[Tensor]] = {"image": [], "video": []}
    grids: dict[str, list] = {"image": [], "video": []}
    at = {"image": 0, "video": 0}
    keys = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}
    for visual in found:
        t, h, w = visual.grid
        flat = inputs[keys[visual.modality][0]][at[visual.modality] : at[visual.modality] + t * h * w]
        at[visual.modality] += t * h * w
        k = share(me.build(spec), visual.n)
        # The largest picture of the same shape within the budget, by trying every scale.
        sizes = {(max(1, int(h / 2 * s / 2000 + 0.5)), max(1, int(w / 2 * s / 2000 + 0.5))) for s in range(1, 2001)}
        rows, columns = max((g for g in sizes if t * g[0] * g[1] <= k), key=lambda g: g[0] * g[1])
        frames = interpolate(unpatchify(flat, (t, h, w), 4), (rows * 8, columns * 8), mode="bicubic", antialias=True)
        patches, grid = patchify(frames, 4)
        pixels[visual.modality].append(patches)
        grids[visual.modality].append(grid)
        for frame in range(t):  # in every frame's own run of placeholders
            columns_of = visual.columns[visual.parts == frame]
            stays[columns_of[rows * columns :]] = False
    for modality, (values, thw) in keys.items():
        if pixels[modality]:
            small[values], small[thw] = torch.cat(pixels[modality]), torch.tensor(grids[modality])
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        small[key] = inputs[key][:, stays]
    expected = answer(model, small)
    me.wrap(model, spec)
    assert torch.equal(answer(model, inputs), expected)
    assert me.last_report(model).visual_tokens_kept == sum(t * h * w // 4 for g in grids.values() for t, h, w in g)


def small_tiles(name: str, model: Any, pixels: Tensor, side: int) -> Tensor:
    """(tiles, side * side, D) of tiles (tiles, C, H, W) made smaller, position embeddings interpolated, by the tower itself."""
    size = side * (8 if FAMILIES[name].in_prompt else model.config.vision_config.patch_size)
    pixels = interpolate(pixels, (size, size), mode="bicubic", antialias=True)
    if FAMILIES[name].in_prompt:
        how = {"interpolate_pos_encoding": True} if name == "cohere2_vision" else {}
        return model.model.get_image_features(pixel_values=pixels, return_dict=True, **how).pooler_output
    states = model.model.vision_tower(pixels, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
    features = states[model.config.vision_feature_layer]
    if model.config.vision_feature_select_strategy == "default":
        features = features[:, 1:]
    return model.model.multi_modal_projector(features)


def small_image(name: str, model: Any, tiles: Tensor, side: int, size: Tensor | None, newline: bool) -> tuple[Tensor, int]:
    """(length, D) of a picture whose tiles have side x side tokens, put together as the family does, and its tokens."""
    if FAMILIES[name].in_prompt:
        return tiles.flatten(0, 1), tiles.shape[0] * tiles.shape[1]
    base, ending = tiles[0], model.model.image_newline[None]
    if len(tiles) == 1:
        return torch.cat([base, ending]) if newline else base, len(base)
    down, across = canvas(model, size, True)
    table = tiles[1:].reshape(down, across, side, side, -1).permute(4, 0, 2, 1, 3).reshape(-1, down * side, across * side)
    table = unpad_image(table, size.tolist())
    if name == "llava_onevision":  # at most four tiles' worth
        ratio = math.sqrt(table.shape[1] * table.shape[2] / (4 * side**2))
        if ratio > 1.1:
            table = interpolate(table[None], [int(table.shape[1] // ratio), int(table.shape[2] // ratio)], mode="bilinear")[0]
    n = len(base) + table.shape[1] * table.shape[2]
    if newline:
        table = torch.cat([table, ending.T[:, None].expand(-1, table.shape[1], 1)], 2)
    return torch.cat([base, table.flatten(1).T]), n


@pytest.mark.parametrize("spec, name, row", [
    *cases(["resize:keep=0.5", "resize:keep=0.25"], TILED, ("one image", "two images", "long text")),
    *cases(["resize:keep=0.4,newline=keep"], NEWLINES, ("one image", "two images", "long text")),
])  # fmt: skip
def test_resize_makes_every_tile_smaller_and_packs_as_the_family_does(spec, name, row):
    model, inputs, method = tiny(name), make(name, row), me.build(spec)
    found, kept, at, largest = visuals(name, model, inputs), [], 0, math.isqrt(visuals(name, model, inputs)[0].planes[0][0] ** 2)
    for i, visual in enumerate(found):
        count = len(visual.planes) if FAMILIES[name].in_prompt else 1 + (len(visual.planes) > 1 and len(visual.parts.unique()) - 1)
        pixels = inputs["pixel_values"][at : at + count] if FAMILIES[name].in_prompt else inputs["pixel_values"][i][:count]
        size, at = None if FAMILIES[name].in_prompt else inputs["image_sizes"][i], at + count
        with torch.no_grad():
            for side in range(largest, 0, -1):
                features, n = small_image(name, model, small_tiles(name, model, pixels, side), side, size, method.newline == "keep")
                if n <= share(method, visual.n):
                    break
        kept.append((features, n))
    embeds = []
    ids, columns = inputs["input_ids"][0], {}
    for visual, (features, _) in zip(found, kept):
        pieces = len(visual.planes) if FAMILIES[name].in_prompt else 1  # text may stand between tiles: each keeps its own place
        for first, piece in zip(visual.columns[:: len(visual.columns) // pieces], features.chunk(pieces)):
            columns[int(first)] = piece
    inside = {int(c) for v in found for c in v.columns}
    with torch.no_grad():
        for column, token in enumerate(ids):
            if column in columns:
                embeds.append(columns[column])
            elif column not in inside:
                embeds.append(model.get_input_embeddings()(token[None]))
    whole = torch.cat(embeds)[None]
    length = whole.shape[1]
    row_ = Row(whole, torch.arange(length)[None], length, torch.zeros(1, length, dtype=torch.bool), (), torch.arange(length))
    wanted = greedy(model, row_)
    assert answer(me.wrap(model, spec), inputs)[0].tolist() == wanted
    assert [i.kept for i in me.last_report(model).images] == [n for _, n in kept]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_picture_that_cannot_be_made_small_enough_is_refused(name):
    model, inputs = tiny(name), make(name, "video" if name in WITH_VIDEO else "one image")
    with pytest.raises(me.MllmEfficientError):
        me.prepare(model, "resize:tokens=1", **inputs)


# ------------------------------------------------------------------------------------------------ batches


@functools.cache
def alone(spec: str, name: str, row: str, beams: int) -> Tensor:
    return answer(me.wrap(tiny(name), spec), make(name, row), num_beams=beams)[0]


@pytest.mark.parametrize("beams", [1, 3], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("spec", METHODS, ids=[spec.split(":")[0] for spec in METHODS])
def test_batch_equals_one_by_one(spec, name, beams):
    inputs = make(name, *FAMILIES[name].mixed)
    if refused(spec, name):
        with pytest.raises(me.UnsupportedModelError, match="merges by content"):
            me.wrap(tiny(name), spec)
        return
    if (spec, name, beams) == ("none", "llava_next_video", 3) and transformers_version() < (5, 23):
        for model in (tiny(name), me.wrap(tiny(name), spec)):  # nothing removed is stock, which fails on these
            with pytest.raises(ValueError, match="non-empty list"):
                answer(model, inputs, num_beams=beams)
        return
    together = answer(me.wrap(tiny(name), spec), inputs, num_beams=beams)
    assert torch.equal(together, torch.stack([alone(spec, name, row, beams) for row in FAMILIES[name].mixed]))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "spec", ["divprune:keep=0.3,positions=keep", "divprune:keep=0.3,positions=renumber", "divprune:keep=0.3,newline=keep"]
)
def test_batch_equals_one_by_one_with_other_rules(spec, name):
    if "newline" in spec and name not in NEWLINES:
        with pytest.raises(me.MllmEfficientError, match="newline"):
            me.wrap(tiny(name), spec)
        return
    rows = [row for row in FAMILIES[name].mixed if row != "long text"]
    together = answer(me.wrap(tiny(name), spec), make(name, *rows))
    assert torch.equal(together, torch.stack([alone(spec, name, row, 1) for row in rows]))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_logits_of_a_padded_batch_are_those_of_each_row_alone(name, padding_side):
    model, rows = tiny(name), FAMILIES[name].mixed
    prepared = me.prepare(model, "uniform:keep=0.3", **make(name, *rows, padding_side=padding_side))
    mask = prepared.model_kwargs["attention_mask"].bool()
    assert bool(mask[:, -1].all()) == (padding_side == "left")
    with torch.no_grad():
        together = model(**prepared.model_kwargs).logits
        for i, row in enumerate(rows):
            single = model(**me.prepare(model, "uniform:keep=0.3", **make(name, row)).model_kwargs).logits[0]
            torch.testing.assert_close(together[i][mask[i]], single, atol=1e-4, rtol=1e-4)  # padding shifts the angles of 1-D RoPE


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_of_equal_rows_gives_equal_answers(name):
    row = FAMILIES[name].mixed[-1]
    three = answer(me.wrap(tiny(name), "divprune:keep=0.3"), make(name, row, row, row), num_beams=2)
    assert torch.equal(three[0], three[1]) and torch.equal(three[0], three[2])


# ------------------------------------------------------------------------------------------------ reports and budgets


@pytest.mark.parametrize("name", FAMILIES)
def test_the_report_lists_images_and_videos_in_prompt_order_with_their_shapes(name):
    model, rows = tiny(name), FAMILIES[name].rows
    report = me.prepare(model, "divprune:keep=0.25", **make(name, *rows)).report
    found = [(row, key, v) for row, kind in enumerate(rows) for key, v in enumerate(visuals(name, model, make(name, kind)))]
    assert len(report.images) == len(found)
    for image, (row, key, visual) in zip(report.images, found):
        kept = by_hand("divprune:keep=0.25", visual, key)
        among = torch.full(visual.newline.shape, -1)
        among[~visual.newline] = torch.arange(visual.n)
        assert (image.row, image.modality, image.full, image.kept) == (row, visual.modality, visual.n, max(1, round(visual.n * 0.25)))
        assert torch.equal(image.indices, among[kept.stay]) and image.indices.dtype == torch.long
        assert tuple((p.rows, p.columns) for p in image.planes) == visual.planes
        assert image.grid == (visual.planes[0] if len(visual.planes) == 1 else None)
        assert (image.separators_full, image.separators_kept, image.clamped) == (int(visual.newline.sum()), 0, False)
        if visual.modality == "video":
            assert torch.equal(image.frame, visual.parts) and image.tile is None
            assert [p.frame for p in image.planes] == list(range(len(visual.planes)))
        else:
            assert image.frame is None
            assert image.tile is None if len(visual.planes) == 1 else torch.equal(image.tile, visual.parts)
            assert image.planes[0].tile == 0
        assert all(p.box[0] < p.box[2] and p.box[1] < p.box[3] for p in image.planes)
    assert report.visual_tokens_full == sum(v.n for *_, v in found)
    assert report.visual_tokens_kept == sum(i.kept for i in report.images)


@pytest.mark.parametrize("name", NEWLINES)
def test_the_report_counts_newline_columns_apart(name):
    model, inputs = tiny(name), make(name, *FAMILIES[name].mixed)
    report = me.prepare(model, "uniform:keep=0.25,newline=keep", **inputs).report
    for image in report.images:
        assert image.separators_kept == image.separators_full and image.kept == max(1, round(image.full * 0.25))
    assert any(image.separators_full for image in report.images)


@pytest.mark.parametrize("name", NEWLINES)
def test_tokens_that_are_all_kept_in_another_order_keep_their_newline_columns(name):
    model, inputs = tiny(name), make(name, *FAMILIES[name].mixed)
    prepared = me.prepare(model, "divprune:keep=1,order=picked", **inputs)
    assert prepared.visual_keep_mask.all()
    for image in prepared.report.images:
        assert (image.kept, image.separators_kept) == (image.full, image.separators_full)
        assert image.indices.sort().values.tolist() == list(range(image.full)) and not torch.equal(image.indices, torch.arange(image.full))


@pytest.mark.parametrize("name", FAMILIES)
def test_more_tokens_than_an_image_has_keep_them_all_and_say_so(name):
    model, inputs = tiny(name), make(name, "two images")
    lengths = [v.n for v in visuals(name, model, inputs)]
    tokens = min(lengths) + 1
    report = me.prepare(model, f"uniform:tokens={tokens}", **inputs).report
    assert [i.kept for i in report.images] == [min(tokens, n) for n in lengths]
    assert [i.clamped for i in report.images] == [tokens > n for n in lengths]
    assert not any(i.clamped for i in me.prepare(model, "uniform:keep=0.5", **inputs).report.images)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_image_that_keeps_all_stays_whole_beside_one_that_does_not(name):
    """Its newline columns too."""
    model, inputs = tiny(name), make(name, "one image", "text only", "long text")
    lengths = [v.n for row in ("one image", "long text") for v in visuals(name, model, make(name, row))]
    spec = f"divprune:tokens={min(lengths)}" if lengths[0] != lengths[1] else "divprune:tokens=9"
    for row, image in zip((0, 2), me.prepare(model, spec, **inputs).report.images):
        assert image.separators_kept == (image.separators_full if image.kept == image.full else 0)
        found = greedy(model, sequence(name, model, spec, make(name, ("one image", "", "long text")[row])))
        with me.compressed(model, spec):
            assert answer(model, inputs)[row].tolist() == found


@pytest.mark.parametrize("aspect", ASPECTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_kept_count_is_the_budget_at_every_aspect_and_no_newline_column_stays(name, aspect):
    model, inputs = tiny(name), aspect_batch(name, aspect)
    (visual,) = visuals(name, model, inputs)
    for spec in ("divprune:keep=0.3", "random:keep=0.7", "uniform:tokens=11"):
        k = share(me.build(spec), visual.n)
        prepared = me.prepare(model, spec, **inputs)
        mask = prepared.visual_keep_mask[0]
        (image,) = prepared.report.images
        assert (image.full, image.kept, int(mask[visual.columns].sum())) == (visual.n, k, k)
        assert not mask[visual.columns][visual.newline].any() or k == visual.n
        text = torch.ones_like(mask)
        text[visual.columns] = False
        assert mask[text].all()
        assert prepared.model_kwargs["input_ids"].shape[1] == int(text.sum()) + k
    for spec in ("pool:keep=0.3", "resize:keep=0.3"):
        (image,) = me.prepare(model, spec, **inputs).report.images
        assert 1 <= image.kept <= share(me.build(spec), visual.n)


@pytest.mark.parametrize("name", NEWLINES)
def test_the_five_aspects_are_tiled_in_five_ways(name):
    model = tiny(name)
    shapes = {visuals(name, model, aspect_batch(name, aspect))[0].planes for aspect in ASPECTS}
    assert len(shapes) == len(ASPECTS)


def test_onevision_shrinks_a_map_that_is_larger_than_its_setting_allows():
    model, inputs = tiny("llava_onevision"), aspect_batch("llava_onevision", "7:5")
    (visual,) = visuals("llava_onevision", model, inputs)
    assert visual.planes == ((5, 5), (8, 12))  # of 10 x 15
    (image,) = me.prepare(model, "uniform:keep=0.5", **inputs).report.images
    assert torch.equal(image.tile, visual.parts) and set(image.tile.tolist()) == set(range(7))


@pytest.mark.parametrize("aspect", ASPECTS)
@pytest.mark.parametrize("name", NEWLINES)
def test_all_newline_columns_stay_in_their_places_on_request(name, aspect):
    model, inputs = tiny(name), aspect_batch(name, aspect)
    (visual,) = visuals(name, model, inputs)
    mask = me.prepare(model, "uniform:keep=0.3,newline=keep", **inputs).visual_keep_mask[0][visual.columns]
    assert mask[visual.newline].all() and int(mask[~visual.newline].sum()) == max(1, round(visual.n * 0.3))


@pytest.mark.parametrize("aspect", ASPECTS)
@pytest.mark.parametrize("name", TILED)
def test_a_budget_for_each_tile_is_met_in_each_tile(name, aspect):
    model, inputs = tiny(name), aspect_batch(name, aspect)
    (visual,) = visuals(name, model, inputs)
    (image,) = me.prepare(model, "divprune:keep=0.3,per=tile", **inputs).report.images
    for part in visual.parts.unique():
        wanted = max(1, round(int((visual.parts == part).sum()) * 0.3))
        assert int((visual.parts[image.indices] == part).sum()) == wanted


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("part", ["tile", "frame"])
def test_a_budget_for_parts_the_family_does_not_have_is_refused(name, part):
    if part in PARTS[name]:
        me.unwrap(me.wrap(tiny(name), f"uniform:keep=0.5,per={part}"))
        return
    model, inputs = tiny(name), make(name, "one image")
    for call in (
        lambda: me.wrap(model, f"uniform:keep=0.5,per={part}"),
        lambda: me.prepare(model, f"uniform:keep=0.5,per={part}", **inputs),
    ):
        with pytest.raises(me.MllmEfficientError, match=part):
            call()


@pytest.mark.parametrize("name", FAMILIES)
def test_pooling_to_fewer_tokens_than_planes_is_refused(name):
    row = "video" if name in WITH_VIDEO else "one image"
    model, inputs = tiny(name), make(name, row)
    planes = len(visuals(name, model, inputs)[0].planes)
    assert planes > 1
    with pytest.raises(me.MllmEfficientError):
        me.prepare(model, f"pool:tokens={planes - 1}", **inputs)
    (image,) = me.prepare(model, f"pool:tokens={planes}", **inputs).report.images
    assert image.kept == planes


@pytest.mark.parametrize("name", WITH_VIDEO)
def test_a_video_has_one_budget(name):
    model, inputs = tiny(name), make(name, "video")
    (visual,) = visuals(name, model, inputs)
    (image,) = me.prepare(model, "divprune:keep=0.25", **inputs).report.images
    (each,) = me.prepare(model, "divprune:keep=0.25,per=frame", **inputs).report.images
    assert image.kept == max(1, round(visual.n * 0.25))
    frames = visual.parts.bincount()
    assert visual.parts[each.indices].bincount(minlength=len(frames)).tolist() == [max(1, round(int(n) * 0.25)) for n in frames]


@pytest.mark.parametrize("name", FAMILIES)
def test_random_draws_by_the_index_in_the_row_whatever_the_batch(name):
    """Images and videos of a row are numbered together, in prompt order."""
    model, rows = tiny(name), FAMILIES[name].mixed
    report = me.prepare(model, "random:keep=0.3", **make(name, *rows)).report
    found = {row: me.prepare(model, "random:keep=0.3", **make(name, kind)).report.images for row, kind in enumerate(rows)}
    for row, images in found.items():
        assert all(torch.equal(a.indices, b.indices) for a, b in zip(images, [i for i in report.images if i.row == row], strict=True))
    pair = found[1]
    method = me.Random(keep=0.3)
    assert all(
        torch.equal(i.indices, torch.randperm(i.full, generator=generator_for(method, key))[: i.kept].sort().values)
        for key, i in enumerate(pair)
    )


# ------------------------------------------------------------------------------------------------ dynamic resolution


def page(rows: int, columns: int) -> dict[str, Tensor]:
    """A Qwen prompt with one picture of rows x columns tokens, put together by hand."""
    patches, grid = patchify(torch.rand(2, 3, rows * 8, columns * 8, generator=torch.Generator().manual_seed(rows)), 4)
    image = [VOCABULARY["<|vision_start|>"], *[VOCABULARY["<|image_pad|>"]] * (rows * columns), VOCABULARY["<|vision_end|>"]]
    ids = torch.tensor([[VOCABULARY["<s>"], VOCABULARY["user"], *image, VOCABULARY["what"], VOCABULARY[":"]]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": patches, "image_grid_thw": torch.tensor([grid])}


def test_min_tokens_spares_an_icon_and_prunes_a_page():
    method = me.build("divprune:keep=0.01,min_tokens=64")
    assert [method.budget.count(n, fixed=False) for n in (16, 64, 100, 16_000)] == [16, 64, 64, 160]


@pytest.mark.parametrize("name", MROPE)
def test_min_tokens_on_pictures_of_any_size(name):
    model = tiny(name)
    kept = {}
    for rows, columns in ((4, 4), (8, 8), (20, 30)):
        inputs = page(rows, columns)
        prepared = me.prepare(model, "divprune:keep=0.01,min_tokens=64", **inputs, **types(name, inputs["input_ids"]))
        kept[rows * columns] = prepared.report.images[0].kept
        assert (prepared.layout is None) == (rows * columns <= 64)
        assert model.generate(**prepared.model_kwargs, max_new_tokens=2).shape[1] == prepared.model_kwargs["input_ids"].shape[1] + 2
    assert kept == {16: 16, 64: 64, 600: 64}


@pytest.mark.parametrize("name", MROPE)
def test_the_type_ids_of_the_processor_are_not_needed_to_compress(name):
    """The package knows the placeholders of the family; stock transformers asks for the ids of their kinds."""
    model, inputs = tiny(name), make(name, *FAMILIES[name].mixed)
    me.wrap(model, "divprune:keep=0.3")
    without = {k: v for k, v in inputs.items() if k != "mm_token_type_ids"}
    assert torch.equal(answer(model, without), answer(model, inputs))


# ------------------------------------------------------------------------------------------------ forms of the inputs


@pytest.mark.parametrize("name", NEWLINES)
def test_tiles_in_one_row_are_the_same_as_tiles_by_image(name):
    """Stock takes (tiles, C, H, W) too, without the padding of images that have fewer tiles."""
    model, inputs = me.wrap(tiny(name), "divprune:keep=0.3"), make(name, "one image", "long text")
    tiles = [1 + int(v.parts.max()) for row in ("one image", "long text") for v in visuals(name, model, make(name, row))]
    flat = torch.cat([pixels[:n] for pixels, n in zip(inputs["pixel_values"], tiles)])
    assert torch.equal(answer(model, {**inputs, "pixel_values": flat}), answer(model, inputs))


def test_onevision_tiles_several_images_of_a_prompt_that_does_not_say_how_many_there_are():
    name = "llava_onevision"
    first, second = make(name, "one image"), make(name, "long text")
    inputs = {"input_ids": torch.cat([first["input_ids"], second["input_ids"][:, 1:]], 1), **both(first, second)}
    del inputs["batch_num_images"]
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    model = tiny(name)
    wanted = greedy(model, sequence(name, model, "divprune:keep=0.3", inputs))
    assert answer(me.wrap(model, "divprune:keep=0.3"), inputs)[0].tolist() == wanted
    assert [i.full for i in me.last_report(model).images] == [121, 125]


@pytest.mark.parametrize("name", FAMILIES)
def test_one_encoding_serves_several_methods(name):
    model, inputs = tiny(name), make(name, *FAMILIES[name].mixed)
    shared = encode(model, "divprune:keep=0.3", **inputs)
    for spec in ("divprune:keep=0.3", "uniform:keep=0.5", "pool:keep=0.4", "resize:keep=0.4"):
        encoded = encode(model, spec, **inputs) if spec.startswith("resize") else shared
        kwargs = me.prepare(model, spec, encoded=encoded, **inputs).model_kwargs
        again = me.prepare(model, spec, **inputs).model_kwargs
        assert torch.equal(model.generate(**kwargs, **NEW), model.generate(**again, **NEW))
    with pytest.raises(me.MllmEfficientError):
        me.prepare(model, "uniform:keep=0.3", encoded=encode(model, "resize:keep=0.4", **inputs), **inputs)


@pytest.mark.parametrize("name", WITH_VIDEO)
def test_keys_are_given_in_prompt_order_to_images_and_videos_alike(name):
    model, inputs = tiny(name), make(name, "video and image", "one image")
    images = me.prepare(model, "random:keep=0.3", image_keys=["a", "b", "c"], **inputs).report.images
    assert [i.modality for i in images] == ["video", "image", "image"]
    method = me.Random(keep=0.3)
    for key, image in zip("abc", images):
        drawn = torch.randperm(image.full, generator=generator_for(method, key))[: image.kept].sort().values
        assert torch.equal(image.indices, drawn)
    with pytest.raises(me.MllmEfficientError, match="2 image_keys"):
        me.prepare(model, "random:keep=0.3", image_keys=["a", "b"], **inputs)


# ------------------------------------------------------------------------------------------------ what is refused


def entries(model: Any, spec: str) -> list:
    """The three ways into the package."""

    def wrapped(call):
        def run(**inputs):
            with me.compressed(model, spec):
                return call(**inputs)

        return run

    return [
        lambda **inputs: me.prepare(model, spec, **inputs),
        wrapped(lambda **i: model.generate(**i, **NEW)),
        wrapped(lambda **i: model(**i)),
    ]


@pytest.mark.parametrize("entry", [0, 1, 2], ids=["prepare", "generate", "forward"])
@pytest.mark.parametrize("spec", ["divprune:keep=0.3", "divprune:keep=1"], ids=["some kept", "all kept"])
@pytest.mark.parametrize("name", FAMILIES)
def test_placeholders_that_do_not_match_the_images_are_one_clear_error(name, spec, entry):
    model, family = tiny(name), FAMILIES[name]
    call = entries(model, spec)[entry]
    good = make(name, "one image", "long text")
    word, image = VOCABULARY["what"], family.image_token
    first, last = ((good["input_ids"][row] == image).nonzero()[:, 0] for row in (0, 1))

    def changed(*cells):
        ids = good["input_ids"].clone()
        for row, column, token in cells:
            ids[row, column] = token
        return {**good, "input_ids": ids, **types(name, ids)}

    wrong = {
        "one too few": changed((0, first[-1], word)),
        "one too many": changed((1, last[-1] + 2, image)),
        "one in the other row": changed((0, first[-1], word), (1, last[-1] + 1, image)),
        "no image in the prompt": changed(*[(0, column, word) for column in first]),
    }
    for what, inputs in wrong.items():
        with pytest.raises(me.MllmEfficientError, match="placeholder|span") as caught:
            call(**inputs)
        assert "\n" not in str(caught.value), what


@pytest.mark.parametrize("name", [f for f in FAMILIES if not FAMILIES[f].in_prompt])
def test_images_in_the_wrong_rows_with_the_right_total_are_refused(name):
    """Stock transformers compares totals alone and gives each row a part of the other's image."""
    model, good = tiny(name), make(name, "one image", "long text")
    if name in MROPE:
        counts = good["image_grid_thw"].prod(1).tolist()
        swapped = {"pixel_values": torch.cat(good["pixel_values"].split(counts)[::-1]), "image_grid_thw": good["image_grid_thw"].flip(0)}
    else:
        swapped = {"pixel_values": good["pixel_values"].flip(0), "image_sizes": good["image_sizes"].flip(0)}
    if name not in MROPE:
        with torch.no_grad():
            model(**{**good, **swapped})  # no error
    for call in entries(model, "divprune:keep=0.3"):
        with pytest.raises(me.MllmEfficientError, match="span two rows"):
            call(**{**good, **swapped})


@pytest.mark.parametrize("name", WITH_VIDEO)
def test_a_video_that_is_missing_or_not_in_the_prompt_is_refused(name):
    model, both, image = tiny(name), make(name, "video and image"), make(name, "one image")
    of_video = {k: v for k, v in both.items() if "video" in k or k == "second_per_grid_ts"}
    for call in entries(model, "divprune:keep=0.3"):
        with pytest.raises(me.MllmEfficientError, match="video placeholders"):
            call(**{k: v for k, v in both.items() if k not in of_video})
        with pytest.raises(me.MllmEfficientError, match="video placeholders"):
            call(**image, **of_video)


@pytest.mark.parametrize("name", [f for f in FAMILIES if not FAMILIES[f].in_prompt])
def test_pixels_without_their_sizes_are_refused(name):
    model, inputs = tiny(name), make(name, "one image")
    sizes = "image_grid_thw" if name in MROPE else "image_sizes"
    for call in entries(model, "divprune:keep=0.3"):
        with pytest.raises(me.MllmEfficientError, match=sizes):
            call(**{k: v for k, v in inputs.items() if k != sizes})
    other = make(name, "two images")[sizes]
    for call in entries(model, "divprune:keep=0.3"):
        with pytest.raises(me.MllmEfficientError, match=sizes):
            call(**{**inputs, sizes: other})


@pytest.mark.parametrize("name", [f for f in FAMILIES if f not in NEWLINES])
def test_keeping_newline_columns_where_there_are_none_is_refused(name):
    with pytest.raises(me.MllmEfficientError, match="newline"):
        me.prepare(tiny(name), "uniform:keep=0.3,newline=keep", **make(name, "one image"))


# ------------------------------------------------------------------------------------------------ training


def labelled(name: str, inputs: dict[str, Any]) -> Tensor:
    """The ids, -100 on padding and on everything visual."""
    special = torch.tensor([VOCABULARY[token] for token in SPECIAL[4:]])
    return inputs["input_ids"].masked_fill((inputs["attention_mask"] == 0) | torch.isin(inputs["input_ids"], special), -100)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("spec", ["divprune:keep=0.3", "pool:keep=0.3"])
def test_the_loss_is_the_sum_over_rows_by_hand(spec, name, padding_side):
    model, rows = tiny(name), FAMILIES[name].mixed
    total, count = 0.0, 0
    for row in rows:
        inputs = make(name, row)
        left = sequence(name, model, spec, inputs)
        target = labelled(name, inputs)[0][left.columns][1:]
        with torch.no_grad():
            total += cross_entropy(logits(model, left)[:-1], target, ignore_index=-100, reduction="sum").item()
        count += int((target != -100).sum())
    inputs = make(name, *rows, padding_side=padding_side)
    labels = labelled(name, inputs)
    me.wrap(model, spec)
    assert model(**inputs, labels=labels).loss.item() == pytest.approx(total / count, rel=1e-5)  # order of summation


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("spec", ["divprune:keep=0.3", "pool:keep=0.3", "resize:keep=0.3", "uniform:keep=0.3,per=frame"])
def test_gradients_reach_projector_tower_and_decoder(spec, name):
    if "frame" in spec and name not in WITH_VIDEO:
        spec = spec.replace("frame", "tile")
    model, inputs = me.wrap(tiny(name), spec), make(name, *FAMILIES[name].mixed)
    model(**inputs, labels=labelled(name, inputs)).loss.backward()
    visual, names = ("visual", ("merger",)) if name in MROPE else ("vision_tower", ("multi_modal_projector",))
    names += ("deepstack_merger_list.0", "deepstack_merger_list.1") if name == "qwen3_vl" else ()
    names += ("language_model.layers.0", visual)
    for part in names:
        gradients = [p.grad.abs().sum() for n, p in model.named_parameters() if f"{part}." in n and p.grad is not None]
        assert gradients and sum(gradients) > 0, part


@pytest.mark.parametrize("name", NEWLINES)
def test_the_newline_is_learned_only_where_it_stays(name):
    inputs = make(name, "one image")
    for spec, learns in (("uniform:keep=0.3,newline=keep", True), ("uniform:keep=0.3", False)):
        model = me.wrap(tiny(name), spec)
        model(**inputs, labels=labelled(name, inputs)).loss.backward()
        gradient = model.model.image_newline.grad
        assert (gradient is not None and bool(gradient.abs().sum() > 0)) == learns


# ------------------------------------------------------------------------------------------------ hosts


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("spec", ["divprune:keep=0.3", "pool:keep=0.3"])
def test_generate_under_lora_equals_the_explicit_path(spec, name):
    from peft import LoraConfig, get_peft_model

    def with_lora():
        torch.manual_seed(0)
        return get_peft_model(tiny(name), LoraConfig(r=2, target_modules=r".*(language_model).*\.(q_proj|v_proj)", init_lora_weights=False))

    inputs = make(name, *FAMILIES[name].mixed)
    plain, wrapped = with_lora().eval(), me.wrap(with_lora().eval(), spec)
    kwargs = me.prepare(plain, spec, **inputs).model_kwargs
    expected = plain.generate(**kwargs, **NEW)[:, kwargs["input_ids"].shape[1] :]
    assert torch.equal(answer(wrapped, inputs), expected)
    assert not torch.equal(expected, answer(me.wrap(tiny(name), spec), inputs)), "the adapter changes the answer"
    row = FAMILIES[name].mixed[1]
    assert answer(wrapped, make(name, row))[0].tolist() == greedy(
        plain.base_model.model, sequence(name, plain.base_model.model, spec, make(name, row))
    )


def trace(model: Any) -> dict:
    """Everything ``wrap`` could leave behind, module by module."""
    hooks = [n for n in vars(torch.nn.Module()) if "hook" in n]
    return {
        name: (type(m), sorted(vars(m)), [(h, list(v.items()) if isinstance(v := getattr(m, h), dict) else v) for h in hooks])
        for name, m in model.named_modules()
    }


@pytest.mark.parametrize("spec", ["divprune:keep=0.3", "resize:keep=0.3"])
@pytest.mark.parametrize("name", FAMILIES)
def test_wrap_and_unwrap_leave_no_trace(name, spec):
    model, inputs = tiny(name), make(name, *FAMILIES[name].mixed)
    with torch.no_grad():
        stock = answer(model, inputs), model(**inputs).logits  # transformers puts hooks of its own on at first use
        before, config, settings = trace(model), model.generation_config.to_dict(), model.config.to_dict()
        weights = {k: v.clone() for k, v in model.state_dict().items()}
        assert me.wrap(model, spec) is model
        answer(model, inputs, num_beams=2)
        model(**inputs)
        assert me.unwrap(model) is model
        assert trace(model) == before and model.generation_config.to_dict() == config and model.config.to_dict() == settings
        assert model.state_dict().keys() == weights.keys()
        assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
        assert torch.equal(model(**inputs).logits, stock[1]) and torch.equal(answer(model, inputs), stock[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_callers_tensors_and_arguments_are_not_changed(name):
    model, inputs = me.wrap(tiny(name), "resize:keep=0.5"), make(name, *FAMILIES[name].mixed)
    before = {k: copy.deepcopy(v) for k, v in inputs.items()}
    kwargs = dict(inputs)
    answer(model, kwargs, num_beams=2)
    with torch.no_grad():
        model(**kwargs)
    assert kwargs.keys() == before.keys()
    assert all(torch.equal(torch.as_tensor(inputs[k]), torch.as_tensor(before[k])) for k in before)


# ------------------------------------------------------------------------------------------------ the next turn

TURN_2 = "assistant : yes . user : how many are blue ? assistant :"
TURN_2_IMAGE = "user : is I the cross ? assistant :"


def say(name: str, text: str) -> dict[str, Any]:
    """The next user turn, without the beginning-of-sequence token."""
    out = process(name, [text], [[noise(99, 30, 44)]] if " I " in text else [[]])
    return {k: v[:, 1:] if k in ("input_ids", "attention_mask", "mm_token_type_ids") else v for k, v in out.items()}


def vision(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask", "mm_token_type_ids")}


def both(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The vision inputs of two turns, with as many tiles for each picture as the largest has."""
    first, second = vision(first), vision(second)
    out = {**first, **second}
    for key in first.keys() & second.keys():
        parts = [first[key], second[key]]
        if key == "pixel_values" and parts[0].ndim == 5:
            tiles = max(p.shape[1] for p in parts)
            parts = [torch.cat([p, p.new_zeros(len(p), tiles - p.shape[1], *p.shape[2:])], 1) for p in parts]
        out[key] = torch.cat(parts)
    return out


RULES = ("divprune:keep=0.3", "pool:keep=0.4", "divprune:keep=0.3,positions=other", "resize:keep=0.4")


def rule(name: str, spec: str) -> str:
    """``positions=other`` is the rule that is not the family's own."""
    return spec.replace("other", "renumber" if name in MROPE else "keep")


@pytest.mark.parametrize("turn", ["text only", "new image"])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("spec", RULES)
def test_a_second_turn_on_the_cache_equals_a_fresh_call_without_cache(spec, name, turn):
    model = me.wrap(tiny(name), rule(name, spec))
    row = "video and image" if name in WITH_VIDEO else "two images"
    inputs, new = make(name, row), say(name, TURN_2 if turn == "text only" else TURN_2_IMAGE)
    first = model.generate(**inputs, return_dict_in_generate=True, **NEW)
    ids = torch.cat([first.sequences, new["input_ids"]], 1)
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **types(name, ids)}
    fresh = answer(model, {**whole, **both(inputs, new)})
    cached = answer(model, {**whole, **vision(new)}, past_key_values=first.past_key_values)
    assert torch.equal(cached, fresh)
    assert [i.modality for i in me.last_report(model).images] == ([] if turn == "text only" else ["image"])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("spec", ["divprune:keep=0.3", "pool:keep=0.4"])
def test_a_second_turn_of_a_padded_batch_equals_a_fresh_call_without_cache(spec, name):
    model, rows = me.wrap(tiny(name), spec), FAMILIES[name].mixed
    inputs, new = make(name, *rows), say(name, TURN_2)["input_ids"].expand(len(rows), -1)
    first = model.generate(**inputs, return_dict_in_generate=True, **NEW)
    ids = torch.cat([first.sequences, new], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(rows), 6 + new.shape[1], dtype=torch.long)], 1)
    whole = {"input_ids": ids, "attention_mask": mask, **types(name, ids)}
    other = me.wrap(tiny(name), spec)
    fresh = answer(other, {**whole, **vision(inputs)})
    answer(model, make(name, "one image"))  # another prompt in between, which leaves its own state on M-RoPE models
    assert torch.equal(answer(model, whole, past_key_values=first.past_key_values), fresh)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("spec", ["divprune:keep=0.3", "divprune:keep=0.3,positions=other", "pool:keep=0.4"])
def test_a_second_turn_after_rows_that_ended_early_equals_a_fresh_call(spec, name):
    """The shorter answers are padded inside the conversation, and that padding takes no position."""
    model, rows = me.wrap(tiny(name), rule(name, spec)), FAMILIES[name].mixed
    inputs, new = make(name, *rows), say(name, TURN_2)["input_ids"].expand(len(rows), -1)
    free = answer(model, inputs)
    ends = int(free[0, 1])
    first = model.generate(**inputs, eos_token_id=ends, return_dict_in_generate=True, **NEW)
    answers = first.sequences[:, inputs["input_ids"].shape[1] :]
    real = torch.cat([torch.ones(len(rows), 1, dtype=torch.bool), (answers == ends).cumsum(1)[:, :-1] == 0], 1)
    assert not real.all() and not torch.equal(real, real[:1].expand_as(real))
    ids = torch.cat([first.sequences, new], 1)
    whole = {
        "input_ids": ids,
        "attention_mask": torch.cat([inputs["attention_mask"], real.long(), torch.ones_like(new)], 1),
        **types(name, ids),
    }
    cached = answer(model, whole, past_key_values=first.past_key_values)
    assert torch.equal(cached, answer(model, {**whole, **vision(inputs)}))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("spec", ["divprune:keep=0.3", "pool:keep=0.4", "divprune:keep=0.3,positions=other"])
def test_three_turns_equal_the_slow_reference(spec, name):
    """Text, then a picture, then text: every answer is that of the whole conversation by hand."""
    spec = rule(name, spec)
    plain, model = tiny(name), me.wrap(tiny(name), spec)
    given, cache, seen = make(name, "two images"), None, None
    ids = given["input_ids"]
    for text in (TURN_2, TURN_2_IMAGE, TURN_2):
        whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **types(name, ids)}
        out = model.generate(**whole, **vision(given), past_key_values=cache, return_dict_in_generate=True, **NEW)
        seen = vision(given) if seen is None else both(seen, given)
        assert out.sequences[0, ids.shape[1] :].tolist() == greedy(plain, sequence(name, plain, spec, {"input_ids": ids, **seen}))
        given = say(name, text)
        ids, cache = torch.cat([out.sequences, given["input_ids"]], 1), out.past_key_values


# ------------------------------------------------------------------------------------------------ a decode loop by hand


@pytest.mark.parametrize("mask", ["full-length mask", "no mask"])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("spec", ["divprune:keep=0.3", "divprune:keep=0.3,positions=other", "pool:keep=0.4"])
def test_a_decode_loop_over_forward_equals_generate(spec, name, mask):
    model, inputs = me.wrap(tiny(name), rule(name, spec)), make(name, *FAMILIES[name].mixed)
    wanted, aside = answer(model, inputs), make(name, "one image")
    with torch.no_grad():
        out = model(**inputs)
        assert out.visual_keep_mask.shape == inputs["input_ids"].shape
        cache, seen, tokens = out.past_key_values, inputs["attention_mask"], [out.logits[:, -1].argmax(-1)]
        for step in range(5):
            if step == 2:
                model(**aside)  # leaves the offsets of another prompt on M-RoPE models
            seen = torch.cat([seen, torch.ones(len(seen), 1, dtype=torch.long)], 1)
            given = {"attention_mask": seen} if mask == "full-length mask" else {}
            out = model(input_ids=tokens[-1][:, None], past_key_values=cache, **given)
            tokens.append(out.logits[:, -1].argmax(-1))
    assert torch.equal(torch.stack(tokens, 1), wanted)


@pytest.mark.parametrize("name", FAMILIES)
def test_turns_of_different_lengths_by_forward_equal_each_row_alone(name):
    """Padding between two turns takes no position, where positions are explicit."""
    model, rows = me.wrap(tiny(name), "divprune:keep=0.3,positions=keep"), FAMILIES[name].mixed
    texts = [TURN_2, "red ?", "assistant : no . user : is it green ?"]
    turns = [say(name, texts[i % 3])["input_ids"][0] for i in range(len(rows))]
    longest = max(len(turn) for turn in turns)
    new, real = torch.full((len(rows), longest), PAD), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, turn in enumerate(turns):
        new[i, longest - len(turn) :], real[i, longest - len(turn) :] = turn, 1
    inputs = make(name, *rows)
    with torch.no_grad():
        mask = torch.cat([inputs["attention_mask"], real], 1)
        together = model(input_ids=new, attention_mask=mask, past_key_values=model(**inputs).past_key_values).logits
        for i, (row, turn) in enumerate(zip(rows, turns)):
            single = model(input_ids=turn[None], past_key_values=model(**make(name, row)).past_key_values).logits[0]
            torch.testing.assert_close(together[i, longest - len(turn) :], single, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------ modes of generation

MODES = {
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "several answers": {"do_sample": True, "top_k": 1, "num_return_sequences": 2},
    "chunked prefill": {"prefill_chunk_size": 7},
}  # fmt: skip


@pytest.mark.parametrize("spec", ["divprune:keep=0.3", "pool:keep=0.4"])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_equals_plain_greedy(mode, name, spec):
    from mllm_efficient.patches import transformers_version

    model, inputs = me.wrap(tiny(name), spec), make(name, *FAMILIES[name].mixed)
    if mode == "chunked prefill" and transformers_version() < (5, 23):
        with pytest.raises(me.MllmEfficientError, match="5.23"):
            answer(model, inputs, **MODES[mode])
        return
    plain = answer(model, inputs)
    found = answer(model, inputs, **MODES[mode])
    assert torch.equal(found, plain.repeat_interleave(2, 0) if mode == "several answers" else plain)


@pytest.mark.parametrize("name", FAMILIES)
def test_returned_beams_of_a_batch_are_those_of_each_row(name):
    how = dict(num_beams=3, num_return_sequences=2)
    model, rows = me.wrap(tiny(name), "divprune:keep=0.3"), FAMILIES[name].mixed
    together = answer(model, make(name, *rows), **how)
    assert torch.equal(together, torch.cat([answer(model, make(name, row), **how) for row in rows]))


@pytest.mark.parametrize("order", ["wrap first", "offload first"])
@pytest.mark.parametrize("name", FAMILIES)
def test_offload_to_the_cpu_equals_plain_greedy(name, order):
    """Stock ``generate`` of a model with a newline embedding fails under offload; its ``forward`` does not."""
    import accelerate

    def offloaded(model):
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))

    inputs, plain = make(name, *FAMILIES[name].mixed), me.wrap(tiny(name), "divprune:keep=0.3")
    model = me.wrap(tiny(name), "divprune:keep=0.3") if order == "wrap first" else offloaded(tiny(name))
    model = offloaded(model) if order == "wrap first" else me.wrap(model, "divprune:keep=0.3")
    with torch.no_grad():
        offloaded(tiny(name))(**inputs)
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    if name in NEWLINES:
        with pytest.raises(NotImplementedError, match="meta tensor"):
            answer(offloaded(tiny(name)), inputs)
        return
    assert torch.equal(answer(model, inputs), answer(plain, inputs))


# ------------------------------------------------------------------------------------------------ copies


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pickled_model_still_compresses(name):
    model, inputs = me.wrap(tiny(name), "divprune:keep=0.3"), make(name, *FAMILIES[name].mixed)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(answer(again, inputs), answer(model, inputs))
    assert me.last_report(again).visual_tokens_kept < me.last_report(again).visual_tokens_full
    assert torch.equal(answer(me.unwrap(again), inputs), answer(tiny(name), inputs))


# ------------------------------------------------------------------------------------------------ traps


@pytest.mark.parametrize("name", FAMILIES)
def test_trap_01_model_kwargs_serve_two_calls_with_beams(name):
    model = tiny(name)
    prepared = me.prepare(model, "divprune:keep=0.3", **make(name, *FAMILIES[name].mixed))
    first = model.generate(**prepared.model_kwargs, num_beams=3, **NEW)
    assert torch.equal(model.generate(**prepared.model_kwargs, num_beams=3, **NEW), first)
    with torch.no_grad():
        assert torch.equal(model(**prepared.model_kwargs).logits, model(**prepared.model_kwargs).logits)


@pytest.mark.parametrize("name", [*[f for f in FAMILIES if FAMILIES[f].in_prompt], *[f for f in WITH_VIDEO if f not in MROPE]])
def test_trap_02_beams_of_ragged_features_in_one_tensor_do_not_mix_up_rows(name):
    """Two rows of images, or of videos and images, with different counts in each."""
    rows = ("one image", "two images") if FAMILIES[name].in_prompt else ("video", "video and image")
    for spec in ("divprune:keep=0.3", "divprune:tokens=6", "pool:keep=0.4"):
        model = me.wrap(tiny(name), spec)
        together = answer(model, make(name, *rows), num_beams=3)
        assert torch.equal(together, torch.cat([answer(model, make(name, row), num_beams=3) for row in rows]))
        back = answer(model, make(name, *rows[::-1]), num_beams=3)
        assert torch.equal(together, back.flip(0))


@pytest.mark.parametrize("name", MROPE)
@pytest.mark.parametrize("spec", ["divprune:keep=0.3", "divprune:keep=0.3,positions=renumber", "pool:keep=0.4"])
def test_trap_03_full_ids_on_a_reduced_mrope_cache_are_mapped_or_refused(name, spec):
    plain, model = tiny(name), me.wrap(tiny(name), spec)
    inputs, new = make(name, "two images"), say(name, TURN_2)["input_ids"]
    ids = torch.cat([inputs["input_ids"], new], 1)
    with torch.no_grad():
        left = extended(plain, sequence(name, plain, spec, inputs), new[0])
        wanted = logits(plain, left)[-new.shape[1] :]
        for given in (ids, new):
            cache = model(**inputs).past_key_values
            model(**make(name, "one image"))  # stale offsets of another prompt
            found = model(input_ids=given, past_key_values=cache).logits[0]
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        for wrong in (ids[:, 3:], inputs["input_ids"]):
            with pytest.raises(me.MllmEfficientError):
                cache = model(**inputs).past_key_values
                model(input_ids=wrong, attention_mask=torch.ones_like(wrong), past_key_values=cache)
        with pytest.raises(me.MllmEfficientError):
            model.generate(input_ids=ids[:, 3:], past_key_values=model(**inputs).past_key_values, **NEW)


@pytest.mark.parametrize("name", FAMILIES)
def test_trap_04_a_mask_of_full_length_on_a_reduced_cache_loses_the_removed_columns(name):
    """Cut to its first columns, as stock does it, the padding of the shorter rows would be seen."""
    model, rows = me.wrap(tiny(name), "uniform:keep=0.3"), FAMILIES[name].mixed
    new = say(name, TURN_2)["input_ids"]
    with torch.no_grad():
        single = [model(input_ids=new, past_key_values=model(**make(name, row)).past_key_values).logits[0] for row in rows]
        inputs = make(name, *rows)
        cache = model(**inputs).past_key_values
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(rows), new.shape[1], dtype=torch.long)], 1)
        found = model(input_ids=new.expand(len(rows), -1), attention_mask=mask, past_key_values=cache).logits
        torch.testing.assert_close(found, torch.stack(single), atol=1e-4, rtol=1e-4)
        for width in (mask.shape[1] - 1, mask.shape[1] + 1):
            with pytest.raises(me.MllmEfficientError, match="attention_mask"):
                model(
                    input_ids=new.expand(len(rows), -1),
                    attention_mask=torch.ones(len(rows), width, dtype=torch.long),
                    past_key_values=model(**inputs).past_key_values,
                )


def windowed(layers: list[str]) -> Any:
    """OneVision whose decoder sees 12 tokens back in the layers that slide."""
    model = tiny("llava_onevision")
    text = model.config.text_config
    text.use_sliding_window, text.sliding_window, text.layer_types = True, 12, layers
    fresh = type(model)(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    fresh.generation_config = model.generation_config
    return fresh


@pytest.mark.parametrize("row", ["long text", "image and video"])
def test_trap_05_layers_that_slide_and_layers_that_do_not_have_a_mask_each(row):
    model, inputs = windowed(["sliding_attention", "full_attention"]), make("llava_onevision", row)
    wanted = greedy(model, sequence("llava_onevision", model, "divprune:keep=0.3", inputs))
    plain = tiny("llava_onevision")
    assert wanted != greedy(plain, sequence("llava_onevision", plain, "divprune:keep=0.3", inputs)), "the window matters"
    assert answer(me.wrap(model, "divprune:keep=0.3"), inputs)[0].tolist() == wanted


@pytest.mark.parametrize("spec", ["divprune:keep=0.3", "divprune:keep=0.3,positions=other", "pool:keep=0.4"])
@pytest.mark.parametrize("name", FAMILIES)
def test_trap_06_prompt_lookup_equals_plain_greedy(name, spec):
    """The draft comes from the prompt's own repetitions. What precedes the image is no answer, so it holds no placeholder."""
    spec = rule(name, spec)
    inputs = process(name, ["user : I is the ring red ? is the ring"], [[noise(7, 44, 30)]])
    how = {"suppress_tokens": [VOCABULARY["user"], VOCABULARY[":"], *range(len(SPECIAL))]}
    model = tiny(name)
    assert torch.equal(answer(model, inputs, prompt_lookup_num_tokens=3, **how), answer(model, inputs, **how)), "stock"
    me.wrap(model, spec)
    plain = answer(model, inputs, **how)
    assert torch.equal(answer(model, inputs, prompt_lookup_num_tokens=3, **how), plain)
    assert torch.equal(answer(model, inputs, assistant_model=tiny(name), **how), plain)


@pytest.mark.parametrize("name", FAMILIES)
def test_trap_07_the_first_token_after_left_padding_is_not_learned(name):
    model, inputs = tiny(name), make(name, *FAMILIES[name].mixed)
    kwargs = me.prepare(model, "uniform:keep=0.3", labels=labelled(name, inputs), **inputs).model_kwargs
    real = kwargs["attention_mask"].bool()
    first = real & ~torch.cat([torch.ones_like(real[:, :1]), real[:, :-1]], 1)
    assert first.any() and (kwargs["labels"][first] == -100).all() and (kwargs["labels"][~real] == -100).all()
    learned = kwargs["labels"] != -100
    assert torch.equal(kwargs["labels"][learned], kwargs["input_ids"][learned])


@pytest.mark.parametrize("name", FAMILIES)
def test_trap_08_a_prepared_call_has_no_pixels_and_no_sizes_of_the_full_picture(name):
    model, inputs = tiny(name), make(name, *FAMILIES[name].mixed)
    kwargs = me.prepare(model, "divprune:keep=0.3", **inputs).model_kwargs
    assert not vision(inputs).keys() & kwargs.keys()
    assert set(kwargs) <= {"input_ids", "attention_mask", "mm_token_type_ids", "mm_encoder_outputs", "position_ids"}
    length = kwargs["input_ids"].shape[1]
    assert all(v.shape[-1] == length for k, v in kwargs.items() if k != "mm_encoder_outputs")
    with pytest.raises(ValueError):
        model(**kwargs, pixel_values=inputs["pixel_values"])


@pytest.mark.parametrize("name", FAMILIES)
def test_trap_10_a_deep_copy_compresses_with_its_own_weights(name):
    model, inputs = me.wrap(tiny(name), "divprune:keep=0.3"), make(name, *FAMILIES[name].mixed)
    twin = copy.deepcopy(model)
    before = answer(model, inputs)
    with torch.no_grad():
        twin.lm_head.weight.neg_()
    assert not torch.equal(answer(twin, inputs), before) and torch.equal(answer(model, inputs), before)
    other = tiny(name)
    with torch.no_grad():
        other.lm_head.weight.neg_()
    assert torch.equal(answer(twin, inputs), answer(me.wrap(other, "divprune:keep=0.3"), inputs))
    me.unwrap(twin)
    assert torch.equal(answer(model, inputs), before)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("spec", ["divprune:keep=0.000001", "uniform:tokens=1"])
def test_trap_11_one_token_of_every_image_is_left_and_beams_match_rows(name, spec):
    model, rows = me.wrap(tiny(name), spec), FAMILIES[name].mixed
    together = answer(model, make(name, *rows), num_beams=3)
    assert {i.kept for i in me.last_report(model).images} == {1}
    assert torch.equal(together, torch.cat([answer(model, make(name, row), num_beams=3) for row in rows]))


def test_trap_12_a_sliding_window_counts_kept_tokens():
    """It reaches farther back than in the full prompt: the bare decoder on the reduced sequence is the reference."""
    model, inputs = windowed(["sliding_attention", "sliding_attention"]), make("llava_onevision", "long text")
    wanted = greedy(model, sequence("llava_onevision", model, "uniform:keep=0.1", inputs))
    assert answer(me.wrap(model, "uniform:keep=0.1"), inputs)[0].tolist() == wanted


@pytest.mark.parametrize("name", FAMILIES)
def test_trap_13_logits_processors_see_the_original_prompt(name):
    from transformers import LogitsProcessorList

    seen: list[Tensor] = []

    def watch(ids, scores):
        seen.append(ids)
        return scores

    model, inputs = me.wrap(tiny(name), "divprune:keep=0.3"), make(name, "two images")
    kwargs = me.prepare(model, "divprune:keep=0.3", **inputs).model_kwargs
    out = answer(model, inputs, logits_processor=LogitsProcessorList([watch]))
    assert torch.equal(seen[0], inputs["input_ids"])
    assert torch.equal(seen[-1], torch.cat([inputs["input_ids"], out[:, :-1]], 1))
    penalised = answer(model, inputs, repetition_penalty=1.3)  # which looks at the set of tokens: placeholders are in both prompts
    again = model.generate(**kwargs, repetition_penalty=1.3, **NEW)[:, kwargs["input_ids"].shape[1] :]
    assert torch.equal(penalised, again)


@pytest.mark.parametrize("size", [(994, 263), (3846, 49), (7, 3295), (49, 3846)], ids=str)
@pytest.mark.parametrize(
    "spec", ["divprune:keep=0.5", "resize:tokens=64", "resize:keep=0.3", "resize:keep=0.5,newline=keep", "pool:keep=0.5"]
)
@pytest.mark.parametrize("name", NEWLINES)
def test_pictures_whose_map_rounding_makes_odd_run_or_are_refused_in_one_line(name, spec, size):
    """A smaller picture's map can have more rows than the full one's, and a very long one's map can be all padding."""
    from PIL import Image

    inputs = process(name, ["user : I what is it ?"], [[Image.new("RGB", size, (9, 90, 200))]])
    try:
        prepared = me.prepare(tiny(name), spec, **inputs)
    except me.BadBudgetError:
        return
    (image,) = prepared.report.images
    assert image.kept <= max(1, me.build(spec).budget.count(image.full, fixed=False))
    assert answer(me.wrap(tiny(name), spec), inputs).shape == (1, 6)


def test_more_tokens_than_a_tile_has_are_said_to_be_clamped():
    report = me.prepare(tiny("llava_next"), "uniform:tokens=1000,per=tile", **make("llava_next", "one image")).report
    assert report.images[0].clamped and report.images[0].kept == report.images[0].full


def test_an_order_of_choice_for_several_choices_is_refused():
    with pytest.raises(me.UnsupportedModelError, match="order='picked' is the order of one choice"):
        me.prepare(tiny("llava_next"), "divprune:keep=0.5,order=picked,per=tile", **make("llava_next", "one image"))
