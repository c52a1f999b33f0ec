"""The scripts in examples/ run as they are printed there."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import yaml

import mllm_efficient as me
from mllm_efficient import registry
from mllm_efficient.eval.builtin.suite import round_robin

ROOT = Path(__file__).resolve().parent.parent
SAYS = {
    "generate.py": r"'circle' with 144 visual tokens, '\w+' with 36",
    "compare.py": r"none +144 tokens.*divprune:tokens=18 +18 tokens.*random:tokens=18 +18 tokens",
    "conversation.py": r"What shape is the big object\?  circle  \(cache of 85 positions, prompt of 156\)",
    "own_method.py": r"\[0, 1, 2, 12, ",
    "train.py": r"step 4: loss 0\.\d+ over 36 visual tokens",
}


def test_every_example_is_here_and_in_the_table():
    scripts = {file.name for file in (ROOT / "examples").glob("*.py")}
    assert scripts == set(SAYS)
    assert set(re.findall(r"\[(\w+\.py)\]\(\1\)", (ROOT / "examples" / "README.md").read_text())) == scripts


@pytest.mark.parametrize("script", sorted(SAYS))
def test_it_runs_and_prints_what_it_shows(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script])
    runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    registry._registered.pop("longest", None)  # own_method.py's
    assert re.search(SAYS[script], capsys.readouterr().out, re.DOTALL)


def test_a_sample_is_the_benchmarks_question_and_a_wrong_one_is_said():
    found = round_robin("val", 3)[2]
    image, question = me.sample(2, split="val")
    assert (image.tobytes(), question) == (found.picture(144).tobytes(), found.question.text)
    for wrong in (-1, 10**6):
        with pytest.raises(me.BadSettingError, match="the questions of 'test' are 0 to"):
            me.sample(wrong)


def test_a_sample_of_a_category_is_the_next_of_that_category():
    questions = [q for q in round_robin("test", 40) if q.task == "reading"]
    assert [me.sample(i, category="reading")[1] for i in range(3)] == [q.question.text for q in questions[:3]]
    with pytest.raises(me.BadSettingError, match="did you mean 'reading'"):
        me.sample(category="raeding")
    with pytest.raises(me.BadSettingError, match="the questions of 'val' are 0 to"):
        me.sample(10**6, "val", "reading")


def test_pre_commit_has_the_ruff_of_the_constraints():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["rev"] == f"v{pins['ruff']}"
    for file in [ROOT / "CITATION.cff", *(ROOT / ".github").rglob("*.yml")]:
        assert yaml.safe_load(file.read_text())
