"""The harness: rows, paired intervals, resume after a kill, failures that are counted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import mllm_efficient as me
from mllm_efficient.cli import main
from mllm_efficient.eval import runner, stats
from mllm_efficient.eval.builtin.questions import CATEGORIES
from mllm_efficient.eval.builtin.suite import samples
from mllm_efficient.eval.records import Records
from mllm_efficient.eval.runner import Run, first_word
from mllm_efficient.models import ModelOptions, load


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
    assert one == many


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


def test_a_kill_loses_no_finished_sample_and_the_end_is_the_same(tmp_path):
    command = [sys.executable, "-m", "mllm_efficient", "eval", "--split", "val", "--limit", "112", "--batch-size", "7"]
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
    with pytest.raises(me.MllmEfficientError, match="another process"):
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
    weights = stats.draws(len(images), seed=4, resamples=50)
    got = stats.accuracy(stats.Hits(rows, images, list("abc")), weights)
    for weight, values in zip(weights, got):
        bag = [r for i, w in zip(images, weight) for r in rows if r["image"] == i for _ in range(int(w))]
        each = [100 * np.mean([r["correct"] for r in bag if r["task"] == t]) for t in "abc"]
        assert values[:3] == pytest.approx(each) and values[3] == pytest.approx(np.mean(each))
        assert values[4] == pytest.approx(100 * np.mean([r["correct"] for r in bag]))


def test_a_paired_difference_of_equal_answers_is_zero_wide():
    rows = [{"image": i, "task": "a", "correct": i % 2 == 0} for i in range(20)]
    weights = stats.draws(20, seed=0)
    a = stats.accuracy(stats.Hits(rows, list(range(20)), ["a"]), weights)
    assert stats.interval((a - a)[:, 0]) == (0.0, 0.0) and stats.interval(a[:, 0])[0] < 50 < stats.interval(a[:, 0])[1]


def test_region_is_the_cells_under_the_questions_boxes():
    for sample in samples("val", 70):
        region, wanted = sample.region((12, 12)), set()
        for box in sample.question.region:
            for token in range(144):
                top, left = token // 12 * 120, token % 12 * 120
                if box.left < left + 120 and box.right > left and box.top < top + 120 and box.bottom > top:
                    wanted.add(token)
        assert region == wanted


def test_the_region_of_planes_is_that_of_one_grid_and_of_its_tiles():
    from mllm_efficient.tokens import Plane

    halves = [Plane(3, 6, box=(0.0, 0.0, 0.5, 1.0)), Plane(3, 6, tile=1, box=(0.5, 0.0, 1.0, 1.0)), Plane(2, 2)]
    for sample in samples("val", 60):
        for grid in ((12, 12), (7, 5), (6, 6)):
            assert sample.region_of([Plane(*grid)]) == sample.region(grid)
        tiled = sample.region((6, 6)) | {36 + i for i in sample.region((2, 2))}
        assert sample.region_of(halves) == tiled
