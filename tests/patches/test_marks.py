"""Families with text between the tokens of an image: row breaks and tiles' names, which leave a prompt with what they belong to."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch.nn.functional import interpolate

import mllm_efficient as me
from mllm_efficient.apply.wrap import compressed
from mllm_efficient.measure.counter import count
from mllm_efficient.measure.flops import cost
from mllm_efficient.measure.keeping import marks_left
from mllm_efficient.measure.shapes import shape_of
from mllm_efficient.patches import adapter_for, transformers_version
from mllm_efficient.tokens import Mark, Plane, VisualShape

from ..families import EVERY, FAMILIES, MARKED, VOCABULARY, make, noise, tiny
from ..families_reference import greedy, logits, visuals
from .test_families import sequence

NAMES = tuple(f.name for f in FAMILIES.values() if f.marked)
NEW = dict(max_new_tokens=6)
BREAK, END, IMAGE = MARKED["[IMG_BREAK]"], MARKED["[IMG_END]"], VOCABULARY["<image>"]


def answer(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return model.generate(**inputs, **NEW)[:, inputs["input_ids"].shape[1] :]


# ------------------------------------------------------------------------------------------------ the rule


def test_a_mark_stays_while_every_part_that_it_belongs_to_has_a_token():
    between, of, always = Mark(3, ("x",), ((0, 3), (3, 9))), Mark(3, ("x", "y"), ((3, 6),)), Mark(9, ("z",), ())
    shape = VisualShape((Plane(3, 3),), marks=(between, of, always))
    assert (shape.marked, shape.length) == (4, 9)
    for slots, left in (((2, 3), (True, True)), ((0, 1), (False, False)), ((4,), (False, True)), ((0, 8), (True, False))):
        assert (between.left(slots), of.left(slots), always.left(slots)) == (*left, True)
        assert shape.marked_by(slots) == left[0] + 2 * left[1] + 1


# ------------------------------------------------------------------------------------------------ Mistral 3


@pytest.mark.parametrize(
    ("kept", "left"),
    [
        (
            [0, 7, 8],
            "i|i i.",
        ),
        ([12], "i."),
        ([0, 14], "i|i."),
        ([4, 5, 9, 10, 14], "i|ii|ii."),
    ],
)
def test_the_rows_that_are_left_are_written_as_a_smaller_picture_is(kept, left):
    """Three rows of five tokens: a break between each two rows that are left, and one end."""
    from mllm_efficient.apply.compress import CompressedImage
    from mllm_efficient.apply.locate import locate
    from mllm_efficient.patches.base import Item
    from mllm_efficient.patches.families.mistral3 import row_breaks

    row = [IMAGE] * 5
    ids = torch.tensor([[1, *row, BREAK, *row, BREAK, *row, END, 30]])
    shape = VisualShape((Plane(3, 5),), marks=row_breaks(3, 5))
    (placed,) = locate(ids, {"image": IMAGE}, [Item({}, shape)])
    keep = torch.zeros(15, dtype=torch.bool)
    keep[kept] = True
    stays = torch.ones(ids.shape[1], dtype=torch.bool)
    stays[placed.columns], stays[placed.marked()] = keep, False
    stays[placed.marked(CompressedImage(torch.zeros(0), (), keep, None).has_left())] = True
    names = {IMAGE: "i", BREAK: "|", END: ".", 1: "", 30: ""}
    assert "".join(names[int(token)] for token in ids[0, stays]) == left.replace(" ", "")


def test_a_prompt_cut_within_an_image_or_with_other_text_in_it_is_refused():
    model, good = tiny("mistral3"), make("mistral3", "one image")
    ids = good["input_ids"]
    at = int((ids[0] == BREAK).nonzero()[0])
    without = torch.cat([ids[:, :at], ids[:, at + 1 :], ids[:, -1:]], 1)
    end = int((ids[0] == END).nonzero()[0])
    for wrong, says in ((without, "text tokens where 1 belong"), (ids[:, :end], "is cut within an image")):
        with pytest.raises(me.CountMismatchError, match=says) as caught:
            me.prepare(model, "uniform:keep=0.5", **{**good, "input_ids": wrong, "attention_mask": torch.ones_like(wrong)})
        assert "\n" not in str(caught.value)


def test_a_prompt_without_breaks_has_none():
    """As a hand-made one may be: rows side by side."""
    model, good = tiny("mistral3"), make("mistral3", "two images")
    plain = good["input_ids"][(good["input_ids"] != BREAK) & (good["input_ids"] != END)][None]
    report = me.prepare(model, "uniform:keep=0.5", **{**good, "input_ids": plain, "attention_mask": torch.ones_like(plain)}).report
    assert [(i.separators_full, i.separators_kept) for i in report.images] == [(0, 0), (0, 0)]


@pytest.mark.parametrize("spec", ["resize:keep=0.5", "resize:tokens=4", "resize:keep=0.5,newline=keep"])
@pytest.mark.parametrize("row", ["one image", "two images", "touching images"])
def test_resize_is_the_stock_model_on_the_smaller_picture(spec, row):
    model, inputs, method = tiny("mistral3"), make("mistral3", row), me.build(spec)
    found, small, grids = visuals("mistral3", model, inputs), [], []
    for i, visual in enumerate(found):
        (rows, columns), (height, width) = visual.planes[0], inputs["image_sizes"][i].tolist()
        k = min(method.tokens, visual.n) if method.tokens else max(1, round(method.keep * visual.n))
        sizes = {(max(1, int(rows * s / 2000 + 0.5)), max(1, int(columns * s / 2000 + 0.5))) for s in range(1, 2001)}
        grids.append(max((g for g in sizes if math.prod(g) <= k), key=math.prod))
        shown = inputs["pixel_values"][i : i + 1, :, :height, :width]
        small.append(interpolate(shown, [8 * side for side in grids[-1]], mode="bicubic", antialias=True))
    high, wide = (max(part.shape[side] for part in small) for side in (2, 3))
    pixels = torch.cat([torch.nn.functional.pad(p, (0, wide - p.shape[3], 0, high - p.shape[2])) for p in small])
    ids, left = [], iter(grids)
    inside = {c: v for v in found for c in range(int(v.columns[0]), int(v.columns[-1]) + 1)}
    for column, token in enumerate(inputs["input_ids"][0].tolist()):
        if column not in inside:
            ids.append(token)
        elif column == int(inside[column].columns[0]):
            rows, columns = next(left)
            ids += [*([IMAGE] * columns + [BREAK]) * (rows - 1), *[IMAGE] * columns]  # the end of the image stands behind
    native = {"input_ids": torch.tensor([ids]), "pixel_values": pixels, "image_sizes": torch.tensor(grids) * 8}
    expected = answer(model, {**native, "attention_mask": torch.ones_like(native["input_ids"])})
    me.wrap(model, spec)
    assert torch.equal(answer(model, inputs), expected)
    assert [i.kept for i in me.last_report(model).images] == [math.prod(grid) for grid in grids]


@pytest.mark.parametrize("size", [(48, 48), (1, 1), (49, 20), (700, 20), (31, 640), (1540, 1540), (1541, 77), (3000, 2000), (97, 73)])
def test_a_picture_has_the_size_that_its_processor_gives(size):
    from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size

    width, height = size
    for name, step in (("mistral3", 8), ("lighton_ocr", 4)):
        for longest in (48, 1540):
            rules = shape_of(config(name), name, {"size": {"longest_edge": longest}, "patch_size": 4}).rules
            high, wide = get_resize_output_image_size(torch.zeros(3, height, width).numpy(), (longest, longest), (step, step))
            assert rules.resized(size, rules.settings) == (wide, high)
            if min(high, wide) < 8:
                with pytest.raises(me.MllmEfficientError, match="less than one token"):
                    rules.of_size(size)
                continue
            shape = rules.of_size(size).shape
            assert shape.grid == (high // 8, wide // 8)
            assert shape.length + shape.marked == (high // 8) * (wide // 8 + (name == "mistral3"))


def config(name: str) -> Any:
    """Of a tiny model; LightOnOCR is Mistral 3 without breaks and with another decoder."""
    import transformers

    if name == "mistral3":
        return tiny(name).config
    text = transformers.Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=16, num_key_value_heads=1
    )
    return transformers.LightOnOcrConfig(vision_config=tiny("mistral3").config.vision_config, text_config=text, image_token_id=5)


# ------------------------------------------------------------------------------------------------ what is the same for all


@pytest.mark.parametrize("name", NAMES)
def test_marks_stay_inside_the_decoder_and_are_no_text_of_the_question(name):
    model, inputs = tiny(name), make(name, *FAMILIES[name].mixed)
    spec = "fastv:layer=1,ratio=0.5"
    with compressed(model, spec):
        model(**inputs)
        inside = me.last_report(model)
        staging = me.prepare(model, spec, **inputs).staging
    for image in inside.images:
        assert image.separators_kept == image.separators_full > 0
    marks = torch.tensor([token for token in MARKED.values() if token >= len(VOCABULARY)])
    for row, text in enumerate(staging.text):
        assert len(text) and not torch.isin(inputs["input_ids"][row, text], marks).any()


@pytest.mark.parametrize("name", NAMES)
def test_a_method_before_the_decoder_and_one_inside_that_keeps_all_is_the_first_alone(name):
    model, inputs = tiny(name), make(name, *FAMILIES[name].mixed)
    with compressed(model, "uniform:keep=0.4"):
        expected = answer(model, inputs)
    with compressed(model, "uniform:keep=0.4 | fastv:layer=1,ratio=1.0"):
        assert torch.equal(answer(model, inputs), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spec", ["none", "pool:keep=0.3", "resize:keep=0.4", "divprune:keep=0.1", "random:keep=0.6,newline=keep"])
def test_the_closed_form_counts_the_marks_that_are_left(spec, name):
    """By place before any pixel is looked at; where that depends on the choice, at most so many, and with as many as are left exactly."""
    model, family = tiny(name), FAMILIES[name]
    shape, size = shape_of(model.config, name, family.settings), (70, 50)
    method, how = me.build(spec), dict(text_tokens=20, image_size=size, new_tokens=2)
    counted = count(model, shape, method, **how)
    closed = cost(shape, method=method, **how)
    assert closed.separators >= counted.marks
    exact = cost(shape, method=method, marks=counted.marks, **how)
    for phase in ("vision", "compress", "prefill", "decode"):
        assert getattr(counted, phase) == getattr(exact, phase), phase
    if method.name in ("none", "pool", "resize") or method.newline:
        assert closed.separators == counted.marks


@pytest.mark.parametrize("name", NAMES)
def test_an_even_spread_leaves_every_part_its_marks_as_long_as_there_are_tokens(name):
    model = tiny(name)
    (item, *_) = adapter_for(model).items(make(name, "one image"))
    shape = item.shape
    found = [marks_left(method, method.plan(adapter_for(model), item)) for method in (me.Random(tokens=k) for k in range(1, shape.n + 1))]
    assert found == sorted(found) and found[-1] == shape.marked and found[0] < shape.marked


@pytest.mark.parametrize("name", NAMES)
def test_pictures_that_touch_are_told_apart(name):
    model, inputs = tiny(name), make(name, "touching images")
    report = me.prepare(model, "uniform:keep=0.5", **inputs).report
    assert [i.full for i in report.images] == [v.n for v in visuals(name, model, inputs)] and len(report.images) == 2
    assert [i.separators_full for i in report.images] == [len(v.marks) for v in visuals(name, model, inputs)]


# ------------------------------------------------------------------------------------------------ Idefics3 and SmolVLM


SIZES = [(48, 48), (1, 1), (70, 50), (25, 24), (97, 96)]


@pytest.mark.parametrize(  # long strips with small tiles alone: large ones take seconds
    ("size", "settings"),
    [
        *((size, cut) for size in [*SIZES, (640, 31), (31, 640)] for cut in [(48, 24), (96, 24), (100, 24), (24, 24)]),
        *((size, cut) for size in SIZES for cut in [(1456, 364), (5000, 364)]),
    ],
)
def test_a_picture_is_cut_into_the_tiles_that_its_processor_cuts(size, settings):
    """By the processor itself, whose own count of them (``get_number_of_image_patches``) is another one for some settings."""
    from transformers import Idefics3ImageProcessorPil

    longest, tile = settings
    kwargs = {"size": {"longest_edge": longest}, "max_image_size": {"longest_edge": tile}}
    out = Idefics3ImageProcessorPil(**kwargs, return_row_col_info=True)(noise(0, *size), return_tensors="pt")
    rows, columns = out["rows"][0][0], out["cols"][0][0]
    rules = shape_of(tiny("idefics3").config, "idefics3", kwargs).rules
    assert rules.tiling(size, kwargs) == (max(rows, 1), max(columns, 1))
    image = rules.of_size(size)
    assert len(image.shape.planes) == image.views == out["pixel_values"].shape[1]
    assert rules.tiling(size, {**kwargs, "do_image_splitting": False}) == (1, 1)


def test_the_length_of_a_prompt_is_that_of_the_processor():
    """With the two line breaks after the last row of tiles as one token, as the released tokenizers have them."""
    processor = FAMILIES["idefics3"].processor("left")
    rules = shape_of(tiny("idefics3").config, "idefics3", FAMILIES["idefics3"].settings).rules
    for size in ((48, 48), (70, 50), (20, 60), (96, 10)):
        shape, (found,) = rules.of_size(size).shape, processor._get_num_multimodal_tokens([size[::-1]])["num_image_tokens"]
        assert shape.length + shape.marked == found


def test_line_breaks_that_are_two_tokens_are_one_mark():
    model, inputs = tiny("idefics3"), make("idefics3", "one image")
    ids = inputs["input_ids"][0].tolist()
    at = ids.index(MARKED["\n\n"])
    ids[at : at + 1] = [MARKED["\n"], MARKED["\n"]]
    two = torch.tensor([ids])
    call = {**inputs, "input_ids": two, "attention_mask": torch.ones_like(two)}
    (one,) = me.prepare(model, "uniform:keep=0.3", **inputs).report.images
    prepared = me.prepare(model, "uniform:keep=0.3", **call)
    (image,) = prepared.report.images
    assert (image.separators_full, image.planes) == (one.separators_full + 1, one.planes)
    only_whole = torch.ones(two.shape[1], dtype=torch.bool)
    only_whole[at : at + 2] = False
    (last,) = me.prepare(model, OnlyLast(tokens=9), **call).report.images
    assert last.separators_kept == 3  # the whole image's two in front, and the one behind


class OnlyLast(me.Selector):
    """The last k tokens."""

    name = "only_last"

    def select(self, v, k):
        return torch.arange(len(v) - k, len(v))


def test_what_drops_whole_tiles_drops_their_text():
    """The whole picture alone is written as a picture that was never cut."""
    model, inputs = tiny("idefics3"), make("idefics3", "one image")
    prepared = me.prepare(model, OnlyLast(tokens=9), **inputs)
    left = [token for token in prepared.model_kwargs["input_ids"][0].tolist() if token == IMAGE or token >= len(VOCABULARY)]
    fake = MARKED["<fake_token_around_image>"]
    assert left == [fake, MARKED["<global-img>"], *[IMAGE] * 9, fake]
    assert prepared.model_kwargs["input_ids"].shape[1] == inputs["input_ids"].shape[1] - int((~prepared.visual_keep_mask).sum())


def test_words_around_placeholders_are_no_names_of_tiles():
    """Prompts made by hand, without the text that the processor puts around tiles."""
    model = tiny("idefics3")
    word = iter(range(VOCABULARY["user"], len(VOCABULARY)))
    row = [1, next(word), next(word), *[IMAGE] * 9, next(word), next(word), *[IMAGE] * 18, next(word)]
    ids = torch.tensor([row])
    pixels = torch.rand(1, 3, 3, 24, 24)
    report = me.prepare(model, "uniform:keep=0.3", input_ids=ids, pixel_values=pixels).report
    assert [(i.full, i.separators_full) for i in report.images] == [(9, 0), (18, 0)]


# ------------------------------------------------------------------------------------------------ MiniCPM-V

MINICPM = "minicpmv4_6"
ROWS = ("one image", "two images", "touching images", "long text")
SELECTED = ("divprune:keep=0.25", "uniform:keep=0.1", "random:keep=0.5", "cdpruner:keep=0.25", "divprune:keep=0.2,per=tile")


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(
    "spec", [*SELECTED, "pool:keep=0.5", "tome:keep=0.3", "divprune:keep=0.25,positions=keep", "uniform:keep=0.3,newline=keep"]
)
def test_minicpm_equals_the_slow_reference(spec, row):
    """Layers that carry a state see the columns that are left and no others."""
    model, inputs = tiny(MINICPM), make(MINICPM, row)
    expected = sequence(MINICPM, model, spec, inputs)
    prepared = me.prepare(model, spec, **inputs)
    if not me.build(spec).merges:
        assert prepared.visual_keep_mask[0].nonzero()[:, 0].tolist() == expected.columns.tolist()
    with torch.no_grad():
        torch.testing.assert_close(model(**prepared.model_kwargs).logits[0], logits(model, expected), atol=1e-4, rtol=1e-4)
    wanted = greedy(model, expected)
    assert answer(me.wrap(model, spec), inputs)[0].tolist() == wanted


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("spec", ["divprune:keep=0.3", "pool:keep=0.5", "resize:keep=0.6"])
def test_minicpm_in_a_batch_answers_as_one_by_one(spec, beams):
    model, rows = me.wrap(tiny(MINICPM), spec), ("one image", "two images", "text only", "long text")
    together = model.generate(**make(MINICPM, *rows), **NEW, num_beams=beams)[:, -6:]
    alone = torch.cat([model.generate(**make(MINICPM, row), **NEW, num_beams=beams)[:, -6:] for row in rows])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("spec", ["none", "divprune:keep=1", "pool:keep=1", "resize:keep=1"])
def test_minicpm_that_keeps_everything_is_bit_equal(spec):
    from mllm_efficient.apply.prepare import encode

    model, inputs = tiny(MINICPM), make(MINICPM, "one image", "two images", "text only")
    prepared = me.prepare(model, spec, encoded=encode(model, spec, **inputs), **inputs)
    with torch.no_grad():
        assert torch.equal(model(**prepared.model_kwargs).logits, model(**inputs).logits)


@pytest.mark.parametrize("mode", ["16x", "4x"])
@pytest.mark.parametrize("size", [(40, 40), (64, 40), (20, 60), (70, 7), (31, 33), (500, 30), (100, 100), (1, 1)])
def test_a_picture_is_cut_into_the_slices_that_its_processor_cuts(size, mode):
    from transformers import MiniCPMV4_6ImageProcessorPil

    if mode == "4x" and transformers_version() < (5, 24):
        pytest.skip("older processors cut slices for a token of 4 x 4 patches whatever a token is; what is placed follows the newer ones")
    for settings in ({"max_slice_nums": 9}, {"max_slice_nums": 4, "slice_mode": True}, {"slice_mode": False}, {"max_slice_nums": 1}):
        settings = {"scale_resolution": 32, "downsample_mode": mode, **settings}
        out = MiniCPMV4_6ImageProcessorPil(patch_size=4, **settings)(noise(0, *size), return_tensors="pt")
        merge = 2 if mode == "4x" else 4
        wanted = [(h // merge, w // merge) for h, w in out["target_sizes"].tolist()]
        shape = shape_rules(settings).of_size(size).shape
        assert [(plane.rows, plane.columns) for plane in shape.planes] == wanted
        rows, columns = out["grids"][0]
        assert shape.marked == (0 if len(wanted) == 1 else 2 * len(wanted) + rows - 1) and len(wanted) == 1 + rows * columns


def shape_rules(settings: dict) -> Any:
    from mllm_efficient.patches.rules import rules_class

    return rules_class(MINICPM)(MINICPM, tiny(MINICPM).config, settings)


@pytest.mark.parametrize("row", ["one image", "two images"])
def test_resize_of_minicpm_is_the_stock_model_on_smaller_crops(row):
    model, inputs, spec = tiny(MINICPM), make(MINICPM, row), "resize:keep=0.6"
    report = me.prepare(model, spec, **inputs).report
    found, sizes, strips, stays = visuals(MINICPM, model, inputs), [], [], torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool)
    crops, at = iter(inputs["target_sizes"].tolist()), 0
    for visual, image in zip(found, report.images):
        assert image.kept <= round(0.6 * visual.n) and len(image.kept_planes) == len(visual.planes)
        start = 0
        for full, plane in zip(visual.planes, image.kept_planes):
            (h, w), (rows, columns) = next(crops), (plane.rows, plane.columns)
            strip = inputs["pixel_values"][0, :, :, at : at + h * w * 4]
            at += h * w * 4
            picture = torch.stack([strip[:, :, i * 4 : i * 4 + 4] for i in range(h * w)])  # patches (h * w, C, 4, 4)
            picture = picture.view(h, w, -1, 4, 4).permute(2, 0, 3, 1, 4).reshape(1, -1, h * 4, w * 4)
            small = interpolate(picture, (rows * 16, columns * 16), mode="bicubic", antialias=True)[0]
            patches = [small[:, r * 4 : r * 4 + 4, c * 4 : c * 4 + 4] for r in range(rows * 4) for c in range(columns * 4)]
            strips.append(torch.cat(patches, -1))
            sizes.append((rows * 4, columns * 4))
            own = visual.columns[start : start + math.prod(full)]
            stays[own] = False
            stays[own[: rows * columns]] = True
            start += math.prod(full)
    ids = inputs["input_ids"][:, stays]
    call = {"pixel_values": torch.cat(strips, -1)[None], "target_sizes": torch.tensor(sizes, dtype=torch.int32)}
    expected = answer(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), **call})
    assert torch.equal(answer(me.wrap(model, spec), inputs), expected)


def minicpm_47() -> Any:
    """A tiny MiniCPM-V 4.7 whose marks are those of the tests' prompts."""
    import transformers

    old = tiny(MINICPM).config
    rope = {"rope_type": "default", "rope_theta": 20.0, "partial_rotary_factor": 1.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text, vision = (
        {**old.text_config.to_dict(), "rope_parameters": rope},
        {**old.vision_config.to_dict(), "model_type": "minicpmv4_7_vision"},
    )
    config = transformers.MiniCPMV4_7Config(
        text_config=text, vision_config=vision, insert_layer_id=0, image_size=32,
        image_token_id=VOCABULARY["<image>"], video_token_id=VOCABULARY["<video>"], image_start_id=VOCABULARY["<img>"],
        image_end_id=VOCABULARY["</img>"], slice_start_id=VOCABULARY["<|vision_start|>"], slice_end_id=VOCABULARY["<|vision_end|>"],
        newline_id=MARKED["\n"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MiniCPMV4_7ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


@pytest.mark.parametrize("row", ["one image", "two images", "touching images"])
@pytest.mark.parametrize("spec", ["divprune:keep=0.25", "uniform:keep=0.1"])
def test_positions_on_the_canvas_stay_those_of_the_whole_prompt(spec, row):
    """MiniCPM-V 4.7: text between slices has places on the canvas too."""
    model, inputs = minicpm_47(), make(MINICPM, row)
    types = (inputs["input_ids"] == IMAGE).long()
    inputs["mm_token_type_ids"] = types
    places, _ = model.model.get_rope_index(inputs["input_ids"], mm_token_type_ids=types, target_sizes=inputs["target_sizes"])
    prepared = me.prepare(model, spec, **inputs)
    keep = prepared.visual_keep_mask[0]
    features = torch.cat(model.model.get_image_features(inputs["pixel_values"], inputs["target_sizes"], return_dict=True).pooler_output)
    embeds = model.get_input_embeddings()(inputs["input_ids"])[0].clone()
    embeds[types[0].bool()] = features
    with torch.no_grad():
        hidden = model.get_decoder()(inputs_embeds=embeds[keep][None], position_ids=places[:, :, keep]).last_hidden_state
        torch.testing.assert_close(model(**prepared.model_kwargs).logits, model.lm_head(hidden), atol=1e-4, rtol=1e-4)
    assert not torch.equal(places[1, 0], places[2, 0]) and any(i.separators_full for i in prepared.report.images)


ON_BOTH = ("none", "divprune:tokens=7", "native:tokens=16", "native:tokens=9")  # calls of 4.7 do not say the grid of a smaller picture
OF_MINICPM = [
    *product(["4.6"], [*ON_BOTH, "random:tokens=9", "resize:tokens=7"], [(48, 48), (70, 50), (30, 30)]),
    *product(["4.7"], ON_BOTH, [(48, 48), (70, 50)]),
]  # fmt: skip


@pytest.mark.parametrize("version, spec, size", OF_MINICPM)
def test_minicpm_costs_what_torch_counts(version, spec, size):
    """Crops of different sizes, patches merged between two layers of the tower (not in 4x), a head over the whole prompt in 4.6."""
    model = tiny(MINICPM) if version == "4.6" else minicpm_47()
    shape = shape_of(model.config, version, EVERY[MINICPM].settings)
    how = {"text_tokens": 60, "image_size": size, "new_tokens": 3}
    found = count(model, shape, me.build(spec), **how)
    closed = cost(shape, method=spec, marks=None if spec == "none" else found.marks, **how)
    assert (found.vision, found.compress, found.prefill, found.decode) == (closed.vision, closed.compress, closed.prefill, closed.decode)
