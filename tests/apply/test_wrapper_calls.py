"""A wrapped model: lengths, arguments and forward."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from transformers import GenerationConfig, TextIteratorStreamer

import mllm_efficient as me

from .test_wrapper import (  # noqa: F401  (fixtures)
    IMAGE,
    METHODS,
    MIXED,
    NEW,
    POSITIONED,
    explicit,
    plain,
    wrapped,
)


def test_max_length_counts_the_original_prompt(wrapped, plain, make_batch):
    batch = make_batch("one image")
    length = batch.input_ids.shape[1]
    wanted = explicit(plain, "divprune:tokens=9", batch, max_new_tokens=5)
    config = GenerationConfig(max_length=length + 5, pad_token_id=0)
    assert torch.equal(wrapped.generate(**batch, max_length=length + 5), wanted)
    assert torch.equal(wrapped.generate(**batch, generation_config=config), wanted)
    assert torch.equal(wrapped.generate(batch.input_ids, config, pixel_values=batch.pixel_values), wanted)
    wrapped.generation_config.max_length = length + 5
    assert torch.equal(wrapped.generate(**batch), wanted)
    assert wrapped.generation_config.max_length == length + 5 and config.max_length == length + 5


def test_without_a_length_generate_makes_as_many_tokens_as_stock(wrapped, plain, make_batch):
    batch = make_batch("one image")
    assert wrapped.generate(**batch).shape == plain.generate(**batch).shape


def test_max_new_tokens_wins_over_max_length_as_in_stock(wrapped, plain, make_batch):
    batch = make_batch("one image")
    assert torch.equal(
        wrapped.generate(**batch, max_length=500, max_new_tokens=3), explicit(plain, "divprune:tokens=9", batch, max_new_tokens=3)
    )


@pytest.mark.parametrize("where", ["argument", "config", "model"])
def test_min_length_counts_the_original_prompt(wrapped, plain, make_batch, where):
    batch = make_batch("one image")
    length = batch.input_ids.shape[1]
    ends = int(explicit(plain, "divprune:tokens=9", batch, **NEW)[0, length])  # the very first word would end the answer
    wanted = explicit(plain, "divprune:tokens=9", batch, eos_token_id=ends, min_new_tokens=4, max_new_tokens=8)
    how = dict(eos_token_id=ends, max_new_tokens=8)
    if where == "argument":
        how["min_length"] = length + 4
    elif where == "config":
        how = dict(generation_config=GenerationConfig(min_length=length + 4, pad_token_id=0, **how))
    else:
        wrapped.generation_config.min_length = length + 4
    out = wrapped.generate(**batch, **how)
    assert torch.equal(out, wanted) and out.shape[1] >= length + 4
    assert wrapped.generate(**batch, eos_token_id=ends, min_length=0, max_new_tokens=8).shape[1] == length + 1


def test_a_generation_config_object_is_honoured(wrapped, plain, make_batch):
    batch = make_batch(*MIXED)
    config = GenerationConfig(max_new_tokens=4, num_beams=2, pad_token_id=0)
    before = config.to_dict()
    wanted = explicit(plain, "divprune:tokens=9", batch, generation_config=copy.deepcopy(config))
    assert torch.equal(wrapped.generate(**batch, generation_config=config), wanted)
    assert torch.equal(
        wrapped.generate(batch.input_ids, config, attention_mask=batch.attention_mask, pixel_values=batch.pixel_values), wanted
    )
    assert config.to_dict() == before


def test_ids_may_be_positional(wrapped, make_batch):
    batch = make_batch(*MIXED)
    rest = {k: v for k, v in batch.items() if k != "input_ids"}
    wanted = wrapped.generate(**batch, **NEW)
    assert torch.equal(wrapped.generate(batch.input_ids, **rest, **NEW), wanted)
    assert torch.equal(wrapped.generate(inputs=batch.input_ids, **rest, **NEW), wanted)


@pytest.mark.parametrize(
    "how",
    [{}, {"pad_token_id": 0}, {"generation_config": GenerationConfig(pad_token_id=0, max_new_tokens=6)}],
    ids=["model", "argument", "config"],
)
def test_without_a_mask_padding_is_found_as_stock_finds_it(wrapped, make_batch, how):
    batch = make_batch(*MIXED)
    wanted = wrapped.generate(**batch, **NEW)
    if how:
        wrapped.generation_config.pad_token_id = None
    ids_and_pixels = {k: batch[k] for k in ("input_ids", "pixel_values")}
    assert torch.equal(wrapped.generate(**ids_and_pixels, **{**NEW, **how}), wanted)


def test_the_callers_tensors_and_arguments_are_not_changed(wrapped, make_batch):
    batch = make_batch(*MIXED)
    before = {k: v.clone() for k, v in batch.items()}
    kwargs = dict(batch)
    wrapped.generate(**kwargs, num_beams=2, **NEW)
    wrapped(**kwargs)
    assert kwargs.keys() == before.keys() and all(torch.equal(batch[k], before[k]) for k in before)


def test_images_without_ids_are_refused(wrapped, make_batch):
    batch = make_batch("one image")
    embeds = wrapped.get_input_embeddings()(batch.input_ids)
    with pytest.raises(me.CountMismatchError, match="input_ids"):
        wrapped.generate(inputs_embeds=embeds, pixel_values=batch.pixel_values, max_new_tokens=1)
    with pytest.raises(me.CountMismatchError, match="input_ids"):
        wrapped(inputs_embeds=embeds, pixel_values=batch.pixel_values)


def test_the_explicit_path_works_on_a_wrapped_model_and_is_not_compressed_again(wrapped, plain, make_batch):
    batch = make_batch(*MIXED)
    prepared = me.prepare(wrapped, "random:tokens=5", **batch)
    assert torch.equal(wrapped.generate(**prepared.model_kwargs, **NEW), plain.generate(**prepared.model_kwargs, **NEW))
    assert torch.equal(wrapped(**prepared.model_kwargs).logits, plain(**prepared.model_kwargs).logits)


@pytest.mark.parametrize("skip_prompt", [True, False])
def test_a_streamer_yields_the_text_of_the_plain_call(wrapped, processor, make_batch, skip_prompt):
    batch = make_batch("one image")
    wanted = wrapped.generate(**batch, **NEW)[0, batch.input_ids.shape[1] if skip_prompt else 0 :]
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=skip_prompt, timeout=60)
    thread = threading.Thread(target=wrapped.generate, kwargs={**batch, **NEW, "streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == processor.tokenizer.decode(wanted)


def test_stopping_criteria_see_sequences_as_long_as_the_callers(wrapped, make_batch):
    """Harnesses look at ``ids[:, prompt_length:]``, as they do with the output."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    batch, answers = make_batch("one image"), []

    class Watch(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            answers.append(ids[0, batch.input_ids.shape[1] :].tolist())
            return torch.zeros(len(ids), dtype=torch.bool)

    out = wrapped.generate(**batch, stopping_criteria=StoppingCriteriaList([Watch()]), max_new_tokens=3)
    assert answers[-1] == out[0, batch.input_ids.shape[1] :].tolist()


@pytest.mark.parametrize("spec", METHODS)
def test_forward_equals_the_explicit_path(tiny_llava, plain, make_batch, spec):
    batch = make_batch(*MIXED)
    prepared = me.prepare(plain, spec, **batch)
    out = me.wrap(tiny_llava, spec)(**batch)
    assert torch.equal(out.logits, plain(**prepared.model_kwargs).logits)
    assert out.logits.shape[1] == prepared.model_kwargs["input_ids"].shape[1]
    assert torch.equal(out.visual_keep_mask, prepared.visual_keep_mask)
    assert out.visual_keep_mask.shape == batch.input_ids.shape and out.visual_keep_mask.dtype == torch.bool


def test_the_keep_mask_is_false_exactly_where_a_visual_token_went(wrapped, make_batch):
    batch = make_batch(*MIXED)
    mask = wrapped(**batch).visual_keep_mask
    assert mask[batch.input_ids != IMAGE].all()
    assert (~mask).sum(1).tolist() == [27, 54, 0, 27]


def test_forward_at_keep_1_is_bit_equal_to_stock(tiny_llava, plain, make_batch):
    batch = make_batch(*MIXED)
    out = me.wrap(tiny_llava, "divprune:keep=1")(**batch)
    assert torch.equal(out.logits, plain(**batch).logits) and out.visual_keep_mask.all()


def test_forward_takes_positional_arguments(wrapped, make_batch):
    batch = make_batch(*MIXED)
    assert torch.equal(wrapped(batch.input_ids, batch.pixel_values, batch.attention_mask).logits, wrapped(**batch).logits)
    text = make_batch("text only")
    assert torch.equal(wrapped(text.input_ids).logits, wrapped(input_ids=text.input_ids).logits)


def test_forward_options_pass_through(wrapped, make_batch):
    batch = make_batch("one image")
    whole = wrapped(**batch)
    last = wrapped(**batch, logits_to_keep=1).logits  # the head of one position sums in another order, in stock too
    torch.testing.assert_close(last, whole.logits[:, -1:], atol=1e-6, rtol=1e-5)
    states = wrapped(**batch, output_hidden_states=True).hidden_states
    assert len(states) == 4 and states[0].shape[1] == whole.logits.shape[1]
    assert torch.equal(wrapped(**batch, return_dict=False)[0], whole.logits)
    assert torch.equal(wrapped(**batch, use_cache=False).logits, whole.logits)


def test_positions_keep_without_a_cache_is_not_read_as_packed_sequences(tiny_llava, make_batch):
    batch = make_batch("one image")
    me.wrap(tiny_llava, "uniform:tokens=9,positions=keep")
    torch.testing.assert_close(tiny_llava(**batch, use_cache=False).logits, tiny_llava(**batch).logits, atol=1e-5, rtol=1e-5)
    without_mask = {k: batch[k] for k in ("input_ids", "pixel_values")}
    assert torch.equal(tiny_llava(**without_mask, use_cache=False).logits, tiny_llava(**batch, use_cache=False).logits)


@pytest.mark.parametrize("spec", POSITIONED)
@pytest.mark.parametrize("mask", ["full-length mask", "reduced mask", "no mask"])
def test_a_decode_loop_over_forward_equals_generate(tiny_llava, make_batch, spec, mask):
    batch = make_batch(*MIXED)
    me.wrap(tiny_llava, spec)
    wanted = tiny_llava.generate(**batch, **NEW)[:, batch.input_ids.shape[1] :]
    with torch.no_grad():
        out = tiny_llava(**batch)
        long = batch.attention_mask
        short = me.prepare(tiny_llava, spec, **batch).model_kwargs["attention_mask"]
        tokens = [out.logits[:, -1].argmax(-1)]
        for _ in range(5):
            one = torch.ones(len(long), 1, dtype=torch.long)
            long, short = torch.cat([long, one], 1), torch.cat([short, one], 1)
            given = {"full-length mask": {"attention_mask": long}, "reduced mask": {"attention_mask": short}, "no mask": {}}[mask]
            out = tiny_llava(input_ids=tokens[-1][:, None], past_key_values=out.past_key_values, **given)
            tokens.append(out.logits[:, -1].argmax(-1))
    assert torch.equal(torch.stack(tokens, 1), wanted)


def test_a_decode_loop_over_tuples_equals_generate(wrapped, make_batch):
    batch = make_batch(*MIXED)
    wanted = wrapped.generate(**batch, **NEW)[:, batch.input_ids.shape[1] :]
    mask, tokens = batch.attention_mask, []
    with torch.no_grad():
        logits, cache = wrapped(**batch, return_dict=False)[:2]
        for _ in range(6):
            tokens.append(logits[:, -1].argmax(-1))
            mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.long)], 1)
            logits, cache = wrapped(input_ids=tokens[-1][:, None], attention_mask=mask, past_key_values=cache, return_dict=False)[:2]
    assert torch.equal(torch.stack(tokens, 1), wanted)


def test_embeddings_on_a_compressed_cache_are_refused(wrapped, make_batch):
    """A mask of full length on a shorter cache is cut without an error by transformers, which gives wrong tokens."""
    batch = make_batch(*MIXED)
    with torch.no_grad():
        out = wrapped(**batch)
        embeds = wrapped.get_input_embeddings()(out.logits[:, -1:].argmax(-1))
        with pytest.raises(me.CountMismatchError, match="input_ids"):
            wrapped(inputs_embeds=embeds, past_key_values=out.past_key_values)


@pytest.mark.parametrize("setting", [{"vision_feature_layer": -2}, {"vision_feature_layer": 1}])
def test_a_feature_layer_for_one_call_is_the_configured_one(wrapped, make_llava, make_batch, setting):
    batch = make_batch(*MIXED)
    configured = me.wrap(make_llava(**setting), "divprune:tokens=9")
    assert torch.equal(wrapped(**batch, **setting).logits, configured(**batch).logits)
    assert not torch.equal(wrapped(**batch).logits, configured(**batch).logits)
    assert torch.equal(wrapped.generate(**batch, **setting, **NEW), configured.generate(**batch, **NEW))


def test_a_boolean_mask_is_a_mask(wrapped, make_batch):
    batch = make_batch(*MIXED)
    boolean = {**batch, "attention_mask": batch.attention_mask.bool()}
    assert torch.equal(wrapped(**boolean).logits, wrapped(**batch).logits)
    assert torch.equal(wrapped.generate(**boolean, **NEW), wrapped.generate(**batch, **NEW))


def test_another_wrapped_model_called_within_generate_is_compressed_too(wrapped, make_llava, make_batch):
    """Contrastive decoding asks a second model in a logits processor."""
    from transformers import LogitsProcessorList

    batch, other, seen = make_batch("one image"), me.wrap(make_llava(seed=1), "divprune:tokens=4"), []
    wanted = other(**batch).logits

    def ask(ids, scores):
        seen.append(other(**batch).logits)
        return scores

    wrapped.generate(**batch, logits_processor=LogitsProcessorList([ask]), max_new_tokens=1)
    assert torch.equal(seen[0], wanted)
