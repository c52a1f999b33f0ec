"""Training data: what is read and refused by line, where labels stand, and that a batch is its rows."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image

import mllm_efficient as me
from mllm_efficient.eval.builtin.architecture import build_processor
from mllm_efficient.loading.models import Loaded, ModelOptions
from mllm_efficient.train.data import Record, builtin_records, read
from mllm_efficient.train.encoding import Collator, encode
from mllm_efficient.train.survey import survey

from ..families import FAMILIES, noise, tiny

PLAIN = (  # as LLaVA-1.5 has it: images first, nothing after an answer but a space
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ 'IMAGE\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
ENDED = (  # as ChatML has it: parts in their order, an end token after every message
    "{% for message in messages %}{{ message['role'] + ' :\n' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant :\n' }}{% endif %}"
)
TEMPLATES = {"plain": PLAIN, "ended": ENDED}
KINDS = ("builtin", *FAMILIES)


def processor_of(kind: str, template: str = "plain"):
    if kind == "builtin":
        return build_processor()
    out = copy.copy(FAMILIES[kind].processor("left"))
    out.chat_template = TEMPLATES[template].replace("IMAGE", FAMILIES[kind].image)
    return out


def record(*turns: tuple[str, str], seed: int = 0) -> Record:
    """Each marker gets a picture of its own shape."""
    shapes = [(70, 50), (40, 20), (20, 60)]
    images = sum(question.count("<image>") for question, _ in turns)
    return Record(tuple(noise(seed + i, *shapes[(seed + i) % 3]) for i in range(images)), turns, f"d.json:{seed}")


ONE = record(("<image>\nwhat is the big ring ?", "red"), ("how many rings ?", "2 , 3"), ("is the ring blue ?", "no"), seed=1)
LATER = record(("<image>\n<image>\nis it red ?", "yes"), ("what of <image> ?", "no , blue"), seed=2)
TEXT = record(("what is a cross ?", "a cross , yes"), ("how many ?", "0"), seed=3)
RECORDS = {"one image": ONE, "a later image": LATER, "text only": TEXT}


def answers(ids: torch.Tensor, labels: torch.Tensor, tokenizer) -> list[str]:
    """The runs of labels, decoded."""
    assert torch.equal(labels[labels != -100], ids[labels != -100])
    known = [-100, *labels.tolist(), -100]
    starts = [i for i in range(1, len(known)) if known[i] != -100 and known[i - 1] == -100]
    return [tokenizer.decode(known[i : known.index(-100, i)]) for i in starts]


# ------------------------------------------------------------------------------------------------ labels


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_the_answers_and_their_ends(kind, template, name):
    processor = processor_of(kind, template)
    some = RECORDS[name]
    out = encode(some, processor)
    assert answers(out["input_ids"], out["labels"], processor.tokenizer) == [f"{answer} </s>" for _, answer in some.turns]
    assert out["labels"][-1] == processor.tokenizer.eos_token_id, "nothing stands after the last answer"
    assert out["turns"].tolist() == sorted(out["turns"].tolist())
    for turn, (_, answer) in enumerate(some.turns, start=1):
        here = out["turns"] == turn
        assert answers(out["input_ids"][here], out["labels"][here], processor.tokenizer) == [f"{answer} </s>"]


def test_the_prompt_is_the_one_that_evals_ask():
    processor = build_processor()
    loaded = Loaded(torch.nn.Linear(1, 1), processor, ModelOptions())
    some = record(("<image>\nWhat shape is the big object?", "ring"))
    prompt = processor(images=list(some.images), text=[loaded.prompt("What shape is the big object?", 1)], return_tensors="pt")
    out = encode(some, processor)
    assert out["input_ids"][:-2].tolist() == prompt["input_ids"][0].tolist()
    assert torch.equal(out["pixel_values"], prompt["pixel_values"])
    assert (out["turns"] == 0).sum() == 3 + 144  # <s> user : and the image


def test_a_processor_without_a_template_prompts_as_evals_do():
    processor = processor_of("llava_next")
    processor.chat_template = None
    loaded = Loaded(torch.nn.Linear(1, 1), processor, ModelOptions())
    prompt = processor(images=[ONE.images[0]], text=[loaded.prompt("what is the big ring ?", 1)], return_tensors="pt")["input_ids"][0]
    out = encode(ONE, processor)
    assert out["input_ids"][: len(prompt)].tolist() == prompt.tolist()
    assert answers(out["input_ids"], out["labels"], processor.tokenizer) == ["red </s>", "2 , 3 </s>", "no </s>"]


def test_marker_in_the_middle_of_a_question_stays_there():
    processor = processor_of("qwen2_5_vl", "ended")
    out = encode(record(("is the ring of <image> in <image> ?", "no")), processor)
    text = " ".join(t for t in processor.tokenizer.convert_ids_to_tokens(out["input_ids"]) if t != "<|image_pad|>")
    framed = "<|vision_start|> <|vision_end|>"
    assert text == f"<s> user : is the ring of {framed} in {framed} ? </s> assistant : no </s>"


def test_a_template_that_changes_answers_is_refused():
    processor = processor_of("llava_next")
    processor.chat_template = PLAIN.replace("IMAGE", "<image>").replace("part['text'] + ' '", "part['text'] | upper + ' '")
    with pytest.raises(
        me.MllmEfficientError, match="d.json:1: in the chat template of LlavaNextProcessor the answer 'red' does not follow"
    ):
        encode(ONE, processor)


def test_a_template_that_forgets_images_is_refused():
    processor = processor_of("llava_next")
    processor.chat_template = PLAIN.replace("IMAGE", "")
    with pytest.raises(me.MllmEfficientError, match="d.json:1: the prompt has 0 <image> for 1 image"):
        encode(ONE, processor)


def test_a_processor_that_changes_the_text_is_refused():
    class Odd(type(build_processor())):
        def replace_image_token(self, *args, **kwargs):
            return "what " + super().replace_image_token(*args, **kwargs)

    processor = build_processor()
    processor.__class__ = Odd
    with pytest.raises(me.MllmEfficientError, match="d.json:0: Odd changes the text around its images"):
        encode(record(("<image>\nwhat is it?", "ring")), processor)


# ------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("kind", KINDS)
def test_batch_is_its_rows(kind):
    processor = processor_of(kind)
    batch = Collator(processor)([ONE, TEXT, LATER])
    assert "turns" not in batch
    for i, some in enumerate((ONE, TEXT, LATER)):
        row, length = encode(some, processor), int(batch["attention_mask"][i].sum())
        assert batch["attention_mask"][i].tolist() == [1] * length + [0] * (batch["labels"].shape[1] - length)
        for name in {"input_ids", "labels", "mm_token_type_ids"} & set(row):
            assert torch.equal(batch[name][i, :length], row[name])
        assert (batch["labels"][i, length:] == -100).all()
        assert (batch["input_ids"][i, length:] == processor.tokenizer.pad_token_id).all()


@torch.no_grad()
@pytest.mark.parametrize("kind", FAMILIES)
def test_batch_trains_as_its_rows_do(kind):
    """The loss of a batch is that of its rows, each weighted with its labels: pixels belong to the right rows."""
    processor, model = processor_of(kind), tiny(kind)
    together = model(**Collator(processor)([LATER, TEXT, ONE])).loss
    alone = [Collator(processor)([some]) for some in (LATER, TEXT, ONE)]
    counts = [int((one["labels"] != -100).sum()) for one in alone]
    torch.testing.assert_close(together, sum(model(**one).loss * n for one, n in zip(alone, counts)) / sum(counts))


@pytest.mark.parametrize("independent", (False, True))
def test_batch_without_any_image(independent):
    batch = Collator(build_processor(), independent_turns=independent)([TEXT, TEXT.first(1)])
    assert set(batch) == {"input_ids", "attention_mask", "labels"} | ({"turns"} if independent else set())


# ------------------------------------------------------------------------------------------------ truncation


@pytest.mark.parametrize("independent", (False, True))
@pytest.mark.parametrize("kind", ("builtin", "llava_next", "qwen2_5_vl"))
def test_turns_that_do_not_fit_are_left_out(kind, independent):
    processor = processor_of(kind)
    collate = Collator(processor, independent_turns=independent)
    for turns in (1, 2, 3):
        fits = collate([ONE.first(turns)])
        for spare in (0, 1):
            cut = Collator(processor, fits["labels"].shape[1] + spare, independent)([ONE])
            assert all(torch.equal(cut[name], fits[name]) for name in fits)


def test_images_of_left_out_turns_go_too():
    processor = processor_of("qwen2_5_vl")
    full = encode(LATER, processor)
    cut = encode(LATER, processor, max_length=len(full["labels"]) - 1)
    assert (len(cut["image_grid_thw"]), len(full["image_grid_thw"])) == (2, 3)
    assert torch.equal(cut["input_ids"], encode(LATER.first(1), processor)["input_ids"])


def test_a_first_turn_that_does_not_fit_loses_its_end_and_images_that_do_not_are_named():
    long = record(("<image>\nwhat is the big ring ?", "2 , 3"), ("is the ring blue ?", "no"), seed=1)
    full = Collator(build_processor())([long.first(1)])
    length = full["labels"].shape[1] - 2
    cut = Collator(build_processor(), max_length=length)([long])
    assert all(torch.equal(cut[name], full[name][:, :length]) for name in ("input_ids", "labels", "attention_mask"))
    with pytest.raises(me.MllmEfficientError, match="d.json:1: its images go beyond max_length=30"):
        Collator(build_processor(), max_length=30)([ONE])


# ------------------------------------------------------------------------------------------------ independent turns


@pytest.mark.parametrize("images", (0, 1, 2))
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_independent_turns_are_single_turns(kind, template, images):
    processor = processor_of(kind, template)
    questions, said = ("what is the big ring ?", "how many rings ?", "is it blue ?"), ("red", "2 , 3", "no")
    marked = "<image>\n" * images
    together = record((marked + questions[0], said[0]), *zip(questions[1:], said[1:]))
    batch = Collator(processor, independent_turns=True)([together, record(("is it ?", "no"))])
    for turn in (1, 2, 3):
        alone = encode(record((marked + questions[turn - 1], said[turn - 1])), processor)
        own = (batch["turns"][0] == 0) | (batch["turns"][0] == turn)
        for name in {"input_ids", "labels", "mm_token_type_ids"} & set(alone):
            assert torch.equal(batch[name][0, own], alone[name]), name
        assert (batch["turns"][0] == 0).sum() == (alone["turns"] == 0).sum()
    assert torch.equal(batch["turns"] == -1, batch["attention_mask"] == 0)
    assert ((batch["turns"] == 0).sum() > 0) == (images > 0)


@pytest.mark.parametrize("question", ("is <image> red ?", "is it red ?\n<image>"))
def test_independent_turns_need_images_first(question):
    collate = Collator(build_processor(), independent_turns=True)
    for some in (record((question, "no")), LATER):
        with pytest.raises(me.MllmEfficientError, match=f"{some.name}: independent turns need all images at the beginning"):
            collate([some])


# ------------------------------------------------------------------------------------------------ files


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (20, 20)).save(tmp_path / name)
    return tmp_path


def talk(*said: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]


GOOD = [
    {"id": 1, "image": "a.png", "conversations": talk("<image>\nWhat?", "This.", "And?", " That. ")},
    {"id": "x", "image": ["a.png", "b.png"], "conversations": talk("Is it <image>?", "No.", "<image>\nThis?", "Yes.")},
    {"images": ["a.png", "b.png"], "conversations": talk("Which?", "Both.")},
    {"image": None, "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], "model": ""},
]
READ = [
    (["a.png"], (("<image>\nWhat?", "This."), ("And?", "That."))),
    (["a.png", "b.png"], (("Is it <image>?", "No."), ("<image>\nThis?", "Yes."))),
    (["a.png", "b.png"], (("<image>\n<image>\nWhich?", "Both."),)),
    ([], (("Hi", "Hello"),)),
]


def write(folder, form: str, entries: list) -> tuple:
    """The file and the place of every entry in it."""
    path = folder / f"data.{form}"
    if form == "jsonl":
        path.write_text("\n".join(json.dumps(entry) for entry in entries) + "\n\n")
        return path, [f"{path}:{i}" for i, _ in enumerate(entries, start=1)]
    path.write_text("[\n" + ",\n".join(json.dumps(entry, indent=1) for entry in entries) + "\n]\n")
    lines = [2 + sum(json.dumps(e, indent=1).count("\n") + 1 for e in entries[:i]) for i in range(len(entries))]
    return path, [f"{path}:{line} (record {i})" for i, line in enumerate(lines, start=1)]


@pytest.mark.parametrize("form", ("json", "jsonl"))
def test_reads(folder, form):
    path, places = write(folder, form, GOOD)
    found = read(path, None)
    assert [([i.name for i in r.images], r.turns) for r in found] == READ
    assert [r.name for r in found] == places
    assert found[0].images[0] == folder / "a.png"


def test_images_are_looked_for_in_the_image_folder(folder):
    (folder / "elsewhere").mkdir()
    path, _ = write(folder / "elsewhere", "json", GOOD)
    assert [r.images for r in read(path, folder)] == [tuple(folder / i for i in images) for images, _ in READ]
    with pytest.raises(me.MllmEfficientError, match="no image file .*elsewhere/a.png"):
        read(path)


BAD = {
    "no image file": {"image": "c.png", "conversations": talk("<image>", "A")},
    "image must be a path": {"image": ["a.png", 3], "conversations": talk("<image>", "A")},
    "both image and images": {"image": "a.png", "images": ["b.png"], "conversations": talk("<image>", "A")},
    "a video": {"video": "a.mp4", "conversations": talk("Q", "A")},
    "neither prompt nor messages nor conversations": {"image": "a.png"},
    "the conversation is empty": {"conversations": []},
    "message 1 has the unknown role 'tool'": {"conversations": [{"from": "tool", "value": "Be good"}, *talk("Q", "A")]},
    "message 2 is of the system": {"conversations": [*talk("Q"), {"from": "system", "value": "Be good"}, *talk("Q", "A")]},
    "message 2 has the unknown role None": {"conversations": [*talk("Q"), {"value": "A"}]},
    "message 1 is of the assistant: user (human) and assistant (gpt) must take turns": {"conversations": talk("Q", "A")[1:]},
    "message 2 is of the user: user (human) and assistant (gpt) must take turns": {"conversations": [*talk("Q"), *talk("Q", "A")]},
    "ends with a question": {"conversations": talk("Q", "A", "Q")},
    "message 2 is an empty answer": {"conversations": talk("Q", " \n")},
    "message 3 is an empty question": {"conversations": talk("Q", "A", "", "A")},
    "message 2 has <image>: images belong to questions": {"image": "a.png", "conversations": talk("Q", "<image>")},
    "message 1 has no text 'value'": {"conversations": [{"from": "human", "value": 3}]},
    "message 2 has no text 'content'": {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant"}]},
    "a text is not valid Unicode": {"conversations": talk("\ud800", "A")},
    "2 <image> in the questions, and 1 image": {"image": "a.png", "conversations": talk("<image> <image>", "A")},
    "1 <image> in the questions, and 2 image": {"image": ["a.png", "b.png"], "conversations": talk("<image>", "A")},
    "1 <image> in the questions, and 0 image": {"conversations": talk("<image>", "A")},
    "not a JSON object": ["a.png"],
}


@pytest.mark.parametrize("form", ("json", "jsonl"))
@pytest.mark.parametrize("problem", BAD)
def test_every_problem_names_its_line(folder, form, problem):
    path, places = write(folder, form, [*GOOD, BAD[problem], *GOOD])
    with pytest.raises(me.MllmEfficientError) as error:
        read(path, None)
    assert str(error.value).startswith(f"{places[len(GOOD)]}: ")
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


def test_five_problems_are_shown_and_all_counted(folder):
    path, places = write(folder, "jsonl", [GOOD[0], *[BAD["the conversation is empty"]] * 7])
    with pytest.raises(me.MllmEfficientError) as error:
        read(path)
    shown = "; ".join(f"{place}: conversations: the conversation is empty" for place in places[1:6])
    assert str(error.value) == f"7 problems in the data, the first 5: {shown}"
    path, places = write(folder, "jsonl", [{"image": "a.png"}, BAD["the conversation is empty"]])
    with pytest.raises(me.MllmEfficientError, match=r"^2 problems .*:1: neither prompt.*; .*:2: conversations: the conversation is empty$"):
        read(path)


@pytest.mark.parametrize(
    ("text", "said"),
    (
        ('{"a": 1}\n{"a": \n', r":1: neither prompt.*:2: not JSON: .*column"),
        ('[{"conversations": [\n', r":1 \(record 1\): not JSON: .*line 2"),
        ("[\n{} {}\n]", r":2 \(record 1\): neither prompt.*:2 \(record 1\): not JSON: no ',' or '\]'"),
        ("[\n{},\n]", r":2 \(record 1\): neither prompt.*:3 \(record 2\): not JSON"),
        ("[]\n[]", r":1: not JSON: the list ends here"),
        ("[ ]", "data holds no record"),
        ("", "data holds no record"),
        ("[" * 100_000, r":1 \(record 1\): not JSON"),
    ),
)
def test_what_is_no_json_names_its_line(tmp_path, text, said):
    path = tmp_path / "data"
    path.write_text(text)
    with pytest.raises(me.MllmEfficientError, match=said):
        read(path)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(me.MllmEfficientError, match="cannot read the data .*none.json: No such file"):
        read(tmp_path / "none.json")
    (tmp_path / "latin.json").write_bytes(b"[\xe9]")
    with pytest.raises(me.MllmEfficientError, match="is not UTF-8 text"):
        read(tmp_path / "latin.json")


def test_a_broken_image_file_is_named(folder):
    (folder / "b.png").write_text("no picture")
    path, _ = write(folder, "json", GOOD)
    with pytest.raises(me.MllmEfficientError, match="b.png is not an image"):
        Collator(build_processor())(read(path))


# ------------------------------------------------------------------------------------------------ generated scenes


@pytest.mark.parametrize("split", ("train", "val"))
def test_scenes_are_the_same_every_time(split, tmp_path):
    records, kept = builtin_records(split, 5, 12), builtin_records(split, 5, 12, tmp_path / "drawn")
    assert len(records) == len(list(records)) == 5
    for some, other in zip(records, kept):
        assert (some.turns, some.name) == (other.turns, other.name)
        assert np.array_equal(np.asarray(some.images[0]), np.asarray(other.images[0]))
        assert len(some.turns) == 12 and some.turns[0][0].startswith("<image>\n")
        assert not any("<image>" in question for question, _ in some.turns[1:])
    assert records[0].turns != records[1].turns
    assert records[-1].turns == records[4].turns == records[3:][1].turns
    assert records[0].turns != builtin_records(split, 5, 12, seed=1)[0].turns
    with pytest.raises(IndexError):
        records[5]


def test_scenes_in_the_words_of_the_embedded_model():
    processor = build_processor()
    unknown = processor.tokenizer.unk_token_id
    for natural in (False, True):
        batch = Collator(processor, independent_turns=True)(builtin_records("train", 16, 24, natural=natural)[:])
        assert unknown not in batch["input_ids"]
        assert (batch["labels"] != -100).sum() == 16 * 24 * 2, "one word and its end"
        assert int(batch["turns"].max()) == 24
    assert builtin_records("val", 1, 1, natural=True)[0].turns[0][0].endswith(" Answer with one word.")


@pytest.mark.parametrize(("split", "scenes", "questions"), (("test", 5, 5), ("train", 0, 5), ("train", 5, 25), ("train", 5, 0)))
def test_scenes_that_there_are_not(split, scenes, questions):
    with pytest.raises(me.MllmEfficientError):
        builtin_records(split, scenes, questions)


# ------------------------------------------------------------------------------------------------ surveys


def test_a_survey_counts_tokens():
    records = [ONE, TEXT] * 5
    found = survey(records, build_processor())
    lengths = [int((encode(r, build_processor())["input_ids"] != 4).sum()) for r in (ONE, TEXT)]
    assert found["visual_tokens"] == {"mean": 72.0, "max": 144}
    assert found["text_tokens"] == {"mean": sum(lengths) / 2, "max": max(lengths)}
    assert found["answer_tokens"] == {"mean": 7.5, "max": 8}
    assert (found["surveyed"], found["records"], found["cut_answers"], found["lost_answers"]) == (10, 10, 0, 0)
    assert survey(records, build_processor(), sample=3)["surveyed"] == 3


@pytest.mark.parametrize("independent", (False, True))
@pytest.mark.parametrize("kind", KINDS)
def test_a_survey_cuts_what_the_collator_cuts(kind, independent):
    """Of every length from nothing to everything, the records that lose a label and those that are refused."""
    processor = processor_of(kind)
    records = [r for r in (ONE, TEXT, LATER) if not (independent and r is LATER)]

    def labels(record, longest):
        try:
            return int((Collator(processor, longest, independent)([record])["labels"] != -100).sum())
        except me.MllmEfficientError as error:
            assert record.name in str(error) and f"max_length={longest}" in str(error)
            return 0

    full = [labels(r, None) for r in records]
    whole = [Collator(processor, None, independent)([r])["labels"].shape[1] for r in records]
    for longest in {*range(5, max(whole) + 2, 23), *(n + d for n in whole for d in (-1, 0, 1)), 8}:
        left = [labels(r, longest) for r in records]
        found = survey(records, processor, longest, independent)
        assert found["cut_answers"] == sum(a < b for a, b in zip(left, full)), longest
        assert found["lost_answers"] == left.count(0), longest


def test_a_survey_reads_headers_alone(folder):
    (folder / "text.png").write_text("no picture")
    Image.new("RGB", (20, 7)).save(folder / "tiny.png")
    Image.effect_noise((64, 64), 50).save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:900])  # has a header, and only decoding it will fail
    path, _ = write(folder, "jsonl", [{"image": n, "conversations": talk("Q", "A")} for n in ("a.png", "text.png", "tiny.png", "cut.jpg")])
    found = survey(read(path), build_processor())
    assert (found["unreadable"], found["tiny"], found["records"]) == (1, 1, 4)


def test_a_length_that_cuts_every_answer_names_the_record_and_the_numbers():
    with pytest.raises(me.MllmEfficientError, match=r"^d.json:3: max_length=7 cuts all .*, the first of which begins at token 11$"):
        encode(TEXT, build_processor(), max_length=7)
