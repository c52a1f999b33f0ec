"""vLLM's LLaVA families with fewer image tokens: subclasses that pass everything through where no settings are given.

The front end reserves as many placeholders as ``Shapes`` plans from an image's size; the model runs vLLM's own tower and projector
and hands back as many rows. vLLM would cut a longer answer off without a word, so the number of rows is checked here.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from mllm_efficient.apply.compress import Context, rows_of
from mllm_efficient.apply.plan import Plan, describe
from mllm_efficient.compressors.base import Compressor, generator_for
from mllm_efficient.errors import CountMismatchError, UnsupportedModelError

from ..base import Encoding
from . import PROJECTOR
from .alone import Image, each_alone
from .front import FIELD, QUESTION, CompressedInfo, CompressedProcessor, Planned, length
from .settings import is_projector, untested
from .tower import GIVEN, require_watchable, watching

try:
    from vllm.logger import init_logger
    from vllm.model_executor.models import llava, llava_next, llava_onevision
    from vllm.multimodal import MULTIMODAL_REGISTRY

    OF_LLAVA = (llava._build_llava_or_pixtral_hf_info, llava._build_llava_or_pixtral_hf_processor)
except (ImportError, AttributeError) as error:
    raise UnsupportedModelError(
        f"this vLLM lacks what the plugin of mllm-efficient stands on ({error}): 0.31 to 0.33 are known to have it; "
        "MLLM_EFFICIENT_VLLM=0 switches the plugin off"
    ) from error

logger = init_logger("vllm.mllm_efficient")


# ----------------------------------------------------------------------------------------------------------- model


class Mark(NamedTuple):
    """Of an image: the count that its request asked for, 0 for none, its fingerprint, and where it matters its prompt's text (T,)."""

    asked: int = 0
    mark: int = 0
    words: torch.Tensor | None = None


def marked(marks: Any, images: int, questions: Any = None) -> list[Mark]:
    """The marks of so many images; none are given for what vLLM makes up to measure memory."""
    words = [None] * images if questions is None else list(questions)
    return [Mark()] * images if marks is None else [Mark(int(m[0]), int(m[1]), text) for m, text in zip(marks, words, strict=True)]


def in_parts(tokens: Sequence[int], rows: Sequence[int], room: int) -> Iterator[tuple[slice, slice]]:
    """Images, and their rows in the input, in parts that the tower takes at once: with few tokens each, the scheduler sends many together.

    tokens, rows: of each image. room: tokens of a part, unless one image alone has more.
    """
    ends, starts, low = [0, *itertools.accumulate(tokens)], [0, *itertools.accumulate(rows)], 0
    while low < len(tokens):
        high = low + 1
        while high < len(tokens) and ends[high + 1] - ends[low] <= room:
            high += 1
        yield slice(low, high), slice(starts[low], starts[high])
        low = high


def shortened(method: Compressor, plan: Plan, features: torch.Tensor, text: torch.Tensor | None = None, **beside: Any) -> torch.Tensor:
    """(K, D) of the features (N, D) of an image. text: (T, D) of its prompt. beside: what the tower says of its tokens."""
    if len(features) != plan.shape.length:
        raise CountMismatchError(f"vLLM gave {len(features)} rows for an image that has {plan.shape.length} in transformers")
    return rows_of(method, plan, Encoding(features, plan.shape, **beside), Context(generator_for(method, 0), text))


class CompressedModel(Planned):
    """Over a model of vLLM: its images with fewer rows."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if self.settings is None:
            return
        method = self.settings.method
        self.shapes.check(method)
        self.require(method)
        self.watched = bool(GIVEN & set(method.needs))
        if self.watched:
            require_watchable(vllm_config, method.name)
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
        marks, questions = kwargs.pop(FIELD, None), kwargs.pop(QUESTION, None)
        if self.settings is None or kwargs.get("pixel_values") is None:
            return super().embed_multimodal(**kwargs)
        others = {k: v for k, v in kwargs.items() if k not in ("pixel_values", "image_sizes")}
        pixels, sizes = kwargs["pixel_values"], kwargs.get("image_sizes")
        own, out = marked(marks, len(pixels), questions), list[torch.Tensor]()
        for part, _ in in_parts([self._largest()] * len(pixels), [1] * len(pixels), self.room):
            out += self._compressed(pixels[part], None if sizes is None else sizes[part], own[part])
        if any(v is not None for v in others.values()):
            out += list(super().embed_multimodal(**others))
        return tuple(out)

    def _compressed(self, pixels: Any, sizes: Any, marks: Sequence[Mark]) -> list[torch.Tensor]:
        assert self.settings is not None
        where = [(0, 0)] * len(pixels) if sizes is None else [(int(h), int(w)) for h, w in sizes.tolist()]
        methods = [self.settings.of_request(m.asked or None) for m in marks]
        plans = [self.planned(m, h, w) for m, (h, w) in zip(methods, where)]
        beside: dict[str, torch.Tensor] = {}
        if is_projector(self.settings):
            features = self._projected(pixels, plans)
        else:
            given = self._parse_and_validate_image_input(pixel_values=pixels, **({} if sizes is None else {"image_sizes": sizes}))
            strategy = self.hf.vision_feature_select_strategy
            with watching(self.vision_tower, strategy, beside) if self.watched else contextlib.nullcontext():
                features = list(self._process_image_input(given))

        def rows(i: int) -> torch.Tensor:
            if is_projector(self.settings):
                return features[i]
            own = {name: values[i] for name, values in beside.items()}
            return shortened(methods[i], plans[i], features[i], self.embedded(marks[i].words), **own)

        width = self.hf.get_text_config().hidden_size
        return each_alone([Image(m.mark, f, length(plan), width) for m, f, plan in zip(marks, features, plans)], rows)

    def embedded(self, words: torch.Tensor | None) -> torch.Tensor | None:
        """(T, D) the words of a prompt as the language model has them."""
        if words is None:
            return None
        model = self.get_language_model()
        return model.embed_input_ids(words.to(next(model.parameters()).device))

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
