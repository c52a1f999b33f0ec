"""A tower of the Qwen-VL kind on some of its patches, each where it stands in the whole picture.

transformers' own functions say where every patch of the whole grid stands, and the tower takes what they give as arguments, so nothing of
it is copied or replaced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def run_on(visual: Any, pixels: Tensor, grids: Tensor, stay: Tensor) -> Any:
    """What the tower and its mergers make of the tokens that stay, which see each other alone.

    pixels: (patches, d) of all. grids: (items, 3), frames, rows and columns of each item in patches. stay: (tokens,) bool.
    """
    from transformers import vision_utils

    merge = visual.config.spatial_merge_size
    patches = stay.repeat_interleave(merge**2)
    call: dict[str, Any] = {"position_ids": vision_utils.get_vision_position_ids(grids, merge)[patches]}
    frames = torch.repeat_interleave(grids[:, 1] * grids[:, 2], grids[:, 0])
    call["cu_seqlens"] = _ends([int(part.sum()) for part in patches.split(frames.tolist())], grids)
    if hasattr(visual, "window_size"):
        order, ends = vision_utils.get_vision_window_index(grids, merge, visual.window_size, visual.patch_size)
        order = order.to(stay.device)
        left = stay[order]
        windows = left.split((ends.diff() // merge**2).tolist())
        call["window_index"] = (stay.cumsum(0) - 1)[order[left]]
        call["cu_window_seqlens"] = _ends([n * merge**2 for w in windows if (n := int(w.sum()))], grids)
    if hasattr(visual, "interpolation_mode"):
        indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
            grids, num_grid_per_side=visual.num_grid_per_side, mode=visual.interpolation_mode,
            align_corners=visual.interpolation_align_corners, spatial_merge_size=merge,
        )  # fmt: skip
        call |= {"interp_indices": indices[patches], "interp_weights": weights[patches]}
    return visual(pixels[patches].type(visual.dtype), grid_thw=grids, **call, return_dict=True)


def _ends(lengths: list[int], like: Tensor) -> Tensor:
    """(n + 1,) where parts of these lengths end, from 0 on."""
    return torch.tensor([0, *lengths], device=like.device).cumsum(0, dtype=torch.int32)
