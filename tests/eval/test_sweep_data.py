"""The sweep on a user's own requests: what it measures, what it keeps of a stopped run, cells that fail, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mllm_efficient.cli import main
from mllm_efficient.eval.agreement import Agreement
from mllm_efficient.eval.builtin.suite import samples
from mllm_efficient.measure.bench import Bench

QUICK = ["--device", "cpu", "--max-new-tokens", "3", "--batch-size", "4", "--no-bench"]
SPECS = ["none", "uniform:keep=0.25", "uniform:keep=0.0625", "random:keep=0.25", "resize:keep=0.25", "random:keep=0.0625"]
SPECS.append("resize:keep=0.0625")
BREAKS = """
from dataclasses import dataclass
import mllm_efficient as me

@me.register("breaks_if_told")
@dataclass(frozen=True)
class Breaks(me.Selector):
    '''Fails.'''

    def score(self, v):
        raise RuntimeError("it broke")
"""


def requests(folder: Path, answers: int, name: str = "requests.jsonl") -> Path:
    """Seven questions of the benchmark, of which so many have their answer; the last has no image."""
    lines = []
    for i, sample in enumerate(samples("val", 6)):
        sample.picture(144).save(folder / f"{i}.png")
        line = {"images": [f"{i}.png"], "prompt": sample.question.text}
        lines.append({**line, "answer": sample.question.answer} if i < answers else line)
    lines.append({"prompt": "what colour is it ?"})
    (folder / name).write_text("\n".join(map(json.dumps, lines)))
    return folder / name


def sweep(data: Path, folder: Path, *more: object) -> list[str]:
    argv = ["sweep", "--data", data, "--method", "uniform", "--keep", "0.25,0.0625", "--output-dir", folder, *QUICK, *more]
    return [str(a) for a in argv]


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Requests without answers."""
    return requests(tmp_path_factory.mktemp("data"), 0)


@pytest.fixture(scope="module")
def finished(data) -> Path:
    """A folder with a finished sweep over them."""
    assert main(sweep(data, data.parent / "finished")) == 0
    return data.parent / "finished"


def test_every_cell_has_what_eval_says_and_its_flops(finished, data, capsys):
    argv = ["eval", "--data", str(data), "--method", "uniform:keep=0.0625", "--device", "cpu", "--max-new-tokens", "3", "--batch-size", "4"]
    assert main([*argv, "--json"]) == 0
    theirs = json.loads(capsys.readouterr().out)
    rows, meta = report(finished)["rows"], report(finished)["meta"]
    assert [r["method"] for r in rows] == SPECS and [r["failed"] for r in rows] == [None] * len(SPECS)
    found = {r["metric"]: r for r in theirs["rows"] if r["method"] == SPECS[2] and r["task"] == "agreement"}
    for name in ("exact_match", "normalised_match", "first_divergence", "kl"):
        for key in ("score", "score_interval", "difference_interval", "n"):
            assert rows[2]["agreement"][name][key] == found[name][key]
    assert "accuracy" not in rows[2]["agreement"] and rows[2]["metric"] == "normalised_match"
    assert rows[2]["score"] == found["normalised_match"]["score"] <= 100 and rows[2]["visual_tokens_kept"] == 9
    assert rows[0]["flops_ratio"] == 1 and all(r["flops_ratio"] < 1 for r in rows[1:])
    assert meta["data"] == "../requests.jsonl" and theirs["meta"]["data"] == "requests.jsonl"  # from the run's folder, if it has one
    same = ("suite", "questions", "questions_fingerprint", "text_only", "with_answer", "max_new_tokens", "normalisation", "weights")
    assert {k: meta[k] for k in same} == {k: theirs["meta"][k] for k in same} and (meta["questions"], meta["text_only"]) == (7, 1)


def test_the_folder_holds_the_page_and_plots_against_agreement(finished, data):
    assert (finished / "agreement_flops.png").read_bytes()[:4] == b"\x89PNG" and not (finished / "accuracy_flops.png").exists()
    text = (finished / "report.html").read_text()
    far = {e["id"] for e in report(finished)["meta"]["worst"]}
    assert far and text.count("data:image/jpeg;base64,") == len(far) and "farthest from the uncompressed model" in text
    assert not (finished / "unfinished.json").exists()


def test_a_timed_sweep_has_times_and_says_how_it_decides(data, tmp_path, capsys):
    argv = [a for a in sweep(data, tmp_path, "--repeats", "1", "--warmup", "0", "--output-tokens", "2") if a != "--no-bench"]
    assert main(argv) == 0
    assert all(r["ttft_ms"]["n"] == 1 and r["peak_memory_mb"] for r in report(tmp_path)["rows"])
    out = capsys.readouterr().out
    assert out.index("same words [95%]") < out.index("TTFT ms") < out.index("Recommended (at least 99% answered in the uncompressed")
    assert "the cheapest whose lower 95% bound" in out


@pytest.mark.parametrize(("answers", "metric"), [(6, "accuracy"), (3, "normalised_match")])
def test_accuracy_counts_where_there_are_answers(tmp_path, capsys, answers, metric):
    data = requests(tmp_path, answers)
    assert main(sweep(data, tmp_path / "run", "--max-drop", "100")) == 0
    rows, meta = report(tmp_path / "run")["rows"], report(tmp_path / "run")["meta"]
    assert {r["metric"] for r in rows} == {metric} and {r["agreement"]["accuracy"]["n"] for r in rows} == {answers}
    assert (tmp_path / "run" / ("accuracy_flops.png" if answers == 6 else "agreement_flops.png")).exists()
    assert meta["recommendation"]["method"] == "resize:keep=0.0625"  # the cheapest, everything being admitted
    few = "at least 0% answered in the uncompressed model's words"
    rule = f"at most 100 points of right answers lost on the {answers} requests that have an answer" if answers == 6 else few
    out = capsys.readouterr().out
    assert f"Recommended ({rule}): resize:keep=0.0625: " in out and "measured on only 6 requests" in out


def test_a_stopped_sweep_says_how_far_it_came_and_goes_on(finished, data, tmp_path, capsys, monkeypatch):
    real, calls = Agreement.answers, []

    def stops(self, *args):
        calls.append(args)
        if len(calls) > 9:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(Agreement, "answers", stops)
    assert main(sweep(data, tmp_path)) == 130
    said = capsys.readouterr().err
    assert (
        f"stopped: 32 of 49 answers are finished: the same command goes on from what {tmp_path} holds" in said
        and "there already" not in said
    )
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"method": "none", "id"')  # torn by a kill
    capsys.readouterr()
    assert main(["report", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    # seven arms on the first four requests, two on the next two
    assert out == "" and f"{tmp_path} is unfinished: 32 of 49 answers; run the same sweep again: mllm-efficient sweep --" in err
    assert len(err.strip().splitlines()) == 1
    monkeypatch.setattr(Agreement, "answers", real)
    before = (tmp_path / "samples.jsonl").read_text().rpartition("\n")[0]
    assert main(sweep(data, tmp_path, "--batch-size", "3")) == 2
    assert "batch_size: 4 there, 3 now" in capsys.readouterr().err
    assert main(sweep(data, tmp_path)) == 0
    assert "32 of 49 answers are there already" in capsys.readouterr().err
    assert (tmp_path / "samples.jsonl").read_text().startswith(before) and report(tmp_path)["rows"] == report(finished)["rows"]


def test_nothing_finished_is_asked_again(finished, data, monkeypatch):
    monkeypatch.setattr(Agreement, "_ask", lambda *a: pytest.fail("asked again"))
    before = report(finished)["rows"]
    assert main(sweep(data, finished)) == 0 and report(finished)["rows"] == before


def test_a_failed_cell_is_shown_as_failed_and_ends_with_1(data, tmp_path, capsys):
    (tmp_path / "breaks.py").write_text(BREAKS)
    assert main(sweep(data, tmp_path / "run", "--method", "breaks_if_told", "--import", tmp_path / "breaks.py")) == 1
    out, err = capsys.readouterr()
    assert "failed: breaks_if_told:keep=0.25: 6 of 7 answers failed: RuntimeError: it broke" in err
    lines = [line.split() for line in out.splitlines() if line.strip().startswith("breaks_if_told")]
    assert lines == [["breaks_if_told:keep=0.25", "failed"], ["breaks_if_told:keep=0.0625", "failed"]]
    rows = {r["method"]: r for r in report(tmp_path / "run")["rows"]}
    assert rows["breaks_if_told:keep=0.25"]["score"] is None and rows["uniform:keep=0.25"]["score"] is not None
    assert "2 of 9 cells failed" in (tmp_path / "run" / "report.html").read_text()


def test_a_cell_whose_timing_fails_is_failed(data, tmp_path, capsys, monkeypatch):
    def broken(self, done=None):
        raise RuntimeError("no clock")

    monkeypatch.setattr(Bench, "run", broken)
    assert main([a for a in sweep(data, tmp_path, "--json") if a != "--no-bench"]) == 1
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert all(r["failed"] == "not timed: RuntimeError: no clock" and r["score"] is not None for r in rows)


def test_a_picture_that_has_moved_is_a_line_in_the_report_of_sweep_and_eval(tmp_path, capsys):
    data = requests(tmp_path, 0)
    assert main(sweep(data, tmp_path / "sweep")) == 0
    argv = ["eval", "--data", data, "--method", "uniform:keep=0.0625", "--output-dir", tmp_path / "eval", *QUICK[:-1]]
    assert main([str(a) for a in argv]) == 0
    capsys.readouterr()
    for run, name in (("sweep", "report.json"), ("eval", "results.json")):
        entries = json.loads((tmp_path / run / name).read_text())["meta"]["worst"]
        gone = tmp_path / entries[0]["images"][0]
        there = gone.read_bytes()
        for content in (None, b"no picture"):
            gone.unlink(missing_ok=True)
            if content is not None:
                gone.write_bytes(content)
            assert main(["report", str(tmp_path / run), "--format", "html"]) == 0
            html = capsys.readouterr().out
            assert html.count(f"picture not found: {gone.name}") == 1
            assert html.count("data:image/jpeg;base64,") == len({e["id"] for e in entries}) - 1
        gone.write_bytes(there)


def test_sweep_and_eval_on_the_same_requests_merge(finished, data, tmp_path, capsys):
    argv = ["eval", "--data", data, "--method", "divprune:keep=0.25", "--output-dir", tmp_path, *QUICK[:-1]]
    assert main([str(a) for a in argv]) == 0
    capsys.readouterr()
    assert main(["report", str(finished), str(tmp_path), "--json"]) == 0
    assert [r["method"] for r in json.loads(capsys.readouterr().out)["rows"]] == [*SPECS, "divprune:keep=0.25"]


def test_a_run_of_eval_without_images_is_one_line(tmp_path, capsys):
    (tmp_path / "words.jsonl").write_text('{"prompt": "what colour is it ?"}')
    assert main(["eval", "--data", str(tmp_path / "words.jsonl"), "--device", "cpu", "--output-dir", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert main(["report", str(tmp_path / "run")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.strip().splitlines()) == 1 and "no request has an image" in err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--suite", "builtin"], "--suite has no effect with --data"),
        (["--split", "test"], "--split has no effect with --data"),
        (["--turns", "2"], "No such option: --turns"),
        (["--limit", "0"], "--limit"),
        (["--data", "absent.jsonl"], "cannot read the data absent.jsonl: No such file"),
        (["--data", "words.jsonl"], "has an image, so there is nothing to compress"),
        (["--data", "broken.jsonl"], "broken.jsonl line 1: not JSON"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_what_cannot_be_asked_is_one_line_before_a_model_is_loaded(data, tmp_path, capsys, monkeypatch, more, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.jsonl").write_text('{"prompt": "what colour is it ?"}')
    (tmp_path / "broken.jsonl").write_text("{")
    monkeypatch.setattr("mllm_efficient.loading.models.load", lambda *a: pytest.fail("a model was loaded"))
    assert main(sweep(data, tmp_path / "run", *more)) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.strip().splitlines()) == 1 and says in err
    assert not (tmp_path / "run").exists()


def test_other_requests_in_the_folder_are_refused(finished, tmp_path, capsys):
    other = requests(tmp_path, 0)
    assert main(sweep(other, finished)) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert "holds another run (data: " in err and "another --output-dir" in err
