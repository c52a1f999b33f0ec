"""Every family: later turns, decode loops by hand, modes of generation, copies and traps."""

from __future__ import annotations

import copy
import pickle
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import mllm_efficient as me
from mllm_efficient.patches import transformers_version

from ..families import (
    FAMILIES,
    MROPE,
    PAD,
    SPECIAL,
    STATEFUL,
    VOCABULARY,
    WITH_VIDEO,
    make,
    noise,
    process,
    tiny,
)
from ..families_reference import extended, greedy, logits
from ..pairs import pairwise, two_by_two
from .test_families import (
    NEW,
    NEWLINES,
    answer,
    in_turn,
    sequence,
    types,
)
from .test_families_reports import (
    both,
    labelled,
    vision,
)

# ------------------------------------------------------------------------------------------------ the next turn

TURN_2 = "assistant : yes . user : how many are blue ? assistant :"
TURN_2_IMAGE = "user : is I the cross ? assistant :"


def say(name: str, text: str) -> dict[str, Any]:
    """The next user turn, without the beginning-of-sequence token."""
    out = process(name, [text], [[noise(99, 30, 44)]] if " I " in text else [[]])
    return {k: v[:, 1:] if k in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids") else v for k, v in out.items()}


RULES = ("divprune:keep=0.3", "pool:keep=0.4", "divprune:keep=0.3,positions=other", "resize:keep=0.4")


def rule(name: str, spec: str) -> str:
    """``positions=other`` is the rule that is not the family's own."""
    return spec.replace("other", "renumber" if name in MROPE else "keep")


@pytest.mark.every_family
@pytest.mark.parametrize("spec, name, turn", pairwise(product(RULES, FAMILIES, ("text only", "new image"))))
def test_a_second_turn_on_the_cache_equals_a_fresh_call_without_cache(spec, name, turn):
    model = me.wrap(tiny(name), rule(name, spec))
    row = "video and image" if name in WITH_VIDEO else "two images"
    inputs, new = make(name, row), say(name, TURN_2 if turn == "text only" else TURN_2_IMAGE)
    first = model.generate(**inputs, return_dict_in_generate=True, **NEW)
    ids = torch.cat([first.sequences, new["input_ids"]], 1)
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **types(name, ids)}
    fresh = answer(model, {**whole, **both(inputs, new)})
    cached = answer(model, {**whole, **vision(new)}, past_key_values=first.past_key_values)
    assert torch.equal(cached, fresh)
    assert [i.modality for i in me.last_report(model).images] == ([] if turn == "text only" else ["image"])


@pytest.mark.parametrize("spec, name", in_turn(["divprune:keep=0.3", "pool:keep=0.4"]))
def test_a_second_turn_of_a_padded_batch_equals_a_fresh_call_without_cache(spec, name):
    model, rows = me.wrap(tiny(name), spec), FAMILIES[name].mixed
    inputs, new = make(name, *rows), say(name, TURN_2)["input_ids"].expand(len(rows), -1)
    first = model.generate(**inputs, return_dict_in_generate=True, **NEW)
    ids = torch.cat([first.sequences, new], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(rows), 6 + new.shape[1], dtype=torch.long)], 1)
    whole = {"input_ids": ids, "attention_mask": mask, **types(name, ids)}
    other = me.wrap(tiny(name), spec)
    fresh = answer(other, {**whole, **vision(inputs)})
    answer(model, make(name, "one image"))  # another prompt in between, which leaves its own state on M-RoPE models
    assert torch.equal(answer(model, whole, past_key_values=first.past_key_values), fresh)


@pytest.mark.parametrize("spec, name", in_turn(["divprune:keep=0.3", "divprune:keep=0.3,positions=other", "pool:keep=0.4"]))
def test_a_second_turn_after_rows_that_ended_early_equals_a_fresh_call(spec, name):
    """The shorter answers are padded inside the conversation, and that padding takes no position."""
    model, rows = me.wrap(tiny(name), rule(name, spec)), FAMILIES[name].mixed
    inputs, new = make(name, *rows), say(name, TURN_2)["input_ids"].expand(len(rows), -1)
    free = answer(model, inputs)
    ends = int(free[0, 1])
    first = model.generate(**inputs, eos_token_id=ends, return_dict_in_generate=True, **NEW)
    answers = first.sequences[:, inputs["input_ids"].shape[1] :]
    real = torch.cat([torch.ones(len(rows), 1, dtype=torch.bool), (answers == ends).cumsum(1)[:, :-1] == 0], 1)
    assert not real.all() and not torch.equal(real, real[:1].expand_as(real))
    ids = torch.cat([first.sequences, new], 1)
    whole = {
        "input_ids": ids,
        "attention_mask": torch.cat([inputs["attention_mask"], real.long(), torch.ones_like(new)], 1),
        **types(name, ids),
    }
    cached = answer(model, whole, past_key_values=first.past_key_values)
    assert torch.equal(cached, answer(model, {**whole, **vision(inputs)}))


@pytest.mark.parametrize("spec, name", in_turn(["divprune:keep=0.3", "pool:keep=0.4", "divprune:keep=0.3,positions=other"]))
def test_three_turns_equal_the_slow_reference(spec, name):
    """Text, then a picture, then text: every answer is that of the whole conversation by hand."""
    spec = rule(name, spec)
    plain, model = tiny(name), me.wrap(tiny(name), spec)
    given, cache, seen = make(name, "two images"), None, None
    ids = given["input_ids"]
    for text in (TURN_2, TURN_2_IMAGE, TURN_2):
        whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **types(name, ids)}
        out = model.generate(**whole, **vision(given), past_key_values=cache, return_dict_in_generate=True, **NEW)
        seen = vision(given) if seen is None else both(seen, given)
        assert out.sequences[0, ids.shape[1] :].tolist() == greedy(plain, sequence(name, plain, spec, {"input_ids": ids, **seen}))
        given = say(name, text)
        ids, cache = torch.cat([out.sequences, given["input_ids"]], 1), out.past_key_values


@pytest.mark.parametrize("spec, name, mask", pairwise(product(RULES[:3], FAMILIES, ("full-length mask", "no mask"))))
def test_a_decode_loop_over_forward_equals_generate(spec, name, mask):
    model, inputs = me.wrap(tiny(name), rule(name, spec)), make(name, *FAMILIES[name].mixed)
    wanted, aside = answer(model, inputs), make(name, "one image")
    with torch.no_grad():
        out = model(**inputs)
        assert out.visual_keep_mask.shape == inputs["input_ids"].shape
        cache, seen, tokens = out.past_key_values, inputs["attention_mask"], [out.logits[:, -1].argmax(-1)]
        for step in range(5):
            if step == 2:
                model(**aside)  # leaves the offsets of another prompt on M-RoPE models
            seen = torch.cat([seen, torch.ones(len(seen), 1, dtype=torch.long)], 1)
            given = {"attention_mask": seen} if mask == "full-length mask" else {}
            out = model(input_ids=tokens[-1][:, None], past_key_values=cache, **given)
            tokens.append(out.logits[:, -1].argmax(-1))
    assert torch.equal(torch.stack(tokens, 1), wanted)


@pytest.mark.parametrize("name", [f for f in FAMILIES if f not in STATEFUL])  # a state is not told of padding after the first call
def test_turns_of_different_lengths_by_forward_equal_each_row_alone(name):
    """Padding between two turns takes no position, where positions are explicit."""
    model, rows = me.wrap(tiny(name), "divprune:keep=0.3,positions=keep"), FAMILIES[name].mixed
    texts = [TURN_2, "red ?", "assistant : no . user : is it green ?"]
    turns = [say(name, texts[i % 3])["input_ids"][0] for i in range(len(rows))]
    longest = max(len(turn) for turn in turns)
    new, real = torch.full((len(rows), longest), PAD), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, turn in enumerate(turns):
        new[i, longest - len(turn) :], real[i, longest - len(turn) :] = turn, 1
    inputs = make(name, *rows)
    with torch.no_grad():
        mask = torch.cat([inputs["attention_mask"], real], 1)
        together = model(input_ids=new, attention_mask=mask, past_key_values=model(**inputs).past_key_values).logits
        for i, (row, turn) in enumerate(zip(rows, turns)):
            single = model(input_ids=turn[None], past_key_values=model(**make(name, row)).past_key_values).logits[0]
            torch.testing.assert_close(together[i, longest - len(turn) :], single, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------ modes of generation

MODES = {
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "several answers": {"do_sample": True, "top_k": 1, "num_return_sequences": 2},
    "chunked prefill": {"prefill_chunk_size": 7},
}  # fmt: skip


# In a chunked prefill the plain model's tokens of an image that is seen both ways do not see those of a later chunk.
POSSIBLE = [case for case in product(MODES, FAMILIES, RULES[:2]) if case[0] != "chunked prefill" or not FAMILIES[case[1]].typed]


@pytest.mark.parametrize("mode, name, spec", pairwise(POSSIBLE))
def test_every_mode_equals_plain_greedy(mode, name, spec):
    rows = FAMILIES[name].mixed
    if mode == "several answers" and name == "glm46v":  # of several images, the plain model gives an answer the first one twice
        rows = tuple(row for row in rows if row != "two images")
    model, inputs = me.wrap(tiny(name), spec), make(name, *rows)
    if mode == "chunked prefill" and transformers_version() < (5, 23):
        with pytest.raises(me.MllmEfficientError, match="5.23"):
            answer(model, inputs, **MODES[mode])
        return
    plain = answer(model, inputs)
    found = answer(model, inputs, **MODES[mode])
    assert torch.equal(found, plain.repeat_interleave(2, 0) if mode == "several answers" else plain)


@pytest.mark.every_family
@pytest.mark.parametrize("name", FAMILIES)
def test_returned_beams_of_a_batch_are_those_of_each_row(name):
    how = dict(num_beams=3, num_return_sequences=2)
    model, rows = me.wrap(tiny(name), "divprune:keep=0.3"), FAMILIES[name].mixed
    together = answer(model, make(name, *rows), **how)
    assert torch.equal(together, torch.cat([answer(model, make(name, row), **how) for row in rows]))


@pytest.mark.parametrize("order", ["wrap first", "offload first"])
@pytest.mark.parametrize("name", [f for f in FAMILIES if f != "glm46v"])  # whose tower reads a weight that is not loaded, wrapped or not
def test_offload_to_the_cpu_equals_plain_greedy(name, order):
    """Stock ``generate`` of a model with a newline embedding fails under offload; its ``forward`` does not."""
    import accelerate

    def offloaded(model):
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))

    inputs, plain = make(name, *FAMILIES[name].mixed), me.wrap(tiny(name), "divprune:keep=0.3")
    model = me.wrap(tiny(name), "divprune:keep=0.3") if order == "wrap first" else offloaded(tiny(name))
    model = offloaded(model) if order == "wrap first" else me.wrap(model, "divprune:keep=0.3")
    if name == "idefics3":  # stock compares its features with placeholders on a device that has no values
        with pytest.raises(RuntimeError, match="meta tensors"):
            offloaded(tiny(name))(**inputs)
        return
    with torch.no_grad():
        offloaded(tiny(name))(**inputs)
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    if name in NEWLINES:
        with pytest.raises(NotImplementedError, match="meta tensor"):
            answer(offloaded(tiny(name)), inputs)
        return
    assert torch.equal(answer(model, inputs), answer(plain, inputs))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pickled_model_still_compresses(name):
    model, inputs = me.wrap(tiny(name), "divprune:keep=0.3"), make(name, *FAMILIES[name].mixed)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(answer(again, inputs), answer(model, inputs))
    assert me.last_report(again).visual_tokens_kept < me.last_report(again).visual_tokens_full
    assert torch.equal(answer(me.unwrap(again), inputs), answer(tiny(name), inputs))


@pytest.mark.parametrize("name", FAMILIES)
def test_trap_01_model_kwargs_serve_two_calls_with_beams(name):
    model = tiny(name)
    prepared = me.prepare(model, "divprune:keep=0.3", **make(name, *FAMILIES[name].mixed))
    first = model.generate(**prepared.model_kwargs, num_beams=3, **NEW)
    assert torch.equal(model.generate(**prepared.model_kwargs, num_beams=3, **NEW), first)
    with torch.no_grad():
        assert torch.equal(model(**prepared.model_kwargs).logits, model(**prepared.model_kwargs).logits)


@pytest.mark.parametrize("name", [*[f for f in FAMILIES if FAMILIES[f].in_prompt], *[f for f in WITH_VIDEO if f not in MROPE]])
def test_trap_02_beams_of_ragged_features_in_one_tensor_do_not_mix_up_rows(name):
    """Two rows of images, or of videos and images, with different counts in each."""
    rows = ("one image", "two images") if FAMILIES[name].in_prompt else ("video", "video and image")
    for spec in ("divprune:keep=0.3", "divprune:tokens=6", "pool:keep=0.4"):
        model = me.wrap(tiny(name), spec)
        together = answer(model, make(name, *rows), num_beams=3)
        assert torch.equal(together, torch.cat([answer(model, make(name, row), num_beams=3) for row in rows]))
        back = answer(model, make(name, *rows[::-1]), num_beams=3)
        assert torch.equal(together, back.flip(0))


@pytest.mark.parametrize("name", MROPE)
@pytest.mark.parametrize("spec", ["divprune:keep=0.3", "divprune:keep=0.3,positions=renumber", "pool:keep=0.4"])
def test_trap_03_full_ids_on_a_reduced_mrope_cache_are_mapped_or_refused(name, spec):
    plain, model = tiny(name), me.wrap(tiny(name), spec)
    inputs, new = make(name, "two images"), say(name, TURN_2)["input_ids"]
    ids = torch.cat([inputs["input_ids"], new], 1)
    with torch.no_grad():
        left = extended(plain, sequence(name, plain, spec, inputs), new[0])
        wanted = logits(plain, left)[-new.shape[1] :]
        for given in (ids, new):
            cache = model(**inputs).past_key_values
            model(**make(name, "one image"))  # stale offsets of another prompt
            found = model(input_ids=given, past_key_values=cache).logits[0]
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        for wrong in (ids[:, 3:], inputs["input_ids"]):
            with pytest.raises(me.MllmEfficientError):
                cache = model(**inputs).past_key_values
                model(input_ids=wrong, attention_mask=torch.ones_like(wrong), past_key_values=cache)
        with pytest.raises(me.MllmEfficientError):
            model.generate(input_ids=ids[:, 3:], past_key_values=model(**inputs).past_key_values, **NEW)


@pytest.mark.parametrize("name", FAMILIES)
def test_trap_04_a_mask_of_full_length_on_a_reduced_cache_loses_the_removed_columns(name):
    """Cut to its first columns, as stock does it, the padding of the shorter rows would be seen."""
    model, rows = me.wrap(tiny(name), "uniform:keep=0.3"), FAMILIES[name].mixed
    new = say(name, TURN_2)["input_ids"]
    with torch.no_grad():
        single = [model(input_ids=new, past_key_values=model(**make(name, row)).past_key_values).logits[0] for row in rows]
        inputs = make(name, *rows)
        cache = model(**inputs).past_key_values
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(rows), new.shape[1], dtype=torch.long)], 1)
        found = model(input_ids=new.expand(len(rows), -1), attention_mask=mask, past_key_values=cache).logits
        torch.testing.assert_close(found, torch.stack(single), atol=1e-4, rtol=1e-4)
        for width in (mask.shape[1] - 1, mask.shape[1] + 1):
            with pytest.raises(me.MllmEfficientError, match="attention_mask"):
                model(
                    input_ids=new.expand(len(rows), -1),
                    attention_mask=torch.ones(len(rows), width, dtype=torch.long),
                    past_key_values=model(**inputs).past_key_values,
                )


def windowed(layers: list[str]) -> Any:
    """OneVision whose decoder sees 12 tokens back in the layers that slide."""
    model = tiny("llava_onevision")
    text = model.config.text_config
    text.use_sliding_window, text.sliding_window, text.layer_types = True, 12, layers
    fresh = type(model)(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    fresh.generation_config = model.generation_config
    return fresh


@pytest.mark.parametrize("row", ["long text", "image and video"])
def test_trap_05_layers_that_slide_and_layers_that_do_not_have_a_mask_each(row):
    model, inputs = windowed(["sliding_attention", "full_attention"]), make("llava_onevision", row)
    wanted = greedy(model, sequence("llava_onevision", model, "divprune:keep=0.3", inputs))
    plain = tiny("llava_onevision")
    assert wanted != greedy(plain, sequence("llava_onevision", plain, "divprune:keep=0.3", inputs)), "the window matters"
    assert answer(me.wrap(model, "divprune:keep=0.3"), inputs)[0].tolist() == wanted


@pytest.mark.parametrize("spec", ["divprune:keep=0.3", "divprune:keep=0.3,positions=other", "pool:keep=0.4"])
@pytest.mark.parametrize("name", [f for f in FAMILIES if f not in STATEFUL])  # transformers refuses drafts there
def test_trap_06_prompt_lookup_equals_plain_greedy(name, spec):
    """The draft comes from the prompt's own repetitions. What precedes the image is no answer, so it holds no placeholder."""
    spec = rule(name, spec)
    inputs = process(name, ["user : I is the ring red ? is the ring"], [[noise(7, 44, 30)]])
    how = {"suppress_tokens": [VOCABULARY["user"], VOCABULARY[":"], *range(len(SPECIAL))]}
    model = tiny(name)
    assert torch.equal(answer(model, inputs, prompt_lookup_num_tokens=3, **how), answer(model, inputs, **how)), "stock"
    me.wrap(model, spec)
    plain = answer(model, inputs, **how)
    assert torch.equal(answer(model, inputs, prompt_lookup_num_tokens=3, **how), plain)
    assert torch.equal(answer(model, inputs, assistant_model=tiny(name), **how), plain)


@pytest.mark.parametrize("name", FAMILIES)
def test_trap_07_the_first_token_after_left_padding_is_not_learned(name):
    model, inputs = tiny(name), make(name, *FAMILIES[name].mixed)
    kwargs = me.prepare(model, "uniform:keep=0.3", labels=labelled(name, inputs), **inputs).model_kwargs
    real = kwargs["attention_mask"].bool()
    first = real & ~torch.cat([torch.ones_like(real[:, :1]), real[:, :-1]], 1)
    assert first.any() and (kwargs["labels"][first] == -100).all() and (kwargs["labels"][~real] == -100).all()
    learned = kwargs["labels"] != -100
    assert torch.equal(kwargs["labels"][learned], kwargs["input_ids"][learned])


@pytest.mark.every_family
@pytest.mark.parametrize("name", FAMILIES)
def test_trap_08_a_prepared_call_has_no_pixels_and_no_sizes_of_the_full_picture(name):
    model, inputs = tiny(name), make(name, *FAMILIES[name].mixed)
    kwargs = me.prepare(model, "divprune:keep=0.3", **inputs).model_kwargs
    assert not vision(inputs).keys() & kwargs.keys()
    assert set(kwargs) <= {"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids", "mm_encoder_outputs", "position_ids"}
    length = kwargs["input_ids"].shape[1]
    assert all(v.shape[-1] == length for k, v in kwargs.items() if k != "mm_encoder_outputs")
    with pytest.raises(ValueError):
        model(**kwargs, pixel_values=inputs["pixel_values"])


@pytest.mark.parametrize("name", FAMILIES)
def test_trap_10_a_deep_copy_compresses_with_its_own_weights(name):
    model, inputs = me.wrap(tiny(name), "divprune:keep=0.3"), make(name, *FAMILIES[name].mixed)
    twin = copy.deepcopy(model)
    before = answer(model, inputs)
    with torch.no_grad():
        twin.lm_head.weight.neg_()
    assert not torch.equal(answer(twin, inputs), before) and torch.equal(answer(model, inputs), before)
    other = tiny(name)
    with torch.no_grad():
        other.lm_head.weight.neg_()
    assert torch.equal(answer(twin, inputs), answer(me.wrap(other, "divprune:keep=0.3"), inputs))
    me.unwrap(twin)
    assert torch.equal(answer(model, inputs), before)


@pytest.mark.parametrize("spec, name", in_turn(["divprune:keep=0.000001", "uniform:tokens=1"]))
def test_trap_11_one_token_of_every_image_is_left_and_beams_match_rows(name, spec):
    model, rows = me.wrap(tiny(name), spec), FAMILIES[name].mixed
    together = answer(model, make(name, *rows), num_beams=3)
    assert {i.kept for i in me.last_report(model).images} == {1}
    assert torch.equal(together, torch.cat([answer(model, make(name, row), num_beams=3) for row in rows]))


def test_trap_12_a_sliding_window_counts_kept_tokens():
    """It reaches farther back than in the full prompt: the bare decoder on the reduced sequence is the reference."""
    model, inputs = windowed(["sliding_attention", "sliding_attention"]), make("llava_onevision", "long text")
    wanted = greedy(model, sequence("llava_onevision", model, "uniform:keep=0.1", inputs))
    assert answer(me.wrap(model, "uniform:keep=0.1"), inputs)[0].tolist() == wanted


@pytest.mark.parametrize("name", FAMILIES)
def test_trap_13_logits_processors_see_the_original_prompt(name):
    from transformers import LogitsProcessorList

    seen: list[Tensor] = []

    def watch(ids, scores):
        seen.append(ids)
        return scores

    model, inputs = me.wrap(tiny(name), "divprune:keep=0.3"), make(name, "two images")
    kwargs = me.prepare(model, "divprune:keep=0.3", **inputs).model_kwargs
    out = answer(model, inputs, logits_processor=LogitsProcessorList([watch]))
    assert torch.equal(seen[0], inputs["input_ids"])
    assert torch.equal(seen[-1], torch.cat([inputs["input_ids"], out[:, :-1]], 1))
    penalised = answer(model, inputs, repetition_penalty=1.3)  # which looks at the set of tokens: placeholders are in both prompts
    again = model.generate(**kwargs, repetition_penalty=1.3, **NEW)[:, kwargs["input_ids"].shape[1] :]
    assert torch.equal(penalised, again)


@two_by_two
@pytest.mark.parametrize("size", [(994, 263), (3846, 49), (7, 3295), (49, 3846)], ids=str)
@pytest.mark.parametrize(
    "spec", ["divprune:keep=0.5", "resize:tokens=64", "resize:keep=0.3", "resize:keep=0.5,newline=keep", "pool:keep=0.5"]
)
@pytest.mark.parametrize("name", NEWLINES)
def test_pictures_whose_map_rounding_makes_odd_run_or_are_refused_in_one_line(name, spec, size):
    """A smaller picture's map can have more rows than the full one's, and a very long one's map can be all padding."""
    from PIL import Image

    inputs = process(name, ["user : I what is it ?"], [[Image.new("RGB", size, (9, 90, 200))]])
    try:
        prepared = me.prepare(tiny(name), spec, **inputs)
    except me.BadBudgetError:
        return
    (image,) = prepared.report.images
    assert image.kept <= max(1, me.build(spec).budget.count(image.full, fixed=False))
    assert answer(me.wrap(tiny(name), spec), inputs).shape == (1, 6)


def test_more_tokens_than_a_tile_has_are_said_to_be_clamped():
    report = me.prepare(tiny("llava_next"), "uniform:tokens=1000,per=tile", **make("llava_next", "one image")).report
    assert report.images[0].clamped and report.images[0].kept == report.images[0].full


def test_an_order_of_choice_for_several_choices_is_refused():
    with pytest.raises(me.UnsupportedModelError, match="order='picked' is the order of one choice"):
        me.prepare(tiny("llava_next"), "divprune:keep=0.5,order=picked,per=tile", **make("llava_next", "one image"))
