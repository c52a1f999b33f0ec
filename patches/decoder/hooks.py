"""Shortening the visual part of the sequence between the layers of a transformers decoder, by kwargs pre-hooks.

What one call does travels in ``**kwargs`` from the base model to every layer, and what later calls have to know sits on the
cache object. Layer 0 sees the whole sequence, so all of ``generate``'s bookkeeping, which reads layer 0, stays right; every
later layer's cache has a length of its own. Each row is shortened by itself and padded on the left, and after the last
layer the states are put back to the length of the prompt.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mllm_efficient.apply.prompt import SEGMENTS_ATTRIBUTE
from mllm_efficient.apply.signatures import cache_of, check_layer
from mllm_efficient.compressors.reducer import Reducer
from mllm_efficient.errors import CountMismatchError, UnsupportedModelError

from ..rules import check_reducer
from ..running import hooking
from .passes import Pass, Prefill
from .staging import Shortened, Staging
from .weighing import require_kernel

PASS = "visual_pass"  # the keyword under which a ``Pass`` travels


class EnterLayer:
    """The pre-hook of decoder layer ``index``. Does nothing to a call that no pass travels with."""

    def __init__(self, index: int):
        self.index = index

    @torch.compiler.disable(reason="methods in the decoder choose by values")
    def __call__(self, layer: Any, args: tuple, kwargs: dict[str, Any] | None = None):
        # Another thread's call can come between the two steps of registering a hook, and then passes no kwargs.
        kwargs = dict(kwargs or {})
        this: Pass | None = kwargs.pop(PASS, None)
        if this is None:
            return None
        _refuse(layer)
        if kwargs.get("use_cache") and cache_of(kwargs) is None:
            raise UnsupportedModelError(
                f"{type(layer).__name__} got no cache that in-decoder methods know: mllm-efficient doctor says what holds"
            )
        hidden = this.enter(self.index, layer, args[0] if args else kwargs.pop("hidden_states"), kwargs)
        return (hidden, *args[1:]), kwargs


@torch.compiler.disable(reason="methods in the decoder choose by values")
def leave_decoder(decoder: Any, args: tuple, kwargs: dict[str, Any], output: Any = None) -> Any:
    """The hook after the language model: its states at every column of the prompt."""
    this: Pass | None = None if output is None else kwargs.get(PASS)
    if this is None:
        return None
    if isinstance(output, tuple):
        return (this.restore(output[0]), *output[1:])
    output.last_hidden_state = this.restore(output.last_hidden_state)
    return output


@torch.compiler.disable(reason="methods in the decoder choose by values")
def begin_pass(model: Any, args: tuple, kwargs: dict[str, Any] | None = None):
    """The pre-hook of the top and of the base model: a call that brings staged images, or goes on from a shortened cache, gets its
    ``Pass``.

    From the top one where there is one: accelerate's hooks, which move arguments between devices, make a container of features anew
    on the way down, and what is to be done inside the decoder is an attribute of it.
    """
    kwargs = kwargs or {}
    if PASS in kwargs:
        return None
    cache, decoder = cache_of(kwargs), decoder_of(model)
    staging: Staging | None = getattr(kwargs.get("mm_encoder_outputs"), "staging", None)
    state: Shortened | None = getattr(cache, SEGMENTS_ATTRIBUTE, None)
    if staging is None and state is None:
        return None
    seen = 0 if cache is None else int(cache.get_seq_length())
    if seen == 0 and state is not None:  # an emptied cache
        delattr(cache, SEGMENTS_ATTRIBUTE)
    if cache is not None and cache.is_compileable and any(cache.is_sliding):
        raise UnsupportedModelError("a static cache with sliding layers holds no shortened prompt: leave cache_implementation out")
    ids = kwargs.get("input_ids", args[0] if args else None)
    ids = kwargs.get("inputs_embeds") if ids is None else ids
    if ids is None:
        raise CountMismatchError("a shortened prompt goes on with input_ids: pass them")
    total = seen + ids.shape[1]
    if staging is not None:
        if seen:
            raise CountMismatchError("new images on a cache that holds a conversation: start with an empty cache")
        new = _new_columns(kwargs.get("attention_mask"), len(ids), staging.length, total, ids.device)
        return args, {**kwargs, PASS: Prefill(staging, new, decoder)}
    if seen == 0:
        return None
    assert state is not None
    if seen < state.length:
        raise CountMismatchError("the cache was cut inside its shortened prompt: start with an empty cache")
    new = _new_columns(kwargs.get("attention_mask"), len(ids), state.length, total, ids.device)
    return args, {**kwargs, PASS: Pass(state, new, decoder)}


def _new_columns(mask: Any, rows: int, prompt: int, total: int, device: torch.device) -> Tensor:
    """(B, E) bool: which of the columns after the prompt are no padding. mask: (B, total), or one that ``generate`` has made."""
    if total < prompt:
        raise CountMismatchError(f"{total} columns where the prompt alone has {prompt}")
    if isinstance(mask, dict):  # by layer type; all of them end alike
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None:
        return torch.ones(rows, total - prompt, dtype=torch.bool, device=device)
    if mask.ndim == 4:  # what the last token sees: booleans, or 0 and the smallest number
        mask = mask[:, 0, -1, :total]
        mask = mask == 0 if mask.is_floating_point() else mask
    if mask.ndim != 2 or mask.shape[1] != total:
        raise CountMismatchError(f"attention_mask {tuple(mask.shape)} does not fit the {total} tokens of the conversation")
    return mask[:, prompt:].bool().expand(rows, -1)


def _refuse(layer: Any) -> None:
    """What cannot work is said before it goes wrong."""
    from .. import transformers_version

    if getattr(layer, "gradient_checkpointing", False) and layer.training and transformers_version() < (5, 23):
        raise UnsupportedModelError("in-decoder methods with gradient checkpointing need transformers 5.23 or newer")


def decoder_of(model: Any) -> Any:
    """The language model of a top model."""
    return model.get_decoder()


_users: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # of the hooks on a model


def attach(model: Any) -> None:
    """Puts the hooks on a top model: on itself and its base model, in front of every decoder layer, and after the language model.

    Counted: calls in several threads may each want them, and the last to ``detach`` takes them off.
    """
    with hooking:
        users = _users.get(model, 0) or int(attached(model))  # a copy of a model has copies of its hooks
        _users[model] = users + 1
        if users:
            return
        decoder = decoder_of(model)
        for module in (model, model.model):
            module.register_forward_pre_hook(begin_pass, with_kwargs=True)
        for index, layer in enumerate(decoder.layers):
            layer.register_forward_pre_hook(EnterLayer(index), with_kwargs=True)
        decoder.register_forward_hook(leave_decoder, with_kwargs=True)


def attached(model: Any) -> bool:
    return begin_pass in model.model._forward_pre_hooks.values()


def detach(model: Any) -> None:
    """Takes the hooks off again, found by what they are."""
    with hooking:
        users = _users.pop(model, 1) - 1
        if users > 0:
            _users[model] = users
            return
        decoder = decoder_of(model)
        for module in (model, model.model, *decoder.layers):
            _remove(
                module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, lambda h: h is begin_pass or isinstance(h, EnterLayer)
            )
        _remove(decoder._forward_hooks, decoder._forward_hooks_with_kwargs, lambda h: h is leave_decoder)


def _remove(hooks: Any, with_kwargs: Any, is_own: Callable[[Any], bool]) -> None:
    for key in [key for key, hook in hooks.items() if is_own(hook)]:
        del hooks[key]
        with_kwargs.pop(key, None)


def _check_untested(adapter: Any) -> None:
    """On a transformers newer than the newest tested, the doctor's check of in-decoder methods has to hold first."""
    from mllm_efficient.patches.checkup import host_fault

    from .. import NEWEST_TESTED, transformers_version

    if transformers_version() > NEWEST_TESTED and (fault := host_fault(adapter.config.model_type)):
        raise UnsupportedModelError(f"in-decoder methods are wrong on this transformers, which is newer than the newest tested ({fault})")


def check_decoder(adapter: Any, method: Reducer) -> None:
    """Raises ``UnsupportedModelError`` for a decoder that a method cannot work in."""
    check_reducer(adapter, method)
    check_layer(type(decoder_of(adapter.model).layers[0]))
    if method.weighs:
        require_kernel(decoder_of(adapter.model).config)
    _check_untested(adapter)
    if getattr(adapter.model, "_compiled_call_impl", None) is not None:
        raise UnsupportedModelError(f"{method.name} chooses by values, which torch.compile cannot trace: wrap a model that is not compiled")
