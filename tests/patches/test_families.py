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

import functools
import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, adaptive_max_pool2d, interpolate
from transformers.models.llava_next.modeling_llava_next import unpad_image

import mllm_efficient as me
from mllm_efficient.apply.prepare import encode
from mllm_efficient.budget import fit_grid
from mllm_efficient.compressors.base import generator_for
from mllm_efficient.patches import transformers_version

from ..families import (
    EVERY,
    FAMILIES,
    MROPE,
    PROMPTS,
    WITH_VIDEO,
    make,
    patchify,
    tiny,
    unpatchify,
)
from ..families_reference import Kept, Row, Visual, canvas, chosen, everything, greedy, logits, merged, splice, visuals
from ..once import representatives
from ..pairs import pairwise

NEW = dict(max_new_tokens=6)
TILED = tuple(f.name for f in FAMILIES.values() if f.tiled)
NEWLINES = tuple(f.name for f in FAMILIES.values() if f.newlines)
MARKED = tuple(f.name for f in FAMILIES.values() if f.marked)
FRAMED_TOO = {f.name for f in FAMILIES.values() if f.video or f.mrope}
PARTS = {name: [*(["tile"] if name in TILED else []), *(["frame"] if name in FRAMED_TOO else [])] for name in FAMILIES}
PLANES = [name for name in FAMILIES if name in TILED or name in WITH_VIDEO]  # with rows of several planes


def methods_to_try(keep: float) -> list[str]:
    """A specification of every method these families can run as it is, those that are yet to be written included."""
    out = []
    for name in me.list_methods():
        cls = me.get_method(name)
        spec = name if name in ("none", "pixelprune") else f"{name}:keep={keep}"
        if cls.kind != "pre_llm" or cls.trained or cls.sets_processor or me.build(spec).in_tower:
            continue
        if set(cls.needs) <= {"text", "grid"}:
            out.append(spec)
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
    return merged(visual, smaller(visual.features), counts, (len(grids), *grids[0]), [smaller(d) for d in visual.deep], grids)


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
    grids = [method.target(grid, one) for (_, grid), one in zip(areas, shares)] if method.fills_rectangles else []

    def smaller(features: Tensor) -> Tensor:
        tokens = features[~visual.newline]
        return torch.cat([method.merge(me.VisualTokens(tokens[i], grid=g), one).features for (i, g), one in zip(areas, shares)])

    return merged(visual, smaller(visual.features), sizes, (len(sizes), 1, sizes[0]), [smaller(d) for d in visual.deep], grids)


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
    return me.build(spec).positions or ("keep" if EVERY[name].mrope else "renumber")


def sequence(name: str, model: Any, spec: str, inputs: dict[str, Any]):
    """One row as ``spec`` leaves it, ready for the bare language model."""
    found, ids = visuals(name, model, inputs), inputs["input_ids"][0]
    family = EVERY[name]
    words = (ids != family.image_token) & (ids != family.video_token)
    words[[column for visual in found for column, _ in visual.marks]] = False  # row breaks and the like are none
    text = model.get_input_embeddings()(ids[words])
    return splice(name, model, inputs, found, [by_hand(spec, v, i, text) for i, v in enumerate(found)], position_rule(name, spec))


def types(name: str, ids: Tensor) -> dict[str, Tensor]:
    """mm_token_type_ids, where the family's processor gives them."""
    family = EVERY[name]
    kinds = (ids == family.image_token).int() + 2 * (ids == family.video_token).int()
    return {"mm_token_type_ids": kinds} if family.mrope else {family.typed: kinds} if family.typed else {}


def cases(specs: list[str], families: Any, kinds: tuple[str, ...] | None = None) -> list:
    """(spec, family, row) of rows with an image or a video: each two of them together."""
    every = product(specs, families, kinds or PROMPTS)
    found = pairwise(case for case in every if case[2] != "text only" and case[2] in FAMILIES[case[1]].rows)
    return [pytest.param(*case, id="-".join(case)) for case in found]


def in_turn(specs: list) -> list[tuple]:
    """(spec, family): all of them with one family of each kind, and one with each other family, in turn."""
    every = representatives(FAMILIES)
    return [(spec, name) for i, name in enumerate(FAMILIES) for j, spec in enumerate(specs) if name in every or i % len(specs) == j]


# ------------------------------------------------------------------------------------------------ the reference itself


@pytest.mark.every_family
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


@pytest.mark.parametrize("spec, name, kind", pairwise(product(IDENTITIES, FAMILIES, ("one row", "batch"))))
def test_keeping_everything_leaves_the_call_alone(spec, name, kind):
    model = tiny(name)
    if spec == "random:tokens=100000" and FAMILIES[name].fixed:
        with pytest.raises(me.BadBudgetError, match="use at most"):
            me.wrap(model, spec)
        return
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


@pytest.mark.every_family
@pytest.mark.parametrize("name", FAMILIES)
def test_keeping_everything_through_mm_encoder_outputs_is_bit_equal(name):
    model, inputs = tiny(name), make(name, *FAMILIES[name].mixed)
    prepared = me.prepare(model, "divprune:keep=1", encoded=encode(model, "divprune:keep=1", **inputs), **inputs)
    assert not {"pixel_values", "pixel_values_videos"} & prepared.model_kwargs.keys()
    with torch.no_grad():
        assert torch.equal(model(**prepared.model_kwargs).logits, model(**inputs).logits)
    assert torch.equal(model.generate(**prepared.model_kwargs, **NEW), model.generate(**inputs, **NEW))


@pytest.mark.every_family
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
    "spec, name, row", cases(["divprune:keep=0.25,newline=keep", "uniform:keep=0.5,newline=keep,positions=keep"], NEWLINES + MARKED)
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


@pytest.mark.every_family
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("spec", ["divprune:keep=0.3", "pool:keep=0.3"])
def test_every_row_of_a_padded_batch_equals_the_slow_reference(spec, name):
    model, rows = tiny(name), FAMILIES[name].mixed
    expected = [greedy(model, sequence(name, model, spec, make(name, row))) for row in rows]
    assert answer(me.wrap(model, spec), make(name, *rows)).tolist() == expected


# ------------------------------------------------------------------------------------------------ resize


@pytest.mark.parametrize("keep, name", in_turn([0.6, 0.3]))
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
    if name == "idefics3":
        made = model.model.get_image_features(pixel_values=pixels[None], return_dict=True).pooler_output
        return torch.cat(list(made)).view(len(pixels), side * side, -1)  # of each prompt, or in transformers 5.19 of each tile
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
        every = inputs["pixel_values"][0] if name == "idefics3" else inputs["pixel_values"]
        pixels = every[at : at + count] if FAMILIES[name].in_prompt else inputs["pixel_values"][i][:count]
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


@pytest.mark.parametrize("name", PLANES)
def test_a_picture_that_cannot_be_made_small_enough_is_refused(name):
    model, inputs = tiny(name), make(name, "video" if name in WITH_VIDEO else "one image")
    if not FAMILIES[name].tiled and name not in WITH_VIDEO:  # a picture of one token there is
        assert me.prepare(model, "resize:tokens=1", **inputs).report.visual_tokens_kept == 1
        return
    with pytest.raises(me.MllmEfficientError):
        me.prepare(model, "resize:tokens=1", **inputs)


# ------------------------------------------------------------------------------------------------ batches


def stock_fails(spec: str, name: str, beams: int) -> bool:
    """Whether it is a call that transformers cannot answer, which is the test below."""
    return (spec, name, beams) == ("none", "llava_next_video", 3) and transformers_version() < (5, 23)


@pytest.mark.every_family
@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_removed_is_stock_where_stock_fails_on_beams_too(name):
    inputs = make(name, *FAMILIES[name].mixed)
    if not stock_fails("none", name, 3):
        assert torch.equal(answer(me.wrap(tiny(name), "none"), inputs, num_beams=3), answer(tiny(name), inputs, num_beams=3))
        return
    for model in (tiny(name), me.wrap(tiny(name), "none")):
        with pytest.raises(ValueError, match="non-empty list"):
            answer(model, inputs, num_beams=3)


@functools.cache
def alone(spec: str, name: str, row: str, beams: int) -> Tensor:
    return answer(me.wrap(tiny(name), spec), make(name, row), num_beams=beams)[0]


# every method with families that differ, every family with methods that differ
OF_EACH_KIND = ("none", "divprune:keep=0.3", "pool:keep=0.3", "resize:keep=0.3", "tome:keep=0.3")
BATCHED = [c for c in product(METHODS, FAMILIES, (1, 3)) if c[0] in OF_EACH_KIND or c[1] in representatives(FAMILIES)]


@pytest.mark.parametrize("spec, name, beams", pairwise(BATCHED))
def test_batch_equals_one_by_one(spec, name, beams):
    inputs = make(name, *FAMILIES[name].mixed)
    if refused(spec, name):
        with pytest.raises(me.UnsupportedModelError, match="merges by content"):
            me.wrap(tiny(name), spec)
        return
    if stock_fails(spec, name, beams):
        return
    together = answer(me.wrap(tiny(name), spec), inputs, num_beams=beams)
    assert torch.equal(together, torch.stack([alone(spec, name, row, beams) for row in FAMILIES[name].mixed]))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "spec", ["divprune:keep=0.3,positions=keep", "divprune:keep=0.3,positions=renumber", "divprune:keep=0.3,newline=keep"]
)
def test_batch_equals_one_by_one_with_other_rules(spec, name):
    if "newline" in spec and name not in NEWLINES + MARKED:
        with pytest.raises(me.MllmEfficientError, match="newline"):
            me.wrap(tiny(name), spec)
        return
    rows = [row for row in FAMILIES[name].mixed if row != "long text"]
    together = answer(me.wrap(tiny(name), spec), make(name, *rows))
    assert torch.equal(together, torch.stack([alone(spec, name, row, 1) for row in rows]))


@pytest.mark.every_family
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
