"""``generate`` of a wrapped model: shrink the prompt, run the stock loop, give the original prompt back."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..compressors.composed import inside_of, runnable
from ..errors import CountMismatchError, MllmEfficientError
from ..report import CompressionReport, remember
from ..trained.install import inside
from .encode import has_pixels, keeps_all
from .locate import warn_without_pixels
from .original_prompt import OriginalPrompt, allowed_behind, shown_the_prompt, with_prompt
from .plan import check
from .prepare import Prepared, prepare
from .prompt import SEGMENTS_ATTRIBUTE, UNCOMPRESSED_CACHE, Layout, holds_uncompressed, layout_on, leave_on
from .sharding import gathered
from .signatures import cache_of, parameters_of


@dataclass(eq=False)
class _Run:
    """One ``generate``. open: until it returns, also for tasks that were begun in it and outlive it."""

    model: Any
    open: bool = True


_generating: contextvars.ContextVar[tuple[_Run, ...]] = contextvars.ContextVar("generating", default=())


def within_generate(model: Any) -> bool:
    """Whether this call is one of ``generate``'s own, which the wrapped ``generate`` has prepared already."""
    return any(run.model is model and run.open for run in _generating.get())


def generate(model: Any, stock: Any, method: Any, inputs: Tensor | None, args: tuple, kwargs: dict[str, Any]) -> Any:
    """``generate`` of a wrapped model: shrink the prompt, run the stock loop, give the original prompt back."""
    from ..patches import adapter_for

    method = None if method is None else runnable(method)
    reduces = method is not None and inside_of(method) is not None
    shortened = hasattr(cache_of(kwargs), SEGMENTS_ATTRIBUTE)
    hooks = inside(adapter_for(model)) if shortened or reduces else contextlib.nullcontext()
    with hooks:
        return _generate(model, stock, method, inputs, args, kwargs)


def _generate(model: Any, stock: Any, method: Any, inputs: Tensor | None, args: tuple, kwargs: dict[str, Any]) -> Any:
    from ..patches import adapter_for

    kwargs, args = {**dict(zip(parameters_of(stock)[1:], args)), **kwargs}, ()
    if inputs is not None and kwargs.get("input_ids") is None and torch.is_tensor(inputs) and not inputs.is_floating_point():
        kwargs, inputs = {**kwargs, "input_ids": inputs}, None
    kwargs = adapter_for(model).as_tensors(kwargs)
    ids, cache = kwargs.get("input_ids"), cache_of(kwargs)
    layout, prepared = layout_on(cache), None
    if method is not None:
        check(adapter_for(model), method)
    if method is None and layout is not None:
        raise CountMismatchError("this cache was made with compression, so compression=None cannot go on from it")
    config = kwargs.get("generation_config")
    if not has_pixels(kwargs) and not (cache is not None and int(cache.get_seq_length())):
        warn_without_pixels(adapter_for(model).placeholders, kwargs)
    if method is not None and kwargs.get("mm_encoder_outputs") is None:
        prepared = _prepare_generate(model, method, ids, layout, kwargs, config)
    if prepared is None or (prepared.layout is None and prepared.staging is None):
        out = _run(model, stock, inputs, args, kwargs)
        return _finish(model, out, prepared.report if prepared else CompressionReport(off=method is None))

    assert ids is not None
    call = {k: v for k, v in kwargs.items() if k not in prepared.tensors and k not in _vision_keys(model)}
    call |= prepared.model_kwargs
    chunks = _setting("prefill_chunk_size", kwargs, config, model) is not None
    if prepared.staging is not None:
        if chunks:
            raise MllmEfficientError("prefill_chunk_size cuts a prompt that in-decoder methods need whole: leave it out")
        call["disable_compile"] = True
    if prepared.layout is None:
        return _finish(model, _run(model, stock, None, args, call), prepared.report)

    from ..patches import transformers_version

    removed = prepared.layout.removed
    for name in ("max_length", "min_length"):
        wanted = _setting(name, kwargs, config, model)
        if wanted is not None:
            if name == "max_length" and wanted <= ids.shape[1] and _setting("max_new_tokens", kwargs, config, model) is None:
                raise CountMismatchError(
                    f"the prompt is {ids.shape[1]} tokens long, and max_length={wanted} leaves no room for an answer: give max_new_tokens"
                )
            call[name] = max(wanted - removed, 0)
    if chunks and transformers_version() < (5, 23):
        raise MllmEfficientError("prefill_chunk_size with images needs transformers 5.23 or newer: leave it out")
    gaps = prepared.layout.positions == "keep" and not prepared.layout.mrope
    if gaps and _setting("use_cache", kwargs, config, model) is False:
        raise MllmEfficientError("positions='keep' needs the cache: without it gaps are read as packed sequences")
    length = prepared.layout.reduced_length
    if kwargs.get("streamer") is not None:
        call["streamer"] = OriginalPrompt(kwargs["streamer"], ids)
    if kwargs.get("prefix_allowed_tokens_fn") is not None:
        beams, returned = (_setting(name, kwargs, config, model) or 1 for name in ("num_beams", "num_return_sequences"))
        call["prefix_allowed_tokens_fn"] = allowed_behind(kwargs["prefix_allowed_tokens_fn"], ids, length, returned if beams == 1 else 1)
    with shown_the_prompt(model, ids, length):
        out = _run(model, stock, None, args, call)
    sequences = out if torch.is_tensor(out) else out.sequences
    layout = prepared.layout.repeated(len(sequences) // len(ids))
    leave_on(cache, layout)
    if torch.is_tensor(out):
        return _finish(model, with_prompt(out, ids, length), prepared.report)
    leave_on(cache_of(out), layout)
    out.sequences = with_prompt(out.sequences, ids, length)
    return _finish(model, out, prepared.report)


def _run(model: Any, stock: Any, inputs: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The stock ``generate``, whose own forward calls the hook leaves alone."""
    run = _Run(model)
    token = _generating.set((*_generating.get(), run))
    try:
        return stock(model, inputs, *args, **kwargs)
    finally:
        run.open = False
        _generating.reset(token)


def _setting(name: str, kwargs: dict[str, Any], config: Any, model: Any) -> Any:
    """A generation setting as ``generate`` finds it: argument, given configuration, the model's configuration."""
    values = (kwargs.get(name), getattr(config, name, None), getattr(model.generation_config, name, None))
    return next((v for v in values if v is not None), None)


def _prepare_generate(
    model: Any, method: Any, ids: Tensor | None, layout: Layout | None, kwargs: dict[str, Any], config: Any
) -> Prepared | None:
    from ..patches import adapter_for

    if not has_pixels(kwargs) and layout is None:
        return None
    if ids is None:
        raise CountMismatchError("images without input_ids cannot be compressed: pass the processor's input_ids")
    adapter = adapter_for(model)
    cache = cache_of(kwargs)
    if holds_uncompressed(cache):
        seen = int(cache.get_seq_length())
        if keeps_all(adapter, method, {**kwargs, "input_ids": ids[:, seen:]}):
            return None
        raise CountMismatchError(UNCOMPRESSED_CACHE)
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
        return gathered(model, functools.partial(prepare, model, method, past=layout), input_ids=ids, attention_mask=mask, **vision)


def _vision_keys(model: Any) -> tuple[str, ...]:
    from ..patches import adapter_for

    return adapter_for(model).encode_keys


def _infer_mask(ids: Tensor, pad: int | None, eos: Any) -> Tensor:
    """What ``generate`` assumes without a mask: padding is masked unless it doubles as the end of sequence."""
    ends = eos if isinstance(eos, (list, tuple)) else [eos]
    if pad is None or pad in ends:
        return torch.ones_like(ids)
    return (ids != pad).long()


def _finish(model: Any, out: Any, report: CompressionReport) -> Any:
    remember(model, report)
    if not torch.is_tensor(out):
        out.compression = report
    return out
