"""Qwen2.5-VL and Qwen3-VL in vLLM: rows dropped, M-RoPE positions kept, against transformers.

vLLM's runner for CPUs lacks a call that those for GPUs make, so that the plugin refuses these families there; the tests make it.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from PIL import Image

import mllm_efficient as me
from mllm_efficient.loading.models import Loaded, ModelOptions
from mllm_efficient.trained.export import export

from .. import vllm_families
from ..families import ASPECTS, noise
from ..vllm_models import model_of, needs_vllm, saved_processor_of
from .test_vllm import KEY, engine
from .test_vllm_processor import front_end

pytestmark = [needs_vllm, pytest.mark.slow]
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def served(request, tmp_path_factory):
    """A random model, its exported folder, prompts and the paths of their pictures: each shape alone, and two in a prompt."""
    folder = tmp_path_factory.mktemp(request.param)
    model = model_of(request.param)
    export(Loaded(model, saved_processor_of(request.param), ModelOptions(model="tiny")), me.DivPrune(keep=0.4), folder / "model", [6])
    paths = []
    for i, (width, height) in enumerate(ASPECTS.values()):
        paths.append([str(folder / f"{i}.png")])
        noise(i, 2 * width, 2 * height).save(paths[-1][0])
    paths.append([*paths[0], *paths[3]])
    prompts = ["user : " + IMAGE * len(p) + " what is the big ring ? assistant :" for p in paths]
    return model, folder / "model", prompts, paths


def of_transformers(served, spec, new=8):
    model, folder, prompts, paths = served
    processor, out = transformers.AutoProcessor.from_pretrained(folder), []
    with me.compressed(model, spec), torch.no_grad():
        for prompt, pictures in zip(prompts, paths):
            inputs = processor(text=[prompt], images=[Image.open(p).convert("RGB") for p in pictures], return_tensors="pt")
            ids = model.generate(**inputs, max_new_tokens=new, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            report = me.last_report(model)
            out.append((processor.decode(ids, skip_special_tokens=True).strip(), [i.kept for i in report.images]))
    return out


def call(served, tokens=None, new=8):
    return {"prompts": served[2], "images": served[3], "tokens": tokens, "new": new}


def test_greedy_answers_equal_transformers(served):
    """At the server's budget, at a request's, and again out of the prefix cache."""
    calls = [
        call(served),
        call(served, 6),
        call(served),
        {**call(served), "prompts": served[2][-1:], "images": served[3][-1:], "pruner": True},
    ]
    found = engine(served[1], calls, asks_again=True, enable_prefix_caching=True, block_size=32)
    expected = [a for a, _ in of_transformers(served, "divprune:keep=0.4")]
    assert found[0]["answers"] == expected and found[2]["answers"] == expected
    assert found[1]["answers"] == [a for a, _ in of_transformers(served, "divprune:tokens=6")]
    assert len(set(expected)) > 3  # the pictures matter
    require_positions_by_the_pruner(served, found[3])


def require_positions_by_the_pruner(served, found):
    """What vLLM's class for GPUs (Model Runner V2) gets of the model: the positions that ``prepare`` keeps."""
    model, folder, prompts, paths = served
    pictures = [Image.open(p).convert("RGB") for p in paths[-1]]
    inputs = transformers.AutoProcessor.from_pretrained(folder)(text=prompts[-1:], images=pictures, return_tensors="pt")
    prepared = me.prepare(model, "divprune:keep=0.4", **inputs).model_kwargs
    assert found["ids"] == prepared["input_ids"][0].tolist()
    assert found["positions"] == prepared["position_ids"][-3:, 0].tolist()
    assert found["delta"] == int(prepared["position_ids"][-3:].max()) + 1 - len(found["ids"])
    assert len(found["rows"]) == 2 and found["alike"]


def test_prompts_cut_inside_an_image(served):
    (found,) = engine(served[1], [call(served)], asks_again=True, max_num_batched_tokens=16, max_num_seqs=4)
    assert found["answers"] == [a for a, _ in of_transformers(served, "divprune:keep=0.4")]


def test_kept_tokens_that_hold_the_others_stand_where_they_stood(served):
    """Deep layers' features are averaged alike, rows and columns are not: prompts cut inside an image, too."""
    (found,) = engine(served[1], [call(served)], asks_again=True, max_num_batched_tokens=16, max_num_seqs=4,
                      hf_overrides={KEY: "divmerge:keep=0.4"})  # fmt: skip
    expected = [a for a, _ in of_transformers(served, "divmerge:keep=0.4")]
    assert found["answers"] == expected != [a for a, _ in of_transformers(served, "divprune:keep=0.4")]


def test_counts_and_hashes_in_the_front_end(served):
    calls = [{"prompt": t, "images": p, "tokens": n} for n in (None, 6) for t, p in zip(served[2], served[3])]
    tried = ({"method": "divprune", "keep": 0.4, "allowed_tokens": [6]}, {"method": "uniform", "tokens": 9, "allowed_tokens": [6]})
    found = front_end([{"model": str(served[1]), "settings": s, "calls": calls} for s in tried])
    kept = [k for spec in ("divprune:keep=0.4", "divprune:tokens=6", "uniform:tokens=9", "uniform:tokens=6")
            for _, k in of_transformers(served, spec, 1)]  # fmt: skip
    assert [a["lengths"] for a in found] == kept
    alone = [a["hashes"][0] for a in found if len(a["hashes"]) == 1]
    assert len(alone) == len(set(alone))


def test_videos_are_refused_beside_settings(served):
    (found,) = front_end([{"model": str(served[1]), "settings": "divprune:tokens=6", "calls": [{"video": True}]}])
    assert "At most 0 video(s)" in found["error"]


def test_without_settings_nothing_changes(served, tmp_path):
    """A plain folder: vLLM with the plugin, with the plugin off, and transformers."""
    model, folder, *_ = served
    model.save_pretrained(tmp_path / "plain")
    transformers.AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path / "plain")
    on, off = (engine(tmp_path / "plain", [call(served)], environment={"MLLM_EFFICIENT_VLLM": v}) for v in ("1", "0"))
    assert on == off and on[0]["answers"] == [a for a, _ in of_transformers(served, "none")]


@pytest.mark.parametrize(
    "settings, more, says",
    [
        ("pool:tokens=6", {"asks_again": True}, "pool merges tokens"),
        ("divprune:tokens=6,positions=renumber", {"asks_again": True}, "positions=renumber is not served"),
        ("divprune:tokens=6", {"asks_again": True, "video_pruning_rate": 0.5}, "cannot both be given"),
        ("divprune:tokens=6", {}, "vLLM on CPUs never asks a model for M-RoPE positions again"),
    ],
)
@pytest.mark.parametrize("served", ["qwen2_5_vl"], indirect=True)
def test_what_is_refused(served, settings, more, says):
    with pytest.raises(AssertionError, match=says):
        engine(served[1], [call(served)], hf_overrides={KEY: settings}, **more)


def test_layers_of_linear_attention(tmp_path):
    """Qwen3.5, in bfloat16, without which vLLM runs no linear attention on CPUs."""
    family = vllm_families.Served(vllm_families.qwen3_5_config, vllm_families.qwen3_5, IMAGE, noise=0.05)
    model, folder = family.model().bfloat16(), tmp_path / "model"
    export(Loaded(model, family.processor(), ModelOptions(model="tiny")), me.DivPrune(keep=0.4), folder)
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    for i, path in enumerate(paths):
        noise(i, 60 + 20 * i, 60).save(path)
    prompts = [f"user : {IMAGE} what is the big ring ? assistant :"] * 3
    call = {"prompts": prompts, "images": [[p] for p in paths], "tokens": None, "new": 4}
    (found,) = engine(folder, [call], asks_again=True, dtype="bfloat16")
    processor = transformers.AutoProcessor.from_pretrained(folder)
    with me.compressed(model, "divprune:keep=0.4"), torch.no_grad():
        for prompt, path, answer, length in zip(prompts, paths, found["answers"], found["prompt_tokens"]):
            inputs = processor(text=[prompt], images=[Image.open(path).convert("RGB")], return_tensors="pt")
            ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            (image,) = me.last_report(model).images
            assert length == inputs["input_ids"].shape[1] - image.full + image.kept
            assert processor.decode(ids, skip_special_tokens=True).strip() == answer
    assert len(set(found["answers"])) > 1  # the pictures matter
