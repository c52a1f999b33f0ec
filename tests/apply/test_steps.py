"""The steps of ``prepare``, each by itself: what one hands to the next."""

import pytest
import torch

import mllm_efficient as me
from mllm_efficient.apply.call import parse_call, place_images
from mllm_efficient.apply.prepare import assemble, encode_and_compress, plan_images
from mllm_efficient.patches import adapter_for

SPECS = ["divprune:tokens=9", "pool:tokens=9", "resize:tokens=9", "fastv:layer=1,ratio=0.5", "divprune:tokens=20 | fastv:layer=1,ratio=0.5"]


def given(batch):
    return {"attention_mask": None, "labels": None, "image_keys": None, "encoded": None, "past": None, **batch}


@pytest.mark.parametrize("spec", SPECS)
def test_prepare_is_its_steps_one_after_the_other(tiny_llava, make_batch, spec):
    batch, method = make_batch("two images"), me.build(spec)
    with torch.no_grad(), me.compressed(tiny_llava, method):
        whole = me.prepare(tiny_llava, method, **batch)
        call = parse_call(adapter_for(tiny_llava), method, given(batch))
        placed = place_images(call)
        plans = plan_images(call, placed)
        compressed = encode_and_compress(call, placed, plans)
        done = assemble(call, placed, plans, compressed)
    assert done.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(done.tensors[name], whole.tensors[name]) for name in whole.tensors)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(done.features, whole.features, strict=True))
    assert (done.staging is None) == (whole.staging is None) == ("fastv" not in spec)
    assert (compressed.images is None) == spec.startswith("fastv")  # whose prompt stays whole


@pytest.mark.parametrize("spec", SPECS)
def test_a_plan_of_all_stages_begins_with_that_of_those_before_the_decoder(tiny_llava, make_batch, spec):
    batch, method, adapter = make_batch("two images"), me.build(spec), adapter_for(tiny_llava)
    with me.compressed(tiny_llava, method):
        call = parse_call(adapter, method, given(batch))
        placed = place_images(call)
        plans = plan_images(call, placed)
    first = method.parts[0] if method.parts[0].kind == "pre_llm" else me.NoCompression()
    assert [p.pre_llm for p in plans] == [first.plan(adapter, image.item) for image in placed]
    assert [p.whole for p in plans] == [method.plan(adapter, image.item) for image in placed]
    assert all(p.pre_llm is p.whole for p in plans) == (call.in_llm is None)


def test_images_stand_in_prompt_order_with_the_columns_of_their_placeholders(tiny_llava, make_batch):
    batch = make_batch("two images")
    call = parse_call(adapter_for(tiny_llava), me.NoCompression(), given(batch))
    placed = place_images(call)
    token = tiny_llava.config.image_token_id
    assert [(image.row, int(image.columns[0])) for image in placed] == sorted((image.row, int(image.columns[0])) for image in placed)
    assert all((batch["input_ids"][image.row, image.columns] == token).all() for image in placed)
    assert sum(len(image.columns) for image in placed) == int((batch["input_ids"] == token).sum())


def test_a_call_without_images_is_parsed_without_a_look_at_the_model(tiny_llava, make_batch):
    batch = {k: v for k, v in make_batch("text only").items() if k != "pixel_values"}
    call = parse_call(adapter_for(tiny_llava), me.build("dpn:weights=random"), given(batch))  # which this decoder has no router for
    assert not call.has_images and me.prepare(tiny_llava, "divprune:tokens=9", **batch).report.images == ()
