"""Every family: reports, budgets, forms of the inputs, what is refused, training, and what models are wrapped in."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import mllm_efficient as me
from mllm_efficient.apply.prepare import encode
from mllm_efficient.compressors.base import generator_for

from ..families import (
    ASPECTS,
    FAMILIES,
    MROPE,
    SPECIAL,
    VOCABULARY,
    WITH_VIDEO,
    aspect_batch,
    make,
    patchify,
    tiny,
)
from ..families_reference import Kept, greedy, logits, visuals
from ..pairs import two_by_two
from .test_families import (
    MARKED,
    NEW,
    NEWLINES,
    PARTS,
    PLANES,
    TILED,
    answer,
    by_hand,
    in_turn,
    sequence,
    share,
    types,
)


@pytest.mark.every_family
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
        assert (image.separators_full, image.separators_kept, image.clamped) == (visual.separators, visual.left_of(kept), False)
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


@pytest.mark.parametrize("name", [f for f in FAMILIES if not FAMILIES[f].fixed])  # where they are refused
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
        if not FAMILIES[name].marked:
            assert image.separators_kept == (image.separators_full if image.kept == image.full else 0)
        found = greedy(model, sequence(name, model, spec, make(name, ("one image", "", "long text")[row])))
        with me.compressed(model, spec):
            assert answer(model, inputs)[row].tolist() == found


@pytest.mark.parametrize("aspect", ASPECTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_kept_count_is_the_budget_at_every_aspect_and_no_newline_column_stays(name, aspect):
    model, inputs = tiny(name), aspect_batch(name, aspect)
    (visual,) = visuals(name, model, inputs)
    for spec in ("divprune:keep=0.3", "random:keep=0.7", "uniform:tokens=7" if FAMILIES[name].fixed else "uniform:tokens=11"):
        k = share(me.build(spec), visual.n)
        prepared = me.prepare(model, spec, **inputs)
        mask = prepared.visual_keep_mask[0]
        (image,) = prepared.report.images
        assert (image.full, image.kept, int(mask[visual.columns].sum())) == (visual.n, k, k)
        assert not mask[visual.columns][visual.newline].any() or k == visual.n
        text = torch.ones_like(mask)
        text[visual.columns] = False
        text[[column for column, _ in visual.marks]] = False
        assert mask[text].all()
        assert (image.separators_full, prepared.model_kwargs["input_ids"].shape[1]) == (
            visual.separators, int(text.sum()) + k + image.separators_kept
        )  # fmt: skip
        assert image.separators_kept == visual.left_of(Kept(mask[visual.columns], visual.features))
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


@pytest.mark.parametrize("name", PLANES)
def test_pooling_to_fewer_tokens_than_planes_is_refused(name):
    row = "video" if name in WITH_VIDEO else "one image"
    model, inputs = tiny(name), make(name, row)
    planes = len(visuals(name, model, inputs)[0].planes)
    assert planes > 1 or name == "mistral3"
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


@two_by_two
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


SIZED = [f for f in FAMILIES if not FAMILIES[f].in_prompt and not FAMILIES[f].fixed]  # calls say how large pictures are


@pytest.mark.parametrize("name", SIZED)
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


@pytest.mark.parametrize("name", SIZED)
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


@pytest.mark.parametrize("name", [f for f in FAMILIES if f not in NEWLINES + MARKED])
def test_keeping_newline_columns_where_there_are_none_is_refused(name):
    with pytest.raises(me.MllmEfficientError, match="newline"):
        me.prepare(tiny(name), "uniform:keep=0.3,newline=keep", **make(name, "one image"))


def labelled(name: str, inputs: dict[str, Any]) -> Tensor:
    """The ids, -100 on padding and on everything visual."""
    ids, special = inputs["input_ids"], torch.tensor([VOCABULARY[token] for token in SPECIAL[4:]])
    return ids.masked_fill((inputs["attention_mask"] == 0) | torch.isin(ids, special) | (ids >= len(VOCABULARY)), -100)


@two_by_two
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
    labels, ids = labelled(name, inputs), inputs["input_ids"]
    labels = torch.where(ids >= len(VOCABULARY), ids, labels)  # those on text between the tokens of an image are ignored
    me.wrap(model, spec)
    assert model(**inputs, labels=labels).loss.item() == pytest.approx(total / count, rel=1e-5)  # order of summation


@pytest.mark.parametrize("spec, name", in_turn(["divprune:keep=0.3", "pool:keep=0.3", "resize:keep=0.3", "uniform:keep=0.3,per=frame"]))
def test_gradients_reach_projector_tower_and_decoder(spec, name):
    if "frame" in spec and "frame" not in PARTS[name]:
        spec = spec.replace("frame", "tile") if PARTS[name] else "uniform:keep=0.3"
    model, inputs = me.wrap(tiny(name), spec), make(name, *FAMILIES[name].mixed)
    model(**inputs, labels=labelled(name, inputs)).loss.backward()
    visual, names = ("visual", ("merger",)) if name in MROPE else ("vision_tower", ("multi_modal_projector",))
    visual, names = ("vision_model", ("connector",)) if name == "idefics3" else (visual, names)
    names += ("deepstack_merger_list.0", "deepstack_merger_list.1") if name == "qwen3_vl" else ()
    names += ("text_model.layers.0" if name == "idefics3" else "language_model.layers.0", visual)
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


@pytest.mark.parametrize("spec, name", in_turn(["divprune:keep=0.3", "pool:keep=0.3"]))
def test_generate_under_lora_equals_the_explicit_path(spec, name):
    from peft import LoraConfig, get_peft_model

    def with_lora():
        torch.manual_seed(0)
        return get_peft_model(
            tiny(name), LoraConfig(r=2, target_modules=r".*(language_model|text_model).*\.(q_proj|v_proj)", init_lora_weights=False)
        )

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


def vision(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")}


def both(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The vision inputs of two turns, with as many tiles for each picture as the largest has."""
    first, second = vision(first), vision(second)
    out = {**first, **second}
    for key in first.keys() & second.keys():
        parts = [first[key], second[key]]
        if "pixel_attention_mask" in first:  # all tiles of a conversation
            out[key] = torch.cat(parts, 1)
            continue
        if key == "pixel_values" and parts[0].ndim == 5:
            tiles = max(p.shape[1] for p in parts)
            parts = [torch.cat([p, p.new_zeros(len(p), tiles - p.shape[1], *p.shape[2:])], 1) for p in parts]
        if key == "pixel_values" and parts[0].ndim == 4:
            high, wide = (max(p.shape[side] for p in parts) for side in (2, 3))
            parts = [torch.nn.functional.pad(p, (0, wide - p.shape[3], 0, high - p.shape[2])) for p in parts]
        out[key] = torch.cat(parts)
    return out
