"""The TokenFLEX weights that ship for the embedded model, and the answers its table is made of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import mllm_efficient as me
from mllm_efficient.cli import main
from mllm_efficient.eval.builtin.recipe import tokenflex as study
from mllm_efficient.loading.models import ModelOptions, load

ROOT = Path(me.__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "tokenflex"
SHIPPED = ROOT / "eval" / "builtin" / "trained" / "tokenflex"


@pytest.fixture(scope="module")
def runs():
    return study.read_answers(RESULTS)


def test_the_weights_that_ship_are_found_by_the_base_model(tiny_llava):
    model = load(ModelOptions()).model
    stock = model.model.multi_modal_projector
    with me.compressed(model, "tokenflex:tokens=36"):
        assert isinstance(model.model.multi_modal_projector, me.TokenFlexProjector)
    assert model.model.multi_modal_projector is stock
    assert me.load(SHIPPED) == me.TokenFlex(tokens=36, weights=str(SHIPPED))
    with pytest.raises(me.MllmEfficientError, match="no weights of it ship for this model"):
        me.wrap(tiny_llava, "tokenflex:tokens=9")


def test_they_give_the_committed_answers():
    """Those of the longer run ``dynamic-0``, at every count, on the first questions."""
    answers, asked = study.read_answers(RESULTS / study.LONGER)
    some = 70
    now = study.ask(asked[:some], {count: f"tokenflex:tokens={count}" for count in study.TESTED})["answers"]
    for count in study.TESTED:
        before = answers["dynamic", 0]["answers"][str(count)].split()[:some]
        same = sum(a == b for a, b in zip(now[str(count)].split(), before))
        assert same >= some - 1, count  # another processor rounds otherwise, which may turn one answer


@pytest.mark.once
def test_every_run_is_there_with_its_log(runs):
    answers, asked = runs
    assert set(answers) == {("untrained", 0), *((arm, seed) for arm in study.ARMS for seed in study.SEEDS)}
    assert len(asked) == study.QUESTIONS
    for (arm, _), run in answers.items():
        assert set(map(int, run["answers"])) == set(study.TESTED)
        assert arm == "untrained" or {e["stage"] for e in run["log"]} == {"distil", "full"}
        drawn = {int(name.removeprefix("loss_")) for e in run["log"] for name in e if name.startswith("loss_")}
        wanted = set(study.COUNTS) if arm.endswith("dynamic") else set() if arm == "untrained" else {int(arm.split("-")[1])}
        assert drawn == wanted


@pytest.mark.once
def test_the_published_table_is_that_of_the_answers(runs):
    text = (ROOT / "benchmarks" / "README.md").read_text()
    longer = study.longer_table(*study.read_answers(RESULTS / study.LONGER))
    for line in [*study.table(*runs).splitlines(), *longer.splitlines()]:
        assert line in text, line


@pytest.mark.once
def test_the_scores_are_counts_of_right_answers(runs):
    answers, asked = runs
    found = study.scores({("dynamic", 0): answers["dynamic", 0]}, asked)
    for count in study.TESTED:
        by_task: dict[str, list[bool]] = {}
        for sample, word in zip(asked, answers["dynamic", 0]["answers"][str(count)].split()):
            by_task.setdefault(sample.task, []).append(word == sample.question.answer)
        macro = 100 * sum(sum(right) / len(right) for right in by_task.values()) / len(by_task)
        assert found["dynamic", count][0][0] == pytest.approx(macro)


def test_unseen_counts_run(capsys):
    assert main(["eval", "--method", "tokenflex:tokens=64", "--method", "tokenflex:tokens=121", "--limit", "14", "--json"]) == 0
    rows = [r for r in json.loads(capsys.readouterr().out)["rows"] if r["task"] == "overall"]
    assert [r["method"] for r in rows] == ["none", "none@tokenflex", "tokenflex:tokens=64", "tokenflex:tokens=121"]
    assert [r["visual_tokens_kept"] for r in rows] == [144, 144, 64, 121] and all(r["failures"] == 0 for r in rows)


def test_every_command_knows_it(tmp_path, capsys):
    from PIL import Image

    picture, shown, swept = tmp_path / "p.png", tmp_path / "shown.png", tmp_path / "sweep"
    Image.new("RGB", (144, 144), (200, 40, 40)).save(picture)
    assert main(["show", "--image", str(picture), "--method", "tokenflex:tokens=36", "--output", str(shown)]) == 0 and shown.is_file()
    assert main(["generate", "--image", str(picture), "--prompt", "what colour ?", "--method", "tokenflex:tokens=36"]) == 0
    assert main(["flops", "--method", "tokenflex:tokens=36"]) == 0
    assert main(["bench", "--method", "tokenflex:tokens=36", "--repeats", "1", "--warmup", "0", "--output-tokens", "2"]) == 0
    small = ["--limit", "14", "--repeats", "1", "--warmup", "0", "--output-tokens", "2", "--json"]
    capsys.readouterr()
    assert main(["sweep", "--method", "tokenflex", "--tokens", "36,9", "--output-dir", str(swept), *small]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [r["method"] for r in rows][:4] == ["none", "none@tokenflex", "tokenflex:tokens=36", "tokenflex:tokens=9"]
    assert all(r["failed"] is None for r in rows) and (swept / "report.html").is_file()
    ratio = {r["method"]: r["flops_ratio"] for r in rows}
    assert ratio["tokenflex:tokens=9"] < ratio["tokenflex:tokens=36"] < 1 < ratio["none@tokenflex"]


def test_requests_of_ones_own_are_held_against_the_stock_model(tmp_path, capsys):
    """Agreement is with ``none``, whose weights are the base model's, also while tokenflex's are in the model."""
    from PIL import Image

    Image.new("RGB", (144, 144), (200, 40, 40)).save(tmp_path / "p.png")
    lines = [{"images": ["p.png"], "prompt": q} for q in ("what colour is the big object ?", "how many small shapes are there ?")]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["eval", "--data", str(tmp_path / "d.jsonl"), "--method", "tokenflex:tokens=36", "--json"]) == 0
    rows = [r for r in json.loads(capsys.readouterr().out)["rows"] if r["task"] == "overall"]
    assert [r["method"] for r in rows] == ["none", "none@tokenflex", "tokenflex:tokens=36"]
    assert rows[0]["kl"] == 0 and rows[1]["kl"] > 0 and rows[2]["kl"] > 0


def test_the_base_model_is_untouched_by_an_evaluation_with_it():
    from mllm_efficient.eval.builtin.suite import samples
    from mllm_efficient.eval.runner import Run
    from mllm_efficient.registry import runnable

    loaded = load(ModelOptions())
    before = {k: v.clone() for k, v in loaded.model.state_dict().items()}
    Run(loaded, samples("test", 14), [runnable(m) for m in ("none", "none@tokenflex", "tokenflex:tokens=9")]).answer_all()
    after = loaded.model.state_dict()
    assert set(after) == set(before) and all(torch.equal(after[k], v) for k, v in before.items())
