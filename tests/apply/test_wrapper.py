"""``me.wrap``: the model is used as before, gives what the explicit path gives, and ``me.unwrap`` leaves no trace."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass

import pytest
import torch

import mllm_efficient as me
from mllm_efficient.patches import transformers_version
from mllm_efficient.patches.families.llava import LlavaAdapter

from ..conftest import MIXED

N, GRID, IMAGE = 36, (6, 6), 4
NEW = dict(max_new_tokens=6)


def methods_to_try() -> list[str]:
    """A specification of every method this model can run as it is; trained ones bring their own weights and tests."""
    out = []
    for name in me.list_methods():
        cls = me.get_method(name)
        if name == "pixelprune":  # of Qwen-VL's towers alone: tests/patches/test_pixelprune.py
            continue
        if cls.kind == "pre_llm" and not cls.trained and not cls.sets_processor and set(cls.needs) <= LlavaAdapter.gives:
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


def left_by_hand(features, image):
    """Kept tokens, each the mean of those that were merged into it, where any were."""
    if image.groups is None:
        return features[image.indices]
    return torch.stack([features[image.groups == i].mean(0) for i in range(image.kept)])


@pytest.mark.parametrize("spec", METHODS)
def test_greedy_of_every_row_equals_the_slow_reference(tiny_llava, plain, make_batch, reference, spec):
    if me.build(spec).in_tower:  # whose features no tower gives by itself: tests/patches/test_flowcut.py has its reference
        return
    if spec == "none":
        spec = "uniform:tokens=36"
    batch = make_batch(*MIXED)
    out = me.wrap(tiny_llava, spec).generate(**batch, **NEW)[:, batch.input_ids.shape[1] :]
    at = 0
    for row, images in enumerate((1, 2, 0, 1)):
        pixels = batch.pixel_values[at : at + images]
        report = [i for i in me.last_report(tiny_llava).images if i.row == row]
        if images and report[0].indices is not None:  # whatever the method, these are the tokens it said it kept
            visual = [left_by_hand(f, i) for f, i in zip(reference.features(plain, pixels), report)]
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
    own = wrapped.generate(**batch, **how)
    torch.manual_seed(5)
    assert torch.equal(own, explicit(plain, "divprune:tokens=9", batch, **how))
    assert returned == 1 or not torch.equal(own[0], own[1])


def test_random_method_and_sampling_do_not_disturb_the_global_seed(tiny_llava, plain, make_batch):
    batch = make_batch("one image")
    me.wrap(tiny_llava, "random:tokens=9")
    torch.manual_seed(5)
    tiny_llava.generate(**batch, **NEW)
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))


# ------------------------------------------------------------------------------------------------ lengths and arguments


# ------------------------------------------------------------------------------------------------ forward


# ------------------------------------------------------------------------------------------------ kernels, types, threads


# ------------------------------------------------------------------------------------------------ training
