"""InternVL in vLLM with fewer rows for each image: its tiles lie with those of all others in one tensor."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from mllm_efficient.compressors.base import Compressor
from mllm_efficient.errors import UnsupportedModelError

from ..families.internvl import tile_limits
from .alone import Image, each_alone
from .front import FIELD, QUESTION, AnySizeInfo, CompressedInfo, CompressedProcessor
from .models import MULTIMODAL_REGISTRY, CompressedModel, Mark, in_parts, marked, shortened

try:
    from vllm.model_executor.models import interns1
except ImportError as error:
    raise UnsupportedModelError(f"this vLLM lacks what the plugin of mllm-efficient stands on ({error}): 0.31 to 0.33 have it") from error

TILES = "image_num_patches"  # of each image, in what vLLM's processor and the model's call say
CROPPED = {"crop_to_patches": True}  # by transformers' processor of the family, whatever the image processor alone would do


class InternVLInfo(AnySizeInfo, interns1.InternS1ProcessingInfo):
    plain = interns1.InternS1ProcessingInfo

    def get_num_image_tokens(self, **sizes: Any) -> int:
        return super(CompressedInfo, self).get_num_image_tokens(**sizes)

    @property
    def cutting(self) -> dict[str, Any]:
        """How the image processor cuts, with the server's own settings of it."""
        return {**CROPPED, **self.ctx.get_merged_mm_kwargs({})}

    def uncompressed(self, height: int, width: int) -> int:
        processor = self.get_hf_processor()
        return processor.image_seq_length * processor.image_processor.get_number_of_image_patches(height, width, self.cutting)

    def most(self, method: Compressor) -> int:
        _, tiles = tile_limits({**self.get_hf_processor().image_processor.to_dict(), **self.cutting})
        return self.shapes.plan_of_tiles(method, tiles + (tiles > 1)).kept


class InternVLProcessor(CompressedProcessor, interns1.InternS1MultiModalProcessor):
    one_each = TILES

    @functools.cached_property
    def around(self) -> tuple[Sequence[int], Sequence[int]]:
        processor = self.info.get_hf_processor()
        return [processor.start_image_token_id], [processor.end_image_token_id]

    def uncompressed(self, images: Any, index: int) -> int:
        size = images.get_image_size(index)
        return self.info.uncompressed(size.height, size.width)

    def rows(self, method: Compressor, mm_items: Any, out_mm_kwargs: Any, index: int) -> int:
        return self.info.shapes.plan_of_tiles(method, int(out_mm_kwargs["image"][index][TILES].data)).kept


@MULTIMODAL_REGISTRY.register_processor(InternVLProcessor, info=InternVLInfo, dummy_inputs=interns1.InternS1DummyInputsBuilder)
class CompressedInternVL(CompressedModel, interns1.InternS1ForConditionalGeneration):
    """InternVL, as transformers has it."""

    def embed_multimodal(self, **kwargs: Any) -> Any:
        marks, questions = kwargs.pop(FIELD, None), kwargs.pop(QUESTION, None)
        if self.settings is None or kwargs.get("pixel_values") is None:
            return super(CompressedModel, self).embed_multimodal(**kwargs)
        tiles = kwargs[TILES].tolist()
        own, out, each = marked(marks, len(tiles), questions), list[torch.Tensor](), self.shapes.adapter.side**2
        for part, rows in in_parts([n * each for n in tiles], tiles, self.room):
            given = {**kwargs, "pixel_values": kwargs["pixel_values"][rows], TILES: kwargs[TILES][part]}
            features = self._process_vision_input(self._parse_and_validate_image_input(**given))
            out += self._compressed_tiles(features, tiles[part], own[part])
        return tuple(out)

    def _compressed_tiles(self, features: Sequence[torch.Tensor], tiles: Sequence[int], marks: Sequence[Mark]) -> list[torch.Tensor]:
        """(K, D) of each image. features: (N, D) of each."""
        assert self.settings is not None
        methods = [self.settings.of_request(m.asked or None) for m in marks]
        plans = [self.shapes.plan_of_tiles(*given) for given in zip(methods, tiles)]
        images = [Image(m.mark, f, plan.kept, f.shape[1]) for m, f, plan in zip(marks, features, plans)]
        return each_alone(images, lambda i: shortened(methods[i], plans[i], features[i], self.embedded(marks[i].words)))

    def get_mm_lora_token_counts(self, *, modality: str, mm_kwargs: Any, num_mm_embeds: int) -> tuple[int, int | None]:
        return super(CompressedModel, self).get_mm_lora_token_counts(modality=modality, mm_kwargs=mm_kwargs, num_mm_embeds=num_mm_embeds)
