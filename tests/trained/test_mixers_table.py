"""The published table of mixers and poolings is that of the answers that are kept."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

pytestmark = pytest.mark.once
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("mixers_study", ROOT / "benchmarks" / "mixers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_published_tables_are_those_of_the_answers(study):
    published = (ROOT / "docs" / "results.md").read_text()
    made = [line for part in study.lines(study.RESULTS) for line in part.splitlines()]
    assert len(made) > 30 and all(line in published for line in made)


def test_every_arm_is_there_and_the_best_have_three_seeds(study):
    found = study.read(study.RESULTS)
    assert {(arm, 0) for arm in study.ARMS} <= set(found)
    several = {arm for arm in study.ARMS if all((arm, seed) in found for seed in range(3))}
    chosen = {"plain", *study.best(found, study.questions("val"))}
    assert chosen <= several <= {*chosen, *study.LATER}
    for run in found.values():
        assert run["settings"] == study.ARMS[run["arm"]] and run["steps"] == study.STEPS * (2 if run["arm"] == "plain-long" else 1)


def test_the_default_of_the_recipe_is_what_the_rule_says(study):
    """Above the plain projector at two of three counts beyond the interval; the best such arm by validation."""
    from mllm_efficient.stats import interval
    from mllm_efficient.train.reading import read

    found, about = study.read(study.RESULTS), study.questions("test")
    seeds = range(3)

    def above(arm, count):
        each = [
            study.resampled(found[arm, s]["test"][count], about) - study.resampled(found["plain", s]["test"][count], about) for s in seeds
        ]
        return interval((sum(each) / len(each))[1:])[0] > 0

    paying = [arm for arm in study.best(found, study.questions("val")) if sum(above(arm, str(c)) for c in study.COUNTS) >= 2]
    settings = read(Path("tokenflex_builtin")).settings
    assert {k: v for k, v in settings.items() if k in ("mixer", "pooling")} == study.ARMS[paying[0]]
