"""What users get to read where something is wrong: the cause, in their own numbers, and what to do."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image

import mllm_efficient as me
from mllm_efficient.cli import main
from mllm_efficient.loading.models import ModelOptions, builtin_folder, load
from mllm_efficient.patches import ORIGINALS
from mllm_efficient.patches.vllm.settings import KEY, settings_of

from ..families import make, tiny

NEW = {"max_new_tokens": 3, "do_sample": False}
SPEC = "divprune:tokens=9"


def fails(capsys, *argv) -> str:
    """Runs a command that has to end with exit code 2 and one line, which is returned."""
    assert main([str(a) for a in argv]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("mllm-efficient: ") and not any("Traceback" in line for line in said)
    return said[-1]


@pytest.fixture
def picture_file(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


# ------------------------------------------------------------------------------------------------ prompts


def test_a_prompt_that_was_cut_off_names_the_usual_cause(tiny_llava, make_batch):
    batch = make_batch("one image")
    cut = {**batch, "input_ids": batch.input_ids[:, :20], "attention_mask": batch.attention_mask[:, :20]}
    with pytest.raises(me.CountMismatchError, match="max_length or truncation of the processor cuts prompts off: leave them out"):
        me.prepare(tiny_llava, SPEC, **cut)
    more = {**batch, "input_ids": torch.cat([batch.input_ids] * 2, 1), "attention_mask": torch.cat([batch.attention_mask] * 2, 1)}
    with pytest.raises(me.CountMismatchError, match="one <image> per image$"):
        me.prepare(tiny_llava, SPEC, **more)


@pytest.mark.parametrize("where", ["argument", "config", "model"])
def test_a_max_length_below_the_prompt_is_said_in_the_callers_numbers(tiny_llava, make_batch, where):
    from transformers import GenerationConfig

    batch, model = make_batch("one image"), me.wrap(tiny_llava, SPEC)
    full, how = batch.input_ids.shape[1], {}
    for wanted in (full, full - 10, 5):  # the shortened prompt would fit into the second
        if where == "argument":
            how = {"max_length": wanted}
        elif where == "config":
            how = {"generation_config": GenerationConfig(max_length=wanted, pad_token_id=0)}
        else:
            model.generation_config.max_length = wanted
        with pytest.raises(me.MllmEfficientError, match=f"the prompt is {full} tokens long, and max_length={wanted} leaves no room"):
            model.generate(**batch, **how)
    if where == "argument":
        assert model.generate(**batch, max_length=full + 2).shape[1] == full + 2
        assert model.generate(**batch, max_length=5, max_new_tokens=2).shape[1] == full + 2


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_of_peft_are_refused_by_name(tiny_llava, make_batch, kind):
    peft = pytest.importorskip("peft")
    text = tiny_llava.config.get_text_config()
    for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"):
        setattr(tiny_llava.config, name, getattr(text, name))
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=2, token_dim=32, num_layers=3, num_attention_heads=4)
    model = peft.get_peft_model(tiny_llava, config)
    tuning = kind.removesuffix("TuningConfig").lower()
    for put_on in (me.wrap, lambda *args: me.compressed(*args).__enter__()):
        with pytest.raises(me.UnsupportedModelError, match=f"PEFT's {tuning} tuning puts its own embeddings or cache .*: use LoRA"):
            put_on(model, SPEC)
    assert not me.is_wrapped(model)


def test_embeddings_in_place_of_ids_are_refused_with_the_way_out(tiny_llava, make_batch):
    batch = make_batch("one image")
    embeds = tiny_llava.get_input_embeddings()(batch.input_ids)
    me.wrap(tiny_llava, SPEC)
    with pytest.raises(me.CountMismatchError, match=r"pass input_ids, which PEFT's prompt tuning never does \(LoRA does\)"):
        tiny_llava(inputs_embeds=embeds, pixel_values=batch.pixel_values)


@pytest.mark.parametrize("spec", [SPEC, "none", "fastv:layer=1,ratio=0.5"])
@pytest.mark.parametrize("how", [list, tuple, lambda grids: [tuple(g) for g in grids.tolist()]], ids=["rows", "tuple", "numbers"])
@torch.no_grad()
def test_a_grid_may_be_a_list(spec, how):
    model, batch = tiny("qwen2_5_vl"), make("qwen2_5_vl", "two images")
    listed = {**batch, "image_grid_thw": how(batch["image_grid_thw"])}
    me.wrap(model, spec)
    assert torch.equal(model.generate(**listed, **NEW), model.generate(**batch, **NEW))
    assert torch.equal(model(**listed).logits, model(**batch).logits)


# ------------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize("model_type", ["llava", "llava_llama", "internvl_chat"])
@pytest.mark.parametrize("name", sorted(ORIGINALS))
def test_a_checkpoint_in_the_original_format_names_its_twin(tmp_path, name, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "architectures": [name], "mm_vision_tower": "clip"}))
    with pytest.raises(me.UnsupportedModelError, match=f"is a {name}, which is not supported: .*ends in -hf .*{ORIGINALS[name]}"):
        load(ModelOptions(model=str(tmp_path)))
    other = type(name, (torch.nn.Module,), {})()
    with pytest.raises(me.UnsupportedModelError, match=f"{name} is not supported: .*{ORIGINALS[name]}"):
        me.wrap(other, SPEC)


@pytest.mark.parametrize("content, says", [
    ({"architectures": ["Qwen2_5OmniModel"], "thinker_config": {"vision_config": {"depth": 1}}}, "is not supported: the model must be"),
    ({"architectures": ["LlamaForCausalLM"], "hidden_size": 8}, "is not supported and takes no images: the model must be"),
])  # fmt: skip
def test_whether_a_model_takes_images_is_said_right(tmp_path, content, says):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **content}))
    with pytest.raises(me.UnsupportedModelError, match=says):
        load(ModelOptions(model=str(tmp_path)))


@pytest.mark.parametrize("bound", [{"min_tokens": 16}, {"max_tokens": 100}, {"min_tokens": 16, "max_tokens": 100}])
def test_a_servers_bounds_and_the_counts_it_allows_go_together(bound):
    config = type("Config", (), {KEY: {"method": "divprune", "keep": 0.1, **bound, "allowed_tokens": [8, 144]}})
    settings = settings_of(config)
    assert settings.of_request(None) == me.DivPrune(keep=0.1, **bound)
    assert [settings.of_request(n) for n in (8, 144)] == [me.DivPrune(tokens=8), me.DivPrune(tokens=144)]
    with pytest.raises(me.BadBudgetError, match="8, 144 are allowed"):
        settings.of_request(64)


# ------------------------------------------------------------------------------------------------ commands


def test_a_tokenizer_that_cuts_prompts_off_is_one_line(tmp_path, capsys, picture_file):
    folder = tmp_path / "model"
    shutil.copytree(builtin_folder(), folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "max_length": 20, "truncation": True}))
    said = fails(capsys, "generate", "--model", folder, "--image", picture_file, "--prompt", "what is it ?")
    assert f"the processor of {folder} fails: Mismatch in `image` token count" in said
    assert "its tokenizer_config.json has truncation, to max_length=20: remove both" in said


@pytest.mark.parametrize("option, argv, says", [
    ("--data", ["eval", "--method", "none"], "name too long"), ("--import", ["methods"], "--import: no file"),
    ("--config", ["train"], "name too long"), ("--output", ["show", "--method", "none", "--image", "PICTURE"], "name too long"),
    ("--output-dir", ["sweep", "--method", "pool", "--keep", "0.5"], "name too long"),
])  # fmt: skip
def test_a_name_that_is_too_long_is_one_line(capsys, picture_file, option, argv, says):
    argv = [str(picture_file) if a == "PICTURE" else a for a in argv]
    assert says in fails(capsys, *argv, option, "x" * 5000 + ".png").lower()


def test_an_image_whose_name_is_too_long_is_one_line(capsys):
    assert "no image file" in fails(capsys, "generate", "--prompt", "x", "--image", "x" * 5000 + ".png")
