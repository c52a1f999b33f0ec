"""What a recipe names: its base model, its records, and the model that is trained."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..apply.plan import check
from ..compressors.projector import Projector
from ..embedded import is_embedded
from ..errors import MllmEfficientError
from ..loading.lora import base_of_folder
from ..loading.models import Loaded, ModelOptions, load, require_supported
from ..records import read_all
from ..records.files import fail
from ..registry import get_method
from ..trained import folder as trained
from ..trained.files import RANDOM, open_folder
from ..trained.install import install
from .config import DataConfig, Recipe, StageConfig
from .data import builtin_records
from .model import TrainingModel


def loaded_for(recipe: Recipe) -> Loaded:
    """The base model of a recipe, on this process's own device."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1 and recipe.device != "cpu" and torch.cuda.is_available()
    device = f"cuda:{os.environ['LOCAL_RANK']}" if several else recipe.device
    base = base_of_folder(recipe.model)
    if base is not None:
        raise MllmEfficientError(f"model={recipe.model} is an adapter of {base}: merge it with PEFT first, or train on {base}")
    return load(
        ModelOptions(
            model=recipe.model, device=device, dtype=recipe.dtype, attn_implementation=recipe.attn_implementation, seed=recipe.seed,
            processor_kwargs=recipe.processor_kwargs,
        )
    )  # fmt: skip


def data_of(recipe: Recipe, stage: StageConfig) -> DataConfig:
    """What a stage is trained on."""
    return stage.data or recipe.data


def records_of(recipe: Recipe, stage: StageConfig, keep: bool = True, look: bool = True) -> Sequence[Any]:
    """The conversations of a stage, all checked, without those that ``on_bad`` leaves out, which are told.

    keep: generated pictures, in a folder ``data`` beside the output folder. look: whether the images of records must be there.
    """
    data = data_of(recipe, stage)
    if data.builtin is not None:
        folder, natural = Path(recipe.output_dir).parent / "data" if keep else None, not is_embedded(recipe.model)
        records: Sequence[Any] = builtin_records(data.builtin, data.scenes, data.questions, folder, natural, recipe.seed)
    else:
        assert data.path is not None
        records, bad = read_all(Path(data.path), None if data.images is None else Path(data.images), learned=True, look=look)
        if bad and (data.on_bad == "stop" or not records):
            fail(bad)
        if bad and int(os.environ.get("RANK", 0)) == 0:
            print(f"left out: {len(bad)} of {len(bad) + len(records)} records; the first: {bad[0].said}", file=sys.stderr, flush=True)
    least = stage.batch_size * stage.gradient_accumulation * int(os.environ.get("WORLD_SIZE", 1))
    if len(records) < least:
        raise MllmEfficientError(
            f"stage {stage.name}: {len(records)} records are fewer than one step takes, {least}: make the batch smaller"
        )
    return records


def build_model(recipe: Recipe, loaded: Loaded) -> TrainingModel:
    """The base model with the method's projector in it, and a LoRA around it if a stage trains one."""
    adapter = require_supported(loaded)
    method: Any = method_of(recipe)
    for each in [replace(method, tokens=count) for count in recipe.counts] or [method]:
        check(adapter, each)
    own = getattr(*adapter.projector_at) if adapter.projects else torch.nn.Identity()
    if recipe.start is None:
        torch.manual_seed(recipe.seed)
        sizes = method.sizes(adapter.decoder_layers) if method.as_reducer is not None else recipe.settings
        parts = trained.Parts(method.module(*adapter.widths(method), **sizes).to(loaded.model.device, loaded.model.dtype))
    else:
        parts = trained.parts_of(adapter, method)
        lost = method.as_projector is not None or any("lora" in s.train for s in recipe.stages)
        if parts.delta and lost and not any("language_model" in s.train for s in recipe.stages):
            raise MllmEfficientError(f"start={recipe.start} has a language model of its own, which would be lost: train language_model too")
    if recipe.bf16:
        parts.module.float()  # small updates are lost in bfloat16 weights
    install(adapter, method, parts)
    if method.as_reducer is not None:
        adapter.reach_inside()
    else:
        own.requires_grad_(False)
    host = loaded.model
    if any("lora" in s.train for s in recipe.stages):
        host = _with_lora(recipe, host)
    model = TrainingModel(host, adapter, method, own, recipe.routing)
    model.carried = set(parts.delta)
    return model


def method_of(recipe: Recipe) -> Any:
    """The method that a recipe trains, a projector at the first of its counts."""
    cls: Any = get_method(recipe.method)
    weights = recipe.start or RANDOM
    if issubclass(cls, Projector):
        over = recipe.settings.get("over") if recipe.start is None else open_folder(recipe.start).config.get("over")
        return cls(tokens=next(iter(recipe.counts)), weights=weights, **({} if over is None else {"over": over}))
    from ..registry import build

    return build({"method": recipe.method, "weights": weights, **recipe.settings})


def _with_lora(recipe: Recipe, model: Any) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise MllmEfficientError("a LoRA needs peft: pip install peft") from None
    lora = recipe.lora
    targets = rf".*language_model.*\.({'|'.join(lora.targets)})"
    try:
        return get_peft_model(model, LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets))
    except ValueError as error:
        raise MllmEfficientError(f"lora: {str(error).splitlines()[0]}") from error
