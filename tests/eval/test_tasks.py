"""Tasks through lmms-eval: the light runner's scores, failures and bad input, resuming, tables, sweeps, servers, processes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import mllm_efficient as me
from mllm_efficient.cli import main
from mllm_efficient.loading.models import ModelOptions, load

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="needs lmms-eval: make test-integration")
CATEGORIES = ("object", "attribute", "count", "position", "presence", "reading", "comparison")
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def evaluate(capsys, *arguments):
    """Exit code, the JSON object, what was said beside it."""
    code = main(["eval", *map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else None, err


def overall(rows, method, task):
    return next(r for r in rows if (r["method"], r["task"], r["primary"]) == (method, task, True))


@pytest.fixture(scope="module")
def light(tmp_path_factory):
    """The light runner's rows for none and divprune, 147 questions."""
    folder = tmp_path_factory.mktemp("light")
    assert main(["eval", "--method", "divprune:keep=0.25", "--limit", "147", "--output-dir", str(folder)]) == 0
    return json.loads((folder / "results.json").read_text())["rows"]


@pytest.fixture
def odd_pictures(tmp_path, monkeypatch):
    """``odd_pictures(task, floats)``: a data root with pictures of unusual modes for a task, and their files."""
    import dataclasses

    from PIL import Image

    from ..modes import write
    from ..public_data import FIXTURES, STOCK, make

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def prepare(task, floats):
        paths = write(tmp_path, 144, floats)
        usual = FIXTURES[STOCK.get(task, task)]
        rows = [{**usual.rows()[0], "id": f"q{i}", "question_id": str(i), "imageId": f"n{i}"} for i in range(len(paths))]
        pictures = [{"id": f"n{i}", "image": Image.open(path)} for i, path in enumerate(paths)]
        rows = [{**row, "image": picture["image"]} if "image" in usual.rows()[0] else row for row, picture in zip(rows, pictures)]
        more = {name: lambda: pictures for name in usual.more}
        monkeypatch.setitem(FIXTURES, STOCK.get(task, task), dataclasses.replace(usual, rows=lambda: rows, more=more))
        make(tmp_path / "data", [task])
        return tmp_path / "data", paths

    return prepare


@pytest.mark.filterwarnings("ignore:.* is nearly black")
@pytest.mark.parametrize("image_range", ["full", "auto"])
@pytest.mark.parametrize("task", ["me_pope", "me_gqa"])
def test_a_run_sees_the_pixels_of_the_rule(capsys, odd_pictures, monkeypatch, task, image_range):
    """Of pictures in the samples, and in a table that a task reads by itself; both tasks make them RGB in their own way."""
    from mllm_efficient.media.images import load_image

    from ..modes import pixels_seen

    root, paths = odd_pictures(task, floats=image_range == "auto")
    seen = pixels_seen(monkeypatch)
    code, found, err = evaluate(capsys, "--tasks", task, "--data-root", root, "--image-range", image_range)
    assert code == 0 and found["meta"]["questions"] == len(paths), err
    assert set(seen) == {np.asarray(load_image(path, image_range)).tobytes() for path in paths}


@pytest.mark.filterwarnings("ignore:.* is nearly black")
def test_a_floating_point_picture_is_a_failed_sample_that_says_what_to_do(capsys, odd_pictures):
    root, paths = odd_pictures("me_pope", floats=True)
    code, found, err = evaluate(capsys, "--tasks", "me_pope", "--data-root", root)
    assert code == 1 and overall(found["rows"], "none", "me_pope")["failures"] == 1
    assert "has floating-point values" in err and f"1 of {len(paths)} answers failed" in err


# ------------------------------------------------------------------------------------------------------ equal scores


def test_our_command_gives_the_light_runners_scores(light, capsys, tmp_path):
    """Each category, the macro and the micro mean, and the tokens kept."""
    methods = ("--method", "divprune:keep=0.25", "--method", "random:keep=0.25")
    code, found, _ = evaluate(capsys, "--tasks", "me_builtin", *methods, "--limit", 147, "--batch-size", 32)
    assert code == 0
    rows = {(r["method"], r["metric"]): r for r in found["rows"] if r["task"] == "me_builtin"}
    for method in ("none", "divprune:keep=0.25"):
        for row in (r for r in light if r["method"] == method):
            name = "macro" if row["task"] == "overall" else row["task"]
            own = rows[method, name]
            assert (own["score"], own["visual_tokens_kept"]) == (row["score"], row["visual_tokens_kept"])
            if name == "macro":
                assert rows[method, "micro"]["score"] == row["micro"]
                assert (own["ece"], own["aurc"]) == (row["ece"], row["aurc"]) and own["ece_interval"][0] < own["ece"]
    assert main(["eval", "--method", "random:keep=0.25", "--limit", "147", "--json"]) == 0  # draws by the same keys
    rnd = next(r for r in json.loads(capsys.readouterr().out)["rows"] if r["method"].startswith("random") and r["task"] == "overall")
    assert rows["random:keep=0.25", "macro"]["score"] == rnd["score"]


@pytest.mark.slow
def test_python_m_lmms_eval_gives_the_light_runners_scores(light, tmp_path):
    """With nothing but the entry point: every parameter its own key, counts of every sample in lmms-eval's own log."""
    include = subprocess.run(
        [sys.executable, "-m", "mllm_efficient.eval.lmms.tasks"], env=ENVIRONMENT, capture_output=True, text=True, check=True
    ).stdout.strip()
    arguments = [
        "--model",
        "mllm_efficient",
        "--model_args",
        "pretrained=builtin,device=cpu,method=divprune,keep=0.25",
    ]
    arguments += ["--tasks", "me_builtin", "--include_path", include, "--limit", "147", "--batch_size", "32", "--log_samples"]
    subprocess.run(
        [sys.executable, "-m", "lmms_eval", *arguments, "--output_path", str(tmp_path)],
        env=ENVIRONMENT, cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    (file,) = tmp_path.rglob("*_results.json")
    results = json.loads(file.read_text())["results"]["me_builtin"]
    for row in (r for r in light if r["method"] == "divprune:keep=0.25"):
        value = results[f"{'macro' if row['task'] == 'overall' else row['task']},none"]
        assert round(100 * value, 2) == row["score"]
    (file,) = tmp_path.rglob("*_samples_me_builtin.jsonl")
    counts = [json.loads(line)["token_counts"][0] for line in file.read_text().splitlines()]
    assert len(counts) == 147
    for count in counts:
        assert (count["visual_tokens_full"], count["visual_tokens_kept"]) == (144, 36)
        assert count["prompt_tokens_full"] - count["input_tokens"] == 108
        assert count["latency_s"] > 0


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(capsys, tmp_path):
    """An odd number of samples, so that one process is padded; answers of both are in the folder, and in the cache."""
    asked = ["--tasks", "me_builtin", "--method", "divprune:keep=0.25", "--limit", "43", "--batch-size", "4", "--device", "cpu"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "mllm_efficient"]
    run = subprocess.run(
        [*launch, "eval", *asked, "--cache", str(tmp_path / "cache"), "--output-dir", str(tmp_path / "two"), "--json"],
        env={**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    two = json.loads(run.stdout)
    code, one, _ = evaluate(capsys, *asked)
    assert code == 0 and two["meta"]["processes"] == 2 and two["meta"]["model_calls"] == one["meta"]["model_calls"] == 129
    code, again, _ = evaluate(capsys, *asked, "--cache", tmp_path / "cache")
    assert code == 0 and again["meta"]["model_calls"] == 0
    timeless = [{k: v for k, v in r.items() if "interval" not in k} for r in two["rows"]]
    assert timeless == [{k: v for k, v in r.items() if "interval" not in k} for r in one["rows"]]
    assert [r["difference_interval"] for r in two["rows"]] == [r["difference_interval"] for r in one["rows"]]


def test_keep_1_and_batches_answer_like_the_model(capsys, tmp_path):
    runs = {"a": ("divprune:keep=1", 4), "b": ("none", 1)}
    answers = {}
    for name, (method, size) in runs.items():
        folder = tmp_path / name
        assert (
            evaluate(capsys, "--tasks", "me_builtin", "--method", method, "--limit", 21, "--batch-size", size, "--output-dir", folder)[0]
            == 0
        )
        lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        answers[name] = {r["id"]: r["answer"] for r in lines if r["method"] == method and "metrics" not in r}
    assert len(answers["a"]) == 21 and answers["a"] == answers["b"]


# ---------------------------------------------------------------------------------------------------- rows and tables


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with its folder: none, divprune and uniform at a quarter, resize beside them."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    methods = ["--method", "divprune:keep=0.25", "--method", "uniform:tokens=36"]
    assert main(["eval", "--tasks", "me_builtin", *methods, "--limit", "140", "--batch-size", "32", "--output-dir", str(folder)]) == 0
    return folder, json.loads((folder / "results.json").read_text())


def test_hard_is_the_score_where_the_baseline_is_right_and_resize_wrong(finished):
    """From the answers in the folder, by hand; resize at the same budget stands beside every method."""
    folder, found = finished
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    right = {}
    for r in lines:
        if "metrics" not in r:
            right.setdefault(r["method"], {})[r["id"]] = r["answer"].split()[0] == r["expected"] if r["answer"] else False
    for method, resize in (("divprune:keep=0.25", "resize:keep=0.25"), ("uniform:tokens=36", "resize:tokens=36")):
        hard = [i for i in right["none"] if right["none"][i] and not right[resize][i]]
        row = overall(found["rows"], method, "me_builtin")
        assert row["hard_n"] == len(hard) > 10
        assert row["hard"] == round(100 * sum(right[method][i] for i in hard) / len(hard), 2)
    assert overall(found["rows"], "none", "me_builtin")["hard"] is None
    assert overall(found["rows"], "resize:keep=0.25", "me_builtin")["hard"] is None
    assert {r["role"] for r in found["rows"] if r["method"].startswith("resize")} == {"reference"}


def test_rows_add_up(finished):
    _, found = finished
    assert found["rows"][0]["method"] == "none" and found["rows"][0]["role"] == "baseline"
    for r in found["rows"]:
        if r["task"] == "me_builtin":
            base = next(b for b in found["rows"] if (b["method"], b["task"], b["metric"]) == ("none", "me_builtin", r["metric"]))
            assert r["baseline"] == base["score"] and r["score"] == round(100 * r["value"], 2)
            assert r["difference"] == pytest.approx(r["score"] - base["score"], abs=0.011)
            assert r["retention"] == pytest.approx(100 * r["score"] / base["score"], abs=0.02)
            assert (r["n"], r["failures"], r["failed"]) == (140, 0, None)
    total = overall(found["rows"], "divprune:keep=0.25", "overall")
    only = overall(found["rows"], "divprune:keep=0.25", "me_builtin")
    assert [total[k] for k in ("score", "retention", "difference", "n")] == [only[k] for k in ("score", "retention", "difference", "n")]
    low, high = only["difference_interval"]
    assert low < only["difference"] < high < 0


def test_a_metric_over_resamples_is_that_of_a_plain_bootstrap_of_pictures():
    """On the scores of made-up samples of 20 pictures, for a mean and for a metric that is none."""
    from mllm_efficient import stats
    from mllm_efficient.eval.lmms.scores import clustered

    pictures = [i // 3 for i in range(60)]
    scores = np.random.default_rng(0).integers(0, 2, 60).astype(float).tolist()
    parts = clustered(None, scores, pictures, np.mean(scores), 1.0)
    right, asked = stats.sums(np.array([parts.right, parts.asked]).T).T
    picks = [row for block in stats.picks(20) for row in block]
    assert parts.drawn is None and np.allclose(
        right / asked, [np.mean([scores[3 * p + j] for p in row for j in range(3)]) for row in picks]
    )
    pairs = [{"question_id": f"q{i // 2}", "score": float(i % 3 > 0), "category": "count"} for i in range(40)]

    def points(items):
        by: dict[str, list[float]] = {}
        for item in items:
            by.setdefault(item["question_id"], []).append(item["score"])
        assert all(len(p) == 2 for p in by.values()) and len(by) == 20  # pairs stay together, drawn twice they are two
        return 100 * sum(sum(p) / 2 + (sum(p) == 2) for p in by.values()) / len(by)

    again = clustered(points, pairs, [i // 4 for i in range(40)], points(pairs), 2000.0).drawn
    slow = [
        points([{**pairs[4 * p + j], "question_id": f"{t} {j // 2}"} for t, p in enumerate(r) for j in range(4)])
        for r in next(stats.picks(10))
    ]
    assert len(again) == stats.RESAMPLES and again[:100] == pytest.approx(slow)
    captions = clustered(points, [{"pred": "a", "answer": ["b"], "image_id": 1}, "text"], [0, 1], 1.0, None)
    assert captions.drawn is None and captions.why == "there is no score of a single answer"


def test_the_folder_resumes_without_a_call_and_keeps_what_it_has(finished, capsys, monkeypatch):
    from mllm_efficient.eval.lmms.model import ModelAsker

    folder, found = finished
    before = (folder / "samples.jsonl").read_bytes()
    monkeypatch.setattr(ModelAsker, "answers", None)
    methods = ["--method", "divprune:keep=0.25", "--method", "uniform:tokens=36"]
    code, again, _ = evaluate(capsys, "--tasks", "me_builtin", *methods, "--limit", 140, "--batch-size", 32, "--output-dir", folder)
    assert code == 0 and again["rows"] == found["rows"] and again["meta"]["model_calls"] == 0
    assert (folder / "samples.jsonl").read_bytes() == before
    code, _, err = evaluate(capsys, "--tasks", "me_builtin", "--limit", 14, "--output-dir", folder)
    assert code == 2 and "holds another run" in err and "limit: 140 there, 14 now" in err
    assert (folder / "samples.jsonl").read_bytes() == before


def test_a_second_run_with_the_cache_makes_no_call_and_another_ratio_makes_all(capsys, tmp_path, monkeypatch):
    from mllm_efficient.eval.lmms.model import ModelAsker

    asked = ("--tasks", "me_builtin", "--limit", 14, "--batch-size", 8, "--cache", tmp_path / "cache")
    code, first, _ = evaluate(capsys, *asked, "--method", "divprune:keep=0.25")
    assert code == 0 and first["meta"]["model_calls"] == 42
    with monkeypatch.context() as patched:
        patched.setattr(ModelAsker, "answers", None)
        code, second, _ = evaluate(capsys, *asked, "--method", "divprune:keep=0.25")
    assert code == 0 and second["meta"]["model_calls"] == 0 and second["rows"] == first["rows"]
    code, third, _ = evaluate(capsys, *asked, "--method", "divprune:keep=0.5")
    assert third["meta"]["model_calls"] == 28  # divprune and resize; none is known


def test_report_and_sweep_take_tasks(finished, capsys, tmp_path):
    folder, _ = finished
    assert main(["report", str(folder), "--format", "md"]) == 0
    out = capsys.readouterr().out
    assert "tasks me_builtin, 140 questions" in out and "divprune:keep=0.25" in out
    assert main(["report", str(folder), "--format", "html", "--output", str(tmp_path / "r.html")]) == 0
    swept = tmp_path / "sweep"
    command = [
        "sweep",
        "--tasks",
        "me_builtin",
        "--method",
        "divprune",
        "--keep",
        "0.5,0.25",
        "--limit",
        "70",
        "--batch-size",
        "32",
        "--no-bench",
    ]
    assert main([*command, "--output-dir", str(swept)]) == 0
    assert "wrong, and how many those are" in " ".join(capsys.readouterr().out.split())
    report = json.loads((swept / "report.json").read_text())
    rows = {r["method"]: r for r in report["rows"]}
    assert {"none", "divprune:keep=0.5", "divprune:keep=0.25", "random:keep=0.5", "resize:keep=0.25"} <= rows.keys()
    assert all(r["tasks"].keys() == {"me_builtin"} and r["flops_ratio"] is not None for r in rows.values())
    assert rows["divprune:keep=0.25"]["difference_interval"] is not None
    assert report["meta"]["recommendation"]["line"]
    assert (swept / "report.html").is_file()


def test_published_numbers_stand_beside_ours(capsys):
    from mllm_efficient.eval.lmms import suites
    from mllm_efficient.eval.lmms.tables import beside

    table = suites.read("references", "divprune-table1")
    row = {"primary": True, "top": 1.0, "visual_tokens_kept": 64.0, "visual_tokens_full": 576.0}
    rows = [
        {**row, "method": "none", "task": "me_gqa", "metric": "exact_match", "value": 0.6, "score": 60.0},
        {**row, "method": "divprune:tokens=64", "task": "me_mme", "metric": "perception", "value": 1300.0, "score": 65.0, "top": 2000.0},
        {**row, "method": "divprune:tokens=64", "task": "me_builtin", "metric": "macro", "value": 1, "score": 100.0},
        {**row, "method": "pool:tokens=64", "task": "me_gqa", "metric": "exact_match", "value": 0.5, "score": 50.0},
        {**row, "method": "divprune:tokens=64", "task": "coco2017_cap_val", "metric": "coco_CIDEr", "value": 0.97, "score": 97.0},
    ]
    found = [(b["task"], b["method"], b["ours"], b["published"], b["difference"]) for b in beside(rows, table)]
    assert found == [
        ("GQA", "none", 60.0, 61.96, -1.96), ("MME", "divprune:tokens=64", 1300.0, 1328, -28.0),
        ("COCO", "divprune:tokens=64", 97.0, 96, 1.0),
    ]  # fmt: skip
    counted = suites.read("references", "mmtok-table16")
    rows = [{**rows[0], "method": f"divprune:tokens={k}", "visual_tokens_kept": float(k)} for k in (192, 64, 100)]
    assert [(b["method"], b["published"], b["published_kept"]) for b in beside(rows, counted)] == [
        ("divprune:tokens=192", 59.97, 33.33), ("divprune:tokens=64", 57.78, 11.11)
    ]  # fmt: skip
    assert evaluate(capsys, "--tasks", "me_builtin", "--limit", 7, "--reference", "divprune-table1")[0] == 2
    assert evaluate(capsys, "--tasks", "me_builtin", "--limit", 7, "--reference", "divprune-table2")[0] == 2


def test_suites_and_references_name_tasks_that_are_there_with_their_metrics():
    from mllm_efficient.eval.lmms import suites
    from mllm_efficient.eval.lmms.host import Host
    from mllm_efficient.eval.lmms.scores import known

    host = Host()
    for suite in suites.names("suites"):
        assert set(suites.read("suites", suite)["tasks"]) <= known().keys()
    for reference in suites.names("references"):
        content = suites.read("references", reference)
        assert content["tasks"].keys() <= known().keys() and content["source"].startswith("https://")
        assert all(row.keys() <= set(content["tasks"].values()) for row in content["rows"].values())
    assert len(suites.read("suites", "divprune-paper")["tasks"]) == 11
    for name, entry in known().items():
        metrics = [m["metric"] for m in host.manager(name)._get_config(name)["metric_list"]]
        assert entry.metric in metrics and entry.top.keys() <= set(metrics), name


# -------------------------------------------------------------------------------------------- failures and bad input


def own_task(folder: Path, images, results="!function utils.results"):
    """A task of one's own in a folder, with images given as bytes or arrays."""
    import io

    from datasets import Dataset, Features, Value
    from datasets import Image as Column
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for image in images:
        if not isinstance(image, bytes):
            data = io.BytesIO()
            Image.fromarray(image).save(data, "PNG")
            image = data.getvalue()
        pictures.append({"bytes": image, "path": None})
    features = Features(question=Value("string"), answer=Value("string"), image=Column(decode=False))
    columns = {"question": ["What colour is the big object?"] * len(pictures), "answer": ["red"] * len(pictures), "image": pictures}
    Dataset.from_dict(columns, features=features).cast_column("image", Column()).to_parquet(folder / "data.parquet")
    (folder / "utils.py").write_text(
        "def visual(doc):\n    return [doc['image'].convert('RGB')]\n\n"
        "def results(doc, results):\n    return {'acc': float(results[0] == doc['answer'])}\n\n"
        "def broken(doc, results):\n    raise KeyError('no such column')\n"
    )
    config = {
        "task": "own", "dataset_path": "parquet", "dataset_kwargs": {"data_files": {"test": "data.parquet"}}, "test_split": "test",
        "output_type": "generate_until", "doc_to_text": "question", "doc_to_target": "answer",
        "generation_kwargs": {"max_new_tokens": 4},
    }  # fmt: skip
    text = yaml.safe_dump(config) + "doc_to_visual: !function utils.visual\n"
    text += f"process_results: {results}\nmetric_list:\n  - {{metric: acc, aggregation: mean, higher_is_better: true}}\n"
    (folder / "own.yaml").write_text(text)
    return folder


def squares(n):
    return [np.random.default_rng(i).integers(0, 255, (144, 144, 3), dtype=np.uint8) for i in range(n)]


def test_an_image_that_does_not_decode_fails_alone_and_is_named(capsys, tmp_path):
    images = squares(5)
    images[3] = b"no picture at all"
    folder = own_task(tmp_path / "task", images)
    code, found, err = evaluate(capsys, "--tasks", "own", "--include-path", folder, "--batch-size", 4, "--output-dir", tmp_path / "run")
    assert code == 1
    assert "failed: none on own/3: " in err and "1 of 5 answers failed" in err and "Traceback" not in err
    row = overall(found["rows"], "none", "own")
    assert (row["n"], row["failures"]) == (5, 1) and row["score"] is not None
    code, _, err = evaluate(capsys, "--tasks", "own", "--include-path", folder, "--on-error", "raise")
    assert code == 1 and "failed: own/3: " in err and "Traceback" not in err
    own_task(tmp_path / "task", squares(5))  # mended: only what failed is asked again
    code, found, _ = evaluate(capsys, "--tasks", "own", "--include-path", folder, "--batch-size", 4, "--output-dir", tmp_path / "run")
    assert code == 0 and overall(found["rows"], "none", "own")["failures"] == 0 and found["meta"]["model_calls"] == 1


def test_a_compressor_that_raises_on_one_sample(capsys, tmp_path, registered):
    """Exit 1, that sample named, the others scored; the baseline and resize are whole."""
    from dataclasses import dataclass

    folder, loaded = own_task(tmp_path / "task", squares(5)), load(ModelOptions(device="cpu"))
    from PIL import Image

    picture = Image.fromarray(squares(5)[2])
    inputs = loaded.inputs([loaded.prompt("?", 1)], [picture])
    from mllm_efficient.apply.prepare import encode

    bad = encode(loaded.model, "none", **inputs).encodings[0].features.sum().item()

    @me.register("fragile")
    @dataclass(frozen=True)
    class Fragile(me.Selector):
        """Keeps the first tokens."""

        def score(self, v):
            if abs(v.features.sum().item() - bad) < 1e-2:
                raise IndexError("index 7 is out of bounds")
            return -torch.arange(len(v.features), dtype=torch.float32)

    code, found, err = evaluate(
        capsys, "--tasks", "own", "--include-path", folder, "--method", "fragile:keep=0.5", "--batch-size", 2
    )  # fmt: skip
    assert code == 1
    assert "failed: fragile:keep=0.5 on own/2: IndexError: index 7 is out of bounds" in err and "1 of 15 answers failed" in err
    assert "asking one by one" in err and "Traceback" not in err
    rows = found["rows"]
    assert overall(rows, "fragile:keep=0.5", "own")["failures"] == 1 and overall(rows, "fragile:keep=0.5", "own")["score"] is not None
    assert overall(rows, "none", "own")["failures"] == overall(rows, "resize:keep=0.5", "own")["failures"] == 0


def test_a_task_that_raises_is_one_line_and_the_others_are_scored(capsys, tmp_path):
    folder = own_task(tmp_path / "task", squares(3), results="!function utils.broken")
    code, found, err = evaluate(
        capsys, "--tasks", "own,me_builtin", "--include-path", folder, "--limit", 7, "--output-dir", tmp_path / "run"
    )  # fmt: skip
    assert code == 1 and "no score: none on own: task own: KeyError: 'no such column'" in err and "Traceback" not in err
    assert overall(found["rows"], "none", "own")["score"] is None
    assert overall(found["rows"], "none", "me_builtin")["score"] is not None
    assert overall(found["rows"], "none", "overall")["score"] is None  # never a mean over what happened to work
    assert json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])["id"] == "own"


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--tasks", "me_bultin"], "unknown task 'me_bultin' - did you mean 'me_builtin'"),
        (["--tasks", "textvqa"], "textvqa is a group of tasks: name those you want: textvqa_val, textvqa_test"),
        (["--tasks", "mmvet", "--data-root", "."], "has no folder lmms-lab-encoder/MMVet"),
        (["--tasks", "gqa", "--method", "divprun:keep=0.1"], "unknown method 'divprun'"),
        (["--tasks", "gqa", "--method", "divprune"], "--method divprune has no budget: divprune:keep=0.25"),
        (["--tasks", ","], "--tasks names no task"),
        (["--tasks", "gqa"], "task gqa: "),
        (["--tasks", "gqa", "--data-root", "nowhere"], "--data-root: no folder nowhere"),
        (["--tasks", "gqa", "--data-root", "."], "has no folder lmms-lab-encoder/GQA: hf download ID --repo-type dataset --local-dir"),
        (["--tasks", "mme", "--limit", "3"], "task mme asks in pairs: give an even --limit"),
        (["--tasks", "gqa", "--suite", "quick"], "two ways to say one thing"),
        (["--suite", "slow"], "unknown suite 'slow' (there are cdpruner-paper, divprune-paper, ocr, quick)"),
        (["--tasks", "gqa", "--split", "val"], "--split has no effect with --tasks"),
        (["--tasks", "gqa", "--turns", "2"], "--turns has no effect with --tasks"),
        (["--data-root", "."], "--data-root has no effect without --tasks"),
        (["--tasks", "gqa", "--on-error", "ignore"], "--on-error 'ignore' is not one of record, raise"),
        (["--tasks", "gqa", "--server-model", "x"], "--server-model has no effect without --server"),
        (["--tasks", "me_builtin", "--server", "localhost"], "is not a URL"),
        (["--tasks", "me_builtin", "--server", "http://127.0.0.1:9/v1"], "no answer to /models"),
        (["--tasks", "me_builtin", "--method", "divprune:keep=2"], "keep"),
    ],
)
def test_bad_input_is_one_line_and_touches_nothing(capsys, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", *arguments, "--output-dir", "run"]) == 2
    out, err = capsys.readouterr()
    last = err.strip().splitlines()[-1]
    assert says in last and last.startswith("mllm-efficient: ") and "Traceback" not in err and not out
    assert not Path("run").exists()


def test_an_empty_data_set_is_one_line(capsys, tmp_path):
    folder = own_task(tmp_path / "task", [])
    assert main(["eval", "--tasks", "own", "--include-path", str(folder), "--output-dir", str(tmp_path / "run")]) == 2
    assert "mllm-efficient: task own: its data set is empty" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_settings_of_the_adapter(tmp_path):
    """What ``--model_args`` may hold: compositions from a file, no batch size that is no number, no settings beside a file."""
    from mllm_efficient.eval.lmms.adapter import MllmEfficient

    (tmp_path / "both.yaml").write_text("- {method: divprune, tokens: 72}\n- {method: fastv, ratio: 0.5}\n")
    model = MllmEfficient("builtin", str(tmp_path / "both.yaml"), "4", device="cpu")
    assert [p.name for p in model.asker.parts] == ["divprune", "fastv"] and model.asker.batch_size == 4 and not model.is_simple
    model.clean()
    assert model.asker.loaded.model is not None  # lmms-eval's own clean would have taken it
    both = str(tmp_path / "both.yaml")
    for wrong, says in (
        ({"batch_size": "auto"}, "'auto' is not a whole number"), ({"method": "divprune", "kep": 0.1}, "no parameter 'kep'"),
        ({"on_error": "skip"}, "not one of raise, record"), ({"method": both, "keep": 0.5}, "put the settings into the file"),
    ):  # fmt: skip
        with pytest.raises(me.MllmEfficientError, match=says):
            MllmEfficient("builtin", device="cpu", **wrong)


# ------------------------------------------------------------------------------------------------------------- servers


# ------------------------------------------------------------------------------------- what must not be mixed or hidden
