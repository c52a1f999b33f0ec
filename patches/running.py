"""A model's own code, watched while it runs: what it hands to a module, hooks that compiled code skips, parameters that are elsewhere."""

from __future__ import annotations

import contextlib
import contextvars
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from mllm_efficient.errors import UnsupportedModelError
from mllm_efficient.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class _Reached(Exception):
    """The projector was reached."""


_reaching: contextvars.ContextVar[object | None] = contextvars.ContextVar("reaching", default=None)
hooking = threading.Lock()  # registering and removing hooks is not atomic


def input_of(module: Any, call: Callable[[], Any]) -> Tensor:
    """The first argument that ``call`` hands to a module, which does not run: the call ends there. Of this thread alone."""
    found: list[Tensor] = []
    token = object()

    def stop(module: Any, args: tuple, kwargs: dict[str, Any] | None = None) -> None:
        # Another thread's call can come between the two steps of registering this hook, and then passes no kwargs.
        if _reaching.get() is token:
            found.append(args[0] if args else next(iter((kwargs or {}).values())))
            raise _Reached

    with hooking:
        handle = module.register_forward_pre_hook(stop, with_kwargs=True)
    reset = _reaching.set(token)
    try:
        with contextlib.suppress(_Reached):
            call()
        if not found:
            with uncompiled(), contextlib.suppress(_Reached):
                call()
    finally:
        _reaching.reset(reset)
        with hooking:
            handle.remove()
    if not found:
        raise UnsupportedModelError(
            f"{type(module).__name__} is run by something that passes no hooks by: use the model as transformers loads it"
        )
    return found[0]


def by_its_own_rule(base: Any, vision: dict[str, Any], ids: Tensor, types: Tensor, mask: Tensor | None = None) -> Tensor:
    """Positions (axes, B, L) of a model's ``get_rope_index``, given those of the vision arguments that it takes."""
    rule = base.get_rope_index
    names = inspect.signature(rule).parameters
    given = {name: value for name, value in vision.items() if name in names}
    return rule(ids, mm_token_type_ids=types, attention_mask=mask, **given)[0]


_eager_users, _eager = 0, contextlib.ExitStack()


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Everything that torch.compile has compiled runs as it is written, inside the block.

    Code that was compiled before a hook was registered does not run the hook. The switch is torch's and for the whole process
    (other threads are slower meanwhile, and as right), so users are counted and the last one puts it back.
    """
    global _eager_users
    with hooking:
        _eager_users += 1
        if _eager_users == 1:
            _eager.enter_context(torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        with hooking:
            _eager_users -= 1
            if _eager_users == 0:
                _eager.close()  # back to the stance that was there


@contextlib.contextmanager
def at_hand(module: Any) -> Iterator[None]:
    """The module's own parameters (not its children's) loaded, where accelerate keeps them elsewhere between calls."""
    if not hasattr(module, "_hf_hook"):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield
