"""Training recipes: YAML files with ``key=value`` overrides, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import MllmEfficientError, did_you_mean, quoted, shortened
from ..media.images import RANGES
from ..parsing import parse_yaml, read_yaml

PARTS = ("projector", "router", "language_model", "lora", "vision_tower")
OBJECTIVES = ("answers", "distil")
LOSSES = ("hinge", "expected", "removed", "released")
ESTIMATORS = ("scaling", "straight_through", "gumbel", "reinforce")
LARGEST = 2**63 - 1
ON_BAD = ("stop", "skip")
SCHEDULES = ("cosine", "linear", "constant_with_warmup")


@dataclass(frozen=True)
class DataConfig:
    """path: records in JSON or JSONL, images: the folder its image paths are in; or builtin: a split of the embedded
    benchmark's generator, with so many scenes and questions per scene.

    on_bad: "stop" at the first record that cannot be used, or "skip" it and count it in the log. image_range: "full", or "auto",
    which stretches pictures of more than 8 bits."""

    path: str | None = None
    images: str | None = None
    builtin: str | None = None
    scenes: int = 20_000
    questions: int = 12
    on_bad: str = "stop"
    image_range: str = "full"


@dataclass(frozen=True)
class LoraConfig:
    """As PEFT has them. targets: names of the language model's linear layers."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class RoutingConfig:
    """How a router learns (DPN, arXiv 2503.20322).

    The routing loss is weight x max(0, target - level), the mean over the layers that pool, where a kernel's level is its
    number in ``kernels`` and loss says what is averaged over the images: "hinge" the level of the kernel that the forward
    pass used times its probability; "expected" the mean level under the probabilities; "removed" the same where a level is
    the share of the tokens that a kernel takes away, so that with target 1 the weight is the price of all tokens;
    "released" as the paper's released code has it, the level of the likeliest kernel times its probability, one mean over
    all layers.

    estimator: what tells the router which kernel answers well. "scaling": its probability in front of the tokens, as
    published; "straight_through", "gumbel": that gradient without the factor; "reinforce": the score function, where every
    question is asked ``samples`` times and held against its other answers.
    """

    weight: float = 0.001
    target: float = 1.5
    loss: str = "hinge"
    estimator: str = "scaling"
    samples: int = 1


@dataclass(frozen=True)
class StageConfig:
    """One stage. train: the parts whose weights move, of ``PARTS``. objective: "answers" is the cross-entropy of the
    answers; "distil" fits a projector to the model's own one, whose tokens are pooled to the same count, without the
    language model.

    steps or epochs; batch_size: of one process, before gradient_accumulation. learning_rates: of single parts, in place
    of learning_rate. save_steps: a checkpoint to resume from; only the newest stays. routing: "random" draws a router's
    kernels evenly. data: in place of the recipe's.
    """

    name: str
    train: tuple[str, ...]
    objective: str = "answers"
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 16
    gradient_accumulation: int = 1
    learning_rate: float = 2e-5
    learning_rates: dict[str, float] = field(default_factory=dict)
    weight_decay: float = 0.0
    warmup: float = 0.03
    schedule: str = "cosine"
    clip: float = 1.0
    save_steps: int = 500
    gradient_checkpointing: bool = False
    routing: str = "learned"
    data: DataConfig | None = None


@dataclass(frozen=True)
class Recipe:
    """A whole training.

    model: as every command takes it. method: what is trained. settings: of the projector or router, as its class takes
    them. counts: of a projector, the visual tokens of a batch and how likely each is drawn; one entry trains at one count.
    routing: how a router learns. start: a
    trained folder whose weights to go on from. shape: a shipped shape that --dry-run takes the model's sizes from, where the
    model is not at hand. bf16: autocast. max_length: tokens of a conversation before compression;
    turns that go beyond are left out. independent_turns: every turn sees the images and itself alone, so that one
    sequence stands for many conversations. processor_kwargs: of the image processor, such as {max_pixels: 1003520}.
    """

    model: str
    method: str
    output_dir: str
    data: DataConfig
    stages: tuple[StageConfig, ...]
    counts: dict[int, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    start: str | None = None
    shape: str | None = None
    seed: int = 0
    dtype: str = "float32"
    device: str = "auto"
    attn_implementation: str | None = None
    processor_kwargs: dict[str, Any] = field(default_factory=dict)
    bf16: bool = False
    max_length: int | None = None
    independent_turns: bool = False
    lora: LoraConfig = field(default_factory=LoraConfig)
    logging_steps: int = 10
    workers: int = 0


def read(path: Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML file, or one that ships by its name alone, ``tokenflex_builtin``.

    overrides: ``"seed=1"``, ``"stages.0.steps=10"``, ``"data.path=d.json"``.

    Raises ``MllmEfficientError`` naming the key that is wrong, and the nearest that is known.
    """
    path = path if path.exists() or path.suffix else _shipped(path.name)
    try:
        content = read_yaml(path)
    except OSError as error:
        raise MllmEfficientError(f"cannot read the recipe {path}: {error.strerror}") from None
    if not isinstance(content, dict):
        raise MllmEfficientError(f"{path}: a recipe is a mapping with model, method, output_dir, data and stages")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise MllmEfficientError(f"{override!r} is not key=value, as in seed=1 or stages.0.steps=10")
        try:
            read = parse_yaml(value)
        except MllmEfficientError as error:
            raise MllmEfficientError(f"{shortened(override)!r}: {error}") from None
        _put(content, key.strip().split("."), read, shortened(override))
    recipe = _make(Recipe, content, "")
    _check(recipe)
    return recipe


def _shipped(name: str) -> Path:
    from importlib.resources import files

    folder = Path(str(files("mllm_efficient.configs"))) / "train"
    path, known = folder / f"{name}.yaml", sorted(p.stem for p in folder.glob("*.yaml"))
    if not path.is_file():
        raise MllmEfficientError(f"no recipe {name}{did_you_mean(name, known)} (shipped: {', '.join(known)}; or a YAML file)")
    return path


def _put(content: Any, keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        if isinstance(content, list):
            if not _number(key) or int(key) >= len(content):
                raise MllmEfficientError(f"{override!r}: there is no stage {key}, they are numbered 0 to {len(content) - 1}")
            content = content[int(key)]
        else:
            content = content.setdefault(key, {})
        if not isinstance(content, dict | list):
            raise MllmEfficientError(f"{override!r}: {key} has no settings of its own")
    last: Any = keys[-1]
    if isinstance(content, list):
        if not _number(last) or int(last) >= len(content):
            raise MllmEfficientError(f"{override!r}: there is no entry {last}")
        last = int(last)
    elif _number(last):
        last = int(last)
    content[last] = value


def _number(key: str) -> bool:
    return key.isascii() and key.isdigit() and len(key) < 10


def _make(cls: Any, content: Any, where: str) -> Any:
    """A dataclass from plain data, every value checked for its type."""
    if not isinstance(content, dict):
        raise MllmEfficientError(f"{where.rstrip('.')}: a mapping is wanted, not {quoted(content)}")
    hints, fields = typing.get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    for key in content:
        if key not in fields:
            hint = did_you_mean(str(key), fields)
            raise MllmEfficientError(f"the recipe has no setting {where}{shortened(key)}{hint}")
    missing = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING and n not in content]
    if missing:
        raise MllmEfficientError(f"the recipe lacks {', '.join(where + name for name in missing)}")
    return cls(**{key: _value(hints[key], value, f"{where}{key}") for key, value in content.items()})


def _value(kind: Any, value: Any, where: str) -> Any:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType or origin is typing.Union:
        if value is None and type(None) in inner:
            return None
        return _value(next(k for k in inner if k is not type(None)), value, where)
    if dataclasses.is_dataclass(kind):
        return _make(kind, value, f"{where}.")
    if origin is tuple:
        if not isinstance(value, list):
            raise MllmEfficientError(f"{where}={quoted(value)}: a list is wanted")
        return tuple(_value(inner[0], v, f"{where}.{i}") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise MllmEfficientError(f"{where}={quoted(value)}: a mapping is wanted")
        return {_value(inner[0], k, where): _value(inner[1], v, f"{where}.{k}") for k, v in value.items()}
    if kind is Any:
        return value
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string
        try:
            value = float(value)
        except ValueError:
            raise MllmEfficientError(f"{where}={quoted(value)}: a number is wanted") from None
    if isinstance(value, int) and not -LARGEST <= value <= LARGEST:
        raise MllmEfficientError(f"{where}={quoted(value)}: a number that large has no use here")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise MllmEfficientError(f"{where}={quoted(value)}: {kind.__name__} is wanted")
    if isinstance(value, float) and not math.isfinite(value):
        raise MllmEfficientError(f"{where}={quoted(value)}: a finite number is wanted")
    return value


def _check(recipe: Recipe) -> None:
    from ..compressors.projector import Projector
    from ..registry import get_method

    cls = get_method(recipe.method)
    if not cls.trained:
        raise MllmEfficientError(f"method {recipe.method} is not trained: tokenflex and dpn are")
    if issubclass(cls, Projector):
        if not recipe.counts:
            raise MllmEfficientError(f"{recipe.method}: counts says which token counts are drawn, as in {{64: 0.2, 144: 0.3, 256: 0.5}}")
        for count, share in recipe.counts.items():
            cls(tokens=count)  # raises for what is no square
            if share <= 0:
                raise MllmEfficientError(f"counts.{count}={share}: a positive weight is wanted")
    else:
        _check_routed(recipe)
    if not recipe.stages:
        raise MllmEfficientError("the recipe has no stages")
    names = [s.name for s in recipe.stages]
    if len(set(names)) < len(names) or not all(n.replace("_", "").replace("-", "").isalnum() for n in names):
        raise MllmEfficientError(f"stages need names of their own, of letters, digits, - and _: {', '.join(names)}")
    if "final" in names:
        raise MllmEfficientError("a stage cannot be named final, which is the folder of what was trained")
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
    _check_data(recipe.data, "data")
    for stage in recipe.stages:
        _check_stage(stage)
    if recipe.lora != LoraConfig() and not any("lora" in s.train for s in recipe.stages):
        raise MllmEfficientError("lora has no effect: no stage trains it")
    kinds = {part for s in recipe.stages for part in s.train}
    if {"lora", "language_model"} <= kinds:
        raise MllmEfficientError("a recipe trains the language model whole or by LoRA, not both")
    if issubclass(cls, Projector):
        if "vision_tower" in kinds:
            raise MllmEfficientError("the vision tower stays as it is: a trained projector has no place for its weights")
        if "router" in kinds or recipe.routing != RoutingConfig() or any(s.routing != "learned" for s in recipe.stages):
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
