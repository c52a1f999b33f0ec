"""The trainer of the embedded models that came after the first: one loop, whatever the architecture.

Pictures grow over the phases of a recipe. A run saves itself every few minutes and the same command goes on; --minutes ends
this start earlier. OUTPUT_DIR/log.jsonl has losses, hits and validation by steps and seconds of processor time;
OUTPUT_DIR/model is the model as it is shipped, written at the end and by --publish at any time.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mllm_efficient.loading.models import ModelOptions, load

from .muon import Muon
from .packed_language import PackedLanguage, Questions, questions
from .phases import Phase, phase_of, rate
from .prompts import Kind, draw_prompt, picked
from .state import Log, restore, save
from .validation import Asked, publish, validate

LOG_EVERY, SAVE_SECONDS, VAL_EVERY = 20, 180, 300
TEST_SCENES, TEST_ITEMS = 250, 120


@dataclass(frozen=True)
class Recipe:
    """What one embedded model is trained by.

    model: random weights of torch's seed. packed: its packed forward. shown: what that takes of prompts' pictures of one kind.
    processor: writes the processor's files into a folder. categories: what validation asks. buckets: tokens of a picture up to
    which pictures of validation are batched together.
    """

    name: str
    model: Callable[[], Any]
    packed: type[PackedLanguage]
    shown: Callable[[Sequence[Sequence[np.ndarray]], Kind], Any]
    processor: Callable[[Path], None]
    phases: tuple[Phase, ...]
    categories: tuple[str, ...]
    buckets: tuple[int, ...]


def parse(doc, argv=None):
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="of the clock, of this start")
    parser.add_argument("--steps", type=int, help="end here instead, the rate falling before; default: all steps of the phases")
    parser.add_argument("--publish", action="store_true", help="write OUTPUT_DIR/model from the last checkpoint and end")
    parser.add_argument("--test", action="store_true", help="print what OUTPUT_DIR/model scores on the test split, and its floors, and end")
    parser.add_argument("--threads", type=int, default=2, help="micro-batches at a time; the result is the same")
    parser.add_argument("--eager", action="store_true", help="do not compile (no C++ compiler is needed)")
    return parser.parse_args(argv)


def new_model(recipe: Recipe, seed: int, compiled: bool) -> PackedLanguage:
    """A fresh model with bfloat16 activations; its weights are float32."""
    torch.manual_seed(seed)
    return recipe.packed(recipe.model().train(), torch.bfloat16, compiled)


def optimisers(packed: PackedLanguage) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings, the first layer of the tower, norms and biases."""
    tables = {id(p) for m in packed.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    hidden = [p for p in packed.parameters() if p.ndim == 2 and id(p) not in tables]
    taken = {id(p) for p in hidden}
    rest = [p for p in packed.parameters() if id(p) not in taken]
    return [
        torch.optim.AdamW([{"params": rest, "base": 2e-3}], betas=(0.9, 0.95), weight_decay=0.02),
        Muon([{"params": hidden, "base": 5e-3}], lr=5e-3, weight_decay=0.02),
    ]


def batch_of(recipe: Recipe, phase: Phase, seed: int, step: int, part: int) -> tuple[Any, Questions, list[list[str]]]:
    """Micro-batch number ``part`` of a step, the same on every run: pictures, questions, and categories by prompt and question."""
    rng = np.random.default_rng([seed, step, part])
    kinds = phase.kinds
    kind = kinds[int(rng.choice(len(kinds), p=np.array([k.share for k in kinds]) / sum(k.share for k in kinds)))]
    pictures, blocks, weights, names = [], [], [], []
    for _ in range(kind.batch):
        prompt = draw_prompt(kind, rng)
        chosen = picked(prompt, phase.grounding, rng, kind.questions)
        pictures.append([draw() for draw in prompt.draw])
        blocks.append([c[1] for c in chosen])
        weights.append([c[2] for c in chosen])
        names.append([c[0] for c in chosen])
    return recipe.shown(pictures, kind), questions(np.array(blocks), np.array(weights), rng), names


def gradients(
    recipe: Recipe, packed: PackedLanguage, phase: Phase, seed: int, step: int, part: int
) -> tuple[float, list[Tensor | None], dict[str, list[int]]]:
    """The loss of one micro-batch, its gradients in the order of the parameters, and [right, asked] by category."""
    pictures, asked, names = batch_of(recipe, phase, seed, step, part)
    loss, hits = packed.loss(pictures, asked)
    found = torch.autograd.grad(loss, list(packed.parameters()), allow_unused=True)
    tally: dict[str, list[int]] = {}
    for row, right in zip(names, hits.tolist()):
        for name, hit in zip(row, right):
            pair = tally.setdefault(name, [0, 0])
            pair[0] += hit
            pair[1] += 1
    return loss.item(), list(found), tally


def mean_gradient(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Over micro-batches; None of a parameter that none of them used."""
    there = [part for part in parts if part is not None]
    return sum(there[1:], there[0]) / len(parts) if there else None


def tested(recipe: Recipe, folder: Path) -> int:
    """Prints percent right on the test split by category: with a prompt's pictures, with those of another, and with none."""
    model = load(ModelOptions(model=str(folder), device="cpu")).model
    for pictures in ("own", "another", "none"):
        about = Asked(recipe.shown, recipe.categories, recipe.buckets, "test", TEST_SCENES, TEST_ITEMS, pictures)
        print(json.dumps({"pictures": pictures, **validate(recipe.packed(model), about)}), flush=True)
    return 0


def main(recipe: Recipe, doc: str | None, argv=None) -> int:
    args = parse(doc, argv)
    torch.set_num_threads(1)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.test:
        return tested(recipe, args.output_dir / "model")
    packed = new_model(recipe, args.seed, not args.eager)
    opts = optimisers(packed)
    state = args.output_dir / "state.safetensors"
    first, spent = restore(packed, opts, state)
    if args.publish:
        publish(packed.model, recipe.processor, args.output_dir / "model")
        return 0
    log = Log(args.output_dir / "log.jsonl", first, spent)
    began = saved = time.monotonic()
    parameters = list(packed.parameters())
    pool = ThreadPoolExecutor(args.threads, initializer=torch.set_num_threads, initargs=(1,))
    total = args.steps or sum(p.steps for p in recipe.phases)
    tally: dict[str, tuple[int, int]] = {}
    losses: list[float] = []
    for step in range(first, total):
        phase = phase_of(recipe.phases, step)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = group["base"] * rate(step, total)
        work = functools.partial(gradients, recipe, packed, phase, args.seed, step)
        parts = [work(0), *pool.map(work, range(1, phase.parts))] if step == first else list(pool.map(work, range(phase.parts)))
        for p, *found in zip(parameters, *(part[1] for part in parts)):
            p.grad = mean_gradient(found)
        for loss, _, counted in parts:
            losses.append(loss)
            for name, (right, asked) in counted.items():
                before = tally.get(name, (0, 0))
                tally[name] = (before[0] + right, before[1] + asked)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for opt in opts:
            opt.step()
        if step % LOG_EVERY == LOG_EVERY - 1 or step == total - 1:
            shown = {c: round(100 * tally[c][0] / tally[c][1]) for c in sorted(tally)}
            log(step=step + 1, loss=round(float(np.mean(losses)), 4), hits=shown)
            tally, losses = {}, []
        if step % VAL_EVERY == VAL_EVERY - 1 or step == total - 1:
            log(step=step + 1, val=validate(packed, Asked(recipe.shown, recipe.categories, recipe.buckets)))
        over = (time.monotonic() - began) / 60 >= args.minutes
        if time.monotonic() - saved > SAVE_SECONDS or step == total - 1 or over:
            save(packed, opts, state, step + 1, log.seconds)
            saved = time.monotonic()
        if over:
            return 0
    publish(packed.model, recipe.processor, args.output_dir / "model")
    return 0
