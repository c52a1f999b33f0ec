"""How many tokens an image has and will have, from its size alone: by the same adapters and the same rule as in transformers."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import torch

from mllm_efficient.apply.plan import Plan, check, plan
from mllm_efficient.compressors.base import Compressor
from mllm_efficient.tokens import VisualShape

from ..base import Item

# What vLLM takes for granted of a family, whatever the model's own config says.
AS_SERVED = {"llava_onevision": {"vision_aspect_ratio": "anyres_max_9"}}


class Shapes:
    """Plans for images of one model. config: of transformers; the model is built on the meta device, without weights."""

    def __init__(self, config: Any):
        from transformers import AutoModelForImageTextToText

        from .. import adapter_for

        small = copy.deepcopy(config)
        small.get_text_config().num_hidden_layers = 1  # nothing runs
        for name, value in AS_SERVED.get(small.model_type, {}).items():
            setattr(small, name, value)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(small)
        self.adapter: Any = adapter_for(model)

    def check(self, method: Compressor) -> None:
        """Raises where the family cannot run the method."""
        check(self.adapter, method)

    def item(self, height: int, width: int) -> Item:
        """An image of this size in pixels."""
        usual = self.adapter.usual()
        if usual is not None:
            return Item({}, usual)
        return _item(self, height, width)

    def plan_of_grid(self, method: Compressor, rows: int, columns: int) -> Plan:
        """The same of an image that is one grid, on models that take any size."""
        with torch.device("cpu"):
            return _plan_of(self, method, self.adapter.shape("image", 1, (rows, columns)))

    def plan_of_tiles(self, method: Compressor, tiles: int) -> Plan:
        """The same of an image in so many tiles, on models whose tiles are alike."""
        with torch.device("cpu"):
            return _plan_of(self, method, self.adapter.shape(tiles, (self.adapter.side,) * 2))

    def plan(self, method: Compressor, height: int, width: int) -> Plan:
        """What a method does to an image of this size."""
        with torch.device("cpu"):
            return _plan(self, method, height, width)


@functools.lru_cache(maxsize=4096)
def _item(shapes: Shapes, height: int, width: int) -> Item:
    tiles = 1 + math.prod(shapes.adapter.tiling((height, width)))
    arguments = {"pixel_values": range(tiles), "image_sizes": (height, width)}
    return Item(arguments, shapes.adapter._shape(arguments, shapes.adapter.side))


@functools.lru_cache(maxsize=4096)
def _plan(shapes: Shapes, method: Compressor, height: int, width: int) -> Plan:
    return plan(shapes.adapter, method, shapes.item(height, width))


@functools.lru_cache(maxsize=4096)
def _plan_of(shapes: Shapes, method: Compressor, shape: VisualShape) -> Plan:
    return plan(shapes.adapter, method, Item({}, shape))
