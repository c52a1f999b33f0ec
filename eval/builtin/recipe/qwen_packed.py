"""The tower of ``builtin-qwen`` and the prefix that it makes of pictures of different sizes, over the stock modules.

Pictures are padded to the tokens of the largest, which nothing looks at.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from ..chat import USER, VOCABULARY
from ..qwen_architecture import MERGE, PATCH, SIDE
from .packed_language import HEAD, NEVER, PackedLanguage, Prefix, linear

MARKS = (USER, ("<|vision_start|>",), ("<|vision_end|>",))
TEXT = len(USER)  # what a question without a picture sees


@dataclass
class Pictures:
    """C pictures of each of B prompts, of at most N visual tokens.

    patches: uint8 (B, C, 4 N, 3 * 14 * 14) in the order of merged cells. place: (B, 4 N, 2) row and column of a patch.
    taps, shares: (B, 4 N, 4) of the learned positions. sizes: (B,) tokens of a picture. positions: (B, 3, P) of the prefix.
    first: (B,) position behind the prefix.
    """

    patches: Tensor
    place: Tensor
    taps: Tensor
    shares: Tensor
    sizes: Tensor
    positions: Tensor
    first: Tensor


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


def arranged(prompts: Sequence[Sequence[np.ndarray]], tokens: int) -> Pictures:
    """prompts: of each the pictures, of one size (H, W, 3); all have as many. tokens: N."""
    b, c, n = len(prompts), len(prompts[0]), tokens * MERGE**2
    patches = np.zeros((b, c, n, 3 * PATCH * PATCH), np.uint8)
    place, taps, shares = torch.zeros(b, n, 2), torch.zeros(b, n, 4, dtype=torch.long), torch.zeros(b, n, 4)
    sizes, positions, first = [], [], []
    for i, pictures in enumerate(prompts):
        rows, columns = (side // PATCH for side in pictures[0].shape[:2])
        for j, picture in enumerate(pictures):
            patches[i, j, : rows * columns] = cut(picture)
        for whole, part in zip((place, taps, shares), laid_out(rows, columns)):
            whole[i, : rows * columns] = part
        sizes.append(rows * columns // MERGE**2)
        where, behind = prefix_positions(rows // MERGE, columns // MERGE, c, tokens)
        positions.append(where)
        first.append(behind)
    return Pictures(
        torch.from_numpy(patches), place, taps, shares, torch.tensor(sizes), torch.stack(positions), torch.tensor(first)
    )  # fmt: skip


class PackedQwen(PackedLanguage):
    """``builtin-qwen``."""

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

    def tower(self, seen: Pictures) -> list[Tensor]:
        """The merged features (B * C, N, D), then those of deepstack."""
        v = self.model.model.visual
        c, n = seen.patches.shape[1:3]
        x = ((seen.patches.flatten(0, 1).float() / 255 - 0.5) / 0.5).to(self.dtype)
        x = linear(x, v.patch_embed.proj.weight.sum(2).flatten(1), v.patch_embed.proj.bias)  # a still picture is two equal frames
        learned = (F.embedding(seen.taps, v.pos_embed.weight) * seen.shares[..., None]).sum(-2)
        angles = (seen.place[..., None] * v.rotary_pos_emb.inv_freq).flatten(2)[:, :, None]
        hide = torch.where(torch.arange(n) < MERGE**2 * seen.sizes[:, None], 0.0, NEVER)[:, None, None]
        learned, cos, sin, hide = (
            y.repeat_interleave(c, 0) for y in (learned.to(self.dtype), angles.cos().to(self.dtype), angles.sin().to(self.dtype), hide)
        )
        x, deep = x + learned, []
        for i, block in enumerate(v.blocks):
            x = self.tower_block(x, cos, sin, hide, block)
            if i in v.deepstack_visual_indexes:
                deep.append(self.merged(x, v.deepstack_merger_list[v.deepstack_visual_indexes.index(i)]))
        return [self.merged(x, v.merger), *deep]

    def prefix(self, inputs: Pictures) -> Prefix:
        b, c, n = inputs.patches.shape[0], inputs.patches.shape[1], inputs.patches.shape[2] // MERGE**2
        embed = self.model.model.language_model.embed_tokens.weight
        user, begin, end = (embed[[VOCABULARY[w] for w in words]].to(self.dtype) for words in MARKS)
        visual = [f.view(b, c, *f.shape[1:]) for f in self.tower(inputs)]
        one = torch.cat([begin.expand(b, c, 1, -1), visual[0], end.expand(b, c, 1, -1)], 2).flatten(1, 2)
        deep = [F.pad(F.pad(f, (0, 0, 1, 1)).flatten(1, 2), (0, 0, TEXT, 0)) for f in visual[1:]]
        at = torch.arange(n + 2)
        real = (at == 0) | (at == n + 1) | (at <= inputs.sizes[:, None])  # of a picture's tokens between its two marks
        real = torch.cat([torch.ones(b, TEXT, dtype=torch.bool), real.repeat(1, c)], 1)
        return Prefix(torch.cat([user.expand(b, TEXT, -1), one], 1), deep, real, inputs.positions, inputs.first, TEXT)
