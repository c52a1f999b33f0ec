"""What a prompt of any family keeps, from its tokens and an image's size: without vLLM."""

from __future__ import annotations

import json

import pytest
import torch

import mllm_efficient as me
from mllm_efficient.loading.models import Loaded, ModelOptions, load
from mllm_efficient.patches.rules import FAMILIES as RULES
from mllm_efficient.patches.vllm.pieces import kept_of_row, pieces_of, rules_of, runs_of, shapes_of, shortened_ids
from mllm_efficient.trained.export import export

from .. import vllm_families
from ..families import ASPECTS, EVERY, MARKED, noise

IMAGE, TEXT = 9, 5


@pytest.mark.parametrize("name", ["internvl", "idefics3", "lighton_ocr", "qwen2_vl", "glm46v", "gemma3"])
def test_counts_are_those_of_transformers(name):
    """Placeholders of every shape of picture: the front end's, from the tokens that stand for it, and those of ``prepare``."""
    family = EVERY.get(name)
    if family is None:
        model = vllm_families.SERVED[name].model()
        processor, token = vllm_families.SERVED[name].processor(), MARKED["<image>"]
        text = vllm_families.SERVED[name].image
    else:
        model, processor, token, text = family.build(), family.processor("left"), family.image_token, family.image
    rules = rules_of(model.config, processor.image_processor.to_dict())
    for i, (width, height) in enumerate(ASPECTS.values()):
        inputs = processor(text=[f"user : {text} what ?"], images=[[noise(i, width, height)]], return_tensors="pt")
        ids = inputs["input_ids"][0].tolist()
        grid = inputs["image_grid_thw"][0].tolist() if "image_grid_thw" in inputs else []
        for spec in ("divprune:keep=0.4,per=tile" if "tile" in rules.parts else "divprune:keep=0.4", "uniform:keep=1"):
            method, runs = me.build(spec), runs_of(ids, token)
            left = shortened_ids(ids, token, pieces_of(rules, method, shapes_of(rules, runs, (height, width), grid), runs))
            kept = me.prepare(model, method, **inputs).model_kwargs["input_ids"][0].tolist()
            assert left == kept, (name, spec, width, height)


def test_types_that_have_a_row_alone_keep_each_run_by_itself():
    """Aya's tiles, between which the prompt has text."""
    rules = rules_of(vllm_families.aya_config(), {})
    assert rules.config.model_type not in RULES
    ids = [TEXT, *[IMAGE] * 9, TEXT, *[IMAGE] * 4, TEXT]
    runs = runs_of(ids, IMAGE)
    pieces = pieces_of(rules, me.DivPrune(keep=0.4), shapes_of(rules, runs, (40, 20), ()), runs)
    assert shortened_ids(ids, IMAGE, pieces) == [TEXT, *[IMAGE] * 4, TEXT, *[IMAGE] * 2, TEXT] and pieces.kept == 6
    assert kept_of_row(rules, me.DivPrune(tokens=3), 9) == 3


def test_rows_that_share_a_budget_lose_the_breaks_between_them():
    """Mistral 3: how many tokens a row keeps depends on the picture. Where all stay, so do the breaks."""
    rules = rules_of(EVERY["mistral3"].build().config, {"size": {"longest_edge": 48}})
    ids = [TEXT, *[IMAGE] * 6, TEXT, *[IMAGE] * 6, TEXT]
    runs = runs_of(ids, IMAGE)
    shapes = shapes_of(rules, runs, (16, 48), ())
    for spec, left in (("divprune:keep=0.5", [TEXT, *[IMAGE] * 6, TEXT]), ("divprune:keep=1", ids)):
        assert shortened_ids(ids, IMAGE, pieces_of(rules, me.build(spec), shapes, runs)) == left


def test_tiles_that_share_a_budget_are_refused_where_text_stands_between_them():
    rules = rules_of(EVERY["idefics3"].build().config, {"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 24}})
    runs = (9, 9, 9, 9, 9)
    with pytest.raises(me.UnsupportedModelError, match="write per=tile"):
        pieces_of(rules, me.DivPrune(keep=0.4), shapes_of(rules, runs, (48, 48), ()), runs)
    with pytest.raises(me.CountMismatchError, match="a picture of 48x48 has 9 tokens in its prompt and 45 by its size"):
        shapes_of(rules, (9,), (48, 48), ())


def test_a_type_that_is_not_known_is_refused():
    config = EVERY["gemma3"].build().config
    config.model_type = "other"
    with pytest.raises(me.UnsupportedModelError, match="other is not known"):
        rules_of(config, {})


def test_a_family_without_a_class_of_ours_is_exported_for_the_backend_that_has_transformers_run_it(tmp_path):
    model = EVERY["gemma3"].build()
    export(Loaded(model, vllm_families.gemma3(), ModelOptions(model="tiny")), me.Uniform(tokens=4), tmp_path / "g", [2])
    config = json.loads((tmp_path / "g" / "config.json").read_text())
    assert config["architectures"] == ["MllmEfficientTransformersMultiModalForCausalLM"] and me.load(tmp_path / "g") == me.Uniform(tokens=4)
    again = load(ModelOptions(str(tmp_path / "g"), device="cpu")).model
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    with pytest.raises(me.MllmEfficientError, match="tokenflex"):
        loaded = Loaded(model, vllm_families.gemma3(), ModelOptions(model="tiny"))
        export(loaded, me.build("tokenflex:tokens=4,weights=random"), tmp_path / "t")
