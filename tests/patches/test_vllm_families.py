"""InternVL by its own class, and families that vLLM runs by transformers: answers equal transformers' own."""

from __future__ import annotations

import pytest
import torch
import transformers
from PIL import Image

import mllm_efficient as me
from mllm_efficient.loading.models import Loaded, ModelOptions
from mllm_efficient.trained.export import export

from ..families import ASPECTS, MARKED, noise
from ..vllm_families import ALIKE, NOT_ON_CPUS, OWN, SERVED
from ..vllm_models import needs_vllm
from .test_vllm import KEY, engine
from .test_vllm_processor import front_end

pytestmark = [needs_vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Paths: every shape alone, and two in a prompt."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = [str(folder / f"{i}.png") for i in range(len(ASPECTS))]
    for i, (width, height) in enumerate(ASPECTS.values()):
        noise(i, 2 * width, 2 * height).save(paths[i])
    return [[p] for p in paths] + [[paths[0], paths[3]]]


def prompts(family, pictures):
    return ["user : " + " and ".join([family.image] * len(p)) + " what is the big ring ? assistant :" for p in pictures]


def of_transformers(model, folder, family, pictures, spec):
    """Answers and the tokens of every prompt."""
    processor, out = transformers.AutoProcessor.from_pretrained(folder), []
    with me.compressed(model, spec), torch.no_grad():
        for prompt, paths in zip(prompts(family, pictures), pictures):
            inputs = processor(text=[prompt], images=[[Image.open(p).convert("RGB") for p in paths]], return_tensors="pt")
            inputs = as_served(inputs, model.config.model_type)
            ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            images = me.last_report(model).images
            kept = sum(i.kept for i in images) - sum(i.full for i in images)
            out.append((processor.decode(ids, skip_special_tokens=True).strip(), inputs["input_ids"].shape[1] + kept))
    return [list(column) for column in zip(*out)]


def as_served(inputs, kind):
    """Without the breaks after rows, which go where a budget is shared by rows: how many tokens a row keeps depends on the picture."""
    if kind == "mistral3":
        stays = inputs["input_ids"][0] != MARKED["[IMG_BREAK]"]
        return {**inputs, "input_ids": inputs["input_ids"][:, stays], "attention_mask": inputs["attention_mask"][:, stays]}
    return inputs


@pytest.mark.parametrize("name", [name for name in SERVED if name not in ALIKE])
def test_answers_equal_transformers(name, pictures, tmp_path):
    family = SERVED[name]
    model, folder = family.model(), tmp_path / "model"
    if name in OWN:
        export(Loaded(model, family.processor(), ModelOptions(model="tiny")), me.build(family.spec), folder, [3])
        more = {}
    else:
        model.save_pretrained(folder)
        family.processor().save_pretrained(folder)
        more = {"hf_overrides": {KEY: {**me.build(family.spec).to_dict(), "allowed_tokens": [3]}}, "model_impl": "transformers"}
    call = {"prompts": prompts(family, pictures), "images": pictures, "tokens": None, "new": 6}
    found = engine(folder, [call, {**call, "tokens": 3}], asks_again=True, max_num_batched_tokens=32, max_num_seqs=4, **more)
    asked = family.spec.replace("keep=0.4", "tokens=3")
    for answer, spec in zip(found, (family.spec, asked)):
        answers, lengths = of_transformers(model, folder, family, pictures, spec)
        assert "error" not in answer, answer["error"]
        assert answer["prompt_tokens"] == lengths
        assert answer["answers"] == answers
    assert len(set(found[0]["answers"])) > 3  # the pictures matter


def test_tiles_in_the_front_end(pictures, tmp_path):
    """InternVL: as many placeholders as ``prepare`` leaves of every shape, whole pictures in the counters, names that no two share."""
    family = SERVED["internvl"]
    model, processor = family.model(), family.processor()
    export(Loaded(model, processor, ModelOptions(model="tiny")), me.Uniform(tokens=9), tmp_path / "model")
    specs = ("divprune:keep=0.3,per=tile", "pool:keep=0.3", "mmtok:tokens=5")
    calls = [{"prompt": t, "images": p} for t, p in zip(prompts(family, pictures), pictures)]
    jobs = [{"model": str(tmp_path / "model"), "settings": s, "calls": [{"warm_up": True}, *calls, {"counted": True}]} for s in specs]
    found, each = front_end(jobs), len(calls) + 1
    for i, spec in enumerate(specs):
        *answers, counted = found[each * i : each * (i + 1)]
        counts = [0, 0, 0]
        for call, answer in zip(calls, answers):
            images = [Image.open(p).convert("RGB") for p in call["images"]]
            prepared = me.prepare(model, spec, **processor(text=[call["prompt"]], images=[images], return_tensors="pt"))
            kept = [image.kept for image in prepared.report.images]
            assert answer["lengths"] == [k + 2 for k in kept]  # between the image's begin and its end
            assert answer["prompt"] == prepared.model_kwargs["input_ids"].shape[1]
            counts = [a + b for a, b in zip(counts, (sum(im.full for im in prepared.report.images), sum(kept), len(kept)))]
        assert counted == {"method": spec.partition(":")[0], "counts": counts}
    hashes = [h for answer in found if len(answer.get("hashes", ())) == 1 for h in answer["hashes"]]
    assert len(hashes) == len(set(hashes))


@pytest.mark.parametrize("name", NOT_ON_CPUS)
def test_what_vllm_does_not_do_on_cpus_is_refused(name, pictures, tmp_path):
    family, says = NOT_ON_CPUS[name]
    family.model().save_pretrained(tmp_path)
    family.processor().save_pretrained(tmp_path)
    call = {"prompts": prompts(family, pictures), "images": pictures, "tokens": None, "new": 6}
    with pytest.raises(AssertionError, match=says):
        engine(tmp_path, [call], hf_overrides={KEY: family.spec}, model_impl="transformers")
    with pytest.raises(AssertionError, match="vLLM runs Gemma3ForConditionalGeneration by a class of its own"):
        engine(tmp_path, [call], hf_overrides={KEY: family.spec})
