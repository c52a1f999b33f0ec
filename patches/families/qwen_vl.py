"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5: images of any size as one grid each, M-RoPE positions, deepstack features (Qwen3-VL)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from mllm_efficient.compressors.fit import OF_TOWER
from mllm_efficient.errors import CountMismatchError, MllmEfficientError
from mllm_efficient.lazy import torch
from mllm_efficient.tokens import Grid, Plane, VisualShape

from ..base import Adapter, Encoding, Item, smaller_pixels
from ..controls import PIXELS, pixel_controls
from ..pictures import OF_PIXELS
from ..rules import Rules, Settings, Size, Views
from ..sizes import ProjectorSize, Tower
from ..tower.packed import watched_blocks, window_order
from ..tower.sparse import run_on

if TYPE_CHECKING:
    from torch import Tensor

    from mllm_efficient.plans import Plan

GRID_OF = {"image": "image_grid_thw", "video": "video_grid_thw"}
PIXELS_OF = {"image": "pixel_values", "video": "pixel_values_videos"}
USUAL_PIXELS = (56 * 56, 28 * 28 * 1280)  # of a processor whose file leaves them out
MOST_ASPECT = 200


class QwenVLRules(Rules):
    """The shapes of the Qwen-VL families: every token is merged from ``merge`` x ``merge`` patches.

    pixels: (fewest, most) of an image, where nothing is known of a processor.
    """

    gives = frozenset({"attention", "early_attention", "keys", "text", "grid"})
    parts = frozenset({"frame"})
    positions = "keep"
    mrope = True
    counting: ClassVar[tuple[str, ...]] = OF_PIXELS
    control = PIXELS
    pixels: ClassVar[tuple[int, int]] = (3136, 12845056)

    @property
    def merge(self) -> int:
        return self.config.vision_config.spatial_merge_size

    @property
    def step(self) -> int:
        """Pixels along a side of a token."""
        return self.patch * self.merge

    @functools.cached_property
    def tower_size(self) -> Tower:
        vision = self.config.vision_config
        return self._tower(vision.hidden_size, vision.intermediate_size)

    def _tower(self, width: int, mlp_width: int) -> Tower:
        vision = self.config.vision_config
        channels = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", None) or 3
        return Tower(
            vision.depth, width, vision.num_heads, mlp_width, vision.patch_size, channels, vision.temporal_patch_size, fused=True
        )  # fmt: skip

    @functools.cached_property
    def projector_size(self) -> ProjectorSize:
        width = self.tower_size.width * self.merge**2
        return ProjectorSize(width, width, self.config.vision_config.out_hidden_size, 1 + self.deep_layers)

    def shape(self, modality: str, frames: int, grid: Grid) -> VisualShape:
        """Of an image or video, each of whose frames has a grid of tokens."""
        video = modality == "video"
        return VisualShape(tuple(Plane(*grid, frame=i if video else None) for i in range(frames)), modality)

    def _at(self, grid: Grid, size: Size | None) -> Views:
        rows, columns = grid
        seen = f"{columns * self.step}x{rows * self.step}"
        given = "" if size is None or size == (columns * self.step, rows * self.step) else f"{size[0]}x{size[1]} seen as "
        patches = (rows * self.merge, columns * self.merge)
        return Views(self.shape("image", 1, grid), grid, 1, patches, rows * columns, f"{given}{seen}: {rows * columns} tokens", size)

    def typical(self) -> list[Views]:
        side = 24 * self.step
        return [self._at(grid_of((side, side), self.step, pixel_limits(self.pixels, self.settings), self.name), None)]

    def of_size(self, size: Size) -> Views:
        """The nearest multiple of a token on both sides, scaled to the processor's limits."""
        return self._at(grid_of(size, self.step, pixel_limits(self.pixels, self.settings), self.name), size)

    def of_tokens(self, n: int, exact: bool) -> list[Views]:
        """The image nearest to a square."""
        rows = max(r for r in range(1, math.isqrt(n) + 1) if n % r == 0)
        if n > 4 * rows * rows:
            if exact:
                raise MllmEfficientError(f"no picture near to a square has {n} tokens on {self.name}: give --image-size WxH instead")
            return [self.unknown(n, self._at((rows, n // rows), None), f"{n} tokens")]
        return [self._at((rows, n // rows), None)]

    def smaller(self, image: Views, unit: Grid) -> Views:
        return self._at(unit, None)

    def controls(self, size: Size, k: int) -> Iterable[Settings]:
        fewest, _ = pixel_limits(self.pixels, self.settings)
        return pixel_controls(k, self.step**2, fewest)


class Qwen2VLRules(QwenVLRules):
    """Qwen2-VL names its width ``embed_dim`` and gives the language model's as ``hidden_size``."""

    @functools.cached_property
    def tower_size(self) -> Tower:
        vision = self.config.vision_config
        return self._tower(vision.embed_dim, int(vision.embed_dim * vision.mlp_ratio))

    @functools.cached_property
    def projector_size(self) -> ProjectorSize:
        width = self.tower_size.width * self.merge**2
        return ProjectorSize(width, width, self.config.vision_config.hidden_size)


class Qwen25VLRules(QwenVLRules):
    """Qwen2.5-VL: most blocks of the tower attend in windows, and its MLPs have a gate."""

    drops_patches = True

    @functools.cached_property
    def tower_size(self) -> Tower:
        vision = self.config.vision_config
        return replace(
            super().tower_size, mlp_matrices=3, window=vision.window_size // vision.patch_size,
            full_layers=tuple(vision.fullatt_block_indexes),
        )  # fmt: skip


class Qwen3VLRules(QwenVLRules):
    """Qwen3-VL: the first decoder layers add features of their own, which follow the kept tokens."""

    deepstack = True
    drops_patches = True
    pixels = (65536, 16777216)


class Qwen35Rules(QwenVLRules):
    """Qwen3.5 and its mixture of experts: Qwen3-VL without deepstack, three of four decoder layers of linear attention."""

    pixels = Qwen3VLRules.pixels


def pixel_limits(known: tuple[int, int], settings: Settings, unsaid: tuple[int, int] = USUAL_PIXELS) -> tuple[int, int]:
    """(fewest, most) pixels of an image after resizing. ``min_pixels`` and ``max_pixels`` go before ``size``, as in the processor.

    known: of the family's released checkpoints, where there are no settings at all. unsaid: where there are, and leave them out.
    """
    size = settings.get("size") or {}
    usual = unsaid if any(k not in OF_PIXELS for k in settings) else known
    fewest = settings.get("min_pixels") or size.get("shortest_edge") or usual[0]
    most = settings.get("max_pixels") or size.get("longest_edge") or usual[1]
    if fewest > most:
        raise MllmEfficientError(f"min_pixels={fewest} is more than max_pixels={most}")
    return fewest, most


def grid_of(size: Size, step: int, limits: tuple[float, float], name: str) -> Grid:
    """Tokens of an image, each of step x step pixels: the nearest multiple on both sides, scaled into the limits."""
    width, height = size
    if max(size) > MOST_ASPECT * min(size):
        raise MllmEfficientError(f"a picture of {width}x{height}: a side may be at most {MOST_ASPECT} times the other on {name}")
    fewest, most = limits
    rows, columns = (round(side / step) for side in (height, width))
    if rows * columns * step**2 > most:
        scale = math.sqrt(width * height / most)
        rows, columns = (max(1, math.floor(side / scale / step)) for side in (height, width))
    elif rows * columns * step**2 < fewest:
        scale = math.sqrt(fewest / (width * height))
        rows, columns = (math.ceil(side * scale / step) for side in (height, width))
    return rows, columns


class QwenVLAdapter(Adapter, QwenVLRules):
    """What the wrapper needs to know of one Qwen-VL model.

    Attention and keys are those of the tower's last block, which sees the whole of an image or of a frame on all released
    models, as in the ports of VisionZip and VisPruner to Qwen2.5-VL. There is no class token: a patch counts by the mean attention it
    receives from all patches of its image or video. A token's attention is the sum of that of the patches merged to it (the ports take
    the mean, the same order), so that an image's sums to 1; its key is their mean, after rotation. The order of windows is undone.
    """

    encode_keys = (*PIXELS_OF.values(), *GRID_OF.values(), "second_per_grid_ts")

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
            items.append(Item(arguments, self.shape(modality, size[0], (size[1] // self.merge, size[2] // self.merge))))
        return items

    def frames_apart(self, item: Item) -> list[Item]:
        """Of a video the temporal patches, of ``temporal_patch_size`` frames each: no block of the tower attends across them."""
        modality, planes = item.shape.modality, item.shape.planes
        if modality == "image":
            return [item]
        grids = item.arguments[GRID_OF[modality]].clone()
        grids[:, 0] = 1
        shape = self.shape(modality, 1, (planes[0].rows, planes[0].columns))
        parts = item.arguments[PIXELS_OF[modality]].chunk(len(planes))
        return [Item({PIXELS_OF[modality]: part, GRID_OF[modality]: grids}, shape) for part in parts]

    def shape_at(self, item: Item, grid: Grid) -> VisualShape:
        return self.shape(item.shape.modality, len(item.shape.planes), grid)

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

        def run_model() -> Any:
            return getattr(self.model.model, f"get_{modality}_features")(**call, return_dict=True)

        if not needs & OF_TOWER:
            return self._encodings(run_model(), shapes)
        out, seen = watched_blocks(self.model.model.visual, run_model, needs)
        return self._beside(self._encodings(out, shapes), seen)

    def token_pixels(self, item: Item) -> Tensor:
        """(N, D) the pixels of each token, row by row."""
        return item.arguments[PIXELS_OF[item.shape.modality]].unflatten(0, (-1, self.merge**2)).flatten(1)

    def reduce_in_tower(self, method: Any, items: list[Item], plans: Sequence[Plan]) -> list[Encoding]:
        """Every image of which a plan says what stays by the tower on these patches alone, the others by the stock one."""
        whole = [i for i, planned in enumerate(plans) if not planned.stay]
        done = dict(zip(whole, self.encode([items[i] for i in whole])))
        return [done[i] if i in done else self._on_some(item, planned) for i, (item, planned) in enumerate(zip(items, plans))]

    def _on_some(self, item: Item, planned: Plan) -> Encoding:
        kept, modality = torch.tensor(planned.stay), item.shape.modality
        pixels, grids = item.arguments[PIXELS_OF[modality]], item.arguments[GRID_OF[modality]]
        stay = torch.zeros(item.shape.n, dtype=torch.bool)
        stay[kept] = True
        out = run_on(self.model.model.visual, pixels, grids, stay.to(pixels.device))
        return Encoding(out.pooler_output, planned.seen, tuple(getattr(out, "deepstack_features", None) or ()), kept=kept)

    def _encodings(self, out: Any, shapes: list[VisualShape]) -> list[Encoding]:
        layers = getattr(out, "deepstack_features", None) or []
        return [Encoding(f, shape, tuple(layer[i] for layer in layers)) for i, (f, shape) in enumerate(zip(out.pooler_output, shapes))]

    def _beside(self, encodings: list[Encoding], seen: dict[str, Tensor]) -> list[Encoding]:
        """With the tower's attentions (P,) and keys (P, d), patches in its order, for each token (see ``QwenVLAdapter``)."""
        of_token = self.merge**2
        of_tokens = {name: value.unflatten(0, (-1, of_token)) for name, value in seen.items()}
        beside = {name: value.mean(1) if name == "keys" else value.sum(1) for name, value in of_tokens.items()}
        shapes = [e.shape for e in encodings]
        if self.tower_size.window:
            grids = [(len(s.planes), s.planes[0].rows, s.planes[0].columns) for s in shapes]
            raster = window_order(grids, self.tower_size.window // self.merge).argsort()
            beside = {name: value[raster.to(value.device)] for name, value in beside.items()}
        parts = [dict(zip(beside, of_item)) for of_item in zip(*(value.split([s.n for s in shapes]) for value in beside.values()))]
        for own in parts:  # attention is the mean that a token receives from all patches of its image or video
            own |= {name: value / (of_token * len(value)) for name, value in own.items() if name != "keys"}
        return [replace(e, **{name: p.to(e.features.device) for name, p in own.items()}) for e, own in zip(encodings, parts)]

    def _smaller(self, patches: Tensor, shape: VisualShape, grid: Grid) -> Tensor:
        """Patches (t * h * w, d), blocks of merge x merge together, of the image made smaller."""
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

    def rope(
        self, ids: Tensor, mask: Tensor, types: Tensor, grids: dict[str, list[Any]], seconds: Any, items: Sequence[Item] = ()
    ) -> Tensor:
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

    def example(self, images: Sequence[Views], pixels: Callable[..., Tensor]) -> dict[str, Any]:
        tower, grids = self.tower_size, [image.patches for image in images]
        return {
            "pixel_values": pixels(sum(math.prod(grid) for grid in grids), tower.channels * tower.frames * tower.patch**2),
            "image_grid_thw": torch.tensor([[1, *grid] for grid in grids]),
        }


class Qwen2VLAdapter(QwenVLAdapter, Qwen2VLRules):
    """One Qwen2-VL model."""


class Qwen25VLAdapter(QwenVLAdapter, Qwen25VLRules):
    """One Qwen2.5-VL model."""


class Qwen3VLAdapter(QwenVLAdapter, Qwen3VLRules):
    """One Qwen3-VL model."""


class Qwen35Adapter(QwenVLAdapter, Qwen35Rules):
    """One Qwen3.5 model."""
