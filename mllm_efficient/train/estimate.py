"""What a recipe will do and need, found without training: data checked, tokens counted, steps and memory estimated."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..apply.plan import check
from ..errors import MllmEfficientError
from ..loading.processor import apply, open_processor
from ..measure.flops import load_shape
from ..measure.shapes import ModelShape, with_settings
from ..patches import adapter_for
from .build import data_of, method_of
from .config import Recipe, StageConfig
from .survey import survey

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SAMPLE = 256  # generated scenes, all of which have one size
CHARACTERS = 4  # of a token of English text, where no tokenizer is at hand
GB = 1e9


def estimate(recipe: Recipe, records: dict[str, Sequence[Any]]) -> dict[str, Any]:
    """Rows by stage and what they rest on. records: of each stage, checked already.

    Raises ``MllmEfficientError`` where neither the model nor a shape of it is at hand.
    """
    shape = with_settings(load_shape(recipe.shape or recipe.model), recipe.processor_kwargs)
    method = method_of(recipe)
    for each in [replace(method, tokens=count) for count in recipe.counts] or [method]:
        check(shape.rules, each)
    processor, why = _processor(recipe)
    world = int(os.environ.get("WORLD_SIZE", 1))
    parameters = count_parameters(recipe, shape)
    rows = [_row(recipe, stage, records[stage.name], shape, processor, parameters, world) for stage in recipe.stages]
    return {
        "rows": rows,
        "meta": {
            "model": recipe.model, "shape": shape.name, "method": recipe.method, "parameters": parameters, "processes": world,
            "tokens": why or f"counted by the model's processor on all records (of generated scenes on {SAMPLE} of them)",
            "memory": "weights, gradients and two Adam moments in the weights' dtype (float32 for projector and LoRA under bf16), "
            "34 bytes x tokens x width per decoder layer in half precision (Korthikanti et al., arXiv 2205.05198, attention "
            "matrices not kept), and the logits; of one process, nothing sharded",
        },
    }  # fmt: skip


def _processor(recipe: Recipe) -> tuple[Any, str | None]:
    """The model's processor, and what stands in for it where there is none."""
    from transformers import AutoConfig

    from ..embedded import model_source

    source = model_source(recipe.model)
    try:
        config = AutoConfig.from_pretrained(source)
        processor = open_processor(source, config)
        apply(processor, config, recipe.processor_kwargs)
        return processor, None
    except MllmEfficientError:
        raise
    except Exception as error:  # whatever the libraries below raise without the files
        return (
            None,
            f"no processor of {recipe.model} at hand ({type(error).__name__}): {CHARACTERS} characters counted as a token, "
            "and the usual picture",
        )


def count_parameters(recipe: Recipe, shape: ModelShape) -> dict[str, int]:
    """Parameters of each part; of the projector the method's own."""
    from ..measure.counter import build_on_meta

    model = build_on_meta(shape)
    out = {"projector": 0, "router": 0, "language_model": 0, "vision_tower": 0}
    for name, parameter in model.named_parameters():
        part = "projector" if "multi_modal_projector" in name else "vision_tower" if "vision_tower" in name else "language_model"
        out[part] += parameter.numel()
    method = method_of(recipe)
    with torch.device("meta"):
        if method.as_reducer is not None:
            router = method.module(shape.decoder.width, shape.decoder.width, **method.sizes(shape.decoder.layers))
            out["router"] = sum(p.numel() for p in router.parameters())
        else:
            projector = method.module(shape.projector.inputs, shape.projector.outputs, **recipe.settings)
            out["projector"] = sum(p.numel() for p in projector.parameters())
    out["lora"] = _lora_parameters(recipe, model) if any("lora" in s.train for s in recipe.stages) else 0
    return out


def _lora_parameters(recipe: Recipe, model: Any) -> int:
    found = [
        module for name, module in model.named_modules()
        if "language_model" in name and name.rpartition(".")[2] in recipe.lora.targets and hasattr(module, "in_features")
    ]  # fmt: skip
    if not found:
        raise MllmEfficientError(f"lora.targets name no layer of the language model: {', '.join(recipe.lora.targets)}")
    return sum(recipe.lora.r * (m.in_features + m.out_features) for m in found)


def _row(
    recipe: Recipe, stage: StageConfig, records: Sequence[Any], shape: ModelShape, processor: Any, parameters: dict[str, int], world: int
) -> dict[str, Any]:
    found = _surveyed(recipe, stage, records, processor, shape)
    tokens = (
        _rough(records, shape) if processor is None else {f"{n}_mean": found[f"{n}_tokens"]["mean"] for n in ("text", "answer", "visual")}
    )
    usual = _usual(shape)
    if recipe.counts:
        most, drawn = max(recipe.counts), sum(count * weight for count, weight in recipe.counts.items()) / sum(recipe.counts.values())
    else:  # every layer up to the first pooling sees all of them
        layers = method_of(recipe).per_layer(usual, shape.decoder.layers)
        most, drawn = usual, sum(layers) / len(layers)
    each = stage.batch_size * stage.gradient_accumulation * world
    per_epoch = math.ceil(len(records) // (stage.batch_size * world) / stage.gradient_accumulation)
    steps = stage.steps if stage.steps is not None else math.ceil(per_epoch * (stage.epochs or 1))
    text = tokens["text_mean"]
    visual = most * (tokens["visual_mean"] / usual)
    trained = sum(parameters[part] for part in stage.train)
    fresh = ("projector", "lora") if recipe.counts else ("router", "lora")  # what is new stays in float32 under bf16
    size, half = BYTES[recipe.dtype], 2 if recipe.bf16 else BYTES[recipe.dtype]
    moving = sum(parameters[part] * (4 if recipe.bf16 and part in fresh else size) for part in stage.train)
    everything = sum(v for k, v in parameters.items() if k != "lora") + parameters["lora"]
    language = stage.objective == "answers"
    width, layers = shape.decoder.width, shape.decoder.layers
    kept = stage.batch_size * (text + visual) * width * half
    activations = kept * (layers + 17 if stage.gradient_checkpointing else 17 * layers) if language else 0
    logits = stage.batch_size * (text + visual) * shape.decoder.vocabulary * (half + 4) if language else 0
    return {
        "stage": stage.name, "objective": stage.objective, "train": list(stage.train), "records": len(records), "steps": steps,
        "batch": each, "text_tokens": round(text, 1), "answer_tokens": round(tokens["answer_mean"], 1),
        "visual_tokens_full": round(tokens["visual_mean"], 1),
        "visual_tokens_drawn": round(drawn * tokens["visual_mean"] / usual, 1),
        "trained_parameters": trained, "weights_gb": round(everything * size / GB, 2), "optimizer_gb": round(3 * moving / GB, 2),
        "activations_gb": round((activations + logits) / GB, 2),
        **{name: found.get(name) for name in ("cut_answers", "lost_answers", "unreadable", "tiny")},
        "memory_gb": round((everything * size + 3 * moving + activations + logits) / GB, 1),
    }  # fmt: skip


def _usual(shape: ModelShape) -> int:
    return shape.rules.typical()[0].shape.n


def _surveyed(recipe: Recipe, stage: StageConfig, records: Sequence[Any], processor: Any, shape: ModelShape) -> dict[str, Any]:
    """``survey`` of a stage's records, with a progress bar where there is a terminal."""
    from tqdm import tqdm

    from ..measure.counter import build_on_meta

    sample = None if data_of(recipe, stage).builtin is None else SAMPLE
    independent = recipe.independent_turns and stage.objective == "answers"
    adapter = None if processor is None else adapter_for(build_on_meta(shape))
    with tqdm(total=len(records) if sample is None else min(sample, len(records)), desc=stage.name, unit="record", disable=None) as bar:
        return survey(records, processor, recipe.max_length, independent, sample, bar.update, adapter)


def _rough(records: Sequence[Any], shape: ModelShape) -> dict[str, float]:
    """The same statistics from characters."""
    every = max(1, len(records) // 2048)
    some = [records[i] for i in range(0, len(records), every)]
    answers = [sum(len(answer) for _, answer in r.turns) / CHARACTERS for r in some]
    questions = [sum(len(question) for question, _ in r.turns) / CHARACTERS for r in some]
    images = [len(r.images) for r in some]
    n = len(some)
    return {
        "text_mean": (sum(answers) + sum(questions)) / n, "answer_mean": sum(answers) / n,
        "visual_mean": _usual(shape) * sum(images) / n,
    }  # fmt: skip
