"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images of any size as one grid each, M-RoPE positions, deepstack features (Qwen3-VL)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mllm_efficient.errors import CountMismatchError
from mllm_efficient.tokens import Plane, VisualShape

from ..base import Adapter, Encoding, Grid, Item, smaller_pixels

GRID_OF = {"image": "image_grid_thw", "video": "video_grid_thw"}
PIXELS_OF = {"image": "pixel_values", "video": "pixel_values_videos"}


class QwenVLAdapter(Adapter):
    """What the wrapper needs to know of one Qwen-VL model."""

    positions = "keep"
    parts = frozenset({"frame"})
    mrope = True
    encode_keys = (*PIXELS_OF.values(), *GRID_OF.values(), "second_per_grid_ts")

    def __init__(self, model: Any):
        super().__init__(model)
        self.merge = self.config.vision_config.spatial_merge_size

    def as_tensors(self, inputs: dict[str, Any]) -> dict[str, Any]:
        lists = {name: inputs[name] for name in GRID_OF.values() if isinstance(inputs.get(name), (list, tuple))}
        device = getattr(inputs.get("input_ids"), "device", None)
        return {**inputs, **{name: torch.stack([torch.as_tensor(size, device=device) for size in sizes]) for name, sizes in lists.items()}}

    def items(self, inputs: dict[str, Any]) -> list[Item]:
        inputs = self.as_tensors(inputs)
        return [item for modality in PIXELS_OF for item in self._items(modality, inputs)]

    def _items(self, modality: str, inputs: dict[str, Any]) -> list[Item]:
        pixels, grids = inputs.get(PIXELS_OF[modality]), inputs.get(GRID_OF[modality])
        if pixels is None:
            return []
        if grids is None:
            raise CountMismatchError(f"{PIXELS_OF[modality]} without {GRID_OF[modality]}: pass both as the processor gives them")
        sizes = [(int(t), int(h), int(w)) for t, h, w in grids.tolist()]
        counts = [t * h * w for t, h, w in sizes]
        if pixels.ndim != 2 or len(pixels) != sum(counts):
            raise CountMismatchError(
                f"{PIXELS_OF[modality]} {tuple(pixels.shape)} do not belong to {GRID_OF[modality]}, which asks for {sum(counts)} patches"
            )
        seconds = inputs.get("second_per_grid_ts") if modality == "video" else None
        items = []
        for i, (part, size) in enumerate(zip(pixels.split(counts), sizes)):
            arguments = {PIXELS_OF[modality]: part, GRID_OF[modality]: grids[i : i + 1]}
            if seconds is not None:
                arguments["second_per_grid_ts"] = seconds[i]
            items.append(Item(arguments, self._shape(modality, size[0], (size[1] // self.merge, size[2] // self.merge))))
        return items

    def _shape(self, modality: str, frames: int, grid: Grid) -> VisualShape:
        video = modality == "video"
        return VisualShape(tuple(Plane(*grid, frame=i if video else None) for i in range(frames)), modality)

    def shape_at(self, item: Item, grid: Grid) -> VisualShape:
        return self._shape(item.shape.modality, len(item.shape.planes), grid)

    def run(self, modality: str, items: list[Item], needs: frozenset[str], grid: Grid | None) -> list[Encoding]:
        pixels = [i.arguments[PIXELS_OF[modality]] for i in items]
        grids = torch.cat([i.arguments[GRID_OF[modality]] for i in items])
        shapes = [i.shape for i in items]
        if grid is not None:
            pixels = [self._smaller(p, i.shape, grid) for p, i in zip(pixels, items)]
            grids = grids.clone()
            grids[:, 1:] = torch.tensor(grid, device=grids.device) * self.merge
            shapes = [self.shape_at(i, grid) for i in items]
        call = {PIXELS_OF[modality]: torch.cat(pixels), GRID_OF[modality]: grids}
        out = getattr(self.model.model, f"get_{modality}_features")(**call, return_dict=True)
        layers = getattr(out, "deepstack_features", None) or []
        return [Encoding(f, shape, tuple(layer[i] for layer in layers)) for i, (f, shape) in enumerate(zip(out.pooler_output, shapes))]

    def _smaller(self, patches: Tensor, shape: VisualShape, grid: Grid) -> Tensor:
        """Patches (t * h * w, d), blocks of merge x merge together, of the picture made smaller."""
        vision, m, frames = self.config.vision_config, self.merge, len(shape.planes)
        p, depth = vision.patch_size, vision.temporal_patch_size
        (rows, columns), (h, w) = (shape.planes[0].rows, shape.planes[0].columns), grid
        picture = patches.view(frames, rows, columns, m, m, -1, depth, p, p).permute(0, 6, 5, 1, 3, 7, 2, 4, 8)
        picture = picture.reshape(frames * depth, -1, rows * m * p, columns * m * p)
        small = smaller_pixels(picture, h * m * p, w * m * p).view(frames, depth, -1, h, m, p, w, m, p)
        return small.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(frames * h * w * m * m, -1)

    def container(self, modality: str, features: list[Tensor], deep: list[tuple[Tensor, ...]]) -> Any:
        if not self.deepstack:
            return super().container(modality, features, deep)
        from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

        return BaseModelOutputWithDeepstackFeatures(pooler_output=features, deepstack_features=[list(layer) for layer in deep])

    def rope(self, ids: Tensor, mask: Tensor, types: Tensor, grids: dict[str, list[Any]], seconds: list[Any]) -> Tensor:
        """Positions (3, B, L) by the model's own rule.

        types: (B, L) 0 for text, 1 for images, 2 for videos. grids: for each modality the (t, h, w) of each item in
        tokens. seconds: for each video the seconds of a frame, where the model asks for them.
        """
        call: dict[str, Any] = {
            GRID_OF[m]: torch.tensor([(t, h * self.merge, w * self.merge) for t, h, w in g], device=ids.device)
            for m, g in grids.items()
            if g
        }
        if seconds:
            call["second_per_grid_ts"] = seconds
        return self.model.model.get_rope_index(ids, mm_token_type_ids=types, attention_mask=mask, **call)[0]


class Qwen3VLAdapter(QwenVLAdapter):
    """Qwen3-VL: the first decoder layers add features of their own, which follow the kept tokens."""

    deepstack = True
