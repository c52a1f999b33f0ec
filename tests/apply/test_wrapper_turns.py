"""A wrapped model: later turns on a cache, kernels, types, threads and training."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from transformers import DynamicCache

import mllm_efficient as me

from .test_wrapper import (  # noqa: F401  (fixtures)
    IMAGE,
    METHODS,
    MIXED,
    NEW,
    POSITIONED,
    N,
    explicit,
    plain,
    wrapped,
)

# ------------------------------------------------------------------------------------------------ the next turn

TURN_2 = "assistant : yes . user : how many are blue ? assistant :"
TURN_2_IMAGE = "user : is <image> the cross ? assistant :"


def say(processor, text, pictures=None):
    """The next user turn, without the beginning-of-sequence token."""
    out = processor(images=pictures, text=text, return_tensors="pt")
    return out.input_ids[:, 1:], out.get("pixel_values")


@pytest.mark.parametrize("with_mask", [True, False], ids=["mask", "no mask"])
@pytest.mark.parametrize("turn", ["text only", "new image"])
@pytest.mark.parametrize("spec", [*POSITIONED, "resize:tokens=9"])
def test_a_second_turn_on_the_cache_equals_the_slow_reference(
    tiny_llava, plain, make_batch, processor, reference, spec, turn, with_mask, picture
):
    me.wrap(tiny_llava, spec)
    batch = make_batch("two images")
    first = tiny_llava.generate(**batch, return_dict_in_generate=True, **NEW)
    new, images = say(processor, TURN_2) if turn == "text only" else say(processor, TURN_2_IMAGE, [picture(99)])
    ids = torch.cat([first.sequences, new], 1)
    how = {"attention_mask": torch.ones_like(ids)} if with_mask else {}
    out = tiny_llava.generate(input_ids=ids, pixel_values=images, past_key_values=first.past_key_values, **how, **NEW)
    assert torch.equal(out[:, : ids.shape[1]], ids)
    seen = batch.pixel_values if images is None else torch.cat([batch.pixel_values, images])
    visual, places = reference.compressed(plain, spec, seen)
    assert out[0, ids.shape[1] :].tolist() == reference.greedy(plain, ids[0], visual, N, 6, places)
    assert me.last_report(tiny_llava).visual_tokens_kept == (0 if images is None else 9)


@pytest.mark.parametrize("spec", ["divprune:tokens=9", "uniform:tokens=9,positions=keep", "pool:tokens=9"])
def test_three_turns_of_a_padded_batch_equal_a_fresh_call_without_cache(tiny_llava, make_batch, processor, spec, picture):
    me.wrap(tiny_llava, spec)
    batch = make_batch(*MIXED)
    ids, mask, cache = batch.input_ids, batch.attention_mask, None
    how = dict(batch)
    for turn in (TURN_2_IMAGE, TURN_2, TURN_2_IMAGE):
        out = tiny_llava.generate(**how, return_dict_in_generate=True, past_key_values=cache, **NEW)
        pictures = [picture(i) for i in range(4)] if "<image>" in turn else None
        new, images = say(processor, [turn] * 4, pictures)
        mask = torch.cat([mask, torch.ones(4, 6 + new.shape[1], dtype=torch.long)], 1)
        ids, cache = torch.cat([out.sequences, new], 1), out.past_key_values
        how = {"input_ids": ids, "attention_mask": mask, **({} if images is None else {"pixel_values": images})}
    last = tiny_llava.generate(**how, past_key_values=cache, **NEW)
    # The fresh call takes every picture in prompt order: the first turn's of a row, then those of its later turns.
    later = torch.stack([say(processor, TURN_2_IMAGE, [picture(i)])[1][0] for i in range(4)])
    at, ordered = 0, []
    for row, count in enumerate((1, 2, 0, 1)):
        ordered += [*batch.pixel_values[at : at + count], later[row], later[row]]
        at += count
    fresh = tiny_llava.generate(input_ids=ids, attention_mask=mask, pixel_values=torch.stack(ordered), **NEW)
    assert torch.equal(last, fresh)


def test_a_second_turn_draws_for_a_new_image_as_a_fresh_call_would(tiny_llava, make_batch, processor, picture):
    """The key of an image is its index within its row, whatever turn it came in."""
    me.wrap(tiny_llava, "random:tokens=9")
    batch = make_batch("one image")
    first = tiny_llava.generate(**batch, return_dict_in_generate=True, **NEW)
    new, pixels = say(processor, TURN_2_IMAGE, [picture(99)])
    ids = torch.cat([first.sequences, new], 1)
    tiny_llava.generate(input_ids=ids, pixel_values=pixels, past_key_values=first.past_key_values, max_new_tokens=1)
    (image,) = me.last_report(tiny_llava).images
    tiny_llava.generate(input_ids=ids, pixel_values=torch.cat([batch.pixel_values, pixels]), max_new_tokens=1)
    assert torch.equal(image.indices, me.last_report(tiny_llava).images[1].indices)


def test_a_second_turn_after_rows_that_ended_early_equals_a_fresh_call(wrapped, make_batch, processor):
    """The shorter answers are padded inside the conversation: that padding is in the cache too and stays where it is."""
    batch = make_batch(*MIXED)
    free = wrapped.generate(**batch, **NEW)[:, batch.input_ids.shape[1] :]
    ends = int(free[0, 1])
    first = wrapped.generate(**batch, eos_token_id=ends, return_dict_in_generate=True, **NEW)
    answers = first.sequences[:, batch.input_ids.shape[1] :]
    real = torch.cat([torch.ones(4, 1, dtype=torch.bool), (answers == ends).cumsum(1)[:, :-1] == 0], 1)
    assert not real.all()
    new = say(processor, TURN_2)[0].expand(4, -1)
    ids = torch.cat([first.sequences, new], 1)
    mask = torch.cat([batch.attention_mask, real.long(), torch.ones_like(new)], 1)
    cached = wrapped.generate(input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values, **NEW)
    fresh = wrapped.generate(input_ids=ids, attention_mask=mask, pixel_values=batch.pixel_values, **NEW)
    assert torch.equal(cached, fresh)


@pytest.mark.parametrize("spec", POSITIONED)
@pytest.mark.parametrize("given", ["new ids, full mask", "whole ids, full mask", "new ids, no mask", "whole ids, no mask"])
def test_a_second_turn_by_forward_equals_the_slow_reference(tiny_llava, plain, make_batch, processor, reference, spec, given):
    me.wrap(tiny_llava, spec)
    batch = make_batch("two images")
    new = say(processor, TURN_2)[0]
    ids = torch.cat([batch.input_ids, new], 1)
    with torch.no_grad():
        cache = tiny_llava(**batch).past_key_values
        how = {"attention_mask": torch.ones_like(ids)} if "full mask" in given else {}
        out = tiny_llava(input_ids=ids if "whole" in given else new, past_key_values=cache, **how)
        visual, places = reference.compressed(plain, spec, batch.pixel_values)
        embeds, positions = reference.splice(plain, ids[0], visual, N, places)
        wanted = reference.logits(plain, embeds, positions)[-new.shape[1] :]
    torch.testing.assert_close(out.logits[0], wanted, atol=2e-5, rtol=1e-5)  # one pass against two: order of summation


@pytest.mark.parametrize("spec", ["divprune:tokens=9", "uniform:tokens=9,positions=keep"])
@pytest.mark.parametrize("given", ["full mask", "reduced mask", "no mask"])
def test_a_second_turn_of_a_padded_batch_by_forward_equals_each_row_alone(tiny_llava, make_batch, processor, spec, given):
    me.wrap(tiny_llava, spec)
    new = say(processor, TURN_2)[0]
    with torch.no_grad():
        alone = []
        for row in MIXED:
            cache = tiny_llava(**make_batch(row), past_key_values=DynamicCache(config=tiny_llava.config.get_text_config())).past_key_values
            alone.append(tiny_llava(input_ids=new, past_key_values=cache).logits[0])
        batch = make_batch(*MIXED)
        out = tiny_llava(**batch)
        tail = torch.ones(4, new.shape[1], dtype=torch.long)
        masks = {"full mask": batch.attention_mask, "reduced mask": me.prepare(tiny_llava, spec, **batch).model_kwargs["attention_mask"]}
        how = {"attention_mask": torch.cat([masks[given], tail], 1)} if given in masks else {}
        together = tiny_llava(input_ids=new.expand(4, -1), past_key_values=out.past_key_values, **how).logits
    # Left padding shifts a row's RoPE angles: rounding only. A wrong mask or position gives errors of order 0.1.
    torch.testing.assert_close(together, torch.stack(alone), atol=5e-5, rtol=1e-5)


def test_generate_goes_on_from_the_cache_of_forward(wrapped, plain, make_batch, processor):
    batch = make_batch("one image")
    ids = torch.cat([batch.input_ids, say(processor, TURN_2)[0]], 1)
    with torch.no_grad():
        cache = wrapped(**batch).past_key_values
    fresh = wrapped.generate(input_ids=ids, pixel_values=batch.pixel_values, **NEW)
    assert torch.equal(wrapped.generate(input_ids=ids, past_key_values=cache, **NEW), fresh)


def test_a_copy_of_a_prompt_cache_serves_several_continuations(wrapped, make_batch, processor):
    batch = make_batch("one image")
    with torch.no_grad():
        cache = wrapped(**batch).past_key_values
    for text in (TURN_2, "red or green ? assistant :"):
        ids = torch.cat([batch.input_ids, say(processor, text)[0]], 1)
        fresh = wrapped.generate(input_ids=ids, pixel_values=batch.pixel_values, **NEW)
        assert torch.equal(wrapped.generate(input_ids=ids, past_key_values=copy.deepcopy(cache), **NEW), fresh)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_that_was_reset_starts_anew(wrapped, make_batch, kind):
    from transformers import StaticCache

    config = wrapped.config.get_text_config()
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=80)
    for row in ("one image", "long text", "text only"):
        batch = make_batch(row)
        out = wrapped.generate(**batch, past_key_values=cache, **NEW)
        assert torch.equal(out, wrapped.generate(**batch, **NEW))
        cache.reset() if kind == "static" else cache.crop(-cache.get_seq_length())


def test_an_answer_can_be_cut_off_the_cache_and_another_question_asked(wrapped, make_batch, processor):
    batch = make_batch("one image")
    first = wrapped.generate(**batch, return_dict_in_generate=True, **NEW)
    cache = first.past_key_values
    cache.crop(batch.input_ids.shape[1] - 27 - cache.get_seq_length())  # what 5.23 calls crop(-n): the last n go
    ids = torch.cat([batch.input_ids, say(processor, TURN_2)[0]], 1)
    fresh = wrapped.generate(input_ids=ids, pixel_values=batch.pixel_values, **NEW)
    assert torch.equal(wrapped.generate(input_ids=ids, past_key_values=cache, **NEW), fresh)


@pytest.mark.parametrize("call", ["generate", "forward"])
def test_a_cache_that_was_cut_back_into_its_prompt_is_refused(wrapped, make_batch, processor, call):
    """Its missing visual tokens would be read as embeddings of the placeholder, without an error."""
    batch = make_batch("one image")
    cache, new = compressed_cache(wrapped, batch), say(processor, TURN_2)[0]
    cache.crop(-10)
    with pytest.raises(me.CountMismatchError):
        if call == "generate":
            wrapped.generate(input_ids=torch.cat([batch.input_ids, new], 1), past_key_values=cache, max_new_tokens=1)
        else:
            wrapped(input_ids=new, past_key_values=cache)


def test_an_uncompressed_cache_goes_on_uncompressed(wrapped, plain, make_batch, processor):
    batch = make_batch("one image")
    first = wrapped.generate(**batch, compression=None, return_dict_in_generate=True, **NEW)
    ids = torch.cat([first.sequences, say(processor, TURN_2)[0]], 1)
    out = wrapped.generate(input_ids=ids, past_key_values=first.past_key_values, **NEW)
    assert torch.equal(out, plain.generate(input_ids=ids, pixel_values=batch.pixel_values, **NEW))


def compressed_cache(wrapped, batch):
    with torch.no_grad():
        return wrapped(**batch).past_key_values


@pytest.mark.parametrize("change", [
    {"attention_mask": 1}, {"attention_mask": -1}, {"attention_mask": -27 + 1}, {"attention_mask": "4-D"}, {"input_ids": "another prompt"},
    {"input_ids": "the prompt again"}, {"input_ids": "cut prompt"}, {"pixel_values": "new"},
])  # fmt: skip
def test_wrong_lengths_on_a_compressed_cache_raise_in_forward(wrapped, make_batch, processor, change):
    batch = make_batch("one image")
    cache, new = compressed_cache(wrapped, batch), say(processor, TURN_2)[0]
    full = batch.input_ids.shape[1] + new.shape[1]
    call = {"input_ids": new, "attention_mask": torch.ones(1, full, dtype=torch.long)}
    ((name, how),) = change.items()
    if isinstance(how, int):
        call["attention_mask"] = torch.ones(1, full + how, dtype=torch.long)
    elif how == "4-D":
        call["attention_mask"] = torch.ones(1, 1, new.shape[1], full, dtype=torch.bool)
    elif name == "pixel_values":
        call["pixel_values"] = batch.pixel_values
    else:
        other = batch.input_ids.clone()
        other[0, 1] = 9
        call["input_ids"] = {
            "another prompt": torch.cat([other, new], 1),
            "the prompt again": batch.input_ids,
            "cut prompt": batch.input_ids[:, 3:],
        }[how]
        call["attention_mask"] = torch.ones_like(call["input_ids"])
    with pytest.raises(me.CountMismatchError):
        wrapped(**call, past_key_values=cache)


@pytest.mark.parametrize("what", ["reduced ids", "another prompt", "nothing new", "a picture too many", "compression off", "other rows"])
def test_wrong_inputs_on_a_compressed_cache_raise_in_generate(wrapped, make_batch, processor, what):
    batch = make_batch("one image")
    cache, new = compressed_cache(wrapped, batch), say(processor, TURN_2)[0]
    ids, how = torch.cat([batch.input_ids, new], 1), {}
    if what == "reduced ids":
        ids = torch.cat([me.prepare(wrapped, "divprune:tokens=9", **batch).model_kwargs["input_ids"], new], 1)
    elif what == "another prompt":
        ids[0, 1] = 9
    elif what == "nothing new":
        ids = batch.input_ids
    elif what == "a picture too many":
        how = {"pixel_values": batch.pixel_values}
    elif what == "other rows":
        ids = ids.repeat(2, 1)
    else:
        how = {"compression": None}
    with pytest.raises(me.CountMismatchError):
        wrapped.generate(input_ids=ids, past_key_values=cache, max_new_tokens=1, **how)


@pytest.mark.parametrize("rules", [(None, "keep"), ("keep", None)], ids=["renumber then keep", "keep then renumber"])
@pytest.mark.parametrize("turn", ["text only", "new image"])
def test_a_turn_cannot_change_the_position_rule_of_its_cache(wrapped, make_batch, processor, rules, turn, picture):
    """Positions of the cached tokens cannot be changed any more: the mixture would be wrong without an error."""
    before, after = (me.Uniform(tokens=9, positions=rule) for rule in rules)
    batch = make_batch("one image")
    first = wrapped.generate(**batch, compression=before, return_dict_in_generate=True, **NEW)
    new, pixels = say(processor, TURN_2) if turn == "text only" else say(processor, TURN_2_IMAGE, [picture(99)])
    ids = torch.cat([first.sequences, new], 1)
    with pytest.raises(me.MllmEfficientError, match="positions"):
        wrapped.generate(input_ids=ids, pixel_values=pixels, past_key_values=first.past_key_values, compression=after, max_new_tokens=1)


def test_a_second_turn_may_have_another_budget(wrapped, plain, make_batch, processor, reference, picture):
    batch = make_batch("one image")
    first = wrapped.generate(**batch, compression="uniform:tokens=4", return_dict_in_generate=True, **NEW)
    new, pixels = say(processor, TURN_2_IMAGE, [picture(99)])
    ids = torch.cat([first.sequences, new], 1)
    out = wrapped.generate(input_ids=ids, pixel_values=pixels, past_key_values=first.past_key_values, compression="pool:tokens=9", **NEW)
    visual = (
        reference.compressed(plain, "uniform:tokens=4", batch.pixel_values)[0] + reference.compressed(plain, "pool:tokens=9", pixels)[0]
    )
    assert out[0, ids.shape[1] :].tolist() == reference.greedy(plain, ids[0], visual, N, 6)


def test_a_second_turn_after_several_answers_goes_on_from_each(wrapped, make_batch, processor):
    batch = make_batch("one image", "long text")
    torch.manual_seed(0)
    how = dict(do_sample=True, num_return_sequences=2, suppress_tokens=[IMAGE], return_dict_in_generate=True, **NEW)
    first = wrapped.generate(**batch, **how)
    assert not torch.equal(first.sequences[0], first.sequences[1])
    new = say(processor, TURN_2)[0].expand(4, -1)
    ids = torch.cat([first.sequences, new], 1)
    mask = torch.cat([batch.attention_mask.repeat_interleave(2, 0), torch.ones(4, 6 + new.shape[1], dtype=torch.long)], 1)
    cached = wrapped.generate(input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values, **NEW)
    pixels = batch.pixel_values.repeat_interleave(2, 0)
    assert torch.equal(cached, wrapped.generate(input_ids=ids, attention_mask=mask, pixel_values=pixels, **NEW))


@pytest.mark.parametrize("spec", ["none", "divprune:keep=1"])
@pytest.mark.parametrize("row", ["one image", "text only"])
def test_new_images_on_an_uncompressed_cache_go_on_as_in_stock_where_nothing_is_removed(
    tiny_llava, plain, make_batch, processor, picture, spec, row
):
    batch = make_batch(row)
    new, pixels = say(processor, TURN_2_IMAGE, [picture(99)])
    out = []
    for model in (plain, me.wrap(tiny_llava, spec)):
        first = model.generate(**batch, return_dict_in_generate=True, **NEW)
        ids = torch.cat([first.sequences, new], 1)
        out.append(model.generate(input_ids=ids, pixel_values=pixels, past_key_values=first.past_key_values, **NEW))
    assert torch.equal(*out)


def test_new_images_on_a_cache_that_was_not_compressed_are_refused(wrapped, make_batch):
    text, batch = make_batch("text only"), make_batch("one image")
    with torch.no_grad():
        cache = wrapped(**text).past_key_values
    with pytest.raises(me.CountMismatchError, match="not compressed"):
        wrapped.generate(**batch, past_key_values=cache, max_new_tokens=1)
    with pytest.raises(me.CountMismatchError, match="not compressed"):
        wrapped(**batch, past_key_values=cache)


def test_a_long_next_turn_is_no_mistake(wrapped, make_batch, processor):
    """More new tokens than the cache holds are still new tokens: stock ``forward`` takes nothing else."""
    batch = make_batch("one image")
    new = say(processor, "how many small blue rings are on the left , " * 8)[0]
    assert new.shape[1] > batch.input_ids.shape[1]
    mask = torch.ones(1, batch.input_ids.shape[1] + new.shape[1], dtype=torch.long)
    with torch.no_grad():
        halves = [compressed_cache(wrapped, batch) for _ in range(2)]
        whole = wrapped(input_ids=new, attention_mask=mask, past_key_values=halves[0]).logits
        a = wrapped(input_ids=new[:, :20], attention_mask=mask[:, : batch.input_ids.shape[1] + 20], past_key_values=halves[1]).logits
    torch.testing.assert_close(whole[:, :20], a, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("spec", POSITIONED)
def test_eager_and_sdpa_agree(tiny_llava, make_batch, spec):
    batch = make_batch(*MIXED)
    me.wrap(tiny_llava, spec)
    real = me.prepare(tiny_llava, spec, **batch).model_kwargs["attention_mask"].bool()
    tokens, logits = [], []
    for kernel in ("sdpa", "eager"):
        tiny_llava.set_attn_implementation(kernel)
        tokens.append(tiny_llava.generate(**batch, **NEW))
        logits.append(tiny_llava(**batch).logits[real])
    assert torch.equal(*tokens)
    torch.testing.assert_close(*logits, atol=2e-5, rtol=1e-5)  # two orders of summation


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_precisions_equal_the_explicit_path(tiny_llava, plain, make_batch, dtype):
    batch = make_batch(*MIXED)
    me.wrap(tiny_llava.to(dtype), "divprune:tokens=9")
    plain.to(dtype)
    assert torch.equal(tiny_llava.generate(**batch, **NEW), explicit(plain, "divprune:tokens=9", batch, **NEW))
    out = tiny_llava(**batch).logits
    assert out.dtype == dtype and torch.equal(out, plain(**me.prepare(plain, "divprune:tokens=9", **batch).model_kwargs).logits)


def test_autocast_reaches_the_tower_as_it_does_in_stock(tiny_llava, plain, make_batch):
    batch = make_batch(*MIXED)
    me.wrap(tiny_llava, "divprune:tokens=9")
    with torch.autocast("cpu", torch.bfloat16):
        own = tiny_llava(**batch).logits
        assert torch.equal(own, plain(**me.prepare(plain, "divprune:tokens=9", **batch).model_kwargs).logits)
    assert not torch.equal(own, tiny_llava(**batch).logits)


def test_eight_threads_with_mixed_budgets_equal_the_sequential_run(wrapped, make_batch, registered):
    @registered("attentive")
    @dataclass(frozen=True, kw_only=True)
    class Attentive(me.Selector):
        needs: ClassVar[frozenset] = frozenset({"attention"})

        def score(self, v):
            return v.attention

    specs = [
        "divprune:tokens=9",
        "divprune:tokens=3",
        "random:tokens=5",
        "pool:tokens=4",
        "resize:tokens=9",
        "attentive:tokens=7",
        "attentive:tokens=2",
        None,
    ]
    rows = [("one image",), ("two images",), ("long text",), ("one image", "two images")]
    jobs = [(spec, rows[(i + j) % 4]) for j in range(2) for i, spec in enumerate(specs)]

    def run(job):
        spec, names = job
        batch = make_batch(*names)
        out = wrapped.generate(**batch, compression=spec, max_new_tokens=4, return_dict_in_generate=True)
        with torch.no_grad():
            logits = wrapped(**batch).logits  # the model's own budget, in between
        kept = [None if i.indices is None else i.indices.tolist() for i in out.compression.images]
        return out.sequences, logits, kept

    sequential = [run(job) for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        threaded = list(pool.map(run, jobs))
    for (a, b, c), (x, y, z) in zip(sequential, threaded):
        assert torch.equal(a, x) and torch.equal(b, y) and c == z


def test_pipeline_output_equals_the_direct_path(wrapped, processor, picture):
    from transformers import pipeline

    messages = [{"role": "user", "content": [{"type": "image", "image": picture(1)}, {"type": "text", "text": "what is the big ring ?"}]}]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
    out = wrapped.generate(**inputs, max_new_tokens=6)
    wanted = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert me.last_report(wrapped).visual_tokens_kept == 9
    pipe = pipeline("image-text-to-text", model=wrapped, processor=processor)
    answer = pipe(text=messages, max_new_tokens=6, return_full_text=False)[0]["generated_text"]
    assert answer.strip() == wanted.strip() and answer.strip()
    assert me.last_report(wrapped).visual_tokens_kept == 9


def labelled(batch):
    return batch.input_ids.masked_fill((batch.attention_mask == 0) | (batch.input_ids == IMAGE), -100)


@pytest.mark.parametrize("spec", METHODS)
def test_a_training_step_moves_projector_and_decoder(tiny_llava, plain, make_batch, spec):
    batch = make_batch(*MIXED)
    me.wrap(tiny_llava.train(), spec)
    optimizer = torch.optim.SGD(tiny_llava.parameters(), lr=1e-2)
    loss = tiny_llava(**batch, labels=labelled(batch)).loss
    assert torch.equal(loss, plain(**me.prepare(plain, spec, labels=labelled(batch), **batch).model_kwargs).loss)
    loss.backward()
    for part in (
        tiny_llava.model.multi_modal_projector.linear_1,
        tiny_llava.model.language_model.layers[0].self_attn.q_proj,
        tiny_llava.lm_head,
    ):
        assert part.weight.grad.isfinite().all() and part.weight.grad.abs().sum() > 0
    optimizer.step()
    assert tiny_llava(**batch, labels=labelled(batch)).loss < loss


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_loss_and_gradients(tiny_llava, make_batch, reentrant):
    batch = make_batch(*MIXED)
    me.wrap(tiny_llava.train(), "divprune:tokens=9")
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            tiny_llava.gradient_checkpointing_enable({"use_reentrant": reentrant})
        tiny_llava.zero_grad()
        loss = tiny_llava(**batch, labels=labelled(batch)).loss
        loss.backward()
        results.append((loss.detach(), {n: p.grad.clone() for n, p in tiny_llava.named_parameters() if p.grad is not None}))
    (loss, gradients), (other_loss, other) = results
    assert torch.equal(loss, other_loss) and gradients.keys() == other.keys()
    for name in gradients:  # the backward pass sums in another order
        torch.testing.assert_close(other[name], gradients[name], atol=1e-6, rtol=1e-4)
