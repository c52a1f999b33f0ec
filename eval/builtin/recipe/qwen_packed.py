"""A packed forward over the stock modules of ``builtin-qwen``: one visual prefix serves every question of its pictures.

The parameters are those of the Hugging Face model and the arithmetic is the same (a test holds the two equal); only the
layout differs. Each question block attends to the prefix and causally to itself, with positions that go on after the
prefix, which is what separate sequences would do. Blocks are padded on the left, so that answers end at one place;
pictures of different sizes are padded to the tokens of the largest, which nothing looks at.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from ..qwen_architecture import MERGE, PATCH, SIDE, VOCABULARY

TEXT = 2  # <|im_start|> user: what a question without a picture sees
HEAD = 32  # width of an attention head
ANSWER = 2  # tokens: a word and <|im_end|>
NEVER = float("-inf")


@dataclass
class Batch:
    """Prompts of B items with C pictures each, of at most N visual tokens, and Q questions each.

    patches: uint8 (B, C, 4 N, 3 * 14 * 14) in the order of merged cells. place: (B, 4 N, 2) row and column of a patch.
    taps, shares: (B, 4 N, 4) of the learned positions. sizes: (B,) tokens of a picture. positions: (B, 3, P) of the prefix.
    first: (B,) position behind the prefix. blocks: (B, Q, T) token ids padded on the left. start: (B, Q) a block's first real
    token. blind: (B, Q) bool, blocks that see no picture. weight: (B, Q).
    """

    patches: Tensor
    place: Tensor
    taps: Tensor
    shares: Tensor
    sizes: Tensor
    positions: Tensor
    first: Tensor
    blocks: Tensor
    start: Tensor
    blind: Tensor
    weight: Tensor


@functools.cache
def laid_out(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of a picture of rows x columns patches: place (n, 2), taps (n, 4) and shares (n, 4)."""
    thw = torch.tensor([[1, rows, columns]])
    taps, shares = get_vision_interpolation_indices_and_weights(
        thw, num_grid_per_side=SIDE, mode="bilinear", align_corners=True, spatial_merge_size=MERGE
    )
    return get_vision_position_ids(thw, MERGE), taps, shares


def cut(picture: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> patches (n, 3 * 14 * 14) in the order of merged cells."""
    h, w = picture.shape[0] // (PATCH * MERGE), picture.shape[1] // (PATCH * MERGE)
    x = picture.reshape(h, MERGE, PATCH, w, MERGE, PATCH, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    return x.reshape(h * w * MERGE**2, -1)


@functools.cache
def prefix_positions(rows: int, columns: int, pictures: int, tokens: int) -> tuple[Tensor, int]:
    """(3, P) time, height and width: <|im_start|> user, then <|vision_start|> tokens <|vision_end|> of each picture, the tokens
    padded to ``tokens``; and the position behind them. rows, columns: of tokens."""
    at, out = TEXT, [torch.arange(TEXT).expand(3, -1)]
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    for _ in range(pictures):
        place = torch.stack([torch.zeros(rows * columns, dtype=torch.long), row.flatten(), column.flatten()]) + at + 1
        end = at + 1 + max(rows, columns)
        out += [torch.full((3, 1), at), F.pad(place, (0, tokens - rows * columns)), torch.full((3, 1), end)]
        at = end + 1
    return torch.cat(out, 1), at


def collate(items: list[tuple[list[np.ndarray], np.ndarray, np.ndarray]], tokens: int, rng: np.random.Generator | None = None) -> Batch:
    """items: (pictures of one size (H, W, 3), blocks (Q, T), weight (Q,)) each. rng: draws which blocks see no picture."""
    b, c, n = len(items), len(items[0][0]), tokens * MERGE**2
    patches = np.zeros((b, c, n, 3 * PATCH * PATCH), np.uint8)
    place, taps, shares = torch.zeros(b, n, 2), torch.zeros(b, n, 4, dtype=torch.long), torch.zeros(b, n, 4)
    sizes, positions, first = [], [], []
    for i, (pictures, _, _) in enumerate(items):
        rows, columns = (side // PATCH for side in pictures[0].shape[:2])
        for j, picture in enumerate(pictures):
            patches[i, j, : rows * columns] = cut(picture)
        for whole, part in zip((place, taps, shares), laid_out(rows, columns)):
            whole[i, : rows * columns] = part
        sizes.append(rows * columns // MERGE**2)
        where, behind = prefix_positions(rows // MERGE, columns // MERGE, c, tokens)
        positions.append(where)
        first.append(behind)
    packed = np.stack([item[1] for item in items])
    blocks = torch.from_numpy(packed[:, :, (packed != 0).any((0, 1)).argmax() :]).long()  # no longer than the longest
    blind = torch.zeros(blocks.shape[:2], dtype=torch.bool)
    if rng is not None:
        blind = torch.from_numpy(rng.random(blocks.shape[:2]) < 0.02)
    return Batch(
        torch.from_numpy(patches), place, taps, shares, torch.tensor(sizes), torch.stack(positions), torch.tensor(first), blocks,
        (blocks == 0).int().argmin(-1), blind, torch.from_numpy(np.stack([item[2] for item in items])).float(),
    )  # fmt: skip


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


class PackedQwen(nn.Module):
    """dtype: of activations. compiled: whether what lies between products of matrices is fused."""

    def __init__(self, model, dtype: torch.dtype = torch.float32, compiled: bool = False):
        super().__init__()
        self.model, self.dtype = model, dtype
        self.f = SimpleNamespace(**{f.__name__: torch.compile(f, dynamic=True) if compiled else f for f in FUSED})

    def tower_block(self, x: Tensor, cos: Tensor, sin: Tensor, hide: Tensor, block: Any) -> Tensor:
        """x (M, n, D); cos, sin (M, n, 1, half); hide (M, 1, 1, n) is added to scores."""
        f, a = self.f, block.attn
        h = f.norm(x, block.norm1.weight, block.norm1.bias)
        q, key, value = linear(h, a.qkv.weight, a.qkv.bias).view(*x.shape[:2], 3, -1, HEAD).unbind(2)
        q, key, value = (y.transpose(1, 2) for y in (f.turned(q, cos, sin), f.turned(key, cos, sin), value))
        weights = f.soft(q @ (key * HEAD**-0.5).transpose(-1, -2), hide)
        x = x + linear((weights @ value).transpose(1, 2).flatten(2), a.proj.weight, a.proj.bias)
        h = linear(f.norm(x, block.norm2.weight, block.norm2.bias), block.mlp.linear_fc1.weight, block.mlp.linear_fc1.bias)
        return x + linear(F.gelu(h, approximate="tanh"), block.mlp.linear_fc2.weight, block.mlp.linear_fc2.bias)

    def merged(self, x: Tensor, merger: Any) -> Tensor:
        """(M, 4 N, D) -> (M, N, D'). Deepstack's norm is over the four patches together."""
        m, n = x.shape[:2]
        x = x.reshape(m, n // MERGE**2, -1) if merger.use_postshuffle_norm else x
        x = self.f.norm(x, merger.norm.weight, merger.norm.bias).reshape(m, n // MERGE**2, -1)
        return linear(F.gelu(linear(x, merger.linear_fc1.weight, merger.linear_fc1.bias)), merger.linear_fc2.weight, merger.linear_fc2.bias)

    def decoder_block(
        self, prefix: Tensor, ask: Tensor, cos: Tensor, sin: Tensor, see: Tensor, hide: Tensor, own: Tensor, layer: Any, last: bool
    ) -> tuple[Tensor, Tensor]:
        """One layer. prefix (B, P, D); ask (B, Q, T, D); cos, sin (B, P + Q T, 1, half); see (B, 1, P, P), hide (B, 1, Q, 1, P)
        and own (B, 1, Q, T, T) are added to scores. last: only the tokens that predict an answer go on."""
        f, a, m = self.f, layer.self_attn, layer.mlp
        (b, n, _), (q, t) = prefix.shape, ask.shape[1:3]
        h = f.rms(torch.cat([prefix, ask.flatten(1, 2)], 1), layer.input_layernorm.weight)
        key = f.normed_turned(linear(h, a.k_proj.weight).view(b, n + q * t, -1, HEAD), a.k_norm.weight, cos, sin).transpose(1, 2)
        value = linear(h, a.v_proj.weight).view(b, n + q * t, -1, HEAD).transpose(1, 2)
        if last:
            some = slice(-ANSWER - 1, -1)
            ask, own = ask[:, :, some], own[..., some, :]
            h = h[:, n:].reshape(b, q, t, -1)[:, :, some].flatten(1, 2)
            cos, sin = (x[:, n:].reshape(b, q, t, 1, -1)[:, :, some].flatten(1, 2) for x in (cos, sin))
        query = linear(h, a.q_proj.weight).view(b, h.shape[1], -1, HEAD)
        query = f.normed_turned(query, a.q_norm.weight, cos, sin).transpose(1, 2) * HEAD**-0.5
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

    def tower(self, batch: Batch) -> list[Tensor]:
        """The merged features (B * C, N, D), then those of deepstack."""
        v = self.model.model.visual
        c, n = batch.patches.shape[1:3]
        x = ((batch.patches.flatten(0, 1).float() / 255 - 0.5) / 0.5).to(self.dtype)
        x = linear(x, v.patch_embed.proj.weight.sum(2).flatten(1), v.patch_embed.proj.bias)  # a still picture is two equal frames
        learned = (F.embedding(batch.taps, v.pos_embed.weight) * batch.shares[..., None]).sum(-2)
        angles = (batch.place[..., None] * v.rotary_pos_emb.inv_freq).flatten(2)[:, :, None]
        hide = torch.where(torch.arange(n) < MERGE**2 * batch.sizes[:, None], 0.0, NEVER)[:, None, None]
        learned, cos, sin, hide = (
            y.repeat_interleave(c, 0) for y in (learned.to(self.dtype), angles.cos().to(self.dtype), angles.sin().to(self.dtype), hide)
        )
        x, deep = x + learned, []
        for i, block in enumerate(v.blocks):
            x = self.tower_block(x, cos, sin, hide, block)
            if i in v.deepstack_visual_indexes:
                deep.append(self.merged(x, v.deepstack_merger_list[v.deepstack_visual_indexes.index(i)]))
        return [self.merged(x, v.merger), *deep]

    def angles(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (B, L, 1, half) of (B, 3, L) positions, interleaved as M-RoPE has it."""
        rope = self.model.model.language_model.rotary_emb
        axis = torch.zeros(sum(rope.mrope_section), dtype=torch.long)
        for dim in (1, 2):
            axis[dim : 3 * rope.mrope_section[dim] : 3] = dim
        each = (position[:, axis].transpose(1, 2).float() * rope.inv_freq)[:, :, None]
        return each.cos(), each.sin()

    def prefix(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """(B, P, D) and what deepstack adds to it behind each of the first layers."""
        b, c = batch.patches.shape[:2]
        embed = self.model.model.language_model.embed_tokens.weight
        user, begin, end = (
            embed[[VOCABULARY[w] for w in words]].to(self.dtype)
            for words in (("<|im_start|>", "user"), ("<|vision_start|>",), ("<|vision_end|>",))
        )
        visual = [f.view(b, c, *f.shape[1:]) for f in self.tower(batch)]
        one = torch.cat([begin.expand(b, c, 1, -1), visual[0], end.expand(b, c, 1, -1)], 2).flatten(1, 2)
        deep = [F.pad(F.pad(f, (0, 0, 1, 1)).flatten(1, 2), (0, 0, TEXT, 0)) for f in visual[1:]]
        return torch.cat([user.expand(b, TEXT, -1), one], 1), deep

    def answer(self, batch: Batch) -> Tensor:
        """Logits that predict the last ``ANSWER`` tokens of every block (B, Q, ANSWER, vocabulary)."""
        lm, (b, q, t) = self.model.model.language_model, batch.blocks.shape
        prefix, deep = self.prefix(batch)
        n, c = prefix.shape[1], batch.patches.shape[1]
        ask = F.embedding(batch.blocks, lm.embed_tokens.weight).to(self.dtype)
        first = torch.where(batch.blind, TEXT, batch.first[:, None])
        at_ask = (first[..., None] + torch.arange(t) - batch.start[..., None]).flatten(1)[:, None].expand(b, 3, q * t)
        cos, sin = self.angles(torch.cat([batch.positions, at_ask], 2))
        at = torch.arange((n - TEXT) // c)
        real = (at == 0) | (at == len(at) - 1) | (at <= batch.sizes[:, None])  # (B, tokens of a picture with its two marks)
        real = torch.cat([torch.ones(b, TEXT, dtype=torch.bool), real.repeat(1, c)], 1)
        before = torch.arange(n)[:, None] >= torch.arange(n)
        see = torch.where(before & real[:, None], 0.0, NEVER)[:, None]
        hide = torch.where((real[:, None] & ~batch.blind[..., None]) | (torch.arange(n) < TEXT), 0.0, NEVER)[:, None, :, None]
        steps = torch.arange(t)
        own = (steps <= steps[:, None]) & ((steps >= batch.start[..., None, None]) | (steps == steps[:, None]))
        own = torch.where(own, 0.0, NEVER)[:, None]
        for i, layer in enumerate(lm.layers):
            last = layer is lm.layers[-1]
            prefix, ask = self.decoder_block(prefix, ask, cos, sin, see, hide, own, layer, last)
            if i < len(deep):
                prefix = prefix + deep[i]
        return F.linear(self.f.rms(ask, lm.norm.weight).float(), lm.embed_tokens.weight)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of the answers' tokens, weighted by block, and hits (B, Q)."""
        logits, wanted = self.answer(batch), batch.blocks[:, :, -ANSWER:]
        each = F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), reduction="none").view(wanted.shape)
        scale = batch.weight[..., None] * torch.tensor([1.0, 0.05])
        return (each * scale).sum() / batch.weight.sum(), logits[:, :, 0].argmax(-1) == wanted[:, :, 0]
