"""Methods that look at the question in vLLM: the front end hands the prompt's text along, and it is part of what an image is known by."""

from __future__ import annotations

import pytest
import torch
import transformers
from PIL import Image

import mllm_efficient as me
from mllm_efficient.eval.builtin.suite import samples
from mllm_efficient.loading.models import Loaded, ModelOptions, builtin_folder, load
from mllm_efficient.patches.vllm.settings import KEY, require_served, servable
from mllm_efficient.trained.export import export

from ..families import noise
from ..vllm_models import model_of, needs_vllm, saved_processor_of
from .test_vllm import engine
from .test_vllm_pixels import IMAGE
from .test_vllm_processor import front_end

SPEC = "cdpruner:tokens=18"


@needs_vllm
@pytest.mark.slow
def test_every_question_to_one_picture_has_its_own_tokens(tmp_path):
    """Three questions to each of eight pictures in one engine, all caches on, at the server's budget and a request's, and again."""
    loaded, asked, paths = load(ModelOptions(device="cpu")), samples("test", 24), []
    prompts = [loaded.prompt(sample.question.text, 1) for sample in asked]
    pictures = [asked[i - i % 3].picture(144) for i in range(len(asked))]
    for i, picture in enumerate(pictures):
        paths.append([str(tmp_path / f"{i - i % 3}.png")])
        picture.save(paths[-1][0])
    call = {"prompts": prompts, "images": paths, "tokens": None, "new": 8}
    given = {KEY: {"method": "cdpruner", "tokens": 18, "allowed_tokens": [9]}}
    found = engine(builtin_folder(), [call, {**call, "tokens": 9}, call], hf_overrides=given, enable_prefix_caching=True, block_size=32)

    def of_transformers(spec):
        out = []
        with me.compressed(loaded.model, spec), torch.no_grad():
            for prompt, picture in zip(prompts, pictures):
                inputs = loaded.inputs([prompt], [picture])
                ids = loaded.model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
                out.append(loaded.processor.decode(ids, skip_special_tokens=True).strip())
        return out

    expected = of_transformers(SPEC)
    assert found[0]["answers"] == expected == found[2]["answers"]
    assert found[1]["answers"] == of_transformers("cdpruner:tokens=9") != expected


@needs_vllm
@pytest.mark.slow
def test_on_qwen_and_in_hashes(tmp_path):
    model = model_of("qwen3_vl")
    export(Loaded(model, saved_processor_of("qwen3_vl"), ModelOptions(model="tiny")), me.CDPruner(keep=0.3), tmp_path / "model")
    paths = [[str(tmp_path / "0.png")], [str(tmp_path / "1.png")]]
    for i, path in enumerate(paths):
        noise(i, 80, 64).save(path[0])
    texts = ("what is the big ring ?", "user assistant is the big is the big", "what what what")
    prompts = [f"user : {IMAGE} {text} assistant :" for text in texts for _ in paths]
    (found,) = engine(tmp_path / "model", [{"prompts": prompts, "images": paths * 3, "tokens": None, "new": 8}], asks_again=True)
    processor, expected, kept = transformers.AutoProcessor.from_pretrained(tmp_path / "model"), [], []
    with me.compressed(model, "cdpruner:keep=0.3"), torch.no_grad():
        for prompt, (path,) in zip(prompts, paths * 3):
            inputs = processor(text=[prompt], images=[Image.open(path).convert("RGB")], return_tensors="pt")
            ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            expected.append(processor.decode(ids, skip_special_tokens=True).strip())
            kept.append(me.last_report(model).images[0].indices.tolist())
    assert found["answers"] == expected and len({*map(tuple, kept[::2])}) > 1  # the question matters
    calls = [{"prompt": p, "images": i} for p, i in zip(prompts, paths * 3)]
    calls += [calls[0], {"prompt": IMAGE, "images": paths[0]}]
    said = front_end([{"model": str(tmp_path / "model"), "settings": SPEC, "calls": [{"warm_up": True}, *calls]}])
    hashes = [one["hashes"][0] for one in said[:-1]]
    assert len({*hashes[:6]}) == 6 and hashes[6] == hashes[0]
    assert [one["lengths"] for one in said[:-1]] == [[18]] * 7


@pytest.mark.once
def test_where_the_question_is_known():
    for kind in ("llava", "llava_next", "internvl", "qwen3_vl"):
        require_served(me.CDPruner(tokens=9), kind)
        assert {"cdpruner", "mmtok"} <= {*servable(kind)} and "hawk" not in servable(kind)
    for kind in ("mistral3", "qwen3_5", ""):
        with pytest.raises(me.UnsupportedModelError, match="cdpruner looks at the question"):
            require_served(me.CDPruner(tokens=9), kind)
    with pytest.raises(me.UnsupportedModelError, match="looks at the question"):
        require_served(me.CDPruner(tokens=9, relevance="clip", clip="folder"), "llava")
