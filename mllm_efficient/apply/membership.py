"""Which tokens a merged token is made of, for any method that merges: read from the derivative of what comes out by what goes in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..compressors.base import Compressor
from ..registry import runnable
from ..tokens import VisualTokens
from .call import parse_call
from .compress import jobs_of
from .encode import encode_items
from .prepare import plan_images, with_text


def membership(method: Compressor, v: VisualTokens, k: int) -> Tensor:
    """(N,) the merged token that each of the N is the largest part of, of equals the first; -1 for one that is in none.

    Merged tokens are sums of tokens with weights: the derivative of channel c of merged token m by channel c of token i is the weight
    of i in m. So one backward pass, in which merged token m is asked for channel m alone, gives the weights of as many merged tokens as
    there are channels. Weights that themselves depend on features add small terms, which the largest part outweighs.
    """
    width, weights = v.features.shape[1], []
    with torch.enable_grad():
        features = v.features.detach().float().requires_grad_()
        (made,) = method.compress_all([replace(v, features=features)], [k])
        count = len(made)
        for first in range(0, count, width):
            own = range(first, min(first + width, count))
            asked = sum(made.features[m, m - first] for m in own)
            (slope,) = torch.autograd.grad(asked, features, retain_graph=True)  # type: ignore[arg-type]
            weights.append(slope[:, : len(own)])
    share = torch.cat(weights, 1).abs().cpu()
    largest = share.max(1)
    return torch.where(largest.values > 0, largest.indices, torch.full_like(largest.indices, -1))


def areas(model: Any, compressor: Any, **inputs: Any) -> list[Tensor | None]:
    """``membership`` of the N tokens of each image of a call, merged tokens counted over the image; None where nothing was merged so.

    inputs: as ``prepare`` takes them.
    """
    from ..patches import adapter_for

    usual = dict.fromkeys(("attention_mask", "labels", "image_keys", "encoded", "past"))
    call = parse_call(adapter_for(model), runnable(compressor), usual | inputs)
    placed = call.placed
    plans = [p.pre_llm for p in plan_images(call, placed)]
    method = call.token_method
    if not method.merges or method.in_tower or not placed:
        return [None] * len(placed)
    with torch.no_grad():
        encoded = encode_items(call.adapter, call.pre_llm, [image.item for image in sorted(placed, key=lambda image: image.index)])
    out: list[Tensor | None] = []
    with torch.no_grad():
        encodings, contexts = with_text(call, placed, [encoded.encodings[image.index] for image in placed])
    for plan, encoding, context in zip(plans, encodings, contexts):
        if plan.untouched or not plan.groups:
            out.append(None)
            continue
        joined, count = torch.full((plan.seen.n,), -1), 0
        for group, part, _ in jobs_of(plan, encoding, context):
            own = torch.arange(plan.seen.n) if group.indices is None else group.indices
            found = membership(method, part, group.k)
            joined[own] = torch.where(found < 0, found, found + count)
            count += group.kept
        out.append(joined)
    return out
