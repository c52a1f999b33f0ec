"""Prompts, pixel budgets and adapters: what a model is asked, with what, and what is said where it cannot be."""

from __future__ import annotations

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
import transformers

import mllm_efficient as me
from mllm_efficient.cli import main
from mllm_efficient.loading import processor as processors
from mllm_efficient.loading.models import Loaded, ModelOptions, environment, load
from mllm_efficient.loading.prompts import model_inputs, question_prompt, rendered, without_markers
from mllm_efficient.measure import counter
from mllm_efficient.measure.flops import cost, shape_of
from mllm_efficient.measure.shapes import load_shape
from mllm_efficient.patches import adapter_for

from ..families import FAMILIES, VOCABULARY, clip, noise, tiny
from ..folders import NAMES, TEMPLATE, parts_of, placeholder, save

TALK = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what ?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    {"role": "user", "content": "and ?"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """``folder(name)``: a family's folder, written once."""
    root, known = tmp_path_factory.mktemp("folders"), {}

    def make(name):
        known[name] = known.get(name) or save(name, root / name, *parts_of(name, None, None))
        return known[name]

    return make


@pytest.fixture
def picture(tmp_path):
    noise(0, 70, 50).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def fails(capsys, *arguments) -> str:
    assert main([*map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    return err.strip().splitlines()[-1]


def with_template(name, template=TEMPLATE):
    processor = copy.deepcopy(FAMILIES[name].processor("left"))
    processor.chat_template = None if template is None else template.replace("IMAGE", placeholder(name))
    return processor


# ------------------------------------------------------------------------------------------------ prompts


@pytest.mark.parametrize("name", ["llava_next", "internvl", "qwen2_vl"])
def test_a_question_gets_the_template_wherever_its_placeholder_stands(name):
    """In front of it, in it, as LLaVA files write it or as the model does, with what the template puts around it."""
    processor, token = with_template(name), placeholder(name)
    whole = f"user : {token} what ? assistant :"
    asked = ["what ?", "<image>\nwhat ?", "<image> what ?", f"{token}\nwhat ?", f"{processor.image_token}what ?", whole]
    asked = [a.replace("> what", ">what") if a != whole else a for a in asked]
    assert [question_prompt(processor, a, 1) for a in asked] == [whole] * len(asked)
    assert question_prompt(processor, "is <image> like <image>\n?", 2) == f"user : is  {token}  like  {token} ? assistant :"
    for question, images, says in (
        ("<image> ?", 2, "1 .* and 2 image"),
        ("<image><image> ?", 1, "2 .* and 1 image"),
        ("<image> ?", 0, "1 .* and 0"),
    ):
        with pytest.raises(me.MllmEfficientError, match=says):
            question_prompt(processor, question, images)


def test_a_model_without_a_template_is_asked_as_llava_was_trained_and_says_so():
    processor = with_template("llava_next", None)
    assert question_prompt(processor, "<image>\nwhat ?", 1) == question_prompt(processor, "what ?", 1) == "USER: <image>\nwhat ? ASSISTANT:"
    assert rendered(processor, TALK) == "USER: <image>\nwhat ? ASSISTANT: red</s>USER: and ? ASSISTANT:"
    assert rendered(processor, [{"role": "system", "content": "be brief"}, *TALK[:1]], answer=False) == "be brief USER: <image>\nwhat ? "
    loaded = Loaded(None, processor, ModelOptions(model="bare"))
    assert loaded.notes == ["bare has no chat template: its prompts are written USER: ... ASSISTANT:"]
    assert Loaded(None, with_template("llava_next"), ModelOptions()).notes == []


def test_a_template_that_begins_with_the_start_token_does_not_double_it():
    processor = with_template("llava_next", "{{ bos_token }} " + TEMPLATE)
    inputs = model_inputs(processor, [question_prompt(processor, "what ?", 1)], [noise(0, 40, 40)])
    ids = inputs["input_ids"][0].tolist()
    assert ids[0] == VOCABULARY["<s>"] and ids.count(VOCABULARY["<s>"]) == 1


def test_pictures_go_to_the_prompt_that_has_their_placeholders():
    """Flat or nested, with text-only rows between: a picture alone in its prompt is tiled, two of one prompt are not."""
    model, processor = tiny("llava_onevision"), with_template("llava_onevision")
    pictures = [noise(i, 70, 50) for i in range(3)]
    prompts = [question_prompt(processor, "what ?", n) for n in (2, 0, 1)]
    flat = model_inputs(processor, prompts, pictures)
    nested = model_inputs(processor, prompts, [pictures[:2], [], pictures[2:]])
    assert all(torch.equal(flat[k], nested[k]) for k in flat) and flat["batch_num_images"].tolist() == [2, 1]
    assert [item.shape.n for item in adapter_for(model).items(flat)] == [25, 25, 121]
    with pytest.raises(me.MllmEfficientError, match=r"3 <image> and 2 image\(s\)"):
        model_inputs(processor, prompts, pictures[:2])


def test_a_record_with_the_models_own_placeholders_has_no_others():
    """A reader of records, which knows no model, puts ``<image>`` in front of a question that has none."""
    qwen, llava = SimpleNamespace(image_token="<|image_pad|>"), SimpleNamespace(image_token="<image>")
    own = "in <|image_pad|> or <|image_pad|>?"
    assert without_markers(qwen, f"<image>\n<image>\n{own}", 2) == own
    for question, images in ((f"<image>\n{own}", 1), ("<image>\nwhat?", 1), ("what?", 0)):
        assert without_markers(qwen, question, images) == question
    assert without_markers(llava, "<image>\nwhat?", 1) == "<image>\nwhat?"


def test_servers_that_tile_in_another_way_are_named_beside_the_numbers(folder):
    """A LLaVA-OneVision, by the folder that the server says it has the model from, or by name, asked with several pictures at once."""
    from mllm_efficient.eval.lmms.server import ServerCell, tiling_note

    def cell(**about):
        return ServerCell(me.build("none"), "baseline", name="full", url="http://localhost:1/v1", **about)

    asked = SimpleNamespace(several=True)
    by_folder, by_name = cell(model="m", root=str(folder("llava_onevision"))), cell(model="llava-hf/llava-onevision-qwen2-7b-ov-hf")
    for one in (by_folder, by_name):
        assert tiling_note([one], [asked]).startswith("full: vLLM tiles every one of several pictures")
        assert tiling_note([one], [SimpleNamespace(several=False)]) is None
    assert tiling_note([cell(model="onevision", root=str(folder("qwen2_vl"))), cell(model="tiny")], [asked]) is None


# ------------------------------------------------------------------------------------------------ pixel budgets


@pytest.mark.parametrize(("name", "given", "tokens"), [
    ("qwen2_vl", ["--max-pixels", "640"], 6), ("qwen2_5_vl", ["--processor-kwargs", 'size={"shortest_edge": 64, "longest_edge": 640}'], 6),
    ("qwen3_vl", ["--max-pixels", "6000"], 54), ("internvl", ["--processor-kwargs", "max_patches=1"], 9),
    ("llava_next", ["--processor-kwargs", "image_grid_pinpoints=[[24,24]]"], 24),
    ("llava_onevision", ["--processor-kwargs", "vision_aspect_ratio=anyres_max_1"], 49),
])  # fmt: skip
def test_budgets_hold_in_generate_flops_and_bench(capsys, folder, picture, name, given, tokens):
    def ran(*arguments):
        assert main([*map(str, arguments), *given, "--json"]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    model = folder(name)
    answer = ran("generate", "--model", model, "--image", picture, "--prompt", "what ?", "--max-new-tokens", 1)
    assert answer["rows"][0]["visual_tokens_full"] == tokens and len(answer["meta"]["processor_kwargs"]) == 1
    counted = ran("flops", "--model", model, "--image-size", "70x50", "--measured")
    assert counted["rows"][0]["visual_tokens_full"] == tokens and counted["rows"][0]["measured"]["difference_flops"] == 0
    once = ("--repeats", 1, "--warmup", 0, "--output-tokens", 1, "--text-tokens", 40, "--image-size", "70x50")
    for weights in ((), ("--random-weights",)):
        timed = ran("bench", "--model", model, *once, *weights)
        assert timed["rows"][0]["visual_tokens_full"] == tokens and timed["rows"][0]["flops_ratio"] is not None


def test_budgets_are_part_of_the_record_and_of_its_resume(capsys, folder, tmp_path, picture):
    data, out = tmp_path / "requests.jsonl", tmp_path / "out"
    data.write_text(json.dumps({"images": [picture.name], "prompt": "what ?"}) + "\n")
    asked = ("eval", "--model", folder("qwen2_vl"), "--data", data, "--max-new-tokens", 2, "--output-dir", out)
    assert main([*map(str, asked), "--max-pixels", "640"]) == 0
    capsys.readouterr()
    assert json.loads((out / "run.json").read_text())["processor_kwargs"] == {"max_pixels": 640}
    assert "processor_kwargs: {'max_pixels': 640} there, {} now" in fails(capsys, *asked)
    plain, small = (load(ModelOptions(str(folder("qwen2_vl")), "cpu", processor_kwargs=k)) for k in ({}, {"max_pixels": 640}))
    changed = {k for k, v in environment(plain).items() if environment(small)[k] != v}
    assert changed == {"processor_kwargs", "processor"}


def test_a_folder_whose_limits_change_is_another_model_to_a_record(folder, tmp_path):
    """Also without a word on the command line: the weights are the same."""
    folders = [
        save("qwen2_vl", tmp_path / str(i), *parts_of("qwen2_vl", None, None), **more) for i, more in enumerate(({}, {"max_pixels": 640}))
    ]
    one, other = (environment(load(ModelOptions(str(f), "cpu"))) for f in folders)
    assert one["weights"] == other["weights"] and one["processor"] != other["processor"]


@pytest.mark.parametrize(("name", "given", "says"), [
    ("qwen2_vl", ["--processor-kwargs", "max_pixel=640"], "no setting 'max_pixel' - did you mean 'max_pixels'"),
    ("qwen2_vl", ["--processor-kwargs", "max_patches=4"], "no setting 'max_patches'"),
    ("qwen2_vl", ["--processor-kwargs", 'crop_size={"height": 8, "width": 8}'], "no setting 'crop_size'"),
    ("qwen2_vl", ["--processor-kwargs", "patch_size=8"], "patch_size belongs to the model's tower"),
    ("qwen2_vl", ["--processor-kwargs", "max_pixels"], "is not KEY=VALUE"),
    ("qwen2_vl", ["--processor-kwargs", "max_pixels=640", "--max-pixels", "640"], "max_pixels is given twice"),
    ("qwen2_vl", ["--max-pixels", "100", "--min-pixels", "200"], "min_pixels=200 is more than max_pixels=100"),
    ("qwen2_vl", ["--max-pixels", "100"], "min_pixels=256 is more than max_pixels=100"),
    ("qwen2_vl", ["--max-pixels", "0"], "max_pixels must be a whole number above 0, not 0"),
    ("qwen2_vl", ["--processor-kwargs", "max_pixels=many"], "max_pixels must be a whole number above 0, not 'many'"),
    ("qwen2_vl", ["--processor-kwargs", "size=7"], "cannot take size=7"),
    ("internvl", ["--processor-kwargs", "crop_to_patches=false"], "max_patches=1 is a picture in one piece"),
    ("internvl", ["--max-pixels", "640"], "no setting 'max_pixels'"),
    ("llava_next", ["--min-pixels", "640"], "no setting 'min_pixels'"),
    ("llava_onevision", ["--processor-kwargs", "vision_aspect_ratio=pad"], "cannot take vision_aspect_ratio"),
])  # fmt: skip
def test_a_setting_that_the_processor_does_not_know_is_an_error(capsys, folder, picture, name, given, says):
    assert says in fails(capsys, "generate", "--model", folder(name), "--image", picture, "--prompt", "what ?", *given)


def test_settings_without_effect_on_a_count_are_refused_by_flops(capsys, folder):
    for model, given, says in (
        ("llava-1.5-7b", "max_pixels=640", "every picture has the same number"),
        (folder("internvl"), "max_pixels=640", "min_patches, max_patches have"),
        (folder("qwen2_vl"), "do_normalize=false", "min_pixels, max_pixels, size have"),
    ):  # fmt: skip
        assert says in fails(capsys, "flops", "--model", model, "--processor-kwargs", given)
    assert "has no effect with --server" in fails(
        capsys, "bench", "--server", "http://localhost:1/v1", "--image-size", "8x8", "--max-pixels", 640
    )


def test_limits_of_released_files_are_read():
    """The numbers of a folder with 256 to 1,280 tokens of 28 x 28, and of 25 views, from their processors."""
    shape = load_shape("qwen2.5-vl-7b", processor={"min_pixels": 256 * 784, "max_pixels": 1280 * 784})
    assert [cost(shape, image_size=s).visual_tokens_full for s in ((1920, 1080), (4000, 3000), (200, 200))] == [1222, 1230, 256]
    assert cost("qwen2.5-vl-7b", image_size=(1920, 1080)).visual_tokens_full == 2691
    from mllm_efficient.patches.families.internvl import tile_limits, tiles_of

    tiles = [math.prod(tiles_of((2688, 1792), (448, 448), tile_limits(s))) for s in ({"max_patches": 40}, {})]
    assert [256 * (n + 1) for n in tiles] == [6400, 1792]  # and the thumbnail


# ------------------------------------------------------------------------------------------------ sliding windows


def sliding(kind, **settings):
    """A tiny LLaVA of 16 visual tokens with this language model."""
    text = getattr(transformers, f"{kind}Config")(
        vocab_size=len(VOCABULARY), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, **settings,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=clip(24, 6), text_config=text, image_token_index=VOCABULARY["<image>"], image_seq_length=16, vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize(("kind", "settings", "windows"), [
    ("Mistral", {"sliding_window": 8}, (8, 8, 8)), ("Mistral", {"sliding_window": None}, ()),
    ("Mistral", {"sliding_window": 400}, (400,) * 3),
    ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, (0, 8, 8)), ("Qwen2", {"sliding_window": 8}, ()),
    ("Gemma2", {"sliding_window": 8}, (8, 0, 8)),
    ("Cohere2", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}, (8, 0, 8)),
])  # fmt: skip
def test_a_sliding_window_costs_what_torch_counts_and_caches_what_it_holds(kind, settings, windows):
    model, call = sliding(kind, **settings), {"text_tokens": 9, "new_tokens": 12, "batch_size": 2}
    shape = shape_of(model.config, kind)
    assert shape.decoder.windows == windows
    for spec in ("none", "divprune:tokens=5", *(() if kind in ("Gemma2", "Cohere2") else ("fastv:layer=1,keep=0.5",))):
        closed, counted = cost(shape, method=spec, **call), counter.count(model, shape, me.build(spec), **call)
        assert [getattr(closed, p) - getattr(counted, p) for p in ("vision", "compress", "prefill", "decode")] == [0, 0, 0, 0]
    ids = torch.full((2, 9 + 16), 20)
    ids[:, 1:17] = VOCABULARY["<image>"]
    pixels = torch.rand(2, 3, 24, 24)
    out = model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=12, min_new_tokens=12, return_dict_in_generate=True)
    held = sum(layer.keys.numel() + layer.values.numel() for layer in out.past_key_values.layers)
    assert cost(shape, **call).kv_cache_bytes == 2 * held  # bytes of the float16 that a configuration without a dtype counts as


# ------------------------------------------------------------------------------------------------ adapters


@pytest.fixture(scope="module")
def lora(tmp_path_factory, folder):
    """A LoRA with weights that matter, on the LLaVA-NeXT folder."""
    peft = pytest.importorskip("peft")
    model = load(ModelOptions(str(folder("llava_next")), "cpu")).model
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    path = tmp_path_factory.mktemp("lora")
    tuned.save_pretrained(path)
    return path


def test_a_lora_folder_is_a_model_and_an_adapter(capsys, folder, lora, picture):
    import peft

    base = str(folder("llava_next"))
    plain, by_model, by_option = (
        load(o) for o in (ModelOptions(base, "cpu"), ModelOptions(str(lora), "cpu"), ModelOptions(base, "cpu", adapter=str(lora)))
    )
    merged = peft.PeftModel.from_pretrained(load(ModelOptions(base, "cpu")).model, lora).merge_and_unload()
    inputs = plain.inputs([plain.prompt("what ?", 1)], [noise(0, 70, 50)])
    for spec in ("none", "divprune:tokens=9", "fastv:layer=1,keep=0.75"):
        logits = []
        for model in (merged, by_model.model, by_option.model, plain.model):
            with me.compressed(model, spec), torch.no_grad():
                logits.append(model(**inputs).logits[:, -1])
        assert torch.equal(logits[1], logits[2]) and not torch.allclose(logits[0], logits[3], atol=0.1)
        torch.testing.assert_close(logits[0], logits[1], atol=1e-3, rtol=1e-3)
    about = environment(by_model)["adapter"]
    assert about == environment(by_option)["adapter"] and about["name"] == lora.name and environment(plain)["adapter"] is None
    assert main(["generate", "--model", str(lora), "--image", str(picture), "--prompt", "what ?", "--max-new-tokens", "1"]) == 0
    capsys.readouterr()
    counts = [cost(load_shape(str(f)), image_size=(70, 50)) for f in (base, lora)]
    assert counts[0] == counts[1]


def test_adapters_that_do_not_fit_are_one_line(capsys, folder, lora, picture, tmp_path):
    ask = ("generate", "--image", picture, "--prompt", "what ?")
    base = folder("llava_next")
    assert f"--model {base} --adapter {lora}" in fails(capsys, *ask, "--model", lora, "--adapter", lora)
    assert "no folder with an adapter_config.json" in fails(capsys, *ask, "--model", base, "--adapter", tmp_path)
    assert "does not belong to this model: " in fails(capsys, *ask, "--model", folder("qwen2_vl"), "--adapter", lora)
    nameless = tmp_path / "nameless"
    nameless.mkdir()
    (nameless / "adapter_config.json").write_text("{}")
    assert "does not name its base model" in fails(capsys, *ask, "--model", nameless)
    (nameless / "adapter_config.json").write_text('{"base_model_name_or_path": "../gone"}')
    assert "no model folder" in fails(capsys, *ask, "--model", nameless)
    assert "merge it with PEFT first" in fails(
        capsys, "export", "--model", lora, "--method", "divprune:tokens=9", "--output-dir", tmp_path / "served"
    )


def test_an_adapter_of_a_hub_model_that_is_not_here(capsys, folder, lora, picture, tmp_path):
    """Says what to do, and does it."""
    base, name = folder("llava_next"), "llava-hf/llava-v1.6-vicuna-7b-hf"
    for file in lora.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))
    ask = ("generate", "--image", picture, "--prompt", "what ?", "--max-new-tokens", "1", "--json")
    lacking = f"({tmp_path} is an adapter of {name}: give a folder of it: --model FOLDER"
    assert f"{lacking} --adapter {tmp_path})" in fails(capsys, *ask, "--model", tmp_path)
    assert f"{lacking})" in fails(capsys, "flops", "--model", tmp_path)
    assert f"{lacking})" in fails(capsys, "bench", "--random-weights", "--model", tmp_path)
    answers = []
    for given in (("--model", base, "--adapter", tmp_path), ("--model", lora)):
        assert main([*map(str, (*ask, *given))]) == 0
        answers.append(json.loads(capsys.readouterr().out)["rows"][0]["answer"])
    assert answers[0] == answers[1]


# ------------------------------------------------------------------------------------------------ without torchvision


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("llava", "llava_next", "qwen3_5")])
def test_a_folder_opens_without_torchvision_for_pictures(capsys, monkeypatch, folder, name):
    """Processors of these families have a video processor, which needs it. The pictures are those of the whole processor.

    AutoTokenizer makes a Qwen3.5 folder's tokenizer anew as the model's own class, whatever the folder holds: its words are others."""
    monkeypatch.setattr(processors, "find_spec", lambda module: None)
    loaded = load(ModelOptions(str(folder(name)), "cpu"))
    assert not hasattr(loaded.processor, "video_processor")
    prompt = loaded.prompt("what ?", 1)
    of_arm, whole = (model_inputs(p, [prompt], [noise(0, 70, 50)]) for p in (loaded.processor, FAMILIES[name].processor("left")))
    assert torch.equal(of_arm["input_ids"], whole["input_ids"])
    if getattr(loaded.processor, "video_token", None):
        with pytest.raises(me.MllmEfficientError, match=r'pip install "mllm-efficient\[video\]"'):
            loaded.inputs([f"{FAMILIES[name].video} ?"], videos=[[noise(0, 24, 24)] * 4])
