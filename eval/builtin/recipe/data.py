"""Training arrays: images, dense patch labels and packed questions, drawn once and kept as ``.npy`` files."""

from __future__ import annotations

import os
import re
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from mllm_efficient.writing import writing

from ..architecture import GRID, IMAGE_SIZE, PATCH, VOCABULARY
from ..questions import CATEGORIES, all_questions, benchmark_questions
from ..scenes import COLOURS, SHAPES, SPLITS, Stream, make_scene

BLOCK = 16  # tokens of one packed question: at most 12 of text, "ASSISTANT :", the answer, padding
POOL = 24  # questions kept per training image; a step draws some of them
QUOTA = {"object": 1, "attribute": 5, "count": 2, "position": 6, "presence": 5, "reading": 2, "comparison": 3}
UNIT = 10  # canvas units per pixel at the model's size


def encode(text: str) -> list[int]:
    """The token ids that the processor gives a question (no special tokens)."""
    return [VOCABULARY[w] for w in re.findall(r"\w+|[^\w\s]", text.lower())]


def pack(question) -> tuple[list[int], int, int]:
    """One question as (block of ``BLOCK`` ids ending in its answer, index of the ":", category)."""
    ids = [*encode(question.text), VOCABULARY["assistant"], VOCABULARY[":"]]
    answer_from = len(ids) - 1
    ids.append(VOCABULARY[question.answer])
    return ids + [0] * (BLOCK - len(ids)), answer_from, CATEGORIES.index(question.category)


def patch_labels(scene, owners: np.ndarray) -> np.ndarray:
    """Dense labels per patch, uint8 (GRID*GRID, 5): colour, shape, size, thing centred here, digit. 0 is none."""
    out = np.zeros((GRID, GRID, 5), dtype=np.uint8)
    tiles = owners.reshape(GRID, PATCH, GRID, PATCH).transpose(0, 2, 1, 3).reshape(GRID, GRID, -1)
    colours, shapes = list(COLOURS), list(SHAPES)
    best = np.full((GRID, GRID), PATCH * PATCH // 8)
    for i, t in enumerate(scene.things):
        covered = (tiles == i).sum(-1)
        where = covered > best
        best = np.where(where, covered, best)
        out[where, 0] = colours.index(t.colour) + 1
        out[where, 1] = shapes.index(t.shape) + 1
        out[where, 2] = 1 + t.big
    for t in scene.things:
        row, col = t.y // (UNIT * PATCH), t.x // (UNIT * PATCH)
        out[row, col, 3] = 1 + (t.big * len(colours) + colours.index(t.colour)) * len(shapes) + shapes.index(t.shape)
    side = UNIT * PATCH
    for d in scene.digits:
        b = d.box
        for row in range(b.top // side, (b.bottom - 1) // side + 1):
            for col in range(b.left // side, (b.right - 1) // side + 1):
                w = min(b.right, (col + 1) * side) - max(b.left, col * side)
                h = min(b.bottom, (row + 1) * side) - max(b.top, row * side)
                if w * h * 5 >= side * side:
                    out[row, col, 4] = d.value + 1
    return out.reshape(-1, 5)


def training_questions(scene) -> list:
    """``POOL`` questions: each category's quota, filled up by repeating what the scene has."""
    rng = Stream(41, SPLITS[scene.split], scene.index)
    by_category = all_questions(scene, rng)
    out = []
    for category, quota in QUOTA.items():
        have = rng.shuffled(by_category[category])
        if category == "position":  # half relations, half halves
            pairs, singles = [q for q in have if len(q.region) == 2], [q for q in have if len(q.region) == 1]
            have = [q for two in zip(pairs, singles) for q in two] + pairs[len(singles) :] + singles[len(pairs) :]
        out += have[:quota]
    rest = rng.shuffled([q for c in ("attribute", "position", "presence", "reading", "comparison") for q in by_category[c]])
    return (out + rest * POOL)[:POOL]


def _one(split: str, index: int):
    scene = make_scene(split, index)
    image, owners = scene.draw_with_owners(IMAGE_SIZE)
    questions = training_questions(scene) if split == "train" else benchmark_questions(scene)
    packed = [pack(q) for q in questions]
    packed += [([0] * BLOCK, 0, 255)] * (POOL - len(packed))
    blocks = np.array([p[0] for p in packed], dtype=np.uint8)
    meta = np.array([p[1:] for p in packed], dtype=np.uint8)
    return image, patch_labels(scene, owners), blocks, meta


def _allocated(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """An array mapped from a new file with its place on the disk taken: a map that finds a full disk only later kills the process."""
    with writing(path):
        array = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
        if hasattr(os, "posix_fallocate"):
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def build(split: str, n: int, folder: Path, workers: int = 2) -> dict[str, np.ndarray]:
    """Arrays of the first n scenes of a split, memory-mapped; drawn on the first call (about 3 ms per image and core)."""
    names = ("images", "labels", "blocks", "meta")
    files = {k: folder / f"{split}-{n}-{k}.npy" for k in names}
    if not all(f.exists() for f in files.values()):
        folder.mkdir(parents=True, exist_ok=True)
        shapes = {"images": (n, IMAGE_SIZE, IMAGE_SIZE, 3), "labels": (n, GRID * GRID, 5), "blocks": (n, POOL, BLOCK), "meta": (n, POOL, 2)}
        # renamed when complete: an interrupted run starts anew, and several processes do not disturb each other
        drawn = {k: f.with_suffix(f".{os.getpid()}.new") for k, f in files.items()}
        try:
            out = {k: _allocated(drawn[k], shapes[k]) for k in names}
            with get_context("spawn").Pool(workers) as pool:
                for i, row in enumerate(pool.imap(partial(_one, split), range(n), chunksize=64)):
                    for k, value in zip(names, row):
                        out[k][i] = value
            for k, array in out.items():
                array.flush()
                drawn[k].replace(files[k])
        finally:
            for file in drawn.values():
                file.unlink(missing_ok=True)
    return {k: np.load(f, mmap_mode="r") for k, f in files.items()}
