"""What pip gives a user today: commands of an installed package beside the newest of everything. Run by ``make test-fresh``.

Not collected with the other tests: it wants the package installed as a user installs it, with the ``eval`` extra.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

import mllm_efficient as me

from . import public_data

PROGRAM = Path(sys.executable).with_name("mllm-efficient")


def command(*words: str | Path, cwd: Path) -> Any:
    """What a command with ``--json`` prints."""
    run = subprocess.run([PROGRAM, *map(str, words), "--json"], cwd=cwd, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_the_installed_package_is_meant():
    assert Path(me.__file__).resolve().parent.parent == Path(sysconfig.get_paths()["purelib"])


def test_every_kind_of_method_is_right(tmp_path):
    found = command("doctor", cwd=tmp_path)
    assert not [row for row in found["rows"] if row["holds"] is False]
    assert found["meta"]["versions"]["transformers"] == version("transformers")


def test_methods_answer_on_the_embedded_benchmark(tmp_path):
    given = ["divprune:tokens=36", "tokenflex:tokens=36", "fastv:layer=1,ratio=0.5", "dpn"]
    methods = [me.build(method).spec() for method in given]
    asked = [word for method in methods for word in ("--method", method)]
    rows = command("eval", "--suite", "builtin", *asked, "--limit", "60", cwd=tmp_path)["rows"]
    overall = {row["method"]: row for row in rows if row["task"] == "overall"}
    assert {"none", *methods} <= set(overall) and not any(row["failures"] for row in overall.values())
    assert overall["none"]["score"] > 90  # the published score is 98.6
    assert all(overall[method]["score"] > 60 for method in methods)


def test_an_in_decoder_method_decodes_with_its_cache_as_without():
    model, processor = _builtin()
    inputs = _question(processor)
    me.wrap(model, "fastv:layer=1,ratio=0.25")
    answers = [model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=use) for use in (True, False)]
    assert torch.equal(*answers)


def test_a_public_task_is_evaluated(tmp_path):
    public_data.make(tmp_path / "data", ["me_pope"])
    found = command("eval", "--tasks", "me_pope", "--data-root", tmp_path / "data", "--method", "divprune:tokens=36", cwd=tmp_path)
    rows = [row for row in found["rows"] if row["task"] == "me_pope" and row["metric"] == "accuracy"]
    assert {row["method"] for row in rows} >= {"none", "divprune:tokens=36"}
    assert all(row["score"] is not None and row["n"] == 6 and not row["failures"] for row in rows)


def test_an_export_is_read_back(tmp_path):
    folder = tmp_path / "served"
    run = subprocess.run(
        [PROGRAM, "export", "--method", "divprune:tokens=36", "--output-dir", folder], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert me.load(folder).spec() == "divprune:tokens=36"


def _builtin() -> Any:
    from mllm_efficient.loading.models import ModelOptions, load

    loaded = load(ModelOptions("builtin", "cpu"))
    return loaded.model, loaded


def _question(loaded: Any) -> Any:
    from PIL import Image

    return loaded.inputs([loaded.prompt("how many rings are there?", 1)], [Image.new("RGB", (96, 96), "red")])


@pytest.fixture(autouse=True, scope="session")
def _outside(tmp_path_factory):
    """Nothing of the checkout is found by the working directory."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    yield
    os.chdir(before)


assert shutil.which(str(PROGRAM)), f"no {PROGRAM}: run make test-fresh"
