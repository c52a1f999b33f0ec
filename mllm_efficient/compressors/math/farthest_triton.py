"""DivPrune's picks on a GPU: all K of an image in one kernel, so that the loop waits for no launch. Needs Triton."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton reads the annotations of a kernel)

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from ...lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit(do_not_specialize=["k"])
def _pick(d, nearest_other, picked, n, k, block: tl.constexpr):
    """One program per image: ``nearest`` stays in registers, each pick reads one row of d. block: a power of 2, n or more."""
    image = tl.program_id(0).to(tl.int64)
    tokens = tl.arange(0, block)
    real = tokens < n
    d += image * n * n
    pick = tl.argmax(tl.load(nearest_other + image * n + tokens, mask=real, other=float("-inf")), 0, tie_break_left=True)
    nearest = tl.where(real, float("inf"), float("-inf")).to(d.dtype.element_ty)
    for i in range(k):
        tl.store(picked + image * k + i, pick)
        nearest = tl.minimum(nearest, tl.load(d + pick.to(tl.int64) * n + tokens, mask=real, other=float("-inf")))
        nearest = tl.where(tokens == pick, float("-inf"), nearest)
        pick = tl.argmax(nearest, 0, tie_break_left=True)


def farthest_first(d: Tensor, k: int) -> Tensor:
    """Indices (B, K) in the order of choice from contiguous distances d (B, N, N), which are used up.

    Index for index what ``divprune.loop`` picks, K <= N. One launch, no host synchronisation. The picks of an image are a
    chain, so an image is one program: it runs on one multiprocessor, and B images side by side.
    """
    batch, n, _ = d.shape
    d.diagonal(dim1=1, dim2=2).fill_(float("inf"))
    nearest_other = d.amin(2) if n > 1 else d[:, 0].contiguous()
    picked = torch.empty(batch, k, dtype=torch.long, device=d.device)
    block = triton.next_power_of_2(n)
    with torch.cuda.device_of(d):
        _pick[(batch,)](d, nearest_other, picked, n, k, block=block, num_warps=min(16, max(4, block // 256)))
    return picked
