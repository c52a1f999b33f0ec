"""Evaluations on the harder benchmark: prompts of several pictures and of a video, both turns, eval and sweep."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

import mllm_efficient as me
from mllm_efficient.cli import main
from mllm_efficient.eval import runner
from mllm_efficient.eval.answers import judge
from mllm_efficient.eval.builtin import honesty
from mllm_efficient.eval.builtin.hard import CATEGORIES, make_item, vocabulary
from mllm_efficient.eval.builtin.hard.suite import HardSample
from mllm_efficient.eval.builtin.suites import BUILTIN, HARD, embedded_suite
from mllm_efficient.eval.runner import Run
from mllm_efficient.eval.table import rows_of
from mllm_efficient.eval.turns import converse, follow_ups, next_turn
from mllm_efficient.loading.models import Loaded, ModelOptions, load

from ..families import FAMILIES, tiny

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE {% elif part['type'] == 'video' %}VIDEO {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
)
WITH_VIDEO, TILED = "qwen2_5_vl", "llava_next"


def family(name: str) -> Loaded:
    """A tiny random model of a family with its processor, which has got a chat template."""
    processor = copy.deepcopy(FAMILIES[name].processor("left"))
    processor.chat_template = TEMPLATE.replace("IMAGE", FAMILIES[name].image).replace("VIDEO", FAMILIES[name].video or "")
    return Loaded(tiny(name), processor, ModelOptions(model=f"tiny {name}"))


def few(video: bool):
    """Up to two questions about one item each of a document, of two and three images, of screens and perhaps of a video."""
    out = []
    for category, pictures in (("document", 1), ("images", 2), ("images", 3), ("screens", 3), *([("video", 8)] if video else [])):
        found = [make_item("val", index, category) for index in range(60)]
        # the video processor of the tiny models takes frames whose sides fit its patches of 8
        found = [i for i in found if len(i.pictures) == pictures and i.pictures[0].height % 8 == i.pictures[0].width % 8 == 0]
        item = max(found, key=lambda i: min(2, len(i.benchmark)))
        out += [HardSample(item, question) for question in item.benchmark[:2]]
    return out


def by_hand(other: Loaded, sample) -> dict:
    """The model's own inputs of a question."""
    counts = (0, 1) if sample.video else (len(sample.item.pictures), 0)
    prompt, shown = other.prompt(sample.question.text + " Answer with one word.", *counts), sample.pictures()
    return other.inputs([prompt], [] if sample.video else shown, [shown] if sample.video else None)


@pytest.mark.parametrize("name", [WITH_VIDEO, TILED])
def test_a_prompt_of_several_pictures_or_a_video_is_answered_as_by_the_wrapped_model(name):
    other, asked = family(name), few(name == WITH_VIDEO)
    evaluation = Run(other, asked, [me.build("none"), me.build("divprune:keep=0.3")], batch_size=3, suite=HARD)
    records = evaluation.answer_all()
    assert [r["error"] for r in records] == [None] * 3 * len(asked) and evaluation.config["suite"] == "builtin-hard"
    for record in records:
        sample = next(s for s in asked if s.id == record["id"])
        if record["method"] == runner.NO_IMAGE:
            inputs = other.inputs([other.prompt(sample.question.text + " Answer with one word.", 0)])
        else:
            inputs = by_hand(other, sample)
        with me.compressed(other.model, "none" if record["method"] == runner.NO_IMAGE else record["method"]):
            out = other.model.generate(**inputs, max_new_tokens=runner.SENTENCE, do_sample=False)
            report = me.last_report(other.model)
        assert record["text"] == other.processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert (record["answer"], record["correct"]) == judge(sample.question, record["text"])
        if record["method"] != runner.NO_IMAGE:
            assert record["visual_tokens_kept"] == report.visual_tokens_kept and len(report.images) == len(sample.keys)
    assert len(rows_of(records, evaluation.methods, CATEGORIES)) == 2 * (1 + len({s.task for s in asked}))


def test_the_region_of_a_prompt_is_that_of_all_its_pictures():
    other, asked = family(WITH_VIDEO), few(video=True)
    evaluation = Run(other, asked, [me.build("none")], floor=False, suite=HARD)
    for record, sample in zip(evaluation.answer_all(), evaluation.asked):
        images = me.prepare(other.model, "none", **by_hand(other, sample)).report.images
        cells = np.concatenate([sample.region(image.planes, i) for i, image in enumerate(images)])
        assert record["region_kept"] == 1.0 and record["region_share"] == cells.mean() and 0 < cells.mean() < 1


def test_a_second_turn_about_several_pictures_or_a_video_is_that_of_the_wrapped_model():
    other, spec = family(WITH_VIDEO), "divprune:keep=0.3"
    evaluation = Run(other, few(video=True), [me.build("none")], turns=2, suite=HARD)
    how = {"max_new_tokens": evaluation.max_new_tokens, "do_sample": False}
    assert len(evaluation.groups) == 4  # of images and of a video, alone and as second turns
    for group in evaluation.groups[2:]:
        assert {p.id for p in group} == {p.id for p in follow_ups([p.second for p in group])}
        firsts, seconds, _ = converse(evaluation, me.build(spec), group)
        for pair, first, second in zip(group, firsts, evaluation.decoded(seconds)):
            inputs, counts = by_hand(other, pair.first), {"video": 1} if pair.first.video else {"image": len(pair.first.keys)}
            with me.compressed(other.model, spec):
                one = other.model.generate(**inputs, return_dict_in_generate=True, **how)
                more = next_turn(other, evaluation.worded(pair.first), evaluation.worded(pair.second), **counts)
                ids = torch.cat([one.sequences, torch.tensor([more])], 1)
                two = other.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=one.past_key_values, **how)
            assert first == other.processor.decode(one.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            assert second == other.processor.decode(two[0, ids.shape[1] :], skip_special_tokens=True)
    records = evaluation.answer_all()
    rows = rows_of(records, evaluation.methods, CATEGORIES)
    assert [r["error"] for r in records] == [None] * len(records)
    alone = {(r["method"], r["id"]): r["correct"] for r in records}
    for row in (r for r in rows if r["turns"] == 2 and r["task"] != "overall"):
        own = [p for p in evaluation.asked[len(evaluation.samples) :] if p.task == row["task"]]
        assert row["first_turn"] == pytest.approx(100 * np.mean([alone["none", p.second.id] for p in own]), abs=0.006)


# ---------------------------------------------------------------------------------------------- commands


def test_eval_asks_the_categories_that_a_model_takes(capsys):
    argv = ["eval", "--suite", "builtin-hard", "--split", "val", "--limit", "12", "--method", "uniform:keep=0.25"]
    assert main([*argv, "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert [r["task"] for r in result["rows"][:6]] == [*CATEGORIES[:-1], "overall"]
    assert result["meta"]["suite"] == "builtin-hard" and result["meta"]["questions"] == 12
    assert result["meta"]["blind_floor"].keys() == set(CATEGORIES[:-1])
    assert "without the category video: this model's processor takes no videos" in captured.err
    assert "this model's vocabulary lacks words of builtin-hard" in captured.err
    assert main([*argv, "--categories", "images, chart"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "method tokens chart images macro" in out and "Answers learnt without images score: chart " in out
    assert main(["eval", "--limit", "4", "--categories", "count,object", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {r["task"]: r["n"] for r in rows} == {"object": 2, "count": 2, "overall": 4}


def test_sweep_takes_the_suite(tmp_path, capsys):
    argv = ["sweep", "--suite", "builtin-hard", "--categories", "chart", "--split", "val", "--limit", "6", "--no-bench"]
    assert main([*argv, "--method", "uniform", "--keep", "0.25", "--output-dir", str(tmp_path)]) == 0
    assert "chart" in capsys.readouterr().out and (tmp_path / "report.html").stat().st_size > 0
    assert json.loads((tmp_path / "run.json").read_text())["suite"] == "builtin-hard"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--suite", "builtin-hard", "--categories", "charts"], "--categories 'charts': builtin-hard has document, chart, scene"),
        (["--suite", "builtin-hard", "--categories", "video"], "this model's processor takes no videos"),
        (["--categories", ","], "builtin has object, attribute"),
        (["--data", "x.jsonl", "--categories", "chart"], "--categories has no effect with --data"),
        (["--tasks", "gqa", "--categories", "chart"], "--categories has no effect with --tasks"),
    ],
)
def test_what_categories_cannot_do_is_said(argv, message, capsys):
    assert main(["eval", *argv]) == 2
    assert message in capsys.readouterr().err


def test_a_model_is_asked_the_short_form_only_by_what_it_was_trained_for():
    own, other = load(ModelOptions(device="cpu")).processor.tokenizer, family(WITH_VIDEO).processor.tokenizer
    assert BUILTIN.spoken_by(own) and not HARD.spoken_by(own) and not BUILTIN.spoken_by(other)
    assert BUILTIN.note(own) is None and embedded_suite(None) is BUILTIN and embedded_suite("builtin-hard") is HARD
    missing = [w for w in vocabulary() if w not in own.get_vocab()]
    assert f"{len(missing) - 3} more" in str(HARD.note(own)) and sorted(missing)[0] in str(HARD.note(own))


def test_honesty_asks_about_other_images_and_fails_a_model_that_does_not_need_its_own(capsys, monkeypatch):
    assert honesty.main(["builtin", "60"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines[1:]] == list(CATEGORIES[:-1]) and lines[0] == [
        "category",
        "own",
        "images",
        "others",
        "floor",
        "upper",
    ]
    asked = []

    def told(evaluation):
        """The answers of a model that knows what is right without looking."""
        asked.append([s.shown for s in evaluation.samples])
        return [{**evaluation.head("none", s), "correct": True, "error": None} for s in evaluation.samples]

    monkeypatch.setattr(Run, "answer_all", told)
    assert honesty.main(["builtin", "100"]) == 1
    own, others = asked
    assert len(own) == 100 and all(a != b and a.category == b.category for a, b in zip(own, others))
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]] == ["ABOVE"] * 5
    with pytest.raises(me.MllmEfficientError, match="usage"):
        honesty.main(["builtin", "few"])
