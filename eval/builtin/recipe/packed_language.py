"""A packed forward of a decoder over its stock modules: one visual prefix serves every question of its pictures.

The parameters are those of the Hugging Face model and the arithmetic is the same (a test holds the two equal); only the
layout differs. Each question block attends to the prefix and causally to itself, with positions that go on after the
prefix, which is what separate sequences would do. Blocks are padded on the left, so that answers end at one place; what a
prefix is padded with, nothing looks at. Llama's, Qwen2's and Qwen3-VL's layers are known.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD = 32  # width of an attention head
ANSWER = 2  # tokens: a word and the end of the answer
STOP = 0.05  # weight of the end's loss
NEVER = float("-inf")


@dataclass
class Questions:
    """Q questions of B prompts. blocks: (B, Q, T) token ids padded on the left with 0. start: (B, Q) a block's first real token.

    blind: (B, Q) bool, blocks that see no picture. weight: (B, Q).
    """

    blocks: Tensor
    start: Tensor
    blind: Tensor
    weight: Tensor


@dataclass
class Prefix:
    """What stands before the questions: embeds (B, P, D), and deep, what is added to it behind the first layers.

    real: (B, P) bool, False for padding. positions: (B, axes, P). first: (B,) the position behind the prefix. text: tokens at its
    begin that a question without a picture sees, too.
    """

    embeds: Tensor
    deep: list[Tensor]
    real: Tensor
    positions: Tensor
    first: Tensor
    text: int


def questions(packed: np.ndarray, weight: np.ndarray, rng: np.random.Generator | None = None) -> Questions:
    """packed: (B, Q, T) ids, cut to the longest here. rng: draws which blocks see no picture."""
    blocks = torch.from_numpy(packed[:, :, (packed != 0).any((0, 1)).argmax() :]).long()
    blind = np.zeros(blocks.shape[:2], bool) if rng is None else rng.random(blocks.shape[:2]) < 0.02
    start = (blocks == 0).int().argmin(-1)
    return Questions(blocks, start, torch.from_numpy(blind), torch.from_numpy(weight).float())


def rms(x: Tensor, weight: Tensor) -> Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6) * weight).to(x.dtype)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half layout; x (..., L, H, d), cos and sin (..., L, 1, d / 2)."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def normed_turned(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return turned(rms(x, weight), cos, sin)


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x.float(), weight.shape, weight, bias, 1e-6).to(x.dtype)


def soft(scores: Tensor, hide: Tensor) -> Tensor:
    return (scores.float() + hide).softmax(-1).to(scores.dtype)


def soft_pair(to_prefix: Tensor, hide: Tensor, to_own: Tensor, own: Tensor) -> Tensor:
    return torch.cat([to_prefix.float() + hide, to_own.float() + own], -1).softmax(-1).to(to_prefix.dtype)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    return (F.silu(gate.float()) * up.float()).to(up.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


FUSED = (rms, turned, normed_turned, norm, soft, soft_pair, gated)


class PackedLanguage(nn.Module):
    """dtype: of activations. compiled: whether what lies between products of matrices is fused."""

    def __init__(self, model: Any, dtype: torch.dtype = torch.float32, compiled: bool = False):
        super().__init__()
        self.model, self.dtype = model, dtype
        self.f = SimpleNamespace(**{f.__name__: torch.compile(f, dynamic=True) if compiled else f for f in FUSED})

    def prefix(self, inputs: Any) -> Prefix:
        """What the model's family makes of pictures."""
        raise TypeError(f"{type(self).__name__} must define prefix")

    def turned_heads(self, h: Tensor, projection: Any, own: Any, cos: Tensor, sin: Tensor) -> Tensor:
        """Queries or keys (B, heads, L, HEAD); own: their norm, where the layer has one."""
        heads = linear(h, projection.weight, projection.bias).view(*h.shape[:2], -1, HEAD)
        out = self.f.turned(heads, cos, sin) if own is None else self.f.normed_turned(heads, own.weight, cos, sin)
        return out.transpose(1, 2)

    def decoder_block(
        self, prefix: Tensor, ask: Tensor, cos: Tensor, sin: Tensor, see: Tensor, hide: Tensor, own: Tensor, layer: Any, last: bool
    ) -> tuple[Tensor, Tensor]:
        """One layer. prefix (B, P, D); ask (B, Q, T, D); cos, sin (B, P + Q T, 1, half); see (B, 1, P, P), hide (B, 1, Q, 1, P)
        and own (B, 1, Q, T, T) are added to scores. last: only the tokens that predict an answer go on."""
        f, a, m = self.f, layer.self_attn, layer.mlp
        (b, n, _), (q, t) = prefix.shape, ask.shape[1:3]
        h = f.rms(torch.cat([prefix, ask.flatten(1, 2)], 1), layer.input_layernorm.weight)
        key = self.turned_heads(h, a.k_proj, getattr(a, "k_norm", None), cos, sin)
        value = linear(h, a.v_proj.weight, a.v_proj.bias).view(b, n + q * t, -1, HEAD).transpose(1, 2)
        if last:
            some = slice(-ANSWER - 1, -1)
            ask, own = ask[:, :, some], own[..., some, :]
            h = h[:, n:].reshape(b, q, t, -1)[:, :, some].flatten(1, 2)
            cos, sin = (x[:, n:].reshape(b, q, t, 1, -1)[:, :, some].flatten(1, 2) for x in (cos, sin))
        query = self.turned_heads(h, a.q_proj, getattr(a, "q_norm", None), cos, sin) * HEAD**-0.5
        s, asking = ask.shape[2], query if last else query[:, :, n:]
        own_k, own_v = (x[:, :, n:].reshape(b, -1, q, t, HEAD) for x in (key, value))
        to_prefix = (asking @ key[:, :, :n].transpose(-1, -2)).view(b, -1, q, s, n)
        weights = f.soft_pair(to_prefix, hide, asking.reshape(b, -1, q, s, HEAD) @ own_k.transpose(-1, -2), own)
        out = weights[..., :n].reshape(b, -1, q * s, n) @ value[:, :, :n]
        out = out + (weights[..., n:] @ own_v).reshape(b, -1, q * s, HEAD)
        joined = ask.flatten(1, 2)
        if not last:
            seen = f.soft(query[:, :, :n] @ key[:, :, :n].transpose(-1, -2), see) @ value[:, :, :n]
            out, joined = torch.cat([seen, out], 2), torch.cat([prefix, joined], 1)
        joined = joined + linear(out.transpose(1, 2).flatten(2), a.o_proj.weight)
        h = f.rms(joined, layer.post_attention_layernorm.weight)
        joined = joined + linear(f.gated(linear(h, m.gate_proj.weight), linear(h, m.up_proj.weight)), m.down_proj.weight)
        if not last:
            prefix, joined = joined[:, :n], joined[:, n:]
        return prefix, joined.reshape(b, q, s, -1)

    def angles(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (B, L, 1, half) of (B, axes, L) positions; three axes are interleaved as M-RoPE has them."""
        rope = self.model.model.language_model.rotary_emb
        axis = torch.zeros(len(rope.inv_freq), dtype=torch.long)
        for dim in range(1, position.shape[1]):
            axis[dim : 3 * rope.mrope_section[dim] : 3] = dim
        each = (position[:, axis].transpose(1, 2).float() * rope.inv_freq)[:, :, None]
        return each.cos(), each.sin()

    def answer(self, inputs: Any, asked: Questions) -> Tensor:
        """Logits that predict the last ``ANSWER`` tokens of every block (B, Q, ANSWER, vocabulary)."""
        lm, before = self.model.model.language_model, self.prefix(inputs)
        (b, q, t), prefix, blind = asked.blocks.shape, before.embeds, asked.blind
        n, axes, text = prefix.shape[1], before.positions.shape[1], torch.arange(prefix.shape[1]) < before.text
        ask = F.embedding(asked.blocks, lm.embed_tokens.weight).to(self.dtype)
        first = torch.where(blind, before.text, before.first[:, None])
        at_ask = (first[..., None] + torch.arange(t) - asked.start[..., None]).flatten(1)[:, None].expand(b, axes, q * t)
        cos, sin = self.angles(torch.cat([before.positions, at_ask], 2))
        causal = torch.arange(n)[:, None] >= torch.arange(n)
        see = torch.where(causal & before.real[:, None], 0.0, NEVER)[:, None]
        hide = torch.where((before.real[:, None] & ~blind[..., None]) | text, 0.0, NEVER)[:, None, :, None]
        steps = torch.arange(t)
        own = (steps <= steps[:, None]) & ((steps >= asked.start[..., None, None]) | (steps == steps[:, None]))
        own = torch.where(own, 0.0, NEVER)[:, None]
        for i, layer in enumerate(lm.layers):
            prefix, ask = self.decoder_block(prefix, ask, cos, sin, see, hide, own, layer, layer is lm.layers[-1])
            if i < len(before.deep):
                prefix = prefix + before.deep[i]
        return F.linear(self.f.rms(ask, lm.norm.weight).float(), lm.embed_tokens.weight)

    def loss(self, inputs: Any, asked: Questions) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of the answers' tokens, weighted by block, and hits (B, Q)."""
        logits, wanted = self.answer(inputs, asked), asked.blocks[:, :, -ANSWER:]
        each = F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), reduction="none").view(wanted.shape)
        scale = asked.weight[..., None] * torch.tensor([1.0, STOP])
        return (each * scale).sum() / asked.weight.sum(), logits[:, :, 0].argmax(-1) == wanted[:, :, 0]
