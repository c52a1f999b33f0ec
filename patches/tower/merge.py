"""A CLIP, SigLIP or InternViT tower in whose blocks a method makes tokens fewer (``compressors.in_tower``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mllm_efficient.compressors.in_tower import Heads, Run, Steps, WorksInTower
from mllm_efficient.compressors.math.finite import require_finite
from mllm_efficient.errors import UnsupportedModelError
from mllm_efficient.lazy import torch

from .blocks import Block, embedded, has_class_token, layers_of

if TYPE_CHECKING:
    from torch import Tensor


def run_inside(
    method: WorksInTower, tower: Any, pixels: Tensor, rounds: tuple[int, ...], cells: Tensor | None = None, **how: Any
) -> tuple[Tensor, Steps]:
    """(views, patches, D) hidden states after as many blocks as there are rounds, and the method's steps, which know what stayed.

    The class token, where there is one, stays in front. Patches stand token by token.

    rounds: tokens that each block takes off. cells: (N, m) the patches of each token, None for one each. how: of the embeddings.
    """
    x, first = embedded(tower, pixels, **how), int(has_class_token(tower))
    if cells is not None:
        x = torch.cat([x[:, :first], x[:, first:][:, cells.flatten().to(x.device)]], 1)
    steps = method.steps(Run(rounds, first, 1 if cells is None else cells.shape[1]), x)
    for i, module in enumerate(layers_of(tower)[: len(rounds)]):
        block = Block(module)
        h = block.normed(x)
        heads = Heads(block.queries(h), block.keys(h), block.values(h), block.scale)
        bias = steps.bias(heads.q.dtype)
        seen = torch.nn.functional.scaled_dot_product_attention(heads.q, heads.k, heads.v, attn_mask=bias, scale=block.scale)
        x = steps.after_attention(i, block.attended(x, seen), heads)
        x = steps.after_block(i, block.finished(x), heads)
    require_finite(x, method.name, "tower's tokens")  # type: ignore[attr-defined]
    return steps.done(x), steps


def require_own(adapter: Any, taken: tuple[Any, str]) -> None:
    """Raises ``UnsupportedModelError`` for a call that takes another layer (layer, strategy) than the model, whose own is planned for."""
    layer, strategy = taken
    if taken != (adapter.config.vision_feature_layer, adapter.config.vision_feature_select_strategy):
        raise UnsupportedModelError(f"vision_feature_layer={layer} of this call, {strategy!r}, is another than the model's: leave it out")
