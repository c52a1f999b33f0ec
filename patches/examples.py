"""Pixels of random pictures as the processors of many model types shape them, for tiny models: no processor is asked.

Each function returns the vision arguments of one call with ``images`` pictures, of different sizes where the type takes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

GRIDS = ((4, 4), (4, 8), (8, 4))  # patches of the pictures that come in any size


def example(model: Any, kind: str, images: int, seed: int = 0) -> dict[str, Any]:
    """Vision arguments of a call. kind: of ``facts.Facts.example``."""
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).to(device) * 2 - 1

    made = KINDS[kind](model.config, images, draw)
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in made.items()}


Draw = Callable[..., Tensor]


def _vision(config: Any) -> Any:
    return next(getattr(config, name) for name in ("vision_config", "vit_config", "perception_config") if getattr(config, name, None))


def _one(value: Any) -> int:
    return int(value if isinstance(value, int) else value[0])


def _side(config: Any) -> int:
    return _one(_vision(config).image_size)


def _channels(config: Any) -> int:
    vision = _vision(config)
    names = ("in_channels", "in_chans", "num_channels")
    return next((getattr(vision, name) for name in names if getattr(vision, name, None)), 3)


def square(config: Any, images: int, draw: Draw) -> dict[str, Any]:
    """(images, channels, side, side)."""
    side = _side(config)
    return {"pixel_values": draw(images, _channels(config), side, side)}


def large(config: Any, images: int, draw: Draw) -> dict[str, Any]:
    """(images, channels, 1024, 1024): towers that know but one size."""
    return {"pixel_values": draw(images, 3, 1024, 1024)}


def linear(config: Any, images: int, draw: Draw) -> dict[str, Any]:
    """(images, patches, values of a patch), which a single matrix embeds."""
    return {"pixel_values": draw(images, 12, config.num_channels * config.patch_size**2)}


def patches(config: Any, images: int, draw: Draw) -> dict[str, Any]:
    """All patches of all pictures one after the other, and the grid of each."""
    vision = _vision(config)
    patch, depth = _one(vision.patch_size), getattr(vision, "temporal_patch_size", 1) or 1
    grids = [GRIDS[i % len(GRIDS)] for i in range(images)]
    return {
        "pixel_values": draw(sum(h * w for h, w in grids), _channels(config) * depth * patch**2),
        "image_grid_thw": torch.tensor([(1, *grid) for grid in grids]),
    }


def patch_images(config: Any, images: int, draw: Draw) -> dict[str, Any]:
    """The same, each patch a picture of its own: (patches, channels, side, side)."""
    flat = patches(config, images, draw)
    side = _one(_vision(config).patch_size)
    return {**flat, "pixel_values": flat["pixel_values"].reshape(-1, _channels(config), side, side)}


def token_images(config: Any, images: int, draw: Draw) -> dict[str, Any]:
    """What each token sees as a picture of its own, channels last, and the grid of each picture in tokens."""
    vision = _vision(config)
    side = _one(vision.patch_size) * vision.spatial_merge_size
    grids = [GRIDS[i % len(GRIDS)] for i in range(images)]
    tokens = sum(h * w for h, w in grids)
    return {"pixel_values": draw(tokens, side, side, _channels(config)), "image_grid_thw": torch.tensor([(1, *grid) for grid in grids])}


def merged_patches(config: Any, images: int, draw: Draw) -> dict[str, Any]:
    """The same, with the side of the square of patches that is a token of each picture."""
    return {**patches(config, images, draw), "image_merge_sizes": torch.full((images,), 2)}


def patches_hw(config: Any, images: int, draw: Draw) -> dict[str, Any]:
    """The same, with (rows, columns) of each picture."""
    flat = patches(config, images, draw)
    return {"pixel_values": flat["pixel_values"], "image_grid_hw": flat["image_grid_thw"][:, 1:]}


def sizes(config: Any, images: int, draw: Draw) -> dict[str, Any]:
    """Pictures of different sizes on one canvas, and the (height, width) of each."""
    patch = _one(_vision(config).patch_size)
    given = [(h * patch, w * patch) for h, w in (GRIDS[i % len(GRIDS)] for i in range(images))]
    height, width = (max(side) for side in zip(*given))
    return {"pixel_values": draw(images, _channels(config), height, width), "image_sizes": torch.tensor(given)}


def padded(config: Any, images: int, draw: Draw) -> dict[str, Any]:
    """(1, images, channels, side, side), and a mask of the pixels that are there."""
    side = _side(config)
    return {
        "pixel_values": draw(1, images, _channels(config), side, side),
        "pixel_attention_mask": torch.ones(1, images, side, side, dtype=torch.bool),
    }


def tiles(config: Any, images: int, draw: Draw) -> dict[str, Any]:
    """(1, images, channels, side, side), and which of the tiles are there."""
    side = _side(config)
    return {"pixel_values": draw(1, images, _channels(config), side, side), "pixel_attention_mask": torch.ones(1, images, dtype=torch.bool)}


def shapes(config: Any, images: int, draw: Draw) -> dict[str, Any]:
    """(images, patches, values of a patch), padded, and the (rows, columns) of each."""
    vision = _vision(config)
    grids = [GRIDS[i % len(GRIDS)] for i in range(images)]
    longest = max(h * w for h, w in grids)
    mask = torch.tensor([[i < h * w for i in range(longest)] for h, w in grids])
    values = draw(images, longest, _channels(config) * _one(vision.patch_size) ** 2)
    return {"pixel_values": values, "spatial_shapes": torch.tensor(grids), "pixel_attention_mask": mask.long()}


def targets(config: Any, images: int, draw: Draw) -> dict[str, Any]:
    """Patches of all pictures side by side in one strip, and the (rows, columns) of each."""
    patch = _one(_vision(config).patch_size)
    grids = [(4, 4), (4, 8), (8, 4)]
    grids = [grids[i % 3] for i in range(images)]
    strip = draw(1, _channels(config), patch, sum(h * w for h, w in grids) * patch)
    return {"pixel_values": strip, "target_sizes": torch.tensor(grids, dtype=torch.int32)}


def positions(config: Any, images: int, draw: Draw) -> dict[str, Any]:
    """(images, patches, values of a patch), padded, and the (column, row) of each patch, -1 for padding."""
    vision = _vision(config)
    k = vision.pooling_kernel_size
    grids = [(2 * k, k * (2 + i % 2)) for i in range(images)]
    longest = max(h * w for h, w in grids)
    longest += -longest % k**2
    places = torch.full((images, longest, 2), -1)
    for place, (h, w) in zip(places, grids):
        place[: h * w] = torch.cartesian_prod(torch.arange(h), torch.arange(w)).flip(1)
    return {"pixel_values": draw(images, longest, 3 * _one(vision.patch_size) ** 2) / 2 + 0.5, "image_position_ids": places}


def tokens_with_positions(config: Any, images: int, draw: Draw) -> dict[str, Any]:
    """The same where a patch is what a token sees."""
    vision = _vision(config)
    grids = [(3, 3 + i % 2) for i in range(images)]
    longest = max(h * w for h, w in grids)
    places = torch.full((images, longest, 2), -1)
    for place, (h, w) in zip(places, grids):
        place[: h * w] = torch.cartesian_prod(torch.arange(h), torch.arange(w)).flip(1)
    values = 3 * (_one(vision.patch_size) * vision.pooling_kernel_size) ** 2
    return {"pixel_values": draw(images, longest, values) / 2 + 0.5, "image_position_ids": places}


def anyres(config: Any, images: int, draw: Draw) -> dict[str, Any]:
    """(images, views, channels, side, side) of the two tiles that stand on top of each other and the whole, and the pictures' sizes."""
    side = _side(config)
    config.image_grid_pinpoints = [[2 * side, side], [side, 2 * side]]
    return {"pixel_values": draw(images, 3, _channels(config), side, side), "image_sizes": torch.tensor([(2 * side, side)] * images)}


def two_resolutions(config: Any, images: int, draw: Draw) -> dict[str, Any]:
    """Each picture small and large."""
    large = _one(config.high_res_vision_config.image_size)
    return {**square(config, images, draw), "high_res_pixel_values": draw(images, 3, large, large)}


KINDS = {
    f.__name__: f
    for f in (
        square,
        large,
        linear,
        patches,
        patch_images,
        token_images,
        merged_patches,
        patches_hw,
        sizes,
        padded,
        tiles,
        shapes,
        positions,
        targets,
        anyres,
        two_resolutions,
        tokens_with_positions,
    )
}
