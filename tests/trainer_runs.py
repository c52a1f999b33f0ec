"""Runs of transformers' Trainer on wrapped tiny models, and the loss of each of their steps by hand.

``python -m torch.distributed.run --nproc_per_node 2 -m tests.trainer_runs FILE`` writes what Trainer reports on two processes.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy

import mllm_efficient as me

from . import families
from .families import VOCABULARY
from .pairs import pairwise

NAMES = ("llava", "llava_next", "llava_onevision", "internvl", "qwen2_5_vl")
SPECS = ("divprune:keep=0.3", "pool:keep=0.3", "fastv:layer=1,ratio=0.3", "none")
SIDES = ("left", "right")
RUNS = pairwise(product(NAMES, SPECS[:-1], SIDES, (1, 2)))  # model, method, padding side, micro-batches in a step
# Micro-batches of unequal length, in which rows differ too; the last has no picture.
BATCHES = (("one image", "long text"), ("two images", "text only"), ("long text", "touching images"), ("text only", "text only"))


@functools.cache
def _llava():
    config = transformers.LlavaConfig(
        vision_config=families.clip(24, 6), text_config=families.llama(), image_token_index=VOCABULARY["<image>"], image_seq_length=16
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlavaForConditionalGeneration(config).state_dict(), config


def tiny(name: str):
    """A fresh tiny model of a family, LLaVA-1.5's among them. Trainer sets it to training; nothing in it drops out."""
    if name != "llava":
        return families.tiny(name)
    weights, config = _llava()
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.load_state_dict(weights)
    return model


@functools.cache
def processor(name: str, side: str):
    if name != "llava":
        return families.FAMILIES[name].processor(side)
    pictures = transformers.CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    return transformers.LlavaProcessor(
        image_processor=pictures, tokenizer=families.tokenizer(side), patch_size=6, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip


def make(name: str, *rows: str, side: str = "left") -> dict[str, Tensor]:
    """A batch as careless collators make it: labels on every id, of placeholders and padding too."""
    if name == "llava":
        texts = [families.PROMPTS[row].replace("I ", "<image> ") for row in rows]
        given = [picture for row in rows for picture in families.pictures(row)]
        batch = dict(processor(name, side)(text=texts, images=given or None, return_tensors="pt", padding=True))
    else:
        batch = families.make(name, *rows, padding_side=side)
    return {**batch, "labels": batch["input_ids"].clone()}


def arguments(folder: Path | str, **settings: Any):
    """Of a run whose weights stay, so that every step's loss is that of the same model."""
    given: dict[str, Any] = {
        "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "learning_rate": 0.0, "num_train_epochs": 1, "logging_steps": 1,
        "report_to": [], "save_strategy": "no", "remove_unused_columns": False, "use_cpu": True, "disable_tqdm": True,
        "train_sampling_strategy": "sequential", "optim": "sgd",
    }  # fmt: skip
    return transformers.TrainingArguments(output_dir=str(folder), **given | settings)


def trainer(model: Any, name: str, side: str, batches: Sequence[Sequence[str]] = BATCHES, more: dict[str, Any] | None = None, **settings):
    """A Trainer over these micro-batches, in order. settings: of ``TrainingArguments``."""
    return transformers.Trainer(
        model, arguments(tempfile.mkdtemp(), **settings), train_dataset=list(range(len(batches))), eval_dataset=list(range(len(batches))),
        data_collator=lambda items: make(name, *batches[items[0]], side=side), **more or {},
    )  # fmt: skip


def reported(run: Any) -> list[float]:
    """The loss of each step of a run."""
    run.train()
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def predicted(name: str, spec: str, row: str) -> tuple[Tensor, Tensor]:
    """Logits (A, V) of a row's words on its own shortened prompt, alone and without padding, and the words (A,)."""
    return predicted_of(me.wrap(tiny(name), spec), make(name, row))


@torch.no_grad()
def predicted_of(model: Any, row: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """``predicted`` of one row as inputs. In-decoder methods read it up to the first label behind the image."""
    out, ids = model(**row), row["input_ids"][0]
    left = ids if not hasattr(out, "visual_keep_mask") or out.logits.shape[1] == len(ids) else ids[out.visual_keep_mask[0]]
    words = ~torch.isin(left, torch.tensor([VOCABULARY[token] for token in ("<image>", "<IMG_CONTEXT>", "<|image_pad|>")]))
    words[0] = False
    return out.logits[0, :-1][words[1:]], left[words]


def by_hand(name: str, spec: str, rows: Sequence[str]) -> tuple[float, int]:
    """Summed loss of a micro-batch's words and their number."""
    parts = [predicted(name, spec, row) for row in rows]
    return sum(float(cross_entropy(*part, reduction="sum")) for part in parts), sum(len(words) for _, words in parts)


def step_loss(name: str, parts: Sequence[tuple[float, int]]) -> float:
    """The loss of a step of these micro-batches: of all labels, or the mean of means for a class that takes no count."""
    if getattr(type(tiny(name)), "accepts_loss_kwargs", True):
        return sum(loss for loss, _ in parts) / sum(count for _, count in parts)
    return sum(loss / count for loss, count in parts) / len(parts)


def main(path: str) -> None:
    out = {}
    for name, spec, side, accumulation in RUNS:
        run = trainer(me.wrap(tiny(name), spec), name, side, gradient_accumulation_steps=accumulation)
        out["|".join((name, spec, side, str(accumulation)))] = reported(run)
    if run.is_world_process_zero():
        Path(path).write_text(json.dumps(out))


if __name__ == "__main__":
    main(sys.argv[1])
