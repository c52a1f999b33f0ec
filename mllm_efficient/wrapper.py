"""The drop-in skin: ``wrap`` a model, use it as before, ``unwrap`` it.

``forward`` is reached by a module-level pre-hook (a class-level ``forward`` is silently lost when accelerate replaces
the instance's), ``generate`` by swapping the class in place for a subclass of the same name. Nothing else is put on
the model, and nothing of a call stays on it.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from .compressors.base import Compressor
from .errors import AlreadyWrappedError, CountMismatchError, MllmEfficientError
from .report import CompressionReport, remember
from .shrink import Layout, Prepared, check, pre_llm, prepare

Model = TypeVar("Model")
CACHE_ATTRIBUTE = "_visual_layout"
_UNSET: Any = object()
_generating: contextvars.ContextVar[tuple[Any, ...]] = contextvars.ContextVar("generating", default=())
_swapped: dict[type, type] = {}


def wrap(model: Model, compressor: Any) -> Model:
    """Makes ``model`` compress its visual tokens from now on; returns the same object.

    Args:
        model: a supported transformers model (bare, under PEFT, dispatched or prepared by accelerate).
        compressor: a method, ``"divprune:keep=0.1"``, a dict, a YAML file, or a list of at most one method per family.

    ``generate`` returns the original prompt in front of the new tokens and takes ``compression=`` for one call (None is
    off). ``forward`` returns logits of the reduced length and ``outputs.visual_keep_mask`` (B, L).

    Raises:
        AlreadyWrappedError, UnsupportedModelError (DDP, FSDP or compiled wrappers, unknown families), BadBudgetError.
    """
    from .patches import adapter_for

    adapter, method = adapter_for(model), pre_llm(compressor)
    inner = adapter.model
    if _hook_of(inner) is not None:
        raise AlreadyWrappedError("this model is wrapped already: unwrap(model) first, or pass compression= to generate")
    check(adapter, method)
    inner.__class__ = _class_for(type(inner))
    inner.register_forward_pre_hook(CompressForward(method), with_kwargs=True)
    inner.register_forward_hook(mark_output, with_kwargs=True)
    return model


def unwrap(model: Model) -> Model:
    """Takes everything off that ``wrap`` put on; returns the same object. Raises if it is not wrapped."""
    from .patches import inner_model

    inner = inner_model(model)
    if _hook_of(inner) is None:
        raise MllmEfficientError("this model is not wrapped")
    for hooks, with_kwargs, ours in (
        (inner._forward_pre_hooks, inner._forward_pre_hooks_with_kwargs, lambda h: isinstance(h, CompressForward)),
        (inner._forward_hooks, inner._forward_hooks_with_kwargs, lambda h: h is mark_output),
    ):
        for key in [k for k, h in hooks.items() if ours(h)]:
            del hooks[key]
            with_kwargs.pop(key, None)
    inner.__class__ = type(inner).__mro__[1]
    return model


@contextlib.contextmanager
def compressed(model: Model, compressor: Any) -> Iterator[Model]:
    """``wrap`` for the length of a ``with`` block."""
    wrap(model, compressor)
    try:
        yield model
    finally:
        unwrap(model)


def method_of(model: Any) -> Compressor | None:
    """The method a model is wrapped with, or None."""
    from .patches import inner_model

    hook = _hook_of(inner_model(model))
    return hook.method if hook else None


def _hook_of(inner: Any) -> CompressForward | None:
    return next((h for h in inner._forward_pre_hooks.values() if isinstance(h, CompressForward)), None)


class CompressForward:
    """The forward pre-hook: compresses a call that brings pixels, maps one that goes on from a compressed cache."""

    def __init__(self, method: Compressor):
        self.method = method

    def __call__(self, model: Any, args: tuple, kwargs: dict[str, Any]):
        if _within_generate(model) or kwargs.get("mm_encoder_outputs") is not None:
            return None
        if args:
            kwargs = {**dict(zip(_forward_names(type(model).forward), args)), **kwargs}
        cache = kwargs.get("past_key_values")
        layout = _layout_on(cache)
        has_images = kwargs.get("pixel_values") is not None
        if layout is not None:
            if has_images:
                raise CountMismatchError("new images on a compressed cache: use generate with the whole conversation")
            return (), continue_forward(layout, cache, kwargs)
        if not has_images:
            remember(model, CompressionReport())
            return None
        if kwargs.get("input_ids") is None:
            raise CountMismatchError("images with inputs_embeds but no input_ids cannot be compressed: pass input_ids")
        _require_empty(cache)
        with _autocast_of(model):
            prepared = prepare(model, self.method, **kwargs)
        remember(model, prepared.report)
        return (), prepared.model_kwargs


def mark_output(model: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """The forward hook: puts ``visual_keep_mask`` on the output and the layout on the cache."""
    if _within_generate(model):
        return
    layout = getattr(kwargs.get("mm_encoder_outputs"), "layout", None)
    if layout is not None:
        for part in output if isinstance(output, tuple) else output.values():
            _leave_on(part, layout)
    if isinstance(output, tuple):
        return
    if layout is not None:
        output.visual_keep_mask = layout.keep.to(output.logits.device)
    elif kwargs.get("pixel_values") is not None:
        output.visual_keep_mask = torch.ones_like(kwargs["input_ids"], dtype=torch.bool)


def _within_generate(model: Any) -> bool:
    """Whether this call is one of ``generate``'s own, which the wrapped ``generate`` has prepared already."""
    return any(m is model for m in _generating.get())


def _leave_on(cache: Any, layout: Layout | None) -> None:
    if layout is not None and hasattr(cache, "get_seq_length"):
        setattr(cache, CACHE_ATTRIBUTE, layout)


def _layout_on(cache: Any) -> Layout | None:
    """The layout of a cache that holds something; an emptied cache has none."""
    layout = getattr(cache, CACHE_ATTRIBUTE, None)
    if layout is None or int(cache.get_seq_length()) == 0:
        return None
    if int(cache.get_seq_length()) < layout.reduced_length:
        raise CountMismatchError("the cache was cut inside its compressed prompt: start with an empty cache")
    return layout


def _require_empty(cache: Any) -> None:
    if cache is not None and _layout_on(cache) is None and int(cache.get_seq_length()) > 0:
        raise CountMismatchError("new images on a cache that was not compressed: start with an empty cache")


@functools.cache
def _forward_names(forward: Callable) -> list[str]:
    return [p for p in inspect.signature(forward).parameters if p != "self"]


def _autocast_of(model: Any):
    """The autocast that ``accelerator.prepare`` put around this model's forward, which hooks run outside of."""
    function = getattr(model.__dict__.get("forward"), "__func__", None)
    if type(getattr(function, "__wrapped__", None)).__name__ != "ConvertOutputsToFp32":
        return contextlib.nullcontext()
    from accelerate.state import AcceleratorState

    if not AcceleratorState._shared_state or AcceleratorState().mixed_precision not in ("bf16", "fp16"):
        return contextlib.nullcontext()
    dtype = torch.bfloat16 if AcceleratorState().mixed_precision == "bf16" else torch.float16
    return torch.autocast(model.device.type, dtype)


def continue_forward(layout: Layout, cache: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A later ``forward`` on a compressed cache: masks and ids of full length lose the removed columns.

    ``input_ids`` may be the new tokens or the whole conversation. Any length that is neither the full nor the reduced
    one raises: the wrong one would give wrong tokens without an error.
    """
    kwargs = dict(kwargs)
    ids, mask, seen = kwargs.get("input_ids"), kwargs.get("attention_mask"), int(cache.get_seq_length())
    if ids is None:
        raise CountMismatchError("a compressed cache goes on with input_ids alone: pass them instead of inputs_embeds")
    full_seen = seen + layout.removed
    if torch.equal(ids[:, : layout.full_length].cpu(), layout.ids):  # the whole conversation
        if ids.shape[1] <= full_seen:
            raise CountMismatchError(f"{ids.shape[1]} input_ids on a cache of {full_seen} tokens: this turn adds none")
        ids = kwargs["input_ids"] = ids[:, full_seen:]
    total = seen + ids.shape[1]
    if mask is not None and (mask.ndim != 2 or mask.shape[1] not in (total, total + layout.removed)):
        raise CountMismatchError(
            f"attention_mask {tuple(mask.shape)} fits neither the {total + layout.removed} tokens of the full "
            f"conversation nor the {total} of the compressed one"
        )
    if mask is None or mask.shape[1] != total:
        prompt = layout.mask.to(ids.device)
        new = prompt.new_ones(ids.shape[0], total - layout.reduced_length) if mask is None else mask[:, layout.full_length :]
        mask = kwargs["attention_mask"] = torch.cat([prompt.to(new.dtype), new.to(ids.device)], 1)
    if layout.positions == "keep":
        gone = (~layout.keep).sum(1, keepdim=True).to(ids.device)
        kwargs["position_ids"] = (mask.long().cumsum(1) - 1)[:, -ids.shape[1] :] + gone
    return kwargs


def _class_for(cls: Any) -> Any:
    """The subclass a wrapped model is an instance of: same name, module and behaviour, another ``generate``."""
    if cls not in _swapped:
        stock = cls.generate

        @functools.wraps(stock)
        def generate(self, inputs=None, *args, compression=_UNSET, **kwargs):
            return _generate(self, stock, inputs, args, compression, kwargs)

        def __reduce_ex__(self, protocol):
            return (_rebuild, (cls,), *cls.__reduce_ex__(self, protocol)[2:])

        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        _swapped[cls] = type(cls.__name__, (cls,), {**names, "generate": generate, "__reduce_ex__": __reduce_ex__})
    return _swapped[cls]


def _rebuild(cls: type) -> Any:
    swapped: Any = _class_for(cls)
    return swapped.__new__(swapped)


def _generate(model: Any, stock: Any, inputs: Tensor | None, args: tuple, compression: Any, kwargs: dict[str, Any]) -> Any:
    """``generate`` of a wrapped model: shrink the prompt, run the stock loop, give the original prompt back."""
    hook = _hook_of(model)
    assert hook is not None
    method = hook.method if compression is _UNSET else compression
    if inputs is not None and kwargs.get("input_ids") is None and torch.is_tensor(inputs) and not inputs.is_floating_point():
        kwargs, inputs = {**kwargs, "input_ids": inputs}, None
    ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
    layout, prepared = _layout_on(cache), None
    if method is not None:
        from .patches import adapter_for

        method = pre_llm(method)
        check(adapter_for(model), method)
    if method is None and layout is not None:
        raise CountMismatchError("this cache was made with compression, so compression=None cannot go on from it")
    config = kwargs.get("generation_config") or (args[0] if args else None)
    if method is not None and kwargs.get("mm_encoder_outputs") is None:
        prepared = _prepare_generate(model, method, ids, layout, kwargs, config)
    if prepared is None or prepared.layout is None:
        out = _run(model, stock, inputs, args, kwargs)
        return _finish(model, out, prepared.report if prepared else CompressionReport())

    assert ids is not None
    removed = prepared.layout.removed
    call = {k: v for k, v in kwargs.items() if k not in prepared.tensors and k not in _vision_keys(model)}
    call |= prepared.model_kwargs
    for name in ("max_length", "min_length"):
        wanted = _setting(name, kwargs, config, model)
        if wanted is not None:
            call[name] = max(wanted - removed, 0)
    if prepared.layout.positions == "keep" and _setting("use_cache", kwargs, config, model) is False:
        raise MllmEfficientError("positions='keep' needs the cache: without it gaps are read as packed sequences")
    if kwargs.get("streamer") is not None:
        call["streamer"] = _OriginalPrompt(kwargs["streamer"], ids)
    length = prepared.layout.reduced_length
    if kwargs.get("stopping_criteria") is not None:
        watch = [_SeesOriginalPrompt(c, ids, length) for c in kwargs["stopping_criteria"]]
        call["stopping_criteria"] = type(kwargs["stopping_criteria"])(watch)
    out = _run(model, stock, None, args, call)
    sequences = out if torch.is_tensor(out) else out.sequences
    layout = prepared.layout.repeated(len(sequences) // len(ids))
    _leave_on(cache, layout)
    if torch.is_tensor(out):
        return _finish(model, with_prompt(out, ids, length), prepared.report)
    _leave_on(out.get("past_key_values"), layout)
    out.sequences = with_prompt(out.sequences, ids, length)
    return _finish(model, out, prepared.report)


def _run(model: Any, stock: Any, inputs: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The stock ``generate``, whose own forward calls the hook leaves alone."""
    token = _generating.set((*_generating.get(), model))
    try:
        return stock(model, inputs, *args, **kwargs)
    finally:
        _generating.reset(token)


def _setting(name: str, kwargs: dict[str, Any], config: Any, model: Any) -> Any:
    """A generation setting as ``generate`` finds it: argument, given configuration, the model's configuration."""
    values = (kwargs.get(name), getattr(config, name, None), getattr(model.generation_config, name, None))
    return next((v for v in values if v is not None), None)


def _prepare_generate(
    model: Any, method: Any, ids: Tensor | None, layout: Layout | None, kwargs: dict[str, Any], config: Any
) -> Prepared | None:
    if kwargs.get("pixel_values") is None and layout is None:
        return None
    if ids is None:
        raise CountMismatchError("images without input_ids cannot be compressed: pass the processor's input_ids")
    cache = kwargs.get("past_key_values")
    _require_empty(cache)
    mask = kwargs.get("attention_mask")
    if mask is None:
        ends = _setting("eos_token_id", kwargs, config, model)
        mask = _infer_mask(ids, _setting("pad_token_id", kwargs, config, model), ends)
    if layout is not None:
        if ids.shape[0] != len(layout.ids) or not torch.equal(ids[:, : layout.full_length].cpu(), layout.ids):
            raise CountMismatchError("the cache holds another prompt: pass input_ids that begin with the earlier conversation")
        layout = layout.grown(ids, mask, int(cache.get_seq_length()))
    vision = {
        k: kwargs[k] for k in (*_vision_keys(model), "mm_token_type_ids", "token_type_ids", "position_ids") if kwargs.get(k) is not None
    }
    with torch.no_grad():
        return prepare(model, method, input_ids=ids, attention_mask=mask, past=layout, **vision)


def _vision_keys(model: Any) -> tuple[str, ...]:
    from .patches import adapter_for

    return adapter_for(model).encode_keys


def _infer_mask(ids: Tensor, pad: int | None, eos: Any) -> Tensor:
    """What ``generate`` assumes without a mask: padding is masked unless it doubles as the end of sequence."""
    ends = eos if isinstance(eos, (list, tuple)) else [eos]
    if pad is None or pad in ends:
        return torch.ones_like(ids)
    return (ids != pad).long()


def with_prompt(sequences: Tensor, ids: Tensor, reduced_length: int) -> Tensor:
    """The original prompt in front of the new tokens, because callers slice by its length."""
    times = sequences.shape[0] // ids.shape[0]
    prompt = ids.repeat_interleave(times, 0).to(sequences.device)
    return torch.cat([prompt, sequences[:, reduced_length:]], 1)


def _finish(model: Any, out: Any, report: CompressionReport) -> Any:
    remember(model, report)
    if not torch.is_tensor(out):
        out.compression = report
    return out


class _OriginalPrompt:
    """Passes a stream on, with the original prompt in place of the reduced one that ``generate`` sends first."""

    def __init__(self, streamer: Any, ids: Tensor):
        self.streamer = streamer
        self.ids: Tensor | None = ids

    def put(self, value: Tensor) -> None:
        if self.ids is not None:
            value, self.ids = self.ids.cpu(), None
        self.streamer.put(value)

    def end(self) -> None:
        self.streamer.end()


class _SeesOriginalPrompt:
    """A caller's stopping criterion, which sees sequences as long as the caller's own prompt makes them."""

    def __init__(self, criterion: Any, ids: Tensor, reduced_length: int):
        self.criterion, self.ids, self.reduced_length = criterion, ids, reduced_length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return self.criterion(with_prompt(input_ids, self.ids, self.reduced_length), scores, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.criterion, name)
