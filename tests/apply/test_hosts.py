"""A wrapped model inside what people put around models: PEFT, accelerate's offload and mixed precision, quantisation, Trainer.

Each host is applied before ``me.wrap`` and after it. Each behaves as the explicit path on the plain model in the same
precision, or refuses with one clear error, or fails exactly where the host alone fails.
"""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch

import mllm_efficient as me
from mllm_efficient.apply.wrap import method_of

from ..conftest import MIXED

N, IMAGE = 36, 4
SPEC = "divprune:tokens=9"
NEW = dict(max_new_tokens=5)
HOSTS = ("plain", "PEFT LoRA", "CPU offload", "disk offload", "dispatched to disk and CPU", "accelerate bf16")
ORDERS = ("host then wrap", "wrap then host")
matrix = [pytest.mark.parametrize("order", ORDERS), pytest.mark.parametrize("host", HOSTS)]


def across_the_matrix(test):
    for mark in matrix:
        test = mark(test)
    return test


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps its precision in process-wide state."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def put_in(tmp_path):
    """``put_in(host, model)``."""
    import accelerate

    def apply(host, model):
        cpu = torch.device("cpu")
        if host == "PEFT LoRA":
            return with_lora(model)
        if host == "CPU offload":
            return accelerate.cpu_offload(model, execution_device=cpu)
        if host == "disk offload":
            return accelerate.disk_offload(model, str(tmp_path / "offload"), execution_device=cpu)
        if host == "dispatched to disk and CPU":
            parts = {"model.vision_tower": "disk", "model.multi_modal_projector": "cpu", "model.language_model": "disk", "lm_head": "cpu"}
            return accelerate.dispatch_model(model, parts, main_device="cpu", offload_dir=str(tmp_path / "parts"), force_hooks=True)
        if host == "accelerate bf16":
            return accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
        return model

    return apply


def with_lora(model):
    """LoRA that changes the output from the start, and a projector trained along."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, modules_to_save=["multi_modal_projector"])
    return get_peft_model(model, lora)


@pytest.fixture
def host_and_wrap(make_llava, put_in):
    """A model put into a host and wrapped, in either order."""

    def build(host, order, spec=SPEC):
        if order == "host then wrap":
            model = put_in(host, make_llava())
            assert me.wrap(model, spec) is model
            return model
        return put_in(host, me.wrap(make_llava(), spec))

    return build


@pytest.fixture
def plain_and_precision(make_llava):
    """The plain model with the host's weights, and the precision the host runs it in."""

    def build(host):
        model = with_lora(make_llava()).merge_and_unload() if host == "PEFT LoRA" else make_llava()
        low = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
        return model, low if host == "accelerate bf16" else contextlib.nullcontext

    return build


def new_tokens(model, batch, **how):
    return model.generate(**batch, **how)[:, batch["input_ids"].shape[1] :]


# ------------------------------------------------------------------------------------------------ the matrix


@across_the_matrix
@torch.no_grad()
def test_forward_equals_the_explicit_path_on_the_plain_model(host_and_wrap, plain_and_precision, make_batch, host, order):
    batch = make_batch(*MIXED)
    plain, precision = plain_and_precision(host)
    with precision():
        prepared = me.prepare(plain, SPEC, **batch)
        wanted = plain(**prepared.model_kwargs).logits.float()
    model = host_and_wrap(host, order)
    out = model(**batch)
    if host == "PEFT LoRA":  # W x + B A x against (W + B A) x
        torch.testing.assert_close(out.logits, wanted, atol=2e-5, rtol=1e-5)
    else:
        assert torch.equal(out.logits, wanted)
    assert torch.equal(out.visual_keep_mask, prepared.visual_keep_mask)
    assert me.last_report(model).visual_tokens_kept == 36


@pytest.mark.parametrize("beams", [1, 3])
@across_the_matrix
@torch.no_grad()
def test_generate_equals_the_explicit_path_on_the_plain_model(host_and_wrap, plain_and_precision, make_batch, host, order, beams):
    batch = make_batch(*MIXED)
    plain, precision = plain_and_precision(host)
    kwargs = me.prepare(plain, SPEC, **batch).model_kwargs  # stock generate runs the tower outside accelerate's autocast too
    with precision():
        wanted = new_tokens(plain, kwargs, num_beams=beams, **NEW)
    model = host_and_wrap(host, order)
    out = model.generate(**batch, num_beams=beams, **NEW)
    assert torch.equal(out[:, : batch.input_ids.shape[1]], batch.input_ids)
    assert torch.equal(out[:, batch.input_ids.shape[1] :], wanted)
    assert me.last_report(model).visual_tokens_kept == 36


@across_the_matrix
@torch.no_grad()
def test_keeping_everything_is_bit_equal_to_the_host_without_wrap(host_and_wrap, make_llava, put_in, make_batch, host, order):
    batch = make_batch(*MIXED)
    bare = put_in(host, make_llava())
    logits, tokens = bare(**batch).logits, bare.generate(**batch, **NEW)
    model = host_and_wrap(host, order, "divprune:keep=1")
    assert torch.equal(model(**batch).logits, logits)
    assert torch.equal(model.generate(**batch, **NEW), tokens)


@across_the_matrix
@torch.no_grad()
def test_one_call_can_have_its_own_method(host_and_wrap, make_llava, put_in, make_batch, host, order):
    batch = make_batch(*MIXED)
    model, bare = host_and_wrap(host, order), put_in(host, make_llava())
    assert torch.equal(model.generate(**batch, compression=None, **NEW), bare.generate(**batch, **NEW))
    out = model.generate(**batch, compression="random:tokens=5", **NEW)
    kwargs = me.prepare(bare, "random:tokens=5", **batch).model_kwargs
    assert torch.equal(out[:, batch.input_ids.shape[1] :], new_tokens(bare, kwargs, **NEW))


@across_the_matrix
@torch.no_grad()
def test_unwrap_gives_the_host_back(host_and_wrap, make_llava, put_in, make_batch, host, order):
    batch = make_batch(*MIXED)
    bare = put_in(host, make_llava())
    logits, tokens = bare(**batch).logits, bare.generate(**batch, **NEW)
    model = host_and_wrap(host, order)
    model(**batch)
    model.generate(**batch, **NEW)
    assert me.unwrap(model) is model
    assert torch.equal(model(**batch).logits, logits) and torch.equal(model.generate(**batch, **NEW), tokens)
    assert [type(m) for m in model.modules()] == [type(m) for m in bare.modules()]
    hooks = [h for m in model.modules() for d in (m._forward_pre_hooks, m._forward_hooks) for h in d.values()]
    assert not any("mllm_efficient" in f"{type(h).__module__} {getattr(h, '__module__', None)}" for h in hooks)
    assert method_of(model) is None
    with pytest.raises(me.MllmEfficientError, match="not wrapped"):
        me.unwrap(model)


@across_the_matrix
@torch.no_grad()
def test_wrapping_twice_is_refused_through_the_host(host_and_wrap, host, order):
    with pytest.raises(me.AlreadyWrappedError):
        me.wrap(host_and_wrap(host, order), SPEC)


@pytest.mark.parametrize("used", ["used", "unused"])
@across_the_matrix
@torch.no_grad()
def test_a_deep_copy_is_wrapped_on_its_own(host_and_wrap, make_batch, host, order, used):
    batch = make_batch(*MIXED)
    model = host_and_wrap(host, order)
    if used == "used":
        model(**batch)
    twin = copy.deepcopy(model)
    logits, tokens = model(**batch).logits, model.generate(**batch, **NEW)
    me.unwrap(model)
    assert method_of(twin) == me.DivPrune(tokens=9)
    assert torch.equal(twin(**batch).logits, logits) and torch.equal(twin.generate(**batch, **NEW), tokens)
    assert torch.equal(me.unwrap(twin).generate(**batch, **NEW), model.generate(**batch, **NEW))


OFFLOADED = ("CPU offload", "disk offload", "dispatched to disk and CPU")


@across_the_matrix
@torch.no_grad()
def test_pickle_brings_the_wrap_along(host_and_wrap, make_llava, put_in, make_batch, host, order):
    """accelerate's offload hooks are local functions, which no pickle takes: then the unwrapped host fails the same.

    Its autocast is lost in a pickle without an error, wrapped or not: what comes back runs in float32.
    """
    batch = make_batch(*MIXED)
    model = host_and_wrap(host, order)
    if host in OFFLOADED:
        for refused in (put_in(host, make_llava()), model):
            with pytest.raises((AttributeError, pickle.PicklingError), match="add_hook_to_module.<locals>.new_forward"):
                pickle.dumps(refused)
        return
    twin = pickle.loads(pickle.dumps(model))
    assert method_of(twin) == me.DivPrune(tokens=9)
    if host == "accelerate bf16":
        bare = pickle.loads(pickle.dumps(put_in(host, make_llava())))
        model = make_llava()
        assert torch.equal(bare(**batch).logits, model(**batch).logits)
        me.wrap(model, SPEC)
    assert torch.equal(twin(**batch).logits, model(**batch).logits)
    assert torch.equal(twin.generate(**batch, **NEW), model.generate(**batch, **NEW))
    stock = type(make_llava())
    inner = me.unwrap(twin).get_base_model() if host == "PEFT LoRA" else me.unwrap(twin)
    assert type(inner) is stock


@across_the_matrix
@torch.no_grad()
def test_pickling_a_used_model_fails_as_it_does_unwrapped(host_and_wrap, make_llava, put_in, make_batch, host, order):
    """transformers 5.23 leaves local functions on a model at its first forward."""
    batch = make_batch("one image")
    for model in (put_in(host, make_llava()), host_and_wrap(host, order)):
        model(**batch)
        with pytest.raises((AttributeError, pickle.PicklingError), match="<locals>"):
            pickle.dumps(model)


@across_the_matrix
@torch.no_grad()
def test_a_second_turn_on_the_cache_equals_a_fresh_call(host_and_wrap, make_batch, processor, host, order):
    batch = make_batch("one image")
    model = host_and_wrap(host, order)
    first = model.generate(**batch, return_dict_in_generate=True, **NEW)
    new = processor(text="user : how many are blue ? assistant :", return_tensors="pt").input_ids[:, 1:]
    ids = torch.cat([first.sequences, new], 1)
    cached = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=first.past_key_values, **NEW)
    fresh = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=batch.pixel_values, **NEW)
    assert torch.equal(cached, fresh)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("host", ["plain", "PEFT LoRA", "accelerate bf16"])
def test_a_training_step_equals_the_explicit_path_in_the_host(host_and_wrap, make_llava, put_in, make_batch, host, order):
    batch = make_batch(*MIXED)
    labels = batch.input_ids.masked_fill((batch.attention_mask == 0) | (batch.input_ids == IMAGE), -100)
    model, bare = host_and_wrap(host, order), put_in(host, make_llava())
    loss = model(**batch, labels=labels).loss
    with torch.autocast("cpu", torch.bfloat16, enabled=host == "accelerate bf16"):
        kwargs = me.prepare(bare, SPEC, labels=labels, **batch).model_kwargs
    wanted = bare(**kwargs).loss
    assert torch.equal(loss, wanted)
    loss.backward(), wanted.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    expected = {n: p.grad for n, p in bare.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    assert all(any(part in n for n in gradients) for part in ("projector", "layers.0.self_attn"))
    for name in gradients:
        torch.testing.assert_close(gradients[name], expected[name], atol=1e-6, rtol=1e-4)  # sums in the backward pass


# ------------------------------------------------------------------------------------------------ taken out of the host again


@pytest.mark.parametrize("order", ORDERS)
@torch.no_grad()
def test_peft_for_causal_language_models_is_a_host_too(make_llava, make_batch, order):
    """With a task type PEFT names every argument of ``forward`` itself and sends its own ``generate``."""
    from peft import LoraConfig, TaskType, get_peft_model

    def lora(model):
        torch.manual_seed(0)
        return get_peft_model(model, LoraConfig(task_type=TaskType.CAUSAL_LM, r=2, target_modules=["q_proj"], init_lora_weights=False))

    batch, bare = make_batch(*MIXED), lora(make_llava())
    model = me.wrap(lora(make_llava()), SPEC) if order == "host then wrap" else lora(me.wrap(make_llava(), SPEC))
    kwargs = me.prepare(bare, SPEC, **batch).model_kwargs
    labels = batch.input_ids.masked_fill((batch.attention_mask == 0) | (batch.input_ids == IMAGE), -100)
    assert torch.equal(model(**batch).logits, bare(**kwargs).logits)
    assert torch.equal(model(**batch, labels=labels).loss, bare(**me.prepare(bare, SPEC, labels=labels, **batch).model_kwargs).loss)
    assert torch.equal(new_tokens(model, batch, **NEW), new_tokens(bare, kwargs, **NEW))
    assert torch.equal(me.unwrap(model).generate(**batch, **NEW), bare.generate(**batch, **NEW))


@torch.no_grad()
def test_merged_lora_weights_keep_the_wrap(make_llava, make_batch):
    batch = make_batch(*MIXED)
    model = me.wrap(with_lora(make_llava()), SPEC)
    tokens = model.generate(**batch, **NEW)
    merged = model.merge_and_unload()
    assert torch.equal(merged.generate(**batch, **NEW), tokens)
    assert torch.equal(me.unwrap(merged).generate(**batch, **NEW), with_lora(make_llava()).merge_and_unload().generate(**batch, **NEW))


@torch.no_grad()
def test_a_saved_adapter_loads_into_a_wrapped_model(make_llava, make_batch, tmp_path):
    from peft import PeftModel

    batch = make_batch(*MIXED)
    model = me.wrap(with_lora(make_llava()), SPEC)
    tokens = model.generate(**batch, **NEW)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(me.wrap(make_llava(), SPEC), tmp_path)
    assert torch.equal(again.generate(**batch, **NEW), tokens)


@torch.no_grad()
def test_lora_turned_off_is_the_wrapped_base_model(make_llava, make_batch):
    from peft import LoraConfig, get_peft_model

    batch = make_batch(*MIXED)
    torch.manual_seed(0)
    model = me.wrap(get_peft_model(make_llava(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)), SPEC)
    with model.disable_adapter():
        off = model.generate(**batch, **NEW)
    assert torch.equal(off, me.wrap(make_llava(), SPEC).generate(**batch, **NEW))
    assert not torch.equal(off, model.generate(**batch, **NEW))


@torch.no_grad()
def test_accelerates_unwrap_model_keeps_our_wrap(make_llava, make_batch):
    from accelerate import Accelerator

    batch = make_batch(*MIXED)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare(me.wrap(make_llava(), SPEC))
    model = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert torch.equal(model(**batch).logits, me.wrap(make_llava(), SPEC)(**batch).logits)
    assert torch.equal(model.generate(**batch, **NEW), me.wrap(make_llava(), SPEC).generate(**batch, **NEW))


@torch.no_grad()
def test_offload_hooks_can_be_removed_from_a_wrapped_model(make_llava, put_in, make_batch):
    from accelerate.hooks import remove_hook_from_module

    batch = make_batch(*MIXED)
    model = put_in("CPU offload", me.wrap(make_llava(), SPEC))
    tokens = model.generate(**batch, **NEW)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(model.generate(**batch, **NEW), tokens)


# ------------------------------------------------------------------------------------------------ refused by name


@pytest.fixture
def process_group():
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_ddp_model_is_refused_and_a_wrapped_one_goes_into_ddp(make_llava, make_batch, process_group):
    from torch.nn.parallel import DistributedDataParallel

    batch = make_batch(*MIXED)
    for call in (lambda m: me.wrap(m, SPEC), me.unwrap, me.last_report, lambda m: me.prepare(m, SPEC, **batch)):
        with pytest.raises(me.UnsupportedModelError, match="DDP"):
            call(DistributedDataParallel(make_llava()))
    inside = DistributedDataParallel(me.wrap(make_llava(), SPEC), find_unused_parameters=True)
    labels = batch.input_ids.masked_fill((batch.attention_mask == 0) | (batch.input_ids == IMAGE), -100)
    loss = inside(**batch, labels=labels).loss
    assert torch.equal(loss, me.wrap(make_llava(), SPEC)(**batch, labels=labels).loss)
    loss.backward()
    assert inside.module.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


def test_a_data_parallel_model_is_refused(make_llava):
    with pytest.raises(me.UnsupportedModelError, match="DataParallel wrapper: wrap the model inside it first"):
        me.wrap(torch.nn.DataParallel(make_llava()), SPEC)


def test_a_compiled_model_is_refused(make_llava):
    with pytest.raises(me.UnsupportedModelError, match="torch.compile wrapper: wrap the model inside it first"):
        me.wrap(torch.compile(make_llava(), backend="eager"), SPEC)


def test_fsdp_models_are_refused(tiny_llava):
    class FullyShardedDataParallel(torch.nn.Module):
        """Of the same name as torch's, which needs a device to be built."""

    class FSDPModule:
        pass

    with pytest.raises(me.UnsupportedModelError, match="FSDP wrapper"):
        me.wrap(FullyShardedDataParallel(), SPEC)
    tiny_llava.__class__ = type("FSDPLlavaForConditionalGeneration", (FSDPModule, type(tiny_llava)), {})
    with pytest.raises(me.UnsupportedModelError, match="sharded by FSDP: wrap it first"):
        me.wrap(tiny_llava, SPEC)


def test_a_wrapper_around_a_peft_model_is_refused_too(make_llava):
    with pytest.raises(me.UnsupportedModelError, match="DataParallel"):
        me.wrap(torch.nn.DataParallel(with_lora(make_llava())), SPEC)


@pytest.mark.parametrize("thing", [torch.nn.Linear(2, 2), None, "llava-hf/llava-1.5-7b-hf"], ids=["module", "None", "name"])
def test_what_is_no_supported_model_is_refused(thing):
    with pytest.raises(me.UnsupportedModelError, match="is not supported: the model must be one of LlavaForConditionalGeneration"):
        me.wrap(thing, SPEC)


# ------------------------------------------------------------------------------------------------ quantised, saved, trained


@torch.no_grad()
@pytest.mark.parametrize("order", ["quantise then wrap", "wrap then quantise"])
def test_weight_only_int8_generates_wrapped(make_llava, make_batch, order):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def quantised(model):
        quantize_(model.model.language_model, Int8WeightOnlyConfig())
        return model

    batch = make_batch(*MIXED)
    model = me.wrap(quantised(make_llava()), SPEC) if order == "quantise then wrap" else quantised(me.wrap(make_llava(), SPEC))
    plain = quantised(make_llava())
    assert not torch.equal(plain(**batch).logits, make_llava()(**batch).logits)
    kwargs = me.prepare(plain, SPEC, **batch).model_kwargs
    assert torch.equal(new_tokens(model, batch, **NEW), new_tokens(plain, kwargs, **NEW))
    assert torch.equal(model(**batch).logits, plain(**kwargs).logits)
    assert torch.equal(me.unwrap(model).generate(**batch, **NEW), plain.generate(**batch, **NEW))


@torch.no_grad()
def test_a_model_loaded_in_int8_generates_wrapped(make_llava, make_batch, tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import LlavaForConditionalGeneration, TorchAoConfig

    batch = make_batch(*MIXED)
    make_llava().save_pretrained(tmp_path)
    how = dict(quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), dtype=torch.float32)
    plain, model = (LlavaForConditionalGeneration.from_pretrained(tmp_path, **how).eval() for _ in range(2))
    weight = model.model.language_model.layers[0].self_attn.q_proj.weight
    assert type(weight) is not torch.nn.Parameter and "Int8" in repr(type(weight)) + repr(weight)
    kwargs = me.prepare(plain, SPEC, **batch).model_kwargs
    assert torch.equal(new_tokens(me.wrap(model, SPEC), batch, **NEW), new_tokens(plain, kwargs, **NEW))


@torch.no_grad()
def test_a_wrapped_model_saves_as_the_stock_one(make_llava, make_batch, tmp_path):
    import json

    from transformers import LlavaForConditionalGeneration

    batch, model = make_batch(*MIXED), make_llava()
    logits = model(**batch).logits
    me.wrap(model, SPEC).save_pretrained(tmp_path / "wrapped")
    make_llava().save_pretrained(tmp_path / "stock")
    assert json.loads((tmp_path / "wrapped" / "config.json").read_text())["architectures"] == ["LlavaForConditionalGeneration"]
    for file in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "wrapped" / file).read_bytes() == (tmp_path / "stock" / file).read_bytes()
    again, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "wrapped", output_loading_info=True)
    assert not any(info.values()) and type(again) is LlavaForConditionalGeneration
    assert torch.equal(again.eval()(**batch).logits, logits)
    assert torch.equal(me.wrap(again, SPEC).generate(**batch, **NEW), model.generate(**batch, **NEW))


@torch.no_grad()
def test_moving_and_casting_a_wrapped_model(make_llava, make_batch):
    batch = make_batch(*MIXED)
    model = me.wrap(make_llava(), SPEC).to(torch.bfloat16).eval().requires_grad_(False)
    assert torch.equal(model.generate(**batch, **NEW), me.wrap(make_llava().to(torch.bfloat16), SPEC).generate(**batch, **NEW))


def test_trainer_trains_a_wrapped_model_as_the_explicit_path_would(make_llava, make_batch, tmp_path):
    from transformers import Trainer, TrainingArguments

    def collate(items):
        batch = make_batch(*items[0]["rows"])
        return {**batch, "labels": batch.input_ids.clone()}

    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=1, learning_rate=1e-2, lr_scheduler_type="constant", optim="sgd",
        max_grad_norm=0, logging_steps=1, report_to=[], save_strategy="no", remove_unused_columns=False, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    model = me.wrap(make_llava(), SPEC)
    trainer = Trainer(model=model, args=arguments, data_collator=collate, train_dataset=[{"rows": MIXED}] * 2)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    by_hand = make_llava().train()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=1e-2)
    for logged in losses:
        loss = by_hand(**me.prepare(by_hand, SPEC, **collate([{"rows": MIXED}])).model_kwargs).loss
        assert logged == pytest.approx(loss.item(), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
