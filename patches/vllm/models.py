"""vLLM's LLaVA families with fewer image tokens: subclasses that pass everything through where no settings are given.

The front end reserves as many placeholders as ``Shapes`` plans from an image's size; the model runs vLLM's own tower and projector
and hands back as many rows. vLLM would cut a longer answer off without a word, so the number of rows is checked here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from mllm_efficient.apply.compress import Context, rows_of
from mllm_efficient.apply.plan import Plan, describe
from mllm_efficient.compressors.base import Compressor, generator_for
from mllm_efficient.errors import CountMismatchError, UnsupportedModelError

from ..base import Encoding
from . import PROJECTOR
from .settings import REQUEST, Settings, is_projector, settings_of, untested
from .shapes import Shapes

try:
    from vllm.logger import init_logger
    from vllm.model_executor.models import llava, llava_next, llava_onevision
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.inputs import MultiModalFieldConfig
    from vllm.multimodal.parse import ImageEmbeddingItems
    from vllm.multimodal.processing import PromptReplacement

    OF_LLAVA = (llava._build_llava_or_pixtral_hf_info, llava._build_llava_or_pixtral_hf_processor)
except (ImportError, AttributeError) as error:
    raise UnsupportedModelError(
        f"this vLLM lacks what the plugin of mllm-efficient stands on ({error}): 0.31 to 0.33 are known to have it; "
        "MLLM_EFFICIENT_VLLM=0 switches the plugin off"
    ) from error

logger = init_logger("vllm.mllm_efficient")
FIELD = "visual_tokens_asked"  # of each image: the count that its request asked for, 0 for none


if TYPE_CHECKING:
    Stock = Any  # the class of vLLM that a mix-in stands over
else:
    Stock = object


class Planned(Stock):
    """What the front end and the model both know of a model's config."""

    @functools.cached_property
    def settings(self) -> Settings | None:
        return settings_of(self.hf)

    @functools.cached_property
    def shapes(self) -> Shapes:
        return Shapes(self.hf)

    @property
    def hf(self) -> Any:
        raise TypeError(f"{type(self).__name__} must define hf")

    def planned(self, method: Compressor, height: int, width: int) -> Plan:
        return self.shapes.plan(method, int(height), int(width))


def length(plan: Plan) -> int:
    """Rows that an image has in the prompt."""
    return plan.kept + plan.separators


# ------------------------------------------------------------------------------------------------------- front end


class CompressedInfo(Planned):
    """Over a ``ProcessingInfo`` of vLLM, which ``plain`` names: token counts, and an identity of images that holds the settings."""

    plain: type

    @property
    def hf(self) -> Any:
        return self.get_hf_config()

    @property
    def image_token(self) -> int:
        return self.hf.image_token_index

    @property
    def model_id(self) -> str:
        name = super().model_id
        return name if self.settings is None else f"{name}#{self.settings.fingerprint}"

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        if self.settings is None:
            return super().get_num_image_tokens(image_width=image_width, image_height=image_height)
        return self.count(self.settings.method, image_height, image_width)

    def count(self, method: Compressor, height: int, width: int) -> int:
        return length(self.planned(method, height, width))

    def get_image_size_with_most_features(self, **limits: Any) -> Any:
        return self.plain(self.ctx).get_image_size_with_most_features(**limits)  # the tower sees it whole

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int] | None:
        if self.settings is None or not self.settings.allowed:
            return super().get_mm_max_tokens_per_item(seq_len, mm_counts)
        size = self.get_image_size_with_most_features()
        methods = [self.settings.method, *(self.settings.of_request(n) for n in self.settings.allowed)]
        most = {"image": max(self.count(m, size.height, size.width) for m in methods)}
        if "video" in self.get_supported_mm_limits():
            most["video"] = self.get_max_video_tokens(seq_len, mm_counts)
        return most


def stock_kwargs(given: Mapping[str, object]) -> dict[str, object]:
    """A request's settings without ours."""
    return {k: v for k, v in given.items() if k != REQUEST}


class CompressedProcessor(Stock):
    """Over a ``MultiModalProcessor`` of vLLM: takes the request's count, and replaces each placeholder by as many as will be needed.

    one_each: what the processor makes one of for each image.
    """

    one_each = "pixel_values"

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """With names that clients give to images made ours: vLLM would take them for the image's hash as they are."""
        settings, names = self.info.settings, inputs.mm_uuid_items
        if settings is not None and names:
            own = {
                modality: [None if name is None else f"{name}#{settings.fingerprint}" for name in given]
                for modality, given in names.items()
            }
            inputs = dataclasses.replace(inputs, mm_uuid_items=own)
        return super().apply(inputs, timing_ctx)

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        if self.info.settings is None:
            return super()._apply_hf_processor_main(mm_items, hf_kwargs)
        asked: Any = hf_kwargs.get(REQUEST)
        self.info.settings.of_request(asked)
        out = super()._apply_hf_processor_main(mm_items, stock_kwargs(hf_kwargs))
        if self.one_each in out:
            out[FIELD] = torch.full((len(out[self.one_each]),), asked or 0)
        return out

    def rows(self, method: Compressor, mm_items: Any, out_mm_kwargs: Any, index: int) -> int:
        """Placeholders of an image."""
        size = mm_items["image"].get_image_size(index)
        return self.info.count(method, size.height, size.width)

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Mapping[str, Any]:
        fields = super()._get_mm_fields_config(hf_inputs, stock_kwargs(hf_processor_mm_kwargs))
        return {**fields, FIELD: MultiModalFieldConfig.batched("image", keep_on_cpu=True)} if FIELD in hf_inputs else fields

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any) -> Sequence[Any]:
        settings, token = self.info.settings, self.info.image_token
        stock = super()._get_prompt_updates(mm_items, stock_kwargs(hf_processor_mm_kwargs), out_mm_kwargs)
        if settings is None or "image" not in mm_items or isinstance(mm_items["image"], ImageEmbeddingItems):
            return stock
        method = settings.of_request(hf_processor_mm_kwargs.get(REQUEST))

        def replacement(index: int) -> list[int]:
            return [token] * self.rows(method, mm_items, out_mm_kwargs, index)

        images = PromptReplacement(modality="image", target=[token], replacement=replacement)
        return [images, *(u for u in stock if u.modality != "image")]


# ----------------------------------------------------------------------------------------------------------- model


class CompressedModel(Planned):
    """Over a model of vLLM: its images with fewer rows."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if self.settings is None:
            return
        method = self.settings.method
        self.shapes.check(method)
        self.require(method)
        unknown = untested(vllm_config)
        if unknown:
            logger.warning("visual tokens: no test of mllm-efficient has run with %s: compare answers first", ", ".join(unknown))
        usual = self.shapes.adapter.usual()
        self.room = vllm_config.scheduler_config.max_num_batched_tokens
        if usual is None or method.as_projector is not None:
            logger.info("visual tokens: %s", describe(method, usual, self.shapes.adapter))
        else:
            logger.info("visual tokens: %s, %d -> %d per image", method.name, usual.n, self.planned(method, 0, 0).kept)
        if is_projector(self.settings):
            from mllm_efficient.trained.projector import TokenFlexProjector

            config = getattr(self.hf, PROJECTOR, None)
            if config is None:
                raise UnsupportedModelError(f"{method.name} is trained: serve a folder that mllm-efficient export wrote")
            with self._mark_tower_model(vllm_config, "image"):
                self.visual_projector = TokenFlexProjector(*self.shapes.adapter.projector_widths, **config)

    @property
    def hf(self) -> Any:
        return self.config

    def require(self, method: Compressor) -> None:
        """Raises for a method that this family cannot serve."""

    def _largest(self) -> int:
        """Tokens of the tower for the largest image, in which vLLM's own budget would count."""
        usual = self.shapes.adapter.usual()
        if usual is not None:
            return usual.n
        side = self.hf.vision_config.image_size
        return self.shapes.adapter.side**2 * (1 + max(height * width for height, width in self.hf.image_grid_pinpoints) // side**2)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        asked = kwargs.pop(FIELD, None)
        if self.settings is None or kwargs.get("pixel_values") is None:
            return super().embed_multimodal(**kwargs)
        others = {k: v for k, v in kwargs.items() if k not in ("pixel_values", "image_sizes")}
        out: list[torch.Tensor] = []
        for pixels, sizes, counts in self._batches(kwargs["pixel_values"], kwargs.get("image_sizes"), asked):
            out += self._compressed(pixels, sizes, counts)
        if any(v is not None for v in others.values()):
            out += list(super().embed_multimodal(**others))
        return tuple(out)

    def _batches(self, pixels: Any, sizes: Any, asked: Any) -> Iterator[tuple[Any, Any, list[int]]]:
        """The images in parts that the tower takes at once: with few tokens each, the scheduler sends many of them together."""
        counts = [0] * len(pixels) if asked is None else [int(n) for n in asked]
        together = max(1, self.room // self._largest())
        for low in range(0, len(pixels), together):
            part = slice(low, low + together)
            yield pixels[part], None if sizes is None else sizes[part], counts[part]

    def _compressed(self, pixels: Any, sizes: Any, counts: Sequence[int]) -> list[torch.Tensor]:
        assert self.settings is not None
        where = [(0, 0)] * len(pixels) if sizes is None else [(int(h), int(w)) for h, w in sizes.tolist()]
        methods = [self.settings.of_request(n or None) for n in counts]
        plans = [self.planned(m, h, w) for m, (h, w) in zip(methods, where)]
        image_input = self._parse_and_validate_image_input(pixel_values=pixels, **({} if sizes is None else {"image_sizes": sizes}))
        if is_projector(self.settings):
            rows = self._projected(pixels, plans)
        else:
            features = list(self._process_image_input(image_input))
            for plan, f in zip(plans, features):
                if len(f) != plan.shape.length:
                    raise CountMismatchError(f"vLLM gave {len(f)} rows for an image that has {plan.shape.length} in transformers")
            rows = [
                rows_of(method, plan, Encoding(f, plan.shape), Context(generator_for(method, 0)))
                for method, plan, f in zip(methods, plans, features)
            ]
        for plan, got in zip(plans, rows):
            if len(got) != length(plan):
                raise CountMismatchError(f"{len(got)} rows for an image whose prompt has room for {length(plan)}")
        return rows

    def _projected(self, pixels: Any, plans: Sequence[Plan]) -> list[torch.Tensor]:
        """Each view of each image through the trained projector at its own side."""
        views = [p if p.ndim == 4 else p[None] for p in pixels]
        tower = self._image_pixels_to_features(self.vision_tower, torch.cat(views))
        grid = self.shapes.adapter.unit(self.shapes.item(1, 1)) if self.shapes.adapter.usual() else (self.shapes.adapter.side,) * 2
        parts = tower.split([len(v) for v in views])
        return [self.visual_projector(part, side=plan.side, grid=grid).flatten(0, 1) for part, plan in zip(parts, plans)]

    def get_mm_lora_token_counts(self, *, modality: str, mm_kwargs: Any, num_mm_embeds: int) -> tuple[int, int | None]:
        if self.settings is None or modality != "image" or mm_kwargs is None:
            return super().get_mm_lora_token_counts(modality=modality, mm_kwargs=mm_kwargs, num_mm_embeds=num_mm_embeds)
        pixels = mm_kwargs["pixel_values"].data
        vision = self.hf.vision_config
        whole = (vision.image_size // vision.patch_size) ** 2 * (len(pixels) if pixels.ndim == 4 else 1)
        return whole, whole


# -------------------------------------------------------------------------------------------------------- families


class LlavaInfo(CompressedInfo, llava.LlavaProcessingInfo):
    plain = llava.LlavaProcessingInfo


class LlavaProcessor(CompressedProcessor, llava.LlavaMultiModalProcessor):
    pass


def _llava_info(ctx: Any) -> Any:
    stock = OF_LLAVA[0](ctx)
    return LlavaInfo(ctx) if type(stock) is llava.LlavaProcessingInfo else stock  # Pixtral towers pass through


def _llava_processor(info: Any, dummy_inputs: Any) -> Any:
    if isinstance(info, LlavaInfo):
        return LlavaProcessor(info, dummy_inputs)
    return OF_LLAVA[1](info, dummy_inputs)


@MULTIMODAL_REGISTRY.register_processor(_llava_processor, info=_llava_info, dummy_inputs=llava.LlavaDummyInputsBuilder)
class CompressedLlava(CompressedModel, llava.LlavaForConditionalGeneration):
    """LLaVA-1.5."""


class LlavaNextInfo(CompressedInfo, llava_next.LlavaNextProcessingInfo):
    plain = llava_next.LlavaNextProcessingInfo


class LlavaNextProcessor(CompressedProcessor, llava_next.LlavaNextMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(LlavaNextProcessor, info=LlavaNextInfo, dummy_inputs=llava.LlavaDummyInputsBuilder)
class CompressedLlavaNext(CompressedModel, llava_next.LlavaNextForConditionalGeneration):
    """LLaVA-NeXT."""


class LlavaOnevisionInfo(CompressedInfo, llava_onevision.LlavaOnevisionProcessingInfo):
    plain = llava_onevision.LlavaOnevisionProcessingInfo


class LlavaOnevisionProcessor(CompressedProcessor, llava_onevision.LlavaOnevisionMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    LlavaOnevisionProcessor, info=LlavaOnevisionInfo, dummy_inputs=llava_onevision.LlavaOnevisionDummyInputsBuilder
)
class CompressedLlavaOnevision(CompressedModel, llava_onevision.LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision: images; videos pass through."""
