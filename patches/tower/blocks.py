"""The blocks of CLIP, SigLIP and InternViT towers: the same steps under different names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def layers_of(tower: Any) -> Any:
    """The blocks, first to last."""
    encoder = tower.encoder
    return encoder.layers if hasattr(encoder, "layers") else encoder.layer


def has_class_token(tower: Any) -> bool:
    return hasattr(tower.embeddings, "class_embedding") or hasattr(tower.embeddings, "cls_token")


def embedded(tower: Any, pixels: Tensor, **how: Any) -> Tensor:
    """(views, tokens, D), what the first block is given. how: for the tower's embeddings."""
    x = tower.embeddings(pixels, **how)
    x = x[0] if isinstance(x, tuple) else x
    return tower.pre_layrnorm(x) if hasattr(tower, "pre_layrnorm") else x


class Block:
    """One block. That of InternViT scales both of its branches, and may have norms of queries and keys."""

    def __init__(self, module: Any):
        self.module, self.internvit = module, hasattr(module, "lambda_1")
        self.attention = module.attention if self.internvit else module.self_attn

    @property
    def heads(self) -> int:
        return self.attention.num_heads

    @property
    def scale(self) -> float:
        return self.attention.scale

    def normed(self, x: Tensor) -> Tensor:
        """What attention is given of (views, tokens, D)."""
        return self.module.layernorm_before(x) if self.internvit else self.module.layer_norm1(x)

    def queries(self, x: Tensor) -> Tensor:
        """(views, heads, tokens, d) of the normed (views, tokens, D); ``keys`` and ``values`` likewise."""
        q = self.attention.q_proj(x)
        return self._by_head(self.attention.q_norm(q) if self.internvit else q)

    def keys(self, x: Tensor) -> Tensor:
        k = self.attention.k_proj(x)
        return self._by_head(self.attention.k_norm(k) if self.internvit else k)

    def values(self, x: Tensor) -> Tensor:
        return self._by_head(self.attention.v_proj(x))

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def attended(self, x: Tensor, seen: Tensor) -> Tensor:
        """x (views, tokens, D) and what its tokens have seen (views, heads, tokens, d)."""
        seen = seen.transpose(1, 2).flatten(2)
        if not self.internvit:
            return x + self.attention.out_proj(seen)
        return self.module.lambda_1 * self.attention.projection_dropout(self.attention.projection_layer(seen)) + x

    def finished(self, x: Tensor) -> Tensor:
        """x after the MLP."""
        if not self.internvit:
            return x + self.module.mlp(self.module.layer_norm2(x))
        return self.module.lambda_2 * self.module.dropout(self.module.mlp(self.module.layernorm_after(x))) + x
