"""The embedded model's decoder along one path of pooling kernels, and its training: what ``dpn_paths.py`` runs."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mixers import features  # beside this file

import mllm_efficient as me
from mllm_efficient.eval.builtin.architecture import GRID, VOCABULARY
from mllm_efficient.measure.flops import load_shape, prefill_flops

KERNELS = ((1, 1), (1, 2), (2, 2))
PATHS = tuple(itertools.product(KERNELS, repeat=3))
COPIES = {"supernet": 1, "mixture": 3}
IMAGES, QUESTIONS, TEXT = 8, 6, 16  # of a step; text tokens of a prompt for its FLOPs
STEPS = {"alone": 40, "supernet": 400, "mixture": 400}
RATE, KEPT, HOTTEST = 3e-4, 0.9, 100.0  # learning rate; of the table's old value; the mixture's last temperature


def name_of(path: Sequence[tuple[int, int]]) -> str:
    return "/".join(f"{rows}x{columns}" for rows, columns in path)


def layers_of(path: Sequence[tuple[int, int]]) -> list[int]:
    """Visual tokens of each decoder layer."""
    rows, columns, out = GRID, GRID, [GRID * GRID]
    for kernel in path:
        rows, columns = rows // kernel[0], columns // kernel[1]
        out.append(rows * columns)
    return out


def left(path: Sequence[tuple[int, int]]) -> float:
    """Prefill FLOPs in percent of those with all tokens."""
    decoder = load_shape("builtin").decoder
    whole = prefill_flops(decoder, [GRID * GRID + TEXT] * decoder.layers)
    return 100 * prefill_flops(decoder, [n + TEXT for n in layers_of(path)]) / whole


# ------------------------------------------------------------------------------------------------ the model along a path


def along(lm: Any, visual: Any, blocks: Any, ask_at: Any, path: Sequence[tuple[int, int]]) -> Any:
    """Logits (B, Q, V) at the ":" of every question. visual (B, N, D); blocks (B, Q, T) ids; ask_at (B, Q).

    The questions of a picture share its tokens and do not see each other.
    """
    import torch
    from torch.nn import functional as F

    from mllm_efficient.eval.builtin.recipe.packed import rms_norm, rotary, rotate

    (b, n, d), (q, t), cfg = visual.shape, blocks.shape[1:], lm.config
    heads, first = cfg.num_attention_heads, torch.tensor([VOCABULARY[word] for word in ("<s>", "user", ":")])
    x = torch.cat([lm.embed_tokens(first).expand(b, -1, d), visual, lm.embed_tokens(blocks).flatten(1, 2)], 1)
    turn = torch.cat([torch.zeros(3 + n, dtype=torch.long), torch.arange(1, 1 + q).repeat_interleave(t)])
    grid = (GRID, GRID)
    for i, layer in enumerate(lm.layers):
        if i and path[i - 1] != (1, 1):
            x, grid = pooled(x, grid, path[i - 1])
            turn = turn[-(x.shape[1]) :]  # of what all see there is less
        order, a, shared = torch.arange(len(turn)), layer.self_attn, len(turn) - q * t
        place = torch.cat([torch.arange(shared), torch.arange(shared, shared + t).repeat(q)])
        seen = ((turn == 0) | (turn == turn[:, None])) & (order <= order[:, None])
        h, around = rms_norm(x, layer.input_layernorm, cfg.rms_norm_eps), rotary(place.float(), d // heads // 2, 10000.0)
        query, key, value = (p(h).unflatten(-1, (heads, -1)) for p in (a.q_proj, a.k_proj, a.v_proj))
        query, key, value = (part.transpose(1, 2) for part in (rotate(query, *around), rotate(key, *around), value))
        x = x + a.o_proj(F.scaled_dot_product_attention(query, key, value, attn_mask=seen).transpose(1, 2).flatten(2))
        h = rms_norm(x, layer.post_attention_layernorm, cfg.rms_norm_eps)
        x = x + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(h)) * layer.mlp.up_proj(h))
    asked = x[:, -q * t :].unflatten(1, (q, t)).gather(2, ask_at[..., None, None].expand(-1, -1, 1, d))[:, :, 0]
    return F.linear(rms_norm(asked, lm.norm, cfg.rms_norm_eps), lm.embed_tokens.weight)


def pooled(x: Any, grid: tuple[int, int], kernel: tuple[int, int]) -> tuple[Any, tuple[int, int]]:
    """States (B, L, D) whose visual tokens are the maxima of kernels, and the grid that is left."""
    import torch
    from torch.nn import functional as F

    rows, columns = grid
    end = 3 + rows * columns
    plane = F.max_pool2d(x[:, 3:end].transpose(1, 2).unflatten(2, grid), kernel)
    return torch.cat([x[:, :3], plane.flatten(2).transpose(1, 2), x[:, end:]], 1), (plane.shape[2], plane.shape[3])


class Data:
    """Batches of a split as the language model takes them. features: of the tower, computed once."""

    def __init__(self, projector: Any, split: str, folder: Path):
        self.projector, (self.features, self.arrays) = projector, features(split, folder)

    def of(self, images: np.ndarray, chosen: np.ndarray | None = None) -> tuple[Any, Any, Any, Any]:
        """Visual tokens (B, N, D), blocks (B, Q, T), the places of ":" (B, Q), and which questions there are (B, Q)."""
        import torch

        blocks, meta = (self.arrays[name][images] for name in ("blocks", "meta"))
        if chosen is not None:
            blocks, meta = (np.take_along_axis(part, chosen[..., None], 1) for part in (blocks, meta))
        with torch.no_grad():
            visual = self.projector(torch.from_numpy(np.array(self.features[images])).float())
        blocks, meta = (torch.from_numpy(part.astype(np.int64)) for part in (blocks, meta))
        return visual, blocks, meta[..., 0], meta[..., 1] != 255

    def drawn(self, rng: np.random.Generator) -> tuple[Any, Any, Any]:
        """A batch of a step, all of whose questions are there."""
        images, there = np.sort(rng.choice(len(self.features), IMAGES, replace=False)), (self.arrays["meta"][..., 1] != 255).sum(1)
        chosen = np.stack([np.sort(rng.choice(there[i], QUESTIONS, replace=there[i] < QUESTIONS)) for i in images])
        return self.of(images, chosen)[:3]


def right(logits: Any, blocks: Any, ask_at: Any) -> tuple[Any, Any]:
    """Cross-entropy of the answers, and which are right (B, Q)."""
    from torch.nn import functional as F

    wanted = blocks.gather(2, (ask_at + 1)[..., None])[..., 0]
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten()), logits.argmax(-1) == wanted


def balanced(table: np.ndarray, temperature: float) -> np.ndarray:
    """(paths, copies) chances of each copy for a path: a softmax of the table, then all copies made equally likely over the paths."""
    chances = np.exp(temperature * (table - table.max(1, keepdims=True)))
    chances /= chances.sum(1, keepdims=True)
    for _ in range(10000):
        marginal = chances.mean(0)
        if (marginal * np.log(marginal * len(marginal))).sum() < 1e-4:
            break
        chances = chances / marginal
        chances /= chances.sum(1, keepdims=True)
    return chances


def train(kind: str, only: int | None, seed: int, folder: Path) -> tuple[list[Any], np.ndarray, Any, dict[str, Any]]:
    """Copies of the language model trained along paths, the table (paths, copies), and the projector. only: the one path of ``alone``."""
    import torch

    model, _ = me.builtin(device="cpu")
    model.requires_grad_(False)
    projector, n, steps = model.model.multi_modal_projector, COPIES.get(kind, 1), STEPS[kind]
    copies = [copy.deepcopy(model.model.language_model).requires_grad_(True) for _ in range(n)]
    optimizers = [torch.optim.AdamW(c.parameters(), RATE, weight_decay=0.02) for c in copies]
    data, held = (Data(projector, split, folder) for split in ("train", "val"))
    rng, table, began = np.random.default_rng([seed, 11]), np.ones((len(PATHS), n)), time.process_time()
    choices, losses = np.random.default_rng([seed, 13]), list[float]()
    for step in range(steps):
        path = only if only is not None else int(choices.integers(len(PATHS)))
        chances = balanced(table, 1 + (HOTTEST - 1) * step / max(1, steps - 1))[path]
        at = int(choices.choice(n, p=chances / chances.sum()))
        lm, optimizer = copies[at], optimizers[at]
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 5) * 0.5 * (1 + np.cos(np.pi * step / steps))
        visual, blocks, ask_at = data.drawn(rng)
        loss, _ = right(along(lm, visual, blocks, ask_at, PATHS[path]), blocks, ask_at)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if kind == "mixture":
            with torch.no_grad():
                visual, blocks, ask_at = held.drawn(choices)
                hits = right(along(lm, visual, blocks, ask_at, PATHS[path]), blocks, ask_at)[1]
            table[path, at] = KEPT * table[path, at] + (1 - KEPT) * hits.float().mean().item()
    log = {"steps": steps, "cpu_seconds": round(time.process_time() - began, 1), "losses": [round(float(np.mean(losses[-10:])), 4)]}
    return copies, table, projector, log


def asked(lm: Any, projector: Any, path: Sequence[tuple[int, int]], split: str, folder: Path, scenes: int) -> str:
    """ "1" for each question answered right and "0" for each other one."""
    import torch

    data, hits = Data(projector, split, folder), []
    with torch.no_grad():
        for low in range(0, scenes, 50):
            visual, blocks, ask_at, there = data.of(np.arange(low, min(low + 50, scenes)))
            most = int(there.sum(1).max())
            blocks, ask_at, there = blocks[:, :most], ask_at[:, :most], there[:, :most]
            hits.append(right(along(lm, visual, blocks, ask_at, path), blocks, ask_at)[1][there])
    return "".join(str(int(h)) for h in torch.cat(hits).tolist())
