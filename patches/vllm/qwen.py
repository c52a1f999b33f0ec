"""Qwen2.5-VL and Qwen3-VL in vLLM with fewer rows for each image: the rows that stay keep the M-RoPE positions they had.

Which rows stay is known after the tower has run, and positions are made before. vLLM has a way for its own pruning of videos: rows carry
columns after their features, and the model is asked for the positions again (``recompute_mrope_positions``). It is on where
``video_pruning_rate`` is above 0; a rate that removes nothing is set here. What the pixels say (``sparse``) is known before, and needs none
of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mllm_efficient.apply.compress import Context, layers_of
from mllm_efficient.compressors.base import Compressor, generator_for
from mllm_efficient.errors import CountMismatchError, MllmEfficientError, UnsupportedModelError

from ..base import Encoding
from .alone import Image, each_alone
from .front import COUNTED, FIELD, QUESTION, AnySizeInfo, CompressedInfo, CompressedProcessor, Stock, stock_kwargs
from .models import MULTIMODAL_REGISTRY, CompressedModel, Mark, in_parts, marked
from .settings import KEY, settings_of
from .sparse import STAY, cut, places_of, require_tower, run_on, split_of

try:
    from vllm.model_executor.models import qwen2_5_vl, qwen3_5, qwen3_vl
    from vllm.multimodal.inputs import MultiModalFieldConfig
except ImportError as error:
    raise UnsupportedModelError(f"this vLLM lacks what the plugin of mllm-efficient stands on ({error}): 0.31 to 0.33 have it") from error

NOTHING = 1e-17  # of videos is removed: 1 - 1e-17 is 1
COLUMNS = 4  # after the features of a row: its row and its column, each as quotient and remainder
BASE = 128  # of these: whole numbers up to 256 are exact in bfloat16


def asks_again() -> bool:
    """Whether this vLLM's runner calls ``recompute_mrope_positions``: the one for CPUs skips it (``CPUModelRunner.load_model``)."""
    from vllm.platforms import current_platform

    return not current_platform.is_cpu()


# ------------------------------------------------------------------------------------------------------- front end


class QwenInfo(AnySizeInfo):
    """Images that are one grid each."""

    def get_num_image_tokens(self, **sizes: Any) -> int:
        full = super(CompressedInfo, self).get_num_image_tokens(**sizes)
        return full if self.settings is None else self.kept(self.settings.method, full)

    def kept(self, method: Compressor, full: int) -> int:
        """Of so many tokens; the most there can be where the pixels say it."""
        return full if method.by_pixels else self.shapes.plan_of_grid(method, 1, full).kept

    def most(self, method: Compressor) -> int:
        return self.kept(method, self.plain(self.ctx).get_max_image_tokens())


class QwenProcessor(CompressedProcessor):
    one_each = "image_grid_thw"

    def uncompressed(self, images: Any, index: int) -> int:
        size = images.get_image_size(index)
        return self.info.plain(self.info.ctx).get_num_image_tokens(
            image_width=size.width, image_height=size.height, image_processor=self.info.get_image_processor(), mm_kwargs={}
        )

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        out, settings = super()._apply_hf_processor_main(mm_items, hf_kwargs), self.info.settings
        if settings is not None and settings.method.by_pixels and "pixel_values" in out:
            cut(self.info.shapes.adapter, settings.method, out, whole=not COUNTED.get())
        return out

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Mapping[str, Any]:
        fields = super()._get_mm_fields_config(hf_inputs, stock_kwargs(hf_processor_mm_kwargs))
        if STAY not in hf_inputs:
            return fields
        tokens, patches = split_of(hf_inputs, self.info.shapes.adapter.merge)
        pixels = MultiModalFieldConfig.flat_from_sizes("image", patches)
        return {**fields, "pixel_values": pixels, STAY: MultiModalFieldConfig.flat_from_sizes("image", tokens, keep_on_cpu=True)}

    def rows(self, method: Compressor, mm_items: Any, out_mm_kwargs: Any, index: int) -> int:
        if method.by_pixels:
            return int(out_mm_kwargs["image"][index][STAY].data.sum())
        _, height, width = out_mm_kwargs["image"][index]["image_grid_thw"].data.tolist()
        merge = self.info.shapes.adapter.merge
        return self.info.shapes.plan_of_grid(method, height // merge, width // merge).kept


# ----------------------------------------------------------------------------------------------------------- model


def with_places(
    method: Compressor | None, plan: Any, features: torch.Tensor, width: int, rows: int, columns: int, text: torch.Tensor | None = None
) -> torch.Tensor:
    """(K, D + COLUMNS) of an image of rows x columns tokens: what stays of features (N, D) and where it was.

    method: None leaves the image as it is. width: of the features proper; what follows them is of deep layers. text: (T, D) of its prompt.
    """
    if len(features) != rows * columns:
        raise CountMismatchError(f"vLLM gave {len(features)} rows for an image of {rows} x {columns}")
    place = torch.arange(len(features), device=features.device)
    at = torch.stack([part for v in (place // columns, place % columns) for part in (v // BASE, v % BASE)], dim=1)
    places = at.to(features.dtype)
    if method is None:
        return torch.cat([features, places], dim=1)
    deep = (features[:, width:],) if features.shape[1] > width else ()
    encoding = Encoding(features[:, :width], plan.shape, deep)
    return torch.cat(layers_of(method, plan, encoding, Context(generator_for(method, 0), text), beside=(places,)), dim=1)


def keep_places(vllm_config: Any, method: Compressor) -> None:
    """Makes vLLM ask a model with M-RoPE for positions again, unless the front end knows them. Raises where it cannot, and where videos
    would be pruned beside it."""
    if not method.by_pixels and not asks_again():
        raise UnsupportedModelError(
            f"{KEY}: vLLM on CPUs never asks a model for M-RoPE positions again, so models with M-RoPE (Qwen-VL, GLM-V) need a GPU"
        )
    images = vllm_config.model_config.get_multimodal_config()
    if images.video_pruning_rate not in (None, 0, NOTHING):
        raise MllmEfficientError(f"{KEY} and --video-pruning-rate cannot both be given: videos are not served beside {KEY}")
    if not method.by_pixels:
        images.video_pruning_rate = NOTHING


class PlacesKept(Stock):
    """Over a model of vLLM with M-RoPE: the rows that stay keep their positions.

    mrope: whether the model has them; merge: patches along a side of a token.
    """

    mrope: bool = True
    supports_multimodal_pruning = True

    @property
    def image_token(self) -> int:
        return self.hf.image_token_id

    def require_places(self, method: Compressor, name: str) -> None:
        """Raises for a method that leaves tokens without a place of their own."""
        if method.merges:
            raise UnsupportedModelError(
                f"{KEY}: {method.name} merges tokens, which then have no M-RoPE position: divprune or uniform select"
            )
        if method.positions == "renumber":
            raise UnsupportedModelError(f"{KEY}: positions=renumber is not served on {name}: leave it out, tokens keep theirs")

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Any) -> tuple[torch.Tensor, int]:
        """Positions (3, L) of the text as if every image were whole; an image's tokens are all where it begins, until it is encoded, unless
        their places are known before."""
        if self.settings is None or not self.mrope:
            return super().get_mrope_input_positions(input_tokens, mm_features)
        known = self.settings.method.by_pixels
        parts, done, now = [], 0, 0
        for feature in sorted(mm_features, key=lambda f: f.mm_position.offset):
            embeds = feature.mm_position.extract_embeds_range()  # (first, last) of each run
            begin, end = embeds[0][0], embeds[-1][1] + 1
            text = begin - done
            _, height, width = (int(v) for v in feature.data["image_grid_thw"].data.flatten().tolist())
            image = places_of(feature.data, self.merge) if known else torch.zeros(3, end - begin, dtype=torch.long)
            parts += [torch.arange(now, now + text).expand(3, -1), now + text + image]
            done = end
            now += text + max(height, width) // self.merge
        parts.append(torch.arange(now, now + len(input_tokens) - done).expand(3, -1))
        positions = torch.cat(parts, dim=1)
        return positions, now + len(input_tokens) - done - len(input_tokens)

    def recompute_mrope_positions(
        self, input_ids: Any, multimodal_embeddings: Sequence[torch.Tensor], mrope_positions: torch.Tensor, num_computed_tokens: int
    ) -> tuple[Sequence[torch.Tensor], torch.Tensor, int]:
        """Rows and columns of the tokens from ``num_computed_tokens`` on that these embeddings are for, which lose their columns."""
        if self.settings is None or not self.mrope:
            return super().recompute_mrope_positions(input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens)
        positions = mrope_positions.clone()
        delta = int(positions.max()) + 1 - positions.shape[1]
        if multimodal_embeddings:
            at = torch.cat([e[:, -COLUMNS:] for e in multimodal_embeddings]).to(positions.device, positions.dtype)
            ids = torch.as_tensor(input_ids, device=positions.device)
            places = (ids == self.image_token).nonzero()[:, 0]
            places = places[places >= num_computed_tokens][: len(at)]
            begin = positions[0, places]  # which this never changes: an image has one time step
            positions[1, places] = begin + BASE * at[:, 0] + at[:, 1]
            positions[2, places] = begin + BASE * at[:, 2] + at[:, 3]
        return [e[:, :-COLUMNS] for e in multimodal_embeddings], positions, delta


class CompressedQwen(PlacesKept, CompressedModel):
    """Over a Qwen-VL of vLLM."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        settings = settings_of(vllm_config.model_config.hf_config)
        if settings is not None:
            keep_places(vllm_config, settings.method)
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    @property
    def merge(self) -> int:
        return self.shapes.adapter.merge

    def require(self, method: Compressor) -> None:
        self.require_places(method, type(self).__name__)
        if method.by_pixels:
            require_tower(self.visual, method)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        (marks, questions, stay), grids = (kwargs.pop(name, None) for name in (FIELD, QUESTION, STAY)), kwargs.get("image_grid_thw")
        if self.settings is None or grids is None or (self.settings.method.by_pixels and stay is None):
            return super(CompressedModel, self).embed_multimodal(**kwargs)
        name = "pixel_values" if kwargs.get("pixel_values") is not None else "image_embeds"
        sizes = [(int(t), int(h), int(w)) for t, h, w in grids.tolist()]
        own, merged = marked(marks, len(sizes), questions), self.merge**2
        tokens, out = [t * h * w // merged for t, h, w in sizes], list[torch.Tensor]()
        if stay is not None:
            return tuple(self._on_patches(kwargs["pixel_values"], sizes, stay.split(tokens), own))
        each = merged if name == "pixel_values" else 1
        for part, rows in in_parts(tokens, [n * each for n in tokens], self.room):
            given = self._parse_and_validate_image_input(**{name: kwargs[name][rows], "image_grid_thw": grids[part]})
            features = self._process_image_input(given)
            out += self._compressed_images(features, sizes[part], own[part], made=name == "image_embeds")
        return tuple(out)

    def _on_patches(self, pixels: Any, sizes: Sequence[Any], stay: Sequence[torch.Tensor], marks: Sequence[Mark]) -> list[Any]:
        """(K, D + deep layers) of each image by the tower on the patches that stay, whose places are known already."""
        kept, out = [int(part.sum()) for part in stay], list[torch.Tensor]()
        for part, rows in in_parts(kept, [k * self.merge**2 for k in kept], self.room):
            out += run_on(self.visual, pixels[rows], sizes[part], stay[part])
        return each_alone([Image(m.mark, f, k, f.shape[1]) for m, f, k in zip(marks, out, kept)], out.__getitem__)

    def get_encoder_cudagraph_config(self) -> Any:
        """Captured towers take whole images, and would go past ``embed_multimodal``."""
        stock = super(CompressedModel, self).get_encoder_cudagraph_config()
        return stock if self.settings is None else dataclasses.replace(stock, modalities=[])

    def _compressed_images(
        self, features: Sequence[torch.Tensor], sizes: Sequence[tuple[int, int, int]], marks: Sequence[Mark], made: bool
    ) -> list[torch.Tensor]:
        """(K, D + deep layers + COLUMNS) of each image. made: they came as embeddings, which stay as they are."""
        assert self.settings is not None
        merge = self.shapes.adapter.merge
        grids = [(height // merge, width // merge) for _, height, width in sizes]
        methods = [self.settings.of_request(m.asked or None) for m in marks]
        plans = [self.shapes.plan_of_grid(method, *grid) for method, grid in zip(methods, grids)]
        images = [
            Image(m.mark, f, rows * columns if made else plan.kept, f.shape[1] + COLUMNS)
            for m, f, plan, (rows, columns) in zip(marks, features, plans, grids)
        ]
        width = self.hf.get_text_config().hidden_size

        def rows_of_image(i: int) -> torch.Tensor:
            text = self.embedded(marks[i].words)
            return with_places(None if made else methods[i], plans[i], features[i], width, *grids[i], text)

        return each_alone(images, rows_of_image)

    def get_mm_lora_token_counts(self, *, modality: str, mm_kwargs: Any, num_mm_embeds: int) -> tuple[int, int | None]:
        if self.settings is None or modality != "image" or mm_kwargs is None:
            return super(CompressedModel, self).get_mm_lora_token_counts(
                modality=modality, mm_kwargs=mm_kwargs, num_mm_embeds=num_mm_embeds
            )
        patches = len(mm_kwargs["pixel_values"].data) if STAY in mm_kwargs else int(mm_kwargs["image_grid_thw"].data.prod())
        return patches, patches // self.shapes.adapter.merge**2


# -------------------------------------------------------------------------------------------------------- families


class Qwen25VLInfo(QwenInfo, qwen2_5_vl.Qwen2_5_VLProcessingInfo):
    plain = qwen2_5_vl.Qwen2_5_VLProcessingInfo


class Qwen25VLProcessor(QwenProcessor, qwen2_5_vl.Qwen2_5_VLMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(Qwen25VLProcessor, info=Qwen25VLInfo, dummy_inputs=qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder)
class CompressedQwen25VL(CompressedQwen, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL."""


class Qwen3VLInfo(QwenInfo, qwen3_vl.Qwen3VLProcessingInfo):
    plain = qwen3_vl.Qwen3VLProcessingInfo


class Qwen3VLProcessor(QwenProcessor, qwen3_vl.Qwen3VLMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(Qwen3VLProcessor, info=Qwen3VLInfo, dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder)
class CompressedQwen3VL(CompressedQwen, qwen3_vl.Qwen3VLForConditionalGeneration):
    """Qwen3-VL, whose deep layers' features follow the rows."""


class Qwen35Info(QwenInfo, qwen3_5.Qwen3_5ProcessingInfo):
    plain = qwen3_5.Qwen3_5ProcessingInfo


@MULTIMODAL_REGISTRY.register_processor(Qwen3VLProcessor, info=Qwen35Info, dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder)
class CompressedQwen35(CompressedQwen, qwen3_5.Qwen3_5ForConditionalGeneration):
    """Qwen3.5: Qwen3-VL without deep layers, most layers of linear attention."""
