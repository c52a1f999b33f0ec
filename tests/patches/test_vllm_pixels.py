"""PixelPrune in vLLM: the front end sees the pixels and counts, the towers run on the patches that stay, positions are known before."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from PIL import Image

import mllm_efficient as me
from mllm_efficient.loading.models import Loaded, ModelOptions
from mllm_efficient.patches.vllm.settings import KEY, require_served, servable, settings_of
from mllm_efficient.trained.export import export

from ..families import noise
from ..vllm_models import model_of, needs_vllm, saved_processor_of
from .test_pixelprune import document
from .test_vllm import engine
from .test_vllm_processor import front_end

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def pictures():
    """Pages with blank areas, one that is blank throughout, one without repetition."""
    return [document(), document(48, 64), Image.new("RGB", (64, 40), "white"), noise(7, 40, 40), document(120, 56)]


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def served(request, tmp_path_factory):
    """A random model, its exported folder, prompts and the paths of their pictures: each alone, and two in a prompt."""
    folder = tmp_path_factory.mktemp(request.param)
    model = model_of(request.param)
    export(Loaded(model, saved_processor_of(request.param), ModelOptions(model="tiny")), me.PixelPrune(), folder / "model")
    paths = []
    for i, picture in enumerate(pictures()):
        paths.append([str(folder / f"{i}.png")])
        picture.save(paths[-1][0])
    paths += [[*paths[0], *paths[3]], [*paths[4], *paths[1]]]
    prompts = ["user : " + IMAGE * len(p) + " what is the big ring ? assistant :" for p in paths]
    return model, folder / "model", prompts, paths


def of_transformers(served, spec):
    """Answers, and what is kept of every picture."""
    model, folder, prompts, paths = served
    processor, answers, kept = transformers.AutoProcessor.from_pretrained(folder), [], []
    with me.compressed(model, spec), torch.no_grad():
        for prompt, of_prompt in zip(prompts, paths):
            inputs = processor(text=[prompt], images=[Image.open(p).convert("RGB") for p in of_prompt], return_tensors="pt")
            ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            answers.append(processor.decode(ids, skip_special_tokens=True).strip())
            kept.append([image.kept for image in me.last_report(model).images])
    return answers, kept


@needs_vllm
@pytest.mark.slow
def test_answers_equal_transformers_and_no_runner_is_asked_for_positions(served):
    """On vLLM's own runner for CPUs, with prompts cut inside an image, and again out of the prefix cache."""
    call = {"prompts": served[2], "images": served[3], "tokens": None, "new": 8}
    found = engine(served[1], [call, call], enable_prefix_caching=True, block_size=32, max_num_batched_tokens=16, max_num_seqs=4)
    expected, _ = of_transformers(served, "pixelprune")
    assert found[0]["answers"] == expected == found[1]["answers"]
    assert len(set(expected)) > 3 and expected != of_transformers(served, "none")[0]


@needs_vllm
@pytest.mark.slow
def test_the_front_end_counts_what_transformers_keeps(served):
    """With a tolerance too, which is part of a picture's identity; what is made up to measure memory stays whole."""
    calls = [{"prompt": t, "images": p} for t, p in zip(served[2], served[3])]
    jobs = [{"model": str(served[1]), "settings": s, "calls": [{"warm_up": True}, *calls]} for s in ("pixelprune", "pixelprune:tau=0.5")]
    found, n = front_end(jobs), len(calls)
    for part, spec in ((found[:n], "pixelprune"), (found[n:], "pixelprune:tau=0.5")):
        assert [one["lengths"] for one in part] == of_transformers(served, spec)[1]
    assert found[0]["lengths"] < found[3]["lengths"] and not {*found[0]["hashes"]} & {*found[n]["hashes"]}


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("served", ["qwen3_vl"], indirect=True)
def test_a_model_that_transformers_runs_is_refused(served):
    stock = {KEY: "pixelprune", "architectures": ["Qwen3VLForConditionalGeneration"]}
    with pytest.raises(AssertionError, match="leave --model-impl transformers out"):
        engine(served[1], [], hf_overrides=stock, model_impl="transformers")


@pytest.mark.once
def test_other_families_and_counts_that_requests_ask_for_are_refused_by_name():
    for kind in ("llava", "qwen3_5", "glm4v"):
        with pytest.raises(me.UnsupportedModelError, match="pixelprune looks at pixels, of which the towers of qwen2_5_vl and qwen3_vl"):
            require_served(me.PixelPrune(), kind)
        assert "pixelprune" not in servable(kind)
    assert "pixelprune" in servable("qwen3_vl")
    for method in (me.PixelPrune(dedup=True), me.DivPrune(keep=0.5, age=0.5)):
        with pytest.raises(me.UnsupportedModelError, match="looks at other pictures of the prompt"):
            require_served(method, "qwen3_vl")
    config = SimpleNamespace(model_type="qwen3_vl", **{KEY: {"method": "pixelprune", "allowed_tokens": [6]}})
    with pytest.raises(me.BadBudgetError, match="pixelprune takes no budget"):
        settings_of(config)
