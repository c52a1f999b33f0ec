"""Where ``show`` puts tokens, held against what processors of transformers do to a picture whose colours say where a pixel is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mllm_efficient.patches import adapter_for
from mllm_efficient.patches.families.llama4 import Llama4Adapter
from mllm_efficient.tokens import Plane

from ..families import EVERY, process, tiny
from .test_llama4 import llama4_rules


def picture(size: tuple[int, int]) -> Image.Image:
    """Red is how far right a pixel is, green how far down, and blue is full, which padding is not."""
    wide, high = size
    across, down = (np.arange(n, dtype=np.float32)[None] * 255 / (n - 1) for n in size)
    colours = np.stack([across.repeat(high, 0), down.T.repeat(wide, 1), np.full((high, wide), 255)], -1)
    return Image.fromarray(colours.round().astype(np.uint8))


def hold(tiles: torch.Tensor, planes: tuple[Plane, ...], slack: float) -> None:
    """tiles: (n, 3, h, w) from 0 to 1, one of each plane. slack: a colour's error, of resampling and rounding, in shares of the picture."""
    assert len(tiles) == len(planes)
    for tile, plane in zip(tiles, planes):
        top, left, bottom, right = plane.box
        rows, columns = ((torch.arange(n) + 0.5) / n for n in tile.shape[-2:])
        x, y = left + columns * (right - left), top + rows * (bottom - top)
        inside = ((y < 1 - slack) & (y > slack))[:, None] & ((x < 1 - slack) & (x > slack))[None]
        assert inside.any()
        assert (tile[0] - x[None])[inside].abs().max() < slack and (tile[1] - y[:, None])[inside].abs().max() < slack
        assert (tile[2][inside] > 0.99).all() and (tile[2][(y > 1 + slack)[:, None] | (x > 1 + slack)[None]] < 0.6).all()


@pytest.mark.parametrize("size", [(700, 500), (240, 600), (300, 180), (90, 200)], ids=str)
@pytest.mark.parametrize("name", ["internvl", "idefics3", "gemma3"])
def test_a_view_is_drawn_where_the_processor_took_its_pixels(name, size):
    processor, adapter = EVERY[name].processor("left"), adapter_for(tiny(name))
    inputs = process(name, ["user : I what ?"], [[picture(size)]])
    (item,) = adapter.items(inputs)
    mean, std = (torch.tensor(getattr(processor.image_processor, f"image_{n}"))[:, None, None] for n in ("mean", "std"))
    tiles = inputs["pixel_values"].flatten(0, -4) * std + mean
    hold(tiles, adapter.place(item.shape.planes, size, processor.image_processor), 0.06)


@pytest.mark.parametrize("most, largest", [(4, False), (16, False), (16, True)])
@pytest.mark.parametrize("size", [(700, 650), (300, 1000), (336, 168), (100, 90), (900, 336)], ids=str)
def test_a_tile_of_llama4_is_drawn_where_the_processor_took_its_pixels(size, most, largest):
    """Tiles of a canvas that the picture does not fill."""
    pytest.importorskip("torchvision", reason="the processor of Llama 4 needs torchvision")
    from transformers import Llama4ImageProcessor

    processor: Any = Llama4ImageProcessor(max_patches=most, resize_to_max_canvas=largest)
    tiles = processor(picture(size), return_tensors="pt")["pixel_values"].float() / 2 + 0.5
    planes = tuple(Plane(12, 12, tile=i) for i in range(len(tiles)))
    hold(tiles, Llama4Adapter.place(llama4_rules(), planes, size, processor), 0.02)
