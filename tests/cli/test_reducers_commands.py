"""In-decoder methods in every command: the same answers as the wrapped model's, and numbers that follow the layers."""

from __future__ import annotations

import json

import pytest
import torch

import mllm_efficient as me
from mllm_efficient.cli import main
from mllm_efficient.eval.agreement import Agreement, cut
from mllm_efficient.eval.builtin.suite import samples
from mllm_efficient.eval.requests import prompts_of, read_requests
from mllm_efficient.eval.runner import MAX_NEW_TOKENS, Run, first_word
from mllm_efficient.eval.turns import converse, follow_ups, next_turn
from mllm_efficient.loading.models import ModelOptions, load
from mllm_efficient.measure.bench import Bench, Settings
from mllm_efficient.measure.workload import Workload

SPECS = ("fastv:layer=1,keep=0.4", "sparsevlm:ratio=0.3")


@pytest.fixture(scope="module")
def loaded():
    return load(ModelOptions(device="cpu"))


def hooks(loaded):
    """Ours: transformers leaves some of its own."""
    found = [hook for m in loaded.model.modules() for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    return sum((getattr(hook, "__module__", None) or "").startswith("mllm_efficient") for hook in found)


@pytest.mark.parametrize("spec", SPECS)
def test_eval_answers_are_those_of_the_wrapped_model(loaded, spec):
    questions, method = samples("val", 14), me.build(spec)
    records = {r["id"]: r for r in Run(loaded, questions, [me.build("none"), method]).answer_all() if r["method"] == method.spec()}
    for sample in questions:
        inputs = loaded.inputs([loaded.prompt(sample.question.text, 1)], [sample.picture(144)])
        with me.compressed(loaded.model, method):
            out = loaded.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        record, report = records[sample.id], me.last_report(loaded.model)
        assert record["error"] is None
        assert record["answer"] == first_word(loaded.processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        assert record["visual_tokens_kept"] == report.visual_tokens_kept == round(report.layer_average)
        assert 0 <= record.get("region_share", 0) <= 1
    assert hooks(loaded) == 0


@pytest.mark.parametrize("spec", SPECS)
def test_a_second_turn_is_that_of_the_wrapped_model_by_hand(loaded, spec):
    pairs = follow_ups(samples("val", 35))[:5]
    evaluation = Run(loaded, samples("val", 35), [me.build("none")], turns=2)
    firsts, seconds, prepared = converse(evaluation, me.build(spec), pairs)
    seconds = evaluation.decoded(seconds)
    how, ends = {"max_new_tokens": evaluation.max_new_tokens, "do_sample": False}, loaded.model.generation_config.eos_token_id
    for i, (pair, first, second) in enumerate(zip(pairs, firsts, seconds)):
        inputs = loaded.inputs([loaded.prompt(evaluation.worded(pair.first), 1)], [pair.first.picture(evaluation.size)])
        with me.compressed(loaded.model, spec):
            one = loaded.model.generate(**inputs, return_dict_in_generate=True, **how)
            said = one.sequences
            said = said[:, :-1] if int(said[0, -1]) == ends else said
            more = next_turn(loaded, evaluation.worded(pair.first), evaluation.worded(pair.second), 1)
            ids = torch.cat([said, torch.tensor([more])], 1)
            two = loaded.model.generate(input_ids=ids, past_key_values=one.past_key_values, **how)
        assert prepared.report.images[i].indices.tolist() == one.compression.images[0].indices.tolist()
        assert first == loaded.processor.decode(one.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert second == loaded.processor.decode(two[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("spec", SPECS)
def test_agreement_is_that_of_the_wrapped_models_steps(loaded, tmp_path, spec):
    """Tokens are chosen by the question alone, although the baseline's answer is read in the same forward."""
    lines = []
    for i, sample in enumerate(samples("val", 6)):
        sample.picture(144).save(tmp_path / f"{i}.png")
        lines.append({"images": [f"{i}.png"], "prompt": sample.question.text})
    (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, [*lines, {"prompt": "what colour is it ?"}])))
    requests = read_requests(tmp_path / "requests.jsonl")
    prompts = prompts_of(requests, loaded, tmp_path / "requests.jsonl")
    method = me.build(spec)
    evaluation = Agreement(loaded, requests, [me.build("none"), method], 4, prompts=prompts, max_new_tokens=6)
    records = {(r["method"], r["id"]): r for r in evaluation.answer_all()}
    for request, prompt in zip(requests, prompts):
        inputs, said, log_p = loaded.inputs([prompt], request.pictures()), {}, {}
        for name in ("none", method.spec()):
            with me.compressed(loaded.model, name):
                out = loaded.model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            said[name] = cut(out, {2})
            assert records[name, request.id]["token_ids"] == said[name].tolist() and records[name, request.id]["error"] is None
        for name in said:
            with me.compressed(loaded.model, name), torch.no_grad():
                out = loaded.model(**inputs, use_cache=True)
                steps = [out.logits[0, -1]]
                for token in said["none"][:-1]:
                    out = loaded.model(input_ids=token[None, None], past_key_values=out.past_key_values)
                    steps.append(out.logits[0, -1])
            log_p[name] = torch.stack(steps).log_softmax(-1)
        p, q = log_p["none"], log_p[method.spec()]
        kl = float((p.exp() * (p - q)).sum(-1).mean())
        assert records[method.spec(), request.id]["kl"] == pytest.approx(kl, abs=1e-4)


def test_bench_runs_them_beside_a_free_choice_of_the_layer_average(loaded):
    bench = Bench(loaded, [me.build(s) for s in SPECS], Settings(Workload(text_tokens=10, output_tokens=2), repeats=1, warmup=0))
    rows, meta = bench.run()
    assert not meta["failed"], meta["failed"]
    kept = {r["method"]: r["visual_tokens_kept"] for r in rows}
    average = {s: round(sum(me.build(s).per_layer(144, 4)) / 4) for s in SPECS}
    for spec in SPECS:
        assert kept[me.build(spec).spec()] == average[spec] and kept[f"random:tokens={average[spec]}"] == average[spec]
    own = next(r for r in rows if r["method"] == me.build(SPECS[0]).spec())
    none = rows[0]
    assert own["flops_ratio"] < 1 and own["kv_cache_mb"] < none["kv_cache_mb"] and own["prefill_ms"]["n"] == 1
    assert hooks(loaded) == 0


def test_sweep_goes_on_where_an_average_cannot_be_reached(tmp_path):
    """FastV after 1 of 4 layers cannot keep 0.2 of the tokens on average; that cell fails and says why, the others run."""
    quick = ["--device", "cpu", "--split", "val", "--limit", "7", "--repeats", "1", "--warmup", "0", "--output-tokens", "2"]
    argv = [
        "sweep",
        "--method",
        "fastv:layer=1",
        "--method",
        "pyramiddrop:ratio=0.5",
        "--keep",
        "0.5,0.2",
        "--output-dir",
        str(tmp_path / "run"),
    ]
    assert main([*argv, *quick]) == 1
    results = json.loads((tmp_path / "run" / "report.json").read_text())
    rows = {r["method"]: r for r in results["rows"]}
    assert rows["fastv:keep=0.5,layer=1"]["visual_tokens_kept"] == 72 and rows["pyramiddrop:ratio=0.5"]["score"] is not None
    assert "the smallest is 37" in json.dumps(results) and rows["pyramiddrop:ratio=0.5"]["flops_ratio"] < 1


def test_show_draws_the_tokens_of_the_last_layer(tmp_path, capsys):
    samples("val", 1)[0].picture(144).save(tmp_path / "a.png")
    argv = ["show", "--image", tmp_path / "a.png", "--method", "fastv:layer=1,ratio=0.25", "--output", tmp_path / "b.png", "--json"]
    assert main([*map(str, argv), "--device", "cpu"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert len(row["indices"]) == 36 and row["kept"] == 63


def test_generate_says_what_it_did(tmp_path, capsys):
    samples("val", 1)[0].picture(144).save(tmp_path / "a.png")
    argv = ["generate", "--image", tmp_path / "a.png", "--prompt", "how many shapes are there ?", "--method", "fastv:layer=1,ratio=0.25"]
    assert main([*map(str, argv), "--device", "cpu", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "fastv keeps 144 tokens up to layer 1, then 36 (layer average 63.0)" in err
    assert json.loads(out)["rows"][0]["tokens_per_layer"] == [144, 36, 36, 36]
