"""A server that no request can kill: what a picture or a request does wrong is its own error, and the next ones are as ever."""

from __future__ import annotations

import pytest
import torch
import transformers
from PIL import Image

import mllm_efficient as me
from mllm_efficient.loading.models import Loaded, ModelOptions
from mllm_efficient.patches.vllm import alone, failures
from mllm_efficient.trained.export import export

from ..families import ASPECTS, noise
from ..vllm_models import model_of, needs_vllm, saved_processor_of
from .test_vllm import engine

SPEC = "divprune:keep=0.4"
PROMPT = "user : <image> what is the big ring ? assistant :"


# ------------------------------------------------------------------------------------------------------ without vLLM


@pytest.fixture
def shared(monkeypatch, tmp_path):
    (tmp_path / failures.REQUESTS).mkdir()
    monkeypatch.setenv(failures.FOLDER, str(tmp_path))


def test_an_image_that_fails_becomes_zeros_and_a_note(shared, monkeypatch):
    """Every way to fail: features that are not finite, a method that raises, a wrong count, merged rows that overflow.

    The note, which a client sees, has the words of this package's errors alone; the log has all.
    """
    logged: list[str] = []
    monkeypatch.setattr(alone.logger, "error", lambda text, *values: logged.append(text % values))
    good, broken = torch.ones(6, 4), torch.ones(6, 4)
    broken[2, 1] = float("inf")
    features = [good, broken, good, good, good]
    made = [good[:3], good[:3], ZeroDivisionError("by nothing"), good[:2], good[:3] * float("inf")]

    def rows(i):
        if isinstance(made[i], Exception):
            raise made[i]
        return made[i]

    out = alone.each_alone([alone.Image(10 + i, f, 3, 4) for i, f in enumerate(features)], rows)
    assert torch.equal(out[0], good[:3]) and all(torch.equal(o, torch.zeros(3, 4)) for o in out[1:])
    known = failures.Reader().read()
    assert sorted(known) == [11, 12, 13, 14] and failures.number() == 4
    assert (
        "NaN or infinity" in known[11]
        and known[12].endswith(alone.UNTOLD)
        and "by nothing" not in known[12]
        and "(2, 4) rows" in known[13]
        and "merged" in known[14]
    )
    assert any("ZeroDivisionError: by nothing" in line for line in logged) and len(logged) == 4


def test_memory_that_is_not_there_is_no_fault_of_a_picture(shared):
    def rows(i):
        raise torch.OutOfMemoryError("none left")

    with pytest.raises(torch.OutOfMemoryError):
        alone.each_alone([alone.Image(1, torch.ones(2, 2), 2, 2)], rows)


def test_notes_are_kept_once_and_not_without_end(shared, monkeypatch):
    reader = failures.Reader()
    failures.note(1, "first")
    failures.note(1, "second")
    assert reader.read() == {1: "first"}
    monkeypatch.setattr(failures, "MOST", 8)
    for i in range(2, 40):
        failures.note(i, "more")
        reader.read()
    assert failures.number() <= 8 and sorted(reader.known) == list(range(1, 40))


@pytest.mark.parametrize(
    "given, noted",
    [
        ("abc", "chatcmpl-abc"),
        ("abc", "chatcmpl-abc-1f00ab2c"),  # as vLLM makes it its own
        ("abc", "cmpl-abc-0-1f00ab2c"),  # of several prompts
        ("abc", "chatcmpl-abc_1-1f00ab2c"),
        ("abc", "1_chatcmpl-abc-1f00ab2c"),  # of several answers
        ("a/b c.*", "chatcmpl-a/b c.*-1f00ab2c"),
    ],
)
def test_a_client_is_told_the_reason_of_its_own_request(shared, given, noted):
    failures.note_request(noted, "because")
    assert failures.of_request(given) == "because"
    for other in ("1", "a", "b", "abc-1f00", "chatcmpl", "xyz", "", "."):
        assert failures.of_request(other) is None


def test_nothing_is_noted_where_nothing_is_shared(monkeypatch):
    monkeypatch.delenv(failures.FOLDER, raising=False)
    failures.note(1, "why")
    assert failures.Reader().read() == {} and failures.number() == 0


# --------------------------------------------------------------------------------------------------------- the engine


@needs_vllm
@pytest.mark.slow
def test_faults_of_one_request_are_its_own(tmp_path):
    """A LLaVA-OneVision whose config caps its tiles at 4, where vLLM takes 9: big pictures, broken features, settings of the processor."""
    model = model_of("llava_onevision")
    model.config.vision_aspect_ratio = "anyres_max_4"
    export(Loaded(model, saved_processor_of("llava_onevision"), ModelOptions(model="tiny")), me.build(SPEC), tmp_path / "m", [6])
    pictures = [noise(i, width, height) for i, (width, height) in enumerate(ASPECTS.values())]
    pictures += [noise(90, 150, 90), Image.new("RGB", (50, 50), "white"), Image.new("RGB", (50, 50), "black")]
    paths = [str(tmp_path / f"{i}.png") for i in range(len(pictures))]
    for picture, path in zip(pictures, paths):
        picture.save(path)
    good, (white, black) = paths[:-2], paths[-2:]

    def call(images, **more):
        return {"prompts": [PROMPT] * len(images), "images": [[i] for i in images], "new": 6, **more}

    mixed = [good[0], white, good[1], black, *good[2:]]
    calls = [call(mixed), call(good), call([white]), call(good[:1], more={"do_resize": False}), call(good[:1], more={"visual_token": 6}),
             call(good, tokens=6)]  # fmt: skip
    found = engine(tmp_path / "m", calls, breaks=True, max_num_batched_tokens=48)
    assert [f == "error" for f in found[0]["finished"]] == [p in (white, black) for p in mixed]
    expected = answers(model, tmp_path, good)
    assert [a for a, p in zip(found[0]["answers"], mixed) if p in good] == found[1]["answers"] == expected
    assert found[2]["finished"] == ["error"]  # out of the encoder's cache
    for wrong, key in ((found[3], "do_resize"), (found[4], "visual_token")):
        assert f"mm_processor_kwargs: {key} cannot be set" in wrong["error"]
    assert found[5]["answers"] == answers(model, tmp_path, good, "divprune:tokens=6")


def answers(model, folder, paths, spec=SPEC):
    """Of transformers, which tiles as vLLM does."""
    model.config.vision_aspect_ratio = "anyres_max_9"
    processor, out = transformers.AutoProcessor.from_pretrained(folder / "m"), []
    with me.compressed(model, spec), torch.no_grad():
        for path in paths:
            inputs = processor(text=[PROMPT], images=[Image.open(path).convert("RGB")], return_tensors="pt")
            inputs.pop("token_type_ids", None)
            ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            out.append(processor.decode(ids, skip_special_tokens=True).strip())
    return out
