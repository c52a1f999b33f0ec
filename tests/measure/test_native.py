"""``native``: what the model's own processor is set to, and that its counts are those that are planned."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from PIL import Image

import mllm_efficient as me
from mllm_efficient import cli, patches
from mllm_efficient.loading.models import Loaded, ModelOptions
from mllm_efficient.measure.counter import count
from mllm_efficient.measure.flops import cost, shape_of
from mllm_efficient.measure.native import Control
from mllm_efficient.patches import facts
from mllm_efficient.patches import tiny as smaller
from mllm_efficient.patches.controls import CONTROLS, PIXELS
from mllm_efficient.patches.vllm.settings import require_served

from ..families import EVERY, VOCABULARY, gemma4_processor, tiny, tokenizer
from ..folders import save

IMAGE = VOCABULARY["<image>"]
SIZES = ((48, 48), (96, 64), (50, 130))
# One family for each control; those of one file are alike.
FAMILIES = ["internvl", "idefics3", "mistral3", "qwen2_5_vl", "glm46v", "minicpmv4_6"]


def loaded(name: str, **settings: object) -> Loaded:
    """A tiny model with its processor. settings: of the image processor."""
    processor = EVERY[name].processor("left")
    for key, value in settings.items():
        setattr(processor.image_processor, key, value)
    return Loaded(tiny(name), processor, ModelOptions(name))


def asked(one: Loaded, tokens: int, size: tuple[int, int]):
    return Control(one).asked(me.build(f"native:tokens={tokens}"), [[size]])


def placeholders(one: Loaded, size: tuple[int, int]) -> int:
    """How many the processor makes of a picture."""
    ids = one.inputs([one.prompt("what", 1)], [[Image.new("RGB", size)]])["input_ids"]
    return int((ids == patches.adapter_for(one.model).placeholders["image"]).sum())


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_processor_makes_as_many_tokens_as_are_planned(name, size):
    one = loaded(name)
    control = Control(one)
    full = control.count(size, {})
    assert placeholders(one, size) == full
    seen = set()
    for tokens in {full - 1, full // 2, full // 3}:
        method = me.build(f"native:tokens={tokens}")
        setting = control.setting(method, [size])
        under = control.asked(method, [[size]])
        assert placeholders(under.loaded, size) == control.count(size, setting) <= tokens
        assert under.full == (full,) and under.method.spec() == "none"
        seen.add(control.count(size, setting))
    assert full not in seen
    assert placeholders(one, size) == full  # its own processor stays as it was


@pytest.mark.skipif(patches.transformers_version() < (5, 24), reason="Gemma 4 is of transformers 5.24")
@pytest.mark.parametrize(("tokens", "reached"), [(280, 280), (263, 140), (140, 140), (100, 70), (70, 70)])
def test_gemma_4_takes_the_nearest_of_its_counts_within_the_budget(tokens, reached):
    one = loaded("gemma4", max_soft_tokens=280)
    size = (70, 280)  # 264 tokens of at most 280
    under = asked(one, tokens, size)
    assert under.loaded.processor.image_processor.max_soft_tokens == reached
    assert placeholders(under.loaded, size) <= reached
    assert "max_soft_tokens" in me.build(f"native:tokens={tokens}").describe(None, Control(one).rules)
    assert gemma4_processor("left").image_processor.max_soft_tokens != 280


def test_a_budget_below_the_smallest_count_names_it():
    with pytest.raises(me.BadBudgetError, match="a picture of 96x64 at least 9: ask for as many"):
        asked(loaded("internvl"), 4, (96, 64))


def test_pictures_of_one_prompt_share_one_setting_and_each_is_within_its_budget():
    one = loaded("mistral3")
    control, method = Control(one), me.build("native:tokens=8")
    together = [(48, 48), (50, 130)]
    setting = control.setting(method, together)
    assert all(control.count(size, setting) <= 8 for size in together)
    assert setting != control.setting(method, together[1:])
    with pytest.raises(me.UnsupportedModelError, match="one by one"):
        control.asked(method, [together, together[1:]])
    assert control.alike(method, "ab", [together, together[1:]]) == [["a"], ["b"]]
    assert control.alike(method, "abc", [together[1:], [], together[1:]]) == [["a", "c"], ["b"]]
    assert control.alike(me.build("random:tokens=8"), "ab", [together, together[1:]]) == [["a", "b"]]


def test_a_model_without_a_control_refuses_by_name():
    one = loaded("gemma3")
    with pytest.raises(me.UnsupportedModelError, match=r"Gemma3ForConditionalGeneration has no control of its own.*use resize"):
        me.build("native:keep=0.5").check(patches.adapter_for(one.model))


def test_a_wrapped_model_and_a_composition_refuse_it():
    model = tiny("qwen2_5_vl")
    with pytest.raises(me.UnsupportedModelError, match="sets the model's own image processor"):
        me.wrap(model, "native:tokens=9")
    assert not me.is_wrapped(model)
    with pytest.raises(me.UnsupportedModelError, match="--mm-processor-kwargs"):
        require_served(me.build("native:tokens=9"))
    with pytest.raises(me.UnsupportedModelError, match="give it alone"):
        me.build("native:tokens=9 | fastv:keep=0.5")


def test_the_answer_is_that_of_the_stock_model_under_the_setting():
    """MiniCPM's mode is said to the model with each call too, and the model's configuration stays."""
    one, size = loaded("minicpmv4_6"), (48, 48)
    under = asked(one, 16, size)
    assert under.loaded.call == {"downsample_mode": "4x"} and one.model.config.downsample_mode == "16x"
    picture = Image.effect_noise(size, 90).convert("RGB")
    inputs = under.loaded.inputs([one.prompt("what", 1)], [[picture]])
    with me.compressed(one.model, under.method):
        out = one.model.generate(**inputs, max_new_tokens=3, do_sample=False)
        report = under.told(me.last_report(one.model))
    assert torch.equal(out, tiny("minicpmv4_6").generate(**inputs, max_new_tokens=3, do_sample=False))
    assert (report.visual_tokens_full, report.visual_tokens_kept) == (20, 16)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "mistral3", "glm46v"])
def test_flops_are_those_that_torch_counts(name):
    one, size, method = loaded(name), (96, 64), me.build("native:tokens=9")
    shape = shape_of(one.model.config, name, one.picture_settings)
    closed = cost(shape, method=method, image_size=size, text_tokens=12)
    counted = count(one.model, shape, method, image_size=size, text_tokens=12)
    assert (closed.vision, closed.prefill) == (counted.vision, counted.prefill)
    assert closed.visual_tokens_kept == Control(one).count(size, method.setting(Control(one).rules, size)) < closed.visual_tokens_full
    with pytest.raises(me.MllmEfficientError, match="give the size of the picture"):
        cost(shape, method=method, visual_tokens=36)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save("qwen2_5_vl", tmp_path_factory.mktemp("native") / "m", tiny("qwen2_5_vl"), EVERY["qwen2_5_vl"].processor("left"))


def rows_of(capsys, *arguments: object) -> list[dict]:
    assert cli.main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["rows"]


def test_it_is_an_arm_of_eval_beside_other_methods(folder, tmp_path, capsys):
    records = tmp_path / "data.jsonl"
    for i, size in enumerate(SIZES):
        Image.effect_noise(size, 90).convert("RGB").save(tmp_path / f"{i}.png")
    records.write_text("\n".join(json.dumps({"images": [f"{i}.png"], "prompt": "what is it"}) for i in range(len(SIZES))))
    methods = ["--method", "native:tokens=9", "--method", "random:tokens=9"]
    rows = rows_of(capsys, "eval", "--model", folder, "--data", records, *methods, "--max-new-tokens", 2)
    kept = {row["method"]: (row["visual_tokens_full"], row["visual_tokens_kept"]) for row in rows}
    control = Control(loaded("qwen2_5_vl"))
    native = [control.count(size, control.setting(me.build("native:tokens=9"), [size])) for size in SIZES]
    full = sum(control.count(size, {}) for size in SIZES) / 3
    assert kept["none"] == (pytest.approx(full), pytest.approx(full))
    assert kept["random:tokens=9"] == (pytest.approx(full), 9)
    assert kept["native:tokens=9"] == (pytest.approx(full), round(sum(native) / 3, 2))


def test_it_is_an_arm_of_generate_and_bench(folder, tmp_path, capsys):
    Image.effect_noise((96, 64), 90).convert("RGB").save(tmp_path / "a.png")
    how = ["--model", folder, "--method", "native:tokens=12"]
    (row,) = rows_of(capsys, "generate", *how, "--image", tmp_path / "a.png", "--prompt", "what", "--max-new-tokens", 2)
    assert (row["visual_tokens_full"], row["visual_tokens_kept"]) == (40, 8)
    short = ["--image-size", "96x64", "--repeats", 1, "--warmup", 0, "--output-tokens", 2]
    rows = {row["method"]: row for row in rows_of(capsys, "bench", *how, *short)}
    assert rows["native:tokens=12"]["visual_tokens_kept"] == 8 and rows["native:tokens=12"]["compress_ms"]["median"] == 0
    assert {"none", "random:tokens=8", "resize:tokens=12"} < set(rows)


def test_a_type_of_the_table_is_counted_by_its_processor():
    pytest.importorskip("torchvision", reason="LFM2-VL's processor needs torchvision")
    config = smaller.tiny_config(transformers.AutoConfig.for_model("lfm2_vl"), {**facts.FACTS["lfm2_vl"].tiny, "image_token_id": IMAGE})
    pictures = transformers.Lfm2VlImageProcessor(
        encoder_patch_size=4, tile_size=32, max_image_tokens=16, min_image_tokens=4, max_tiles=4, max_pixels_tolerance=1.0
    )
    processor = transformers.Lfm2VlProcessor(image_processor=pictures, tokenizer=tokenizer("left"))
    one = Loaded(transformers.AutoModelForImageTextToText.from_config(config).eval(), processor, ModelOptions("lfm2"))
    control, size = Control(one), (96, 64)
    full = control.count(size, {})
    assert full == placeholders(one, size) > 40
    for tokens in (9, 40):
        under = asked(one, tokens, size)
        assert tokens // 2 < placeholders(under.loaded, size) <= tokens
        assert under.full == (full,)
    picture = Image.effect_noise(size, 90).convert("RGB")
    inputs = asked(one, 9, size).loaded.inputs([one.prompt("what", 1)], [[picture]])
    assert one.model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2


def test_along_an_answer_are_the_distributions_of_a_model_that_heads_every_token():
    """MiniCPM-V 4.6 knows no ``logits_to_keep``; the model's own greedy answer is the most likely one along itself."""
    from mllm_efficient.eval.agreement import Agreement

    one, picture = loaded("minicpmv4_6"), Image.effect_noise((48, 48), 90).convert("RGB")
    request = SimpleNamespace(id="a", images=(picture,), digest="a", answers=(), pictures=lambda: [picture])
    run = Agreement(one, [request], [me.build("none")], prompts=[one.prompt("what", 1)])
    prepared, _ = run._prepared(me.build("none"), [request])
    call = prepared.model_kwargs
    ids = one.model.generate(**call, max_new_tokens=4, do_sample=False)[0, call["input_ids"].shape[1] :]
    (along,) = run._along(me.build("none"), [request], [ids])
    assert along.argmax(-1).tolist() == ids.tolist()


@pytest.mark.parametrize("tokens", [4, 30, 100])
def test_the_limits_of_a_row_are_those_of_its_processor(tokens):
    """PaddleOCR-VL's, which divides by tokens of 28 x 28 pixels."""
    assert {row.control for row in facts.FACTS.values()} - {""} == set(CONTROLS)
    own = transformers.PaddleOCRVLImageProcessorPil()
    (setting, *_) = CONTROLS[PIXELS](tokens, 28, own.to_dict())
    set_up = type(own).from_dict({**own.to_dict(), **setting})
    _, rows, columns = set_up(Image.new("RGB", (640, 400)), return_tensors="pt")["image_grid_thw"][0].tolist()
    assert tokens // 2 <= rows * columns // 4 <= tokens
