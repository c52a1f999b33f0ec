"""The drop-in interface: ``wrap`` a model, use it as before, ``unwrap`` it.

``forward`` is reached by a module-level pre-hook (a class-level ``forward`` is silently lost when accelerate replaces
the instance's), ``generate`` by swapping the class in place for a subclass of the same name. Nothing else is put on
the model, and nothing of a call stays on it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, TypeVar

import torch

from ..compressors.base import Compressor
from ..compressors.composed import inside_of
from ..errors import MllmEfficientError, UnsupportedModelError
from ..registry import runnable
from ..report import forget, taken_off
from ..trained.install import Undo, install
from .active import Active, Block, changing, require_idle
from .active import method_of as method_of
from .entrance import ENTERED, Arguments, EnterBase, MarkBase, enter
from .generate import generate as run_generate
from .generate import within_generate
from .original_prompt import MERGE, merged_as_shown
from .outputs import check_length, mark_output
from .pipeline import teach_pipelines
from .plan import check, refuse_processor
from .prompt import require_short
from .sharding import has_shards

Model = TypeVar("Model")
UNKNOWN = ("refuse", "try")
_UNSET: Any = object()
_swapped: dict[type, type] = {}


def wrap(model: Model, compressor: Any, *, logits: str = "short", unknown: str = "refuse") -> Model:
    """Makes ``model`` compress its visual tokens from now on; returns the same object.

    Args:
        model: a supported transformers model (bare, under PEFT, dispatched or prepared by accelerate).
        compressor: a method, ``"divprune:keep=0.1"``, a dict, a YAML file, or a list of at most one method of each kind.
        logits: ``"full"`` for logits of the prompt's own length from ``forward``, where a column that went says what the one
            before it does.
        unknown: what to do with a type of model that is not known: "refuse", or "try", which checks on a tiny model of the same
            configuration whether compression is right there, takes some seconds, and refuses if it is not.

    ``generate`` returns the original prompt in front of the new tokens and takes ``compression=`` for one call (None is
    off). ``forward`` returns logits of the reduced length, ``outputs.visual_keep_mask`` (B, L), and of the logits' length
    ``visual_input_ids``, ``visual_attention_mask`` and, of the labels it got, ``visual_labels``. Labels on visual tokens enter
    no loss. transformers' Trainer divides by the labels that do, and gets full logits where it reads them beside its labels.

    Raises:
        AlreadyWrappedError, UnsupportedModelError (DDP, FSDP or compiled wrappers, unknown families, prompt tuning),
        BadBudgetError; and MllmEfficientError while another thread is in a call of the model.
    """
    from ..patches import adapter_for, learn
    from ..patches.trainer import refuse_virtual_tokens, watch_if_there

    check_length(logits)
    if unknown not in UNKNOWN:
        raise MllmEfficientError(f"unknown={unknown!r} is neither {' nor '.join(map(repr, UNKNOWN))}")
    refuse_virtual_tokens(model)
    if unknown == "try":
        learn(model)
    adapter, method = adapter_for(model), runnable(compressor)
    inner = adapter.model
    with changing(inner):
        hook = _put_on(adapter, method, alone=True)
        hook.active.method, hook.active.logits = method, logits
    watch_if_there()
    return model


def unwrap(model: Model) -> Model:
    """Takes everything off that ``wrap`` put on; returns the same object. Raises if it is not wrapped, or if another thread calls it."""
    from ..patches import adapter_for

    adapter = adapter_for(model)
    inner = adapter.model
    with changing(inner):
        hook = _hook_of(inner)
        if hook is None or hook.method is None:
            inside = " but inside me.compressed, which ends with its block" if method_of(inner) is not None else ""
            raise MllmEfficientError(f"this model is not wrapped{inside}")
        since = "sharded" if hook.undo.parts and has_shards(inner) else "offloaded" if hook.undo.offloaded else None
        if since is not None:
            raise UnsupportedModelError(
                f"{hook.method.spec()} put weights in the place of the model's own, and those were {since} since: load the model anew"
            )
        require_idle(inner)
        method, hook.active.method = hook.method, None
        _take_off(adapter, method, alone=True)
    return model


@contextlib.contextmanager
def compressed(model: Model, compressor: Any, *, logits: str = "short") -> Iterator[Model]:
    """``wrap`` for the length of a ``with`` block, in this thread (or asyncio task) alone: others' calls stay as they are.

    A thread started inside the block is another one: give it ``compression=``, or start it with ``contextvars.copy_context().run``.
    A trained method puts weights into the model, so while such a block is open the calls of other threads raise.
    """
    from ..patches import adapter_for
    from ..patches.trainer import refuse_virtual_tokens, watch_if_there

    check_length(logits)
    refuse_virtual_tokens(model)
    adapter, method = adapter_for(model), runnable(compressor)
    inner, sole = adapter.model, method.installs is not None
    block = Block(inner, method, logits)
    with changing(inner):
        hook = _put_on(adapter, method, alone=sole)
        hook.active.begin(block, sole)
    watch_if_there()
    try:
        yield model
    finally:
        with changing(inner):
            hook.active.end(block)
            offloaded = sole and hook.undo.offloaded
            _take_off(adapter, method, alone=sole)
        if offloaded:
            raise UnsupportedModelError(f"the model was offloaded inside the block, with the weights of {method.spec()}: load it anew")


def is_wrapped(model: Any) -> bool:
    """Whether calls of a model are compressed, by ``wrap`` or in this thread's ``compressed``."""
    return method_of(model) is not None


def _hook_of(inner: Any) -> CompressForward | None:
    return next((h for h in tuple(inner._forward_pre_hooks.values()) if isinstance(h, CompressForward)), None)


def _put_on(adapter: Any, method: Compressor, alone: bool) -> CompressForward:
    """Hooks, class and parts that a method needs on the model. alone: for one that no other thread may call the model beside.

    Nothing is left on the model where it raises.
    """
    inner = adapter.model
    hook = _hook_of(inner)
    if hook is not None:
        hook.active.require_free(inner, alone)
    refuse_processor(method)
    check(adapter, method)
    if hook is None:
        forget(inner)
        teach_pipelines()
        inner.__class__ = _class_for(type(inner))
        hook = CompressForward()
        inner.register_forward_pre_hook(hook, with_kwargs=True)
        inner.register_forward_hook(mark_output, with_kwargs=True)
        if adapter.base is not inner:
            adapter.base.register_forward_pre_hook(EnterBase(inner, hook.active), with_kwargs=True, prepend=True)
            adapter.base.register_forward_hook(MarkBase(inner, hook.active), with_kwargs=True)
    try:
        if alone:
            require_idle(inner)  # after the hooks are on, in which whoever calls from now on waits
            hook.undo = install(adapter, method)
    except BaseException:
        _take_off(adapter, None, alone=False)
        raise
    if inside_of(method) is not None:
        adapter.reach_inside()
    return hook


def _take_off(adapter: Any, method: Compressor | None, alone: bool) -> None:
    """Undoes ``_put_on``; hooks and class go with the last that uses them."""
    inner = adapter.model
    hook = _hook_of(inner)
    assert hook is not None
    if alone:
        hook.undo()
    if method is not None and inside_of(method) is not None:
        adapter.let_go_inside()
    if hook.active.used:
        return
    for module in (inner, adapter.base):
        for hooks, with_kwargs in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        ):
            for key in [k for k, h in hooks.items() if h is mark_output or isinstance(h, (CompressForward, EnterBase, MarkBase))]:
                del hooks[key]
                with_kwargs.pop(key, None)
    inner.__class__ = _class_without(inner.__class__)
    taken_off(inner)


class CompressForward:
    """The forward pre-hook: compresses a call that brings pixels, maps one that goes on from a compressed cache."""

    def __init__(self) -> None:
        self.active, self.undo = Active(), Undo()

    @property
    def method(self) -> Compressor | None:
        """What ``wrap`` put on for everybody."""
        return self.active.method

    @torch.compiler.disable(reason="compression chooses by values")
    def __call__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Arguments | None:
        if kwargs is None:  # another thread's call, between the two steps of registering this hook
            return None
        if within_generate(model) or kwargs.get("mm_encoder_outputs") is not None:
            require_short(kwargs)
            return None
        method = self.active.of_call(model)
        if method is None:
            return None
        with _autocast_of(model):
            args, kwargs = enter(model, model, method, args, kwargs, self.active.logits_here(model))
        entered = kwargs.get("mm_encoder_outputs") is not None or not hasattr(model, "model")
        return args, kwargs if entered else {**kwargs, ENTERED: True}


def _autocast_of(model: Any) -> contextlib.AbstractContextManager[Any]:
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
    from ..patches import WRAPPED
    from ..trained import saving

    if cls not in _swapped:
        from ..patches.trainer import ASKED_BY_TRAINER, AskedByTrainer

        stock = cls.generate

        @functools.wraps(stock)
        def generate(self: Any, inputs: Any = None, *args: Any, compression: Any = _UNSET, **kwargs: Any) -> Any:
            hook = _hook_of(self)
            method = None if hook is None else hook.active.of_call(self)
            if method is None and compression is _UNSET:  # the class is there for another thread
                return stock(self, inputs, *args, **kwargs)
            return run_generate(self, stock, method if compression is _UNSET else compression, inputs, args, kwargs)

        def extra_repr(self: Any) -> str:
            method = method_of(self)
            own: str = cls.extra_repr(self)
            return own if method is None else f"{own}\n" * bool(own) + f"compression={method.spec()!r}"

        def merge(self: Any, default_list: Any, custom_list: Any) -> Any:
            return merged_as_shown(self, getattr(cls, MERGE)(self, default_list, custom_list), custom_list)

        @functools.wraps(cls.save_pretrained)
        def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
            hook = _hook_of(self)
            method = None if hook is None else hook.active.of_call(self)
            if hook is None or method is None:
                return cls.save_pretrained(self, save_directory, *args, **kwargs)
            return saving.save_pretrained(self, cls.save_pretrained, method, hook.undo, save_directory, args, kwargs)

        @functools.wraps(cls.load_state_dict)
        def load_state_dict(self: Any, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
            hook = _hook_of(self)
            state_dict = state_dict if hook is None else saving.state_for(self, hook.undo, state_dict)
            return cls.load_state_dict(self, state_dict, *args, **kwargs)

        def __reduce_ex__(self: Any, protocol: Any) -> tuple[Any, ...]:
            return (_rebuild, (cls,), *cls.__reduce_ex__(self, protocol)[2:])

        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, WRAPPED: True}
        own: dict[str, Any] = {f.__name__: f for f in (generate, save_pretrained, load_state_dict, extra_repr, __reduce_ex__)}
        own |= {MERGE: merge, ASKED_BY_TRAINER: AskedByTrainer(cls)}
        _swapped[cls] = type(cls.__name__, (cls,), {**names, **own})
    return _swapped[cls]


@functools.cache
def _class_without(cls: Any) -> Any:
    """The class that a wrapped model had, or would have if it had not been wrapped.

    What was done since may have made a subclass of a wrapped class in place, as ``fully_shard`` does of (FSDPModule, wrapped class).
    """
    if cls in _swapped.values():
        return cls.__mro__[1]
    bases = tuple(_class_without(base) if set(base.__mro__) & set(_swapped.values()) else base for base in cls.__bases__)
    own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, bases, own)


def _rebuild(cls: type) -> Any:
    teach_pipelines()
    swapped: Any = _class_for(cls)
    return swapped.__new__(swapped)
