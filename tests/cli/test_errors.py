"""Whatever goes wrong in a command is one line and exit code 2, and ``--traceback`` shows where."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import mllm_efficient as me
from mllm_efficient import cli
from mllm_efficient.cli import main
from mllm_efficient.cli.launching import check_launch
from mllm_efficient.eval.builtin.questions import CATEGORIES
from mllm_efficient.eval.report.formats import csv_text
from mllm_efficient.loading.models import builtin_folder

LONG = "a" * 5000


def said(capsys) -> str:
    out, err = capsys.readouterr()
    (line,) = err.strip().splitlines()
    assert line.startswith("mllm-efficient: ") and max(map(len, line.replace("/", " ").split())) <= 90 and not out
    return line


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "out/a.json"), "out/a.json: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), "out: Permission denied"),
        (RuntimeError("first\nsecond"), "RuntimeError: first (--traceback shows where)"),
        (RecursionError("maximum recursion depth exceeded"), "RecursionError: maximum recursion depth"),
        (KeyError("rows"), "KeyError: 'rows'"),
        (MemoryError(), "MemoryError: no message"),
        (ValueError(LONG), "ValueError: aaa"),
        (SystemExit(3), "a library ended the command (exit code 3)"),
        (me.MllmEfficientError(f"no method {LONG!r} here"), "' here"),
    ],
)
def test_an_error_that_nobody_foresaw_is_one_line(capsys, monkeypatch, error, says):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(cli, "app", fails)
    assert main(["methods"]) == 2
    assert says in said(capsys)
    assert main(["methods", "--traceback"]) == 2
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err and "in fails" in err and says in err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("code", "says"),
    [("import sys\nsys.exit(4)", "SystemExit: 4"), ("raise RuntimeError('x' * 5000)", "RuntimeError: xxx"), ("def", "SyntaxError")],
)
def test_a_method_file_that_ends_the_process_is_one_line(capsys, tmp_path, code, says):
    (tmp_path / "m.py").write_text(code)
    assert main(["methods", "--import", str(tmp_path / "m.py")]) == 2
    assert says in said(capsys)


@pytest.mark.parametrize("argv", [
    ["generate", "--image", LONG, "--prompt", "x"], ["flops", "--method", LONG], ["flops", "--method", f"divprune:keep={LONG}"],
    ["flops", "--model", LONG], ["train", "--config", LONG + ".yaml"], ["eval", "--data", LONG], ["eval", "--method", f"divprune:{LONG}=1"],
    ["show", "--image", LONG, "--method", "none", "--output", "o.png"], ["methods", "--import", LONG], ["report", LONG],
    ["flops", "--method", "divprune:keep=" + "1" * 5000], ["train", "--config", "tokenflex_builtin", "seed=0x" + "f" * 5000],
    ["train", "--config", "tokenflex_builtin", "seed=&a [*a]"], ["train", "--config", "tokenflex_builtin", f"{LONG}=1"],
])  # fmt: skip
def test_long_values_are_cut(capsys, argv):
    assert main(argv) == 2
    said(capsys)


@pytest.mark.parametrize("text", ["a: &a [*a]", "[" * 5000, "seed: 1\nseed: 2", "method: !!int x", "method: " + "1" * 5000])
def test_yaml_that_no_loader_survives_is_one_line(capsys, tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    for argv in (["train", "--config", str(tmp_path / "r.yaml")], ["flops", "--method", str(tmp_path / "r.yaml")]):
        assert main(argv) == 2
        assert "r.yaml is not YAML" in said(capsys)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"method": ' * 5000, '{"sizes": ' + "1" * 5000 + "}", "NaN", '{"a": 1, "a": 2}', "\xff"])
def test_json_that_no_loader_survives_is_one_line(capsys, tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    for argv in (["flops", "--model", str(tmp_path)], ["eval", "--method", f"tokenflex:tokens=36,weights={tmp_path}", "--limit", "1"]):
        assert main(argv) == 2
        assert "config.json" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("sizes", [{"hidden": 10**12}, {"layers": "x"}, {"odd": 1}, {"pooling": [1]}])
def test_sizes_in_a_trained_folder_are_checked_before_they_take_memory(capsys, tmp_path, sizes):
    own = builtin_folder().parent / "trained" / "tokenflex"
    config = json.loads((own / "config.json").read_text())
    config["sizes"] |= sizes
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(load_file(own / "compressor.safetensors"), tmp_path / "compressor.safetensors")
    assert main(["eval", "--method", f"tokenflex:tokens=36,weights={tmp_path}", "--limit", "1"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_csv_cells_never_begin_a_formula():
    row = {"method": "=cmd()", "asked": "+1", "positions": "@x", "score": -1.5, "tasks": {}, "failed": "-x"}
    (found,) = csv.DictReader(io.StringIO(csv_text([row])))
    assert (found["method"], found["asked"], found["positions"], found["failed"]) == ("'=cmd()", "'+1", "'@x", "'-x")
    assert found["score"] == "-1.5"


def test_answers_are_judged_again_on_resume(tmp_path, capsys):
    argv = ["eval", "--limit", "7", "--output-dir", str(tmp_path), "--json", "--device", "cpu"]
    assert main(argv) == 0
    before = json.loads(capsys.readouterr().out)["rows"]
    file = tmp_path / "samples.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**row, "correct": not row["correct"]}) + "\n" for row in rows))
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == before and len(before) >= len(CATEGORIES)


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"WORLD_SIZE": "2"}, "several processes on a CPU need ACCELERATE_USE_CPU=true"),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}, None),
        ({"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"}, "started one process, where several"),
        ({"ACCELERATE_USE_CPU": "False", "ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"}, "started one process, where several"),
        ({"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no"}, None),
        ({}, None),
    ],
)
def test_launchers_that_do_something_else_in_silence_are_told(monkeypatch, environment, says):
    for name in ("WORLD_SIZE", "ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    if says is None:
        check_launch(distributed_on_cpu=True)
        return
    with pytest.raises(me.MllmEfficientError, match=says):
        check_launch(distributed_on_cpu=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "command", "says"),
    [
        ("accelerate.commands.launch --cpu --num_processes 2", "train --config tokenflex_builtin", "started one process, where several"),
        ("accelerate.commands.launch --num_processes 2", "eval --tasks me_builtin", "started one process, where several"),
        (
            "torch.distributed.run --standalone --nproc_per_node 2",
            "eval --tasks me_builtin",
            "need ACCELERATE_USE_CPU=true before torchrun",
        ),
    ],
)
def test_real_launchers_are_told(launcher, command, says):
    env = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")} | {"CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, "-m", *launcher.split(), "-m", "mllm_efficient", *command.split()]
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.returncode != 0 and done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("mllm-efficient: ")]
    assert lines and all(says in line for line in lines)


READ_ONLY = Path("/sys")  # where the system lets nobody make a file, not even root
PLACES = [("file", c) for c in ("eval", "data", "sweep", "train", "export", "show", "report")]
PLACES += [("read-only", c) for c in ("eval", "train", "export")] if READ_ONLY.is_mount() else []


@pytest.mark.parametrize(("place", "command"), PLACES)
def test_a_place_that_cannot_be_written_is_one_line(capsys, tmp_path, place, command):
    (tmp_path / "file").write_text("")
    (tmp_path / "r.jsonl").write_text('{"prompt": "is it red ?"}')
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    there = tmp_path / "file" / "out" if place == "file" else READ_ONLY / "out"  # below a file nothing can be, whoever runs this
    argv = {
        "eval": ["eval", "--limit", "1", "--output-dir", there],
        "data": ["eval", "--data", tmp_path / "r.jsonl", "--output-dir", there],
        "sweep": ["sweep", "--method", "uniform", "--keep", "0.5", "--limit", "1", "--output-dir", there],
        "train": ["train", "--config", "tokenflex_builtin", "data.scenes=64", "stages.0.data.scenes=64", f"output_dir={there}"],
        "export": ["export", "--method", "divprune:tokens=36", "--output-dir", there],
        "show": ["show", "--image", tmp_path / "a.png", "--method", "none", "--output", there / "o.png"],
        "report": ["report", tmp_path / "none", "--output", there / "o.md"],
    }[command]
    assert main([str(a) for a in argv]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err and err.strip().splitlines()[-1].startswith("mllm-efficient: ")


# ------------------------------------------------------------------------------------------------ full disks


@contextlib.contextmanager
def files_of_at_most(size: int):
    """The system refuses to make any file larger, as it does on a full disk, with another message."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def last(capsys) -> str:
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err.strip().splitlines()[-1]


@pytest.mark.parametrize("source", ["builtin", "data"])
def test_a_full_disk_stops_an_evaluation_in_one_line_and_loses_nothing(capsys, tmp_path, source):
    (tmp_path / "r.jsonl").write_text("".join(json.dumps({"prompt": f"is it {i} ?"}) + "\n" for i in range(70)))
    asked = ["eval", "--limit", "70", "--batch-size", "7", "--device", "cpu", "--json"]
    asked += ["--data", str(tmp_path / "r.jsonl"), "--max-new-tokens", "1"] if source == "data" else []
    with files_of_at_most(8000):
        assert main([*asked, "--output-dir", str(tmp_path / "out")]) == 2
    assert f"cannot write {tmp_path / 'out' / 'samples.jsonl'}: File too large" in last(capsys)
    before = (tmp_path / "out" / "samples.jsonl").read_bytes()
    kept = before[: before.rindex(b"\n") + 1]
    with files_of_at_most(300):  # still full
        assert main([*asked, "--output-dir", str(tmp_path / "out")]) == 2
    assert "cannot write" in last(capsys) and json.loads((tmp_path / "out" / "run.json").read_text())["model"] == "builtin"
    assert main([*asked, "--output-dir", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert "answers are there already" in err and (tmp_path / "out" / "samples.jsonl").read_bytes().startswith(kept)
    assert main([*asked, "--output-dir", str(tmp_path / "whole")]) == 0
    assert json.loads(out)["rows"] == json.loads(capsys.readouterr().out)["rows"]


def test_a_full_disk_stops_a_training_in_one_line_and_it_goes_on(capsys, tmp_path):
    Image.effect_noise((144, 144), 60).convert("RGB").save(tmp_path / "a.png")
    (tmp_path / "r.jsonl").write_text('{"image": "a.png", "prompt": "what is it ?", "answer": "a ring"}\n' * 4)
    data = f"{{path: {tmp_path / 'r.jsonl'}}}"
    asked = ["train", "--config", "tokenflex_builtin", f"output_dir={tmp_path / 'run'}", "counts={36: 1}", f"data={data}"]
    asked += [f"stages.0.data={data}", "independent_turns=false"]
    asked += [f"stages.{i}.{k}" for i in (0, 1) for k in ("steps=2", "batch_size=2", "save_steps=1")]
    with files_of_at_most(20_000):
        assert main(asked) == 2
        assert f"cannot write {tmp_path / 'run'}" in last(capsys)
    assert not list((tmp_path / "run").rglob("compressor.safetensors"))
    assert main(asked) == 0 and (tmp_path / "run" / "final" / "compressor.safetensors").is_file()


@pytest.mark.parametrize("method", ["divprune:tokens=36", "tokenflex:tokens=36", "resize:tokens=36"])
def test_a_full_disk_leaves_nothing_of_an_export(capsys, tmp_path, method):
    asked = ["export", "--method", method, "--output-dir", str(tmp_path / "served")]
    with files_of_at_most(200_000):
        assert main(asked) == 2
    assert last(capsys).endswith(f"cannot write {tmp_path / 'served'}: File too large") and not list(tmp_path.iterdir())
    assert main(asked) == 0 and (tmp_path / "served" / "config.json").is_file()


def test_generated_pictures_that_do_not_fit_are_one_line(tmp_path):
    from mllm_efficient.eval.builtin.recipe.data import build

    with files_of_at_most(100_000), pytest.raises(me.MllmEfficientError, match="cannot write .*: File too large"):
        build("train", 64, tmp_path)
    assert not list(tmp_path.iterdir())
