"""Types that share the code of a family and differ in the decoder: what that can change, against the slow reference; what all refuse."""

from __future__ import annotations

import pytest
import torch

import mllm_efficient as me
from mllm_efficient.apply.prepare import encode

from ..families import ALIKE, EVERY, make, tiny
from ..families_reference import greedy
from .test_families import answer, sequence


@pytest.mark.parametrize("name", ALIKE)
def test_everything_kept_is_bit_equal(name):
    model, inputs = tiny(name), make(name, *ALIKE[name].mixed)
    prepared = me.prepare(model, "divprune:keep=1", encoded=encode(model, "divprune:keep=1", **inputs), **inputs)
    assert "mm_encoder_outputs" in prepared.model_kwargs
    with torch.no_grad():
        assert torch.equal(model(**prepared.model_kwargs).logits, model(**inputs).logits)


@pytest.mark.parametrize("name", ALIKE)
@pytest.mark.parametrize("spec", ["divprune:keep=0.3", "pool:keep=0.3", "uniform:keep=0.3,positions=renumber"])
def test_every_row_of_a_batch_equals_the_slow_reference(spec, name):
    model, rows = tiny(name), ALIKE[name].mixed
    expected = [greedy(model, sequence(name, model, spec, make(name, row))) for row in rows]
    assert answer(me.wrap(model, spec), make(name, *rows)).tolist() == expected


@pytest.mark.parametrize("name", [f.name for f in EVERY.values() if f.stateful])
def test_in_decoder_methods_are_refused_by_the_kind_of_layer(name):
    for spec in ("fastv:layer=1,ratio=0.5", "divprune:keep=0.5 | dart:layer=1,ratio=0.5", "dpn:weights=random,at=1/2"):
        with pytest.raises(me.UnsupportedModelError, match="layers of linear attention, whose state holds every token"):
            me.wrap(tiny(name), spec)
