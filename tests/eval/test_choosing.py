"""``choose``: requests are drawn with the probabilities that were said, and what their labels say of all requests has no bias."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mllm_efficient.cli import main
from mllm_efficient.errors import MllmEfficientError
from mllm_efficient.eval.builtin.choosing import study
from mllm_efficient.eval.choosing import Answered, draw, estimate, estimates, line_up, probabilities


def asked(patterns, question="what is it ?"):
    """Requests of which the arms answer as the letters say, the baseline first."""
    return [Answered(str(i), question, tuple(p)) for i, p in enumerate(patterns)]


def test_probabilities_follow_disagreement_and_sum_up_to_the_budget():
    requests = asked(["aaa"] * 90 + ["aab"] * 8 + ["abb"] * 2)
    p = probabilities(requests, 5, explore=0.2)
    assert p.sum() == pytest.approx(5)
    assert p[0] == pytest.approx(0.01)  # a fifth of 5, spread over 100
    assert (p[98] - 0.01) / (p[90] - 0.01) == pytest.approx(2**0.5)
    certain = probabilities(requests, 40, explore=0.2)
    assert certain[90:].tolist() == pytest.approx([1] * 10) and certain.sum() == pytest.approx(40)
    only = probabilities(requests, 40, explore=0)
    assert only.tolist() == pytest.approx([0] * 90 + [1] * 10), "what agrees says nothing of differences"
    assert probabilities(requests, 1000).tolist() == pytest.approx([1] * 100)
    assert probabilities(asked(["aa"] * 20), 5).tolist() == pytest.approx([0.25] * 20)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(0, 99))
def test_each_is_drawn_as_often_as_its_probability_says(p, seed):
    """Over every start that there is: systematic draws change only where a start passes an end of the line."""
    p, line = np.array(p), np.random.default_rng(seed).permutation(len(p)).tolist()

    class Start:
        def __init__(self, at):
            self.at = at

        def random(self):
            return self.at

    cuts = sorted({0.0, 1.0, *(float(e % 1) for e in np.cumsum(p[line]))})
    often = np.zeros(len(p))
    with pytest.MonkeyPatch.context() as patch:
        for low, high in itertools.pairwise(cuts):
            patch.setattr(np.random, "default_rng", lambda seed, at=(low + high) / 2: Start(at))
            for i in draw(p, line):
                often[i] += high - low
    assert often == pytest.approx(p, abs=1e-6)


def test_a_draw_is_of_the_budget_and_spread_over_what_is_asked():
    requests = [Answered(f"{q} {i}", q, ("a", "b")) for q in ("x", "y", "z", "w") for i in range(25)]
    p = probabilities(requests, 8, explore=0)
    for seed in range(20):
        found = draw(p, line_up(requests, seed), seed)
        assert len(found) == 8 and found == sorted(set(found))
        assert sorted(requests[i].question for i in found) == sorted("xyzw" * 2)


def test_no_bias_and_the_standard_error_is_not_too_small():
    rng = np.random.default_rng(0)
    base = rng.random(400) < 0.7
    differs = rng.random(400) < 0.15
    other = np.where(differs, rng.random(400) < 0.4, base)
    requests = [Answered(str(i), f"q{i % 7}", ("a", "b" if d else "a")) for i, d in enumerate(differs)]
    p, d = probabilities(requests, 30, 0.2), 100.0 * (other.astype(float) - base)
    votes = np.array([r.votes for r in requests])
    foretold, found = 100 * (votes[:, 1] - votes[:, 0]), []
    for seed in range(200):
        places = draw(p, line_up(requests, seed), seed)
        found.append(estimate(d[places], foretold[places], p[places], foretold.mean(), 400))
    values = np.array([f.value for f in found])
    assert abs(values.mean() - d.mean()) < 4 * values.std() / 200**0.5
    assert values.std() < np.mean([f.error for f in found]) < 2.5 * values.std()


def test_all_labels_give_the_truth_without_an_error():
    said = estimate([100.0, 0.0, -100.0, 100.0], np.array([50.0, 0.0, 0.0, 10.0]), np.ones(4), 15.0, 4)
    assert (said.value, said.error) == (25.0, 0.0)
    assert estimate([100.0], np.zeros(1), np.array([0.5]), 0.0, 10).error is None


def test_votes():
    assert Answered("i", "q", ("A cat.", "cat", None, "dog")).votes == (0.5, 0.5, 0.0, 0.25)


def test_the_study_finds_chosen_ones_better_where_arms_mostly_agree():
    rng = np.random.default_rng(1)
    differs = rng.random(500) < 0.1
    base = rng.random(500) < 0.8
    right = 100.0 * np.array([base, np.where(differs, ~base, base)])
    requests = [Answered(str(i), "q", ("a", "b" if d else "a")) for i, d in enumerate(differs)]
    found = study(requests, right, 50, 60)
    assert found["50 chosen, explore=0"]["difference"][0] < 0.6 * found["50 at random"]["difference"][0]
    assert found["200 at random"]["difference"][0] < found["50 at random"]["difference"][0]


@pytest.fixture
def finished(tmp_path):
    """A finished run over requests of a user's own, of which one has an answer and one no image."""
    lines = []
    for i in range(7):
        Image.new("RGB", (24, 24), (40 * i, 10, 200)).save(tmp_path / f"{i}.png")
        lines.append({"id": f"r{i}", "images": [f"{i}.png"], "prompt": f"what colour is the {'big' if i % 2 else 'small'} object ?"})
    lines[6]["answer"] = "red"
    lines.append({"id": "words", "prompt": "what colour is it ?"})
    data = tmp_path / "requests.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    command = ["eval", "--data", str(data), "--method", "uniform:tokens=4", "--output-dir", str(tmp_path / "run"), "--device", "cpu"]
    assert main([*command, "--max-new-tokens", "3"]) == 0
    return data, tmp_path / "run"


def test_the_command_writes_what_to_label_and_reads_the_labels(finished, tmp_path, capsys):
    data, run = finished
    output = tmp_path / "chosen.jsonl"
    assert main(["choose", "--data", str(data), "--run", str(run), "--budget", "4", "--output", str(output)]) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(lines) == 4 and {line["id"] for line in lines} <= {f"r{i}" for i in range(6)}
    assert all(line["answer"] is None and 0 < line["probability"] <= 1 and line["of"] == 6 for line in lines)
    assert "4 of 6 requests, 1 with an answer left out" in capsys.readouterr().err
    assert main(["choose", "--labelled", str(output)]) == 2
    assert "4 of 4 have no answer yet" in capsys.readouterr().err
    for line in lines:
        line["answer"] = line["answers"]["none"]
    output.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = estimates(output)
    weights = np.array([1 / line["probability"] for line in lines])
    differ = np.array([line["answers"]["none"] != line["answers"]["uniform:tokens=4"] for line in lines])
    own, foretold = np.where(differ, 0.5, 1.0), lines[0]["votes"]["none"]
    assert rows[0]["difference"] == 0 and rows[0]["accuracy"] == pytest.approx(100 * (foretold + (weights * (1 - own)).sum() / 6))
    assert rows[1]["difference"] == pytest.approx(-100 * (weights * differ).sum() / 6), (
        "an answer of two has half of the votes, as the other"
    )
    assert main(["choose", "--labelled", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][1]["requests"] == 6


@pytest.mark.parametrize("answer, right", [(3, [1, 0]), (0, [0, 1]), (False, [0, 0]), ("3", [1, 0]), ([3, "0"], [1, 1]), ([0], [0, 1])])
def test_a_label_may_be_a_number_or_several(tmp_path, answer, right):
    line = {"id": "a", "answer": answer, "probability": 1.0, "answers": {"none": "3", "m": "0"}, "of": 1, "votes": {"none": 0.5, "m": 0.5}}
    (tmp_path / "l.jsonl").write_text(json.dumps({**line, "explore": 0.2}) + "\n")
    assert [row["accuracy"] for row in estimates(tmp_path / "l.jsonl")] == [100.0 * r for r in right]


@pytest.mark.parametrize("answer", [None, "", []])
def test_what_is_no_label(tmp_path, answer):
    line = {"id": "a", "answer": answer, "probability": 1.0, "answers": {"none": "3"}, "of": 1, "votes": {"none": 1.0}, "explore": 0.2}
    (tmp_path / "l.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(MllmEfficientError, match="1 of 1 have no answer yet"):
        estimates(tmp_path / "l.jsonl")


@pytest.mark.parametrize("given_", [["--budget", "50"], ["--explore", "0"], ["--seed", "0"]])
def test_what_has_no_effect_on_labels_is_refused(tmp_path, capsys, given_):
    assert main(["choose", "--labelled", str(tmp_path / "absent.jsonl"), *given_]) == 2
    assert f"{given_[0]} has no effect with --labelled: leave it out" in capsys.readouterr().err


def test_bad_input_is_one_line(finished, tmp_path, capsys):
    data, run = finished
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"id": "strange", "images": ["0.png"], "prompt": "x ?"}))
    (tmp_path / "nothing.jsonl").write_text("{}\n")
    for given_, said in (
        (["--data", str(other), "--run", str(run)], "has no answer to 'strange'"),
        (["--data", str(data), "--run", str(tmp_path)], "holds no finished run"),
        (["--data", str(data)], "choose needs --data and --run, or --labelled"),
        (["--labelled", str(data), "--run", str(run)], "--run has no effect with --labelled"),
        (["--labelled", str(data)], "is none that choose wrote"),
        (["--labelled", str(tmp_path / "nothing.jsonl")], "is none that choose wrote"),
        (["--labelled", str(tmp_path / "absent.jsonl")], "absent.jsonl"),
    ):
        capsys.readouterr()
        assert main(["choose", *given_]) == 2
        err = capsys.readouterr().err
        assert said in err and len(err.strip().splitlines()) == 1
