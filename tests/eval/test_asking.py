"""Requests of benchmarks in batches: any family, the unwrapped model's answers, stop strings, padding, failures, the cache."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from PIL import Image

import mllm_efficient as me
from mllm_efficient.eval.lmms.asking import Answer, Content, Request, SampleError, before
from mllm_efficient.eval.lmms.cache import AnswerCache
from mllm_efficient.eval.lmms.model import SYSTEM_V1, ModelAsker
from mllm_efficient.eval.lmms.server import _image
from mllm_efficient.loading.models import Loaded, ModelOptions, load

from ..families import FAMILIES, noise, tiny
from .test_eval_data import TEMPLATE

NEW = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def builtin():
    return load(ModelOptions(device="cpu"))


def family(name):
    processor = copy.deepcopy(FAMILIES[name].processor("left"))
    processor.chat_template = TEMPLATE.replace("IMAGE", FAMILIES[name].image)
    return Loaded(tiny(name), processor, ModelOptions(model=f"tiny {name}"))


def request(name, text, *pictures, **settings):
    parts = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": text}]
    content = Content([{"role": "user", "content": parts}], list(pictures), [f"{name}/{i}" for i in range(len(pictures))])
    return Request(name, {**NEW, **settings}, lambda: content)


def six(size=60):
    """One picture, two, none, and others of different lengths."""
    return [
        request("a", "what is red ?", noise(0, size, size)),
        request("b", "are the rings green ?", noise(1, size, size), noise(2, size, size)),
        request("c", "what is a cross ?"),
        request("d", "is the big ring on the left of the small cross red or blue ?", noise(3, size, size)),
        request("e", "how many small blue rings are on the left of the red cross ?", noise(4, size, size)),
        request("f", "what is the ring ?"),
    ]


def ask(loaded, method, requests, batch_size=1, **settings):
    asker = ModelAsker(batch_size, loaded=loaded, method=me.build(method), **settings)
    with asker.installed():
        return asker.ask(requests)


def texts(answers):
    return [a.text for a in answers]


@pytest.mark.parametrize("name", FAMILIES)
def test_keep_1_equals_the_unwrapped_model_answer_for_answer_and_batch_4_equals_batch_1(name):
    loaded, requests = family(name), six()
    plain = []
    for r in requests:
        content = r.content()
        prompt = loaded.processor.apply_chat_template(content.messages, add_generation_prompt=True)
        inputs = loaded.inputs([prompt], [content.pictures] if name == "llava_onevision" and content.pictures else content.pictures)
        out = loaded.model.generate(**inputs, **NEW)[0, inputs["input_ids"].shape[1] :]
        plain.append(loaded.processor.decode(out, skip_special_tokens=True).strip())
    assert texts(ask(loaded, "divprune:keep=1", requests)) == plain
    assert texts(ask(loaded, "none", requests, 4)) == plain
    assert len(set(plain)) > 1
    inside = f"fastv:ratio=0.3,layer={2 if 'qwen' in name else 1}"
    for method in ("divprune:keep=0.3", "random:keep=0.3", "resize:keep=0.5", *([inside] if FAMILIES[name].inside else [])):
        one, four = ask(loaded, method, requests), ask(loaded, method, requests, 4)
        assert [(a.text, a.visual_tokens_kept, a.prompt_tokens, a.prompt_tokens_full) for a in one] == [
            (a.text, a.visual_tokens_kept, a.prompt_tokens, a.prompt_tokens_full) for a in four
        ]


def test_counts_of_every_answer(builtin):
    picture = Image.fromarray(np.full((144, 144, 3), 90, np.uint8))
    one, none = ask(builtin, "divprune:tokens=36", [request("a", "What colour is the big object?", picture), request("b", "what ?")])
    assert (one.visual_tokens_full, one.visual_tokens_kept, one.prompt_tokens_full - one.prompt_tokens) == (144, 36, 108)
    assert (none.visual_tokens_full, none.visual_tokens_kept, none.prompt_tokens) == (0, 0, none.prompt_tokens_full)
    assert one.latency_s > 0 and one.output_tokens >= 1 and one.tokens_per_layer is None and one.batch == 1
    (inside,) = ask(builtin, "fastv:ratio=0.5", [request("a", "What colour is the big object?", picture)])
    layers = inside.tokens_per_layer
    assert layers[0] == 144 and layers[-1] == 72 and inside.visual_tokens_kept == round(sum(layers) / len(layers))
    assert one.counts().keys() >= {"visual_tokens_full", "latency_s"} and "error" not in one.counts() and "cached" not in one.counts()


def test_methods_that_bring_weights_or_are_composed_and_the_model_afterwards(builtin):
    state = {k: v.clone() for k, v in builtin.model.state_dict().items()}
    requests = [request("a", "What colour is the big object?", noise(5, 144, 144))]
    (flex,), (both,) = ask(builtin, "tokenflex:tokens=36", requests), ask(builtin, "divprune:tokens=72 | fastv:ratio=0.5", requests)
    assert flex.visual_tokens_kept == 36
    assert both.prompt_tokens == both.prompt_tokens_full - 72 and max(both.tokens_per_layer) == 72 and both.tokens_per_layer[-1] == 36
    assert state.keys() == builtin.model.state_dict().keys()
    assert all(torch.equal(v, builtin.model.state_dict()[k]) for k, v in state.items())


def test_stop_strings_end_an_answer_and_are_left_out(builtin):
    loaded = family("llava_next")
    whole = ask(loaded, "none", [request("a", "what is red ?", noise(0, 60, 60), max_new_tokens=12)])[0]
    words = whole.text.split()
    stop = words[3]
    cut = ask(loaded, "none", [request("a", "what is red ?", noise(0, 60, 60), max_new_tokens=12, until=[stop])])[0]
    first = words.index(stop)
    assert cut.text == " ".join(words[:first]) and cut.output_tokens == first + 1 < whole.output_tokens
    assert before("red\n\nand more", ["\n\n"]) == "red" and before(" a b ", []) == "a b" and before("aXbYc", ["Y", "X"]) == "a"


def test_a_stop_string_in_the_prompt_or_in_another_row_stops_nothing():
    loaded = family("llava_next")
    requests = [request("a", "what is red ?", noise(0, 60, 60)), request("d", "is the ring blue ?", noise(3, 60, 60))]
    plain = ask(loaded, "none", requests, 2)
    word = next(w for w in plain[0].text.split() if w not in plain[1].text.split())
    stopped = [Request(r.id, {**r.settings, "until": [word, "assistant"]}, r.content) for r in requests]
    assert ask(loaded, "none", stopped, 2)[1].text == plain[1].text


def test_settings_of_tasks_become_settings_of_generate(builtin):
    sensible = ModelAsker(loaded=builtin, method=me.build("none"), max_new_tokens=7).sensible
    assert sensible({"temperature": 0.0, "top_p": 1.0, "num_beams": 1, "image_aspect_ratio": "original", "until": "x"}) == {
        "num_beams": 1, "until": ["x"], "max_new_tokens": 7, "do_sample": False,
    }  # fmt: skip
    assert sensible({"temperature": 0.7, "max_new_tokens": 3, "until": None}) == {
        "temperature": 0.7, "until": [], "max_new_tokens": 3, "do_sample": True,
    }  # fmt: skip


def test_sampled_answers_are_not_kept(builtin, tmp_path):
    cache = AnswerCache(tmp_path)
    requests = [request("a", "How many objects are there?", noise(0, 144, 144), do_sample=True, temperature=3.0)] * 6
    answers = ask(builtin, "none", requests, 1, cache=cache)
    assert len(set(texts(answers))) > 1 and not any(a.cached for a in answers)


@pytest.mark.parametrize("name", ["llava_onevision", "llava_next", "qwen2_5_vl"])
def test_batches_count_tokens_alike_with_stop_strings(name):
    loaded = family(name)
    plain = ask(loaded, "none", six(), 4)
    stop = plain[0].text.split()[2]
    requests = [Request(r.id, {**r.settings, "until": [stop, ""]}, r.content) for r in six()]
    one, four = ask(loaded, "none", requests), ask(loaded, "none", requests, 4)
    assert [(a.text, a.output_tokens) for a in one] == [(a.text, a.output_tokens) for a in four]
    assert one[0].output_tokens == 3


def test_requests_of_different_settings_never_share_a_batch(builtin):
    pictures = [noise(i, 144, 144) for i in range(4)]
    requests = [request(str(i), "How many objects are there?", p, max_new_tokens=1 + i % 2) for i, p in enumerate(pictures)]
    answers = ask(builtin, "none", requests, 4)
    assert [a.batch for a in answers] == [2] * 4
    assert texts(answers) == texts(ask(builtin, "none", requests))


def test_a_wide_picture_is_padded_with_the_mean_colour_or_left_to_be_cropped(builtin):
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 144, 3), dtype=np.uint8))
    content = Content([], [wide], ["k"])
    pad = ModelAsker(loaded=builtin, method=me.build("none"))
    crop = ModelAsker(loaded=builtin, method=me.build("none"), image_padding="crop")
    (square,) = pad.pictured(content)
    values = np.asarray(square)
    assert square.size == (144, 144) and (values[42:102] == np.asarray(wide)).all() and (values[:42] == 114).all()  # 255 * 0.45
    assert crop.pictured(content)[0] is wide
    assert (pad.how["image_padding"], crop.how["image_padding"]) == ("pad", "crop")
    assert ModelAsker(loaded=family("llava_next"), method=me.build("none")).how["image_padding"] == "whole"


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"image_padding": "crop"}, "no effect on LlavaNextForConditionalGeneration, whose processor keeps the whole picture"),
        ({"prompt_format": "llava_v1"}, "llava_v1 is LLaVA-1.5's"),
        ({"prompt_format": "vicuna"}, "'vicuna' is not one of template, llava_v1"),
    ],
)
def test_settings_without_effect_are_refused(settings, says):
    with pytest.raises(me.MllmEfficientError, match=says):
        ModelAsker(loaded=family("llava_next"), method=me.build("none"), **settings)


def test_prompt_formats(builtin):
    talk = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A ring."}]},
        {"role": "user", "content": [{"type": "text", "text": "Red?"}]},
    ]
    content = Content(talk, [noise(0, 144, 144)], ["k"])
    v1 = ModelAsker(loaded=builtin, method=me.build("none"), prompt_format="llava_v1")
    assert v1.prompt(content) == f"{SYSTEM_V1} USER: <image>\nWhat is it? ASSISTANT: A ring.</s>USER: Red? ASSISTANT:"
    assert v1.how["prompt"] == "llava_v1"
    bare = Loaded(builtin.model, copy.deepcopy(builtin.processor), ModelOptions(model="bare"))
    bare.processor.chat_template = None
    plain = ModelAsker(loaded=bare, method=me.build("none"))
    one = Content(talk[:1], content.pictures, ["k"])
    assert plain.prompt(one) == bare.prompt("What is it?", 1) and plain.how["prompt"] == "USER: ... ASSISTANT:"
    lost = Content([{"role": "user", "content": [{"type": "text", "text": "an <image> in words"}]}], [], [])
    with pytest.raises(me.MllmEfficientError, match="has 1 <image> and 0 image"):
        plain.prompt(lost)


# ------------------------------------------------------------------------------------------------- failures and cache


def broken(name="bad"):
    def content():
        raise OSError("image file is truncated")

    return Request(name, dict(NEW), content)


def test_a_sample_that_fails_is_named_and_the_others_are_answered(builtin):
    said = []
    requests = six(144)
    requests.insert(2, broken())
    answers = ask(builtin, "none", requests, 4, on_error="record", say=said.append)
    assert [a.error for a in answers] == [None, None, "OSError: image file is truncated", None, None, None, None]
    assert texts(answers[:2] + answers[3:]) == texts(ask(builtin, "none", six(144), 1))
    assert said == []
    with pytest.raises(SampleError, match="^bad: OSError: image file is truncated$"):
        ask(builtin, "none", requests, 4)


def test_a_batch_that_fails_is_asked_one_by_one_and_says_so(builtin, monkeypatch):
    real, said = ModelAsker.answers, []

    def answers(self, batch, settings):
        if any("red" in str(prompt) for _, prompt in batch):
            raise RuntimeError("out of\nmemory")
        return real(self, batch, settings)

    monkeypatch.setattr(ModelAsker, "answers", answers)
    requests = [request(n, text, noise(0, 144, 144)) for n, text in (("a", "what is blue ?"), ("b", "what is red ?"), ("c", "a ring ?"))]
    found = ask(builtin, "none", requests, 4, on_error="record", say=said.append)
    assert [a.error for a in found] == [None, "RuntimeError: out of memory", None]
    assert said == ["a batch of 3 from a failed (RuntimeError: out of memory): asking one by one"]


def test_the_cache_answers_the_same_call_and_no_other(builtin, tmp_path):
    requests = six(144)
    cache = AnswerCache(tmp_path / "c")

    def asked(method, batch_size=2, given=requests, **settings):
        asker = ModelAsker(batch_size, cache=cache, loaded=builtin, method=me.build(method), **settings)
        with asker.installed():
            answers = asker.ask(given)
        return sum(not a.cached for a in answers), answers

    calls, first = asked("divprune:keep=0.25")
    again, second = asked("divprune:keep=0.25")
    assert (calls, again) == (6, 0)
    assert [a.cached for a in second] == [True] * 6 and texts(second) == texts(first)
    assert [a.visual_tokens_kept for a in second] == [a.visual_tokens_kept for a in first]
    for method in ("divprune:keep=0.5", "divprune:keep=0.25,positions=keep", "none", "random:keep=0.25", "random:keep=0.25,seed=1"):
        assert asked(method)[0] == 6, method
    assert asked("divprune:keep=0.25", batch_size=3)[0] == 6  # padding differs, so may a rounded answer
    assert asked("divprune:keep=0.25", prompt_format="llava_v1")[0] == 6
    longer = [request(r.id, "what is red ?", max_new_tokens=3) for r in requests[:1]]
    assert asked("divprune:keep=0.25", given=longer)[0] == 1
    other = [request("a", "what is red ?", noise(99, 144, 144))]
    assert asked("divprune:keep=0.25", given=other)[0] == 1


def test_failures_are_not_kept_and_a_second_process_shares_the_file(builtin, tmp_path):
    cache = AnswerCache(tmp_path)
    ask(builtin, "none", [broken()], on_error="record", cache=cache)
    cache.put({"k": {"text": "kept"}})
    other = AnswerCache(tmp_path)
    assert other.get("k") == {"text": "kept"} and other.get("x") is None
    assert Answer(**other.get("k")).text == "kept"
    (tmp_path / "file").write_text("")
    with pytest.raises(me.MllmEfficientError, match="cannot keep answers in"):
        AnswerCache(tmp_path / "file")


def test_a_picture_goes_to_a_server_as_it_is():
    import base64
    import io

    picture = noise(3, 20, 30)
    url = _image(picture)["image_url"]["url"]
    assert url.startswith("data:image/png;base64,")
    assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))) == np.asarray(picture)).all()
