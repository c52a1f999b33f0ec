"""The embedded model and its questions in Python, for trying things out without a download."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mllm_efficient.embedded import FIRST
from mllm_efficient.errors import BadSettingError
from mllm_efficient.loading.models import ModelOptions, load

from .suite import round_robin

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 144  # pixels: what the embedded model's tower sees


def builtin(name: str | None = None, **options: Any) -> tuple[Any, Any]:
    """An embedded model and its processor, as transformers' classes.

    Args:
        name: None is a LLaVA-1.5 of 1.6 M parameters, "qwen" a Qwen3-VL of 2.0 M.
        options: fields of ``ModelOptions``: ``device``, ``dtype``, ``attn_implementation`` ...

    Returns:
        (model, processor), the model in eval mode on the CPU or, where there is one, the GPU.

    Raises:
        MllmEfficientError: there is no such model; the message names those there are.
    """
    loaded = load(ModelOptions(**({} if name is None else {"model": f"{FIRST}-{name}"}), **options))
    return loaded.model, loaded.processor


def sample(index: int = 0, split: str = "test") -> tuple[Image, str]:
    """One picture of the embedded benchmark, (144, 144), and a question about it, which the model's chat template takes.

    Args:
        index: which question, from 0; the next one is of the next category.
        split: "train", "val" or "test".

    Raises:
        BadSettingError: there is no such question.
    """
    found = round_robin(split, index + 1) if index >= 0 else []
    if index < 0 or len(found) <= index:
        raise BadSettingError(f"index={index}: the questions of {split!r} are 0 to {len(round_robin(split)) - 1}")
    return found[index].picture(SIDE), found[index].question.text
