"""The plugin in vLLM's front end alone: how many placeholders an image gets, and what it is known by."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mllm_efficient as me
from mllm_efficient.cli import main
from mllm_efficient.eval.builtin.suite import samples
from mllm_efficient.loading.models import Loaded, ModelOptions, builtin_folder, load
from mllm_efficient.patches.vllm.settings import require_served
from mllm_efficient.registry import BUILTIN
from mllm_efficient.trained.export import export

from ..families import ASPECTS, VOCABULARY, noise
from ..vllm_forks import forked
from ..vllm_models import model_of, needs_vllm, processor_of, saved_processor_of

pytestmark = [needs_vllm, pytest.mark.slow]


def can_be_served(name, kind="llava"):
    cls = me.get_method(name)
    if name == "none" or cls.trained:
        return False
    try:
        require_served(cls(tokens=9), kind)
    except (me.UnsupportedModelError, me.BadBudgetError):  # some methods take no budget
        return False
    return True


METHODS = [name for name in BUILTIN if can_be_served(name)]
BUDGETS = ({"tokens": 9}, {"keep": 0.3})


def front_end(jobs, environment=None):
    """What vLLM's processors say to jobs."""
    return forked("front_end", jobs, environment, timeout=600)


def settings_tried(kind="llava"):
    """Every method and kind of budget, each as an object that allows one other count."""
    return [{"method": name, **budget, "allowed_tokens": [6]} for name in METHODS if can_be_served(name, kind) for budget in BUDGETS]


def build(settings, tokens=None):
    given = {k: v for k, v in settings.items() if k != "allowed_tokens"}
    return me.build(given if tokens is None else {"method": given["method"], "tokens": tokens})


def unique(answers):
    hashes = [h for a in answers for h in a["hashes"]]
    return len(hashes) == len(set(hashes))


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "0.png"
    samples("test", 1)[0].picture(144).save(path)
    return str(path)


PROMPT = "USER: <image>\nWhat is it? ASSISTANT:"


def test_llava(picture):
    """Counts and hashes of each method, at its own budget and at a request's."""
    calls = [{"prompt": PROMPT, "images": [picture], "tokens": t} for t in (None, 6, 7)]
    tried = settings_tried()
    found = front_end([{"model": str(builtin_folder()), "settings": s, "calls": calls} for s in tried])
    own, asked, refused = found[::3], found[1::3], found[2::3]
    shape = me.patches.adapter_for(load(ModelOptions(device="cpu")).model).usual()
    for settings, a, b, c in zip(tried, own, asked, refused):
        assert a["lengths"] == [_kept(build(settings), shape)] and b["lengths"] == [_kept(build(settings, 6), shape)]
        assert "visual_tokens=7: 6 are allowed" in c["error"]
    assert unique(own + asked)


def _kept(method, shape):
    k = method.budget.count(shape.n)
    return method.yields(k, shape.grid) if method.merges else k


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_tiles(name, tmp_path):
    """Pictures of every aspect ratio, alone and two in a prompt: as many placeholders as transformers' prompt keeps."""
    model, processor, folder = model_of(name), processor_of(name), tmp_path / "model"
    export(Loaded(model, saved_processor_of(name), ModelOptions(model="tiny")), me.Uniform(tokens=9), folder)
    pictures = []
    for i, (width, height) in enumerate(ASPECTS.values()):
        pictures.append(noise(i, width, height))
        pictures[-1].save(tmp_path / f"{i}.png")
    paths = [[f"{tmp_path}/{i}.png"] for i in range(len(pictures))]
    pairs = [*paths, [*paths[0], *paths[-1]]]
    prompts = ["user : " + "<image> " * len(p) + "what ? assistant :" for p in pairs]
    calls = [{"prompt": t, "images": p, "tokens": n} for n in (None, 6) for t, p in zip(prompts, pairs)]
    tried = settings_tried(name)
    found = front_end([{"model": str(folder), "settings": s, "calls": calls} for s in tried])
    for number, settings in enumerate(tried):
        answers = found[number * len(calls) : (number + 1) * len(calls)]
        for call, answer in zip(calls, answers):
            chosen = [pictures[int(Path(p).stem)] for p in call["images"]]
            inputs = processor(text=call["prompt"], images=chosen, return_tensors="pt")
            inputs.pop("token_type_ids", None)
            kept = me.prepare(model, build(settings, call["tokens"]), **inputs).model_kwargs["input_ids"]
            assert sum(answer["lengths"]) == int((kept == VOCABULARY["<image>"]).sum()), (settings, call)
            assert answer["prompt"] == kept.shape[1]
        assert answers[len(pairs) - 1]["lengths"] == answers[0]["lengths"] + answers[len(pairs) - 2]["lengths"]
        assert answers[len(pairs) - 1]["hashes"] == answers[0]["hashes"] + answers[len(pairs) - 2]["hashes"]
    assert unique(a for i, a in enumerate(found) if i % len(pairs) != len(pairs) - 1)


def test_a_trained_projector(picture, tmp_path):
    assert main(["export", "--method", "tokenflex:tokens=36", "--allowed-tokens", "16", "--output-dir", str(tmp_path / "t")]) == 0
    settings = json.loads((tmp_path / "t" / "config.json").read_text())["visual_token_compression"]
    calls = [{"prompt": PROMPT, "images": [picture], "tokens": t} for t in (None, 16)]
    found = front_end([{"model": str(tmp_path / "t"), "settings": settings, "calls": calls}])
    assert [a["lengths"] for a in found] == [[36], [16]] and unique(found)


def test_without_settings_an_image_is_what_it_is_to_vllm(picture):
    job = {"model": str(builtin_folder()), "settings": None, "calls": [{"prompt": PROMPT, "images": [picture]}]}
    assert front_end([job]) == front_end([job], {"MLLM_EFFICIENT_VLLM": "0"})


def test_names_that_clients_give_to_images_do_not_mix_budgets(picture):
    """The same name under two settings, and at a request's count."""
    call = {"prompt": PROMPT, "images": [picture], "names": ["mine"]}
    settings = ({"method": "divprune", "tokens": 36, "allowed_tokens": [16]}, "divprune:tokens=16")
    jobs = [{"model": str(builtin_folder()), "settings": s, "calls": [call]} for s in settings]
    jobs[0]["calls"] = [call, {**call, "tokens": 16}]
    found = front_end(jobs)
    assert [a["lengths"] for a in found] == [[36], [16], [16]] and unique(found)


def test_requests_are_counted_and_the_warm_up_of_the_server_is_not(picture):
    """The method is named, and the counters are there, from the start."""
    request, counted = {"prompt": PROMPT, "images": [picture]}, {"counted": True}
    calls = [counted, {"warm_up": True}, counted, request, {"warm_up": True}, counted]
    first, warm, _, then = front_end([{"model": str(builtin_folder()), "settings": "divprune:tokens=36", "calls": calls}])
    assert first == warm == {"method": "divprune", "counts": [0, 0, 0]}
    assert then == {"method": "divprune", "counts": [144, 36, 1]}
