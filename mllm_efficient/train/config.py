"""Training recipes: YAML files as dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


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
    turns that go beyond are left out. sampling (``counts.sampling``): "shares" draws counts as ``counts`` says, "flops" draws groups
    of counts with about equal FLOPs evenly, and within a group by its shares. distill (``settings.distill``): of a projector, the
    weight of a consistency loss, by which a count learns from the largest one's answers where these are right.
    independent_turns: every turn sees the images and itself alone, so that one sequence stands for many conversations.
    processor_kwargs: of the image processor, such as {max_pixels: 1003520}.
    """

    model: str
    method: str
    output_dir: str
    data: DataConfig
    stages: tuple[StageConfig, ...]
    counts: dict[int, float] = field(default_factory=dict)
    sampling: str = "shares"
    distill: float = 0.0
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
