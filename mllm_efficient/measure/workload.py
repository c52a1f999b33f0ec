"""What is measured: prompts of so many images and text tokens, made for any supported model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..apply.locate import locate, visual_in, written
from ..errors import MllmEfficientError
from ..loading.models import Loaded
from ..patches.rules import Size, Views
from ..tokens import VisualShape

QUESTION = "Describe what is shown."


@dataclass(frozen=True)
class Workload:
    """One prompt: images of ``image_size`` (width, height), text tokens beside their placeholders, tokens to generate.

    image_size: None is the size the tower takes, or 672 x 672 where it takes any.
    """

    image_size: Size | None = None
    images: int = 1
    text_tokens: int = 64
    output_tokens: int = 32

    def __post_init__(self):
        for name in ("images", "text_tokens", "output_tokens"):
            if getattr(self, name) < 1:
                raise MllmEfficientError(f"{name} must be at least 1, not {getattr(self, name)}")

    def to_dict(self) -> dict[str, Any]:
        return {
            "image_size": list(self.image_size) if self.image_size else None, "images": self.images,
            "text_tokens": self.text_tokens, "output_tokens": self.output_tokens,
        }  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """A batch of equal prompts on the model's device.

    call: what ``generate`` takes. text_only: the same without the images. image_size: (width, height) of the images.
    visual_tokens: N of a prompt. lengths: tokens of a prompt with and without images. preprocess: makes the inputs anew
    from images in memory; None where there is no processor.
    """

    call: dict[str, Any]
    text_only: dict[str, Any]
    image_size: Size
    visual_tokens: int
    lengths: tuple[int, int]
    preprocess: Callable[[], Any] | None = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        sizes = {"image_size": list(self.image_size), "visual_tokens": self.visual_tokens}
        return sizes | dict(zip(("prompt_tokens", "text_tokens"), self.lengths))


def make_inputs(loaded: Loaded, adapter: Any, workload: Workload, batch: int, seed: int = 0) -> Inputs:
    """``batch`` prompts of a workload: by the model's processor, or, without one, of pixels and tokens drawn from ``seed``."""
    size = workload.image_size or usual_size(adapter)
    preprocess = None
    if loaded.processor is None:
        images = _images(adapter.with_settings(loaded.picture_settings), size, workload.images)
        one = drawn_inputs(adapter, images, seed)
        ids = _with_text(adapter, [image.shape for image in images], workload.text_tokens, seed)
        call = {k: adapter.joined(k, [v] * batch) for k, v in one.items()} | {"input_ids": ids.expand(batch, -1).contiguous()}
        call |= {"attention_mask": torch.ones_like(call["input_ids"]), **loaded.call}
        if adapter.typed:
            call[adapter.typed] = visual_in(call["input_ids"], adapter.placeholders).int()
        device = adapter.model.device
        call = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in call.items()}
    else:
        pictures = [noise(size, seed + i) for i in range(workload.images)] * batch
        prompts = [loaded.prompt(QUESTION, workload.images)] * batch

        def preprocess():
            return loaded.inputs(prompts, pictures)

        call = lengthened(adapter, preprocess(), workload.text_tokens, seed)
    visual, shapes = _visual(adapter, call)
    text_only = {"input_ids": call["input_ids"][~visual].view(batch, -1)}
    text_only["attention_mask"] = torch.ones_like(text_only["input_ids"])
    if adapter.typed in call:
        text_only[adapter.typed] = torch.zeros_like(text_only["input_ids"])
    n = sum(shape.n for shape in shapes) // batch
    return Inputs(call, text_only, size, n, (visual.shape[1], text_only["input_ids"].shape[1]), preprocess)


def usual_size(adapter: Any) -> Size:
    """(width, height) of the images a model takes, or 672 x 672 where it takes any."""
    return adapter.example_size


def noise(size: Size, seed: int) -> Any:
    """An image of seeded noise."""
    from PIL import Image

    width, height = size
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


# -------------------------------------------------------------------------------- inputs without a processor


def _images(rules: Any, size: Size, count: int) -> list[Views]:
    """The images of one prompt, all of a size."""
    if not rules.fixed_count:
        return rules.together(rules.of_size(size), count)
    if size != rules.view_size:
        width, height = rules.view_size
        raise MllmEfficientError(f"--image-size {size[0]}x{size[1]} has no effect with random weights: this tower takes {width}x{height}")
    return rules.typical() * count


def drawn_inputs(adapter: Any, images: Sequence[Views], seed: int) -> dict[str, Any]:
    """The vision arguments of one prompt as the family's processor would shape them, of seeded noise, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return adapter.example(images, lambda *shape: torch.randn(shape, generator=generator).to(adapter.model.dtype))


def _visual(adapter: Any, call: dict[str, Any]) -> tuple[Tensor, list[VisualShape]]:
    """(B, L) bool, the columns of images in a batch, text between their tokens included, and the shape of each image."""
    items, ids = adapter.items(call), call["input_ids"]
    return visual_in(ids, adapter.placeholders, locate(ids.cpu(), adapter.placeholders, items)), [item.shape for item in items]


def _with_text(adapter: Any, shapes: Sequence[VisualShape], text_tokens: int, seed: int) -> Tensor:
    """(1, L): ``text_between`` text tokens in front of each image's placeholders, the other ``text_tokens`` after the last."""
    between, token = adapter.text_between, adapter.placeholders["image"]
    before = between * len(shapes)
    start = getattr(adapter.config, "vision_start_token_id", None)
    if text_tokens <= before:
        raise MllmEfficientError(f"--text-tokens {text_tokens} is too few for {len(shapes)} image(s): at least {before + 1}")
    text = text_ids(adapter, text_tokens, seed)
    parts = []
    for i, shape in enumerate(shapes):
        opening = text[i * between : (i + 1) * between]
        parts += [opening if start is None else torch.tensor([start]), torch.tensor(written(shape, token, adapter))]
    return torch.cat([*parts, text[before:]])[None]


def text_ids(adapter: Any, count: int, seed: int) -> Tensor:
    """Seeded ids of plain text."""
    config = adapter.config.get_text_config()
    special = {*adapter.placeholders.values()}
    for holder in (adapter.config, config):
        for name in vars(holder) if hasattr(holder, "__dict__") else ():
            if name.endswith("token_id") and isinstance(getattr(holder, name), int):
                special.add(getattr(holder, name))
    plain = torch.tensor([i for i in range(min(config.vocab_size, 2000)) if i not in special])
    return plain[torch.randint(len(plain), (count,), generator=torch.Generator().manual_seed(seed))]


# ----------------------------------------------------------------------------------- inputs of a processor


def lengthened(adapter: Any, call: dict[str, Any], text_tokens: int, seed: int) -> dict[str, Any]:
    """A processor's inputs with more text in front of their last token, so that each prompt has ``text_tokens``."""
    ids = call["input_ids"]
    have = int((~_visual(adapter, call)[0])[0].sum())
    if have > text_tokens:
        raise MllmEfficientError(f"this model's chat prompt alone has {have} text tokens: --text-tokens must be at least {have}")
    more = text_ids(adapter, text_tokens - have, seed).to(ids.device).expand(len(ids), -1)
    out = dict(call)
    for name, fill in (("input_ids", more), ("attention_mask", torch.ones_like(more)), (adapter.typed, torch.zeros_like(more))):
        if name in call:
            out[name] = torch.cat([call[name][:, :-1], fill.to(call[name]), call[name][:, -1:]], 1)
    return out
