"""What the doctor asks of a tower: whether what is recomputed of it, and what is run of it block by block, is what the tower does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mllm_efficient.compressors.tome import ToMe
from mllm_efficient.plans import Plan

KERNEL = "mllm_efficient_doctor"


def attention_fault(adapter: Any, item: Any) -> str:
    """What is wrong with the attention that is recomputed for an image; empty if nothing. Against a kernel that keeps its matrix."""
    (found,) = adapter.encode([item], frozenset({"attention", "keys"}))
    with torch.no_grad(), _recording(adapter.model) as matrices:
        adapter.encode([item])
    if not matrices:
        return "the tower passes by its attention kernel"
    heads = torch.cat([m.mean(1) for m in matrices[-1]])  # (views, n, n) of the last block
    patches = heads[:, 0, 1:] if adapter.class_token else heads.sum(1) / heads.shape[1]
    got, wanted = found.attention, patches[0]
    if adapter.mrope:  # in an order of its own
        got, wanted = got.sort().values, wanted.unflatten(0, (-1, adapter.merge**2)).sum(1).sort().values
    elif hasattr(adapter, "shuffled"):
        wanted = adapter.shuffled(patches[..., None]).sum((2, 3)).flatten()
    else:  # of several views the first
        got = got[: len(wanted)]
    same = got.shape == wanted.shape and torch.allclose(got.float(), wanted.float(), rtol=1e-3, atol=1e-5)
    return "" if same else "its attention is not that of the tower's own kernel"


def blocks_fault(adapter: Any, item: Any) -> str:
    """What is wrong with a tower that is run block by block; empty if nothing. Nothing is taken off, so its tokens are the stock ones."""
    rounds = ((0,) * adapter.tower_blocks,) * len(item.shape.planes)
    with torch.no_grad():
        (found,) = adapter.reduce_in_tower(
            ToMe(keep=1.0, at="tower"), [item], [Plan(item.shape, item.shape.n, after=item.shape, rounds=rounds)]
        )
        (stock,) = adapter.encode([item])
    same = found.features.shape == stock.features.shape and torch.allclose(found.features, stock.features, rtol=1e-3, atol=1e-4)
    return "" if same else "run block by block it gives other tokens than as a whole"


@contextlib.contextmanager
def _recording(model: Any) -> Iterator[list[list[Tensor]]]:
    """The tower on a kernel that keeps its matrices (views, heads, n, n), block after block: one a call, or one for each piece of it."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    matrices: list[list[Tensor]] = []
    seen: list[Any] = []

    def kernel(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, scaling: float | None = None, **more: Any) -> Any:
        weights = (q @ k.mT * (q.shape[-1] ** -0.5 if scaling is None else scaling)).softmax(-1)
        if not seen or seen[-1] is not module:
            seen.append(module)
            matrices.append([])
        matrices[-1].append(weights)
        return (weights @ v).transpose(1, 2).contiguous(), weights

    before = model.config.vision_config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[KERNEL] = kernel
    try:
        model.set_attn_implementation({"vision_config": KERNEL})
        yield matrices
    finally:
        model.set_attn_implementation({"vision_config": before})
        del ALL_ATTENTION_FUNCTIONS[KERNEL]
