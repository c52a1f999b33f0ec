"""In-decoder methods beside what else is done to a model, and their errors."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import mllm_efficient as me

from .test_decoder import (  # noqa: F401  (fixtures)
    batch,
    tiny,
    toys,
)


def test_unwrap_leaves_no_trace(toys, batch):
    model = tiny()
    with torch.no_grad():
        before, stock = model(**batch).logits, model.generate(**batch, max_new_tokens=4)
    hooks = {name: (dict(m._forward_pre_hooks), dict(m._forward_hooks)) for name, m in model.named_modules()}
    me.wrap(model, "half")
    model.generate(**batch, max_new_tokens=2)
    me.unwrap(model)
    assert {name: (dict(m._forward_pre_hooks), dict(m._forward_hooks)) for name, m in model.named_modules()} == hooks
    assert not any(m._forward_pre_hooks_with_kwargs or m._forward_hooks_with_kwargs for m in model.modules())
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, before) and torch.equal(model.generate(**batch, max_new_tokens=4), stock)


def test_one_call_can_have_another_method_or_none(toys, batch):
    model = tiny()
    stock = model.generate(**batch, max_new_tokens=4)
    staged = me.wrap(model, "half").generate(**batch, max_new_tokens=4)
    assert torch.equal(model.generate(**batch, max_new_tokens=4, compression=None), stock)
    pruned = model.generate(**batch, max_new_tokens=4, compression="uniform:keep=0.5")
    me.unwrap(model)
    me.wrap(model, "uniform:keep=0.5")
    assert torch.equal(model.generate(**batch, max_new_tokens=4), pruned)
    assert torch.equal(model.generate(**batch, max_new_tokens=4, compression="half"), staged)
    assert not any(layer._forward_pre_hooks for layer in model.model.language_model.layers)
    me.unwrap(model)


def test_a_copy_of_a_wrapped_model_works_alone(toys, batch):
    model = me.wrap(tiny(), "half")
    expected = model.generate(**batch, max_new_tokens=4)
    twin = copy.deepcopy(model)
    me.unwrap(model)
    assert torch.equal(twin.generate(**batch, max_new_tokens=4), expected)
    me.unwrap(twin)
    assert torch.equal(twin.generate(**batch, max_new_tokens=4), model.generate(**batch, max_new_tokens=4))


def test_threads_share_the_hooks(toys, batch):
    """Two calls with a method inside on a model that has none: the first to end leaves the other its hooks."""
    from concurrent.futures import ThreadPoolExecutor

    model = me.wrap(tiny(), "uniform:keep=0.5")
    calls = [("half", 4), ("half", 24), ("kernels", 9), ("fastv:ratio=0.3", 16)]
    expected = [model.generate(**batch, max_new_tokens=n, compression=spec) for spec, n in calls]
    with ThreadPoolExecutor(4) as pool_of_threads:
        found = [pool_of_threads.submit(model.generate, **batch, max_new_tokens=n, compression=spec) for spec, n in calls]
        assert all(torch.equal(f.result(), e) for f, e in zip(found, expected))
    assert not any(layer._forward_pre_hooks for layer in model.model.language_model.layers)


def test_a_copy_of_a_wrapped_model_stays_wrapped_after_another_methods_call(toys, batch):
    twin = copy.deepcopy(me.wrap(tiny(), "half"))
    expected = twin.generate(**batch, max_new_tokens=3)
    twin.generate(**batch, max_new_tokens=3, compression="kernels")
    assert torch.equal(twin.generate(**batch, max_new_tokens=3), expected)


@pytest.mark.parametrize("before", [True, False], ids=["offloaded first", "wrapped first"])
def test_weights_offloaded_to_the_cpu(toys, batch, before):
    """On a machine without an accelerator accelerate's hooks run all the same, from and to the CPU."""
    from accelerate import cpu_offload

    model = tiny()
    with me.compressed(model, "fastv:ratio=0.5"):
        expected = model.generate(**batch, max_new_tokens=4)
    steps = [lambda: cpu_offload(model, torch.device("cpu")), lambda: me.wrap(model, "fastv:ratio=0.5")]
    for step in steps if before else steps[::-1]:
        step()
    assert torch.equal(model.generate(**batch, max_new_tokens=4), expected)


def test_under_peft(toys, batch):
    peft = pytest.importorskip("peft")
    model = tiny()
    with me.compressed(model, "fastv:ratio=0.5"):
        expected = model.generate(**batch, max_new_tokens=4)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "k_proj"], r=2))
    me.wrap(adapted, "fastv:ratio=0.5")
    assert torch.equal(adapted.generate(**batch, max_new_tokens=4), expected)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    adapted.train()
    adapted(**batch, labels=labels).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for n, p in adapted.named_parameters() if "lora" in n)


def test_an_emptied_cache_starts_afresh(toys, batch, make_batch):
    model, cache = me.wrap(tiny(), "half"), transformers.DynamicCache()
    text = make_batch("text only")
    expected = model.generate(**text, max_new_tokens=4)
    model.generate(**batch, max_new_tokens=2, past_key_values=cache)
    cache.reset()
    assert torch.equal(model.generate(**text, max_new_tokens=4, past_key_values=cache), expected)


def test_a_copied_cache_is_a_prompt_cache(toys, make_batch):
    model, one = me.wrap(tiny(), "half"), make_batch("one image")
    first = model.generate(**one, max_new_tokens=2, return_dict_in_generate=True)
    answers = []
    for _ in range(2):
        ids = torch.cat([first.sequences, torch.tensor([[6, 7]])], 1)
        answers.append(model.generate(input_ids=ids, past_key_values=copy.deepcopy(first.past_key_values), max_new_tokens=3))
    assert torch.equal(*answers)


def test_what_cannot_work_is_one_line(toys, make_batch):
    one, model = make_batch("one image"), tiny()
    with pytest.raises(me.UnsupportedModelError, match="works inside the decoder, which prepare does not reach: use wrap or compressed"):
        me.prepare(model, "half", **one)
    me.wrap(model, "half")
    with pytest.raises(me.MllmEfficientError, match="prefill_chunk_size cuts a prompt"):
        model.generate(**one, max_new_tokens=2, prefill_chunk_size=8)
    out = model.generate(**one, max_new_tokens=2, return_dict_in_generate=True)
    with pytest.raises(me.CountMismatchError, match="start with an empty cache|use an empty"):
        model.generate(**one, past_key_values=out.past_key_values, max_new_tokens=2)
    with pytest.raises(me.CountMismatchError, match="does not fit"):
        model(input_ids=torch.tensor([[6]]), attention_mask=torch.ones(1, 9), past_key_values=out.past_key_values)
    out.past_key_values.crop(-30)
    with pytest.raises(me.CountMismatchError, match="cut inside its shortened prompt"):
        model(input_ids=torch.tensor([[6]]), past_key_values=out.past_key_values)


def test_a_compiled_model_is_refused(toys, make_batch):
    model = tiny()
    model.compile(backend="eager")
    with pytest.raises(me.UnsupportedModelError, match="torch.compile cannot trace"):
        me.wrap(model, "half")


@pytest.mark.parametrize("spec, message", [
    ("half:keep=0.5,ratio=0.5", "together"),
    ("half:ratio=1.5", "not a share"),
    ("half:ratio=null,ratios=0.5/x", "not shares"),
    ("half:ratio=null,ratios=0.5/0.75", "grow"),
    ("half:ratio=0.5,per=tile", "leave it out"),
    ("half:ratio=null", "no budget"),
    ("fastv:layer=0,keep=0.5", "layer=0"),
    ("fastv", "no budget"),
])  # fmt: skip
def test_bad_specifications_are_one_line(toys, spec, message):
    with pytest.raises(me.BadBudgetError, match=message):
        me.build(spec)


@pytest.mark.parametrize("spec, message", [
    ("fastv:layer=6,keep=0.5", "layer 6 of a decoder of 6: use 1 to 5"),
    ("fastv:tokens=10", "the smallest is 13 .tokens=13."),
    ("half:ratio=null,ratios=0.5", "1 ratios for 2 stages"),
])  # fmt: skip
def test_budgets_that_the_decoder_cannot_keep_are_one_line(toys, spec, message):
    with pytest.raises(me.BadBudgetError, match=message) as error:
        me.wrap(tiny(), spec)
    assert "\n" not in str(error.value)
