"""FLOPs in closed form: equal to torch's counter to the last one, and to the papers' tables under the papers' conventions."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import mllm_efficient as me
from mllm_efficient.apply.plan import check, plan
from mllm_efficient.loading.models import Loaded, ModelOptions
from mllm_efficient.measure import conventions, counter, keeping
from mllm_efficient.measure.flops import cost, decode_flops, kv_cache_bytes, load_shape, prefill_flops, shape_names, shape_of, vision_flops
from mllm_efficient.measure.shapes import shape_config
from mllm_efficient.measure.workload import Workload, make_inputs
from mllm_efficient.patches import adapter_for, transformers_version
from mllm_efficient.patches.rules import FAMILIES as TABLE
from mllm_efficient.tokens import VisualShape

from ..families import ALIKE, ASPECTS, EVERY, FAMILIES, aspect_batch, make, tiny
from ..pairs import pairwise

ROOT = Path(__file__).resolve().parent.parent.parent
SHAPES = (
    "bench-0.3b", "gemma-3-4b", "gemma-4-e4b", "glm-4.6v-flash", "idefics3-8b", "lightonocr-1b",
    "llama-4-scout-109b", "llava-1.5-13b", "llava-1.5-7b", "llava-1.6-7b", "llava-next-video-7b", "llava-onevision-7b", "minicpm-v-9b",
    "mistral-small-3.1-24b", "qwen2.5-vl-7b", "qwen3.5-9b", "smolvlm2-2.2b",
)  # fmt: skip
PACKED = ("lightonocr-1b", "mistral-small-3.1-24b")
MARKED_ALIKE = ("lighton_ocr", "smolvlm", "minicpmv4_6", "minicpmv4_7", "llama4")  # tests/patches/test_marks.py has what is different
# Two read values, one runs in some versions only; tests/patches/test_gemma4.py, test_marks.py and test_llama4.py count them.
COUNTED = tuple(name for name in SHAPES if name not in ("gemma-4-e4b", "minicpm-v-9b", "llama-4-scout-109b"))
PATCHES = ("glm-4.6v-flash", "qwen2.5-vl-7b", "qwen3.5-9b")  # whose tower takes flat patches
TEXT = 64
# Text tokens per data set, without the system prompt, and visual tokens of LLaVA-1.6: DivPrune's own FLOPs script.
PAPER_TEXT = (15, 15, 23, 83, 25, 113, 15, 39, 21, 91, 57)
PAPER_VISUAL_16 = (2225, 1922, 2239, 1927, 2108, 1882, 2292, 2249, 2250, 1598, 2116)


def counted(run) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as mode:
        run()
    return mode.get_total_flops()


@functools.cache
def on_meta(name: str):
    """The model of a shape, built by transformers from the shipped configuration, without weights."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.for_model(**shape_config(name))).eval()


def rules_of(name: str):
    return load_shape(name).rules


def means(costs: list, what: str = "prefill") -> float:
    return sum(getattr(c, what) for c in costs) / len(costs) / 1e12


# ------------------------------------------------------------------------------------------------ against torch's counter


# all tokens as well where a layer is not plain causal attention, and of two plain ones
BOTH = ("gemma-3-4b", "llava-1.5-7b", "qwen2.5-vl-7b", "qwen3.5-9b")


@pytest.mark.parametrize(("name", "kept"), [*((name, 64) for name in COUNTED), *((name, None) for name in BOTH)])
def test_the_language_model_costs_what_torch_counts(name, kept):
    """Prefill with the head for one position and two steps of decoding, on the meta device: no mask, with a cache."""
    model, shape = on_meta(name), load_shape(name)
    method = "none" if kept is None else f"divprune:tokens={kept}"
    closed = cost(shape, text_tokens=TEXT, method=method, new_tokens=3)
    length = TEXT + closed.visual_tokens_kept + closed.separators
    assert kept in (None, closed.visual_tokens_kept)
    caches: list[Any] = []

    def forward(tokens: int) -> None:
        inputs = torch.empty(1, tokens, shape.decoder.width, device="meta", dtype=model.dtype)
        out = model.get_decoder()(inputs_embeds=inputs, past_key_values=caches[-1] if caches else None, use_cache=True)
        caches.append(out.past_key_values)
        model.lm_head(out.last_hidden_state[:, -1:])

    assert counted(lambda: forward(length)) == closed.prefill
    assert counted(lambda: forward(1)) + counted(lambda: forward(1)) == closed.decode
    assert caches[-1].get_seq_length() == length + 2
    assert closed.kv_cache_bytes == sum(t.numel() * t.element_size() for layer in caches[-1].layers for t in held(layer))


def held(layer: Any) -> list[torch.Tensor]:
    """The tensors of one layer of a cache."""
    if not hasattr(layer, "conv_states"):
        return [layer.keys, layer.values]
    return [state for states in (layer.conv_states, layer.recurrent_states) for state in states.values()]


@pytest.mark.parametrize("name", [n for n in COUNTED if n not in ("idefics3-8b", "smolvlm2-2.2b", *PATCHES, *PACKED)])
def test_the_tower_costs_what_torch_counts(name):
    model, shape = on_meta(name), load_shape(name)
    (picture,) = rules_of(name).typical()
    side = shape.vision["image_size"]
    pixels = torch.empty(picture.views, 3, side, side, device="meta", dtype=model.dtype)
    if picture.shape.modality == "video":
        ran = counted(lambda: model.model.get_video_features(pixels[None]))
    else:
        size = {"image_sizes": torch.tensor([picture.size[::-1]])} if picture.size else {}
        ran = counted(lambda: model.model.get_image_features(pixels, **size))
    assert ran == vision_flops(shape, picture) == cost(shape).vision


@pytest.mark.parametrize("name", ["idefics3-8b", "smolvlm2-2.2b"])
def test_the_tower_of_tiles_by_name_costs_what_torch_counts(name):
    shape = load_shape(name)
    if transformers_version() < (5, 24):
        pytest.skip("older versions look for empty tiles by value, which a model without weights has not")
    found = counter.count(on_meta(name), shape, me.build("none"), image_size=(800, 600))
    assert found.vision == cost(shape, image_size=(800, 600)).vision


@pytest.mark.parametrize("name", PACKED)
def test_a_tower_that_sees_all_pictures_at_once_costs_what_torch_counts(name):
    shape, adapter = load_shape(name), adapter_for(on_meta(name))
    pictures = rules_of(name).prompt(None, (420, 280), exact=True, images=2)
    with counter.OneDevice():
        call = adapter.example(pictures, lambda *size: torch.empty(size, device="meta", dtype=adapter.model.dtype))
        ran = counted(lambda: adapter.base.get_image_features(**call))
    among = sum(math.prod(picture.patches) for picture in pictures)
    assert (
        ran == sum(vision_flops(shape, picture, among=among) for picture in pictures) == cost(shape, image_size=(420, 280), images=2).vision
    )


@pytest.mark.parametrize("size", [(672, 672), (700, 420)])
@pytest.mark.parametrize("name", PATCHES)
def test_a_tower_of_flat_patches_costs_what_torch_counts(name, size):
    """Grids and window indices are read by value, so they stay on the CPU beside features on meta."""
    model, shape = on_meta(name), load_shape(name)
    picture, tower = rules_of(name).of_size(size), shape.tower
    patches = torch.empty(math.prod(picture.patches), 3 * tower.frames * tower.patch**2, device="meta", dtype=model.dtype)
    with counter.OneDevice():
        ran = counted(lambda: model.model.get_image_features(patches, torch.tensor([[1, *picture.patches]])))
    assert ran == vision_flops(shape, picture)


@pytest.mark.parametrize(
    "spec",
    [
        *("random:keep=0.3", "uniform:keep=0.3", "pool:keep=0.3", "divprune:keep=0.3", "divprune:keep=0.3,metric=l2"),
        *(
            "fastervlm:keep=0.3",
            "vispruner:keep=0.3",
            "vispruner:keep=0.3,r=1",
            "visionzip:keep=0.3",
            "scope:keep=0.3",
            "prumerge_plus:keep=0.3",
        ),
        *("cdpruner:keep=0.3", "pool:keep=0.3,op=gem", "spp:keep=0.3", "tome:keep=0.3", "tome:keep=0.3,r=10"),
        *("divmerge:keep=0.3", "random:keep=0.3,merge=similarity", "apet:keep=0.3", "prunesid:keep=0.3", "otprune:keep=0.3"),
        *("vscan:keep=0.3", "vidcom2:keep=0.3", "vcast:keep=0.3", "evs:keep=0.3", "fastvid:keep=0.3"),
    ],
)
def test_a_method_costs_what_torch_counts(spec):
    of_tower = {"attention": torch.rand(120), "early_attention": torch.rand(120), "keys": torch.randn(120, 48)}
    method, v = me.build(spec), me.VisualTokens(torch.randn(10 * 12, 48), grid=(10, 12), text=torch.randn(7, 48), **of_tower)
    computed = method.flops(120, 48, 36) + method.merge_flops(120, 48, 36)
    if method.name == "cdpruner":  # a CPU looks at few tokens again, a GPU at all
        assert counted(lambda: method.compress_batch([v], 36)) == computed > counted(lambda: method.compress(v, 36)) > 0
    else:
        assert counted(lambda: method.compress(v, 36)) == computed
    multiplies = spec == "divprune:keep=0.3" or method.name in ("cdpruner", "tome", "scope", "visionzip", "prumerge_plus")
    multiplies |= spec == "vispruner:keep=0.3" or "merge" in spec or method.name in ("apet", "prunesid", "otprune", "vscan", "fastvid")
    assert (computed > 0) == multiplies


CALLS = {"decode": {"new_tokens": 3}, "batch": {"batch_size": 2}, "pictures": {"images": 2, "batch_size": 2}}
FEW = ("none", "divprune:tokens=7")  # for families that are like another, whose tower's costs are theirs
REAL = (*FEW, "resize:keep=0.25", "pool:keep=0.25", "random:keep=0.3,merge=mean", "cdpruner:tokens=7", "mmtok:tokens=7", "hawk:tokens=7")


@pytest.mark.parametrize("family, spec, call", pairwise([*product(FAMILIES, REAL, CALLS), *product(ALIKE, FEW, CALLS)]))
def test_a_real_call_costs_what_torch_counts(family, spec, call):
    """Every phase, with the CPU's attention kernel, for which torch has no formula of its own."""
    model = tiny(family)
    shape = shape_of(model.config, family)
    if not set(me.build(spec).needs) <= shape.rules.gives:
        with pytest.raises(me.UnsupportedModelError, match="does not give"):
            cost(shape, method=spec)
        return
    known = {"image_size": (96, 60)} if EVERY[family].mrope else {"image_size": (70, 50)} if EVERY[family].tiled else {}
    found = counter.count(model, shape, me.build(spec), text_tokens=9, **known, **CALLS[call])
    left = {"marks": found.marks} if EVERY[family].marked else {}  # which rows have tokens left is the method's choice
    closed = cost(shape, text_tokens=9, method=spec, **known, **CALLS[call], **left)
    fewer = spec.startswith("cdpruner")  # on a CPU, which looks at few tokens again
    assert 0 < found.compress <= closed.compress if fewer else found.compress == closed.compress
    for phase in ("vision", "prefill", "decode", *(() if fewer else ("total",))):
        assert getattr(found, phase) == getattr(closed, phase), phase


@pytest.mark.parametrize("settings", [{}, {"vision_feature_layer": (-2, -1)}], ids=["one layer", "two layers"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("method", ["none", "divprune:tokens=9", "resize:tokens=9"])
def test_generate_on_a_wrapped_model_costs_what_is_computed(make_llava, make_batch, tower, settings, method):
    """``new_tokens`` is ``max_new_tokens``: the prefill gives the first. SigLIP's unused pooling head runs and is counted."""
    model = me.wrap(make_llava(tower=tower, **settings), method)
    inputs = make_batch("one image")
    text = inputs["input_ids"].shape[1] - 36
    with counter.flop_counter() as mode:
        model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert mode.get_total_flops() == cost(shape_of(me.unwrap(model).config), text_tokens=text, method=method, new_tokens=5).total


def test_attention_asked_of_the_tower_is_counted(make_llava, registered):
    @registered("by_attention")
    @dataclass(frozen=True)
    class ByAttention(me.Selector):
        needs: ClassVar = {"attention"}

        def score(self, v):
            return v.attention

    tiles = [tiny(name) for name in ("llava_next", "llava_onevision", "internvl", "cohere2_vision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")]
    for model in (make_llava(tower="clip"), make_llava(tower="siglip"), *tiles):
        shape = shape_of(model.config)
        found, closed = counter.count(model, shape, me.build("by_attention:tokens=9")), cost(shape, method="by_attention:tokens=9")
        assert found.vision == closed.vision > cost(shape).vision
        assert found.total == closed.total
    of_7b, plain = cost("qwen2.5-vl-7b", method="by_attention:tokens=9"), cost("qwen2.5-vl-7b")
    assert of_7b.vision - plain.vision == 2 * 1280 * 2304**2, "24 x 24 tokens of 2 x 2 patches, in the last block, which has no windows"


@pytest.mark.parametrize("kind", ["mistral", "phi", "gpt_neox", "gemma"])
def test_other_decoders_cost_what_torch_counts(kind):
    """Two matrices in the MLP or three, heads of their own or shared, wider than the model or not."""
    from transformers import AutoConfig, AutoModelForCausalLM

    heads = {"num_key_value_heads": 2} if kind != "gpt_neox" else {}
    heads |= {"head_dim": 24} if kind in ("mistral", "gemma") else {}
    text = AutoConfig.for_model(
        kind, vocab_size=99, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, **heads,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text).eval()
    whole = {**shape_config("llava-1.5-7b"), "text_config": text.to_dict()}
    decoder = shape_of(whole).decoder
    ids = torch.zeros(1, 50, dtype=torch.long, device="meta")
    assert counted(lambda: model(ids, use_cache=True, logits_to_keep=1)) == prefill_flops(decoder, [50] * 3)


# ------------------------------------------------------------------------------------------------ the papers' tables


@pytest.mark.parametrize(
    ("method", "ratio", "macs"),
    [
        ("keep=0.098", 15.6303, 0.5122), ("tokens=192", 37.27, 1.209), ("tokens=128", 27.05, 0.880), ("tokens=64", 16.89, 0.553),
        ("tokens=32", 11.84, 0.390),
    ],
)  # fmt: skip
def test_divprune_table_1_on_llava_15(method, ratio, macs):
    """The mean of the ratios, which is not the ratio of the means: that is 15.87% at the paper's budget."""
    base = [cost("llava-1.5-7b", text_tokens=t, convention="divprune") for t in PAPER_TEXT]
    pruned = [cost("llava-1.5-7b", text_tokens=t, method=f"divprune:{method}", convention="divprune") for t in PAPER_TEXT]
    assert round(means(base), 4) == 3.2280
    assert means(pruned) == pytest.approx(macs, abs=6e-4)
    assert sum(p.ratio(b) for p, b in zip(pruned, base)) / len(base) == pytest.approx(ratio, abs=6e-3)
    if method == "keep=0.098":
        assert round(means(pruned), 4) == 0.5122
        assert round(100 * means(pruned) / means(base), 2) == 15.87


def test_divprune_on_llava_16_saves_what_the_paper_says():
    pairs = list(zip(PAPER_TEXT, PAPER_VISUAL_16))
    base = [cost("llava-1.6-7b", text_tokens=t, visual_tokens=n, convention="divprune") for t, n in pairs]
    pruned = [cost("llava-1.6-7b", text_tokens=t, visual_tokens=n, method="divprune:keep=0.098", convention="divprune") for t, n in pairs]
    assert [p.visual_tokens_kept for p in pruned] == [round(0.098 * n) for n in PAPER_VISUAL_16]
    assert round(100 - sum(p.ratio(b) for p, b in zip(pruned, base)) / len(base), 1) == 89.2


def test_sparsevlm_counts_three_matrices():
    decoder = load_shape("llava-1.5-7b").decoder
    n, d, m = 640, 4096, 11008
    assert conventions.prefill_macs(decoder, [n] * 32, "sparsevlm") == 32 * (4 * n * d * d + 2 * n * n * d + 3 * n * d * m)
    assert conventions.prefill_macs(decoder, [n] * 32, "divprune") == 32 * (4 * n * d * d + 2 * n * n * d + 2 * n * d * m)


@pytest.mark.parametrize(
    ("kept", "published"),
    [((), 4.62), ((300, 200, 110), 2.14), ((303, 110, 36), 1.72), ((66, 30, 17), 1.30)],
    ids=["576", "192", "128", "64"],
)
def test_sparsevlm_table_1_on_llava_15(kept, published):
    """Within 1% from tokens per layer: tokens are dropped behind layers 2, 6 and 15, and a tenth of 30% of them comes back merged.

    The paper does not print its text length; 117 tokens give all four numbers.
    """
    visual = [576]
    for k in kept:
        visual.append(k + int((int((visual[-1] - k) * 0.3) + 1) / 10) + 1)
    layers = [v for v, times in zip(visual, (3, 4, 9, 16)) for _ in range(times)] if kept else [576] * 32
    found = cost("llava-1.5-7b", text_tokens=117, convention="sparsevlm", visual_per_layer=layers)
    assert found.prefill / 1e12 == pytest.approx(published, rel=0.01)


def test_a_convention_counts_the_prefill_alone():
    found = cost("llava-1.5-7b", method="divprune:tokens=64", convention="divprune")
    assert (found.vision, found.compress, found.decode, found.total) == (0, 0, 0, found.prefill)
    with pytest.raises(me.MllmEfficientError, match="new tokens have no effect under 'divprune'"):
        cost("llava-1.5-7b", new_tokens=2, convention="divprune")


# ------------------------------------------------------------------------------------------------ tokens


def small_adapter(family: str):
    return adapter_for(tiny(family))


@pytest.mark.parametrize("aspect", ASPECTS)
@pytest.mark.parametrize("family", [f.name for f in FAMILIES.values() if f.tiled])
def test_a_picture_has_the_tokens_that_its_adapter_finds(family, aspect):
    """By its size alone, what the adapter finds by the processor's pixels and the host's own packing."""
    rules = shape_of(tiny(family).config, family, FAMILIES[family].settings).rules
    (item,) = small_adapter(family).items(aspect_batch(family, aspect))
    picture = rules.of_size(ASPECTS[aspect])
    assert bare(picture.shape) == bare(item.shape)


def test_canvases_of_cohere2_are_those_of_its_processor():
    """Of transformers' own, where torchvision is there for it to be imported."""
    pytest.importorskip("torchvision", reason="the processor of Cohere2 Vision needs torchvision")
    from transformers.models.cohere2_vision.image_processing_cohere2_vision import get_optimal_tiled_canvas

    rules = shape_of(tiny("cohere2_vision").config, "cohere2_vision").rules
    for width, height in ((1, 1), (24, 24), (25, 24), (48, 49), (70, 50), (700, 20), (31, 640), (96, 72), (1000, 1000), (97, 73)):
        for most in (1, 4, 12):
            across, down = get_optimal_tiled_canvas((height, width), (24, 24), 1, most)
            assert rules.tiling((width, height), {"max_patches": most}) == (down, across)


def test_every_family_of_the_table_has_both_halves_and_is_tested():
    from mllm_efficient.patches.rules import adapter_class, rules_class

    for model_type in TABLE:
        assert issubclass(adapter_class(model_type), rules_class(model_type))
    assert set(TABLE) == {"llava", "gemma4", *EVERY, *MARKED_ALIKE}


def bare(shape: VisualShape) -> list[tuple]:
    return [(p.rows, p.columns, p.tile, p.frame, p.row_tiles, p.column_tiles, p.newline) for p in shape.planes]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_adapter_finds_in_example_inputs_what_the_rules_made_them_of(name, count):
    model = tiny(name)
    adapter, rules = adapter_for(model), shape_of(model.config, name).rules
    size = adapter.example_size if adapter.fixed_count else ASPECTS["7:5"]
    inputs = make_inputs(Loaded(model, None, ModelOptions(name)), adapter, Workload(size, count, 16, 2), 2)
    found = [bare(item.shape) for item in adapter.items(inputs.call)]
    assert found == 2 * [bare(image.shape) for image in rules.together(rules.of_size(size), count)]
    assert model.generate(**inputs.call, max_new_tokens=1).shape == (2, inputs.lengths[0] + 1) and inputs.lengths[1] == 16


@pytest.mark.parametrize("size", [(672, 672), (640, 480), (100, 1000), (3000, 400), (333, 777), (1, 1)], ids=str)
@pytest.mark.parametrize("name", ["llava-1.6-7b", "llava-onevision-7b"])
def test_a_shipped_shape_has_the_tokens_that_its_adapter_finds(name, size):
    adapter, rules = adapter_for(on_meta(name)), rules_of(name)
    picture = rules.of_size(size)
    side = rules.tile
    pixels = torch.empty(picture.views, 3, side, side, device="meta")
    (item,) = adapter.items({"pixel_values": pixels, "image_sizes": torch.tensor([size[::-1]])})
    assert bare(picture.shape) == bare(item.shape)
    for grid in ((13, 13), (5, 5)):
        assert bare(rules.smaller(picture, grid).shape) == bare(adapter.shape_at(item, grid))


@pytest.mark.parametrize("size", [(672, 672), (1000, 701), (20, 30), (9000, 8000), (60, 6000)], ids=str)
@pytest.mark.parametrize(("name", "limits"), [("qwen2.5-vl-7b", (3136, 12845056)), ("qwen3.5-9b", (65536, 16777216))])
def test_a_qwen_picture_has_the_size_that_its_processor_gives(name, limits, size):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    step = rules_of(name).step
    high, wide = smart_resize(size[1], size[0], factor=step, min_pixels=limits[0], max_pixels=limits[1])
    assert rules_of(name).of_size(size).shape.grid == (high // step, wide // step)


@pytest.mark.parametrize(("family", "row"), [*((name, "one image") for name in FAMILIES), ("llava_next_video", "video")])
def test_every_budget_keeps_what_the_plan_says(family, row):
    """``keeping`` is the plan without tensors: counts, groups and separators are the same for every method and part."""
    adapter = small_adapter(family)
    rules = shape_of(tiny(family).config, family, FAMILIES[family].settings).rules
    (item,) = adapter.items(make(family, row))
    if row == "video":
        picture = rules.video(len(item.shape.planes))
    elif FAMILIES[family].mrope:
        picture = rules._at(item.shape.grid, None)
    else:
        picture = rules.of_size(ASPECTS["7:5"])
    tried = 0
    for name in ("none", "random", "uniform", "pool", "resize", "divprune", "cdpruner", "spp", "tome"):
        extras = ["", "per=tile", "per=frame", "newline=keep", *(["order=picked"] if name == "divprune" else [])]
        for budget in ("keep=1.0", "keep=0.7", "keep=0.3", "tokens=7", "tokens=9999", "keep=0.01") if name != "none" else ("",):
            for more in extras if name != "none" else ("",):
                method = me.build(":".join(filter(None, (name, ",".join(filter(None, (budget, more)))))))
                expected = outcome(lambda method=method: (check(adapter, method), plan(adapter, method, item))[1])
                found = outcome(lambda method=method: (check(rules, method), keeping.keep(rules, method, picture))[1])
                if isinstance(expected, str) or isinstance(found, str):
                    shuffles = "order='picked'" in str(expected)  # where it may stand is no question of cost
                    assert isinstance(found, str) or shuffles, (method, expected)
                    assert shuffles or isinstance(expected, str), (method, found)
                    continue
                tried += 1
                assert (found.tokens, found.separators) == (expected.kept, expected.separators), method
                sizes = [(g.n, g.k) for g in expected.groups]
                assert sorted(found.groups) == sorted(sizes), method
                assert bare(found.picture.shape) == bare(expected.after or item.shape), method
    assert tried > 25


def outcome(run):
    """What a call gives, or the message of the package's error."""
    try:
        return run()
    except me.MllmEfficientError as error:
        return str(error)


def test_resize_costs_a_smaller_tower():
    base, small = cost("llava-1.5-7b"), cost("llava-1.5-7b", method="resize:keep=0.25")
    assert small.visual_tokens_kept == 144
    shape = load_shape("llava-1.5-7b")
    rules = shape.rules
    (picture,) = rules.typical()
    assert small.vision == vision_flops(shape, rules.smaller(picture, (12, 12))) < base.vision / 4
    assert cost("llava-1.5-7b", method="pool:keep=0.25").vision == base.vision


def test_several_pictures_have_a_budget_each():
    two = cost("llava-1.5-7b", visual_tokens=1152, method="divprune:tokens=64")
    assert two.visual_tokens_kept == 128 and two.vision == 2 * cost("llava-1.5-7b").vision
    assert two.compress == 2 * cost("llava-1.5-7b", method="divprune:tokens=64").compress


def test_a_number_of_tokens_names_a_picture_where_it_can():
    known = cost("llava-1.6-7b", visual_tokens=2880, method="pool:keep=0.25")
    assert known.separators == 0 and known.vision == cost("llava-1.6-7b").vision  # every token given is counted as given
    unknown = cost("llava-1.6-7b", visual_tokens=2225)
    assert "vision cost of 672x672: 5 views of 336x336" in unknown.pictures and unknown.vision == known.vision
    assert cost("llava-1.6-7b", image_size=(672, 672), visual_tokens=2880).separators == 48
    assert cost("qwen2.5-vl-7b", visual_tokens=1000).pictures == "1120x700: 1000 tokens"
    assert cost("llava-next-video-7b", visual_tokens=288).pictures.startswith("2 frames")
    assert cost("llava-next-video-7b", image_size=(336, 672)).pictures.startswith("336x672: 3 views")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"shape": "llava-1.5-7b", "visual_tokens": 144}, "every picture gives 576 on llava-1.5-7b"),
        ({"shape": "llava-1.5-7b", "image_size": (9, 9)}, "no effect on llava-1.5-7b: every picture gives 576"),
        ({"shape": "llava-1.6-7b", "visual_tokens": 2880, "image_size": (336, 672)}, "336x672 has 1728 tokens on llava-1.6-7b, not 2880"),
        ({"shape": "llava-1.6-7b", "visual_tokens": 9999}, "at most 2880 on llava-1.6-7b"),
        ({"shape": "llava-1.6-7b", "visual_tokens": 2225, "method": "pool:keep=0.5"}, "pool needs the grid of the tokens"),
        ({"shape": "llava-1.6-7b", "visual_tokens": 2225, "method": "random:keep=0.5,per=tile"}, "which 2225 alone do not tell"),
        ({"shape": "llava-next-video-7b", "visual_tokens": 145}, "every frame gives 144"),
        ({"shape": "qwen2.5-vl-7b", "visual_tokens": 997}, "no picture near to a square has 997 tokens"),
        ({"shape": "qwen2.5-vl-7b", "image_size": (10, 9000)}, "at most 200 times"),
        ({"shape": "llava-1.5-7b", "method": "divprune:tokens=577"}, "more than the 576"),
        ({"shape": "llava-1.5-7b", "method": "divprune:keep=0.5,per=tile"}, "per='tile' has no effect on llava-1.5-7b"),
        ({"shape": "llava-1.5-7b", "method": "divprune:keep=0.5,newline=keep"}, "no newline columns"),
        ({"shape": "llava-1.5-7b", "convention": "macs"}, "unknown convention 'macs': one of exact, divprune, sparsevlm"),
        ({"shape": "llava-1.5-7b", "visual_per_layer": [576]}, "visual tokens of 1 layers given, and llava-1.5-7b has 32"),
        ({"shape": "llava-1.5-7b", "text_tokens": -1}, "-1 text tokens"),
        ({"shape": "llava-1.5-8b"}, "did you mean 'llava-1.5-7b'"),
        ({"shape": "./absent"}, "no shape or folder './absent'"),
    ],
)  # fmt: skip
def test_what_a_model_cannot_have_is_one_line(settings, says):
    with pytest.raises(me.MllmEfficientError) as raised:
        cost(**settings)
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_a_papers_convention_takes_any_number_of_tokens():
    found = cost("llava-1.5-7b", visual_tokens=1000, method="divprune:keep=0.1", convention="divprune")
    assert (found.visual_tokens_full, found.visual_tokens_kept) == (1000, 100)


def test_tokens_by_layer_add_up_layer_by_layer():
    """What in-decoder methods need: the same tokens in all layers are the plain cost, and layers are independent."""
    decoder = load_shape("llava-1.5-7b").decoder
    layers = [576] * 8 + [144] * 24
    one = cost("llava-1.5-7b", visual_per_layer=layers, new_tokens=3)
    assert cost("llava-1.5-7b", visual_per_layer=[576] * 32) == cost("llava-1.5-7b")
    lengths = [n + TEXT for n in layers]
    assert one.prefill == prefill_flops(decoder, lengths)
    assert one.decode == decode_flops(decoder, lengths) + decode_flops(decoder, [n + 1 for n in lengths])
    assert one.kv_cache_bytes == kv_cache_bytes(decoder, [n + 2 for n in lengths]) == 2 * 2 * 4096 * sum(n + 2 for n in lengths)


# ------------------------------------------------------------------------------------------------ shapes


def test_the_shapes_ship():
    assert tuple(shape_names()) == SHAPES


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("bench-0.3b", 288), ("llava-1.5-7b", 7063), ("llava-1.5-13b", 13351), ("llava-1.6-7b", 7063), ("llava-next-video-7b", 7063),
        ("llava-onevision-7b", 8030), ("qwen2.5-vl-7b", 8292), ("mistral-small-3.1-24b", 24011), ("lightonocr-1b", 1006),
        ("idefics3-8b", 8462), ("smolvlm2-2.2b", 2247), ("qwen3.5-9b", 9410), ("glm-4.6v-flash", 10293), ("gemma-3-4b", 4300),
        ("gemma-4-e4b", 7632), ("minicpm-v-9b", 9516), ("llama-4-scout-109b", 108642),
    ],
)  # fmt: skip
def test_a_shape_builds_the_model_it_is_named_after(name, millions):
    model = on_meta(name)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
    assert type(model).__name__ in shape_config(name)["architectures"]
    completed = shape_of(model.config, name)
    own = load_shape(name)
    assert (completed.decoder, completed.tower, completed.projector) == (own.decoder, own.tower, own.projector)


def test_a_configuration_without_defaults_is_completed(tmp_path):
    """As the hub has them: the text part of llava-1.5-7b-hf names its vocabulary and little else."""
    config = shape_config("llava-1.5-7b")
    config["text_config"] = {"model_type": "llama", "vocab_size": 32064}
    config["vision_config"] = {k: v for k, v in config["vision_config"].items() if k != "num_channels"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cost(str(tmp_path)) == cost("llava-1.5-7b")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "no readable config.json"),
        ("[]", "is not a model configuration"),
        ('{"model_type": "bert"}', "is of type bert"),
        ('{"model_type": "llava", "text_config": {"model_type": "mamba"}, "vision_config": {}}', "mamba decoder"),
    ],
)  # fmt: skip
def test_an_unknown_configuration_is_one_line(tmp_path, content, says):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(me.MllmEfficientError) as raised:
        load_shape(str(tmp_path))
    assert says in str(raised.value) and "\n" not in str(raised.value)


# ------------------------------------------------------------------------------------------------ the command
