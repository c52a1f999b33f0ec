"""A CLIP or SigLIP tower whose blocks merge tokens between attention and MLP (ToMe)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mllm_efficient.compressors.divprune import full_float32
from mllm_efficient.compressors.math.finite import require_finite
from mllm_efficient.compressors.tome import match, merged
from mllm_efficient.lazy import torch

from .blocks import has_class_token

if TYPE_CHECKING:
    from torch import Tensor


def run_merging(tower: Any, pixels: Tensor, blocks: int, rounds: Sequence[int], **how: Any) -> Tensor:
    """(views, tokens, D) hidden states after so many blocks, block i of which merges ``rounds[i]`` pairs, in the order of their places.

    The class token, where there is one, stays in front. how: for the tower's embeddings.
    """
    x, first = tower.embeddings(pixels, **how), int(has_class_token(tower))
    if hasattr(tower, "pre_layrnorm"):
        x = tower.pre_layrnorm(x)
    size: Tensor | None = None
    where = torch.arange(x.shape[1], device=x.device).repeat(len(x), 1)
    for block, pairs in zip(tower.encoder.layers[:blocks], rounds):
        attention, h = block.self_attn, block.layer_norm1(x)
        q, k, v = (
            part(h).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        larger = None if size is None else size.log().to(q.dtype)[:, None, None, :, 0]
        seen = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=larger, scale=attention.scale)
        x = x + attention.out_proj(seen.transpose(1, 2).flatten(2))
        if pairs:
            full = torch.float64 if x.dtype == torch.float64 else torch.float32
            device = "cpu" if x.is_meta else x.device.type
            with torch.autocast(device, enabled=False), full_float32(device):
                into, stays = match(k.detach().mean(1).to(full), pairs, first)
                size = torch.ones_like(x[..., :1], dtype=full) if size is None else size
                y, size = merged(x.to(full), size, into, stays)
            x, where = y.to(x.dtype), where.gather(1, stays)
        x = x + block.mlp(block.layer_norm2(x))
    require_finite(x, "tome", "tower's tokens")
    return x.gather(1, where.argsort(1)[..., None].expand_as(x))
