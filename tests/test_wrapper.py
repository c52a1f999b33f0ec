"""``me.wrap``: the model is used as before, gives what the explicit path gives, and ``me.unwrap`` leaves no trace."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, TextIteratorStreamer

import mllm_efficient as me
from mllm_efficient.patches import transformers_version
from mllm_efficient.patches.families.llava import LlavaAdapter

N, GRID, IMAGE = 36, (6, 6), 4
MIXED = ("one image", "two images", "text only", "long text")
NEW = dict(max_new_tokens=6)


def methods_to_try() -> list[str]:
    """A specification of every method this model can run as it is; trained ones bring their own weights and tests."""
    out = []
    for name in me.list_methods():
        cls = me.get_method(name)
        if cls.kind == "pre_llm" and not cls.trained and set(cls.needs) <= LlavaAdapter.gives:
            out.append("none" if name == "none" else f"{name}:tokens=9")
    return out


METHODS = methods_to_try()
POSITIONED = ("divprune:tokens=9", "random:tokens=9", "pool:tokens=9", "uniform:tokens=9,positions=keep")


@pytest.fixture
def plain(make_llava):
    """The same model, never wrapped."""
    return make_llava()


@pytest.fixture
def wrapped(tiny_llava):
    return me.wrap(tiny_llava, "divprune:tokens=9")


def explicit(plain, spec, batch, **how):
    """Prompt and new tokens of the explicit path: ``prepare``, then the stock ``generate``."""
    kwargs = me.prepare(plain, spec, **batch).model_kwargs
    out = plain.generate(**kwargs, **how)
    prompt = batch["input_ids"].repeat_interleave(len(out) // len(batch["input_ids"]), 0)
    return torch.cat([prompt, out[:, kwargs["input_ids"].shape[1] :]], 1)


def trace(model) -> dict:
    """Everything ``wrap`` could leave behind, module by module."""
    hooks = [n for n in vars(torch.nn.Module()) if "hook" in n]
    return {
        name: (type(m), sorted(vars(m)), [(h, list(v.items()) if isinstance(v := getattr(m, h), dict) else v) for h in hooks])
        for name, m in model.named_modules()
    }


# ------------------------------------------------------------------------------------------------ on and off


def test_wrap_and_unwrap_leave_no_trace(tiny_llava, make_batch):
    batch = make_batch(*MIXED)
    stock = tiny_llava.generate(**batch, **NEW), tiny_llava(**batch).logits  # transformers puts hooks of its own on at first use
    before, config = trace(tiny_llava), tiny_llava.generation_config.to_dict()
    weights = {k: v.clone() for k, v in tiny_llava.state_dict().items()}
    assert me.wrap(tiny_llava, "divprune:tokens=9") is tiny_llava
    tiny_llava.generate(**batch, num_beams=2, **NEW)
    tiny_llava(**batch)
    assert me.unwrap(tiny_llava) is tiny_llava
    assert trace(tiny_llava) == before and tiny_llava.generation_config.to_dict() == config
    assert tiny_llava.state_dict().keys() == weights.keys()
    assert all(torch.equal(v, weights[k]) for k, v in tiny_llava.state_dict().items())
    assert torch.equal(tiny_llava.generate(**batch, **NEW), stock[0]) and torch.equal(tiny_llava(**batch).logits, stock[1])


def test_a_wrapped_model_still_looks_like_itself(tiny_llava, plain):
    cls = type(tiny_llava)
    me.wrap(tiny_llava, "divprune:tokens=9")
    assert isinstance(tiny_llava, cls)
    now = type(tiny_llava)
    assert (now.__name__, now.__qualname__, now.__module__, str(now)) == (cls.__name__, cls.__qualname__, cls.__module__, str(cls))
    first, method, *rest = repr(tiny_llava).splitlines()
    assert [first, *rest] == repr(plain).splitlines() and method == "  compression='divprune:tokens=9'"
    assert sorted(vars(tiny_llava)) == sorted(vars(plain))
    assert tiny_llava.state_dict().keys() == plain.state_dict().keys()


def test_the_users_own_hooks_survive(tiny_llava, make_batch):
    called = []
    tiny_llava.register_forward_pre_hook(lambda m, a: called.append("before"))
    me.wrap(tiny_llava, "divprune:tokens=9")
    tiny_llava.register_forward_pre_hook(lambda m, a, k: called.append("after"), with_kwargs=True)
    tiny_llava.register_forward_hook(lambda m, a, o: called.append("output"))
    me.unwrap(tiny_llava)
    tiny_llava(**make_batch("one image"))
    assert called == ["before", "after", "output"]
    assert len(tiny_llava._forward_pre_hooks_with_kwargs) == 1 and len(tiny_llava._forward_hooks_with_kwargs) == 0


def test_wrapping_twice_is_refused(wrapped):
    with pytest.raises(me.AlreadyWrappedError, match="unwrap"):
        me.wrap(wrapped, "random:tokens=9")
    me.unwrap(wrapped)
    me.wrap(wrapped, "random:tokens=9")


def test_unwrapping_what_is_not_wrapped_is_refused(tiny_llava):
    with pytest.raises(me.MllmEfficientError, match="not wrapped"):
        me.unwrap(tiny_llava)


@pytest.mark.parametrize("spec, error", [
    ("divprun:tokens=9", me.UnknownMethodError), ("divprune:tokens=37", me.BadBudgetError), ("divprune:keep=0", me.BadBudgetError),
    ("divprune:budget=3", me.MllmEfficientError), (["divprune:tokens=9", "random:tokens=9"], me.MllmEfficientError),
    ("divprune:tokens=9 | pool:tokens=9", me.MllmEfficientError), ([], me.MllmEfficientError), (None, me.MllmEfficientError),
    ({"method": "divprune"}, me.BadBudgetError), (36, me.MllmEfficientError),
])  # fmt: skip
def test_a_method_that_cannot_run_is_refused_and_the_model_left_alone(tiny_llava, spec, error):
    before = trace(tiny_llava)
    with pytest.raises(error):
        me.wrap(tiny_llava, spec)
    assert trace(tiny_llava) == before


@pytest.mark.parametrize("name", ["projector", "in_llm"])
def test_a_composition_with_a_kind_that_cannot_run_here_is_refused(tiny_llava, registered, name):
    @registered("other")
    @dataclass(frozen=True, kw_only=True)
    class Other(me.Selector):
        kind = name

    for spec in ("other:tokens=9", "divprune:tokens=9 | other:tokens=4", ["other:tokens=9", me.DivPrune(tokens=4)]):
        with pytest.raises(me.UnsupportedModelError, match=f"other is of kind {name}"):
            me.wrap(tiny_llava, spec)


def test_compressed_is_undone_on_exit(tiny_llava, make_batch, plain):
    batch = make_batch("one image")
    tiny_llava(**batch)  # transformers puts hooks of its own on at first use
    before = trace(tiny_llava)
    with me.compressed(tiny_llava, "divprune:tokens=9") as model:
        assert model is tiny_llava
        inside = model.generate(**batch, **NEW)
    assert trace(tiny_llava) == before
    assert torch.equal(inside, explicit(plain, "divprune:tokens=9", batch, **NEW))
    assert torch.equal(tiny_llava.generate(**batch, **NEW), plain.generate(**batch, **NEW))


def test_compressed_is_undone_when_the_block_fails(tiny_llava):
    before = trace(tiny_llava)
    with pytest.raises(RuntimeError, match="mine"), me.compressed(tiny_llava, "divprune:tokens=9"):
        raise RuntimeError("mine")
    assert trace(tiny_llava) == before


def test_a_call_that_fails_leaves_the_next_one_right(wrapped, plain, make_batch):
    batch = make_batch("one image")
    with pytest.raises(ValueError, match="no_such_argument"):
        wrapped.generate(**batch, max_new_tokens=2, no_such_argument=1)
    with pytest.raises(me.CountMismatchError):
        wrapped(**{**batch, "input_ids": batch.input_ids[:, :20], "attention_mask": batch.attention_mask[:, :20]})
    assert torch.equal(wrapped.generate(**batch, **NEW), explicit(plain, "divprune:tokens=9", batch, **NEW))
    assert wrapped(**batch).logits.shape[1] == batch.input_ids.shape[1] - 27


# ------------------------------------------------------------------------------------------------ budgets and reports


@pytest.mark.parametrize("compression", ["random:tokens=5", me.Pool(tokens=4), {"method": "divprune", "tokens": 20}, "none"])
def test_a_method_for_one_call_only(wrapped, plain, make_batch, compression):
    batch = make_batch(*MIXED)
    once = wrapped.generate(**batch, compression=compression, **NEW)
    assert torch.equal(once, explicit(plain, compression, batch, **NEW))
    assert me.last_report(wrapped).visual_tokens_kept == me.build(compression).count(N, GRID) * 4
    assert torch.equal(wrapped.generate(**batch, **NEW), explicit(plain, "divprune:tokens=9", batch, **NEW))


def test_compression_none_is_the_stock_call(wrapped, plain, make_batch):
    batch = make_batch(*MIXED)
    assert torch.equal(wrapped.generate(**batch, compression=None, **NEW), plain.generate(**batch, **NEW))
    assert me.last_report(wrapped).images == ()


@pytest.mark.parametrize("row", ["one image", "text only"])
@pytest.mark.parametrize("compression, error", [("divprun:tokens=9", me.UnknownMethodError), ("divprune:tokens=37", me.BadBudgetError)])
def test_a_bad_method_for_one_call_is_refused_with_and_without_images(wrapped, make_batch, row, compression, error):
    with pytest.raises(error):
        wrapped.generate(**make_batch(row), compression=compression, max_new_tokens=1)


def test_a_step_of_a_decode_loop_does_not_replace_the_report(tiny_llava, make_batch):
    me.wrap(tiny_llava, "none")
    out = tiny_llava(**make_batch("one image"))
    tiny_llava(input_ids=out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values)
    assert me.last_report(tiny_llava).visual_tokens_kept == N


def test_an_older_transformers_refuses_chunked_prefill_and_a_newer_one_warns(wrapped, make_batch, monkeypatch):
    from mllm_efficient import patches

    monkeypatch.setattr(patches, "transformers_version", lambda: (5, 22))
    with pytest.raises(me.MllmEfficientError, match="5.23"):
        wrapped.generate(**make_batch("one image"), prefill_chunk_size=7, max_new_tokens=1)
    monkeypatch.undo()
    monkeypatch.setattr(patches, "NEWEST_TESTED", (5, 1))
    patches.transformers_version.cache_clear()
    with pytest.warns(UserWarning, match="newer than 5.1"):
        patches.transformers_version()


def test_last_report_of_generate_and_of_forward(wrapped, plain, make_batch):
    with pytest.raises(me.MllmEfficientError, match="no report yet"):
        me.last_report(wrapped)
    batch = make_batch(*MIXED)
    expected = me.prepare(plain, "divprune:tokens=9", **batch).report
    for call in (lambda: wrapped.generate(**batch, **NEW), lambda: wrapped(**batch)):
        call()
        report = me.last_report(wrapped)
        assert (report.visual_tokens_full, report.visual_tokens_kept, report.stages) == (4 * N, 36, expected.stages)
        assert [i.row for i in report.images] == [0, 1, 1, 3]
        assert all(torch.equal(a.indices, b.indices) and a.indices.device.type == "cpu" for a, b in zip(report.images, expected.images))
        wrapped.generate(**make_batch("text only"), max_new_tokens=1)
        assert me.last_report(wrapped).images == ()


def test_last_report_survives_unwrap(wrapped, make_batch):
    wrapped.generate(**make_batch("one image"), max_new_tokens=1)
    report = me.last_report(me.unwrap(wrapped))
    assert report.visual_tokens_kept == 9 and report.unwrapped
    assert str(report) == "no compression: the model was unwrapped since. Of its last call before: kept 9 of 36 visual tokens in 1 image(s)"
    me.wrap(wrapped, "divprune:tokens=4")
    with pytest.raises(me.MllmEfficientError, match="no call since it was wrapped"):
        me.last_report(wrapped)


def test_the_report_goes_when_the_model_goes(make_llava, make_batch):
    from mllm_efficient.report import _last

    model = me.wrap(make_llava(), "divprune:tokens=9")
    model.generate(**make_batch("one image"), max_new_tokens=1)
    gc.collect()
    gone, before = weakref.ref(model), len(_last)
    del model
    gc.collect()
    assert gone() is None and len(_last) == before - 1


def test_nothing_of_a_call_stays_on_the_model(wrapped, make_batch):
    wrapped(**make_batch("one image"))
    wrapped.generate(**make_batch("one image"), **NEW)
    before = trace(wrapped)
    wrapped.generate(**make_batch(*MIXED), compression="random:tokens=3", **NEW)
    wrapped(**make_batch(*MIXED))
    assert trace(wrapped) == before


# ------------------------------------------------------------------------------------------------ generate, mode by mode


@pytest.mark.parametrize("spec", METHODS)
def test_generate_begins_with_the_original_prompt_and_equals_the_explicit_path(tiny_llava, plain, make_batch, spec):
    batch = make_batch(*MIXED)
    out = me.wrap(tiny_llava, spec).generate(**batch, **NEW)
    assert torch.equal(out[:, : batch.input_ids.shape[1]], batch.input_ids)
    assert torch.equal(out, explicit(plain, spec, batch, **NEW))


MODES = {
    "plain": {}, "use_cache=False": {"use_cache": False}, "static cache": {"cache_implementation": "static"},
    "assisted": {"assistant_model": "same"}, "assisted by another": {"assistant_model": "other"},
    "assisted by a wrapped copy": {"assistant_model": "wrapped"}, "chunked prefill": {"prefill_chunk_size": 7},
}  # fmt: skip


@pytest.mark.parametrize("row", ["one image", "touching images"])
@pytest.mark.parametrize("spec", POSITIONED)
@pytest.mark.parametrize("mode", MODES)
def test_every_greedy_mode_equals_the_slow_reference(tiny_llava, plain, make_llava, make_batch, reference, mode, spec, row):
    batch, how = make_batch(row), dict(MODES[mode])
    if assistant := how.get("assistant_model"):
        how["assistant_model"] = {"same": plain, "other": make_llava(seed=1), "wrapped": me.wrap(make_llava(), spec)}[assistant]
    me.wrap(tiny_llava, spec)
    if mode == "chunked prefill" and transformers_version() < (5, 23):
        with pytest.raises(me.MllmEfficientError, match="prefill_chunk_size with images needs transformers 5.23"):
            tiny_llava.generate(**batch, **how, **NEW)
        return
    if mode == "use_cache=False" and "keep" in spec:
        with pytest.raises(me.MllmEfficientError, match="needs the cache"):
            tiny_llava.generate(**batch, **how, **NEW)
        return
    visual, places = reference.compressed(plain, spec, batch.pixel_values)
    expected = reference.greedy(plain, batch.input_ids[0], visual, N, 6, places)
    assert tiny_llava.generate(**batch, **how, **NEW)[0, batch.input_ids.shape[1] :].tolist() == expected


@pytest.mark.parametrize("spec", POSITIONED)
def test_prompt_lookup_equals_the_slow_reference(tiny_llava, plain, processor, reference, spec, picture):
    """Drafts come from the prompt's own repetitions: "the ring" is followed by "red ?" once."""
    batch = processor(images=picture(3), text="user : <image> is the ring red ? is the ring", return_tensors="pt")
    how = dict(prompt_lookup_num_tokens=3, **NEW)
    assert torch.equal(plain.generate(**batch, **how), plain.generate(**batch, **NEW))
    visual, places = reference.compressed(plain, spec, batch["pixel_values"])
    out = me.wrap(tiny_llava, spec).generate(**batch, **how)[0, batch["input_ids"].shape[1] :]
    assert out.tolist() == reference.greedy(plain, batch["input_ids"][0], visual, N, 6, places)


def test_prompt_lookup_that_drafts_a_placeholder_fails_as_in_stock(wrapped, plain, make_batch):
    """The prompt ends in ":", and its first ":" is followed by the image: transformers 5.23 drafts placeholders."""
    batch = make_batch("one image")
    for model in (plain, wrapped):
        with pytest.raises(ValueError, match="Image features and image tokens do not match"):
            model.generate(**batch, prompt_lookup_num_tokens=3, **NEW)


@pytest.mark.parametrize("mode", ["use_cache=False", "static cache", *(["chunked prefill"] if transformers_version() >= (5, 23) else [])])
def test_greedy_modes_on_a_padded_batch_equal_the_plain_mode(wrapped, make_batch, mode):
    batch = make_batch(*MIXED)
    assert torch.equal(wrapped.generate(**batch, **MODES[mode], **NEW), wrapped.generate(**batch, **NEW))


@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams", "beams returned"]
)
@pytest.mark.parametrize("spec", METHODS)
def test_batch_equals_one_by_one(tiny_llava, make_batch, spec, how):
    me.wrap(tiny_llava, spec)
    batch = make_batch(*MIXED)
    together = tiny_llava.generate(**batch, **how, **NEW)[:, batch.input_ids.shape[1] :]
    alone = [make_batch(row) for row in MIXED]
    alone = [tiny_llava.generate(**b, **how, **NEW)[:, b.input_ids.shape[1] :] for b in alone]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("spec", METHODS)
def test_greedy_of_every_row_equals_the_slow_reference(tiny_llava, plain, make_batch, reference, spec):
    if spec == "none":
        spec = "uniform:tokens=36"
    batch = make_batch(*MIXED)
    out = me.wrap(tiny_llava, spec).generate(**batch, **NEW)[:, batch.input_ids.shape[1] :]
    at = 0
    for row, images in enumerate((1, 2, 0, 1)):
        pixels = batch.pixel_values[at : at + images]
        report = [i for i in me.last_report(tiny_llava).images if i.row == row]
        if images and report[0].indices is not None:  # whatever the method, these are the tokens it said it kept
            visual = [f[i.indices] for f, i in zip(reference.features(plain, pixels), report)]
        else:
            visual = reference.compressed(plain, spec, pixels)[0] if images else []
        ids = batch.input_ids[row][batch.attention_mask[row].bool()]
        assert out[row].tolist() == reference.greedy(plain, ids, visual, N, 6)
        at += images


def test_rows_that_end_early_are_padded_as_stock_pads_them(wrapped, plain, make_batch):
    batch = make_batch(*MIXED)
    free = wrapped.generate(**batch, **NEW)[:, batch.input_ids.shape[1] :]
    how = dict(eos_token_id=int(free[0, 1]), **NEW)  # the second word of the first row ends a row
    out = wrapped.generate(**batch, **how)
    assert torch.equal(out, explicit(plain, "divprune:tokens=9", batch, **how))
    assert (out[0, batch.input_ids.shape[1] + 2 :] == 0).all() and out.shape[1] > batch.input_ids.shape[1] + 2


def test_return_dict_has_scores_the_prompt_and_the_report(wrapped, plain, make_batch):
    batch = make_batch(*MIXED)
    out = wrapped.generate(**batch, return_dict_in_generate=True, output_scores=True, output_logits=True, **NEW)
    kwargs = me.prepare(plain, "divprune:tokens=9", **batch).model_kwargs
    stock = plain.generate(**kwargs, return_dict_in_generate=True, output_scores=True, output_logits=True, **NEW)
    assert torch.equal(out.sequences, explicit(plain, "divprune:tokens=9", batch, **NEW))
    assert len(out.scores) == 6 and all(torch.equal(a, b) for a, b in zip(out.scores + out.logits, stock.scores + stock.logits))
    assert out.compression is me.last_report(wrapped) and out.compression.visual_tokens_kept == 36


def test_return_dict_of_beams(wrapped, plain, make_batch):
    batch, how = make_batch(*MIXED), dict(num_beams=3, num_return_sequences=2, return_dict_in_generate=True, output_scores=True, **NEW)
    out = wrapped.generate(**batch, **how)
    kwargs = me.prepare(plain, "divprune:tokens=9", **batch).model_kwargs
    stock = plain.generate(**kwargs, **how)
    assert torch.equal(out.sequences_scores, stock.sequences_scores) and torch.equal(out.beam_indices, stock.beam_indices)
    assert torch.equal(out.sequences[:, batch.input_ids.shape[1] :], stock.sequences[:, kwargs["input_ids"].shape[1] :])
    assert torch.equal(out.sequences[:, : batch.input_ids.shape[1]], batch.input_ids.repeat_interleave(2, 0))


def test_a_text_only_call_has_an_empty_report(wrapped, plain, make_batch):
    batch = make_batch("text only", "text only")
    out = wrapped.generate(**batch, return_dict_in_generate=True, **NEW)
    assert torch.equal(out.sequences, plain.generate(**batch, **NEW)) and out.compression.images == ()


@pytest.mark.parametrize("returned", [1, 3])
def test_seeded_sampling_equals_the_explicit_path(wrapped, plain, make_batch, returned):
    batch = make_batch(*MIXED)
    how = dict(do_sample=True, temperature=1.5, top_k=0, num_return_sequences=returned, **NEW)
    torch.manual_seed(5)
    ours = wrapped.generate(**batch, **how)
    torch.manual_seed(5)
    assert torch.equal(ours, explicit(plain, "divprune:tokens=9", batch, **how))
    assert returned == 1 or not torch.equal(ours[0], ours[1])


def test_random_method_and_sampling_do_not_disturb_the_global_seed(tiny_llava, plain, make_batch):
    batch = make_batch("one image")
    me.wrap(tiny_llava, "random:tokens=9")
    torch.manual_seed(5)
    tiny_llava.generate(**batch, **NEW)
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))


# ------------------------------------------------------------------------------------------------ lengths and arguments


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


# ------------------------------------------------------------------------------------------------ forward


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


# ------------------------------------------------------------------------------------------------ kernels, types, threads


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
        ours = tiny_llava(**batch).logits
        assert torch.equal(ours, plain(**me.prepare(plain, "divprune:tokens=9", **batch).model_kwargs).logits)
    assert not torch.equal(ours, tiny_llava(**batch).logits)


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


# ------------------------------------------------------------------------------------------------ training


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
