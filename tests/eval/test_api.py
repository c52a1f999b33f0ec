"""The commands in Python: the same rows, and results that can be read, plotted and pasted."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

import mllm_efficient as me
from mllm_efficient.cli import main
from mllm_efficient.eval.arguments import budgets
from mllm_efficient.eval.record import schema

METHODS = ["divprune:keep=0.25", "random:keep=0.25"]


@pytest.fixture(scope="module")
def builtin():
    return me.builtin(device="cpu")


@pytest.fixture(scope="module")
def evaluated(builtin):
    return me.evaluate(*builtin, METHODS, limit=21, split="val")


@pytest.fixture(scope="module")
def swept(builtin):
    return me.sweep(*builtin, ["divprune"], keep=[0.5, 0.25], limit=14, split="val", repeats=1, warmup=0, output_tokens=2)


@pytest.fixture(scope="module")
def benched(builtin):
    return me.bench(*builtin, ["divprune:keep=0.25"], repeats=1, warmup=0, output_tokens=2)


@pytest.fixture(scope="module")
def counted():
    return me.flops("llava-1.5-7b", ["divprune:keep=0.1", "fastv:keep=0.75"], new_tokens=8)


# ------------------------------------------------------------------------------------------------ the same as the commands


def test_evaluate_has_the_rows_of_the_command(evaluated, capsys):
    argv = ["eval", "--json", "--device", "cpu", "--limit", "21", "--split", "val", *(w for m in METHODS for w in ("--method", m))]
    assert main(argv) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["rows"] == json.loads(json.dumps(evaluated.rows))
    differ = {k for k in shown["meta"] if shown["meta"][k] != json.loads(json.dumps(evaluated.meta))[k]}
    assert differ == {"weights"}  # of a model in memory they are those of its tensors, not of files


def test_objects_dicts_and_specifications_are_the_same_methods(builtin, evaluated):
    how = [me.DivPrune(keep=0.25), {"method": "random", "keep": 0.25}]
    assert me.evaluate(*builtin, how, limit=21, split="val").rows == evaluated.rows


def test_flops_has_the_rows_of_the_command(counted, capsys):
    argv = [
        "flops",
        "--json",
        "--model",
        "llava-1.5-7b",
        "--new-tokens",
        "8",
        "--method",
        "divprune:keep=0.1",
        "--method",
        "fastv:keep=0.75",
    ]
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == counted.rows


def test_flops_of_a_model_are_those_of_its_folder(builtin):
    model, processor = builtin
    assert me.flops(model, METHODS, processor=processor).rows == me.flops("builtin", METHODS).rows
    several = me.flops("builtin", METHODS, text_tokens=[15, 83])
    assert several.rows[0]["text_tokens"] == 49 and len(several.meta["prompts"]) == 2


def test_a_sweep_without_a_folder_recommends_and_leaves_nothing(swept):
    assert [r["method"] for r in swept.rows[:3]] == ["none", "divprune:keep=0.5", "divprune:keep=0.25"]
    assert swept.meta["recommendation"]["line"] and swept.rows[1]["ttft_ms"]["n"] == 1


def test_a_run_in_a_folder_goes_on(builtin, tmp_path, evaluated, monkeypatch):
    again = {"limit": 21, "split": "val", "output_dir": tmp_path}
    me.evaluate(*builtin, METHODS, **again)
    monkeypatch.setattr("mllm_efficient.eval.runner.Run.answers", lambda *a: pytest.fail("asked again"))
    assert me.evaluate(*builtin, METHODS, **again).rows == evaluated.rows
    assert main(["report", str(tmp_path)]) == 0


def test_requests_of_ones_own(builtin, tmp_path):
    image, question = me.sample(1)
    image.save(tmp_path / "a.png")
    (tmp_path / "r.jsonl").write_text(json.dumps({"image": "a.png", "prompt": question}) + "\n")
    found = me.evaluate(*builtin, METHODS, data=tmp_path / "r.jsonl", max_new_tokens=4)
    assert {r["metric"] for r in found.rows} >= {"exact_match", "kl"} and "same answer" in repr(found)


# ------------------------------------------------------------------------------------------------ what is refused


def test_what_has_no_effect_is_refused(builtin, tmp_path):
    for wrong, says in [
        ({"max_new_tokens": 3}, "max_new_tokens= has no effect on the embedded benchmark"),
        ({"data": "r.jsonl", "split": "val"}, "split= has no effect on data"),
        ({"data": "r.jsonl", "suite": "quick"}, "suite and data"),
        ({"suite": "quick", "turns": 2}, "turns= has no effect on public tasks"),
        ({"data_root": "x"}, "data_root= has no effect"),
        ({"split": "train"}, "split='train' is not one of 'test', 'val'"),
        ({"against": "pool:keep=0.5"}, "^against pool:keep=0.5 is not among the methods of this run: add methods pool:keep=0.5$"),
        ({"tasks": ["gqa"], "datroot": 1}, "did you mean 'data_root'"),
        ({"methods": ["divprun"]}, "did you mean 'divprune'"),
        ({"methods": "divprun"}, "unknown method 'divprun'.*did you mean 'divprune'"),
        ({"image_range": "auto"}, "image_range= has no effect on the embedded benchmark"),
        ({"image_range": "ful", "data": "r.jsonl"}, "image_range='ful' is not one of 'full', 'auto'"),
        ({"turns": 0}, "turns=0 is not one of 1, 2"),
        ({"limit": 0}, "limit=0 is not a whole number from 1"),
        ({"limit": -3}, "limit=-3 is not a whole number from 1"),
        ({"batch_size": 0}, "batch_size=0 is not a whole number from 1"),
        ({"batch_size": True}, "batch_size=True is not a whole number from 1"),
        ({"data": "r.jsonl", "max_new_tokens": 0}, "max_new_tokens=0 is not a whole number from 1"),
        ({"tasks": "gqa", "limit": 1.5}, "limit=1.5 is not a whole number from 1"),
    ]:
        with pytest.raises(me.MllmEfficientError, match=says):
            me.evaluate(*builtin, **{"methods": METHODS, "limit": 7, **wrong})
    for wrong, says in [
        ({"keep": [0.5], "tokens": [3]}, "keep and tokens"), ({"keep": [2.0]}, "outside"), ({"match": "x"}, "match='x'"),
        ({"image_range": "auto"}, "image_range= has no effect"), ({"batch_size": -1}, "batch_size=-1"), ({"repeats": 0}, "repeats=0"),
        ({"split": "train"}, "split='train'"), ({"warmup": -1}, "warmup=-1 is not a whole number from 0"),
    ]:  # fmt: skip
        with pytest.raises(me.MllmEfficientError, match=says):
            me.sweep(*builtin, ["divprune"], **wrong)
    for wrong in ({"batch_size": 0}, {"repeats": 0}, {"max_batch": 0}):
        with pytest.raises(me.BadSettingError, match="whole number from 1"):
            me.bench(*builtin, **wrong)
    with pytest.raises(me.BadSettingError, match="images=0 is not a whole number from 1"):
        me.flops(images=0)


def test_one_budget_is_a_list_of_one():
    assert budgets(0.5, None) == budgets([0.5, 0.5], None) == ["keep=0.5"] and budgets(None, 9) == ["tokens=9"]
    assert budgets(None, None) == []


@pytest.mark.parametrize("one", ["divprune:keep=0.25", {"method": "divprune", "keep": 0.25}, me.DivPrune(keep=0.25)])
def test_a_method_alone_is_a_list_of_one(one):
    assert me.flops("llava-1.5-7b", one).rows == me.flops("llava-1.5-7b", [one]).rows


def test_a_wrapped_model_is_refused_and_the_mode_is_put_back(builtin):
    model, processor = builtin
    with me.compressed(model, "divprune:keep=0.5"), pytest.raises(me.MllmEfficientError, match="me.unwrap"):
        me.evaluate(model, processor, limit=7)
    with pytest.raises(me.MllmEfficientError, match="no model of transformers"):
        me.bench("builtin", processor)
    parts = list(model.modules())
    model.train()
    model.lm_head.eval()  # as a part that is frozen
    before = [part.training for part in parts]
    try:
        me.evaluate(model, processor, limit=7)
        assert [part.training for part in parts] == before and {True, False} == set(before)
    finally:
        model.eval()


def test_weights_that_changed_are_other_weights(builtin, evaluated):
    import copy

    import torch

    model, processor = builtin
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    assert me.evaluate(other, processor, limit=7).meta["weights"] != evaluated.meta["weights"]
    assert me.evaluate(copy.deepcopy(model), processor, limit=7).meta["weights"] == evaluated.meta["weights"]


def test_every_value_and_how_a_model_generates_is_part_of_its_weights():
    from mllm_efficient.loading.models import Loaded, ModelOptions, fingerprint

    model, processor = me.builtin(device="cpu")  # one of its own: it is changed
    loaded = Loaded(model, processor, ModelOptions("builtin"), in_memory=True)
    first = fingerprint(loaded)
    assert fingerprint(loaded) == first
    values = max(model.parameters(), key=lambda p: p.numel()).data.view(-1)
    for place in (1, len(values) // 2 + 1, len(values) - 1):
        before = values[place].item()
        values[place] = before + 1
        assert fingerprint(loaded) != first, f"value {place}"
        values[place] = before
    a, b = values[1].item(), values[2].item()
    values[1], values[2] = b, a
    assert a != b and fingerprint(loaded) != first, "two values that changed places"
    values[1], values[2] = a, b
    assert fingerprint(loaded) == first
    model.generation_config.repetition_penalty = 1.5
    assert fingerprint(loaded) != first


# ------------------------------------------------------------------------------------------------ results


@pytest.mark.parametrize("name", ["evaluated", "swept", "benched", "counted"])
def test_results_are_a_frame_a_table_a_page_and_a_plot(name, request, tmp_path):
    found = request.getfixturevalue(name)
    frame = found.to_pandas()
    assert len(frame) == len(found) == len(found.rows) and list(frame["method"]) == [r["method"] for r in found.rows]
    assert not any(isinstance(v, (dict, tuple)) for v in frame.drop(columns=[c for c in frame if "layer" in c]).to_numpy().ravel())
    assert "divprune" in repr(found) and "<table>" in found._repr_html_() and "&lt;" not in repr(found)
    for size in ("page", "column"):
        for ending, start in ((".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")):
            found.plot(size=size, path=tmp_path / f"plot{ending}")
            assert (tmp_path / f"plot{ending}").read_bytes().startswith(start)
    with pytest.raises(me.BadSettingError, match="size='wide'"):
        found.plot(size="wide")
    with pytest.raises(me.MllmEfficientError, match=r"does not end in \.png, \.pdf, \.svg"):
        found.plot(path="plot.gif")


def test_rich_prints_results_in_the_width_there_is(swept):
    from rich.console import Console

    for width in (60, 80, 120):
        console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(swept)
        assert all(len(line.rstrip()) <= width for line in console.export_text().splitlines())


@pytest.mark.parametrize("name, fields", [
    ("evaluated", schema.EVALUATE), ("swept", schema.SWEEP), ("benched", schema.BENCH), ("counted", schema.FLOPS),
])  # fmt: skip
def test_every_field_is_in_the_schema(name, fields, request):
    always = {f.name for f in fields.values() if f.always}
    for row in request.getfixturevalue(name).rows:
        assert always - set(row) == set() and set(row) - set(fields) == set()


def test_every_field_of_a_record_is_in_the_schema(builtin, tmp_path):
    me.evaluate(*builtin, ["fastv:tokens=100"], limit=7, turns=2, output_dir=tmp_path / "benchmark")
    image, question = me.sample(1)
    image.save(tmp_path / "a.png")
    (tmp_path / "r.jsonl").write_text(json.dumps({"image": "a.png", "prompt": question, "answer": "red", "source": "own"}) + "\n")
    me.evaluate(*builtin, METHODS, data=tmp_path / "r.jsonl", output_dir=tmp_path / "own")
    always = {f.name for f in schema.RECORD.values() if f.always}
    for folder in ("benchmark", "own"):
        for line in (tmp_path / folder / "samples.jsonl").read_text().splitlines():
            assert always - set(json.loads(line)) == set() and set(json.loads(line)) - set(schema.RECORD) == set()
    assert all(f"| `{name}` |" in schema.markdown() for name in schema.RECORD)


# ------------------------------------------------------------------------------------------------ LaTeX


def test_latex_names_methods_as_papers_do_and_the_best_is_bold():
    from mllm_efficient.eval.report.latex import latex_table
    from mllm_efficient.tables import Table

    lines = [
        ["none", "576", "90.0", "", "100.0%"], ["divprune:keep=0.1,metric=l2", "58", "85.0", "-5.0 [-6.0, -4.0]", "30.0%"],
        ["prumerge_plus:keep=0.1", "58", "86.0", "-4.0 [-5.0, -3.0]", "29.0%"],
        ["random:keep=0.5", "288", "88.0", "-2.0 [-3.0, +1.0]", "60.0%"],
        ["divprune:keep=0.5 | fastv:keep=0.5", "288", "88.0", "-2.0 [-3.0, -1.0]", "61.0%"],
    ]  # fmt: skip
    text = latex_table(Table(["method", "tokens", "score", "vs none [95%]", "FLOPs"], lines), [], caption="50% & more_", label="tab:x")
    assert r"\caption{50\% \& more\_}" in text and r"\label{tab:x}" in text
    assert r"DivPrune (metric=l2) & 58 & 85.0 & $-$5.0 {\scriptsize [$-$6.0, $-$4.0]} & 30.0\% \\" in text
    assert r"PruMerge+ & 58 & \textbf{86.0} &" in text and r"\textbf{29.0\%}" in text
    assert r"Random & 288 & 88.0 &" in text and r"DivPrune + FastV & 288 & 88.0 &" in text  # alike, or of another budget
    few = latex_table(Table(["method", "tokens", "score"], [r[:3] for r in lines]), [], ["score"], intervals=False)
    assert r"Method & score \\" in few and "Uncompressed & 90.0" in few
    with pytest.raises(me.BadSettingError, match="did you mean 'score'"):
        latex_table(Table(["method", "score"], []), [], ["scor"])


@pytest.mark.parametrize("name", ["evaluated", "swept", "benched", "counted"])
def test_latex_compiles(name, request, tmp_path):
    compiler = shutil.which("tectonic") or shutil.which("pdflatex")
    if compiler is None:
        pytest.skip("neither tectonic nor pdflatex is here")
    table = request.getfixturevalue(name).to_latex()
    head = "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\n"
    (tmp_path / "t.tex").write_text(head + table + "\\end{document}\n")
    done = subprocess.run([compiler, "t.tex"], cwd=tmp_path, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert done.returncode == 0 and (tmp_path / "t.pdf").is_file(), done.stdout[-2000:]


@pytest.mark.parametrize("name", ["evaluated", "swept", "benched", "counted"])
def test_latex_is_balanced(name, request):
    """Where nothing compiles: braces, environments and the number of cells of every line."""
    text = request.getfixturevalue(name).to_latex()
    plain = text.replace(r"\{", "").replace(r"\}", "").replace(r"\&", "").replace(r"\%", "")
    assert plain.count("{") == plain.count("}") and "%" not in plain
    assert text.count(r"\begin{") == text.count(r"\end{") == 2
    spec = text.split(r"\begin{tabular}{")[1].split("}")[0]
    rows = [line for line in plain.splitlines() if line.endswith(r"\\")]
    assert rows and {line.count("&") + 1 for line in rows} == {len(spec)}
