"""``generate`` of a wrapped model: shorten the prompt, run the stock loop, give the original prompt back."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..compressors.base import Compressor
from ..compressors.composed import inside_of
from ..errors import CountMismatchError, MllmEfficientError
from ..registry import runnable
from ..report import CompressionReport, remember
from ..trained.install import inside
from .encode import has_pixels, keeps_all
from .locate import warn_without_pixels
from .original_prompt import OriginalPrompt, allowed_after_prompt, shown_the_prompt, with_prompt
from .plan import check, refuse_processor
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


@dataclass(frozen=True)
class _Request:
    """A call of ``generate``. stock: the model's own ``generate``. inputs: its first argument, where that is no prompt of ids.
    kwargs: all others by their names."""

    model: Any
    stock: Any
    inputs: Tensor | None
    kwargs: dict[str, Any]

    @property
    def adapter(self) -> Any:
        from ..patches import adapter_for

        return adapter_for(self.model)

    @property
    def cache(self) -> Any:
        return cache_of(self.kwargs)

    def setting(self, name: str) -> Any:
        """A generation setting as ``generate`` finds it: argument, given configuration, the model's configuration."""
        given = self.kwargs.get("generation_config")
        values = (self.kwargs.get(name), getattr(given, name, None), getattr(self.model.generation_config, name, None))
        return next((v for v in values if v is not None), None)

    def run(self, inputs: Tensor | None, kwargs: dict[str, Any]) -> Any:
        """The stock ``generate``, whose own forward calls the hook leaves alone."""
        run = _Run(self.model)
        token = _generating.set((*_generating.get(), run))
        try:
            return self.stock(self.model, inputs, **kwargs)
        finally:
            run.open = False
            _generating.reset(token)


def generate(model: Any, stock: Any, method: Any, inputs: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``generate`` of a wrapped model: shorten the prompt, run the stock loop, give the original prompt back."""
    from ..patches import adapter_for

    method = None if method is None else runnable(method)
    reduces = method is not None and inside_of(method) is not None
    shortened = hasattr(cache_of(kwargs), SEGMENTS_ATTRIBUTE)
    adapter = adapter_for(model)
    with inside(adapter) if shortened or reduces else contextlib.nullcontext():
        kwargs = {**dict(zip(parameters_of(stock)[1:], args)), **kwargs}
        if inputs is not None and kwargs.get("input_ids") is None and torch.is_tensor(inputs) and not inputs.is_floating_point():
            kwargs, inputs = {**kwargs, "input_ids": inputs}, None
        return _generate(_Request(model, stock, inputs, adapter.as_tensors(kwargs)), method)


def _generate(request: _Request, method: Compressor | None) -> Any:
    model, kwargs, cache = request.model, request.kwargs, request.cache
    layout, prepared = layout_on(cache), None
    if method is not None:
        refuse_processor(method)
        check(request.adapter, method)
    elif layout is not None:
        raise CountMismatchError("this cache was made with compression, so compression=None cannot go on from it")
    if not has_pixels(kwargs) and not (cache is not None and int(cache.get_seq_length())):
        warn_without_pixels(request.adapter.placeholders, kwargs)
    if method is not None and kwargs.get("mm_encoder_outputs") is None:
        prepared = _prepare_generate(request, method, layout)
    if prepared is None or (prepared.layout is None and prepared.staging is None):
        out = request.run(request.inputs, kwargs)
        return _finish(model, out, prepared.report if prepared else CompressionReport(off=method is None))
    call = _call_of(request, prepared)
    if prepared.layout is None:
        return _finish(model, request.run(None, call), prepared.report)
    return _generate_shortened(request, prepared, prepared.layout, call)


def _call_of(request: _Request, prepared: Prepared) -> dict[str, Any]:
    """The arguments of the stock ``generate`` for what was prepared."""
    call = {k: v for k, v in request.kwargs.items() if k not in prepared.tensors and k not in request.adapter.encode_keys}
    call |= prepared.model_kwargs
    if prepared.staging is not None:
        if request.setting("prefill_chunk_size") is not None:
            raise MllmEfficientError("prefill_chunk_size cuts a prompt that in-decoder methods need whole: leave it out")
        call["disable_compile"] = True
    return call


def _generate_shortened(request: _Request, prepared: Prepared, layout: Layout, call: dict[str, Any]) -> Any:
    """``generate`` with a prompt that has lost columns, as if it had not."""
    ids = request.kwargs["input_ids"]
    _refuse_settings(request, layout)
    call |= _lengths(request, layout) | _seen_by_caller(request, ids, layout.reduced_length)
    with shown_the_prompt(request.model, ids, layout.reduced_length):
        out = request.run(None, call)
    sequences = out if torch.is_tensor(out) else out.sequences
    repeated = layout.repeated(len(sequences) // len(ids))
    leave_on(request.cache, repeated)
    whole = with_prompt(sequences, ids, layout.reduced_length)
    if torch.is_tensor(out):
        return _finish(request.model, whole, prepared.report)
    leave_on(cache_of(out), repeated)
    out.sequences = whole
    return _finish(request.model, out, prepared.report)


def _refuse_settings(request: _Request, layout: Layout) -> None:
    """Raises ``MllmEfficientError`` for settings under which a shortened prompt would be read wrongly."""
    from ..patches import transformers_version

    if request.setting("prefill_chunk_size") is not None and transformers_version() < (5, 23):
        raise MllmEfficientError("prefill_chunk_size with images needs transformers 5.23 or newer: leave it out")
    gaps = layout.positions == "keep" and not layout.mrope
    if gaps and request.setting("use_cache") is False:
        raise MllmEfficientError("positions='keep' needs the cache: without it gaps are read as packed sequences")


def _lengths(request: _Request, layout: Layout) -> dict[str, int]:
    """``max_length`` and ``min_length`` of the shortened prompt. Raises ``CountMismatchError`` where no room for an answer is left."""
    out = dict[str, int]()
    for name in ("max_length", "min_length"):
        wanted = request.setting(name)
        if wanted is None:
            continue
        if name == "max_length" and wanted <= layout.full_length and request.setting("max_new_tokens") is None:
            raise CountMismatchError(
                f"the prompt is {layout.full_length} tokens long, and max_length={wanted} leaves no room for an answer: give max_new_tokens"
            )
        out[name] = max(wanted - layout.removed, 0)
    return out


def _seen_by_caller(request: _Request, ids: Tensor, reduced_length: int) -> dict[str, Any]:
    """The caller's streamer and ``prefix_allowed_tokens_fn``, which see the original prompt."""
    kwargs, out = request.kwargs, dict[str, Any]()
    if kwargs.get("streamer") is not None:
        out["streamer"] = OriginalPrompt(kwargs["streamer"], ids)
    if kwargs.get("prefix_allowed_tokens_fn") is not None:
        beams, returned = (request.setting(name) or 1 for name in ("num_beams", "num_return_sequences"))
        each = returned if beams == 1 else 1
        out["prefix_allowed_tokens_fn"] = allowed_after_prompt(kwargs["prefix_allowed_tokens_fn"], ids, reduced_length, each)
    return out


def _prepare_generate(request: _Request, method: Compressor, layout: Layout | None) -> Prepared | None:
    """The call as ``prepare`` makes it; None where there is nothing to compress. layout: of the cache that it goes on from."""
    kwargs, ids, cache, adapter = request.kwargs, request.kwargs.get("input_ids"), request.cache, request.adapter
    if not has_pixels(kwargs) and layout is None:
        return None
    if ids is None:
        raise CountMismatchError("images without input_ids cannot be compressed: pass the processor's input_ids")
    if holds_uncompressed(cache):
        seen = int(cache.get_seq_length())
        if keeps_all(adapter, method, {**kwargs, "input_ids": ids[:, seen:]}):
            return None
        raise CountMismatchError(UNCOMPRESSED_CACHE)
    mask = kwargs.get("attention_mask")
    if mask is None:
        mask = _infer_mask(ids, request.setting("pad_token_id"), request.setting("eos_token_id"))
    if layout is not None:
        if ids.shape[0] != len(layout.ids) or not torch.equal(ids[:, : layout.full_length].cpu(), layout.ids):
            raise CountMismatchError("the cache holds another prompt: pass input_ids that begin with the earlier conversation")
        layout = layout.grown(ids, mask, int(cache.get_seq_length()))
    names = (*adapter.encode_keys, "mm_token_type_ids", "token_type_ids", "position_ids")
    vision = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
    with torch.no_grad():
        return gathered(
            request.model, functools.partial(prepare, request.model, method, past=layout), input_ids=ids, attention_mask=mask, **vision
        )


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
