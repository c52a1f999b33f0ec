"""The embedded model and its questions in Python, for trying things out without a download."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mllm_efficient.embedded import FIRST
from mllm_efficient.errors import BadSettingError, did_you_mean
from mllm_efficient.loading.models import ModelOptions, load

from .questions import CATEGORIES
from .suite import Sample, round_robin

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 144  # pixels: what the embedded model's tower sees


def builtin(name: str | None = None, **options: Any) -> tuple[Any, Any]:
    """An embedded model and its processor, as transformers' classes.

    Args:
        name: None is a LLaVA-1.5 of 1.6 M parameters, "qwen" a Qwen3-VL of 2.0 M, "video" a LLaVA-OneVision of 1.7 M for videos.
        options: fields of ``ModelOptions``: ``device``, ``dtype``, ``attn_implementation`` ...

    Returns:
        (model, processor), the model in eval mode on the CPU or, where there is one, the GPU.

    Raises:
        MllmEfficientError: there is no such model; the message names those there are.
    """
    loaded = load(ModelOptions(FIRST if name is None else f"{FIRST}-{name}", **options))
    return loaded.model, loaded.processor


def sample(index: int = 0, split: str = "test", category: str | None = None) -> tuple[Image, str]:
    """One picture of the embedded benchmark, (144, 144), and a question about it, which the model's chat template takes.

    Args:
        index: which question, from 0; the next one is of the next category.
        split: "train", "val" or "test".
        category: "object", "count", "reading" ...: questions of this one alone, the next one about the next picture.

    Raises:
        BadSettingError: there is no such question or category; the message names those there are.
    """
    if category not in (None, *CATEGORIES):
        raise BadSettingError(f"unknown category {category!r}{did_you_mean(str(category), CATEGORIES)} (known: {', '.join(CATEGORIES)})")
    needed = index + 1 if category is None else (index + 1) * len(CATEGORIES)
    found = [] if index < 0 else _of(round_robin(split, needed), category)
    if len(found) <= max(index, 0):
        raise BadSettingError(f"index={index}: the questions of {split!r} are 0 to {len(_of(round_robin(split), category)) - 1}")
    return found[index].picture(SIDE), found[index].question.text


def _of(questions: list[Sample], category: str | None) -> list[Sample]:
    return [q for q in questions if category in (None, q.task)]
