"""Paths through the decoder: the study's forward is the product's, its table balances, and the published tables are of its answers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import mllm_efficient as me
from mllm_efficient.eval.builtin.recipe.data import pack
from mllm_efficient.eval.builtin.suite import samples
from mllm_efficient.loading.models import ModelOptions, load

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def study():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        spec = importlib.util.spec_from_file_location("dpn_paths_study", ROOT / "benchmarks" / "dpn_paths.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    yield module
    for name in ("dpn_training", "mixers"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def training(study):
    return sys.modules["dpn_training"]


@pytest.mark.parametrize("path", [((1, 2), (2, 2), (1, 1)), ((2, 2), (2, 2), (2, 2))])
@torch.no_grad()
def test_a_path_is_what_dpn_runs_with_its_kernels_forced(study, training, path):
    loaded, asked = load(ModelOptions()), samples("test", scenes=1)[:3]
    picture = asked[0].picture(144)
    model, spec = loaded.model, f"dpn:weights=random,routing=fixed,min_tokens=1,kernel={study.name_of(path)}"
    wanted = []
    with me.compressed(model, spec):
        for sample in asked:
            inputs = loaded.inputs([loaded.prompt(sample.question.text, 1, 0)], [[picture]])
            wanted.append(model(**inputs).logits[0, -1])
    visual = model.model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True).pooler_output[0][None]
    blocks, ask_at = zip(*(pack(sample.question)[:2] for sample in asked))
    logits = training.along(model.model.language_model, visual, torch.tensor([blocks]), torch.tensor([ask_at]), path)
    torch.testing.assert_close(logits[0], torch.stack(wanted), atol=1e-3, rtol=1e-3)
    assert training.layers_of(path) == [144, *by_hand(path)]


def by_hand(path):
    rows = columns = 12
    for kernel in path:
        rows, columns = rows // kernel[0], columns // kernel[1]
        yield rows * columns


@pytest.mark.once
def test_copies_are_used_alike_and_follow_the_table(study):
    table = np.ones((27, 3))
    table[:20, 0], table[20:24, 1] = 1.02, 1.05  # most paths are best with the first copy
    chances = study.balanced(table, 100.0)
    np.testing.assert_allclose(chances.sum(1), 1)
    np.testing.assert_allclose(chances.mean(0), 1 / 3, atol=0.01)
    assert (chances[20:24].argmax(1) == 1).all() and (chances[24:].argmax(1) != 0).all()
    np.testing.assert_allclose(study.balanced(np.ones((27, 3)), 50.0), 1 / 3)
    assert study.ranks([3.0, 1.0, 3.0]).tolist() == [1.5, 0, 1.5]


@pytest.mark.once
def test_the_published_tables_are_those_of_the_answers(study):
    published = (ROOT / "docs" / "results.md").read_text()
    made = [line for part in study.lines(study.RESULTS) for line in part.splitlines()]
    assert len(made) > len(study.BUDGETS) + 4 and all(line in published for line in made)
    shipped = study.read(study.RESULTS)[study.SHIPPED]
    assert list(shipped["val"]) == list(shipped["test"]) == [study.name_of(path) for path in study.PATHS]
