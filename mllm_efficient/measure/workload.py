"""What is measured: prompts of so many images and text tokens, made for any supported model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import MllmEfficientError
from ..loading.models import Loaded
from ..patches.rules import grid_of, pixel_limits, views_of

Size = tuple[int, int]
DEFAULT_SIZE = (672, 672)  # of models that take pictures of any size
QUESTION = "Describe what is shown."


@dataclass(frozen=True)
class Workload:
    """One prompt: pictures of ``image_size`` (width, height), text tokens beside their placeholders, tokens to generate.

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

    call: what ``generate`` takes. text_only: the same without the images. image_size: (width, height) of the pictures.
    visual_tokens: N of a prompt. lengths: tokens of a prompt with and without images. preprocess: makes the inputs anew
    from pictures in memory; None where there is no processor.
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
        one = drawn_inputs(adapter, size, workload.images, seed, loaded.picture_settings)
        placeholders = _placeholder_ids(adapter, one, workload.images)
        ids = _with_text(adapter, placeholders, workload.text_tokens, seed)
        call = {k: _repeated(v, batch) for k, v in one.items()} | {"input_ids": ids.expand(batch, -1).contiguous()}
        call["attention_mask"] = torch.ones_like(call["input_ids"])
        if adapter.mrope:
            call["mm_token_type_ids"] = _visual(adapter, call["input_ids"]).int()
        device = adapter.model.device
        call = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in call.items()}
    else:
        pictures = [noise(size, seed + i) for i in range(workload.images)] * batch
        prompts = [loaded.prompt(QUESTION, workload.images)] * batch

        def preprocess():
            return loaded.inputs(prompts, pictures)

        call = lengthened(adapter, preprocess(), workload.text_tokens, seed)
    visual = _visual(adapter, call["input_ids"])
    shapes = [item.shape for item in adapter.items(call)]
    text_only = {"input_ids": call["input_ids"][~visual].view(batch, -1)}
    text_only["attention_mask"] = torch.ones_like(text_only["input_ids"])
    if "mm_token_type_ids" in call:
        text_only["mm_token_type_ids"] = torch.zeros_like(text_only["input_ids"])
    n = sum(shape.n for shape in shapes) // batch
    return Inputs(call, text_only, size, n, (visual.shape[1], text_only["input_ids"].shape[1]), preprocess)


def usual_size(adapter: Any) -> Size:
    """(width, height) of the pictures a model takes, or 672 x 672 where it takes any."""
    if not adapter.fixed_count:
        return DEFAULT_SIZE
    side = adapter.config.vision_config.image_size
    return (side, side) if isinstance(side, int) else (side[1], side[0])


def noise(size: Size, seed: int) -> Any:
    """A picture of seeded noise."""
    from PIL import Image

    width, height = size
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


# -------------------------------------------------------------------------------- inputs without a processor


def drawn_inputs(adapter: Any, size: Size, images: int, seed: int, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The vision arguments of one prompt as the family's processor would shape them, of seeded noise, on the CPU.

    settings: of the processor, where they are not the family's usual ones.
    """
    settings = settings or {}
    generator = torch.Generator().manual_seed(seed)

    def pixels(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(adapter.model.dtype)

    vision, (width, height) = adapter.config.vision_config, size
    if adapter.mrope:
        unit = vision.patch_size * adapter.merge
        kind = adapter.config.model_type
        rows, columns = (n * adapter.merge for n in grid_of(size, unit, pixel_limits(kind, settings), kind))
        depth = _channels(vision) * vision.temporal_patch_size * vision.patch_size**2
        return {
            "pixel_values": pixels(images * rows * columns, depth),
            "image_grid_thw": torch.tensor([[1, rows, columns]] * images),
        }
    native = usual_size(adapter) if adapter.fixed_count else vision.image_size
    side = native if isinstance(native, int) else native[0]
    if adapter.fixed_count:
        if size != native:
            raise MllmEfficientError(
                f"--image-size {width}x{height} has no effect with random weights: this tower takes {native[0]}x{native[1]}"
            )
        return {"pixel_values": pixels(images, _channels(vision), side, side)}
    if adapter.separators:
        tiled = images == 1 or "batch_num_images" not in adapter.encode_keys
        tiles = 1 + math.prod(adapter.tiling((height, width))) if tiled else 1
        out = {"image_sizes": torch.tensor([[height, width]] * images)}
        out["pixel_values"] = pixels(images, tiles, _channels(vision), side, side)
        return out if tiled else out | {"batch_num_images": torch.tensor([images])}
    return {"pixel_values": pixels(images * views_of(size, (side, side), settings), _channels(vision), side, side)}


def _channels(vision: Any) -> int:
    return next(getattr(vision, name) for name in ("num_channels", "in_channels", "in_chans") if hasattr(vision, name))


def _placeholder_ids(adapter: Any, vision: dict[str, Any], images: int) -> list[Tensor]:
    """For each image the placeholders that the adapter asks for."""
    token = adapter.placeholders["image"]
    if adapter.fixed_count or adapter.separators or adapter.mrope:
        blank = torch.zeros(1, 0, dtype=torch.long)
        items = adapter.items({**vision, "input_ids": blank, "attention_mask": blank})
        lengths = [item.shape.length for item in items]
    else:  # tiles, which only the prompt says the images of
        height, width = (int(s // p * adapter.config.downsample_ratio) for s, p in zip(vision["pixel_values"].shape[-2:], adapter.patch))
        lengths = [len(vision["pixel_values"]) // images * height * width] * images
    return [torch.full((length,), token) for length in lengths]


def _with_text(adapter: Any, placeholders: Sequence[Tensor], text_tokens: int, seed: int) -> Tensor:
    """(1, L): a text token in front of each image, the other ``text_tokens`` behind the last."""
    start = getattr(adapter.config, "vision_start_token_id", None)
    if text_tokens <= len(placeholders):
        raise MllmEfficientError(
            f"--text-tokens {text_tokens} is too few for {len(placeholders)} image(s): at least {len(placeholders) + 1}"
        )
    text = text_ids(adapter, text_tokens, seed)
    parts = []
    for i, image in enumerate(placeholders):
        parts += [text[i : i + 1] if start is None else torch.tensor([start]), image]
    return torch.cat([*parts, text[len(placeholders) :]])[None]


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


def _repeated(value: Tensor, batch: int) -> Tensor:
    """The arguments of one prompt for a batch of them, image by image."""
    return torch.cat([value] * batch)


# ----------------------------------------------------------------------------------- inputs of a processor


def lengthened(adapter: Any, call: dict[str, Any], text_tokens: int, seed: int) -> dict[str, Any]:
    """A processor's inputs with more text in front of their last token, so that each prompt has ``text_tokens``."""
    ids = call["input_ids"]
    have = int((~_visual(adapter, ids))[0].sum())
    if have > text_tokens:
        raise MllmEfficientError(f"this model's chat prompt alone has {have} text tokens: --text-tokens must be at least {have}")
    more = text_ids(adapter, text_tokens - have, seed).to(ids.device).expand(len(ids), -1)
    out = dict(call)
    for name, fill in (("input_ids", more), ("attention_mask", torch.ones_like(more)), ("mm_token_type_ids", torch.zeros_like(more))):
        if name in call:
            out[name] = torch.cat([call[name][:, :-1], fill.to(call[name]), call[name][:, -1:]], 1)
    return out


def _visual(adapter: Any, ids: Tensor) -> Tensor:
    return torch.isin(ids, torch.tensor(list(adapter.placeholders.values()), device=ids.device))
