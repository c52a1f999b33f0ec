"""The folder of what was trained."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..trained import folder as trained
from .config import DataConfig, Recipe
from .model import TrainingModel


def publish(recipe: Recipe, model: TrainingModel, base: dict[str, Any], folder: Path) -> None:
    """Writes the trained method's folder, the language model's weights with it where a stage moved them.

    It appears whole or not at all. Raises ``MllmEfficientError`` for weights that are no numbers.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    about: dict[str, Any] = {"trained_on": recipe.model, "recipe": lasting(recipe)}
    shown: Any = replace(model.method, tokens=max(recipe.counts)) if recipe.counts else model.method
    if shown.as_reducer is not None:
        about |= {**shown.as_trained, "kept": model.kept}
    trained.save(partial, shown, model.trained_module, base, about)
    kinds = {part for s in recipe.stages for part in s.train}
    if "lora" in kinds:
        model.host.save_pretrained(partial / trained.DELTA)
    else:
        hosts = ("language_model", *(("projector", "vision_tower") if shown.as_reducer is not None else ()))
        named = {name.removeprefix("host."): (part, p) for part in hosts for name, p in model.parts()[part]}
        moved: dict[str, torch.Tensor] = {name: p for name, (part, p) in named.items() if part in kinds or name in model.carried}
        if moved:
            trained.save_delta(partial, moved)
    trained.move(partial, folder)


def lasting(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe the weights depend on: everything but where and how fast it runs."""
    every = json.loads(json.dumps(asdict(recipe)))
    for data in [every["data"], *(s["data"] for s in every["stages"] if s["data"])]:
        for name in ("on_bad", "image_range"):  # which recipes did not have at first
            if data[name] == getattr(DataConfig, name):
                del data[name]
    for name in ("sampling", "distill"):  # nor these
        if every[name] == getattr(Recipe, name):
            del every[name]
    return {k: v for k, v in every.items() if k not in ("output_dir", "shape", "device", "workers", "logging_steps")}
