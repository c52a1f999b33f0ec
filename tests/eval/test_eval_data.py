"""A user's own requests: what is read, what is asked, what is compared, and what is said of lines that are wrong."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import mllm_efficient as me
from mllm_efficient import stats
from mllm_efficient.cli import main
from mllm_efficient.eval import agreement
from mllm_efficient.eval.agreement import Agreement, cut, divergence, first_difference
from mllm_efficient.eval.agreement_rows import agreement_rows, agreement_table, by_length, length_table, worst, worst_table
from mllm_efficient.eval.builtin.suite import samples
from mllm_efficient.eval.requests import prompts_of, read_requests
from mllm_efficient.loading.models import Loaded, ModelOptions, load

from ..families import FAMILIES, tiny

NEW = 6
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


@pytest.fixture(scope="module")
def loaded():
    return load(ModelOptions(device="cpu"))


@pytest.fixture
def data(tmp_path):
    """Ten questions of the benchmark, five with answers; one without an image; one with two images, in messages."""
    lines = []
    for i, sample in enumerate(samples("val", 10)):
        sample.picture(144).save(tmp_path / f"{i}.png")
        line = {"images": [f"{i}.png"], "prompt": sample.question.text}
        lines.append({**line, "answer": sample.question.answer} if i % 2 else line)
    lines.append({"id": "words", "prompt": "what colour is it ?", "answer": ["red", "a ring"]})
    content = [{"type": "image"}, {"type": "text", "text": "what colour is the big object in"}, {"type": "image"}]
    talk = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "what shape is it ?"},
    ]
    lines.append({"id": "two", "images": ["1.png", "2.png"], "messages": talk})
    path = tmp_path / "requests.jsonl"
    path.write_text("\ufeff" + "\n".join(map(json.dumps, lines)) + "\r\n\n", encoding="utf-8")
    return path


def run(loaded, data, *specs, limit=None, **how):
    requests = read_requests(data, limit)
    methods = [me.build(s) for s in ("none", *specs)]
    prompts = prompts_of(requests, loaded, data)
    return Agreement(loaded, requests, methods, prompts=prompts, data=data, **{"max_new_tokens": NEW, "batch_size": 4, **how})


def plain(records):
    return [{k: v for k, v in r.items() if k != "fingerprint"} for r in records]


def step_by_step(loaded, spec, inputs, tokens):
    """Log probabilities (T, vocabulary) of the wrapped model that reads an answer token by token."""
    with torch.no_grad(), me.compressed(loaded.model, spec):
        out = loaded.model(**inputs, use_cache=True)
        rows = [out.logits[0, -1]]
        for token in tokens[:-1]:
            out = loaded.model(input_ids=torch.tensor([[token]]), past_key_values=out.past_key_values)
            rows.append(out.logits[0, -1])
    return torch.stack(rows).double().log_softmax(-1)


# ------------------------------------------------------------------------------------------------- what is compared


@pytest.mark.parametrize("spec", ["divprune:keep=0.125", "pool:keep=0.25", "resize:keep=0.5", "uniform:keep=0.25,positions=keep"])
def test_answers_are_those_of_the_wrapped_model_and_kl_is_that_of_its_steps(loaded, data, spec):
    evaluation = run(loaded, data, spec)
    records = {(r["method"], r["id"]): r for r in evaluation.answer_all()}
    assert [r["error"] for r in records.values()] == [None] * 24
    for request, prompt in zip(evaluation.samples, evaluation.prompts):
        inputs = loaded.inputs([prompt], request.pictures())
        said = {}
        for method in ("none", spec):
            with me.compressed(loaded.model, method):
                out = loaded.model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            said[method] = cut(out, {2})
            assert records[method, request.id]["token_ids"] == said[method].tolist()
            assert records[method, request.id]["answer"] == loaded.processor.decode(out, skip_special_tokens=True).strip()
        row = records[spec, request.id]
        assert row["baseline_answer"] == records["none", request.id]["answer"]
        assert row["exact_match"] == (row["answer"] == row["baseline_answer"])
        assert row["first_divergence"] == first_difference(said[spec], said["none"])
        p, q = (step_by_step(loaded, method, inputs, said["none"].tolist()) for method in ("none", spec))
        assert row["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3, abs=1e-5)
        assert row["visual_tokens_full"] == 144 * len(request.images)
    assert records[spec, "words"]["kl"] == 0 and records[spec, "words"]["exact_match"]


@pytest.mark.parametrize(
    ("name", "method"), [(f.name, m) for f in FAMILIES.values() for m in ("divprune:keep=0.3", *(["fastv"] if f.inside else []))]
)
def test_any_family_with_its_own_processor_and_template(name, method, tmp_path):
    """One image, two images of different sizes, and none; the second one's tokens and KL against the wrapped model by hand."""
    processor = copy.deepcopy(FAMILIES[name].processor("left"))
    processor.chat_template = TEMPLATE.replace("IMAGE", FAMILIES[name].image)
    other = Loaded(tiny(name), processor, ModelOptions(model=f"tiny {name}"))
    for i, size in enumerate([(40, 20), (20, 60), (70, 50)]):
        samples("val", 3)[i].picture(144).resize(size).save(tmp_path / f"{i}.png")
    lines = [{"images": ["0.png"], "prompt": "what is red ?"}, {"prompt": "what is a ring ?"}]
    lines.append({"id": "two", "images": ["1.png", "2.png"], "messages": [{"role": "user", "content": "are the rings green ?"}]})
    (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, lines)))
    spec = me.build(f"fastv:ratio=0.3,layer={2 if 'qwen' in name else 1}").spec() if method == "fastv" else method
    evaluation = run(other, tmp_path / "requests.jsonl", spec, "resize:keep=0.5")
    records = {(r["method"], r["id"]): r for r in evaluation.answer_all()}
    assert [r["error"] for r in records.values()] == [None] * 9
    request, prompt = evaluation.samples[2], evaluation.prompts[2]
    pictures = request.pictures()
    inputs = other.inputs([prompt], [pictures] if name == "llava_onevision" else pictures)
    tokens = records["none", "two"]["token_ids"]
    for method in ("none", spec):
        with me.compressed(other.model, method):
            out = other.model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        assert records[method, "two"]["token_ids"] == out[0, inputs["input_ids"].shape[1] :].tolist()
    ids = torch.cat([inputs["input_ids"], torch.tensor([tokens[:-1]])], 1)
    whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for kind in {"mm_token_type_ids", "token_type_ids"} & inputs.keys():
        whole[kind] = torch.nn.functional.pad(inputs[kind], (0, len(tokens) - 1))
    with torch.no_grad():
        p = other.model(**whole).logits[0, -len(tokens) :].double().log_softmax(-1)
        labels = torch.full_like(ids, -100)
        labels[:, inputs["input_ids"].shape[1] :] = 5  # which is where the question ends
        with me.compressed(other.model, spec):
            q = other.model(**whole, labels=labels).logits[0, -len(tokens) :].double().log_softmax(-1)
    assert records[spec, "two"]["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3, abs=1e-5)
    assert records[spec, "two"]["visual_tokens_kept"] < records["none", "two"]["visual_tokens_kept"]


def test_a_method_that_looks_at_the_text_never_sees_the_answer_it_is_held_against(loaded, data, registered):
    seen = []

    @registered("reads")
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Reads(me.Selector):
        needs = frozenset({"text"})

        def select(self, v, k):
            seen.append(len(v.text))
            return torch.arange(k)

    evaluation = run(loaded, data, "reads:keep=0.25")
    evaluation.answer_all()
    asked = [p for p in evaluation.prompts if "<image>" in p]
    assert seen and set(seen) <= {len(loaded.processor.tokenizer(p.replace("<image>", ""))["input_ids"]) for p in asked}


def test_keeping_everything_agrees_in_everything_to_the_bit(loaded, data):
    methods = [me.build("none"), me.build("divprune:keep=1")]
    rows = agreement_rows(run(loaded, data, "divprune:keep=1").answer_all(), methods)
    assert {r["score"] for r in rows if r["unit"] == "percent" and "accuracy" not in r["task"]} == {100.0}
    assert [r["score"] for r in rows if r["metric"] == "kl"] == [0.0, 0.0]
    assert [r["score"] for r in rows if r["metric"] == "first_divergence"] == [None, None]
    assert worst(run(loaded, data, "divprune:keep=1").answer_all()) == []


def test_batches_do_not_change_an_answer(loaded, data):
    one, many = (run(loaded, data, "random:keep=0.125", batch_size=n).answer_all() for n in (1, 12))
    own_name = {"kl": None, "fingerprint": None}  # of the configuration, which the batch size is part of
    assert [r | own_name for r in one] == [r | own_name for r in many]
    assert [r["kl"] for r in one] == pytest.approx([r["kl"] for r in many], rel=1e-3, abs=1e-6)


def test_first_difference_cut_and_divergence():
    a = torch.tensor
    assert first_difference(a([1, 2]), a([1, 2])) is None and first_difference(a([1, 2]), a([1, 3])) == 1
    assert first_difference(a([1]), a([1, 2])) == 1 and first_difference(a([5]), a([1, 2])) == 0
    assert cut(a([5, 2, 0, 2]), {2}).tolist() == [5, 2] and cut(a([5, 6]), {2}).tolist() == [5, 6] and cut(a([5]), set()).tolist() == [5]
    p, q = a([[0.5, 0.5, 0.0]]).log(), a([[0.25, 0.25, 0.5]]).log()
    assert divergence(p, q) == pytest.approx(math.log(2)) and divergence(p, p) == 0


# ------------------------------------------------------------------------------------------------- rows


def test_rows_begin_with_the_baseline_and_equal_a_slow_count(loaded, data):
    specs = ["random:keep=0.0625", "divprune:keep=0.125"]
    methods = [me.build(s) for s in ("none", *specs)]
    records = run(loaded, data, *specs).answer_all()
    rows = agreement_rows(records, methods, against=specs[0])
    assert [r["method"] for r in rows] == ["none"] * 8 + [specs[0]] * 8 + [specs[1]] * 8
    tasks = [(r["task"], r["metric"], r["unit"]) for r in rows[:8]]
    assert tasks == [
        ("overall", "exact_match", "percent"), ("agreement", "exact_match", "percent"), ("agreement", "normalised_match", "percent"),
        ("agreement", "first_divergence", "tokens"), ("agreement", "kl", "nats"), ("accuracy", "accuracy", "percent"),
        ("text-only", "exact_match", "percent"), ("text-only accuracy", "accuracy", "percent"),
    ]  # fmt: skip
    for spec in ("none", *specs):
        own = [r for r in records if r["method"] == spec and r["task"] == "agreement"]
        found = {(r["task"], r["metric"]): r for r in rows if r["method"] == spec}
        exact, kl, right = found["agreement", "exact_match"], found["agreement", "kl"], found["accuracy", "accuracy"]
        assert exact["score"] == round(100 * sum(r["exact_match"] for r in own) / 11, 2) and exact["n"] == 11
        assert kl["score"] == pytest.approx(sum(r["kl"] for r in own) / 11, abs=1e-6) and kl["n"] == 11
        assert right["n"] == 5 and right["score"] == 100 * sum(bool(r["correct"]) for r in own) / 5
        parts = [r["first_divergence"] for r in own if r["first_divergence"] is not None]
        divergent = found["agreement", "first_divergence"]
        assert divergent["n"] == len(parts) and divergent["score"] == (round(sum(parts) / len(parts), 2) if parts else None)
        assert found["overall", "exact_match"]["kl"] == kl["score"] and found["overall", "exact_match"]["accuracy"] == right["score"]
        assert exact["difference"] == pytest.approx(exact["score"] - 100) and found["text-only", "exact_match"]["n"] == 1
    bags = [sum(own[i]["kl"] for i in drawn) / 11 for block in stats.picks(11) for drawn in block]
    tail = 100 * stats.widened(0.025, 11)
    assert kl["score_interval"] == pytest.approx(list(np.percentile(bags, [tail, 100 - tail])), abs=2e-6)
    last = rows[17]
    assert last["against"] == specs[0] and last["against_difference"] == pytest.approx(last["score"] - rows[9]["score"], abs=0.011)
    header, lines = agreement_table(rows)
    assert [len(line) for line in lines] == [len(header)] * 3 and lines[0][0] == "none"


def answered(method: str, name: str, tokens: int, same: bool, exact: bool | None = None, error: str | None = None) -> dict:
    """A record of a request with an image; ``same``: in the same words."""
    out = {"method": method, "id": name, "task": "agreement", "error": error, "expected": None, "token_ids": [1] * tokens}
    return out | {"normalised_match": same, "exact_match": same if exact is None else exact}


def test_agreement_by_the_length_of_the_uncompressed_answer_equals_a_slow_count():
    """Bins by powers of two of the baseline's tokens, not of the method's; one that failed agrees with nothing."""
    lengths = [1, 2, 3, 4, 4, 5, 8, 9, 16, 33]
    base = [answered("none", str(i), n, True) for i, n in enumerate(lengths)]
    own = [answered("m", str(i), 7, i % 3 > 0, exact=i % 2 > 0) for i in range(len(lengths) - 1)]
    own.append({**answered("m", "9", 0, True, error="it broke"), "normalised_match": None})
    records = [*base, *own, {**answered("m", "text", 4, False), "task": "text-only"}]
    found = by_length(records, "m", "none")
    assert list(found) == ["1", "2", "3-4", "5-8", "9-16", "33-64"]
    for cell in found.values():
        low, high = cell["tokens"]
        inside = [r for r, n in zip(own, lengths) if low <= n <= high]
        assert cell["n"] == len(inside)
        for metric in ("exact_match", "normalised_match"):
            right = sum(bool(r[metric]) and r["error"] is None for r in inside)
            assert cell[metric] == round(100 * right / len(inside), 2)
            between = stats.proportion(right, len(inside))
            assert cell[f"{metric}_interval"] == pytest.approx([100 * b for b in between], abs=0.01)
    rows = [{"method": "none", "task": "overall"}, {"method": "m", "task": "overall", "by_length": found}]
    header, lines = length_table(rows)
    assert header == ["tokens of the answer", *found] and lines[0] == ["requests", "1", "1", "3", "2", "2", "1"]
    assert lines[1][0] == "m" and lines[1][3] == "66.7 [9.4, 99.2]"
    assert length_table([{"method": "m", "by_length": {"1": found["1"]}}]) == ([], [])  # all as long: the main table says it


def test_the_worst_are_by_kl_with_both_answers(loaded, data):
    records = run(loaded, data, "random:keep=0.0625", "divprune:keep=0.0625").answer_all()
    far = worst(records, 4)
    for spec in ("random:keep=0.0625", "divprune:keep=0.0625"):
        own = [r for r in far if r["method"] == spec]
        assert [r["kl"] for r in own[:4]] == sorted((r["kl"] for r in records if r["method"] == spec), reverse=True)[:4]
        assert all(r["baseline_answer"] and r["question"] and r["images"][0].endswith(".png") and "/" not in r["images"][0] for r in own)
    kl = {r["id"]: r["kl"] for r in sorted(records, key=lambda r: r["kl"])}  # of each request the farthest
    for name in sorted(kl, key=lambda name: -kl[name])[:4]:
        assert [r["method"] for r in far if r["id"] == name] == ["random:keep=0.0625", "divprune:keep=0.0625"]
    header, lines = worst_table(far, 4)
    assert len(lines) == 4 and len(lines[0]) == len(header)


# ------------------------------------------------------------------------------------------------- failures and resuming


@pytest.fixture
def breaks(registered):
    """A method that fails on the pictures of which it is told to fail."""
    on: set[float] = set()

    @registered("breaks_on_data")
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Breaks(me.Selector):
        def score(self, v):
            if not on or round(float(v.features.sum()), 3) in on:
                raise RuntimeError("on purpose")
            return v.features[:, 0]

    return on


def test_a_sample_that_fails_is_counted_and_ends_with_1(capsys, data, breaks, tmp_path):
    argv = ["eval", "--data", str(data), "--method", "breaks_on_data:keep=0.5", "--max-new-tokens", "2", "--device", "cpu"]
    assert main([*argv, "--output-dir", str(tmp_path / "run"), "--json"]) == 1
    out, err = capsys.readouterr()
    rows = [r for r in json.loads(out)["rows"] if r["method"] == "breaks_on_data:keep=0.5"]
    exact = next(r for r in rows if r["task"] == "agreement")
    assert (exact["score"], exact["failures"], exact["n"]) == (0.0, 11, 11) and not any(r["metric"] == "kl" for r in rows)
    assert next(r for r in rows if r["task"] == "text-only")["score"] == 100.0
    assert "failed: breaks_on_data:keep=0.5 on line 1: RuntimeError: on purpose" in err and "11 of 24 answers failed" in err
    breaks.add(0.0)
    assert main([*argv, "--output-dir", str(tmp_path / "run"), "--json"]) == 0  # what failed is asked again
    assert sum(r["failures"] for r in json.loads(capsys.readouterr().out)["rows"]) == 0


def test_where_the_baseline_fails_nothing_is_compared(loaded, data, monkeypatch):
    real = agreement.prepare

    def fails(model, method, *, image_keys, **inputs):
        if method.name == "none" and "data/line 3/0" in image_keys:
            raise RuntimeError("boom")
        return real(model, method, image_keys=image_keys, **inputs)

    monkeypatch.setattr(agreement, "prepare", fails)
    records = run(loaded, data, "uniform:keep=0.5", limit=6).answer_all()
    failed = {(r["method"], r["id"]): r["error"] for r in records if r["error"]}
    assert failed == {
        ("none", "line 3"): "RuntimeError: boom",
        ("uniform:keep=0.5", "line 3"): "MllmEfficientError: the uncompressed model failed on this request",
    }


def test_an_interrupted_run_goes_on_and_ends_with_the_same_answers(loaded, data, tmp_path):
    whole = plain(run(loaded, data, "random:keep=0.125").answer_all())
    part = run(loaded, data, "random:keep=0.125", output_dir=tmp_path / "out")
    part._batch(part.groups[0][:4])
    part.records.close()
    file = tmp_path / "out" / "samples.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:-2]) + b'{"method": "none", "id"')  # killed in the middle of the method's first batch
    before = b"".join(lines[:-2])
    resumed = run(loaded, data, "random:keep=0.125", output_dir=tmp_path / "out").answer_all()
    assert plain(resumed) == whole and file.read_bytes().startswith(before)
    again = file.read_bytes()
    assert plain(run(loaded, data, "random:keep=0.125", limit=5, output_dir=tmp_path / "out").answer_all()) == [
        r for r in whole if r["id"] in [f"line {i}" for i in range(1, 6)]
    ]
    assert file.read_bytes() == again


def test_an_image_or_a_text_that_changed_is_not_mixed_in(loaded, data, tmp_path):
    run(loaded, data, output_dir=tmp_path / "out", limit=3).answer_all()
    Image.new("RGB", (144, 144)).save(tmp_path / "1.png")
    for _ in range(2):  # the folder is free again after the error
        with pytest.raises(me.MllmEfficientError, match="holds an answer to another line 2"):
            run(loaded, data, output_dir=tmp_path / "out", limit=3)
    run(loaded, data, output_dir=tmp_path / "out", limit=1).answer_all()
    with pytest.raises(me.MllmEfficientError, match="max_new_tokens: 6 there, 3 now"):
        run(loaded, data, output_dir=tmp_path / "out", limit=1, max_new_tokens=3)


# ------------------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize(("line", "says"), [
    ("{", "not JSON"), ("[1]", "not a JSON object"), ('"text"', "not a JSON object"),
    ('{"prompt": "x", "image": "a"}', "no image file"), ('{"prompt": "x", "image": "0.png", "images": ["0.png"]}', "both image and images"),
    ('{"images": ["0.png"]}', "neither prompt nor messages"), ('{"prompt": "x", "messages": []}', "both prompt and messages"),
    ('{"prompt": " "}', "prompt must be a text"), ('{"prompt": 3}', "prompt must be a text"),
    ('{"prompt": "x", "images": 3}', "list of paths"), ('{"prompt": "x", "images": [3]}', "list of paths"),
    ('{"prompt": "x", "images": ["absent.png"]}', "no image file"), ('{"prompt": "x", "images": ["requests.jsonl"]}', "not an image"),
    ('{"prompt": "x", "id": "words"}', "the id 'words' stands on line 11 too"), ('{"prompt": "x", "id": "line 2"}', "stands on line 2 too"),
    ('{"prompt": "x", "id": true}', "id must be"), ('{"prompt": "x", "answer": []}', "answer must be"),
    ('{"prompt": "x", "answer": true}', "answer must be"), ('{"prompt": "x", "answer": ["a", ""]}', "answer must be"),
    ('{"messages": []}', "the conversation is empty"), ('{"messages": [{"text": "x"}]}', "unknown role None"),
    ('{"messages": [{"role": "tool", "content": "x"}]}', "unknown role 'tool'"),
    ('{"messages": [{"role": "user", "content": 3}]}', "no text 'content', and no list of parts"),
    ('{"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}', "no image file"),
    ('{"messages": [{"role": "user", "content": [{"type": "video"}]}]}', "has a part 'video': parts are"),
    ('{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "answer": "z"}',
     "both an answer and a last message"),
    ('{"images": ["0.png"], "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}]}',
     "2 <image> in the questions, and 1 image(s) are given"),
    ('{"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}]}',
     "1 <image> in the questions, and 0 image(s) are given"),
])  # fmt: skip
def test_a_bad_line_is_one_line_that_names_it_before_a_model_is_loaded(capsys, data, line, says, monkeypatch):
    monkeypatch.setattr("mllm_efficient.loading.models.load", lambda *a: pytest.fail("a model was loaded"))
    with data.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    assert main(["eval", "--data", str(data)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.strip().splitlines()) == 1 and says in err and "requests.jsonl line 14: " in err


@pytest.mark.parametrize(("line", "says"), [
    ({"prompt": "is it <image> or <image> ?", "images": ["0.png"]}, "2 <image> in the questions, and 1 image(s) are given"),
    ({"prompt": "is <image> red ?"}, "1 <image> in the questions, and 0 image(s) are given"),
    ({"messages": [{"role": "user", "content": "is <image> red ?"}]}, "1 <image> in the questions, and 0 image(s) are given"),
])  # fmt: skip
def test_placeholders_that_do_not_fit_name_the_line_before_anything_is_asked(capsys, data, line, says, monkeypatch):
    monkeypatch.setattr(Agreement, "answers", lambda *a: pytest.fail("a model was asked"))
    with data.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    assert main(["eval", "--data", str(data), "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and f"requests.jsonl line 14: {says}" in err.strip().splitlines()[-1]
    assert "Traceback" not in err


def test_templates_that_do_not_fit_name_the_line(loaded, data):
    requests = read_requests(data)
    other = Loaded(loaded.model, copy.deepcopy(loaded.processor), ModelOptions(model="other"))
    other.processor.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(
        me.MllmEfficientError, match=r"requests.jsonl line \d+: the chat template of other does not take this: no such role"
    ):
        prompts_of(requests, other, data)
    other.processor.chat_template = "{{ messages[-1]['content'][-1]['text'] }}"  # forgets the images
    with pytest.raises(me.MllmEfficientError, match="line 1: the prompt has 0 <image> and 1 image"):
        prompts_of(requests, other, data)


def test_what_a_line_may_say(loaded, data):
    requests = read_requests(data)
    assert [r.id for r in requests] == [*(f"line {i}" for i in range(1, 11)), "words", "two"] and requests[10].answers == ("red", "a ring")
    prompts = prompts_of(requests, loaded, data)
    assert prompts[11] == ("USER: <image>\nwhat colour is the big object in<image>\n ASSISTANT: red USER: what shape is it ? ASSISTANT:")
    assert prompts[0] == loaded.prompt(requests[0].question, 1) and requests[11].question == "what shape is it ?"
    data.write_text('{"images": ["1.png"], "messages": [{"role": "user", "content": "what ?"}], "id": 7, "answer": 3}')
    (request,) = read_requests(data)
    assert (request.id, request.answers) == ("7", ("3",)) and prompts_of([request], loaded, data) == ["USER: <image>\nwhat ? ASSISTANT:"]


def test_files_and_options_that_do_not_fit(capsys, data, tmp_path):
    for option in (("--suite", "builtin"), ("--split", "val"), ("--turns", "2")):
        assert main(["eval", "--data", str(data), *option]) == 2
        assert f"{option[0]} has no effect with --data" in capsys.readouterr().err
    assert main(["eval", "--max-new-tokens", "3"]) == 2 and "has no effect" in capsys.readouterr().err
    assert main(["eval", "--data", str(data), "--against", "random:keep=0.5"]) == 2 and "add --method" in capsys.readouterr().err
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
    for name, says in (
        ("absent.jsonl", "No such file"),
        ("empty.jsonl", "holds no record"),
        ("latin.jsonl", "is not UTF-8 text"),
        (".", "cannot read the data"),
    ):
        assert main(["eval", "--data", str(tmp_path / name)]) == 2
        assert says in capsys.readouterr().err


def test_the_command_prints_tables_and_json_and_keeps_results(capsys, data, tmp_path):
    argv = ["eval", "--data", str(data), "--method", "random:keep=0.0625", "--max-new-tokens", "4", "--device", "cpu", "--batch-size", "5"]
    assert main([*argv, "--output-dir", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "same answer" in out and "text-only" in out and "Farthest" in out
    curve = next(r["by_length"] for r in json.loads((tmp_path / "out" / "results.json").read_text())["rows"] if "by_length" in r)
    assert sum(c["n"] for c in curve.values()) == 11 and ("tokens of the answer" in out) == (len(curve) > 1)
    kept = json.loads((tmp_path / "out" / "results.json").read_text())
    assert main([*argv, "--json", "--output-dir", str(tmp_path / "out")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == kept and printed["rows"][0]["method"] == "none" and printed["meta"]["worst"]
    meta = printed["meta"]
    assert (meta["suite"], meta["questions"], meta["text_only"], meta["with_answer"], meta["normalisation"]) == (
        "data",
        12,
        1,
        6,
        "words/1",
    )
    assert main([*argv, "--limit", "2", "--json"]) == 0
    few = json.loads(capsys.readouterr().out)
    assert few["meta"]["questions"] == 2 and {r["task"] for r in few["rows"]} == {"overall", "agreement", "accuracy"}
