"""What a model is compressed with, here and now: what ``wrap`` put on it for everybody, or what this thread's ``compressed`` holds.

Hooks and class are on the model, so every thread's calls pass them. They do nothing to those that no method is active for.
"""

from __future__ import annotations

import contextvars
import sys
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any

from ..compressors.base import Compressor
from ..errors import AlreadyWrappedError, MllmEfficientError

if TYPE_CHECKING:
    from .vision_cache import VisionCache


@dataclass(eq=False)
class Block:
    """One ``with compressed(...)``. model: the transformers model itself. open: until the block ends, also for tasks that outlive it."""

    model: Any
    method: Compressor
    logits: str = "short"
    open: bool = True
    cache: VisionCache | None = None


@dataclass(eq=False)
class Active:
    """What is active on one model. method, logits, cache: of ``wrap``. blocks: that are open in any thread. sole: the one that changed
    weights."""

    method: Compressor | None = None
    logits: str = "short"
    blocks: list[Block] = field(default_factory=list)
    sole: Block | None = None
    cache: VisionCache | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        if self.sole is not None:  # whose weights are in the copy too, so that it is wrapped with them
            return Active, (self.sole.method, self.sole.logits, [], None, self.sole.cache)
        return Active, (self.method, self.logits, [], None, self.cache)  # a copy of the model is in nobody's block

    @property
    def used(self) -> bool:
        return self.method is not None or bool(self.blocks)

    def here(self, model: Any) -> Compressor | None:
        """The method in this thread or task; None where the model is a plain one to it."""
        block = _block_of(model)
        return self.method if block is None else block.method

    def logits_here(self, model: Any) -> str:
        """The length of logits that was asked for with the method."""
        block = _block_of(model)
        return self.logits if block is None else block.logits

    def cache_here(self, model: Any) -> VisionCache | None:
        """The cache that was asked for with the method."""
        block = _block_of(model)
        return self.cache if block is None else block.cache

    def of_call(self, model: Any) -> Compressor | None:
        """``here``, for a call that begins. Waits while another thread puts a method on or takes one off.

        Raises ``MllmEfficientError`` where the weights in the model are those of another thread's block.
        """
        with changing(model):
            if self.sole is not None and self.sole is not _block_of(model):
                raise MllmEfficientError(
                    f"another thread is inside me.compressed with {self.sole.method.spec()}, whose weights are in the model: "
                    "wait for it, or give each thread a model of its own"
                )
            return self.here(model)

    def require_free(self, model: Any, alone: bool) -> None:
        """Raises ``AlreadyWrappedError`` where no method can be put on. alone: for one that other threads' blocks forbid too."""
        if self.here(model) is not None:
            how = (
                "wrapped already: unwrap(model) first"
                if self.method is not None
                else "inside me.compressed already: leave that block first"
            )
            raise AlreadyWrappedError(f"this model is {how}, or pass compression= to generate")
        if self.sole is not None or (alone and self.blocks):
            raise AlreadyWrappedError(
                "another thread is inside me.compressed with this model: wait for it, or pass compression= to generate"
            )

    def begin(self, block: Block, sole: bool) -> None:
        self.blocks.append(block)
        self.sole = block if sole else None
        _open_blocks.set((*_open_blocks.get(), block))

    def end(self, block: Block) -> None:
        block.open, self.sole = False, None
        self.blocks.remove(block)
        _open_blocks.set(tuple(b for b in _open_blocks.get() if b is not block))


_open_blocks: contextvars.ContextVar[tuple[Block, ...]] = contextvars.ContextVar("compressed_blocks", default=())
_locks: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()
_making = threading.Lock()


def active_on(model: Any) -> Active | None:
    """What is active on a model that ``wrap`` or ``compressed`` was called on; not on its base model, which has a hook for it too."""
    hooks = tuple(model._forward_pre_hooks.values())
    found = (getattr(hook, "active", None) for hook in hooks if getattr(hook, "top", model) is model)
    return next((one for one in found if isinstance(one, Active)), None)


def method_of(model: Any) -> Compressor | None:
    """The method a model is wrapped with, for everybody or by this thread's ``compressed``; None without one."""
    from ..patches import inner_model

    inner = inner_model(model)
    active = active_on(inner)
    return None if active is None else active.here(inner)


def changing(model: Any) -> threading.RLock:
    """What is held while the method on a model changes."""
    with _making:
        return _locks.setdefault(model, threading.RLock())


def _block_of(model: Any) -> Block | None:
    """The block that this thread or task is in."""
    return next((block for block in _open_blocks.get() if block.model is model and block.open), None)


def require_idle(model: Any) -> None:
    """Raises ``MllmEfficientError`` where another thread is inside a call of the model, or of a part of it.

    A plain model keeps no count of its calls, so the frames of the other threads are looked through.
    """
    parts = {id(module) for module in model.modules()}
    here, names = threading.get_ident(), {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        if ident != here and any(id(owner) in parts for owner in _owners(frame)):
            raise MllmEfficientError(
                f"thread {names.get(ident, ident)} is in a call of this model, which would be answered by neither: wait for it to return"
            )


def _owners(frame: FrameType | None) -> Iterator[Any]:
    """The ``self`` of every method that a thread is in."""
    while frame is not None:
        if frame.f_code.co_argcount and frame.f_code.co_varnames[0] == "self":
            yield frame.f_locals.get("self")
        frame = frame.f_back
