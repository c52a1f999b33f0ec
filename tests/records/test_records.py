"""Forms of records: forty are the same record to ``eval --data`` and to ``train``, and what cannot be used names its line."""

from __future__ import annotations

import base64
import io
import json

import pytest
from PIL import Image

import mllm_efficient as me
from mllm_efficient.eval.builtin.architecture import build_processor
from mllm_efficient.eval.requests import prompts_of, read_requests
from mllm_efficient.loading.models import Loaded, ModelOptions
from mllm_efficient.parsing import parse_json, parse_yaml
from mllm_efficient.records import read, read_all
from mllm_efficient.train.chat import Chat
from mllm_efficient.train.data import read as read_training

NAMES = ("a.png", "b.png")


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(NAMES):
        Image.new("RGB", (20, 20), (100 * i, 0, 0)).save(tmp_path / name)
    return tmp_path


def of(i: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (20, 20), (100 * i, 0, 0)).save(out, format="PNG")
    return out.getvalue()


URI = "data:image/png;base64," + base64.b64encode(of(0)).decode()


def llava(*said: str, **more):
    return {"conversations": [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)], **more}


def chat(*said, system=None, **more):
    first = [] if system is None else [{"role": "system", "content": system}]
    return {"messages": [*first, *({"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(said))], **more}


def text(what):
    return {"type": "text", "text": what}


def url(where, **more):
    return {"type": "image_url", "image_url": {"url": where, **more}}


def batch(body, **more):
    return {"custom_id": "r1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", **body}, **more}


ONE = (None, (("<image>\nWhat?", "This."),), 1)  # system prompt, turns, images of NAMES
MIDDLE = (None, (("<image>What?", "This."),), 1)  # nothing stands between a part and the next
BARE = (None, (("What?", "This."),), 0)
GOOD = {
    # LLaVA
    "llava": (llava("<image>\nWhat?", "This.", id="7", image="a.png"), ONE),
    "llava without a marker": (llava("What?", "This.", image="a.png"), ONE),
    "llava list of one": (llava("<image>\nWhat?", "This.", image=["a.png"]), ONE),
    "llava images, a string": (llava("<image>\nWhat?", "This.", images="a.png"), ONE),
    "llava images, a list": (llava("<image>\nWhat?", "This.", images=["a.png"]), ONE),
    "llava marker behind": (llava("What?\n<image>", "This.", image="a.png"), (None, (("What?\n<image>", "This."),), 1)),
    "llava two images": (llava("<image>\n<image>\nWhich?", "This.", image=[*NAMES]), (None, (("<image>\n<image>\nWhich?", "This."),), 2)),
    "llava two turns": (
        llava("<image>\nWhat?", "This.", "And <image>?", "That.", images=[*NAMES]),
        (None, (("<image>\nWhat?", "This."), ("And <image>?", "That.")), 2),
    ),
    "llava text": (llava("What?", "This."), BARE),
    "llava null image": (llava("What?", "This.", image=None), BARE),
    "llava roles user and assistant": (
        {"image": "a.png", "conversations": [{"from": "user", "value": "<image>\nWhat?"}, {"from": "assistant", "value": "This."}]}, ONE,
    ),
    "llava asks": (llava("<image>\nWhat?", image="a.png", answer="This."), ONE),
    "llava from system": (
        {"conversations": [{"from": "system", "value": "Be brief."}, *llava("What?", "This.")["conversations"]]},
        ("Be brief.", *BARE[1:]),
    ),
    "llava system": (llava("<image>\nWhat?", "This.", image="a.png", system="Be brief."), ("Be brief.", *ONE[1:])),
    "llava system_prompt": (llava("What?", "This.", system_prompt="Be brief."), ("Be brief.", *BARE[1:])),
    "llava empty system": (llava("What?", "This.", system=""), BARE),
    "llava extra keys": (llava("<image>\nWhat?", "This.", image="a.png", model="m", score=0.5), ONE),
    "conversations with role and content": ({"conversations": chat("What?", "This.")["messages"]}, BARE),
    # OpenAI chat
    "chat": (chat("What?", "This."), BARE),
    "chat with images beside it": (chat("What?", "This.", images=["a.png"]), ONE),
    "chat with a marker": (chat("<image>\nWhat?", "This.", images=["a.png"]), ONE),
    "chat role system": (chat("What?", "This.", system="Be brief."), ("Be brief.", *BARE[1:])),
    "chat role system of parts": (chat("What?", "This.", system=[text("Be brief.")]), ("Be brief.", *BARE[1:])),
    "chat system beside it": ({**chat("What?", "This."), "system": "Be brief."}, ("Be brief.", *BARE[1:])),
    "chat image_url path": (chat([url("a.png"), text("What?")], "This."), MIDDLE),
    "chat image_url string": (chat([{"type": "image_url", "image_url": "a.png"}, text("What?")], "This."), MIDDLE),
    "chat image_url data": (chat([url(URI), text("What?")], "This."), MIDDLE),
    "chat image_url detail": (chat([url(URI, detail="auto"), text("What?")], [text("This.")]), MIDDLE),
    "chat image_url file": (lambda folder: chat([url((folder / "a.png").as_uri()), text("What?")], "This."), MIDDLE),
    "chat asks": (chat([url("a.png"), text("What?")], answer=["This.", "that"]), MIDDLE),
    "chat texts around": (
        chat([text("Is"), url("a.png"), text("red"), text("or blue?")], "This."), (None, (("Is<image>red\nor blue?", "This."),), 1),
    ),
    "chat two turns with images": (
        chat([url("a.png"), text("What?")], "This.", [text("And"), url("b.png")], "That."),
        (None, (("<image>What?", "This."), ("And<image>", "That.")), 2),
    ),
    "batch": (batch(chat([url("a.png"), text("What?")], "This.")), MIDDLE),
    "batch asks": (batch(chat([url("a.png"), text("What?")]), answer="This."), MIDDLE),
    "batch system": (batch(chat("What?", "This.", system="Be brief.")), ("Be brief.", *BARE[1:])),
    # Hugging Face parts
    "part image": (chat([{"type": "image", "image": "a.png"}, text("What?")], [text("This.")]), MIDDLE),
    "part url": (chat([{"type": "image", "url": "a.png"}, text("What?")], [text("This.")]), MIDDLE),
    "part path": (lambda folder: chat([{"type": "image", "path": str(folder / "a.png")}, text("What?")], [text("This.")]), MIDDLE),
    "part base64": (chat([{"type": "image", "base64": base64.b64encode(of(0)).decode()}, text("What?")], [text("This.")]), MIDDLE),
    "part named beside it": (chat([{"type": "image"}, text("What?")], [text("This.")], images="a.png"), MIDDLE),
    # a bare prompt
    "prompt": ({"images": ["a.png"], "prompt": "What?", "answer": "This."}, ONE),
    "prompt, image": ({"image": "a.png", "prompt": "What?", "answer": "This."}, ONE),
    "prompt with a marker": ({"image": "a.png", "prompt": "<image>\nWhat?", "answer": "This."}, ONE),
    "prompt with a number": ({"prompt": "What?", "answer": 3}, (None, (("What?", "3"),), 0)),
}  # fmt: skip


def content(images) -> list[bytes]:
    return [i if isinstance(i, bytes) else i.read_bytes() for i in images]


def write(folder, entries, form="jsonl"):
    path = folder / f"data.{form}"
    lines = [json.dumps(e) if isinstance(e, dict) else e for e in entries]
    path.write_text("\n".join(lines) if form == "jsonl" else "[\n" + ",\n".join(lines) + "\n]", encoding="utf-8")
    return path


def test_there_are_forty_forms():
    assert len(GOOD) >= 40


@pytest.mark.parametrize("form", ("json", "jsonl"))
@pytest.mark.parametrize("name", GOOD)
def test_a_form_is_the_same_record_to_eval_and_to_train(folder, name, form):
    entry, (system, turns, images) = GOOD[name]
    entry = entry(folder) if callable(entry) else entry
    path = write(folder, [entry], form)
    (request,), (record,) = read_requests(path), read_training(path)
    for found in (request.record, record):
        assert (found.system, found.turns) == (system, turns)
        assert content(found.images) == [of(i) for i in range(images)]
        assert found.answers[0] == turns[-1][1]
    assert request.record.id == record.id and request.record.extra == record.extra


@pytest.mark.parametrize("name", [n for n, (_, (system, *_)) in GOOD.items() if system is None])
def test_eval_asks_what_train_puts_before_the_last_answer(folder, name):
    processor = build_processor()
    entry = GOOD[name][0]
    path = write(folder, [entry(folder) if callable(entry) else entry])
    requests = read_requests(path)
    (prompt,) = prompts_of(requests, Loaded(None, processor, ModelOptions()), path)
    rendered = Chat(processor).render(read_training(path)[0])
    before = rendered.text[: rendered.answers[-1][0]].replace("</s>", "")  # training ends each answer
    assert before.rstrip() == prompt.rstrip()


def test_a_whole_prompt_is_asked_as_it_is_and_not_trained_on(folder):
    processor = build_processor()
    path = write(folder, [{"image": "a.png", "prompt": "USER: <image>\nWhat? ASSISTANT:", "answer": "This."}])
    assert prompts_of(read_requests(path), Loaded(None, processor, ModelOptions()), path) == ["USER: <image>\nWhat? ASSISTANT:"]
    with pytest.raises(me.MllmEfficientError, match="data.jsonl:1: a question ends in 'ASSISTANT:', as a whole prompt does"):
        Chat(processor).render(read_training(path)[0])


def test_a_system_prompt_reaches_the_template(folder):
    processor = build_processor()
    processor.chat_template = (
        "{% for m in messages %}{{ m['role'] }} : {% for p in m['content'] %}{{ p['text'] }}{% endfor %} . {% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}"
    )
    path = write(folder, [chat("What?", "This.", system="Be brief.")])
    (prompt,) = prompts_of(read_requests(path), Loaded(None, processor, ModelOptions()), path)
    assert prompt == "system : Be brief. . user : What? . assistant : "
    assert Chat(processor).render(read_training(path)[0]).text == f"{prompt.rstrip()} This.</s>"


def test_extra_keys_are_kept_and_handed_on(folder):
    path = write(folder, [batch(chat("What?", "This."), source="web"), llava("What?", "This.", model="m")])
    assert [r.record.extra for r in read_requests(path)] == [
        {"method": "POST", "url": "/v1/chat/completions", "source": "web", "model": "m"}, {"model": "m"},
    ]  # fmt: skip
    assert [r.id for r in read(path)] == ["r1", "line 2"]


TALK = llava("What?", "This.")
WRONG = {
    "not a JSON object": "[1]",
    "not JSON": '{"prompt": "What?"',
    "NaN is no number": '{"prompt": "What?", "answer": NaN}',
    "answer must be a text or a number": '{"prompt": "What?", "answer": 1e999}',
    "the key 'prompt' stands twice": '{"prompt": "What?", "prompt": "Why?", "answer": "This."}',
    "more than 64 levels": '{"prompt": "What?", "answer": "This.", "extra": ' + "[" * 5000 + "]" * 5000 + "}",
    "4300 digits": '{"prompt": "What?", "answer": ' + "1" * 5000 + "}",
    "not valid Unicode": '{"prompt": "What \\ud800?", "answer": "This."}',
    "neither prompt nor messages nor conversations": {"image": "a.png", "answer": "This."},
    "both prompt and conversations": {**TALK, "prompt": "What?"},
    "has <video>, and the record has no video": llava("<video>\nWhat?", "This."),
    "a video: records take images": {**TALK, "video": "a.mp4"},
    "has a part 'video_url'": chat([{"type": "video_url", "video_url": {"url": "a.mp4"}}, text("What?")], "This."),
    "https://x.org/a.png is not fetched: download it": chat([url("https://x.org/a.png"), text("What?")], "This."),
    "s3://x/a.png is not fetched": {**TALK, "image": "s3://x/a.png"},
    "is no data: URI": chat([url("data:image/png;base64,*"), text("What?")], "This."),
    "no image file": {**TALK, "image": "c.png"},
    "image must be a path": {**TALK, "image": {"bytes": "x"}},
    "both images of the record and of single parts": chat([url("a.png"), text("What?")], "This.", images=["b.png"]),
    "2 <image> in the questions, and 1 image(s)": llava("<image> <image>", "This.", image="a.png"),
    "message 2 has <image>: images belong to questions": llava("What?", "<image>", image="a.png"),
    "is of the assistant and has an image": chat("What?", [url("a.png"), text("This.")]),
    "message 1 has the unknown role 'tool'": {"messages": [{"role": "tool", "content": "x"}]},
    "message 2 has tool_calls": {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "tool_calls": [1]}]},
    "message 2 has no text 'content', and no list": {"messages": [{"role": "user", "content": "x"}, {"role": "assistant"}]},
    "must take turns": chat("What?", "This.") | {"messages": [{"role": "user", "content": "x"}] * 2},
    "more than one system prompt": chat("What?", "This.", system="Be brief.") | {"system": "Be long."},
    "max_pixels of a single image": chat([{"type": "image", "image": "a.png", "max_pixels": 9}, text("What?")], "This."),
    "both image and url": chat([{"type": "image", "image": "a.png", "url": "b.png"}, text("What?")], "This."),
    "body must be an object": {"custom_id": "x", "body": []},
    "id must be a text or a whole number": {**TALK, "id": 1.5},
    "both an answer and a last message of the assistant": {**TALK, "answer": "That."},
    "message 2 is an empty answer": llava("What?", "  "),
}  # fmt: skip


@pytest.mark.parametrize("said", WRONG)
def test_what_cannot_be_used_is_one_line_with_its_place(folder, said):
    path = write(folder, [TALK, WRONG[said], TALK])
    for reader, place in ((read_training, f"{path}:2: "), (read_requests, f"{path} line 2: ")):
        with pytest.raises(me.MllmEfficientError) as error:
            reader(path)
        assert str(error.value).startswith(place) and said in str(error.value)
        assert len(str(error.value)) < len(place) + 300 and "\n" not in str(error.value)
    records, bad = read_all(path)
    assert len(records) == 2 and len(bad) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    (
        ("seed: 1\nseed: 2", "the key 'seed' stands twice"),
        ("a: {b: 1, b: 1}", "the key 'b' stands twice"),
        ("a: &a [*a]", "more than 64 levels"),
        ("&a {model: *a}", "more than 64 levels"),
        ("a: &a [*a, *a]", "more than 1,000,000 values"),
        ("[" * 5000, "more than 64 levels"),
        ("seed: " + "1" * 5000, "4300 digits"),
        ("seed: !!int x", "invalid literal"),
        ("seed: 2024-99-99", "month"),
        ("!!python/object/apply:os.system [x]", "could not determine a constructor"),
        ("a: b: c", "mapping values are not allowed"),
        ("\x00", "special characters"),
    ),
)
def test_yaml_that_cannot_be_used_is_one_line(text, said):
    with pytest.raises(me.MllmEfficientError) as error:
        parse_yaml(text)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_what_yaml_and_json_people_write_is_read():
    assert parse_yaml("base: &b {lr: 1}\nother:\n  <<: *b\n  steps: 2") == {"base": {"lr": 1}, "other": {"lr": 1, "steps": 2}}
    assert parse_json('\ufeff{"a": [1, {"b": null}]} '.encode()) == {"a": [1, {"b": None}]}
