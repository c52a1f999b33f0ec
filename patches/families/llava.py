"""LLaVA-1.5: ``LlavaForConditionalGeneration`` with a CLIP or SigLIP tower. Every image becomes one square."""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mllm_efficient.compressors.fit import OF_TOWER
from mllm_efficient.compressors.tome import blocks_of
from mllm_efficient.errors import CountMismatchError, MllmEfficientError, UnsupportedModelError
from mllm_efficient.lazy import torch
from mllm_efficient.tokens import Grid, Plane, VisualShape

from ..base import Adapter, Encoding, Item, smaller_pixels, uncropped
from ..rules import Rules, Size, Views
from ..running import at_hand, input_of
from ..sizes import ProjectorSize, Tower, clip_or_siglip, projector_after
from ..tower.attention import positions_at_hand, tower_of, watched
from ..tower.blocks import has_class_token
from ..tower.merge import require_own, run_inside

if TYPE_CHECKING:
    from torch import Tensor


class LlavaRules(Rules):
    """The shapes of LLaVA-1.5."""

    gives = frozenset({"attention", "early_attention", "keys", "text", "grid"})  # and clip_text, with a CLIP tower
    fixed_count = True
    projects = True

    @functools.cached_property
    def tower_size(self) -> Tower:
        return clip_or_siglip(self.config.vision_config, self.name)

    @property
    def patch(self) -> int:
        return int(self.config.vision_config.patch_size)  # also of a tower whose FLOPs are not known

    @functools.cached_property
    def projector_size(self) -> ProjectorSize:
        return projector_after(self.config.vision_feature_layer, self.tower_size, self.decoder_size.width)

    @property
    def tower_blocks(self) -> int:
        return blocks_of(self.tower_size.layers, self.config.vision_feature_layer)

    def shape(self, strategy: str, grid: Grid) -> VisualShape:
        """Of an image whose patches form a grid. strategy: "default" or "full", which keeps the class token in front."""
        if strategy == "default" and not self.class_token:
            raise UnsupportedModelError(f"{self.name}: this tower has no class token: set vision_feature_select_strategy='full'")
        return VisualShape((Plane(1, 1), Plane(*grid)) if self.class_token and strategy != "default" else (Plane(*grid),))

    def _at(self, grid: Grid) -> Views:
        shape = self.shape(self.config.vision_feature_select_strategy, grid)
        return Views(shape, grid, 1, grid, shape.n, f"{grid[1] * self.patch}x{grid[0] * self.patch}: {shape.n} tokens")

    def typical(self) -> list[Views]:
        side = self.config.vision_config.image_size // self.patch
        return [self._at((side, side))]

    def of_size(self, size: Size) -> Views:
        n = self.typical()[0].shape.n
        raise MllmEfficientError(f"--image-size has no effect on {self.name}: every picture gives {n} tokens")

    def of_tokens(self, n: int, exact: bool) -> list[Views]:
        (one,) = self.typical()
        if n % one.shape.n == 0:
            return [one] * (n // one.shape.n)
        if exact:
            raise MllmEfficientError(f"{n} visual tokens: every picture gives {one.shape.n} on {self.name}, so ask for a multiple of that")
        return [self.unknown(n, one, f"{n} tokens")]

    def smaller(self, image: Views, unit: Grid) -> Views:
        return self._at(unit)

    def made_processor(self, tokenizer: Any, **common: Any) -> Any:
        import transformers as t

        side, clip = self.config.vision_config.image_size, self.class_token
        square = {"height": side, "width": side}
        images = t.CLIPImageProcessor(size={"shortest_edge": side}, crop_size=square) if clip else t.SiglipImageProcessor(size=square)
        return t.LlavaProcessor(
            image_processor=images, tokenizer=tokenizer, patch_size=self.patch, num_additional_image_tokens=int(clip),
            vision_feature_select_strategy=self.config.vision_feature_select_strategy, **common,
        )  # fmt: skip


class LlavaAdapter(Adapter, LlavaRules):
    """What the wrapper needs to know of one LLaVA-1.5 model."""

    encode_keys = ("pixel_values", "vision_feature_layer", "vision_feature_select_strategy", "image_sizes")

    def __init__(self, model: Any):
        self.tower = tower_of(model)
        if not hasattr(self.tower, "encoder") or not hasattr(self.tower, "embeddings"):
            name = type(model.model.vision_tower).__name__
            raise UnsupportedModelError(f"LLaVA with a {name} tower is not supported: CLIP and SigLIP are")
        super().__init__(model)

    @property
    def class_token(self) -> bool:
        return has_class_token(self.tower)

    def _settings(self, inputs: dict[str, Any]) -> tuple[Any, str]:
        layer, strategy = (inputs.get(k) for k in ("vision_feature_layer", "vision_feature_select_strategy"))
        return (
            self.config.vision_feature_layer if layer is None else layer,
            self.config.vision_feature_select_strategy if strategy is None else strategy,
        )

    def items(self, inputs: dict[str, Any]) -> list[Item]:
        pixels = inputs.get("pixel_values")
        if pixels is None:
            return []
        if not isinstance(pixels, torch.Tensor) or pixels.ndim != 4:
            raise CountMismatchError("pixel_values must be one tensor (images, channels, height, width)")
        if inputs.get("image_sizes") is not None:
            raise UnsupportedModelError("image_sizes belongs to Pixtral towers, which are not supported: leave it out")
        patch = self.config.vision_config.patch_size
        shape = self.shape(self._settings(inputs)[1], (pixels.shape[-2] // patch, pixels.shape[-1] // patch))
        shared = {k: inputs[k] for k in self.encode_keys[1:] if inputs.get(k) is not None}
        return [Item({"pixel_values": pixels[i : i + 1], **shared}, shape) for i in range(len(pixels))]

    def unit(self, item: Item) -> Grid:
        return item.shape.planes[-1].rows, item.shape.planes[-1].columns

    def shape_at(self, item: Item, grid: Grid) -> VisualShape:
        return self.shape(self._settings(item.arguments)[1], grid)

    def projected(self, item: Item, side: int) -> VisualShape:
        return VisualShape((Plane(side, side),))

    def before_projector(self, items: list[Item]) -> Tensor:
        call = {**items[0].arguments, "pixel_values": torch.cat([i.arguments["pixel_values"] for i in items])}
        features = input_of(getattr(*self.projector_at), lambda: self.model.model.get_image_features(**call, return_dict=True))
        return features[:, features.shape[1] - math.prod(self.unit(items[0])) :]  # the class token may be in front

    def run(self, modality: str, items: list[Item], needs: frozenset[str], grid: Grid | None) -> list[Encoding]:
        call = dict(items[0].arguments)
        pixels = torch.cat([i.arguments["pixel_values"] for i in items])
        shapes = [i.shape for i in items]
        if grid is not None:
            patch = self.config.vision_config.patch_size
            pixels = smaller_pixels(pixels, grid[0] * patch, grid[1] * patch)
            call["interpolate_pos_encoding"] = True
            shapes = [self.shape_at(i, grid) for i in items]

        def run_model() -> Any:
            return self.model.model.get_image_features(**{**call, "pixel_values": pixels}, return_dict=True).pooler_output

        capture: dict[str, Tensor] = {}
        if needs & OF_TOWER:
            features, capture = watched(self.tower, run_model, *self._settings(call), needs)
        else:
            with positions_at_hand(self.tower) if grid is not None else contextlib.nullcontext():
                features = run_model()
        out = [Encoding(f, shape) for f, shape in zip(features, shapes)]
        if not capture:
            return out
        beside: dict[str, Any] = {name: value.to(out[0].features.device) for name, value in capture.items()}
        return [replace(e, **{name: value[i] for name, value in beside.items()}) for i, e in enumerate(out)]

    def inside(self, method: Any, item: Item, pixels: Tensor, rounds: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        require_own(self, self._settings(item.arguments))
        hidden, steps = run_inside(method, self.tower, pixels, rounds)
        owner, name = self.projector_at
        return getattr(owner, name)(hidden[:, int(self.class_token) :]), steps.kept

    def become_smaller(self, grid: Grid) -> None:
        """Makes the model one for images of this grid, its position embeddings interpolated as ``resize`` has them in each call."""
        embeddings, vision = self.tower.embeddings, self.config.vision_config
        height, width = (cells * vision.patch_size for cells in grid)
        old = embeddings.position_embedding
        with torch.no_grad(), at_hand(old):
            stand_in = torch.zeros(1, 1, old.weight.shape[1], device=old.weight.device, dtype=old.weight.dtype)
            rows = embeddings.interpolate_pos_encoding(stand_in, height, width)[0]
        embeddings.position_embedding = torch.nn.Embedding.from_pretrained(rows.clone(), freeze=not old.weight.requires_grad)
        embeddings.image_size = vision.image_size = height
        embeddings.num_patches = math.prod(grid)
        embeddings.num_positions = len(rows)
        embeddings.register_buffer("position_ids", torch.arange(len(rows), device=rows.device)[None], persistent=False)
        self.config.image_seq_length = self.typical()[0].shape.length

    def place(self, planes: tuple[Plane, ...], size: tuple[int, int], image_processor: Any) -> tuple[Plane, ...]:
        return uncropped(planes, size, image_processor)
