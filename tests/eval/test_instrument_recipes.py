"""The trainer of the later embedded models: a packed forward equal to the stock model, questions that are right, a run that resumes."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from mllm_efficient.eval.builtin.chat import USER, VOCABULARY, build_tokenizer
from mllm_efficient.eval.builtin.hard import make_item
from mllm_efficient.eval.builtin.hard.canvas import Text
from mllm_efficient.eval.builtin.recipe import instrument, qwen, tiles, video
from mllm_efficient.eval.builtin.recipe.llava_packed import PackedLlava
from mllm_efficient.eval.builtin.recipe.packed_language import questions
from mllm_efficient.eval.builtin.recipe.phases import Drawn, Phase, phase_of, rate
from mllm_efficient.eval.builtin.recipe.prompts import (
    BLOCK,
    GROUND,
    HARD,
    ORDER,
    QUESTIONS,
    VIDEO,
    WEIGHTS,
    Kind,
    draw_prompt,
    encode,
    hard_prompt,
    pack,
    picked,
    tiny_prompt,
)  # fmt: skip
from mllm_efficient.eval.builtin.recipe.qwen_packed import PackedQwen
from mllm_efficient.eval.builtin.recipe.state import Log
from mllm_efficient.eval.builtin.recipe.validation import Asked, publish, validate
from mllm_efficient.eval.builtin.scenes import Thing
from mllm_efficient.loading.models import ModelOptions, load

RECIPES = {"qwen": qwen.RECIPE, "tiles": tiles.RECIPE}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A random model whose attention is not flat, as users load it: published, in half precision on disk."""

    @functools.cache
    def made(name):
        torch.manual_seed(0)
        model = RECIPES[name].model().eval()
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim > 1:
                    p += 0.05 * torch.randn_like(p)
        folder = tmp_path_factory.mktemp(name)
        publish(model, RECIPES[name].processor, folder)
        found = load(ModelOptions(model=str(folder)))
        stock = found.processor.image_processor
        if not type(stock).__name__.endswith("Pil"):  # torchvision resamples some pixels to the next value
            found.processor.image_processor = getattr(transformers, f"{type(stock).__name__}Pil").from_dict(stock.to_dict())
        return found

    return made


@pytest.mark.parametrize("category", ["document", "images", "screens"])
@pytest.mark.parametrize("name", RECIPES)
def test_the_packed_forward_equals_the_stock_model_on_processed_prompts(loaded, name, category):
    model, recipe, rng = loaded(name), RECIPES[name], np.random.default_rng(0)
    prompts = [hard_prompt(i, category, rng, "val") for i in range(8)]
    prompts = [p for p in prompts if len(p.draw) == len(prompts[0].draw)][:2]
    assert category != "document" or len({(p.height, p.width) for p in prompts}) == 2
    asked = questions(np.array([[pack(*p.questions[i % len(p.questions)][1:]) for i in (0, 1)] for p in prompts]), np.ones((2, 2)))
    asked.blind[1, 1] = True
    with torch.no_grad():
        shown = recipe.shown([[draw() for draw in p.draw] for p in prompts], Kind((category,), 1, 0, max(p.tokens for p in prompts)))
        packed = recipe.packed(model.model).answer(shown, asked)
        for i, prompt in enumerate(prompts):
            pictures = [Image.fromarray(draw()) for draw in prompt.draw]
            for j in (0, 1):
                question, answer = prompt.questions[j % len(prompt.questions)][1:]
                seen = [] if asked.blind[i, j] else pictures
                inputs = model.inputs([model.prompt(question, len(seen)) + answer], seen)
                torch.testing.assert_close(packed[i, j], model.model(**inputs).logits[0, -2:], atol=2e-5, rtol=0)


def test_the_packed_forward_equals_the_stock_model_on_videos():
    torch.manual_seed(0)
    model, prompt = video.RECIPE.model().eval(), hard_prompt(0, VIDEO, np.random.default_rng(0), "val")
    shown = video.RECIPE.shown([[draw() for draw in prompt.draw]], Kind((VIDEO,), 8, 0, 36))
    block = pack(*prompt.questions[0][1:])
    with torch.no_grad():
        packed = PackedLlava(model).answer(shown, questions(np.array([[block]]), np.ones((1, 1))))
        tokens = len(model.model.get_video_features(shown.pixels).pooler_output[0])
        ids = torch.tensor([[*(VOCABULARY[w] for w in USER), *[VOCABULARY["<|video_pad|>"]] * tokens, *(w for w in block if w)]])
        stock = model(input_ids=ids, pixel_values_videos=shown.pixels).logits[0, -3:-1]
    assert tokens == 8 * 16 + 1
    torch.testing.assert_close(packed[0, 0], stock, atol=2e-5, rtol=0)


@pytest.mark.parametrize("recipe", [tiles.RECIPE, video.RECIPE], ids=lambda r: r.name)
def test_a_new_tower_begins_with_a_decoder_that_knows_the_words(recipe):
    """And with places in its tower: two patches side by side are told apart before a step is taken."""
    model, known = recipe.model(), load(ModelOptions(model="builtin-qwen", device="cpu")).model.model.language_model.state_dict()
    own = model.model.language_model.state_dict()
    assert own.keys() == known.keys() and all(torch.equal(own[key], known[key]) for key in own)
    tower = model.model.vision_tower
    grid, places = tower.config.image_size // tower.config.patch_size, tower.embeddings.position_embedding.weight
    places = places[len(places) - grid**2 :]
    assert torch.cdist(places, places).fill_diagonal_(9).min() > 1
    width = places.shape[1] // 2
    rows, columns = places.view(grid, grid, -1).split(width, -1)
    assert torch.equal(rows[:, :1].expand_as(rows), rows) and torch.equal(columns[:1].expand_as(columns), columns)


def test_a_question_is_encoded_as_the_processor_encodes_it():
    tokenizer = build_tokenizer()
    for category in HARD:
        for _, question, answer in hard_prompt(3, category, np.random.default_rng(0), "train").questions:
            assert encode(question) == tokenizer(question)["input_ids"] and tokenizer.unk_token_id not in encode(question)
            assert tokenizer(answer)["input_ids"] == [VOCABULARY[answer]]
            assert len(pack(question, answer)) == BLOCK


NINTHS = {"top": 0, "middle": 1, "bottom": 2, "left": 0, "right": 2}


def middle(mark):
    """(down, across) in units: of an object, or of a text's first letter."""
    return ((mark.box.top + mark.box.bottom) / 2, mark.box.left + 10) if isinstance(mark, Text) else (mark.y, mark.x)


def named(mark):
    return {mark.text.lower()} if isinstance(mark, Text) else {mark.colour, mark.shape}


@pytest.mark.parametrize("category", ["document", "scene", "screens"])
def test_what_training_asks_about_places_is_so(category):
    """Of every ninth, side and neighbour that is asked for, from the marks themselves."""
    seen = set()
    for index in range(12):
        item = make_item("train", index, category)
        for _, text, answer in hard_prompt(index, category, np.random.default_rng(index)).grounding:
            question, _, order = text.rstrip("?").partition(" in the ")
            picture = item.pictures[ORDER.index(order.split()[0]) if order else 0]
            marks = [m for m in picture.marks if isinstance(m, Text | Thing)]
            words, height, width = question.split(), 2 * picture.height, 2 * picture.width
            seen.add(words[1] if words[0] == "word" else words[0])
            if words[1] == "at":
                down, across = (NINTHS[w] for w in words[-2:])
                there = [m for m in marks if int(3 * middle(m)[0] / height) == down and int(3 * middle(m)[1] / width) == across]
                assert len(there) == 1 and answer in named(there[0])
            elif words[0] in ("side", "height"):
                (one,) = [m for m in marks if set(words[2:]) <= named(m)]
                low = middle(one)[words[0] == "side"] < (height, width)[words[0] == "side"] / 2
                assert answer == {"side": ("right", "left"), "height": ("bottom", "top")}[words[0]][low]
            elif words[0] == "is":
                assert answer == ("yes" if any(set(words[2:]) <= named(m) for m in marks) else "no")
            elif words[0] == "word":  # right of, below
                axis = words[1] == "right"
                (one,) = [m for m in marks if named(m) == {words[-1]}]
                after = [m for m in marks if isinstance(m, Text) and middle(m)[axis] > middle(one)[axis]]
                line = [m for m in after if abs(middle(m)[not axis] - middle(one)[not axis]) < 14]
                assert answer in named(min(line, key=lambda m: middle(m)[axis]))
            else:  # colour of circle
                (one,) = [m for m in marks if words[-1] in named(m)]
                assert {answer, words[-1]} == named(one)
    assert len(seen) >= 5, seen


def test_the_first_pictures_are_small_and_have_something_to_ask():
    for index in range(30):
        prompt = tiny_prompt(index, np.random.default_rng(0))
        assert prompt.draw[0]().shape == (prompt.height, prompt.width, 3) and prompt.tokens <= 12 and prompt.grounding


def test_a_prompt_is_of_its_kind_and_its_questions_are_shared_out():
    rng = np.random.default_rng(1)
    for kind in (Kind(("old", "chart"), 1, 25, 64), Kind(("images",), 3, 0, 36)):
        prompt = draw_prompt(kind, rng)
        assert len(prompt.draw) == kind.pictures and kind.low < prompt.tokens <= kind.high
        assert prompt.draw[0]().shape == (prompt.height, prompt.width, 3)
        chosen = picked(prompt, 0.0, rng)
        assert len(chosen) == QUESTIONS and any(category != GROUND for category, _, _ in chosen)
        assert all(category == GROUND for category, _, _ in picked(prompt, 1.0, rng))


def test_pictures_that_tiles_show_in_their_own_size():
    rng, tile = np.random.default_rng(2), 112
    for categories in (("tiny",), ("old", "document", "chart")):
        drawn = [draw_prompt(Kind(categories, 1, 0, 64, whole=tile), rng) for _ in range(12)]
        assert all(p.height % tile == 0 or p.width % tile == 0 for p in drawn)


def test_questions_of_a_video_count_by_their_form_in_training_alone():
    asked = {
        split: {c for i in range(12) for c, *_ in hard_prompt(i, VIDEO, np.random.default_rng(0), split).questions}
        for split in ("train", "val")
    }
    assert asked == {"train": {f"{VIDEO} {form}" for form in ("motion", "appeared", "earliest", "before")}, "val": {VIDEO}}
    assert {c for c in WEIGHTS if c.startswith(VIDEO)} < asked["train"]


def test_the_test_is_of_other_pictures_or_of_none_where_that_is_asked(loaded):
    """Pictures of another prompt are shown with their own sizes, and a question without any is the same for all prompts."""
    model, categories = loaded("qwen").model, ("images", "chart")
    about = Asked(qwen.RECIPE.shown, categories, (64, 144), "val", 0, 5)
    own, other = (replace(about, pictures=which).prompts() for which in ("own", "another"))
    assert [p.questions for p in own] == [p.questions for p in other]
    assert all(a.draw is not b.draw and len(a.draw) == len(b.draw) for a, b in zip(own[5:], other[5:]))  # charts
    assert all(b.draw[0]().shape == (b.height, b.width, 3) for b in other)
    assert sorted(len(b) for b in about.batches()) and sum(len(b) for b in about.batches()) == 10
    scores = validate(PackedQwen(model), replace(about, pictures="none"))
    assert set(scores) == {"macro", *categories}


def test_a_phase_lasts_its_steps():
    short, long = (Phase(steps, 1, 0.0, ()) for steps in (2, 3))
    assert [phase_of((short, long), step) for step in range(6)] == [short] * 2 + [long] * 4


def test_the_rate_warms_up_stays_and_falls():
    rates = [rate(step, 1000) for step in range(1000)]
    assert rates[0] < 0.02 and rates[100:750] == [1.0] * 650 and rates[-1] < 0.03 and sorted(rates[740:], reverse=True) == rates[740:]


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(tmp_path, monkeypatch):
    recipe = replace(qwen.RECIPE, phases=(Phase(3, 2, 0.5, (Drawn(("chart",), 1, 0, 36, 2, 1.0),)),))
    monkeypatch.setattr(instrument, "validate", lambda *args: {})
    monkeypatch.setattr(instrument, "LOG_EVERY", 1)

    def run(*arguments: str) -> int:
        return instrument.main(recipe, "", ["--eager", *arguments])

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run("--output-dir", str(whole)) == 0
    for _ in range(3):  # every start is out of time after one step
        assert run("--output-dir", str(parts), "--minutes", "0") == 0
    assert not (parts / "model").exists()  # the last start ran out of time, too
    assert run("--output-dir", str(parts), "--publish") == 0
    assert (parts / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()
    steps = [json.loads(line)["step"] for line in (parts / "log.jsonl").read_text().splitlines()]
    assert steps == [json.loads(line)["step"] for line in (whole / "log.jsonl").read_text().splitlines()]


def test_the_log_forgets_steps_that_are_taken_again(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    Log(path, 1, 0.0)(step=2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
