"""The tables of ``benchmarks/instruments.py``, made of answers that are known."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

import mllm_efficient as me
from mllm_efficient.stats import Scores

pytestmark = pytest.mark.once

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "instruments.py"


@pytest.fixture(scope="module")
def instruments():
    spec = importlib.util.spec_from_file_location("_instruments", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def answers(module, model, quality, positions="renumber", n=80):
    """Of a model that is right as often as ``quality`` says of an arm."""
    rng = np.random.default_rng(0)
    images, tasks = [i // 2 for i in range(n)], ["object", "count"] * (n // 2)
    arms = [module.BASELINE]
    for keep in module.KEEPS:
        arms += [module.with_settings(m, f"keep={keep}") for m in module.METHODS]
        arms += [module.with_settings(m, f"keep={keep}", f"positions={module.OTHER_RULE[positions]}") for m in module.MOVED]
    right = {arm: "".join("01"[bool(v)] for v in rng.random(n) < quality(arm)) for arm in arms}
    return module.Answers(model, "builtin", "0", positions, images, tasks, 144.0, right, dict.fromkeys(arms, 36.0), {})


def test_kendalls_tau_is_the_share_of_pairs_in_the_same_order(instruments):
    rng = np.random.default_rng(1)
    for _ in range(20):
        a, b = rng.integers(0, 5, (2, 7))
        pairs = [(np.sign(a[i] - a[j]), np.sign(b[i] - b[j])) for i, j in itertools.combinations(range(7), 2)]
        expected = sum(x * y for x, y in pairs) / np.sqrt(sum(x * x for x, _ in pairs) * sum(y * y for _, y in pairs))
        assert instruments.kendall(a[None], b[None])[0] == pytest.approx(expected)
    assert instruments.kendall(np.arange(5)[None], -np.arange(5)[None])[0] == -1


def test_every_method_can_be_built_at_every_budget(instruments):
    for keep, method in itertools.product(instruments.KEEPS, (*instruments.METHODS, *instruments.FILMED)):
        assert me.build(instruments.with_settings(method, f"keep={keep}")).fraction == keep
    assert instruments.with_settings("tome:at=tower", "keep=0.5") == "tome:at=tower,keep=0.5"


def test_what_is_written_is_read_back_and_nothing_is_an_error(instruments, tmp_path):
    with pytest.raises(SystemExit, match="no answers"):
        instruments.read(tmp_path)
    one = answers(instruments, "builtin", lambda arm: 0.5)
    instruments.write(one, tmp_path)
    assert instruments.read(tmp_path) == [one]


def test_tables_have_paired_differences_and_leave_out_what_was_refused(instruments):
    one = answers(instruments, "builtin", lambda arm: 0.95 if arm == "none" else 0.3 if "random" in arm else 0.7)
    del one.right["hawk:keep=0.5"]
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in instruments.methods_table(one).splitlines()}
    assert rows["hawk"][1] == "" and rows["hawk"][2] != "" and list(rows)[-1] == "random"
    arm = "divprune:keep=0.25"
    records = {
        a: [{"image": i, "task": t, "correct": c == "1"} for i, t, c in zip(one.images, one.tasks, one.right[a])] for a in ("none", arm)
    }
    change = Scores(records, list(range(40)), ["object", "count"]).of(arm, 2, "none")
    low, high = change.interval()
    assert rows["divprune"][2].endswith(f"{change.value:+.1f} [{low:+.1f}, {high:+.1f}]")


@pytest.mark.parametrize("positions", ["renumber", "keep"])
def test_positions_are_kept_minus_renumbered_whichever_is_usual(instruments, positions):
    other = f"positions={instruments.OTHER_RULE[positions]}"

    def quality(arm):
        kept = (positions == "keep") != (other in arm)
        return 0.9 if kept else 0.2

    line = instruments.positions_table([answers(instruments, "builtin", quality, positions)]).splitlines()[2]
    assert all(float(cell.split(", ")[1].split(" ")[0]) > 30 for cell in line.strip("| ").split(" | ")[1:])


def test_parts_are_compared_with_the_whole_where_both_were_asked(instruments):
    plain = answers(instruments, "builtin", lambda arm: 0.3)
    assert len(instruments.parts_table([plain]).splitlines()) == 2
    arm = instruments.with_settings("divprune", "keep=0.25", "per=tile")
    plain.right[arm] = "1" * 80
    (row,) = instruments.parts_table([plain]).splitlines()[2:]
    label, *cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert label == "builtin: divprune, per=tile" and [bool(cell) for cell in cells] == [False, True, False, False]
    assert cells[1].startswith("100.0, +")


def test_models_that_rank_alike_and_the_other_way_round(instruments):
    at = {method: i / len(instruments.METHODS) for i, method in enumerate(instruments.METHODS)}

    def place(arm):
        return next(v for m, v in at.items() if arm.startswith(m + ":") or arm.startswith(m + ",")) if arm != "none" else 1.0

    one = answers(instruments, "builtin", place, n=400)
    alike = answers(instruments, "builtin-qwen", place, n=400)
    turned = answers(instruments, "builtin-qwen", lambda arm: 1 - place(arm), n=400)
    tau = [float(instruments.agreement_table([one, other]).splitlines()[2].split(" | ")[1].split(" ")[0]) for other in (alike, turned)]
    assert tau[0] == 1 and tau[1] < -0.7
    best = instruments.best_table([one]).splitlines()[2]
    assert best.count("**") == 2 * len(instruments.KEEPS) and "random" not in best


def test_the_published_tables_are_those_of_the_answers_of_the_weights_that_ship(instruments):
    found = instruments.read(instruments.RESULTS)
    assert [(a.model, a.suite) for a in found] == [pair[:2] for pair in instruments.PAIRS]
    published = (FILE.parents[1] / "docs" / "results.md").read_text()
    made = instruments.tables(found)
    assert len(made) == len(found) + 6 and all(table in published for table in made)
    for answers in found:
        assert answers.weights == instruments.weights_of(answers.model), answers.name


def test_the_published_table_of_divmerge_is_that_of_its_answers(monkeypatch):
    monkeypatch.syspath_prepend(str(FILE.parent))
    study = importlib.import_module("divmerge")
    found = json.loads(study.RESULTS.read_text())
    assert min(found["images"]) >= study.BEFORE and len({len(hits) for hits in found["right"].values()}) == 1
    assert study.table(found) in (FILE.parents[1] / "docs" / "results.md").read_text()
    for name in ("divmerge", "instruments"):
        sys.modules.pop(name)
