"""Public tasks: servers, and what must not be mixed or hidden."""

from __future__ import annotations

import contextlib
import http.server
import importlib.util
import json
import subprocess
import sys
import threading

import pytest

import mllm_efficient as me
from mllm_efficient.cli import main

from .test_tasks import (
    ENVIRONMENT,
    evaluate,
    finished,  # noqa: F401  (fixtures)
    overall,
    own_task,
    squares,
)

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="needs lmms-eval: make test-integration")


@contextlib.contextmanager
def server(answer, models=("tiny",), fails=()):
    """An OpenAI-compatible server that always says the same; the requests it got."""
    got = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply({"object": "list", "data": [{"id": m, "object": "model", "created": 0, "owned_by": "x"} for m in models]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            got.append(body)
            if len(got) in fails:
                return self.reply({"error": {"message": "overloaded"}}, 500)
            usage = {
                "prompt_tokens": 90,
                "completion_tokens": 2,
                "total_tokens": 92,
                "prompt_tokens_details": {"multimodal_tokens": {"image": 64}},
            }
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": answer}}
            self.reply({"id": "1", "object": "chat.completion", "created": 0, "model": models[0], "choices": [choice], "usage": usage})

        def reply(self, content, status=200):
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{running.server_port}/v1", got
        finally:
            running.shutdown()


def test_servers_answer_the_same_tasks(capsys, tmp_path):
    with server("yes") as (first, got), server("circle\n\nor so") as (second, _):
        given = ["--server", f"full={first}", "--server", f"pruned={second}", "--limit", 70, "--batch-size", 4]
        code, found, _ = evaluate(capsys, "--tasks", "me_builtin", *given, "--output-dir", tmp_path / "run")
    assert code == 0 and len(got) == 70
    rows = {(r["method"], r["metric"]): r for r in found["rows"] if r["task"] == "me_builtin"}
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    truth = [r["expected"] for r in lines if r["method"] == "full" and "metrics" not in r]
    assert rows["full", "micro"]["score"] == round(100 * truth.count("yes") / 70, 2) > 0
    assert rows["pruned", "micro"]["score"] == round(100 * truth.count("circle") / 70, 2) > 0
    assert rows["full", "macro"]["role"] == "baseline" and rows["pruned", "macro"]["difference"] is not None
    assert rows["pruned", "macro"]["visual_tokens_kept"] == 64 and rows["pruned", "macro"]["keep"] is None
    body = got[0]
    assert body["temperature"] == 0 and body["max_tokens"] == 8 and body["model"] == "tiny" and body["stop"] == ["\n\n"]
    assert [p["type"] for p in body["messages"][0]["content"]] == ["image_url", "text"]
    assert main(["report", str(tmp_path / "run"), "--format", "md"]) == 0
    assert "pruned" in capsys.readouterr().out


def test_a_server_that_fails_once_is_not_asked_twice_and_is_reported(capsys):
    with server("yes", fails=(3,)) as (url, got):
        code, found, err = evaluate(capsys, "--tasks", "me_builtin", "--server", url, "--limit", 7)
    assert code == 1 and len(got) == 7 and "overloaded" in err and "1 of 7 answers failed" in err
    assert overall(found["rows"], "server", "me_builtin")["failures"] == 1


def test_what_a_server_decides_cannot_be_asked_for(capsys, tmp_path):
    with server("yes", models=("a", "b")) as (url, _):
        for arguments, says in (
            (["--method", "divprune:keep=0.5"], "--method has no effect with --server"),
            (["--cache", tmp_path], "--cache has no effect with --server"),
            (["--image-padding", "crop"], "--image-padding has no effect"), ([], "has the models a, b: name one with --server-model"),
            (["--server-model", "c"], "has no model 'c'"),
        ):  # fmt: skip
            code, _, err = evaluate(capsys, "--tasks", "me_builtin", "--server", url, "--limit", 7, *arguments)
            assert code == 2 and says in err
        assert evaluate(capsys, "--tasks", "me_builtin", "--server", url, "--limit", 7, "--server-model", "b")[0] == 0


def test_a_folder_is_refused_when_task_data_or_method_changed_since(capsys, tmp_path):
    folder, run = own_task(tmp_path / "task", squares(3)), tmp_path / "run"
    (tmp_path / "m.py").write_text(METHOD.replace("SIGN", ""))
    asked = ("--tasks", "own", "--include-path", folder, "--output-dir", run)
    assert evaluate(capsys, *asked, "--import", tmp_path / "m.py", "--method", "mine:keep=0.5")[0] == 0
    before = (run / "samples.jsonl").read_bytes()
    (tmp_path / "m.py").write_text(METHOD.replace("SIGN", "-"))
    code, _, err = evaluate(capsys, *asked, "--import", tmp_path / "m.py", "--method", "mine:keep=0.5")
    assert code == 2 and "from before the code or the weights of mine:keep=0.5 changed: use another --output-dir" in err
    text = (folder / "own.yaml").read_text()
    for changed in (
        lambda: (folder / "own.yaml").write_text(text.replace("max_new_tokens: 4", "max_new_tokens: 3")),
        lambda: own_task(folder, squares(4)),
    ):
        changed()
        code, _, err = evaluate(capsys, *asked)
        assert code == 2 and "from before task own or its data changed: use another --output-dir" in err
    assert (run / "samples.jsonl").read_bytes() == before


METHOD = '''
from dataclasses import dataclass
import torch
import mllm_efficient as me

@me.register("mine")
@dataclass(frozen=True)
class Mine(me.Selector):
    """Keeps the tokens with the largest norms, or the smallest."""
    def score(self, v):
        return SIGNv.features.norm(dim=-1)
'''


def test_the_cache_knows_a_methods_code_and_weights(capsys, tmp_path):
    """Written by another process; retrained weights in the same folder are other weights."""
    import shutil

    from safetensors.torch import load_file, save_file

    from mllm_efficient.trained.folder import shipped

    weights = tmp_path / "flex"
    shutil.copytree(shipped("tokenflex").path, weights)

    def asked(method, *more):
        return ["--tasks", "me_builtin", "--limit", 7, "--batch-size", 8, "--cache", tmp_path / "cache", "--method", method, *more]

    def calls(method, *more):
        return evaluate(capsys, *asked(method, *more))[1]["meta"]["model_calls"]

    trained = f"tokenflex:tokens=36,weights={weights}"
    command = [sys.executable, "-m", "mllm_efficient", "eval", *map(str, asked(trained)), "--json"]
    first = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert json.loads(first.stdout)["meta"]["model_calls"] == 28 and calls(trained) == 0
    state = load_file(weights / "compressor.safetensors")
    save_file({k: 0.5 * v for k, v in state.items()}, weights / "compressor.safetensors")
    assert calls(trained) == 14  # it and the baseline on its weights; none and resize are known
    (tmp_path / "m.py").write_text(METHOD.replace("SIGN", ""))
    assert calls("mine:tokens=36", "--import", tmp_path / "m.py") == 7
    (tmp_path / "m.py").write_text(METHOD.replace("SIGN", "-"))
    assert calls("mine:tokens=36", "--import", tmp_path / "m.py") == 7


def fake_run(values, scores, higher=True, budget="tokens=36"):
    """Rows of two arms of an unknown task with these values and these scores of their samples."""
    from types import SimpleNamespace

    from mllm_efficient.eval.lmms.host import Task
    from mllm_efficient.eval.lmms.rows import rows_of
    from mllm_efficient.eval.sweep import Cell

    cells = [Cell(me.build("none"), "baseline"), Cell(me.build(f"divprune:{budget}"), "method", budget)]
    task = Task("unknown", 2, {"m": higher}, {}, True, "f")
    summaries = {
        c.spec: {"metrics": {"m": v}, "n": 2, "failures": 0, "error": None, "clustered": None} for c, v in zip(cells, values)
    }  # fmt: skip
    records = [
        {"method": c.spec, "task": "unknown", "id": str(i), "scores": {"m": s}, "cluster": str(i), "error": None}
        for c, of in zip(cells, scores) for i, s in enumerate(of)
    ]  # fmt: skip
    run = SimpleNamespace(seed=0, cells=cells, tasks=[task], arms=[c.spec for c in cells], summary=lambda arm, _: summaries[arm])
    return rows_of(run, records)


def test_an_unknown_metric_has_one_scale_for_all_arms(capsys):
    from mllm_efficient.eval.lmms.tables import missing, unscaled

    rows = fake_run((50.0, 0.0), ((0, 1), (0, 0)))  # of 100; a zero looks like one on any scale
    assert [(r["score"], r["difference"]) for r in rows[:2]] == [(50.0, 0.0), (0.0, -50.0)]
    rows = fake_run((3.7, 3.5), ((0.5, 1), (0, 1)))
    assert [r["score"] for r in rows] == [None] * 4 and rows[1]["retention"] == round(350 / 3.7, 2)
    assert missing(rows) == [] and unscaled(rows) == ["unknown counts by m, whose best value is not known: no percent, no mean over tasks"]
    assert fake_run((0.5, 0.25), ((0, 1), (0, 0.5)), higher=False)[1]["retention"] is None


def test_every_line_of_the_table_has_a_cell_for_every_column():
    from mllm_efficient.eval.lmms.tables import task_table

    rows = fake_run((50.0, 25.0), ((0, 1), (0, 0.5)))
    rows[1] |= {
        "hard": 50.0,
        "hard_n": 4,
        "broken": 12.5,
        "broken_n": 8,
        "ece": 3.25,
        "aurc": 1.5,
        "neither": 7,
        "failures": 3,
        "prompt_tokens": 9.0,
    }
    header, lines = task_table(rows)
    assert all(len(line) == len(header) for line in lines)
    found = dict(zip(header, lines[1]))
    assert [found[h] for h in ("hard", "broken", "ECE", "AURC", "n", "neither", "failed")] == [
        "50.0 of 4",
        "12.5%",
        "3.2",
        "1.5",
        "2",
        "7",
        "3",
    ]


def test_which_metric_counts():
    from mllm_efficient.eval.lmms.scores import primary

    assert primary("mmstar", {"coarse perception": True, "average": True}) == "average"
    assert primary("x", {"wer": False, "acc": True}) == "acc" and primary("x", {"wer": False}) == "wer"
    assert primary("seedbench", {"seed_all": True, "seed_image": True}) == "seed_image"


def test_a_metric_that_a_draw_leaves_undefined_has_no_interval():
    from mllm_efficient.eval.lmms.scores import clustered

    items = [{"score": float(i % 2), "kind": "a" if i else "b"} for i in range(5)]

    def aggregate(given):
        return sum(i["score"] for i in given) / sum(i["kind"] == "b" for i in given)

    assert clustered(aggregate, items, range(5), aggregate(items), None).why == "some resamples leave the metric undefined"


def test_a_sample_that_failed_is_wrong_where_the_task_would_guess(capsys, tmp_path):
    """A task that gives credit for an empty answer, as MMMU's does at random."""
    folder = own_task(tmp_path / "task", [*squares(3), b"no picture"])
    text = (folder / "utils.py").read_text().replace("results[0] == doc['answer']", "results[0] in ('', doc['answer'])")
    (folder / "utils.py").write_text(text)
    code, found, err = evaluate(capsys, "--tasks", "own", "--include-path", folder, "--output-dir", tmp_path / "run")
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert code == 1 and next(s for s in samples if s["id"] == "own/3")["scores"] == {"acc": 0.0}
    assert overall(found["rows"], "none", "own")["value"] is None and "no score: none on own" in err  # its scale is not known


@pytest.mark.parametrize(
    "more, says",
    [
        ("repeats: 4\n", "asks every question 4 times: tasks that ask once are run"),
        ("output_type: loglikelihood\n", "is of type loglikelihood: tasks that generate one answer"),
    ],
)
def test_tasks_that_are_not_run(capsys, tmp_path, more, says):
    folder = own_task(tmp_path / "task", squares(1))
    text = (folder / "own.yaml").read_text()
    (folder / "own.yaml").write_text(text.replace("output_type: generate_until\n", "") + more if "output" in more else text + more)
    assert main(["eval", "--tasks", "own", "--include-path", str(folder)]) == 2
    assert says in capsys.readouterr().err


def test_a_task_that_asks_a_judge_needs_its_key(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    folder = own_task(tmp_path / "task", squares(1))
    (folder / "utils.py").write_text("API_KEY = None\n" + (folder / "utils.py").read_text())
    assert main(["eval", "--tasks", "own", "--include-path", str(folder)]) == 2
    assert "task own: answers are judged by a model over the network: set OPENAI_API_KEY" in capsys.readouterr().err
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    assert main(["eval", "--tasks", "own", "--include-path", str(folder)]) == 0


def test_a_sweep_names_an_arm_that_failed_and_ends_with_1(capsys, tmp_path, monkeypatch):
    from mllm_efficient.eval.lmms.host import Host

    stock = Host.evaluate

    def evaluate_task(self, model, *arguments):
        if model.asker.parts[0].name == "divprune":
            raise me.MllmEfficientError("task me_builtin: out of order")
        return stock(self, model, *arguments)

    monkeypatch.setattr(Host, "evaluate", evaluate_task)
    command = ["sweep", "--tasks", "me_builtin", "--method", "divprune:tokens=36", "--limit", "7", "--no-bench"]
    assert main([*command, "--output-dir", str(tmp_path / "run")]) == 1
    err = capsys.readouterr().err
    assert "failed: divprune:tokens=36 on task me_builtin: out of order" in err
    assert "failed: divprune:tokens=36: no score over all tasks" in err
    rows = {r["method"]: r for r in json.loads((tmp_path / "run" / "report.json").read_text())["rows"]}
    assert rows["divprune:tokens=36"]["score"] is None and rows["random:tokens=36"]["score"] is not None


def test_a_server_folder_is_not_resumed_and_its_options_are_refused(capsys, tmp_path):
    with server("yes") as (url, got):
        asked = ("--tasks", "me_builtin", "--server", url, "--limit", 7)
        assert evaluate(capsys, *asked, "--output-dir", tmp_path / "run")[0] == 0 and len(got) == 7
        code, _, err = evaluate(capsys, *asked, "--output-dir", tmp_path / "run")
        assert code == 2 and "a server may have changed since" in err
        code, _, err = evaluate(capsys, *asked, "--dtype", "float32")
        assert code == 2 and "--model and how it is loaded has no effect with --server" in err


def test_a_server_that_fails_once_in_a_batch_keeps_the_other_answers(capsys):
    with server("yes", fails=(3,)) as (url, got):
        code, found, _ = evaluate(capsys, "--tasks", "me_builtin", "--server", url, "--limit", 14, "--batch-size", 4)
    assert code == 1 and len(got) == 14
    assert overall(found["rows"], "server", "me_builtin")["failures"] == 1


def test_data_that_changed_under_data_root_are_read_anew(capsys, tmp_path):
    """With the configurations in the data set's README that datasets would name its own copy by."""
    from ..public_data import make

    make(tmp_path / "data", ["scienceqa_img"])
    asked = ("--tasks", "scienceqa_img", "--data-root", tmp_path / "data")
    before = overall(evaluate(capsys, *asked)[1]["rows"], "none", "scienceqa_img")["n"]
    import pyarrow.parquet as parquet

    (file,) = (tmp_path / "data").rglob("*.parquet")
    parquet.write_table(parquet.read_table(file).slice(0, 2), file)
    assert before > 2 and overall(evaluate(capsys, *asked)[1]["rows"], "none", "scienceqa_img")["n"] == 2


def test_a_sample_that_fails_only_the_second_time_is_not_hidden_by_the_first(capsys, tmp_path, monkeypatch):
    """Two runs in one folder, sample 1 fails in the first and sample 2 in the second: rows, records and exit code agree."""
    from mllm_efficient.eval.lmms.model import ModelAsker

    folder, stock = own_task(tmp_path / "task", squares(4)), ModelAsker.prompt
    bad = [1]

    def prompt(self, content):
        if content.keys == [f"own/{bad[0]}/0"]:
            raise OSError("flaky")
        return stock(self, content)

    monkeypatch.setattr(ModelAsker, "prompt", prompt)
    for bad[0] in (1, 2):
        asked = ("--tasks", "own", "--include-path", folder, "--output-dir", tmp_path / "run", "--cache", tmp_path / str(bad[0]))
        code, found, err = evaluate(capsys, *asked)
        assert code == 1 and f"failed: none on own/{bad[0]}: OSError: flaky" in err and "1 of 4 answers failed" in err
        assert overall(found["rows"], "none", "own")["failures"] == 1
    bad[0] = None
    code, found, _ = evaluate(capsys, *asked)
    assert code == 0 and overall(found["rows"], "none", "own")["failures"] == 0


def test_a_folder_is_not_written_over_by_other_tasks_or_methods(finished, capsys, tmp_path):
    folder, _ = finished
    before = (folder / "results.json").read_bytes()
    named = ("--method", "divprune:keep=0.25", "--method", "uniform:tokens=36")
    own = own_task(tmp_path / "task", squares(1))
    for arguments, says in (
        (("--tasks", "own", "--include-path", own, *named), "holds the tasks me_builtin too: name them as well"),
        (("--tasks", "me_builtin", *named[:2]), "holds the methods resize:tokens=36, uniform:tokens=36 too: name them as well"),
    ):
        code, _, err = evaluate(capsys, *arguments, "--limit", 140, "--batch-size", 32, "--output-dir", folder)
        assert code == 2 and says in err
    assert (folder / "results.json").read_bytes() == before


def test_points_of_a_few_categories_are_percent_of_what_those_can_give():
    from mllm_efficient.eval.lmms.host import Task
    from mllm_efficient.eval.lmms.run import _tops

    task = Task("me_mme", 4, {"perception": True, "cognition": True, "count": True}, {}, True, "f")
    logged = [
        {"perception": {"category": c}, **({"count": {"category": c}} if c == "count" else {})} for c in ("count", "count", "OCR", "OCR")
    ]
    assert _tops(task, logged) == {"perception": 400.0, "count": 200.0}


@pytest.mark.parametrize("format", ["md", "latex", "html", "csv"])
def test_a_run_with_captions_can_be_reported(finished, capsys, tmp_path, format):
    """A task without intervals, and so an overall row without."""
    folder, _ = finished
    content = json.loads((folder / "results.json").read_text())
    for row in content["rows"]:
        row |= {"score_interval": None, "difference_interval": None}
    (tmp_path / "results.json").write_text(json.dumps(content))
    out = tmp_path / f"report.{format}"
    assert main(["report", str(tmp_path), "--format", format, "--output", str(out)]) == 0
    if format == "md":
        assert "a task without intervals (captions) is among these, so nothing is sure" in out.read_text()


def test_a_limit_of_a_suite_is_even_where_a_task_asks_in_pairs(capsys):
    from mllm_efficient.eval.lmms.evaluate import even
    from mllm_efficient.progress import Progress

    assert even(["me_gqa", "me_mme"], 25, "quick", Progress(quiet=True)) == 26
    assert "--limit 26: a task of quick asks in pairs" in capsys.readouterr().err
    assert even(["me_gqa"], 25, "quick", Progress(quiet=True)) == 25 and even(["me_mme"], 24, "quick", Progress(quiet=True)) == 24
    assert even(["me_mme"], 25, None, Progress()) == 25  # which is refused by the task's name


def test_a_reference_says_which_settings_differ():
    from types import SimpleNamespace

    from mllm_efficient.eval.lmms import suites
    from mllm_efficient.eval.lmms.evaluate import unlike_protocol

    reference = suites.read(suites.REFERENCES, "divprune-table1")

    def lines(prompt, spec):
        config = {"prompt": prompt, "image_padding": "pad", "batch_size": 1}
        return unlike_protocol(SimpleNamespace(config=config, methods=[me.build("none"), me.build(spec)]), reference)

    assert lines("llava_v1", "divprune:tokens=56,order=picked") == []
    assert lines("template", "divprune:tokens=56") == [
        "Not the same setting: prompt is template here and llava_v1 there.",
        "Not the same setting: divprune:tokens=56: order=raster here and picked there.",
    ]
