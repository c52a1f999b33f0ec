"""The harness: rows, paired intervals, resume after a kill, failures that are counted."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import transformers

import mllm_efficient as me
from mllm_efficient import stats
from mllm_efficient.cli import main
from mllm_efficient.eval import runner
from mllm_efficient.eval.answers import choices, judge, matches, normalise, words
from mllm_efficient.eval.builtin import architecture
from mllm_efficient.eval.builtin.architecture import SPECIAL, WORDS
from mllm_efficient.eval.builtin.questions import CATEGORIES, Question
from mllm_efficient.eval.builtin.scenes import UNITS, Box
from mllm_efficient.eval.builtin.suite import Sample, samples
from mllm_efficient.eval.record.samples import Records, fingerprint_of
from mllm_efficient.eval.runner import Run, first_word
from mllm_efficient.eval.table import rows_of, text_table
from mllm_efficient.eval.turns import converse, follow_ups, next_turn
from mllm_efficient.loading.models import Loaded, ModelOptions, load
from mllm_efficient.tokens import Plane

from ..families import FAMILIES, tiny


@pytest.fixture(scope="module")
def loaded():
    return load(ModelOptions(device="cpu"))


def run(loaded, specs, n=35, **kwargs):
    methods = [me.build(s) for s in ("none", *specs)]
    return Run(loaded, samples("val", n), methods, **kwargs).answer_all()


def test_json_rows_have_the_baseline_first_and_every_field(capsys):
    argv = ["eval", "--split", "val", "--limit", "28", "--method", "random:keep=0.25", "--against", "random:keep=0.25", "--json"]
    assert main(argv) == 0
    result = json.loads(capsys.readouterr().out)
    rows = result["rows"]
    assert [r["method"] for r in rows] == ["none"] * 8 + ["random:keep=0.25"] * 8
    assert [r["task"] for r in rows[:8]] == [*CATEGORIES, "overall"]
    wanted = "method keep tokens task metric score baseline retention n failures visual_tokens_full visual_tokens_kept floor".split()
    assert all(set(wanted) <= set(r) for r in rows)
    assert rows[-1]["visual_tokens_kept"] == 36 and rows[-1]["visual_tokens_full"] == 144 and rows[-1]["n"] == 28
    each = [r["score"] for r in rows[8:15]]
    assert rows[-1]["score"] == pytest.approx(sum(each) / 7, abs=0.01)  # macro; rows are rounded to 0.01
    assert rows[-1]["against_difference"] == 0 and result["meta"]["questions"] == 28
    assert all(r["ece"] > 0 and r["ece_interval"][0] <= r["ece_interval"][1] and r["aurc"] >= 0 for r in rows if r["task"] == "overall")
    assert rows[-1]["hard"] is None and rows[-1]["broken_n"] is None  # no resize stands at its budget


def test_hard_and_broken_are_counted_beside_the_smaller_picture(loaded):
    specs = ["none", "random:keep=0.0625", "resize:keep=0.0625"]
    records = run(loaded, specs[1:], n=70)
    found = {r["method"]: r for r in rows_of(records, [me.build(s) for s in specs], CATEGORIES) if r["task"] == "overall"}
    right = {s: {r["id"] for r in records if r["method"] == s and r["correct"]} for s in specs}
    hard, both = right["none"] - right["resize:keep=0.0625"], right["none"] & right["resize:keep=0.0625"]
    own = found["random:keep=0.0625"]
    assert own["hard_n"] == len(hard) > 5 and own["hard"] == round(100 * len(hard & right["random:keep=0.0625"]) / len(hard), 2)
    assert own["broken_n"] == len(both) > 5 and own["broken"] == round(100 * len(both - right["random:keep=0.0625"]) / len(both), 2)
    assert found["none"]["hard_n"] is None and found["resize:keep=0.0625"]["broken"] is None


def test_limit_goes_round_robin_over_the_categories():
    for n in (7, 30, 100):
        tasks = [s.task for s in samples("val", n)]
        counts = [tasks.count(c) for c in CATEGORIES]
        assert len(tasks) == n and max(counts) - min(counts) <= 1


def test_a_larger_limit_contains_the_smaller():
    assert {s.id for s in samples("val", 40)} <= {s.id for s in samples("val", 90)}


def test_batches_do_not_change_an_answer(loaded):
    one = run(loaded, ["random:keep=0.25", "divprune:keep=0.25"], n=14, batch_size=1)
    many = run(loaded, ["random:keep=0.25", "divprune:keep=0.25"], n=14, batch_size=14)
    rounded = {"fingerprint", "confidence"}  # of the configuration, which the batch size is part of; and a sum of logits
    assert [{k: v for k, v in r.items() if k not in rounded} for r in one] == [
        {k: v for k, v in r.items() if k not in rounded} for r in many
    ]
    assert [r["confidence"] for r in one] == pytest.approx([r["confidence"] for r in many], rel=1e-3)


def test_eval_answers_are_those_of_the_wrapped_model(loaded):
    """The harness encodes each picture once for all methods; a user's wrapped generate must answer the same."""
    records = run(loaded, ["divprune:keep=0.125", "pool:keep=0.25", "resize:keep=0.25"], n=14)
    for record in records:
        if record["method"] == runner.NO_IMAGE:
            continue
        sample = next(s for s in samples("val", 14) if s.id == record["id"])
        inputs = loaded.inputs([loaded.prompt(sample.question.text, 1)], [sample.picture(144)])
        with me.compressed(loaded.model, record["method"]):
            out = loaded.model.generate(**inputs, max_new_tokens=runner.MAX_NEW_TOKENS, do_sample=False)
        answer = loaded.processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert first_word(answer) == record["answer"]


@pytest.mark.once
def test_a_kill_loses_no_finished_sample_and_the_end_is_the_same(tmp_path):
    command = [sys.executable, "-m", "mllm_efficient", "eval", "--split", "val", "--limit", "56", "--batch-size", "7"]
    command += ["--method", "random:keep=0.25", "--method", "divprune:keep=0.25", "--device", "cpu", "--json"]
    root = str(Path(me.__file__).parents[1])
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    whole = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    answers = tmp_path / "run" / "samples.jsonl"
    process = subprocess.Popen([*command, "--output-dir", str(tmp_path / "run")], stdout=subprocess.DEVNULL, env=env)
    while not (answers.exists() and len(answers.read_bytes().splitlines()) >= 40):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = [line for line in answers.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    with answers.open("ab") as f:
        f.write(b'{"method": "none", "id": "val/0/obj')  # torn by the kill
    again = subprocess.run([*command, "--output-dir", str(tmp_path / "run")], capture_output=True, text=True, env=env, check=True)
    assert answers.read_bytes().splitlines(keepends=True)[: len(before)] == before
    assert json.loads(again.stdout)["rows"] == json.loads(whole.stdout)["rows"]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["rows"] == json.loads(whole.stdout)["rows"]


def test_a_folder_of_another_run_is_refused_and_left_alone(tmp_path):
    first = Records(tmp_path, {"dtype": "float32"})
    first.add([{"method": "none", "id": "a"}])
    first.close()
    before = (tmp_path / "samples.jsonl").read_bytes()
    with pytest.raises(me.MllmEfficientError, match="'float32' there, 'bfloat16' now"):
        Records(tmp_path, {"dtype": "bfloat16"})
    assert (tmp_path / "samples.jsonl").read_bytes() == before


def test_a_damaged_or_foreign_file_is_refused_and_left_alone(tmp_path):
    line = b'{"method": "none", "id": "a", "fingerprint": "%s"}\n' % Records(None, {}).fingerprint.encode()
    for content in (b"not ours\n", b"[1]\n", b'{"id": "a"}\n', line + b"damaged\n" + line):
        (tmp_path / "samples.jsonl").write_bytes(content)
        (tmp_path / "config.json").write_text("a model's")
        with pytest.raises(me.MllmEfficientError, match="no record of an evaluation"):
            Records(tmp_path, {})
        assert (tmp_path / "samples.jsonl").read_bytes() == content and (tmp_path / "config.json").read_text() == "a model's"


def test_what_failed_is_asked_again(tmp_path):
    for error in ("boom", None):
        records = Records(tmp_path, {})
        assert ("none", "a") not in records
        records.add([{"method": "none", "id": "a", "error": error}])
        records.close()
    again = Records(tmp_path, {})
    assert ("none", "a") in again and again.rows["none", "a"]["error"] is None
    again.close()


def test_a_folder_belongs_to_one_process(tmp_path):
    first = Records(tmp_path, {})
    with pytest.raises(me.MllmEfficientError, match=f"process {os.getpid()} is writing to"):
        Records(tmp_path, {})
    first.close()
    Records(tmp_path, {}).close()


def test_a_sample_that_fails_is_named_counted_and_does_not_take_others_along(capsys, monkeypatch):
    real = runner.prepare

    def breaks(model, method, *, image_keys, **inputs):
        if method.name == "uniform" and "builtin/val/2" in image_keys:
            raise RuntimeError("boom")
        return real(model, method, image_keys=image_keys, **inputs)

    monkeypatch.setattr(runner, "prepare", breaks)
    assert main(["eval", "--split", "val", "--limit", "28", "--method", "uniform:keep=0.5", "--json"]) == 1
    out, err = capsys.readouterr()
    rows = json.loads(out)["rows"]
    there = sum(s.image == 2 for s in samples("val", 28))
    assert there and rows[-1]["failures"] == there and rows[7]["failures"] == 0
    assert "val/2/" in err and "boom" in err


def test_accuracy_and_intervals_equal_a_slow_loop():
    rng = np.random.default_rng(1)
    rows = [{"image": int(i), "task": t, "correct": bool(rng.random() < 0.7)} for i in range(12) for t in "abc" if rng.random() < 0.8]
    images = sorted({r["image"] for r in rows})
    weights = stats.draws(len(images), seed=4)[:50]
    got = stats.accuracy(stats.Hits(rows, images, list("abc")), weights)
    for weight, values in zip(weights, got):
        bag = [r for i, w in zip(images, weight) for r in rows if r["image"] == i for _ in range(int(w))]
        each = [100 * np.mean([r["correct"] for r in bag if r["task"] == t]) for t in "abc"]
        assert values[:3] == pytest.approx(each) and values[3] == pytest.approx(np.mean(each))
        assert values[4] == pytest.approx(100 * np.mean([r["correct"] for r in bag]))


# ---------------------------------------------------------------------------------------------- in region


def inside(sample: Sample, planes) -> set[int]:
    return {int(i) for i in np.flatnonzero(sample.region(planes))}


def test_region_is_the_cells_under_the_questions_boxes():
    for sample in samples("val", 70):
        region, wanted = inside(sample, [Plane(12, 12)]), set()
        for box in sample.question.region:
            for token in range(144):
                top, left = token // 12 * 120, token % 12 * 120
                if box.left < left + 120 and box.right > left and box.top < top + 120 and box.bottom > top:
                    wanted.add(token)
        assert region == wanted


def test_region_of_several_planes_counts_tokens_plane_after_plane():
    """A base view of 4 x 4, the right half of the picture in 2 x 3, and a view of padding alone."""
    question = Question("object", "What colour is the big object?", "red", (Box(0, 0, UNITS // 2, UNITS // 2), Box(1400, 1400, 1500, 1500)))
    planes = [Plane(4, 4), Plane(2, 3, box=(0.0, 0.5, 1.0, 1.0)), Plane(1, 2, box=(1.0, 0.0, 1.5, 1.0))]
    assert inside(Sample("val", 0, question), planes) == {0, 1, 4, 5, 15, 16 + 5}


@pytest.mark.parametrize(
    ("name", "views"),
    [("llava_next", [(4, 4), (8, 8)]), ("internvl", [(3, 3)] * 5), ("cohere2_vision", [(3, 3)] * 5), ("qwen2_vl", [(6, 6)])],
)
def test_region_of_a_family_is_found_in_every_view(name, views):
    """The top left quarter: of the base view or thumbnail its quarter, of tiles put together theirs, of separate tiles the first."""
    question = Question("object", "What colour is the big object?", "red", (Box(0, 0, UNITS // 2, UNITS // 2),))
    evaluation = Run(family(name), [Sample("val", 0, question)], [me.build("none")], floor=False)
    image = me.prepare(evaluation.loaded.model, "none", **evaluation.inputs(evaluation.samples, True)).report.images[0]
    assert [(p.rows, p.columns) for p in image.planes] == views
    tiles: list[set] = [{(r, c) for r in range(3) for c in range(3)}, set(), set(), set(), {(0, 0), (0, 1), (1, 0), (1, 1)}]
    quarters = {
        "llava_next": [{(r, c) for r in range(n // 2) for c in range(n // 2)} for n in (4, 8)],
        "internvl": tiles, "cohere2_vision": tiles,
        "qwen2_vl": [{(r, c) for r in range(3) for c in range(3)}],
    }[name]  # fmt: skip
    wanted, start = set(), 0
    for (rows, columns), cells in zip(views, quarters):
        wanted |= {start + r * columns + c for r, c in cells}
        start += rows * columns
    processor = evaluation.loaded.processor.image_processor
    shares = evaluation._region(evaluation.samples[0], [image], processor)
    assert shares == {"region_share": len(wanted) / image.full, "region_kept": 1.0}
    only = sorted(wanted)[:2] + sorted(set(range(image.full)) - wanted)[:2]
    kept = dataclasses.replace(image, kept=4, indices=torch.tensor(only))
    assert evaluation._region(evaluation.samples[0], [kept], processor) == {"region_share": 0.5, "region_kept": 2 / len(wanted)}


# ---------------------------------------------------------------------------------------------- answers in a model's own words


def ask(category: str, text: str, answer: str) -> Question:
    return Question(category, text, answer, ())


COLOUR = ask("object", "What colour is the big object?", "red")
CYAN = ask("object", "What colour is the big object?", "cyan")
SHAPE = ask("attribute", "What shape is the small red object?", "circle")
COUNT = ask("count", "How many small shapes are there?", "3")
NOTHING = ask("count", "How many small shapes are there?", "0")
LEFT = ask("position", "Is the red ring in the left or right half?", "left")
TOP = ask("position", "Is the red ring in the top or bottom half?", "top")
BELOW = ask("position", "Is the red ring above or below the blue cross?", "below")
THERE = ask("presence", "Is there a red circle?", "yes")
ABSENT = ask("presence", "Is there a red circle?", "no")
DIGIT = ask("reading", "What digit is in the top left corner?", "7")
NO_DIGIT = ask("reading", "What digit is in the top left corner?", "none")
LARGER = ask("comparison", "Is the top left digit larger than the bottom right digit?", "no")
MORE = ask("comparison", "Are there more small shapes on the left or right?", "right")


@pytest.mark.parametrize(("question", "right", "wrong"), [
    (COLOUR, ["red", "Red.", "RED", "The big object is red.", "It's red", "**Red**", "bright red", "red, I think", "Reds",
              "not blue but red", "What colour is the big object? Red."],
     ["blue", "", "coloured", "redder", "blue, not red", "not red", "red or blue", "red, blue, green", "I don't know"]),
    (CYAN, ["cyan", "Turquoise.", "light blue", "a light blue object"], ["blue", "green"]),
    (SHAPE, ["circle", "A circle.", "It is a disc", "The small red object is a circle.", "circles"], ["ring", "square", "cross", "round"]),
    (COUNT, ["3", "three", "Three.", "There are three small shapes.", "3.0", "only three", "There are 3: one red, two blue"],
     ["four", "13", "30", "3 or 4", "two, three", "thirty three", "3.5", "none"]),
    (NOTHING, ["0", "zero", "None.", "no small shapes", "There are no small shapes."], ["one", "10"]),
    (LEFT, ["left", "Left side", "the left half", "On the left-hand side.", "leftmost", "not right, left"],
     ["right", "left or right", "the left or the right half", "not left", "not on the left", "Is the red ring in the left or right half?"]),
    (TOP, ["top", "upper", "Upper half.", "in the uppermost part", "It is higher"], ["bottom", "lower", "left"]),
    (BELOW, ["below", "under", "Underneath the blue cross", "lower", "It is below it"], ["above", "on top of it", "over"]),
    (THERE, ["yes", "Yes, there is a red circle.", "Yeah", "There is a red circle.", "True", "I see a red circle"],
     ["no", "There is no red circle.", "There isn't one", "not sure", "I cannot tell", "maybe", "Yes, no.", "no idea"]),
    (ABSENT, ["no", "No, there is not.", "There is no red circle.", "There isn't a red circle", "I don't see a red circle", "Nope"],
     ["yes", "There is one", "I am not sure", "no idea"]),
    (DIGIT, ["7", "seven", "The digit is 7.", "It's a seven"], ["1", "17", "none", "no digit", "7 or 1"]),
    (NO_DIGIT, ["none", "No digit.", "There is no digit.", "nothing", "There isn't any", "empty"], ["0", "zero", "not sure", "7"]),
    (LARGER, ["no", "No, it is smaller", "smaller", "It is not larger.", "False", "The top left digit is not larger"],
     ["yes", "larger", "It is larger than the other"]),
    (MORE, ["right", "on the right", "There are more on the right side than on the left"], ["left", "neither", "left and right", "equal"]),
])  # fmt: skip
def test_an_answer_is_found_in_what_a_model_says(question, right, wrong):
    for text in right:
        assert judge(question, text) == (question.answer, True), text
    for text in wrong:
        assert judge(question, text)[1] is False, text


def test_every_question_has_its_answer_among_its_choices_and_no_name_means_two():
    for sample in samples("val", 700):
        found = choices(sample.question)
        assert sample.question.answer in found
        names = [n for choice, others in found.items() for n in (choice, *others)]
        assert len(set(names)) == len(names) and all(words(n) == n.split() for n in names)
        assert all(judge(sample.question, choice) == (choice, choice == sample.question.answer) for choice in found)


def test_normalised_text():
    assert normalise("  The Cat, a dog & Two birds! ") == "cat dog 2 birds" and normalise("Twenty-one, don't") == "21 do not"
    assert normalise("1,000 3.50 -2 03") == "1000 3.5 -2 3" and normalise("A.") == "a" and normalise("?!") == "?!"
    assert matches("Two birds.", ["2"]) and matches("B. a red car", ["b"]) and matches("A", ["A"]) and matches("yes", ["no", "Yes"])
    assert not matches("no birds", ["two"]) and not matches("12 birds", ["1"]) and not matches("", ["a"]) and not matches("-3", ["3"])


# ---------------------------------------------------------------------------------------------- other models and families

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def family(name: str) -> Loaded:
    """A tiny random model of a family with its processor, which has got a chat template."""
    processor = copy.deepcopy(FAMILIES[name].processor("left"))
    processor.chat_template = TEMPLATE.replace("IMAGE", FAMILIES[name].image)
    return Loaded(tiny(name), processor, ModelOptions(model=f"tiny {name}"))


@pytest.mark.parametrize("name", FAMILIES)
def test_any_family_answers_the_natural_form_as_its_wrapped_model_does(name):
    other = family(name)
    evaluation = Run(other, samples("val", 3), [me.build(s) for s in ("none", "divprune:keep=0.3", "resize:keep=0.5")], batch_size=2)
    records = evaluation.answer_all()
    assert [r["error"] for r in records] == [None] * 12
    for record in records:
        sample = next(s for s in evaluation.samples if s.id == record["id"])
        pictures = [] if record["method"] == runner.NO_IMAGE else [sample.picture(evaluation.size)]
        inputs = other.inputs([other.prompt(sample.question.text + " Answer with one word.", len(pictures))], pictures)
        with me.compressed(other.model, record["method"] if pictures else "none"):
            out = other.model.generate(**inputs, max_new_tokens=runner.SENTENCE, do_sample=False)
        assert record["text"] == other.processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert (record["answer"], record["correct"]) == judge(sample.question, record["text"])
    rows = rows_of(records, evaluation.methods, CATEGORIES)
    kept = {r["method"]: r["visual_tokens_kept"] for r in rows}
    assert kept["divprune:keep=0.3"] == round(0.3 * kept["none"]) and kept["resize:keep=0.5"] <= 0.5 * kept["none"]
    assert {r["positions"] for r in rows if r["method"] == "divprune:keep=0.3"} == {"keep" if FAMILIES[name].mrope else "renumber"}
    assert next(r for r in rows if r["method"] == "none")["region_kept"] == 1.0


WORDINGS = ("{}", "{}.", "It is {}.", "the answer : {} !", "{} , i think")
SAID = {"3": "three", "left": "on the left side", "top": "upper half", "below": "underneath it", "no": "there is not", "purple": "violet"}


def oracle(questions, says) -> Loaded:
    """A model whose ``generate`` says ``says(question)`` to each of the questions."""
    extra = "it i think side on upper underneath violet ! unknown not three half".split()
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*SPECIAL, *WORDS, *extra]))}
    with mock.patch.object(architecture, "VOCABULARY", vocabulary):
        processor, config = architecture.build_processor(), architecture.build_config(hidden=32, layers=1, vision_layers=1, mlp=32)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    tokenizer = processor.tokenizer
    known = {tuple(tokenizer(s.question.natural, add_special_tokens=False).input_ids): s.question for s in questions}

    def generate(input_ids, max_new_tokens, logits_processor=(), **call):
        answers = []
        for row in input_ids.tolist():
            (question,) = {
                q.text: q for ids, q in known.items() if any(tuple(row[i : i + len(ids)]) == ids for i in range(len(row)))
            }.values()
            answers.append(tokenizer(says(question), add_special_tokens=False).input_ids)
        longest = max(map(len, answers))
        assert longest <= max_new_tokens
        sequences = torch.cat([input_ids, torch.tensor([a + [0] * (longest - len(a)) for a in answers])], 1)
        for length in range(input_ids.shape[1], sequences.shape[1]):
            for watch in logits_processor:
                watch(sequences[:, :length], torch.zeros(len(answers), len(vocabulary)))
        return sequences

    model.generate = generate
    return Loaded(model, processor, ModelOptions(model="oracle"))


def unambiguous() -> list[Sample]:
    """A question is always about images on which it has the same answer."""
    answer: dict[str, str] = {}
    return [s for s in samples("val", 280) if answer.setdefault(s.question.text, s.question.answer) == s.question.answer]


def test_an_oracle_is_all_right_in_several_wordings_and_a_liar_all_wrong():
    questions, turn = unambiguous(), itertools.count()
    assert len(questions) > 100 and {q.task for q in questions} == set(CATEGORIES)

    def right(q):
        way = next(turn)
        return SAID.get(q.answer, q.answer) if way % 6 == 5 else WORDINGS[way % 6].format(q.answer)

    def wrong(q):
        other = next(c for c in choices(q) if c != q.answer)
        return ("{1}", "it is {1} .", "unknown", "{0} or {1}", "{1} , {0}", "")[next(turn) % 6].format(q.answer, other)

    for says, score in ((right, 100.0), (wrong, 0.0)):
        evaluation = Run(oracle(questions, says), questions, [me.build("none"), me.build("uniform:keep=0.25")])
        records = evaluation.answer_all()
        assert not evaluation.builtin and [r for r in records if r["error"]] == []
        rows = rows_of(records, evaluation.methods, CATEGORIES)
        assert {r["score"] for r in rows} == {score}, [r["text"] for r in records if r["correct"] is not (score == 100)][:5]


def test_records_say_which_form_and_rules_and_others_are_refused(tmp_path, monkeypatch):
    first = Run(family("qwen2_vl"), samples("val", 1), [me.build("none")], output_dir=tmp_path)
    first.answer_all()
    config = json.loads((tmp_path / "run.json").read_text())
    assert (config["form"], config["normalisation"], config["image_size"]) == ("natural", "words/1", 672)
    monkeypatch.setattr(runner, "NORMALISATION", "words/2")
    with pytest.raises(me.MllmEfficientError, match=r"normalisation: 'words/1' there, 'words/2' now"):
        Run(family("qwen2_vl"), samples("val", 1), [me.build("none")], output_dir=tmp_path)
    old = {k: v for k, v in config.items() if k not in ("normalisation", "image_size", "max_new_tokens")}
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "samples.jsonl").write_text(json.dumps({"method": "none", "id": "a", "fingerprint": fingerprint_of(old)}) + "\n")
    (tmp_path / "old" / "run.json").write_text(json.dumps(old))
    with pytest.raises(me.MllmEfficientError, match="normalisation: None there"):
        Run(family("qwen2_vl"), samples("val", 1), [me.build("none")], output_dir=tmp_path / "old")


# ---------------------------------------------------------------------------------------------- the second turn


@pytest.fixture
def looks(registered):
    """A toy method that looks at the question: it keeps K tokens in a row, from a place that the words decide. ``seen``: the words."""
    seen: list[torch.Tensor] = []

    @registered("looks")
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Looks(me.Selector):
        needs = frozenset({"text"})

        def select(self, v, k):
            seen.append(v.text)
            start = int(v.text.double().sum().mul(1e4).abs()) % (len(v) - k)
            return torch.arange(start, start + k)

    return seen


def test_every_question_is_once_the_second_of_its_image():
    questions = samples("val", 30)
    pairs = follow_ups(questions)
    alone = [s for s in questions if sum(o.image == s.image for o in questions) == 1]
    assert sorted(p.second.id for p in pairs) == sorted({s.id for s in questions} - {s.id for s in alone})
    assert all(p.first.image == p.second.image and p.first.id != p.second.id for p in pairs) and len({p.id for p in pairs}) == len(pairs)


@pytest.mark.parametrize("spec", ["divprune:keep=0.25", "pool:keep=0.25", "none", "resize:keep=0.5", "looks:keep=0.25"])
@pytest.mark.parametrize("name", ["builtin", "llava_next", "qwen2_5_vl"])
def test_a_second_turn_is_that_of_the_wrapped_model_by_hand(spec, name, loaded, looks):
    """generate, then the whole conversation with past_key_values, one conversation at a time; the harness has them in a batch."""
    other = loaded if name == "builtin" else family(name)
    pairs = follow_ups(samples("val", 35))[:5]
    evaluation = Run(other, samples("val", 35), [me.build("none")], turns=2)
    firsts, seconds, prepared = converse(evaluation, me.build(spec), pairs)
    seconds = evaluation.decoded(seconds)
    assert (
        prepared.report.images[0].kept
        == evaluation.prepared(me.build(spec), [pairs[0].first], evaluation.inputs([pairs[0].first], True)).report.images[0].kept
    )
    how, ends = {"max_new_tokens": evaluation.max_new_tokens, "do_sample": False}, other.model.generation_config.eos_token_id
    for pair, first, second in zip(pairs, firsts, seconds):
        inputs = other.inputs([other.prompt(evaluation.worded(pair.first), 1)], [pair.first.picture(evaluation.size)])
        with me.compressed(other.model, spec):
            one = other.model.generate(**inputs, return_dict_in_generate=True, **how)
            said = one.sequences
            said = said[:, :-1] if int(said[0, -1]) == ends else said  # the template writes the end of an answer
            more = next_turn(other, evaluation.worded(pair.first), evaluation.worded(pair.second), 1)
            ids = torch.cat([said, torch.tensor([more])], 1)
            two = other.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=one.past_key_values, **how)
        assert first == other.processor.decode(one.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert second == other.processor.decode(two[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("spec", ["none", "divprune:keep=0.25", "fastv:layer=1,keep=0.5"])
def test_confidence_is_that_of_the_steps_of_generate(spec, loaded):
    """One by one with all of its steps' logits, in both turns; the harness has them in a batch and holds one step at a time."""
    questions, arm = samples("val", 35), me.build(spec).spec()
    evaluation = Run(loaded, questions, [me.build("none"), *([me.build(spec)] if spec != "none" else [])], turns=2)
    records = {(r["method"], r["id"]): r for r in evaluation.answer_all()}
    how = {"max_new_tokens": evaluation.max_new_tokens, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}

    def slow(out, length):
        ids = out.sequences[0, length:]
        return float(torch.stack([step[0].log_softmax(-1)[i] for step, i in zip(out.logits, ids, strict=True)]).mean().exp())

    for pair in follow_ups(questions)[:4]:
        inputs = loaded.inputs([loaded.prompt(pair.first.question.text, 1)], [pair.first.picture(evaluation.size)])
        with me.compressed(loaded.model, spec):
            one = loaded.model.generate(**inputs, **how)
            more = next_turn(loaded, pair.first.question.text, pair.second.question.text, 1)
            said = one.sequences[:, :-1] if int(one.sequences[0, -1]) == loaded.model.generation_config.eos_token_id else one.sequences
            ids = torch.cat([said, torch.tensor([more])], 1)
            two = loaded.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=one.past_key_values, **how)
        assert records[arm, pair.first.id]["confidence"] == pytest.approx(slow(one, inputs["input_ids"].shape[1]), abs=1e-5)
        assert records[arm, pair.id]["confidence"] == pytest.approx(slow(two, ids.shape[1]), abs=1e-5)


def test_the_second_turn_sees_the_tokens_that_were_chosen_in_the_first(loaded, looks, registered):
    """A fresh call on the whole conversation that keeps exactly those tokens answers the same; those of its own words do not."""
    chosen: list[int] = []

    @registered("these")
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class These(me.Selector):
        def select(self, v, k):
            return torch.tensor(chosen)

    questions, method = samples("val", 70), me.build("looks:tokens=18")
    pairs = follow_ups(questions)
    evaluation, same, differ = Run(loaded, questions, [me.build("none"), method], turns=2), 0, 0
    records = {(r["method"], r["id"]): r for r in evaluation.answer_all() if r.get("turns") == 2}
    for pair in pairs[:25]:
        looks.clear()
        firsts, ids, prepared = converse(evaluation, method, [pair])
        (answer,) = evaluation.decoded(ids)
        assert len(looks) == 1  # nothing is chosen in the second turn
        assert records[method.spec(), pair.id]["answer"] == first_word(answer)
        assert records[method.spec(), pair.id]["first_answer"] == firsts[0].strip()
        alone = [
            evaluation.prepared(method, [s], evaluation.inputs([s], True)).report.images[0].indices.tolist()
            for s in (pair.first, pair.second)
        ]
        assert prepared.report.images[0].indices.tolist() == alone[0]
        text = f"{loaded.prompt(pair.first.question.text, 1)} {firsts[0]} USER: {pair.second.question.text} ASSISTANT:"
        inputs = loaded.inputs([text], [pair.first.picture(144)])
        answers = []
        for places in alone:
            chosen[:] = places
            call = me.prepare(loaded.model, "these:tokens=18", **inputs).model_kwargs
            out = loaded.model.generate(**call, max_new_tokens=runner.MAX_NEW_TOKENS, do_sample=False)
            answers.append(first_word(loaded.processor.decode(out[0, call["input_ids"].shape[1] :], skip_special_tokens=True)))
        same += answers[0] == first_word(answer)
        differ += answers[1] != first_word(answer)
    assert same == 25 and differ > 0


def test_a_method_that_does_not_look_keeps_the_same_tokens_in_both_turns(loaded):
    records = Run(loaded, samples("val", 14), [me.build("none"), me.build("random:keep=0.25")], turns=2).answer_all()
    kept = {(r.get("turns", 1), r["method"], r["image"], r["task"]): (r.get("region_share"), r.get("visual_tokens_kept")) for r in records}
    for (turns, *rest), value in kept.items():
        assert turns == 1 or kept[1, *rest] == value


def test_second_turns_have_rows_and_a_column_of_their_own(capsys, tmp_path):
    argv = ["eval", "--split", "val", "--limit", "28", "--method", "divprune:keep=0.25", "--output-dir", str(tmp_path / "run")]
    assert main([*argv, "--json"]) == 0
    once = json.loads(capsys.readouterr().out)
    before = (tmp_path / "run" / "samples.jsonl").read_bytes()
    assert main([*argv, "--turns", "2", "--json"]) == 0  # goes on in the folder: first turns are not asked again
    twice = json.loads(capsys.readouterr().out)
    assert (tmp_path / "run" / "samples.jsonl").read_bytes().startswith(before)
    assert [r for r in twice["rows"] if r["turns"] == 1] == once["rows"] and {r["turns"] for r in once["rows"]} == {1}
    second = [r for r in twice["rows"] if r["turns"] == 2]
    assert second[0]["method"] == "none" and twice["meta"]["second_turns"] == second[-1]["n"] == len(follow_ups(samples("val", 28)))
    for row in second:
        assert row["turn_difference"] == pytest.approx(row["score"] - row["first_turn"], abs=0.011)
        assert row["difference"] == pytest.approx(row["score"] - row["baseline"], abs=0.011)
    header, lines = text_table(twice["rows"], CATEGORIES)
    assert (
        header[-4:] == ["2nd turn", "vs none in it [95%]", "ECE in it", "AURC in it"] and [len(line) for line in lines] == [len(header)] * 3
    )
    assert lines[2][-4] == f"{second[-1]['score']:.1f}" and len(text_table(once["rows"], CATEGORIES)[0]) == len(header) - 4
    low, high = second[-1]["ece_interval"]
    assert low <= second[-1]["ece"] <= high and lines[2][-2] == f"{second[-1]['ece']:.1f}"
    assert main(["eval", "--turns", "3"]) == 2


def test_a_chat_template_that_holds_one_question_is_refused(loaded):
    other = family("llava_next")
    other.processor.chat_template = "{{ messages[0]['content'][-1]['text'] }}"
    with pytest.raises(me.MllmEfficientError, match="two questions"):
        next_turn(other, "what", "how", 1)
