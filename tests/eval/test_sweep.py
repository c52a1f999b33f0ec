"""The sweep: its cells, what it measures, what it keeps of a killed run, cells that fail."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mllm_efficient.cli import main
from mllm_efficient.cli.sweep import budgets_of
from mllm_efficient.errors import MllmEfficientError
from mllm_efficient.eval import sweep
from mllm_efficient.eval.builtin.questions import CATEGORIES
from mllm_efficient.eval.record.bench_file import BenchFile, owned
from mllm_efficient.eval.runner import Run
from mllm_efficient.eval.sweeping import middle
from mllm_efficient.loading.models import ModelOptions, load
from mllm_efficient.measure.bench import Bench
from mllm_efficient.measure.workload import Workload

QUICK = ["--device", "cpu", "--split", "val", "--limit", "14", "--repeats", "1", "--warmup", "0", "--output-tokens", "2"]


@pytest.fixture(scope="module")
def loaded():
    return load(ModelOptions(device="cpu"))


@pytest.fixture(scope="module")
def flops(loaded):
    return sweep.Flops(loaded, Workload(output_tokens=4))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder in which two methods were swept at two budgets."""
    folder = tmp_path_factory.mktemp("sweep") / "run"
    argv = ["sweep", "--method", "divprune", "--method", "pool:keep=0.5", "--keep", "0.25", "--output-dir", str(folder), *QUICK]
    assert main(argv) == 0
    return folder


def specs(cells) -> list[str]:
    return [c.spec for c in cells]


def fails(capsys, *argv: object) -> str:
    """Runs a command that must end with exit code 2 and its error as the last line; returns that."""
    assert main([str(a) for a in argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("mllm-efficient: ")
    return last


# ------------------------------------------------------------------------------------------------------ cells


def test_methods_without_a_budget_are_crossed_and_references_stand_at_every_budget():
    cells = sweep.cross(["divprune:metric=l2", "pool:tokens=16"], ["keep=0.5", "keep=0.25"])
    assert specs(cells)[:4] == ["none", "divprune:keep=0.5,metric=l2", "divprune:keep=0.25,metric=l2", "pool:tokens=16"]
    references = {f"{m}:{b}" for m in ("random", "resize") for b in ("keep=0.5", "keep=0.25", "tokens=16")}
    assert set(specs(cells)[4:]) == references and len(cells) == 10
    assert [c.role for c in cells] == ["baseline"] + ["method"] * 3 + ["reference"] * 6


def test_named_references_and_none_are_not_doubled():
    cells = sweep.cross(["none", "random", "resize", "random:keep=0.5"], ["keep=0.5"])
    assert specs(cells) == ["none", "random:keep=0.5", "resize:keep=0.5"] and [c.role for c in cells] == ["baseline", "method", "method"]


def test_a_yaml_file_is_crossed_too(tmp_path):
    bare, full = tmp_path / "bare.yaml", tmp_path / "full.yaml"
    bare.write_text("method: divprune\nmetric: l2\n")
    full.write_text("method: uniform\nkeep: 0.125\n")
    cells = sweep.cross([str(bare), str(full)], ["tokens=36"])
    assert specs(cells)[1:3] == ["divprune:tokens=36,metric=l2", "uniform:keep=0.125"] and "random:keep=0.125" in specs(cells)


def test_a_method_without_any_budget_is_an_error():
    with pytest.raises(MllmEfficientError, match="has no budget: give --keep"):
        sweep.cross(["divprune"], [])


@pytest.mark.parametrize(
    ("keep", "tokens", "wanted"), [("1,0.5", None, ["keep=1", "keep=0.5"]), (None, "64, 32", ["tokens=64", "tokens=32"])]
)
def test_budgets_are_lists(keep, tokens, wanted):
    assert budgets_of(keep, tokens) == wanted


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--keep", "0.5", "--tokens", "64"], "give one of them"),
        (["--keep", "half"], "not a list of numbers"),
        (["--keep", "0.5,"], "not a list of numbers"),
        (["--keep", "1.5"], "outside (0, 1]"),
        (["--tokens", "0.5"], "not a list of numbers"),
        (["--tokens", "200"], "more than the 144"),
        ([], "has no budget"),
        (["--keep", "0.5", "--suite", "pope"], "unknown suite"),
        (["--keep", "0.5", "--split", "train"], "unknown split"),
        (["--keep", "0.5", "--max-new-tokens", "3"], "--max-new-tokens has no effect on the embedded benchmark"),
        (["--keep", "0.5", "--match", "time"], "--match time is not known"),
        (["--keep", "0.5", "--method", "divprun"], "did you mean 'divprune'"),
        (["--keep", "0.5", "--method", "divprune:per=tile"], "has no effect"),
        (["--keep", "0.5", "--text-tokens", "1"], "at least"),
    ],
    ids=lambda v: " ".join(v) or "no budget" if isinstance(v, list) else "",
)  # fmt: skip
def test_bad_input_is_one_line(capsys, tmp_path, argv, says):
    assert says in fails(capsys, "sweep", "--method", "divprune", "--device", "cpu", "--output-dir", tmp_path / "run", *argv)


def test_a_folder_that_cannot_be_written_is_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write" in fails(capsys, "sweep", "--method", "pool", "--keep", "0.5", "--output-dir", tmp_path / "file")


# ------------------------------------------------------------------------------------------------------ FLOPs


def test_matching_is_the_identity_for_what_drops_tokens(flops):
    for cell in sweep.cross(["divprune", "uniform"], ["keep=0.25", "keep=0.098"]):
        if cell.method.name in ("divprune", "uniform", "random"):
            assert flops.match(cell) == cell


@pytest.mark.parametrize("budget", ["keep=0.125", "tokens=18", "tokens=37"])
def test_matching_finds_the_nearest_of_all_grids(flops, budget):
    target = flops.pure_drop(sweep.cross(["random"], [budget])[1].method).prefill
    for cell in sweep.cross(["pool", "resize"], [budget])[1:]:
        if cell.method.name == "random":
            continue
        every = [flops.of(sweep.runnable(f"{cell.method.name}:tokens={t}")).prefill for t in range(1, 145)]
        found = flops.match(cell)
        assert abs(flops.of(found.method).prefill - target) == min(abs(v - target) for v in every)
        assert found.asked == budget and (found.method.tokens is None) == budget.startswith("keep")


def test_flops_of_a_cell_count_all_new_tokens(flops):
    assert flops.baseline.decode > 0 and flops.baseline.visual_tokens_full == 144


# ------------------------------------------------------------------------------------------------------ a whole run


def test_every_cell_has_everything(finished):
    report = json.loads((finished / "report.json").read_text())
    rows, meta = report["rows"], report["meta"]
    assert [r["method"] for r in rows] == [
        "none", "divprune:keep=0.25", "pool:keep=0.5", "random:keep=0.25", "resize:keep=0.25", "random:keep=0.5", "resize:keep=0.5",
    ]  # fmt: skip
    for r in rows:
        assert r["failed"] is None and list(r["tasks"]) == list(CATEGORIES) and r["n"] == 14
        assert r["score_interval"][0] <= r["score"] <= r["score_interval"][1] and r["retention"] is not None
        for name in ("vision_ms", "compress_ms", "prefill_ms", "ttft_ms", "tpot_ms", "e2e_ms", "tokens_per_s"):
            assert set(r[name]) == {"median", "q1", "q3", "n"}
        assert r["ttft_ratio"]["low"] <= r["ttft_ratio"]["median"] and r["kv_cache_mb"] == pytest.approx(
            r["kv_cache_mb_computed"], rel=1e-3
        )
        assert r["total_tflops"] == pytest.approx(sum(r[f"{p}_tflops"] for p in ("vision", "compress", "prefill", "decode")))
    assert rows[0]["flops_ratio"] == 1 and rows[0]["visual_tokens_kept"] == 144 and rows[1]["visual_tokens_kept"] == 36
    assert all(r["flops_ratio"] < 1 for r in rows[1:]) and rows[4]["vision_tflops"] < rows[0]["vision_tflops"]
    assert meta["recommendation"]["method"] in {r["method"] for r in rows} and meta["command"].startswith("mllm-efficient sweep --")
    assert {"versions", "device", "dtype", "attention", "seed", "weights", "image_processor"} <= set(meta)


def test_accuracy_is_what_eval_says(finished, tmp_path, capsys):
    assert main(["eval", "--method", "divprune:keep=0.25", "--device", "cpu", "--split", "val", "--limit", "14", "--json"]) == 0
    theirs = [r for r in json.loads(capsys.readouterr().out)["rows"] if r["method"] == "divprune:keep=0.25"]
    own = json.loads((finished / "report.json").read_text())["rows"][1]
    assert {r["task"]: r["score"] for r in theirs if r["task"] != "overall"} == {t: v["score"] for t, v in own["tasks"].items()}
    assert (theirs[-1]["score"], theirs[-1]["difference_interval"]) == (own["score"], own["difference_interval"])


def test_the_folder_holds_report_plots_and_pictures(finished):
    for name in ("report.html", "report.csv", "accuracy_flops.png", "accuracy_ttft.png", "categories.png"):
        assert (finished / name).stat().st_size > 1000
    pictures = json.loads((finished / "pictures.json").read_text())
    assert pictures["budget"] == "keep=0.25" and len(pictures["samples"]) == 2  # one of each image
    for sample in pictures["samples"]:
        assert [m["method"] for m in sample["methods"]] == ["divprune:keep=0.25", "random:keep=0.25", "resize:keep=0.25"]
        assert all(len(m["views"]) == 1 for m in sample["methods"])
    html = (finished / "report.html").read_text()
    assert html.count("data:image/jpeg") == 8 and html.count("data:image/png") == 6


def test_the_text_ends_with_categories_recommendation_and_path(finished, capsys):
    argv = ["--method", "divprune", "--method", "pool:keep=0.5", "--keep", "0.25", "--output-dir", str(finished), *QUICK]
    assert main(["sweep", *argv]) == 0
    out = capsys.readouterr().out
    assert out.index("FLOPs") < out.index("no-image") < out.index("Recommended (at most 1 point lost): ") < out.index("Report: ")
    assert "lost): keep the uncompressed model: no method and budget here is sure of that" in out and "--method none" not in out
    assert main(["sweep", *argv, "--max-drop", "100"]) == 0
    out = capsys.readouterr().out
    assert f"\n  --method {json.loads((finished / 'report.json').read_text())['meta']['recommendation']['method']}\n" in out


def test_nothing_finished_is_done_again(finished, capsys, monkeypatch):
    answers, timings = (finished / "samples.jsonl").read_bytes(), (finished / "bench.jsonl").read_bytes()
    monkeypatch.setattr(Run, "_ask", lambda *a: pytest.fail("asked again"))
    monkeypatch.setattr(Bench, "run", lambda *a: pytest.fail("timed again"))
    before = json.loads((finished / "report.json").read_text())["rows"]
    argv = ["--method", "divprune", "--method", "pool:keep=0.5", "--keep", "0.25", "--output-dir", str(finished), *QUICK, "--json"]
    with (finished / "bench.jsonl").open("ab") as file:
        file.write(b'{"fingerprint": "torn')
    assert main(["sweep", *argv]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == before
    assert ((finished / "samples.jsonl").read_bytes(), (finished / "bench.jsonl").read_bytes()) == (answers, timings)


def test_a_new_method_is_added_to_what_is_there(finished, capsys):
    lines = (finished / "bench.jsonl").read_text().splitlines()
    argv = ["--method", "divprune", "--method", "uniform", "--keep", "0.25", "--output-dir", str(finished), *QUICK, "--json"]
    assert main(["sweep", *argv]) == 0
    assert "uniform:keep=0.25" in {r["method"] for r in json.loads(capsys.readouterr().out)["rows"]}
    now = (finished / "bench.jsonl").read_text().splitlines()
    assert now[: len(lines)] == lines and [json.loads(line)["method"] for line in now[len(lines) :]] == ["uniform:keep=0.25"]


def test_timings_of_other_settings_are_passed_over(tmp_path):
    def config(repeats: int) -> dict:
        return {"repeats": repeats}

    BenchFile(tmp_path, config(1)).add([{"method": "none", "failed": None}, {"method": "pool", "failed": "no"}], {"clock": "c"})
    assert list(BenchFile(tmp_path, config(1)).rows) == ["none"] and BenchFile(tmp_path, config(1)).about == {"clock": "c"}
    assert BenchFile(tmp_path, config(2)).rows == {}
    with (tmp_path / "bench.jsonl").open("a") as file:
        file.write("nonsense\n")
    with pytest.raises(MllmEfficientError, match="line 2 is no record of a sweep"):
        BenchFile(tmp_path, config(1))


def test_another_configuration_in_the_folder_is_refused(finished, capsys):
    said = fails(capsys, "sweep", "--method", "pool", "--keep", "0.5", "--output-dir", finished, *QUICK, "--dtype", "bfloat16")
    assert "holds another run" in said and "dtype" in said


def test_one_process_owns_the_folder(tmp_path, capsys):
    with (tmp_path / "sweep.lock").open("w") as held:
        held.write("4711")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        said = fails(capsys, "sweep", "--method", "pool", "--keep", "0.5", "--output-dir", tmp_path)
    assert "process 4711 is writing to" in said and "another --output-dir" in said
    with owned(tmp_path):
        assert (tmp_path / "sweep.lock").read_text() == str(os.getpid())


def test_a_failed_cell_is_shown_and_the_others_go_on(tmp_path, capsys):
    bad = tmp_path / "bad.py"
    bad.write_text(
        "from dataclasses import dataclass\nimport mllm_efficient as me\n"
        "@me.register('breaks')\n@dataclass(frozen=True)\nclass Breaks(me.Selector):\n"
        "    '''Breaks.'''\n    def score(self, v):\n        raise RuntimeError('it broke')\n"
    )
    argv = [
        "--method",
        "breaks",
        "--method",
        "uniform",
        "--keep",
        "0.25",
        "--import",
        str(bad),
        "--output-dir",
        str(tmp_path / "run"),
        *QUICK,
    ]
    assert main(["sweep", *argv]) == 1
    out, err = capsys.readouterr()
    assert "failed: breaks:keep=0.25: 14 of 14 answers failed: RuntimeError: it broke" in err
    (line,) = [line.split() for line in out.splitlines() if line.strip().startswith("breaks")]
    assert line == ["breaks:keep=0.25", "failed"]
    rows = {r["method"]: r for r in json.loads((tmp_path / "run" / "report.json").read_text())["rows"]}
    assert rows["breaks:keep=0.25"]["score"] is None and rows["uniform:keep=0.25"]["ttft_ms"] is not None
    assert "1 of 5 cells failed" in (tmp_path / "run" / "report.html").read_text()


def test_a_cell_whose_timing_fails_is_failed(tmp_path, capsys, monkeypatch):
    def broken(self, done=None):
        raise RuntimeError("no clock")

    monkeypatch.setattr(Bench, "run", broken)
    assert main(["sweep", "--method", "uniform:keep=0.25", "--output-dir", str(tmp_path), *QUICK, "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert all(r["failed"] == "not timed: RuntimeError: no clock" and r["score"] is not None for r in rows)


def test_no_bench_leaves_times_out_and_match_says_what_was_asked(tmp_path, capsys):
    argv = ["--method", "pool", "--keep", "0.125", "--match", "flops", "--no-bench", "--output-dir", str(tmp_path), *QUICK]
    assert main(["sweep", *argv, "--json"]) == 0
    rows = {r["method"]: r for r in json.loads(capsys.readouterr().out)["rows"]}
    pool = next(r for m, r in rows.items() if m.startswith("pool"))
    assert pool["asked"] == "keep=0.125" and pool["ttft_ms"] is None and not (tmp_path / "bench.jsonl").exists()
    assert rows["random:keep=0.125"]["prefill_flops_ratio"] == pool["prefill_flops_ratio_asked"]
    assert abs(pool["prefill_flops_ratio"] - pool["prefill_flops_ratio_asked"]) < 0.02
    assert "Time to first token" not in (tmp_path / "report.html").read_text()


@pytest.mark.once
@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(tmp_path):
    argv = ["--method", "uniform", "--keep", "0.5,0.25", "--output-dir", str(tmp_path / "run"), *QUICK[:-4], "--output-tokens", "2"]
    command = [sys.executable, "-m", "mllm_efficient", "sweep", *argv]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[2])
    timings = tmp_path / "run" / "bench.jsonl"
    deadline = time.monotonic() + 120
    while not (timings.exists() and timings.stat().st_size) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    answers, kept = (tmp_path / "run" / "samples.jsonl").read_bytes(), timings.read_bytes()
    assert kept.count(b"\n") >= 4  # the baseline and one budget
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "samples.jsonl").read_bytes() == answers and timings.read_bytes().startswith(kept)
    assert "Report: " in done.stdout


def test_the_budget_shown_is_the_one_most_methods_ran_at():
    def row(asked: str, kept: int) -> dict:
        return {"asked": asked, "visual_tokens_kept": kept, "visual_tokens_full": 144, "score": 1}

    assert middle([row("keep=0.5", 72), row("keep=0.25", 36), row("keep=0.125", 18)]) == "keep=0.25"
    assert middle([row("keep=0.5", 72), row("keep=0.5", 64), row("keep=0.25", 36)]) == "keep=0.5"
    assert middle([row("", 144)]) == ""
