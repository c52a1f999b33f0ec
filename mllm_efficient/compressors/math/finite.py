"""What must be true of tensors: values that are finite (NaN and infinity have no order), indices that are inside.

A call looks at many tensors, and each answer would make the CPU wait for a GPU. So inside a ``Watch`` the answers stay on the
device, and are read together, once. Without one, where a method is used by itself, they are read at once.
"""

from __future__ import annotations

import contextvars
from typing import TYPE_CHECKING

from ...errors import CountMismatchError, MllmEfficientError, NotFiniteError
from ...lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

ADVICE = "look at the pixels, or use bfloat16 or float32 where float16 overflows"
_watching: contextvars.ContextVar[Watch | None] = contextvars.ContextVar("watching", default=None)


class Watch:
    """Collects, inside a ``with`` block, what the functions below find; ``read`` raises for it."""

    def __init__(self) -> None:
        self._found: list[tuple[MllmEfficientError, Tensor]] = []

    def __enter__(self) -> Watch:
        self._token = _watching.set(self)
        return self

    def __exit__(self, *error: object) -> None:
        _watching.reset(self._token)

    def see(self, ok: Tensor, error: MllmEfficientError) -> None:
        self._found.append((error, ok))

    def read(self) -> None:
        """Raises the error of the first that does not hold; the CPU waits once, for all of them."""
        if not self._found:
            return
        device = self._found[0][1].device
        answers = torch.stack([ok.to(device) for _, ok in self._found]).tolist()
        for (error, _), ok in zip(self._found, answers):
            if not ok:
                raise error


def require_finite(x: Tensor, name: str, what: str) -> None:
    """Raises ``NotFiniteError`` for NaN or infinity in ``x``. name: of the method. what: what x is, a plural."""
    if x.numel():  # the two ends alone: ``isfinite`` makes copies of x
        ends = torch.stack(x.detach().aminmax())
        _require(ends.isfinite().all(), NotFiniteError(f"{name}: the {what} hold NaN or infinity: {ADVICE}"))


def require_scores(scores: Tensor, name: str) -> None:
    """Raises ``NotFiniteError`` for NaN or plus infinity. Minus infinity is how a method says that a token is the last to stay."""
    _require((scores < float("inf")).all(), NotFiniteError(f"{name}: score gave NaN or infinity: {ADVICE}"))


def require_inside(indices: Tensor, n: int, name: str) -> Tensor:
    """Raises ``CountMismatchError`` for an index that is none of n tokens; the indices, each made one that can be looked up until then."""
    inside = (indices >= 0) & (indices < n)
    _require(inside.all(), CountMismatchError(f"{name}: select gave an index outside 0..{n - 1}"))
    return indices.clamp(0, n - 1)


def read_found() -> None:
    """``read`` of the watch that is on: for an error that values which are not finite can be the cause of."""
    watch = _watching.get()
    if watch is not None:
        watch.read()


def _require(ok: Tensor, error: MllmEfficientError) -> None:
    watch = _watching.get()
    if ok.is_meta:
        return
    if watch is not None:
        watch.see(ok, error)
    elif not ok:
        raise error
