"""Ways into a wrapped model besides ``generate`` and ``forward``, who is compressed in which thread, and what callers get to see."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import pickle
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import LogitsProcessor, MinLengthLogitsProcessor, StoppingCriteria, TextIteratorStreamer
from transformers.generation import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

import mllm_efficient as me

from ..conftest import MIXED
from ..families import FAMILIES, make, tiny

NEW = {"max_new_tokens": 3, "do_sample": False}
SPEC = "divprune:tokens=9"
TRAINED = ["tokenflex:tokens=9,weights=random", "dpn:weights=random,at=1/2", "none@tokenflex:weights=random"]


@pytest.fixture
def wrapped(tiny_llava):
    return me.wrap(tiny_llava, SPEC)


@pytest.fixture
def plain(make_llava):
    return make_llava()


def new_tokens(model, batch, **how):
    return model.generate(**batch, **{**NEW, **how})[:, batch["input_ids"].shape[1] :]


# ------------------------------------------------------------------------------------------------ the base model


@pytest.mark.parametrize("spec", [SPEC, "uniform:tokens=9,positions=keep", "pool:tokens=9", "resize:tokens=9", "fastv:layer=1,ratio=0.5",
                                  "divprune:tokens=18 | fastv:layer=1,ratio=0.5", "dpn:weights=random,at=1/2"])  # fmt: skip
@pytest.mark.parametrize("return_dict", [True, False])
@torch.no_grad()
def test_the_base_model_is_compressed_as_the_model_is(tiny_llava, make_batch, spec, return_dict):
    batch = make_batch(*MIXED)
    me.wrap(tiny_llava, spec)
    wanted = tiny_llava(**batch, output_hidden_states=True)
    report = me.last_report(tiny_llava)
    out = tiny_llava.model(**batch, return_dict=return_dict)
    states = out.last_hidden_state if return_dict else out[0]
    assert torch.equal(tiny_llava.lm_head(states), wanted.logits)
    assert me.last_report(tiny_llava).visual_tokens_kept == report.visual_tokens_kept < report.visual_tokens_full
    if return_dict:
        for name in ("visual_keep_mask", "visual_input_ids", "visual_attention_mask"):
            assert torch.equal(getattr(out, name), getattr(wanted, name))


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("spec", ["divprune:keep=0.3", "none", "fastv:layer=1,ratio=0.5"])
@torch.no_grad()
def test_the_base_model_of_every_family(family, spec):
    model, batch = tiny(family), make(family, "one image")
    if spec.startswith("fastv") and not FAMILIES[family].inside:
        with pytest.raises(me.UnsupportedModelError):
            me.wrap(model, spec)
        return
    if spec.startswith("fastv") and family == "qwen3_vl":  # features are added up to a later layer
        spec = "fastv:layer=2,ratio=0.5"
    me.wrap(model, spec)
    assert torch.equal(model.lm_head(model.model(**batch).last_hidden_state), model(**batch).logits)
    assert (me.last_report(model).visual_tokens_kept < me.last_report(model).visual_tokens_full) == (spec != "none")


@torch.no_grad()
def test_the_base_model_takes_its_arguments_by_place_and_goes_on_from_its_cache(wrapped, make_batch):
    batch = make_batch("one image")
    out = wrapped.model(batch.input_ids, batch.pixel_values, batch.attention_mask, use_cache=True)
    assert out.last_hidden_state.shape[1] == batch.input_ids.shape[1] - 27
    cache = out.cache if hasattr(out, "cache") else out.past_key_values
    one = torch.tensor([[7]])
    longer = torch.cat([batch.input_ids, one], 1)
    name = "cache" if hasattr(out, "cache") else "past_key_values"
    mask = torch.cat([batch.attention_mask, torch.ones_like(one)], 1)
    step = wrapped.model(input_ids=one, attention_mask=mask, **{name: cache}).last_hidden_state
    whole = wrapped.model(input_ids=longer, pixel_values=batch.pixel_values).last_hidden_state
    torch.testing.assert_close(step[:, -1], whole[:, -1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("spec", ["divprune:keep=1", "none", "fastv:keep=1"])
@torch.no_grad()
def test_where_nothing_goes_the_base_model_is_stock(tiny_llava, plain, make_batch, spec):
    batch = make_batch(*MIXED)
    me.wrap(tiny_llava, spec)
    assert torch.equal(tiny_llava.model(**batch).last_hidden_state, plain.model(**batch).last_hidden_state)
    text = make_batch("text only")
    assert torch.equal(tiny_llava.model(**text).last_hidden_state, plain.model(**text).last_hidden_state)
    assert me.last_report(tiny_llava).images == ()


@torch.no_grad()
def test_a_call_of_the_model_is_prepared_once(tiny_llava, make_batch, monkeypatch):
    from mllm_efficient.apply import entrance

    calls = []
    monkeypatch.setattr(
        entrance, "prepare", lambda *args, stock=entrance.prepare, **kwargs: calls.append(args[0]) or stock(*args, **kwargs)
    )
    for spec in (SPEC, "none"):
        with me.compressed(tiny_llava, spec):
            tiny_llava(**make_batch("one image"))
            tiny_llava.model(**make_batch("one image"))
            tiny_llava.generate(**make_batch("one image"), **NEW)
    assert calls == [tiny_llava] * 4


@torch.no_grad()
def test_copies_and_pickles_of_a_wrapped_model_have_their_own_base(wrapped, make_batch):
    batch, copies = make_batch("one image"), (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped)))
    wanted = wrapped.model(**batch).last_hidden_state
    for other in copies:
        assert torch.equal(other.model(**batch).last_hidden_state, wanted)
        me.unwrap(other)
        assert other.model(**batch).last_hidden_state.shape[1] == batch.input_ids.shape[1] and not me.is_wrapped(other)
    assert torch.equal(wrapped.model(**batch).last_hidden_state, wanted)


# ------------------------------------------------------------------------------------------------ pipelines


@pytest.mark.parametrize("chat", [True, False])
def test_compression_of_a_pipeline_call(tiny_llava, make_llava, processor, picture, chat):
    from transformers import pipeline

    pipe = pipeline("image-text-to-text", model=me.wrap(tiny_llava, SPEC), processor=processor)
    parts = [{"type": "image", "image": picture(1)}, {"type": "text", "text": "what is the big ring ?"}]
    text = "user : <image> what is the big ring ? assistant :"
    call = {"text": [{"role": "user", "content": parts}]} if chat else {"images": picture(1), "text": text}
    plain = pipeline("image-text-to-text", model=make_llava(), processor=processor)
    answers = {}
    for spec, kept in ((SPEC, 9), ("random:tokens=4", 4), (None, 0)):
        answers[spec] = pipe(**call, max_new_tokens=6, compression=spec)
        assert me.last_report(tiny_llava).visual_tokens_kept == kept
        assert answers[spec] == pipe(**call, generate_kwargs={"compression": spec, "max_new_tokens": 6})
    assert answers[None] == plain(**call, max_new_tokens=6) and answers[SPEC] == pipe(**call, max_new_tokens=6)
    with pytest.raises(me.UnknownMethodError, match="nonsense"):
        pipe(**call, compression="nonsense")
    with pytest.raises(ValueError, match="compression"):  # by generate of the plain model
        plain(**call, compression="nonsense")


def test_a_pipeline_made_with_compression_has_it_in_every_call(wrapped, processor, picture):
    from transformers import pipeline

    pipe = pipeline("image-text-to-text", model=wrapped, processor=processor, compression="random:tokens=4")
    pipe(images=picture(1), text="user : <image> what is the ring ? assistant :", max_new_tokens=2)
    assert me.last_report(wrapped).visual_tokens_kept == 4  # although a call's own generate_kwargs replace the pipeline's
    pipe(images=picture(1), text="user : <image> what is the ring ? assistant :")
    assert me.last_report(wrapped).visual_tokens_kept == 4


# ------------------------------------------------------------------------------------------------ what callers look at


class Looks(LogitsProcessor):
    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.clone())
        return scores


class Watches(StoppingCriteria, Looks):
    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.clone())
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=["greedy", "beams", "sampling"])
def test_processors_criteria_and_allowed_tokens_see_the_original_prompt(wrapped, make_batch, how):
    batch = make_batch("one image", "two images")
    looks, watches, allowed, ids = Looks(), Watches(), [], batch.input_ids

    def every_token(row, sequence):
        allowed.append((row, sequence.clone()))
        return list(range(33))

    wrapped.generate(
        **batch,
        **{**NEW, **how},
        logits_processor=LogitsProcessorList([looks]),
        stopping_criteria=[watches],
        prefix_allowed_tokens_fn=every_token,
    )
    times = 2 if how else 1
    for first, all_seen in ((0, looks.seen), (1, watches.seen)):
        for step, seen in enumerate(all_seen, first):  # beam search shows more candidates than it keeps to criteria
            assert seen.shape[1] == ids.shape[1] + step and len(seen) % (2 * times) == 0
            assert torch.equal(seen[:, : ids.shape[1]], ids.repeat_interleave(len(seen) // 2, 0))
    assert len(looks.seen) == len(watches.seen) == 3 and len(allowed) == 3 * 2 * times
    for row, sequence in allowed:
        assert torch.equal(sequence[: ids.shape[1]], ids[row // 2 if "do_sample" in how else row])


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}])
def test_a_processor_takes_the_place_of_generates_own_of_its_type(wrapped, plain, make_batch, how):
    batch = make_batch("one image", "long text")
    penalty = [RepetitionPenaltyLogitsProcessor(1.7)]
    prepared = me.prepare(plain, SPEC, **batch).model_kwargs
    wanted = plain.generate(**prepared, **NEW, **how, logits_processor=LogitsProcessorList(penalty))[:, prepared["input_ids"].shape[1] :]
    assert torch.equal(new_tokens(wrapped, batch, **how, repetition_penalty=1.2, logits_processor=LogitsProcessorList(penalty)), wanted)
    assert not torch.equal(new_tokens(wrapped, batch, **how), wanted)


def test_a_processor_that_counts_tokens_counts_the_callers(wrapped, make_batch):
    batch = make_batch("one image")
    length, free = batch.input_ids.shape[1], new_tokens(wrapped, batch)
    ends = int(free[0, 0])
    shortest = LogitsProcessorList([MinLengthLogitsProcessor(length + 2, ends)])
    out = new_tokens(wrapped, batch, eos_token_id=ends, logits_processor=shortest)
    assert (out[0, :2] != ends).all()


def test_a_prompt_without_its_pixels_warns(wrapped, make_batch):
    batch = {k: v for k, v in make_batch("two images").items() if k != "pixel_values"}
    for call in (lambda: wrapped.generate(**batch, **NEW), lambda: wrapped(**batch), lambda: wrapped.model(**batch)):
        with pytest.warns(UserWarning, match="the prompt has 72 image placeholders and no pixel_values came with it"):
            call()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rows in ("text only", "one image"):
            wrapped(**make_batch(rows))
            wrapped.generate(**make_batch(rows), **NEW)
        wrapped(**me.prepare(wrapped, SPEC, **make_batch("one image")).model_kwargs)


def test_is_wrapped_and_what_repr_says(tiny_llava):
    assert not me.is_wrapped(tiny_llava) and "compression" not in repr(tiny_llava)
    me.wrap(tiny_llava, SPEC)
    assert me.is_wrapped(tiny_llava) and f"compression='{SPEC}'" in repr(tiny_llava)
    assert not me.is_wrapped(tiny_llava.model), "its base model is compressed through it, and is not wrapped itself"
    me.unwrap(tiny_llava)
    with me.compressed(tiny_llava, "pool:tokens=9"):
        assert me.is_wrapped(tiny_llava) and "compression='pool:tokens=9'" in repr(tiny_llava)
    assert not me.is_wrapped(tiny_llava) and "compression" not in repr(tiny_llava)


def test_the_report_says_that_compression_was_off(wrapped, make_batch):
    out = wrapped.generate(**make_batch("one image"), **NEW, compression=None, return_dict_in_generate=True)
    assert me.last_report(wrapped) is out.compression and out.compression.off
    assert str(out.compression) == "compression was off: every visual token stayed"
    wrapped.generate(**make_batch("text only"), **NEW)
    assert not me.last_report(wrapped).off and str(me.last_report(wrapped)) == "no images: nothing was compressed"


def test_the_report_says_that_there_is_no_compression_after_unwrap(wrapped, make_batch):
    wrapped.generate(**make_batch("one image"), **NEW)
    me.unwrap(wrapped).generate(**make_batch("two images"), **NEW)
    report = me.last_report(wrapped)
    assert report.unwrapped and report.visual_tokens_kept == 9 and str(report).startswith("no compression: the model was unwrapped since")


# ------------------------------------------------------------------------------------------------ threads


@pytest.mark.parametrize("spec", [SPEC, "pool:tokens=9", "fastv:layer=1,ratio=0.5"])
@torch.no_grad()
def test_a_block_of_one_thread_does_not_compress_another(tiny_llava, plain, make_batch, spec):
    """100 rounds: each opens a block and closes it, while the other thread calls the plain model."""
    batch, start = make_batch("one image"), threading.Barrier(2)
    stock, logits, states = new_tokens(plain, batch), plain(**batch).logits, plain.model(**batch).last_hidden_state
    with me.compressed(plain, spec):
        short, short_logits = new_tokens(plain, batch), plain(**batch).logits
    assert not torch.equal(stock, short)

    def inside():
        for _ in range(100):
            start.wait(60)
            with me.compressed(tiny_llava, spec):
                assert me.is_wrapped(tiny_llava)
                assert torch.equal(new_tokens(tiny_llava, batch), short) and torch.equal(tiny_llava(**batch).logits, short_logits)

    def outside():
        for i in range(100):
            start.wait(60)
            assert not me.is_wrapped(tiny_llava)
            if i % 3 == 0:
                assert torch.equal(new_tokens(tiny_llava, batch), stock)
            elif i % 3 == 1:
                out = tiny_llava(**batch)
                assert torch.equal(out.logits, logits) and not hasattr(out, "visual_keep_mask")
            else:
                assert torch.equal(tiny_llava.model(**batch).last_hidden_state, states)

    run_all(inside, outside, broken=start)
    assert not me.is_wrapped(tiny_llava) and not tiny_llava._forward_pre_hooks and not tiny_llava.model._forward_pre_hooks
    assert type(tiny_llava) is type(plain)


def run_all(*jobs, broken=None):
    def run(job):
        try:
            torch.set_grad_enabled(False)
            job()
        except BaseException:
            if broken is not None:
                broken.abort()
            raise

    with ThreadPoolExecutor(len(jobs)) as pool:
        for done in [pool.submit(run, job) for job in jobs]:
            done.result()


@torch.no_grad()
def test_two_threads_have_blocks_of_their_own(tiny_llava, plain, make_batch):
    batch, start = make_batch("one image"), threading.Barrier(2)

    wanted = {}
    for spec in (SPEC, "fastv:layer=1,ratio=0.5"):
        with me.compressed(plain, spec):
            wanted[spec] = new_tokens(plain, batch)

    def inside(spec):
        for _ in range(10):
            start.wait(60)
            with me.compressed(tiny_llava, spec):
                start.wait(60)
                assert torch.equal(new_tokens(tiny_llava, batch), wanted[spec])

    run_all(*(lambda spec=spec: inside(spec) for spec in wanted), broken=start)
    assert type(tiny_llava) is type(plain)


def test_a_task_in_the_block_is_compressed_and_one_that_outlives_it_is_not(tiny_llava, make_batch):
    batch = make_batch("one image")
    full = batch.input_ids.shape[1]

    async def call(after=None):
        if after is not None:
            await after.wait()
        return tiny_llava(**batch).logits.shape[1]

    async def main():
        done = asyncio.Event()
        with me.compressed(tiny_llava, SPEC):
            first, late = asyncio.create_task(call()), asyncio.create_task(call(done))
            lengths = [await first]
        me.wrap(tiny_llava, "divprune:tokens=18")
        done.set()
        return [*lengths, await late]

    assert asyncio.run(main()) == [full - 27, full - 18]


@torch.no_grad()
def test_a_thread_started_with_the_blocks_context_is_inside(tiny_llava, processor, make_batch):
    batch = make_batch("one image")
    with me.compressed(tiny_llava, SPEC):
        wanted = processor.decode(new_tokens(tiny_llava, batch)[0])
        streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(tiny_llava.generate,), kwargs={**batch, **NEW, "streamer": streamer})
        thread.start()
        assert "".join(streamer).strip() == wanted.strip()
        thread.join()
        assert me.last_report(tiny_llava).visual_tokens_kept == 9


@pytest.mark.parametrize("spec", TRAINED)
@torch.no_grad()
def test_calls_beside_a_trained_methods_block_are_refused(tiny_llava, plain, make_batch, spec):
    batch = make_batch("one image")
    stock = new_tokens(plain, batch)
    with me.compressed(tiny_llava, spec), ThreadPoolExecutor(1) as pool:
        for call in (tiny_llava.generate, tiny_llava, tiny_llava.model):
            how = NEW if call == tiny_llava.generate else {}
            with pytest.raises(
                me.MllmEfficientError, match="another thread is inside me.compressed with .*, whose weights are in the model"
            ):
                pool.submit(call, **batch, **how).result()
        with pytest.raises(me.AlreadyWrappedError, match="another thread"):
            pool.submit(me.wrap, tiny_llava, SPEC).result()
        with pytest.raises(me.AlreadyWrappedError, match="another thread"):
            pool.submit(lambda: me.compressed(tiny_llava, SPEC).__enter__()).result()
    assert torch.equal(new_tokens(tiny_llava, batch), stock)


@pytest.mark.parametrize("what", ["wrap", "trained block", "unwrap"])
@pytest.mark.parametrize("way", ["generate", "forward", "base model", "tower"])
@torch.no_grad()
def test_a_method_comes_and_goes_only_where_no_other_thread_is_in_a_call(tiny_llava, plain, make_batch, what, way):
    """The other thread's answer is one or the other, never a mixture."""
    batch, inside, go_on = make_batch("one image"), threading.Event(), threading.Event()
    spec = TRAINED[0]

    def hold(*args):
        inside.set()
        assert go_on.wait(60)

    if what == "unwrap":
        me.wrap(tiny_llava, spec), me.wrap(plain, spec)
    call = {"generate": lambda m: new_tokens(m, batch), "forward": lambda m: m(**batch).logits, "base model": lambda m: m.model(**batch)[0],
            "tower": lambda m: m.model.vision_tower(batch.pixel_values)[0]}[way]  # fmt: skip
    wanted = call(plain)
    handle = tiny_llava.model.vision_tower.register_forward_pre_hook(hold)
    with ThreadPoolExecutor(1) as pool:

        def running():
            with torch.no_grad():
                return call(tiny_llava)

        other = pool.submit(running)
        assert inside.wait(60)
        try:
            with pytest.raises(me.MllmEfficientError, match="thread .* is in a call of this model"):
                {"wrap": lambda: me.wrap(tiny_llava, spec), "unwrap": lambda: me.unwrap(tiny_llava),
                 "trained block": lambda: me.compressed(tiny_llava, spec).__enter__()}[what]()  # fmt: skip
            assert me.is_wrapped(tiny_llava) == (what == "unwrap")
        finally:
            go_on.set()
        assert torch.equal(other.result(), wanted)
    handle.remove()
    (me.unwrap if what == "unwrap" else lambda m: me.wrap(m, spec))(tiny_llava)


@torch.no_grad()
def test_wrapping_and_unwrapping_beside_a_busy_thread_gives_one_answer_or_the_other(tiny_llava, plain, make_batch):
    batch, stop, seen = make_batch("one image"), threading.Event(), []
    spec = TRAINED[0]
    stock = new_tokens(plain, batch)
    with me.compressed(plain, spec):
        flex = new_tokens(plain, batch)
    assert not torch.equal(stock, flex)

    def busy():
        torch.set_grad_enabled(False)
        while not stop.is_set():
            seen.append(new_tokens(tiny_llava, batch))
            time.sleep(0.005)  # the moments in which a method can come or go

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(busy)
        try:
            for answered in range(1, 7):
                while not other.done():
                    time.sleep(0.001)
                    if len(seen) < answered:
                        continue
                    with contextlib.suppress(me.MllmEfficientError):  # refused: the other thread is in a call
                        (me.unwrap if me.is_wrapped(tiny_llava) else lambda m: me.wrap(m, spec))(tiny_llava)
                        break
        finally:
            stop.set()
        other.result()
    assert len(seen) >= 6 and all(torch.equal(one, stock) or torch.equal(one, flex) for one in seen)


def test_blocks_and_wraps_do_not_mix(tiny_llava):
    with me.compressed(tiny_llava, SPEC):
        with pytest.raises(me.AlreadyWrappedError, match="inside me.compressed already: leave that block first"):
            me.wrap(tiny_llava, SPEC)
        with pytest.raises(me.AlreadyWrappedError, match="inside me.compressed already"), me.compressed(tiny_llava, "pool:tokens=9"):
            pass
        with pytest.raises(me.MllmEfficientError, match="inside me.compressed, which ends with its block"):
            me.unwrap(tiny_llava)
        with ThreadPoolExecutor(1) as pool, pytest.raises(me.AlreadyWrappedError, match="another thread is inside"):
            pool.submit(me.wrap, tiny_llava, SPEC).result()
    me.wrap(tiny_llava, SPEC)
    with pytest.raises(me.AlreadyWrappedError), me.compressed(tiny_llava, SPEC):
        pass


def test_a_copy_made_inside_a_trained_block_is_wrapped_with_its_weights(tiny_llava, make_batch):
    batch, spec = make_batch("one image"), "tokenflex:tokens=9,weights=random"
    with torch.no_grad():
        plain = tiny_llava(**batch).logits
        with me.compressed(tiny_llava, spec):
            inside, twin = tiny_llava(**batch).logits, copy.deepcopy(tiny_llava)
        assert torch.equal(tiny_llava(**batch).logits, plain)
        assert me.is_wrapped(twin) and torch.equal(twin(**batch).logits, inside)
        assert torch.equal(me.unwrap(twin)(**batch).logits, plain)


def test_prepare_of_another_thread_does_not_take_a_blocks_weights(tiny_llava, make_batch):
    batch = make_batch("one image")
    with (
        me.compressed(tiny_llava, "tokenflex:tokens=9,weights=random"),
        ThreadPoolExecutor(1) as pool,
        pytest.raises(me.MllmEfficientError, match="another thread is inside me.compressed"),
    ):
        pool.submit(me.prepare, tiny_llava, SPEC, **batch).result()


def test_a_task_that_outlives_generate_is_compressed(wrapped, make_batch):
    """A task copies the context that it is begun in."""
    batch = make_batch("one image")
    begun: list[contextvars.Context] = []

    class Streamer:
        def put(self, value):
            begun.append(contextvars.copy_context())

        def end(self):
            pass

    with torch.no_grad():
        wrapped.generate(**batch, max_new_tokens=2, streamer=Streamer())
        expected = wrapped(**batch).logits
        assert torch.equal(begun[0].run(lambda: wrapped(**batch).logits), expected)


def test_a_copy_made_inside_a_block_is_in_no_block(tiny_llava, make_batch):
    batch = make_batch("one image")
    with me.compressed(tiny_llava, SPEC):
        other = copy.deepcopy(tiny_llava)
        assert not me.is_wrapped(other) and other(**batch).logits.shape[1] == batch.input_ids.shape[1]
        me.wrap(other, "divprune:tokens=4")
        assert other(**batch).logits.shape[1] == batch.input_ids.shape[1] - 32
        me.unwrap(other)
    assert not other._forward_pre_hooks
