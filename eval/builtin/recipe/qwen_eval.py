"""Validation of ``builtin-qwen`` in training, and the folder that is shipped."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ..qwen_architecture import IMAGE_SIZE
from .qwen_data import BLOCK, CATEGORIES, HARD, Prompt, hard_prompt, old_prompt, pack
from .qwen_packed import PackedQwen, collate

SCENES, ITEMS = 60, 40  # of the first benchmark, and of each category of the harder one
MOST = 16  # questions of a prompt in validation


@functools.cache
def asked(split: str, scenes: int, items: int) -> tuple[Prompt, ...]:
    """The benchmark's prompts of a split."""
    rng = np.random.default_rng(0)
    hard = [hard_prompt(i, c, rng, split) for c in HARD for i in range(items)]
    return (*(old_prompt(i, IMAGE_SIZE, rng, split) for i in range(scenes)), *hard)


@torch.no_grad()
def validate(packed: PackedQwen, split: str = "val", scenes: int = SCENES, items: int = ITEMS) -> dict[str, float]:
    """Percent right by category, all visual tokens, and the unweighted mean."""
    hits = {c: [0, 0] for c in CATEGORIES}
    groups: dict[tuple[int, int], list[Prompt]] = {}
    for prompt in asked(split, scenes, items):
        bucket = next(size for size in (36, 64, 100, 144) if prompt.tokens <= size)
        groups.setdefault((len(prompt.draw), bucket), []).append(prompt)
    for (pictures, bucket), prompts in groups.items():
        step = max(1, 1000 // (bucket * pictures))
        for low in range(0, len(prompts), step):
            some = prompts[low : low + step]
            rows = []
            for prompt in some:
                blocks = np.zeros((MOST, BLOCK), np.int64)
                blocks[:, -1] = 1  # no question
                for i, (_, question, answer) in enumerate(prompt.questions[:MOST]):
                    blocks[i] = pack(question, answer)
                rows.append(([draw() for draw in prompt.draw], blocks, np.ones(MOST)))
            _, right = packed.loss(collate(rows, bucket))
            for prompt, row in zip(some, right.tolist()):
                for (category, _, _), hit in zip(prompt.questions[:MOST], row):
                    hits[category][0] += hit
                    hits[category][1] += 1
    each = {c: 100 * right / max(total, 1) for c, (right, total) in hits.items()}
    return {"macro": round(sum(each.values()) / len(each), 2), **{c: round(v, 1) for c, v in each.items()}}


def publish(model, folder: Path) -> None:
    """The model in half precision and its processor, as ``from_pretrained`` reads them."""
    from ..qwen_architecture import save_processor

    model.eval().save_pretrained(folder)
    weights = {k: v.to(torch.float16).contiguous() for k, v in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    save_processor(folder)
