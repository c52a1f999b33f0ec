"""What a recipe may say, checked before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import MllmEfficientError, did_you_mean
from ..media.images import RANGES
from .config import DataConfig, LoraConfig, Recipe, RoutingConfig, StageConfig

if TYPE_CHECKING:
    from ..compressors.projector import Projector

PARTS = ("projector", "router", "language_model", "lora", "vision_tower")
OBJECTIVES = ("answers", "distil")
LOSSES = ("hinge", "expected", "removed", "released")
ESTIMATORS = ("scaling", "straight_through", "gumbel", "reinforce")
SAMPLINGS = ("shares", "flops")
ON_BAD = ("stop", "skip")
SCHEDULES = ("cosine", "linear", "constant_with_warmup")


def check(recipe: Recipe) -> None:
    """Raises ``MllmEfficientError`` for what a recipe cannot mean, or what would have no effect."""
    from ..compressors.projector import Projector
    from ..registry import get_method

    cls = get_method(recipe.method)
    if not cls.trained:
        raise MllmEfficientError(f"method {recipe.method} is not trained: tokenflex and dpn are")
    if issubclass(cls, Projector):
        _check_counts(recipe, cls)
    else:
        _check_routed(recipe)
    _check_names(recipe)
    _check_numbers(recipe)
    _check_data(recipe.data, "data")
    for stage in recipe.stages:
        _check_stage(stage)
    _check_parts(recipe)
    if issubclass(cls, Projector):
        _check_projector(recipe)


def _check_counts(recipe: Recipe, cls: type[Projector]) -> None:
    if not recipe.counts:
        raise MllmEfficientError(f"{recipe.method}: counts says which token counts are drawn, as in {{64: 0.2, 144: 0.3, 256: 0.5}}")
    for count, share in recipe.counts.items():
        cls(tokens=count)  # raises for what is no square
        if share <= 0:
            raise MllmEfficientError(f"counts.{count}={share}: a positive weight is wanted")
    if recipe.sampling not in SAMPLINGS:
        raise MllmEfficientError(f"counts.sampling={recipe.sampling}: one of {', '.join(SAMPLINGS)}")
    if recipe.distill < 0:
        raise MllmEfficientError(f"settings.distill={recipe.distill}: at least 0")
    idle = [name for name, on in (("counts.sampling", recipe.sampling != "shares"), ("settings.distill", recipe.distill)) if on]
    if idle and len(recipe.counts) < 2:
        raise MllmEfficientError(f"{idle[0]} has no effect on a single count")
    if recipe.distill and all(stage.objective != "answers" for stage in recipe.stages):
        raise MllmEfficientError("settings.distill has no effect: no stage learns answers")


def _check_names(recipe: Recipe) -> None:
    if not recipe.stages:
        raise MllmEfficientError("the recipe has no stages")
    names = [s.name for s in recipe.stages]
    if len(set(names)) < len(names) or not all(n.replace("_", "").replace("-", "").isalnum() for n in names):
        raise MllmEfficientError(f"stages need names of their own, of letters, digits, - and _: {', '.join(names)}")
    if "final" in names:
        raise MllmEfficientError("a stage cannot be named final, which is the folder of what was trained")


def _check_numbers(recipe: Recipe) -> None:
    for name, least in (("seed", 0), ("workers", 0), ("logging_steps", 1), ("max_length", 1)):
        value = getattr(recipe, name)
        if value is not None and value < least:
            raise MllmEfficientError(f"{name}={value}: at least {least}")
    if recipe.dtype not in ("float32", "bfloat16", "float16"):
        raise MllmEfficientError(f"dtype={recipe.dtype}: float32, bfloat16 or float16")
    if recipe.device not in ("auto", "cpu", "cuda", "mps"):
        raise MllmEfficientError(f"device={recipe.device}: auto, cpu, cuda or mps (CUDA_VISIBLE_DEVICES says which GPU)")
    if recipe.start is not None and recipe.settings:
        raise MllmEfficientError("settings have no effect with start, whose projector has its own")
    if recipe.lora.r < 1 or recipe.lora.alpha < 1 or not recipe.lora.targets:
        raise MllmEfficientError("lora: r and alpha are at least 1, and targets name some layers")


def _check_parts(recipe: Recipe) -> None:
    parts = {part for s in recipe.stages for part in s.train}
    if recipe.lora != LoraConfig() and "lora" not in parts:
        raise MllmEfficientError("lora has no effect: no stage trains it")
    if {"lora", "language_model"} <= parts:
        raise MllmEfficientError("a recipe trains the language model whole or by LoRA, not both")


def _check_projector(recipe: Recipe) -> None:
    parts = {part for s in recipe.stages for part in s.train}
    if "vision_tower" in parts:
        raise MllmEfficientError("the vision tower stays as it is: a trained projector has no place for its weights")
    if recipe.settings.get("over") == "frames":
        raise MllmEfficientError("settings.over=frames: training takes no videos; train over=views, whose weights over=frames uses too")
    if "router" in parts or recipe.routing != RoutingConfig() or any(s.routing != "learned" for s in recipe.stages):
        raise MllmEfficientError(f"{recipe.method} has no router: leave router and routing out")


def _settled(recipe: Recipe) -> dict[str, Any]:
    """The settings that a router is trained under. Raises for those that it has not."""
    from ..compressors.dpn import DEFAULTS
    from ..registry import build
    from ..trained.files import RANDOM

    odd = [key for key in recipe.settings if key not in DEFAULTS]
    if odd:
        raise MllmEfficientError(f"settings.{odd[0]}: a router is trained under {', '.join(DEFAULTS)}{did_you_mean(odd[0], DEFAULTS)}")
    method: Any = build({"method": recipe.method, "weights": recipe.start or RANDOM, **recipe.settings})
    settled: dict[str, Any] = method.settled
    return settled


def _check_routed(recipe: Recipe) -> None:
    """What a recipe says of a method that routes."""
    routing = recipe.routing
    if recipe.counts:
        raise MllmEfficientError(f"counts have no effect: the router of {recipe.method} says how many tokens stay")
    if recipe.sampling != "shares" or recipe.distill:
        name = "settings.distill" if recipe.distill else "counts.sampling"
        raise MllmEfficientError(f"{name} is of projectors, whose counts are drawn, and {recipe.method} has a router")
    if routing.loss not in LOSSES or routing.estimator not in ESTIMATORS:
        raise MllmEfficientError(f"routing: loss is one of {', '.join(LOSSES)} and estimator one of {', '.join(ESTIMATORS)}")
    if routing.weight < 0 or routing.target < 0 or routing.samples < 1:
        raise MllmEfficientError("routing: weight and target are at least 0 and samples at least 1")
    if (routing.estimator == "reinforce") != (routing.samples > 1):
        raise MllmEfficientError("routing: estimator=reinforce and samples of at least 2 go together")
    scales = _settled(recipe)["scaling"]
    if routing.estimator in ("straight_through", "gumbel") and scales:
        raise MllmEfficientError(f"routing: estimator={routing.estimator} stands in for the factor, which scaling=false takes away")
    if routing.estimator == "scaling" and not scales:
        raise MllmEfficientError("routing: estimator=scaling needs the factor, and scaling=false takes it away: use another estimator")
    for stage in recipe.stages:
        if stage.objective != "answers":
            raise MllmEfficientError(f"stage {stage.name}: objective={stage.objective} is for projectors: a router learns from answers")
        if stage.routing not in ("learned", "random"):
            raise MllmEfficientError(f"stage {stage.name}: routing={stage.routing} is not learned or random")
        if stage.routing == "random" and "router" in stage.train:
            raise MllmEfficientError(f"stage {stage.name}: a router does not learn while routing is random: leave router out of train")
    parts = {part for stage in recipe.stages for part in stage.train}
    if "router" not in parts:
        raise MllmEfficientError("no stage trains the router")
    if "lora" in parts and parts & {"projector", "vision_tower"}:
        raise MllmEfficientError("a LoRA is published alone: leave projector and vision_tower out of train, or train language_model whole")


def _check_data(data: DataConfig, where: str) -> None:
    if (data.path is None) == (data.builtin is None):
        raise MllmEfficientError(f"{where}: give path (records in JSON or JSONL) or builtin (train or val), one of them")
    if data.builtin is not None and data.builtin not in ("train", "val"):
        raise MllmEfficientError(f"{where}.builtin={data.builtin}: train or val; test questions are for testing")
    if data.on_bad not in ON_BAD or data.image_range not in RANGES:
        raise MllmEfficientError(f"{where}: on_bad is one of {', '.join(ON_BAD)} and image_range one of {', '.join(RANGES)}")
    idle = [name for name in ("images", "on_bad", "image_range") if getattr(data, name) != getattr(DataConfig, name)]
    if data.builtin is not None and idle:
        raise MllmEfficientError(f"{where}.{idle[0]} has no effect on generated data")
    if data.scenes < 1 or data.questions < 1:
        raise MllmEfficientError(f"{where}: scenes and questions are at least 1")


def _check_stage(stage: StageConfig) -> None:
    where = f"stage {stage.name}"
    odd = [p for p in (*stage.train, *stage.learning_rates) if p not in PARTS]
    if odd or not stage.train:
        raise MllmEfficientError(f"{where}: train and learning_rates name some of {', '.join(PARTS)}, not {odd or 'nothing'}")
    idle = [p for p in stage.learning_rates if p not in stage.train]
    if idle:
        raise MllmEfficientError(f"{where}: a learning rate of {', '.join(idle)} has no effect: it is not trained")
    if stage.objective not in OBJECTIVES or stage.schedule not in SCHEDULES:
        raise MllmEfficientError(f"{where}: objective is one of {', '.join(OBJECTIVES)} and schedule one of {', '.join(SCHEDULES)}")
    if stage.objective == "distil" and stage.train != ("projector",):
        raise MllmEfficientError(f"{where}: distil fits the projector alone: train: [projector]")
    if (stage.steps is None) == (stage.epochs is None):
        raise MllmEfficientError(f"{where}: give steps or epochs, one of them")
    positive = {n: getattr(stage, n) for n in ("batch_size", "gradient_accumulation", "save_steps", "learning_rate", "clip")}
    positive |= {"steps": stage.steps, "epochs": stage.epochs}
    for name, value in positive.items():
        if value is not None and value <= 0:
            raise MllmEfficientError(f"{where}: {name}={value} must be positive")
    if stage.weight_decay < 0 or any(rate <= 0 for rate in stage.learning_rates.values()):
        raise MllmEfficientError(f"{where}: weight_decay is at least 0 and learning_rates are positive")
    if not 0 <= stage.warmup < 1:
        raise MllmEfficientError(f"{where}: warmup={stage.warmup} is a fraction of the steps, below 1")
    if stage.data is not None:
        _check_data(stage.data, f"{where}: data")
