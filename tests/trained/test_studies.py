"""Small studies of the embedded tower: their published tables are of the answers that are kept, and their rules hold."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.once
ROOT = Path(__file__).resolve().parents[2]


def loaded(name):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        spec = importlib.util.spec_from_file_location(f"{name}_study", ROOT / "benchmarks" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name, least", [("paro", 14)])
def test_the_published_table_is_that_of_the_answers(name, least):
    study, published = loaded(name), (ROOT / "docs" / "results.md").read_text()
    made = [line for line in study.lines(study.RESULTS) if line]
    assert len(made) >= least and all(line in published for line in made)


def test_a_mask_leaves_the_blocks_of_most_attention_whatever_the_order():
    study = loaded("paro")
    rng = np.random.default_rng(0)
    attention = rng.random((study.N, study.N))
    for order in (*study.orders().values(), rng.permutation(study.N)):
        assert sorted(order.tolist()) == list(range(study.N))
        blocks = study.blocks_of(attention, order)
        keep = study.most(blocks, 0.3)
        mask = study.mask_of(keep, order)
        side = study.N // study.BLOCK
        assert keep.sum() == round(0.3 * side * side) and blocks[keep].min() >= blocks[~keep].max()
        assert mask[0].all() and mask[:, 0].all()  # the class token
        for i, j in rng.integers(study.N, size=(40, 2)):
            a, b = order.tolist().index(i) // study.BLOCK, order.tolist().index(j) // study.BLOCK
            assert mask[1 + i, 1 + j] == keep[a, b]
        np.testing.assert_allclose(attention[mask[1:, 1:]].sum(), blocks[keep].sum())
