"""A packed forward over the stock modules of ``builtin-qwen``: one visual prefix serves every question of its pictures.

The parameters are those of the Hugging Face model and the arithmetic is the same (a test holds the two equal); only the
layout differs. Each question block attends to the prefix and causally to itself, with positions that go on after the
prefix, which is what separate sequences would do. Blocks are padded on the left, so that answers start at one place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from ..qwen_architecture import MERGE, PATCH, VOCABULARY

TEXT = 2  # <|im_start|> user: what a question without a picture sees
HEAD = torch.tensor([VOCABULARY[w] for w in ("<|im_start|>", "user", "<|vision_start|>", "<|vision_end|>")])


@dataclass(frozen=True)
class Grid:
    """Pictures of one size. rows, columns: of patches; pictures: in a prompt."""

    rows: int
    columns: int
    pictures: int = 1

    @property
    def tokens(self) -> int:
        return self.rows * self.columns // MERGE**2

    def positions(self) -> Tensor:
        """(3, P) time, height and width of the prefix: <|im_start|> user, then <|vision_start|> tokens <|vision_end|> each."""
        h, w = self.rows // MERGE, self.columns // MERGE
        out, at = [torch.arange(TEXT).expand(3, -1)], TEXT
        row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        for _ in range(self.pictures):
            place = torch.stack([torch.zeros(h * w, dtype=torch.long), row.flatten(), column.flatten()]) + at + 1
            end = at + 1 + max(h, w)
            out += [torch.full((3, 1), at), place, torch.full((3, 1), end)]
            at = end + 1
        return torch.cat(out, 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def rms(x: Tensor, module: nn.Module) -> Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + module.variance_epsilon) * module.weight).to(x.dtype)


class PackedQwen(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.dtype = torch.float32  # of activations

    # Tower

    def constants(self, grid: Grid) -> dict[str, Tensor]:
        """What depends on the grid alone."""
        v = self.model.model.visual
        thw = torch.tensor([[1, grid.rows, grid.columns]])
        indices, weights = get_vision_interpolation_indices_and_weights(
            thw, num_grid_per_side=v.num_grid_per_side, mode=v.interpolation_mode, align_corners=v.interpolation_align_corners,
            spatial_merge_size=MERGE,
        )  # fmt: skip
        place = get_vision_position_ids(thw, MERGE)
        cos, sin = v.rotary_pos_emb(torch.zeros(1), place)
        half = cos.shape[-1] // 2
        text = self.model.model.language_model.rotary_emb
        return {
            "indices": indices, "weights": weights, "cos": cos[:, :half], "sin": sin[:, :half],
            "positions": grid.positions(), "inv_freq": text.inv_freq,
        }  # fmt: skip

    def tower(self, images: Tensor, grid: Grid, k: dict[str, Tensor]) -> list[Tensor]:
        """uint8 (M, H, W, 3) -> the merged features (M, N, D), then those of deepstack."""
        v = self.model.model.visual
        m, n = len(images), grid.rows * grid.columns
        x = images.view(m, grid.rows // MERGE, MERGE, PATCH, grid.columns // MERGE, MERGE, PATCH, 3)
        x = x.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(m, n, -1)
        x = ((x.float() / 255 - 0.5) / 0.5).to(self.dtype)
        weight = v.patch_embed.proj.weight.sum(2).flatten(1)  # a still picture is two equal frames
        x = F.linear(x, weight.to(self.dtype), v.patch_embed.proj.bias.to(self.dtype))
        x = x + (v.pos_embed.weight[k["indices"]] * k["weights"][:, :, None]).sum(1).to(self.dtype)
        out, cos, sin = [], k["cos"].to(self.dtype)[:, None], k["sin"].to(self.dtype)[:, None]
        for i, block in enumerate(v.blocks):
            a = block.attn
            q, key, value = self._linear(self._norm(x, block.norm1), a.qkv).view(m, n, 3, a.num_heads, -1).unbind(2)
            q, key = (rotate(y, cos, sin).transpose(1, 2) for y in (q, key))
            y = self._attend(q, key, value.transpose(1, 2))
            x = x + self._linear(y.transpose(1, 2).flatten(2), a.proj)
            h = F.gelu(self._linear(self._norm(x, block.norm2), block.mlp.linear_fc1), approximate="tanh")
            x = x + self._linear(h, block.mlp.linear_fc2)
            if i in v.deepstack_visual_indexes:
                out.append(self._merged(x, v.deepstack_merger_list[v.deepstack_visual_indexes.index(i)]))
        return [self._merged(x, v.merger), *out]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return weights.float().softmax(-1).to(q.dtype) @ v

    def _merged(self, x: Tensor, merger: nn.Module) -> Tensor:
        m = len(x)
        x = x.view(m, -1, merger.hidden_size) if merger.use_postshuffle_norm else x
        x = self._norm(x, merger.norm).view(m, -1, merger.hidden_size)
        return self._linear(F.gelu(self._linear(x, merger.linear_fc1)), merger.linear_fc2)

    def _norm(self, x: Tensor, module: nn.LayerNorm) -> Tensor:
        return F.layer_norm(x.float(), module.normalized_shape, module.weight, module.bias, module.eps).to(x.dtype)

    def _linear(self, x: Tensor, module: nn.Linear) -> Tensor:
        bias = None if module.bias is None else module.bias.to(self.dtype)
        return F.linear(x, module.weight.to(self.dtype), bias)

    # Language model

    def _angles(self, position: Tensor, k: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """cos and sin (..., L, half) of (3, ..., L) positions, interleaved as M-RoPE has it."""
        section = self.model.model.language_model.rotary_emb.mrope_section
        axis = torch.zeros(sum(section), dtype=torch.long)
        for dim in (1, 2):
            axis[dim : 3 * section[dim] : 3] = dim
        each = position[axis].movedim(0, -1).float() * k["inv_freq"]
        return each.cos().to(self.dtype), each.sin().to(self.dtype)

    def answer(self, images: Tensor, blocks: Tensor, start: Tensor, blind: Tensor, grid: Grid, k: dict[str, Tensor], answers: int) -> Tensor:
        """Logits that predict the last ``answers`` tokens of every block (B, Q, answers, vocabulary).

        images (B, pictures, H, W, 3); blocks (B, Q, T) padded on the left; start (B, Q) their first real token; blind (B, Q)
        bool: blocks that see no picture.
        """
        lm, dt = self.model.model.language_model, self.dtype
        b, q, t = blocks.shape
        c, n = grid.pictures, grid.tokens
        embed = lm.embed_tokens.weight
        visual = [f.view(b, c, n, -1) for f in self.tower(images.flatten(0, 1), grid, k)]
        head = embed[HEAD].to(dt)
        begin, end = (head[i].expand(b, c, 1, -1) for i in (2, 3))
        one = torch.cat([begin, visual[0], end], 2).flatten(1, 2)
        prefix = torch.cat([head[:TEXT].expand(b, TEXT, -1), one], 1)
        deep = []
        for f in visual[1:]:
            flat = F.pad(f, (0, 0, 1, 1)).flatten(1, 2)
            deep.append(F.pad(flat, (0, 0, TEXT, 0)))
        p = prefix.shape[1]
        ask = F.embedding(blocks, embed).to(dt)
        first = torch.where(blind, TEXT, k["positions"].max() + 1)
        at_ask = (first[..., None] + torch.arange(t) - start[..., None]).flatten(1).expand(3, b, q * t)
        cos, sin = (torch.cat([x.expand(b, p, -1), y], 1)[:, :, None] for x, y in zip(self._angles(k["positions"], k), self._angles(at_ask, k)))
        hide = torch.where((torch.arange(p) >= TEXT) & blind[..., None], float("-inf"), 0.0)[:, None, :, None]  # (B, 1, Q, 1, P)
        steps = torch.arange(t)
        own = (steps <= steps[:, None]) & ((steps >= start[..., None, None]) | (steps == steps[:, None]))
        own = torch.where(own, 0.0, float("-inf"))[:, None]  # (B, 1, Q, T, T)
        heads, dh = lm.config.num_attention_heads, lm.config.head_dim
        for i, layer in enumerate(lm.layers):
            a, last = layer.self_attn, layer is lm.layers[-1]
            h = rms(torch.cat([prefix, ask.flatten(1, 2)], 1), layer.input_layernorm)
            key = rotate(rms(self._linear(h, a.k_proj).view(b, -1, heads, dh), a.k_norm), cos, sin).transpose(1, 2)
            value = self._linear(h, a.v_proj).view(b, -1, heads, dh).transpose(1, 2)
            turn = (cos, sin)
            if last:  # only the tokens that predict an answer go on
                ask, own = ask[:, :, -answers - 1 : -1], own[..., -answers - 1 : -1, :]
                h = h[:, p:].view(b, q, t, -1)[:, :, -answers - 1 : -1].flatten(1, 2)
                turn = tuple(x[:, p:].view(b, q, t, 1, -1)[:, :, -answers - 1 : -1].flatten(1, 2) for x in turn)
            query = rotate(rms(self._linear(h, a.q_proj).view(b, -1, heads, dh), a.q_norm), *turn).transpose(1, 2)
            s = ask.shape[2]
            scaled = (query if last else query[:, :, p:]) * dh**-0.5
            own_k, own_v = (x[:, :, p:].reshape(b, heads, q, t, dh) for x in (key, value))
            to_prefix = (scaled @ key[:, :, :p].transpose(-1, -2)).view(b, heads, q, s, p).float() + hide
            to_own = (scaled.reshape(b, heads, q, s, dh) @ own_k.transpose(-1, -2)).float() + own
            weights = torch.cat([to_prefix, to_own], -1).softmax(-1).to(dt)
            out = weights[..., :p].reshape(b, heads, q * s, p) @ value[:, :, :p]
            out = out + (weights[..., p:] @ own_v).reshape(b, heads, q * s, dh)
            joined = ask.flatten(1, 2)
            if not last:
                seen = F.scaled_dot_product_attention(query[:, :, :p], key[:, :, :p], value[:, :, :p], is_causal=True)
                out, joined = torch.cat([seen, out], 2), torch.cat([prefix, joined], 1)
            joined = joined + self._linear(out.transpose(1, 2).flatten(2), a.o_proj)
            h = rms(joined, layer.post_attention_layernorm)
            m = layer.mlp
            joined = joined + self._linear(F.silu(self._linear(h, m.gate_proj)) * self._linear(h, m.up_proj), m.down_proj)
            if not last:
                prefix, joined = joined[:, :p], joined[:, p:]
                if i < len(deep):
                    prefix = prefix + deep[i]
            ask = joined.reshape(b, q, s, -1)
        return F.linear(rms(ask, lm.norm).float(), embed)

    def loss(self, images, blocks, start, blind, weight, grid, k, answers) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of the answers' tokens (weighted by block; padding behind an answer is not one), hits (B, Q)."""
        logits = self.answer(images, blocks, start, blind, grid, k, answers)
        wanted = blocks[:, :, -answers:]
        there = (wanted != VOCABULARY["<|endoftext|>"]).float()
        each = F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), reduction="none").view(wanted.shape)
        right = ((logits.argmax(-1) == wanted) | (there == 0)).all(-1)
        scale = there * weight[..., None]
        return (each * scale).sum() / scale.sum(), right
