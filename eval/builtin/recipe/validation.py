"""Validation of an embedded model in training, and the folder that is shipped."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from mllm_efficient.trained.export import name_for_vllm

from ..chat import IMAGE_SIZE
from .packed_language import PackedLanguage, questions
from .prompts import BLOCK, OLD, Kind, Prompt, hard_prompt, old_prompt, pack

SCENES, ITEMS = 60, 40  # of the first benchmark, and of each category of the harder one
MOST = 16  # questions of a prompt in validation


@functools.cache
def asked(split: str, categories: tuple[str, ...], scenes: int, items: int) -> tuple[Prompt, ...]:
    """The benchmark's prompts of a split."""
    rng = np.random.default_rng(0)
    hard = [hard_prompt(i, c, rng, split) for c in categories if c not in OLD for i in range(items)]
    old = [old_prompt(i, IMAGE_SIZE, rng, split) for i in range(scenes)] if set(OLD) & set(categories) else []
    return (*old, *hard)


def blocks_of(prompt: Prompt) -> np.ndarray:
    """(MOST, BLOCK) ids of a prompt's questions, and of nothing where there are fewer."""
    blocks = np.zeros((MOST, BLOCK), np.int64)
    blocks[:, -1] = 1
    for i, (_, question, answer) in enumerate(prompt.questions[:MOST]):
        blocks[i] = pack(question, answer)
    return blocks


@dataclass(frozen=True)
class Asked:
    """What is asked, and of how much. shown, categories, buckets: as the recipe has them. scenes: of the first benchmark; items: of each
    category of the harder one. pictures: their "own", those of "another" prompt of the same category, or "none"."""

    shown: Callable[[Sequence[Sequence[np.ndarray]], Kind], Any]
    categories: tuple[str, ...]
    buckets: tuple[int, ...]
    split: str = "val"
    scenes: int = SCENES
    items: int = ITEMS
    pictures: str = "own"

    def prompts(self) -> list[Prompt]:
        prompts = list(asked(self.split, self.categories, self.scenes, self.items))
        if self.pictures != "another":
            return prompts
        alike: dict[tuple[str, int], list[int]] = {}
        for i, prompt in enumerate(prompts):
            kind = "old" if prompt.questions[0][0] in OLD else prompt.questions[0][0]
            alike.setdefault((kind, len(prompt.draw)), []).append(i)
        for places in alike.values():  # everybody gets the next one's
            others = [prompts[i] for i in (*places[1:], places[0])]
            for i, other in zip(places, others):
                prompts[i] = replace(prompts[i], height=other.height, width=other.width, draw=other.draw)
        return prompts

    def batches(self) -> Iterator[list[Prompt]]:
        """Of as many pictures each, and of sizes of one bucket."""
        groups: dict[tuple[int, int], list[Prompt]] = {}
        for prompt in self.prompts():
            groups.setdefault((len(prompt.draw), self.bucket(prompt)), []).append(prompt)
        for (pictures, bucket), prompts in groups.items():
            step = max(1, 1000 // (bucket * pictures))
            yield from (prompts[low : low + step] for low in range(0, len(prompts), step))

    def bucket(self, prompt: Prompt) -> int:
        return next(size for size in self.buckets if prompt.tokens <= size)


@torch.no_grad()
def validate(packed: PackedLanguage, about: Asked) -> dict[str, float]:
    """Percent right by category, all visual tokens, and the unweighted mean."""
    hits = {c: [0, 0] for c in about.categories}
    for some in about.batches():
        kind = Kind(about.categories, len(some[0].draw), 0, about.bucket(some[0]))
        inputs = about.shown([[draw() for draw in prompt.draw] for prompt in some], kind)
        questioned = questions(np.stack([blocks_of(p) for p in some]), np.ones((len(some), MOST)))
        questioned.blind[:] = about.pictures == "none"
        _, right = packed.loss(inputs, questioned)
        for prompt, row in zip(some, right.tolist()):
            for (category, _, _), hit in zip(prompt.questions[:MOST], row):
                hits[category][0] += hit
                hits[category][1] += 1
    each = {c: 100 * right / max(total, 1) for c, (right, total) in hits.items()}
    return {"macro": round(sum(each.values()) / len(each), 2), **{c: round(v, 1) for c, v in each.items()}}


def publish(model: Any, processor: Callable[[Path], None], folder: Path) -> None:
    """The model in half precision and its processor, as ``from_pretrained`` and vLLM read them."""
    model.eval().save_pretrained(folder)
    weights = {name_for_vllm(k): v.to(torch.float16).contiguous() for k, v in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    processor(folder)
