"""A user's own requests, and answers as people write them."""

from __future__ import annotations

import json

import pytest
import torch

import mllm_efficient as me
from mllm_efficient.cli import main
from mllm_efficient.eval import agreement
from mllm_efficient.eval.agreement import Agreement, agreement_rows, first_difference, worst
from mllm_efficient.eval.answers import holds, label, normalised
from mllm_efficient.eval.builtin.suite import samples
from mllm_efficient.eval.requests import Request, read_requests
from mllm_efficient.eval.runner import Run
from mllm_efficient.models import ModelOptions, load

from .families import FAMILIES, _processor, tiny


@pytest.fixture(scope="module")
def loaded():
    return load(ModelOptions(device="cpu"))


@pytest.fixture
def data(tmp_path):
    """Ten questions of the benchmark as a user's file, five of them with answers; a text-only one; one with two images."""
    lines = []
    for i, sample in enumerate(samples("val", 10)):
        sample.picture(144).save(tmp_path / f"{i}.png")
        line = {"images": [f"{i}.png"], "prompt": sample.question.text}
        lines.append({**line, "answer": sample.question.answer} if i % 2 else line)
    lines += [{"id": "words", "prompt": "what colour is it ?"}]
    content = [
        {"type": "image"},
        {"type": "text", "text": "what colour"},
        {"type": "image", "path": "x"},
        {"type": "text", "text": "is it ?"},
    ]
    lines += [{"id": "two", "images": ["1.png", "2.png"], "messages": [{"role": "user", "content": content}]}]
    path = tmp_path / "requests.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return path


def run(loaded, data, *specs, **how):
    return Agreement(loaded, read_requests(data), [me.build(s) for s in ("none", *specs)], max_new_tokens=4, **how)


def test_the_answers_are_those_of_the_wrapped_model_and_kl_is_that_of_its_logits(loaded, data):
    spec, requests = "divprune:keep=0.125", read_requests(data)
    records = {(r["method"], r["id"]): r for r in run(loaded, data, spec).answer_all()}
    model = loaded.model
    for request in requests:
        images = [agreement.pictures(request)[i] for i in range(len(request.images))]
        inputs = loaded.inputs([request.text(loaded)], images)
        n = inputs["input_ids"].shape[1]
        plain = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, n:]
        with me.compressed(model, spec):
            out = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, n:]
        base, row = records["none", request.id], records[spec, request.id]
        assert base["answer"] == loaded.processor.decode(plain, skip_special_tokens=True).strip()
        assert row["answer"] == loaded.processor.decode(out, skip_special_tokens=True).strip()
        assert row["exact_agreement"] == torch.equal(plain, out)
        ids = torch.cat([inputs["input_ids"][0], plain])[None]
        whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            stock = model(**whole).logits[0, -len(plain) - 1 : -1].log_softmax(-1)
            with me.compressed(model, spec):
                shorter = model(**whole).logits[0, -len(plain) - 1 : -1].log_softmax(-1)
        expected = (stock.exp() * (stock - shorter)).sum(-1).mean()
        assert row["kl"] == pytest.approx(max(float(expected), 0), abs=1e-5)
    assert records[spec, "words"]["kl"] == pytest.approx(0, abs=1e-6) and records[spec, "words"]["exact_agreement"]


def test_keeping_everything_agrees_in_everything(loaded, data):
    records = run(loaded, data, "divprune:keep=1").answer_all()
    rows = agreement_rows(records, [me.build("none"), me.build("divprune:keep=1")])
    assert {r["score"] for r in rows if r["metric"].endswith("agreement")} == {100.0}
    assert all(r["score"] < 1e-6 for r in rows if r["metric"] == "kl") and worst(records) == []


def test_accuracy_is_over_the_requests_that_have_an_answer(loaded, data):
    records = run(loaded, data, "random:keep=0.0625").answer_all()
    rows = agreement_rows(records, [me.build("none"), me.build("random:keep=0.0625")])
    accuracy = [r for r in rows if r["metric"] == "accuracy"]
    assert [r["n"] for r in accuracy] == [5, 5] and accuracy[0]["score"] == 100.0
    assert {r["task"] for r in rows} == {"requests", "text-only"}
    assert worst(records)[0]["kl"] == max(r["kl"] for r in records)


def test_a_failing_method_fails_alone_and_counts_as_disagreement(loaded, data, registered):
    import dataclasses

    @registered("breaks_on_data")
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Breaks(me.Selector):
        def score(self, v):
            raise RuntimeError("on purpose")

    records = run(loaded, data, "breaks_on_data:keep=0.5").answer_all()
    rows = agreement_rows(records, [me.build("none"), me.build("breaks_on_data:keep=0.5")])
    mine = next(r for r in rows if r["method"] == "breaks_on_data:keep=0.5" and r["metric"] == "exact_agreement")
    assert (mine["score"], mine["failures"]) == (0.0, 11)
    right = next(r for r in rows if r["method"] == "breaks_on_data:keep=0.5" and r["metric"] == "accuracy")
    assert (right["score"], right["baseline"]) == (0.0, 100.0)
    assert "on purpose" in next(r["error"] for r in records if r["error"])


def test_an_interrupted_run_goes_on_and_ends_with_the_same_rows(loaded, data, tmp_path):
    whole = run(loaded, data, "random:keep=0.125").answer_all()
    part = run(loaded, data, "random:keep=0.125", output_dir=tmp_path / "out")
    for request in part.requests[:5]:
        part._one(request)
    part.records.close()
    with (tmp_path / "out" / "samples.jsonl").open("ab") as file:
        file.write(b'{"method": "none", "id"')  # torn by a kill
    resumed = run(loaded, data, "random:keep=0.125", output_dir=tmp_path / "out").answer_all()
    assert [{k: v for k, v in r.items() if k != "fingerprint"} for r in resumed] == [
        {k: v for k, v in r.items() if k != "fingerprint"} for r in whole
    ]


def test_first_difference():
    a = torch.tensor
    assert first_difference(a([1, 2]), a([1, 2])) is None and first_difference(a([1, 2]), a([1, 3])) == 1
    assert first_difference(a([1]), a([1, 2])) == 1 and first_difference(a([5]), a([1, 2])) == 0


@pytest.mark.parametrize(("line", "says"), [
    ("{", "not JSON"), ("[1]", "not a JSON object"), ('{"prompt": "x", "image": "a"}', "unknown key 'image'"),
    ('{"images": ["0.png"]}', "give prompt or messages"), ('{"prompt": "x", "messages": []}', "give prompt or messages"),
    ('{"prompt": " "}', "prompt must be a text"), ('{"prompt": "x", "images": "0.png"}', "list of paths"),
    ('{"prompt": "x", "images": ["absent.png"]}', "no image file"), ('{"prompt": "x", "id": "words"}', "stands twice"),
    ('{"images": ["0.png"], "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}]}', "2 image(s)"),
    ('{"prompt": "x", "answer": "?"}', "no word or number"), ('{"messages": [{"text": "x"}]}', "role and content"),
    ('{"prompt": "x", "answer": ["a"]}', "answer must be a text"),
])  # fmt: skip
def test_a_bad_line_is_one_line_that_names_it(capsys, data, line, says):
    with data.open("a") as file:
        file.write(line + "\n")
    assert main(["eval", "--data", str(data)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.strip().splitlines()) == 1 and says in err and "requests.jsonl line 14" in err


def test_options_without_effect_on_data_are_refused(capsys, data, tmp_path):
    for option in (("--suite", "builtin"), ("--split", "val"), ("--batch-size", "4"), ("--against", "none")):
        assert main(["eval", "--data", str(data), *option]) == 2
        assert f"{option[0]} has no effect with --data" in capsys.readouterr().err
    assert main(["eval", "--max-new-tokens", "3"]) == 2
    assert main(["eval", "--data", str(tmp_path / "absent.jsonl")]) == 2
    (tmp_path / "empty.jsonl").write_text("\n")
    assert main(["eval", "--data", str(tmp_path / "empty.jsonl")]) == 2


def test_the_command_prints_a_table_and_json_and_keeps_results(capsys, data, tmp_path):
    argv = ["eval", "--data", str(data), "--method", "random:keep=0.0625", "--limit", "6", "--max-new-tokens", "4"]
    assert main([*argv, "--output-dir", str(tmp_path / "out")]) == 0
    assert "same answer" in capsys.readouterr().out
    kept = json.loads((tmp_path / "out" / "results.json").read_text())
    assert main([*argv, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["rows"] == kept["rows"] and printed["meta"]["requests"] == 6 and printed["rows"][0]["method"] == "none"


def test_requests_run_on_a_family_with_its_own_processor(tmp_path):
    """LLaVA-NeXT, whose pictures differ in size."""
    from mllm_efficient.models import Loaded

    assert "llava_next" in FAMILIES
    other = Loaded(tiny("llava_next"), _processor("llava_next", "left"), ModelOptions(model=str(tmp_path)))
    images = []
    for i, size in enumerate([(40, 20), (16, 48)]):
        samples("val", 2)[i].picture(144).resize(size).save(tmp_path / f"{i}.png")
        images.append(tmp_path / f"{i}.png")
    requests = [Request("a", (images[0],), "I what"), Request("b", tuple(images), "I I what")]
    methods = [me.build("none"), me.build("divprune:keep=0.3"), me.build("resize:keep=0.5")]
    records = Agreement(other, requests, methods, max_new_tokens=3).answer_all()
    assert all(r["error"] is None for r in records), [r["error"] for r in records]
    kept = {r["method"]: r["visual_tokens_kept"] for r in records if r["id"] == "b"}
    assert kept["divprune:keep=0.3"] < kept["none"] and kept["resize:keep=0.5"] < kept["none"]


@pytest.mark.parametrize(("text", "answer", "right"), [
    ("Red.", "red", True), ("The big object is red", "red", True), ("It is a circle, I think.", "circle", True),
    ("There are three small shapes.", "3", True), ("3", "3", True), ("Four", "3", False), ("There is no digit.", "none", True),
    ("In the upper half", "top", True), ("Yes, there is a red circle.", "yes", True), ("No.", "yes", False), ("gray", "grey", True),
    ("On the left side", "left", True), ("", "red", False), ("blue, not red", "red", False), ("The digit is 7.", "7", True),
])  # fmt: skip
def test_answers_in_sentences_are_read_as_people_would(text, answer, right):
    assert (label(text, answer) == answer) == right


def test_normalised_text():
    assert normalised("  The Cat, a dog & Two birds! ") == "cat dog 2 birds"
    assert holds("Two birds.", "two") and not holds("no birds", "two") and not holds("x", "")
    assert holds("A", "A") and holds("a.", "A") and not holds("The", "A") and not holds("5", "-5") and holds("-5", "-5")
    assert normalised("x-ray, 3-4") == "x ray 3 4"


class Oracle:
    """Stands for a model that answers in sentences: rightly, or always the same."""

    def __init__(self, loaded, sentences):
        self.loaded, self.sentences = loaded, iter(sentences)

    def batch_decode(self, ids, **how):
        return [next(self.sentences) for _ in ids]


@pytest.mark.parametrize("right", [True, False])
def test_an_oracle_that_answers_in_sentences_is_scored_as_such(loaded, monkeypatch, right):
    questions = samples("val", 28)
    ways = ("{}", "{}.", "It is {}.", "the answer: {}", "{} , I think")
    said = [ways[i % 5].format(q.question.answer if right else "unknown") for i, q in enumerate(questions)]
    evaluation = Run(loaded, questions, [me.build("none")], floor=False)
    evaluation.builtin = False
    monkeypatch.setattr(type(loaded.processor), "batch_decode", Oracle(loaded, said).batch_decode)
    records = evaluation.answer_all()
    assert {r["correct"] for r in records} == {right}
