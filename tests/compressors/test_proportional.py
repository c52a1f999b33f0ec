"""Attention that counts a merged token as so many, against the stock model with a mask made by hand."""

from __future__ import annotations

import pytest
import torch

import mllm_efficient as me
from mllm_efficient.patches.decoder.weighing import added

from ..families import FAMILIES, make, tiny
from ..patches.test_decoder import DECODERS
from ..patches.test_decoder import tiny as tiny_decoder

SPEC = "divmerge:keep=0.2 | proportional"
BEFORE = "divmerge:keep=0.2"
GREEDY = {"max_new_tokens": 5, "do_sample": False}


def by_hand(model, inputs, tokens):
    """Logits of the stock model for a merged prompt, whose mask holds the logarithms. tokens: the placeholders."""
    prepared = me.prepare(model, BEFORE, **inputs)
    call, report = prepared.model_kwargs, prepared.report
    ids, valid = call["input_ids"], call["attention_mask"].bool()
    n, least = ids.shape[1], torch.finfo(torch.float32).min
    visible = torch.ones(n, n, dtype=torch.bool).tril() & valid[:, None] | torch.eye(n, dtype=torch.bool)
    mask = torch.full(visible.shape, least).masked_fill(visible, 0.0)
    for row in range(len(ids)):
        counts = [image.counts for image in report.images if image.row == row]
        if counts:
            mask[row][:, torch.isin(ids[row], torch.tensor(tokens))] += torch.cat(counts).log()
    call["attention_mask"] = mask.clamp(min=least)[:, None]
    if "position_ids" not in call:
        call["position_ids"] = (valid.long().cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(**call, use_cache=False).logits[valid]


@pytest.mark.parametrize("name", [f.name for f in FAMILIES.values() if f.inside])
def test_every_family_equals_the_mask_made_by_hand(name):
    """Left-padded rows with no, one and two pictures, and a video where the family takes one; M-RoPE and deepstack too."""
    model, inputs = tiny(name), make(name, *FAMILIES[name].mixed)
    tokens = [t for t in (FAMILIES[name].image_token, FAMILIES[name].video_token) if t is not None]
    expected = by_hand(model, inputs, tokens)
    with me.compressed(model, SPEC), torch.no_grad():
        out = model(**inputs)
        report = me.last_report(model)
    torch.testing.assert_close(out.logits[out.visual_attention_mask.bool()], expected, atol=2e-5, rtol=1e-4)
    assert report.tokens_per_layer == [report.visual_tokens_kept] * len(report.tokens_per_layer)
    with me.compressed(model, BEFORE), torch.no_grad():
        assert (model(**inputs).logits[out.visual_attention_mask.bool()] - expected).abs().max() > 1e-3, "the weights matter"


@pytest.mark.parametrize("kind", DECODERS)
def test_every_decoder_generates_with_a_cache_what_it_says_without_one(make_batch, kind):
    """Sliding windows among them; new tokens and beams see the same weights."""
    model, batch = tiny_decoder(kind), make_batch("one image", "two images", "text only")
    with me.compressed(model, SPEC):
        expected = model.generate(**batch, **GREEDY, use_cache=False)
        assert torch.equal(model.generate(**batch, **GREEDY), expected)
        beams = model.generate(**batch, **GREEDY, num_beams=2)
        assert torch.equal(beams, model.generate(**batch, **GREEDY, num_beams=2, use_cache=False))
        if "window" not in kind:  # which in-decoder methods refuse on a static cache
            assert torch.equal(model.generate(**batch, **GREEDY, cache_implementation="static"), expected)


def test_eager_attention_and_each_row_alone_say_the_same(make_batch, tiny_llava):
    batch = make_batch("one image", "long text")
    with me.compressed(tiny_llava, SPEC):
        expected = tiny_llava.generate(**batch, **GREEDY)[:, batch["input_ids"].shape[1] :]
        for row, kind in enumerate(("one image", "long text")):
            alone = make_batch(kind)
            alone["pixel_values"] = batch["pixel_values"][row : row + 1]
            assert torch.equal(tiny_llava.generate(**alone, **GREEDY)[:, alone["input_ids"].shape[1] :], expected[row : row + 1])
        tiny_llava.set_attn_implementation("eager")
        try:
            assert torch.equal(tiny_llava.generate(**batch, **GREEDY)[:, batch["input_ids"].shape[1] :], expected)
        finally:
            tiny_llava.set_attn_implementation("sdpa")


def test_a_second_turn_sees_the_same_weights(make_batch, tiny_llava):
    """On the cache of the first turn, against the whole conversation at once."""
    batch = make_batch("one image")
    with me.compressed(tiny_llava, SPEC):
        first = tiny_llava.generate(**batch, **GREEDY, return_dict_in_generate=True)
        more = torch.cat([first.sequences, batch["input_ids"][:, -4:]], 1)
        mask = torch.ones_like(more)
        went_on = tiny_llava.generate(input_ids=more, attention_mask=mask, past_key_values=first.past_key_values, **GREEDY)
        whole = tiny_llava.generate(**{**batch, "input_ids": more, "attention_mask": mask}, **GREEDY)
    assert torch.equal(went_on, whole)


def test_a_token_that_stands_for_n_gets_what_n_copies_get():
    """And the mask leaves everything else as it was."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 5, 8, generator=draw) for _ in range(3))
    more = torch.tensor([[0.0, 4.0, 1.0, 1.0, 1.0]]).clamp(min=1).log()
    attend = torch.nn.functional.scaled_dot_product_attention
    found = attend(q, k, v, attn_mask=added(None, more, 5, None, torch.float32))
    copies = [0, 1, 1, 1, 1, 2, 3, 4]
    for i in range(5):
        seen = [j for j in copies if j <= i]
        torch.testing.assert_close(found[:, :, i : i + 1], attend(q[:, :, i : i + 1], k[:, :, seen], v[:, :, seen]))


def test_a_cache_with_a_window_gives_the_last_columns():
    """Six columns, of which a cache with a window of three gives the last two and the new one."""
    more = torch.arange(6.0)[None]
    assert added(None, more, 1, 3, torch.float32, keys=3, first=3)[0, 0].tolist() == [[3.0, 4.0, 5.0]]
    visible = torch.tensor([[[[False, True, True]]]])
    assert added(visible, more, 1, 3, torch.float32, keys=3, first=3)[0, 0, 0, 1:].tolist() == [4.0, 5.0]


@pytest.mark.parametrize("mask", ["none", "bool", "number"])
def test_a_mask_of_any_form_is_added_to(mask):
    more, queries, window = torch.tensor([[0.5, 0.0, 2.0]]), 2, 2
    visible = torch.tensor([[False, True, False, False], [False, True, True, False]])  # 3 keys, and one not written yet
    least = torch.finfo(torch.float32).min
    given = {"none": None, "bool": visible[None, None], "number": torch.where(visible, 0.0, least)[None, None]}[mask]
    expected = torch.tensor([[0.5 if mask == "none" else least, 0.0, least, least], [least, 0.0, 2.0, least]])
    assert torch.equal(added(given, more, queries, window, torch.float32, keys=4)[0, 0], expected)


def test_where_nothing_is_merged_nothing_changes(make_batch, tiny_llava):
    batch = make_batch("one image")
    expected = tiny_llava.generate(**batch, **GREEDY)
    with me.compressed(tiny_llava, "divmerge:keep=1 | proportional"):
        assert torch.equal(tiny_llava.generate(**batch, **GREEDY), expected)
    me.unwrap(me.wrap(tiny_llava, SPEC))
    assert torch.equal(tiny_llava.generate(**batch, **GREEDY), expected)


@pytest.mark.parametrize("spec", ["proportional", "divprune:keep=0.2 | proportional", "pool:keep=0.25 | proportional"])
def test_without_counts_it_is_refused(tiny_llava, spec):
    with pytest.raises(me.UnsupportedModelError, match="nothing before it says how many"):
        me.wrap(tiny_llava, spec)


def test_a_kernel_that_takes_no_numbers_is_refused(tiny_llava):
    config = tiny_llava.model.language_model.config
    before, config._attn_implementation = config._attn_implementation, "flash_attention_2"
    try:
        with pytest.raises(me.UnsupportedModelError, match="kernel 'flash_attention_2' does not take: load the model with attn_impl"):
            me.wrap(tiny_llava, SPEC)
    finally:
        config._attn_implementation = before


def test_a_budget_has_no_effect():
    with pytest.raises(me.BadBudgetError, match="tokens= has no effect: it drops nothing"):
        me.build("proportional:tokens=3")


def test_what_is_said_of_it(tiny_llava):
    from mllm_efficient.patches import adapter_for

    adapter, method = adapter_for(tiny_llava), me.build("divmerge:tokens=9 | proportional")
    assert me.build(method.spec()) == method
    assert method.describe(adapter.usual(), adapter) == (
        "divmerge keeps 9 of 36 tokens per image and merges the others into them, "
        "then proportional weighs tokens by how many each holds (removes 75.0%)"
    )
