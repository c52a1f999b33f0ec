"""A packed forward over the stock modules: one vision pass and one visual prefix serve every question of an image.

The parameters are those of the Hugging Face model, the arithmetic is the same (a test holds the two equal); only the
layout differs. Each question block attends to the prefix and causally to itself, with positions that go on after the
prefix, which is what separate sequences would do.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..architecture import GRID, MEAN, PATCH, STD, VOCABULARY
from ..scenes import COLOURS, SHAPES

N = GRID * GRID
PREFIX = 3  # <s> USER :
LABEL_SIZES = (1 + len(COLOURS), 1 + len(SHAPES), 3, 1 + 2 * len(COLOURS) * len(SHAPES), 11)


def rotary(position: Tensor, half: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin (..., L, 1, half) of float positions (..., L)."""
    angle = position[..., None, None] * theta ** (-torch.arange(half, dtype=torch.float32) / half)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in Llama's half layout; x (..., L, H, d)."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Packed(nn.Module):
    """The embedded LLaVA with dense heads for its tower and packed questions for its language model."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        hidden = model.config.text_config.hidden_size
        self.dense = nn.ModuleList(nn.Linear(hidden, k) for k in LABEL_SIZES)
        self.coordinates = nn.ModuleList(nn.Linear(hidden, GRID) for _ in range(2))
        self.symbols = nn.ModuleList(nn.Embedding(k, hidden) for k in LABEL_SIZES)
        self.place = nn.Embedding(N, hidden)
        self.symbol_mlp = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden))

    def tower(self, images: Tensor) -> Tensor:
        """uint8 images (B, 144, 144, 3) -> the patch features LLaVA takes (B, N, D)."""
        v = self.model.model.vision_tower
        x = (images.float() / 255 - MEAN[0]) / STD[0]
        b = len(images)
        x = x.view(b, GRID, PATCH, GRID, PATCH, 3).permute(0, 1, 3, 5, 2, 4).reshape(b, N, -1)
        x = F.linear(x, v.embeddings.patch_embedding.weight.flatten(1))
        x = torch.cat([v.embeddings.class_embedding.expand(b, 1, -1), x], 1) + v.embeddings.position_embedding.weight
        x = v.pre_layrnorm(x)
        for layer in v.encoder.layers:
            h, a = layer.layer_norm1(x), layer.self_attn
            q, k, w = (p(h).view(b, N + 1, -1, a.head_dim).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj))
            x = x + a.out_proj(F.scaled_dot_product_attention(q, k, w).transpose(1, 2).flatten(2))
            x = x + layer.mlp.fc2(F.gelu(layer.mlp.fc1(layer.layer_norm2(x))))
        return x[:, 1:]

    def project(self, features: Tensor) -> Tensor:
        p = self.model.model.multi_modal_projector
        return p.linear_2(F.gelu(p.linear_1(features)))

    def symbolic(self, labels: Tensor) -> Tensor:
        """Visual tokens made from the true patch labels (B, N, 5): what the projector is first aligned to."""
        x = self.place.weight + sum(e(labels[..., i]) for i, e in enumerate(self.symbols))
        return self.symbol_mlp(x)

    def dense_loss(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy per patch over the five label kinds, and each kind's recall on patches that have one."""
        losses, recalls = [], []
        for i, head in enumerate(self.dense):
            logits, wanted = head(features).flatten(0, 1), labels[..., i].flatten()
            each = F.cross_entropy(logits, wanted, reduction="none")
            weight = torch.where(wanted > 0, 4.0, 1.0) if i >= 3 else torch.where(wanted > 0, 2.0, 1.0)
            losses.append((each * weight).mean())
            there = wanted > 0
            recalls.append(((logits.argmax(-1) == wanted) & there).sum() / there.sum().clamp(min=1))
        return torch.stack(losses).sum(), torch.stack(recalls)

    def coordinate_loss(self, features: Tensor) -> Tensor:
        """Cross-entropy of each patch's row and of its column."""
        place = torch.arange(N)
        row, column = (head(features).transpose(1, 2) for head in self.coordinates)
        b = len(features)
        return F.cross_entropy(row, (place // GRID).expand(b, N)) + F.cross_entropy(column, (place % GRID).expand(b, N))

    def answer(self, visual: Tensor, blocks: Tensor, ask_at: Tensor, scale: Tensor, blind: Tensor) -> Tensor:
        """Logits at the ":" and at the answer of every block.

        visual (B, N, D); blocks (B, Q, T) ids; ask_at (B, Q) index of the ":"; scale (B,) multiplies the distance
        between visual positions (1 is what inference does); blind (B, Q) bool: blocks that see no image at all.
        Returns (B, Q, 2, vocabulary).
        """
        lm = self.model.model.language_model
        cfg = self.model.config.text_config
        heads, theta, eps = cfg.num_attention_heads, 10000.0, cfg.rms_norm_eps
        b, n, d = visual.shape
        q, t = blocks.shape[1:]
        start = lm.embed_tokens.weight[[VOCABULARY["<s>"], VOCABULARY["user"], VOCABULARY[":"]]].expand(b, PREFIX, d)
        prefix, ask = torch.cat([start, visual], 1), lm.embed_tokens(blocks)
        steps = torch.arange(n)[None] * scale[:, None] + PREFIX
        at_prefix = torch.cat([torch.arange(PREFIX).expand(b, PREFIX).float(), steps], 1)
        first = torch.where(blind, float(PREFIX), (PREFIX + n * scale)[:, None].expand(b, q))
        at_ask = first[..., None] + torch.arange(t)
        cos, sin = rotary(torch.cat([at_prefix, at_ask.flatten(1)], 1), d // heads // 2, theta)
        hide = torch.cat([torch.zeros(PREFIX), torch.full((n,), float("-inf"))])
        hidden = torch.where(blind[..., None], hide, torch.zeros(())).view(b, 1, q, 1, PREFIX + n)
        p, dh = PREFIX + n, d // heads
        asked = torch.stack([ask_at, ask_at + 1], -1)

        norm = functools.partial(rms_norm, eps=eps)
        for layer in lm.layers:
            a, m, last = layer.self_attn, layer.mlp, layer is lm.layers[-1]
            h = norm(torch.cat([prefix, ask.flatten(1, 2)], 1), layer.input_layernorm)
            key = rotate(a.k_proj(h).view(b, -1, heads, dh), cos, sin).transpose(1, 2)
            value = a.v_proj(h).view(b, -1, heads, dh).transpose(1, 2)
            if last:  # only the two asked tokens of a block go on
                at, rows = asked, asked[..., None].expand(b, q, 2, d)
                ask = ask.gather(2, rows)
                h = h[:, p:].view(b, q, t, d).gather(2, rows).flatten(1, 2)
                rows = asked[..., None].expand(b, q, 2, dh // 2)
                turn = [x[:, p:, 0].view(b, q, t, -1).gather(2, rows).flatten(1, 2)[:, :, None] for x in (cos, sin)]
            else:
                at, turn = torch.arange(t).expand(b, q, t), [cos, sin]
            query = rotate(a.q_proj(h).view(b, -1, heads, dh), *turn).transpose(1, 2)
            blocks_of = query if last else query[:, :, p:]
            s = at.shape[-1]
            scaled = blocks_of * dh**-0.5
            own_k, own_v = (x[:, :, p:].reshape(b, heads, q, t, dh) for x in (key, value))
            causal = torch.where(torch.arange(t) <= at[..., None], 0.0, float("-inf"))[:, None]
            to_prefix = (scaled @ key[:, :, :p].transpose(-1, -2)).view(b, heads, q, s, p) + hidden
            to_own = scaled.reshape(b, heads, q, s, dh) @ own_k.transpose(-1, -2) + causal
            weights = torch.cat([to_prefix, to_own], -1).softmax(-1)
            out = weights[..., :p].reshape(b, heads, q * s, p) @ value[:, :, :p]
            out = out + (weights[..., p:] @ own_v).reshape(b, heads, q * s, dh)
            joined = ask.flatten(1, 2)
            if not last:
                seen = F.scaled_dot_product_attention(query[:, :, :p], key[:, :, :p], value[:, :, :p], is_causal=True)
                out, joined = torch.cat([seen, out], 2), torch.cat([prefix, joined], 1)
            joined = joined + a.o_proj(out.transpose(1, 2).flatten(2))
            h = norm(joined, layer.post_attention_layernorm)
            joined = joined + m.down_proj(F.silu(m.gate_proj(h)) * m.up_proj(h))
            if not last:
                prefix, joined = joined[:, :p], joined[:, p:]
            ask = joined.reshape(b, q, s, d)
        return F.linear(norm(ask, lm.norm), lm.embed_tokens.weight)

    def answer_loss(self, visual, blocks, ask_at, scale, blind, weight) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the answers (weighted per block) + 0.05 x that of the end of sequence, and hits (B, Q)."""
        logits = self.answer(visual, blocks, ask_at, scale, blind)
        wanted = blocks.gather(2, (ask_at + 1)[..., None])[..., 0]
        each = F.cross_entropy(logits[:, :, 0].flatten(0, 1), wanted.flatten(), reduction="none").view_as(wanted)
        stop = F.cross_entropy(logits[:, :, 1].flatten(0, 1), torch.full_like(wanted, VOCABULARY["</s>"]).flatten())
        hits = logits[:, :, 0].argmax(-1) == wanted
        return (each * weight).sum() / weight.sum() + 0.05 * stop, hits


def rms_norm(x: Tensor, module: Any, eps: float) -> Tensor:
    """What a RMSNorm module makes of x, compiled with what is around it."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * module.weight
