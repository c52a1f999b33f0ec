"""The drop-in skin: ``wrap`` a model, use it as before, ``unwrap`` it.

``forward`` is reached by a module-level pre-hook (a class-level ``forward`` is silently lost when accelerate replaces
the instance's), ``generate`` by swapping the class in place for a subclass of the same name. Nothing else is put on
the model, and nothing of a call stays on it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from .composed import inside_of, runnable
from .compressors.base import Compressor
from .errors import AlreadyWrappedError, CountMismatchError, MllmEfficientError, UnsupportedModelError
from .generation import generate as run_generate
from .generation import within_generate
from .host import cache_of, parameters_of
from .installing import install
from .layout import UNCOMPRESSED_CACHE, continue_forward, holds_uncompressed, layout_on
from .outputs import call_of, check_length, held_back, mark_output
from .plan import check
from .report import CompressionReport, remember
from .sharding import has_shards
from .shrink import has_pixels, keeps_all, prepare

Model = TypeVar("Model")
_UNSET: Any = object()
NO_IDS = (
    "images with inputs_embeds but no input_ids cannot be compressed, because placeholders are found by their ids: pass input_ids, "
    "which PEFT's prompt tuning never does (LoRA does)"
)
_swapped: dict[type, type] = {}


def wrap(model: Model, compressor: Any, *, logits: str = "short") -> Model:
    """Makes ``model`` compress its visual tokens from now on; returns the same object.

    Args:
        model: a supported transformers model (bare, under PEFT, dispatched or prepared by accelerate).
        compressor: a method, ``"divprune:keep=0.1"``, a dict, a YAML file, or a list of at most one method per family.
        logits: ``"full"`` for logits of the prompt's own length from ``forward``, where a column that went says what the one
            before it does.

    ``generate`` returns the original prompt in front of the new tokens and takes ``compression=`` for one call (None is
    off). ``forward`` returns logits of the reduced length, ``outputs.visual_keep_mask`` (B, L), and of the logits' length
    ``visual_input_ids``, ``visual_attention_mask`` and, of the labels it got, ``visual_labels``. Labels on visual tokens enter
    no loss. transformers' Trainer divides by the labels that do, and gets full logits where it reads them beside its labels.

    Raises:
        AlreadyWrappedError, UnsupportedModelError (DDP, FSDP or compiled wrappers, unknown families, prompt tuning),
        BadBudgetError.
    """
    from .patches import adapter_for
    from .patches.trainer import refuse_virtual_tokens, watch_if_there

    check_length(logits)
    refuse_virtual_tokens(model)
    adapter, method = adapter_for(model), runnable(compressor)
    inner = adapter.model
    if _hook_of(inner) is not None:
        raise AlreadyWrappedError("this model is wrapped already: unwrap(model) first, or pass compression= to generate")
    check(adapter, method)
    undo = install(adapter, method)
    inner.__class__ = _class_for(type(inner))
    inner.register_forward_pre_hook(CompressForward(method, undo, logits), with_kwargs=True)
    inner.register_forward_hook(mark_output, with_kwargs=True)
    if inside_of(method) is not None:
        adapter.reach_inside()
    watch_if_there()
    return model


def unwrap(model: Model) -> Model:
    """Takes everything off that ``wrap`` put on; returns the same object. Raises if it is not wrapped."""
    from .patches import adapter_for

    adapter = adapter_for(model)
    inner = adapter.model
    hook = _hook_of(inner)
    if hook is None:
        raise MllmEfficientError("this model is not wrapped")
    if hook.undo.parts and has_shards(inner):
        raise UnsupportedModelError(
            f"{hook.method.spec()} put weights in the place of the model's own, and those were sharded since: load the model anew"
        )
    hook.undo()
    if inside_of(hook.method) is not None:
        adapter.let_go_inside()
    for hooks, with_kwargs, ours in (
        (inner._forward_pre_hooks, inner._forward_pre_hooks_with_kwargs, lambda h: isinstance(h, CompressForward)),
        (inner._forward_hooks, inner._forward_hooks_with_kwargs, lambda h: h is mark_output),
    ):
        for key in [k for k, h in hooks.items() if ours(h)]:
            del hooks[key]
            with_kwargs.pop(key, None)
    inner.__class__ = _class_without(type(inner))
    return model


@contextlib.contextmanager
def compressed(model: Model, compressor: Any, *, logits: str = "short") -> Iterator[Model]:
    """``wrap`` for the length of a ``with`` block."""
    wrap(model, compressor, logits=logits)
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

    def __init__(self, method: Compressor, undo: Callable[[], None], logits: str = "short"):
        self.method, self.undo, self.logits = method, undo, logits

    @torch.compiler.disable(reason="compression chooses by values")
    def __call__(self, model: Any, args: tuple, kwargs: dict[str, Any]):
        from .patches import adapter_for

        if within_generate(model) or kwargs.get("mm_encoder_outputs") is not None:
            return None
        if args:
            kwargs = {**dict(zip(parameters_of(type(model).forward), args)), **kwargs}
        cache = cache_of(kwargs)
        layout = layout_on(cache)
        has_images = has_pixels(kwargs)
        if layout is not None:
            if has_images:
                raise CountMismatchError("new images on a compressed cache: use generate with the whole conversation")
            return (), continue_forward(layout, cache, kwargs)
        if not has_images:
            if cache is None or int(cache.get_seq_length()) == 0:  # a later step of a decode loop is no call of its own
                remember(model, CompressionReport())
            return None
        if kwargs.get("input_ids") is None:
            raise CountMismatchError(NO_IDS)
        adapter = adapter_for(model)
        if holds_uncompressed(cache):
            if keeps_all(adapter, self.method, kwargs):
                return None
            raise CountMismatchError(UNCOMPRESSED_CACHE)
        back = held_back(kwargs)
        with _autocast_of(model):
            prepared = prepare(model, self.method, **{**kwargs, **back})
        remember(model, prepared.report)
        call = call_of(prepared, self.logits)
        return (), {name: value for name, value in call.items() if name not in back}


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


def _class_for(cls: Any) -> Any:
    """The subclass a wrapped model is an instance of: same name, module and behaviour, another ``generate`` and way of saving."""
    from . import saving
    from .patches import WRAPPED

    if cls not in _swapped:
        from .patches.trainer import ASKED_BY_TRAINER, AskedByTrainer

        stock = cls.generate

        @functools.wraps(stock)
        def generate(self, inputs=None, *args, compression=_UNSET, **kwargs):
            hook = _hook_of(self)
            assert hook is not None
            return run_generate(self, stock, hook.method if compression is _UNSET else compression, inputs, args, kwargs)

        def save_pretrained(self, save_directory, *args, **kwargs):
            hook = _hook_of(self)
            assert hook is not None
            saving.save_pretrained(self, cls.save_pretrained, hook.method, hook.undo, save_directory, args, kwargs)

        def load_state_dict(self, state_dict, *args, **kwargs):
            hook = _hook_of(self)
            assert hook is not None
            return cls.load_state_dict(self, saving.state_for(self, hook.undo, state_dict), *args, **kwargs)

        def __reduce_ex__(self, protocol):
            return (_rebuild, (cls,), *cls.__reduce_ex__(self, protocol)[2:])

        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, WRAPPED: True}
        ours = {f.__name__: f for f in (generate, save_pretrained, load_state_dict, __reduce_ex__)}
        ours[ASKED_BY_TRAINER] = AskedByTrainer(cls)
        _swapped[cls] = type(cls.__name__, (cls,), {**names, **ours})
    return _swapped[cls]


@functools.cache
def _class_without(cls: Any) -> Any:
    """The class that a wrapped model had, or would have if it had not been wrapped.

    What was done since may have made a subclass of ours in place, as ``fully_shard`` does of (FSDPModule, ours).
    """
    if cls in _swapped.values():
        return cls.__mro__[1]
    bases = tuple(_class_without(base) if set(base.__mro__) & set(_swapped.values()) else base for base in cls.__bases__)
    own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, bases, own)


def _rebuild(cls: type) -> Any:
    swapped: Any = _class_for(cls)
    return swapped.__new__(swapped)
