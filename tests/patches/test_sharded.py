"""wrap, then FSDP2's ``fully_shard``, on one process."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import distributed
from torch.distributed.fsdp import FSDPModule, fully_shard

import mllm_efficient as me

SPECS = (
    "divprune:tokens=9",
    "visionzip:tokens=9",
    "tome:tokens=9,at=tower",
    "fastv:layer=1,ratio=0.5",
    "tokenflex:tokens=9,weights=random",
)
NEW = dict(max_new_tokens=4)


@pytest.fixture(autouse=True)
def one_process(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def sharded(model, unit="layers"):
    for layer in model.model.language_model.layers if unit == "layers" else ():
        fully_shard(layer)
    return fully_shard(model)


@pytest.mark.parametrize("first", ["forward", "generate"])
@pytest.mark.parametrize("unit", ["layers", "model"])
@pytest.mark.parametrize("spec", SPECS)
@torch.no_grad()
def test_a_sharded_model_is_the_unsharded_one(make_llava, make_batch, spec, unit, first):
    """``generate`` first: no ``forward`` has gathered the weights yet that the tower needs."""
    batch = make_batch("one image", "two images")
    plain, model = me.wrap(make_llava(), spec), sharded(me.wrap(make_llava(), spec), unit)
    calls = {
        "forward": lambda: torch.equal(model(**batch).logits, plain(**batch).logits),
        "generate": lambda: torch.equal(model.generate(**batch, **NEW), plain.generate(**batch, **NEW)),
    }
    assert calls.pop(first)() and calls.popitem()[1]()
    assert me.last_report(model).visual_tokens_kept == me.last_report(plain).visual_tokens_kept < 108
    assert not [name for name in vars(model) if "visual" in name]


def test_a_training_step_of_a_sharded_model_is_that_of_the_unsharded_one(make_llava, make_batch):
    batch = make_batch("one image", "two images")
    labels = batch.input_ids.masked_fill(batch.input_ids == 4, -100)
    plain, model = me.wrap(make_llava(), SPECS[0]), sharded(me.wrap(make_llava(), SPECS[0]))
    for one in (plain, model):
        one(**batch, labels=labels).loss.backward()
    wanted = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    found = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)
    with torch.no_grad():  # the step has put the shards back
        assert torch.equal(model.generate(**batch, **NEW), plain.generate(**batch, **NEW))


@pytest.mark.parametrize("spec", SPECS[:4])
@torch.no_grad()
def test_unwrap_gives_back_the_class_that_sharding_makes(make_llava, make_batch, spec):
    batch, bare = make_batch("one image"), sharded(make_llava())
    model = sharded(me.wrap(make_llava(), spec))
    model(**batch)
    assert me.unwrap(model) is model
    stock = type(make_llava())
    assert [c for c in type(model).__mro__ if c not in stock.__mro__] == [type(model), FSDPModule]
    assert type(model).generate is stock.generate and isinstance(model, stock)
    assert (type(model).__name__, type(model).__module__) == (type(bare).__name__, type(bare).__module__)
    assert torch.equal(model(**batch).logits, bare(**batch).logits)
    assert torch.equal(model.generate(**batch, **NEW), bare.generate(**batch, **NEW))
    with pytest.raises(AssertionError, match="does not support deepcopy"):  # as of any sharded model
        copy.deepcopy(model)
    with pytest.raises(me.UnsupportedModelError, match="wrap it first, then shard"):
        me.wrap(model, spec)


@pytest.mark.parametrize("unit", ["all", "layers alone"])
def test_weights_that_were_sharded_since_cannot_be_taken_out(make_llava, unit):
    model = me.wrap(make_llava(), "tokenflex:tokens=9,weights=random")
    if unit == "all":
        sharded(model)
    else:
        fully_shard(model.model.multi_modal_projector)
    with pytest.raises(me.UnsupportedModelError, match="sharded since: load the model anew"):
        me.unwrap(model)
