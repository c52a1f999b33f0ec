"""The DPN that ships for the embedded model, and the answers its tables are made of."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import mllm_efficient as me
from mllm_efficient.cli import main
from mllm_efficient.eval.builtin.recipe import dpn as study
from mllm_efficient.eval.builtin.recipe.study import read_answers
from mllm_efficient.loading.models import ModelOptions, load
from mllm_efficient.measure.flops import load_shape, prefill_flops

ROOT = Path(me.__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "dpn"
SHIPPED = ROOT / "eval" / "builtin" / "trained" / "dpn"


@pytest.fixture(scope="module")
def answers():
    return read_answers(RESULTS)


@pytest.fixture(scope="module")
def runs(answers):
    return study.runs_of(*answers)


# ------------------------------------------------------------------------------------------------ what ships


def test_the_weights_that_ship_are_found_by_the_base_model(tiny_llava):
    model = load(ModelOptions()).model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with me.compressed(model, "dpn"):
        assert model.model.language_model.visual_router.inputs == 128
    assert set(model.state_dict()) == set(before) and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert me.load(SHIPPED).settled == me.DPN().settled
    with pytest.raises(me.MllmEfficientError, match="no weights of it ship for this model"):
        me.wrap(tiny_llava, "dpn")


def test_they_give_the_committed_answers(answers):
    """Those of ``published-0``, routed and forced, on the first questions."""
    found, asked = answers
    run, some = found["published", 0], 70
    specs = {study.ROUTED: "dpn", "2x2": "dpn:routing=fixed,kernel=2x2", study.ALL: "none@dpn"}
    now = study.ask(asked[:some], specs)
    for name in specs:
        same = sum(a == b for a, b in zip(now["answers"][name].split(), run["answers"][name].split()))
        assert same >= some - 1, name  # another processor rounds otherwise, which may turn one answer
    same = sum(a == b for a, b in zip(now["kernels"][study.ROUTED].split(), run["kernels"][study.ROUTED].split()))
    assert same >= some - 1


def test_every_command_knows_it(tmp_path, capsys):
    from PIL import Image

    picture, shown, swept = tmp_path / "p.png", tmp_path / "shown.png", tmp_path / "sweep"
    Image.new("RGB", (144, 144), (200, 40, 40)).save(picture)
    assert main(["show", "--image", str(picture), "--method", "dpn", "--output", str(shown), "--json"]) == 0 and shown.is_file()
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    layers = row["tokens_per_layer"]
    (plane,) = row["kept_planes"]
    assert layers[0] == 144 and plane["rows"] * plane["columns"] == layers[-1] and row["kept"] == round(sum(layers) / 4)
    assert main(["generate", "--image", str(picture), "--prompt", "what colour ?", "--method", "dpn"]) == 0
    assert main(["bench", "--method", "dpn", "--repeats", "1", "--warmup", "0", "--output-tokens", "2"]) == 0
    capsys.readouterr()
    assert main(["flops", "--method", "dpn", "--method", "dpn:routing=fixed,kernel=2x2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    kept = json.loads((SHIPPED / "config.json").read_text())["kept"]
    assert rows[1]["visual_tokens_per_layer"] == [144, *[round(144 * share) for share in kept]]
    assert rows[2]["visual_tokens_per_layer"] == [144, 36, 36, 36] and rows[0]["visual_tokens_per_layer"] is None
    small = ["--limit", "14", "--repeats", "1", "--warmup", "0", "--output-tokens", "2", "--json"]
    assert main(["sweep", "--method", "dpn", "--method", "fastv:layer=1", "--tokens", "72", "--output-dir", str(swept), *small]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [r["method"] for r in rows][:4] == ["none", "none@dpn", "dpn", "fastv:tokens=72,layer=1"]
    assert all(r["failed"] is None for r in rows) and (swept / "report.html").is_file()


def test_evaluations_keep_the_kernels_and_the_tokens_of_every_layer(tmp_path):
    out = tmp_path / "run"
    assert main(["eval", "--method", "dpn", "--limit", "21", "--output-dir", str(out)]) == 0
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    own = [r for r in rows if r["method"] == "dpn"]
    assert len(own) == 21
    for row in own:
        grid, layers = (12, 12), [144]
        for kernel in row["kernels"]:
            grid = tuple(side // by for side, by in zip(grid, map(int, kernel.split("x"))))
            layers.append(grid[0] * grid[1])
        assert row["tokens_per_layer"] == layers and min(layers) >= 18
    assert not any("kernels" in r for r in rows if r["method"] != "dpn")


# ------------------------------------------------------------------------------------------------ what is published


@pytest.mark.once
def test_every_run_is_there_with_its_log(answers):
    found, asked = answers
    assert {(arm, seed) for arm in ("reinforce", "published") for seed in study.SEEDS} <= set(found) and len(asked) == study.QUESTIONS
    for (arm, _), run in found.items():
        stages = ["joint"] if arm == "published" else ["pooling", "routing"]
        assert list(dict.fromkeys(e["stage"] for e in run["log"])) == [*stages, "settled"]
        assert run["override"] == []


@pytest.mark.once
def test_the_published_tables_are_those_of_the_answers(answers):
    text = (ROOT / "benchmarks" / "README.md").read_text()
    for line in study.table(RESULTS).splitlines():
        assert line in text, line


@pytest.mark.once
def test_scores_and_costs_are_what_a_plain_count_gives(answers, runs):
    (found, asked), run = answers, runs["reinforce"][0]
    decoder = load_shape("builtin").decoder
    for name in (study.ROUTED, "2x2", study.ALL):
        words = found["reinforce", 0]["answers"][name].split()
        by_task: dict[str, list[bool]] = {}
        for sample, word in zip(asked, words):
            by_task.setdefault(sample.task, []).append(word == sample.question.answer)
        macro = 100 * sum(sum(right) / len(right) for right in by_task.values()) / len(by_task)
        assert run.score(name)[0] == pytest.approx(macro)
    full = prefill_flops(decoder, [160] * 4)
    assert run.left(study.ALL)[0] == pytest.approx(100)
    assert run.left("2x2")[0] == pytest.approx(100 * prefill_flops(decoder, [160, 52, 52, 52]) / full)
    kernels = found["reinforce", 0]["kernels"][study.ROUTED].split()
    left = {"1x1": 160, "2x2": 52, "4x4": 25}
    costs: dict[str, list[float]] = {}
    for sample, kernel in zip(asked, kernels):
        costs.setdefault(sample.task, []).append(prefill_flops(decoder, [160, *[left[kernel]] * 3]) / full)
    assert run.left(study.ROUTED)[0] == pytest.approx(100 * np.mean([np.mean(c) for c in costs.values()]))


@pytest.mark.once
def test_the_line_and_the_effect_by_hand(runs):
    run = runs["reinforce"][0]
    below, above = run.around()
    assert run.left(below)[0] <= run.left(study.ROUTED)[0] <= run.left(above)[0]
    share = (run.left(study.ROUTED)[0] - run.left(below)[0]) / (run.left(above)[0] - run.left(below)[0])
    line = run.score(below)[0] + share * (run.score(above)[0] - run.score(below)[0])
    assert run.above_the_line()[0] == pytest.approx(run.score(study.ROUTED)[0] - line)
    needs, tokens = run.detail(), run.tokens[study.ROUTED]
    gap = tokens[needs].mean() - tokens[~needs].mean()
    spread = np.sqrt((needs.sum() * tokens[needs].var() + (~needs).sum() * tokens[~needs].var()) / len(tokens))
    difference, effect = run.effect()
    assert difference[0] == pytest.approx(gap) and effect[0] == pytest.approx(gap / spread)


@pytest.mark.once
def test_the_plot_is_drawn(tmp_path):
    study.plot(RESULTS, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000
