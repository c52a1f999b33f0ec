"""``wrap(..., cache=)``: the tower runs once for each picture and frame, and no answer changes; whatever an encoding depends on misses."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest
import torch

import mllm_efficient as me
from mllm_efficient.apply.encode import encode
from mllm_efficient.apply.vision_cache import Part, VisionCache, bytes_of, state_of
from mllm_efficient.patches import adapter_for
from mllm_efficient.patches.base import Encoding

from ..families import EVERY, PROMPTS, TILE, make, process, tiny

NEW = dict(max_new_tokens=5, do_sample=False)
FRAMES, WINDOW, STEP, WINDOWS = 68, 8, 4, 16
CACHE = "64MB"


class Runs:
    """How often a module ran, and how many pictures and frames it was given."""

    def __init__(self, module, views=lambda args, kwargs: len(args[0])):
        self.calls = self.views = 0
        self.count = views
        self.handle = module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs):
        self.calls, self.views = self.calls + 1, self.views + self.count(args, kwargs)


def tower_of(model):
    return getattr(model.model, "vision_tower", None) or model.model.visual


def views(args, kwargs):
    """Pictures or frames of a call of the tower; temporal patches where it takes grids."""
    grid = kwargs.get("grid_thw")
    return int(grid[:, 0].sum()) if grid is not None else len(args[0] if args else kwargs["pixel_values"])


def windows(name: str) -> list[dict]:
    """The calls for windows of one long video that overlap by half."""
    side = 16 if EVERY[name].mrope else TILE
    seed = torch.Generator().manual_seed(7)
    long = torch.randint(0, 256, (FRAMES, side, side, 3), generator=seed, dtype=torch.uint8).numpy()
    starts = range(0, FRAMES - WINDOW + 1, STEP)
    return [process(name, [PROMPTS["video"]], [[]], [np.ascontiguousarray(long[s : s + WINDOW])]) for s in starts]


@pytest.mark.parametrize("spec", ["divprune:keep=0.5", "fastv:layer=1,ratio=0.5", "none"])
@pytest.mark.parametrize("name, together", [("llava_next_video", 1), ("qwen2_5_vl", 2)])
def test_windows_that_overlap_run_the_tower_once_for_each_frame(name, together, spec):
    calls = windows(name)
    assert len(calls) == WINDOWS
    plain = me.wrap(tiny(name), spec)
    counted = Runs(tower_of(plain), views)
    expected = [plain.generate(**call, **NEW) for call in calls]
    assert counted.views == WINDOWS * WINDOW // together
    model = me.wrap(tiny(name), spec, cache=CACHE)
    counted = Runs(tower_of(model), views)
    found, uses = [], []
    for call in calls:
        found.append(model.generate(**call, **NEW))
        uses.append(me.last_report(model).vision_cache)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert counted.views == counted.calls == FRAMES // together
    assert [(use.hits, use.runs) for use in uses] == [(0, WINDOW // together)] + [(STEP // together,) * 2] * (WINDOWS - 1)
    assert me.last_report(plain).vision_cache is None


@pytest.mark.parametrize(
    "name, spec",
    [
        ("llava_next", "resize:keep=0.5"), ("llava_next", "visionzip:keep=0.5"), ("llava_onevision", "none"),
        ("llava_onevision", "resize:keep=0.5"), ("llava_onevision", "visionzip:keep=0.5"), ("qwen3_vl", "divprune:keep=0.5"),
        ("qwen3_vl", "resize:keep=0.5"), ("qwen3_vl", "visionzip:keep=0.5"), ("internvl", "none"), ("mistral3", "divprune:keep=0.5"),
    ],
)  # fmt: skip
def test_what_is_found_is_what_the_tower_makes_of_each_alone(name, spec):
    """The slow reference: every picture of the call, and every frame that the tower sees apart, in a call of its own."""
    method, rows = me.build(spec), EVERY[name].rows
    row = "video and image" if "video and image" in rows and not method.needs else "two images"
    inputs = make(name, row)
    plain, model = tiny(name), me.wrap(tiny(name), method, cache=CACHE)
    with torch.no_grad():
        first = me.prepare(model, method, **inputs)
        second = me.prepare(model, method, **inputs)
        whole = me.prepare(plain, method, **inputs, encoded=encode(plain, method, **inputs))
        assert first.report.vision_cache.hits == 0 < first.report.vision_cache.runs == second.report.vision_cache.hits
        assert second.report.vision_cache.runs == 0
        for one, two, three in zip(first.features, second.features, whole.features, strict=True):
            for a, b, c in zip((one[1], *one[2]), (two[1], *two[2]), (three[1], *three[2]), strict=True):
                assert torch.equal(a, b)
                torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-6)  # a product of several frames may round its last bit otherwise
        answers = [m.generate(**inputs, compression=spec, **NEW) for m in (me.wrap(plain, method), model, model)]
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[1], answers[2])


def answered(model, inputs, **how):
    """Logits of a call, and how many pictures it ran the tower for."""
    with torch.no_grad():
        logits = model(**inputs, **how).logits
    return logits, me.last_report(model).vision_cache.runs


def fresh(model, inputs):
    """What the same weights give without a cache."""
    other = copy.deepcopy(me.unwrap(model))
    with torch.no_grad():
        return me.wrap(other, "divprune:tokens=9")(**inputs).logits


def optimizer_step(model):
    model.model.multi_modal_projector.linear_1.weight.grad = torch.ones_like(model.model.multi_modal_projector.linear_1.weight)
    torch.optim.SGD([model.model.multi_modal_projector.linear_1.weight], lr=0.1).step()


def loaded(model):
    model.load_state_dict({k: v + 0.01 if "vision" in k and v.is_floating_point() else v for k, v in model.state_dict().items()})


def through_data(model):
    model.model.vision_tower.embeddings.patch_embedding.weight.data.mul_(1.5)  # leaves the version of the tensor as it was


def rows_swapped(model):
    weight = model.model.multi_modal_projector.linear_2.weight
    weight.data.copy_(weight.data.flip(0))  # the same numbers


def columns_swapped(model):
    weight = model.model.multi_modal_projector.linear_2.weight
    weight.data.copy_(weight.data.unflatten(1, (-1, 4)).flip(1).flatten(1))  # in words of more than eight bytes


def other_forward(model):
    projector = model.model.multi_modal_projector
    stock = projector.forward
    projector.forward = lambda features: stock(features) + 1


def other_activation(model):
    model.model.multi_modal_projector.act = torch.nn.Tanh().eval()


def new_tensor(model):
    model.model.multi_modal_projector.linear_1.bias.data = model.model.multi_modal_projector.linear_1.bias.data + 1


def other_layer(model):
    model.config.vision_feature_layer = -2


def hook(model):
    model.model.multi_modal_projector.register_forward_hook(lambda module, args, output: output * 2)


@pytest.mark.parametrize(
    "change",
    [optimizer_step, loaded, through_data, rows_swapped, columns_swapped, other_forward, other_activation, new_tensor, other_layer, hook],
)
def test_a_changed_model_misses(tiny_llava, make_batch, change):
    model, inputs = me.wrap(tiny_llava, "divprune:tokens=9", cache=CACHE), make_batch("one image")
    before, runs = answered(model, inputs)
    assert (runs, answered(model, inputs)[1]) == (1, 0)
    change(model)
    after, runs = answered(model, inputs)
    assert runs == 1 and not torch.equal(before, after)
    assert torch.equal(after, fresh(model, inputs))


def test_a_bias_in_another_order_is_another(tiny_llava):
    bias = tiny_llava.model.multi_modal_projector.linear_1.bias
    bias.data.copy_(torch.arange(len(bias)))
    adapter = adapter_for(tiny_llava)
    before = state_of(adapter)
    bias.data.copy_(bias.data.flip(0))
    assert state_of(adapter) != before


def test_what_a_method_writes_into_its_features_is_not_kept():
    cache, part = VisionCache(CACHE), Part(None, "one")
    for runs in (1, 0, 0):
        (made,), use = cache.encoded([part], lambda item: Encoding(torch.ones(3, 2), None, deep=(torch.ones(3, 2),)))
        assert use.runs == runs and torch.equal(made.features, torch.ones(3, 2)) and torch.equal(made.deep[0], torch.ones(3, 2))
        made.features.mul_(2)
        made.deep[0].mul_(2)


def test_images_that_are_not_encoded_alone_are_refused():
    """MiniCPM-V's adapter is of the kind that all types of the table of facts share."""
    with pytest.raises(me.UnsupportedModelError, match="takes those of a call together"):
        me.wrap(tiny("minicpmv4_6"), "none", cache=CACHE)


def test_what_changes_in_the_decoder_alone_still_finds(tiny_llava, make_batch):
    model, inputs = me.wrap(tiny_llava, "divprune:tokens=9", cache=CACHE), make_batch("one image")
    before, _ = answered(model, inputs)
    model.model.language_model.layers[0].mlp.up_proj.weight.data.mul_(2)
    after, runs = answered(model, inputs)
    assert runs == 0 and not torch.equal(before, after)
    assert torch.equal(after, fresh(model, inputs))


def test_adapters_of_peft_that_are_switched_miss(tiny_llava, make_batch):
    peft = pytest.importorskip("peft")
    inputs = make_batch("one image")
    config = peft.LoraConfig(r=2, target_modules=r".*vision_tower.*q_proj|.*linear_1", init_lora_weights=False)
    model = peft.get_peft_model(tiny_llava, config, "first")
    model.add_adapter("second", config)
    model.eval()
    layers = [module for module in model.modules() if hasattr(module, "set_scale")]
    seen = []

    def expected():
        with torch.no_grad():
            prepared = me.prepare(plain, "divprune:tokens=9", **inputs)
            return plain(**prepared.model_kwargs).logits

    plain = model.get_base_model()
    unkept = {}

    def all_states(ask):
        """Every state of the adapters, one after the other."""
        for name in ("first", "second"):
            model.set_adapter(name)
            ask(name)
        with model.disable_adapter():
            ask("off")
        for layer in layers:
            layer.set_scale("second", 3.0)
        ask("scaled")
        model.merge_adapter()  # through weight.data
        ask("merged")
        model.unmerge_adapter()  # which leaves the weights as they were but for rounding
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(before[name])
        for layer in layers:
            layer.set_scale("second", 1.0)

    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    all_states(lambda name: unkept.update({name: expected()}))
    assert len({repr(logits[0, -1].tolist()) for logits in unkept.values()}) >= 4
    me.wrap(model, "divprune:tokens=9", cache=CACHE)

    def check(name):
        for runs in (1, 0):
            logits, ran = answered(model, inputs)
            assert torch.equal(logits, unkept[name]), name
            seen.append(ran == runs)

    all_states(check)
    assert seen == [True] * 10
    runs = [(model.set_adapter(name), answered(model, inputs)[1])[1] for name in ("first", "second", "first")]
    assert runs[-1] == 0


def test_gradients_and_training_never_see_what_was_kept(tiny_llava, make_batch):
    model, inputs = me.wrap(tiny_llava, "divprune:tokens=9", cache=CACHE), make_batch("one image")
    answered(model, inputs)
    out = model(**inputs)
    assert me.last_report(model).vision_cache is None
    out.logits.sum().backward()
    assert model.model.vision_tower.embeddings.patch_embedding.weight.grad.abs().sum() > 0
    model.train()
    with torch.no_grad():
        model(**inputs)
    assert me.last_report(model).vision_cache is None
    model.eval()
    assert answered(model, inputs)[1] == 0


def test_settings_of_a_call_and_precision_miss(tiny_llava, make_batch):
    model, inputs = me.wrap(tiny_llava, "divprune:tokens=9", cache=CACHE), make_batch("one image")
    found = [answered(model, inputs), answered(model, inputs, vision_feature_layer=-2)]
    with torch.autocast("cpu", torch.bfloat16):
        found.append(answered(model, inputs))
    found.append(answered(model, {**inputs, "pixel_values": inputs["pixel_values"].double().float() + 1e-6}))
    assert [runs for _, runs in found] == [1] * 4
    assert answered(model, inputs)[1] == 0 and torch.equal(answered(model, inputs)[0], found[0][0])


def test_what_was_made_in_inference_mode_is_found_outside_of_it(tiny_llava, make_batch):
    model, inputs = me.wrap(tiny_llava, "divprune:tokens=9", cache=CACHE), make_batch("one image")
    with torch.inference_mode():
        first = model.generate(**inputs, **NEW)
    assert torch.equal(model.generate(**inputs, **NEW), first)
    assert me.last_report(model).vision_cache.runs == 0


def test_later_turns_find_the_pictures_of_earlier_ones(tiny_llava, make_batch):
    first, both = make_batch("one image"), make_batch("two images")
    model = me.wrap(tiny_llava, "divprune:tokens=9", cache=CACHE)
    model.generate(**first, **NEW)
    again = {**both, "pixel_values": torch.cat([first["pixel_values"], both["pixel_values"][1:]])}
    out = model.generate(**again, **NEW)
    use = me.last_report(model).vision_cache
    assert (use.hits, use.runs) == (1, 1)
    me.unwrap(model)
    assert torch.equal(me.wrap(model, "divprune:tokens=9").generate(**again, **NEW), out)


def test_memory_is_bounded_and_the_least_recently_used_goes(tiny_llava, make_batch):
    inputs, seed = make_batch("one image"), torch.Generator().manual_seed(0)
    pictures = [torch.rand(inputs["pixel_values"].shape, generator=seed) for _ in range(4)]
    each = 36 * tiny_llava.config.text_config.hidden_size * 4
    model = me.wrap(tiny_llava, "divprune:tokens=9", cache=3 * each + 1)

    def runs(i):
        return answered(model, {**inputs, "pixel_values": pictures[i]})[1]

    assert [runs(i) for i in (0, 1, 2, 0, 3, 0, 2, 1)] == [1, 1, 1, 0, 1, 0, 0, 1]
    use = me.last_report(model).vision_cache
    assert use.bytes == 3 * each <= use.limit
    me.unwrap(model)
    me.wrap(model, "divprune:tokens=9", cache=each - 1)
    assert [runs(0), runs(0)] == [1, 1] and me.last_report(model).vision_cache.bytes == 0


def test_threads_share_it(tiny_llava, make_batch):
    inputs, seed = make_batch("one image"), torch.Generator().manual_seed(0)
    calls = [{**inputs, "pixel_values": torch.rand(inputs["pixel_values"].shape, generator=seed)} for _ in range(3)]
    model = me.wrap(tiny_llava, "divprune:tokens=9", cache=CACHE)
    alone = [model.generate(**call, **NEW, return_dict_in_generate=True, output_logits=True) for call in calls]
    wrong = []

    def ask(start):
        for i in range(6):
            out = model.generate(**calls[(start + i) % 3], **NEW, return_dict_in_generate=True, output_logits=True)
            if out.compression.vision_cache.runs or not torch.equal(out.logits[0], alone[(start + i) % 3].logits[0]):
                wrong.append((start, i))

    threads = [threading.Thread(target=ask, args=(start,)) for start in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_threads_that_fill_a_small_one_keep_its_sum_right():
    cache = VisionCache(1000)
    from mllm_efficient.apply.vision_cache import Part
    from mllm_efficient.patches.base import Encoding

    def fill(seed):
        for i in range(200):
            key = str((i * seed) % 17)
            (found,), _ = cache.encoded([Part(key, key)], lambda item: Encoding(torch.full((1 + int(item), 8), float(item)), None))
            assert found.features[0, 0] == int(key)

    threads = [threading.Thread(target=fill, args=(seed,)) for seed in (1, 3, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.bytes == sum(size for _, size in cache._kept.values()) <= 1000 and cache._kept


def test_unwrap_and_the_end_of_a_block_drop_it(tiny_llava, make_batch):
    inputs = make_batch("one image")
    model = me.wrap(tiny_llava, "divprune:tokens=9", cache=CACHE)
    answered(model, inputs)
    kept = next(h for h in model._forward_pre_hooks.values() if hasattr(h, "active")).active.cache
    assert len(kept._kept) == 1
    clone = copy.deepcopy(model)
    assert answered(clone, inputs)[1] == 1, "a copy fills its own"
    me.unwrap(model)
    assert not model._forward_pre_hooks
    me.wrap(model, "divprune:tokens=9", cache=CACHE)
    assert answered(model, inputs)[1] == 1
    me.unwrap(model)
    with me.compressed(model, "divprune:tokens=9", cache=CACHE):
        assert [answered(model, inputs)[1] for _ in range(2)] == [1, 0]
    with me.compressed(model, "divprune:tokens=9"):
        with torch.no_grad():
            model(**inputs)
        assert me.last_report(model).vision_cache is None


def test_methods_with_the_same_needs_share_and_others_do_not(tiny_llava, make_batch):
    inputs = make_batch("one image")
    model = me.wrap(tiny_llava, "divprune:tokens=9", cache=CACHE)
    runs = []
    for spec in ("divprune:tokens=9", "pool:tokens=9", "resize:tokens=9", "visionzip:tokens=9", "visionzip:tokens=12"):
        model.generate(**inputs, compression=spec, **NEW)
        runs.append(me.last_report(model).vision_cache.runs)
    assert runs == [1, 0, 1, 1, 0]


@pytest.mark.parametrize("spec", ["tokenflex:tokens=9", "dpn"])
def test_trained_methods(spec):
    model, processor = me.builtin()
    image, question = me.sample()
    inputs = processor(images=image, text=f"user : <image> {question} assistant :", return_tensors="pt")
    expected = me.wrap(model, spec).generate(**inputs, **NEW)
    me.unwrap(model)
    me.wrap(model, spec, cache=CACHE)
    for runs in (1, 0):
        assert torch.equal(model.generate(**inputs, **NEW), expected)
        assert me.last_report(model).vision_cache.runs == runs


@pytest.mark.parametrize("said, size", [("512MB", 512 * 10**6), ("2GiB", 2**31), ("1.5 kb", 1500), (4096, 4096), ("4096", 4096)])
def test_sizes(said, size):
    assert bytes_of(said) == size


@pytest.mark.parametrize("said", ["", "MB", "-1", "512 MX", 0, True, 0.5, "nan"])
def test_sizes_that_are_none_are_refused(tiny_llava, said):
    with pytest.raises(me.MllmEfficientError, match="is no size in bytes: write 512MB"):
        me.wrap(tiny_llava, "divprune:tokens=9", cache=said)
    assert not me.is_wrapped(tiny_llava)


def test_an_offloaded_tower_is_refused(tiny_llava):
    tiny_llava.model.vision_tower.to("meta")
    with pytest.raises(me.MllmEfficientError, match="offloaded"):
        me.wrap(tiny_llava, "divprune:tokens=9", cache=CACHE)
    assert not me.is_wrapped(tiny_llava)


def test_the_state_does_not_change_by_itself(tiny_llava, make_batch):
    adapter = adapter_for(tiny_llava)
    before = state_of(adapter)
    with torch.inference_mode():
        tiny_llava(**make_batch("one image"))
        inference = state_of(adapter)
    assert before == inference == state_of(adapter)
