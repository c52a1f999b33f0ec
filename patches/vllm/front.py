"""The front end of vLLM's families with fewer image tokens: counts known from an image's size, and what a request may ask for.

A request that cannot be served is refused here (HTTP 400): behind the front end there is one engine for everybody.
"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mllm_efficient.apply.plan import Plan
from mllm_efficient.compressors.base import Compressor
from mllm_efficient.errors import BadSettingError, CountMismatchError, NotFiniteError, UnsupportedModelError, shortened

from .metrics import Tally
from .settings import REQUEST, Settings, settings_of
from .shapes import Shapes

try:
    from vllm.multimodal.inputs import MultiModalFieldConfig
    from vllm.multimodal.parse import ImageEmbeddingItems
    from vllm.multimodal.processing import PromptReplacement, PromptUpdateDetails
except (ImportError, AttributeError) as error:
    raise UnsupportedModelError(
        f"this vLLM lacks what the plugin of mllm-efficient stands on ({error}): 0.31 to 0.33 are known to have it; "
        "MLLM_EFFICIENT_VLLM=0 switches the plugin off"
    ) from error

if TYPE_CHECKING:
    Stock = Any  # the class of vLLM that a mix-in stands over
else:
    Stock = object

FIELD = "visual_tokens_mark"  # of each image (2,): the count that its request asked for, 0 for none, and a name for what failures say
QUESTION = "visual_tokens_question"  # of each image (T,): its prompt's text, for a method that looks at it; in the hash, too
COUNTED = contextvars.ContextVar("counted", default=True)  # whether images are a request's: not those of the server's own warm-up


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

    @functools.cached_property
    def tally(self) -> Tally:
        """The counters of this model, which ``/metrics`` shows."""
        assert self.settings is not None
        name = self.ctx.model_config.served_model_name
        return Tally(name if isinstance(name, str) else name[0], self.settings.method.name)

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

    def uncompressed(self, height: int, width: int) -> int:
        """Rows of an image of this size by vLLM's own count."""
        return self.plain(self.ctx).get_num_image_tokens(image_width=width, image_height=height)

    def get_image_size_with_most_features(self, **limits: Any) -> Any:
        return self.plain(self.ctx).get_image_size_with_most_features(**limits)  # the tower sees it whole

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int] | None:
        if self.settings is None or not self.settings.allowed:
            return super().get_mm_max_tokens_per_item(seq_len, mm_counts)
        size = self.get_image_size_with_most_features()
        most = {"image": max(self.count(m, size.height, size.width) for m in self.settings.methods)}
        if "video" in self.get_supported_mm_limits():
            most["video"] = self.get_max_video_tokens(seq_len, mm_counts)
        return most


class AnySizeInfo(CompressedInfo):
    """Images of any size. Videos are refused where settings are given: they are not compressed."""

    @property
    def image_token(self) -> int:
        return self.hf.image_token_id

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return super().get_supported_mm_limits() if self.settings is None else {"image": None, "video": 0}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int] | None:
        if self.settings is None:
            return super().get_mm_max_tokens_per_item(seq_len, mm_counts)
        return {"image": max(map(self.most, self.settings.methods))}

    def most(self, method: Compressor) -> int:
        """Tokens that a method leaves of the largest image."""
        raise TypeError(f"{type(self).__name__} must define most")


def fingerprint(image: Any, asked: int | None) -> int:
    """What a failure of an image is known by, under the count that was asked for: the same for the same pixels, and no hash of vLLM's."""
    pixels = np.ascontiguousarray(image)
    about = f"{pixels.shape} {pixels.dtype} {asked}".encode()
    return int.from_bytes(hashlib.blake2b(pixels.tobytes(), digest_size=7, key=about[:64]).digest())


def stock_kwargs(given: Mapping[str, object]) -> dict[str, object]:
    """A request's settings without ours."""
    return {k: v for k, v in given.items() if k not in (REQUEST, QUESTION)}


class CompressedProcessor(Stock):
    """Over a ``MultiModalProcessor`` of vLLM: takes the request's count, and replaces each placeholder by as many as will be needed.

    one_each: what the processor makes one of for each image.
    """

    one_each = "pixel_values"

    def __init__(self, info: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(info, *args, **kwargs)
        if info.settings is not None:
            _ = info.tally  # so that the counters are there, and the method is known, before the first picture

    @functools.cached_property
    def around(self) -> tuple[Sequence[int], Sequence[int]]:
        """Tokens that the family puts before and after an image's placeholders."""
        return (), ()

    def get_dummy_mm_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Of pictures that nobody sent, so they are not counted."""
        before = COUNTED.set(False)
        try:
            return super().get_dummy_mm_inputs(*args, **kwargs)
        finally:
            COUNTED.reset(before)

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """With names that clients give to images made ours: vLLM would take them for the image's hash as they are."""
        settings, names = self.info.settings, inputs.mm_uuid_items
        if settings is None:
            return super().apply(inputs, timing_ctx)
        self._require_known(inputs)
        if names:
            own = {
                modality: [None if name is None else f"{name}#{settings.fingerprint}" for name in given]
                for modality, given in names.items()
            }
            inputs = dataclasses.replace(inputs, mm_uuid_items=own)
        if "text" in settings.method.needs and inputs.mm_data_items.get("image"):
            given = {**inputs.hf_processor_mm_kwargs, QUESTION: self._question(inputs.prompt)}
            inputs = dataclasses.replace(inputs, hf_processor_mm_kwargs=given)
        out = super().apply(inputs, timing_ctx)
        if COUNTED.get():
            self._count(inputs, out)
        return out

    def _question(self, prompt: Sequence[int]) -> list[int]:
        """The tokens of a prompt that stand for no image. Raises ``CountMismatchError`` (HTTP 400) for one without."""
        images, (before, after) = set(self.info.shapes.adapter.placeholders.values()), self.around
        if COUNTED.get() and images.issuperset(prompt):
            raise CountMismatchError(f"{self.info.settings.method.name} chooses by the text of the prompt, and this prompt has none")
        words = [word for token in prompt for word in ((*before, *after) if token in images else (int(token),))]
        return words or [0]

    def _require_known(self, inputs: Any) -> None:
        """Raises for settings of the image processor, which would give an image other tokens than planned, and for broken embeddings."""
        unknown = sorted(set(inputs.hf_processor_mm_kwargs) - {REQUEST})
        if unknown:
            raise BadSettingError(
                f"mm_processor_kwargs: {shortened(', '.join(unknown))} cannot be set by a request on this server: {REQUEST} alone can"
            )
        images = inputs.mm_data_items.get("image")
        if isinstance(images, ImageEmbeddingItems):
            for i in range(images.get_count()):
                if not torch.as_tensor(images.get(i)).isfinite().all():
                    raise NotFiniteError(f"embedding {i + 1} of the request's images holds NaN or infinity")

    def _count(self, inputs: Any, out: Any) -> None:
        """Adds the images of a request to the server's counters."""
        images, places = inputs.mm_data_items.get("image"), out["mm_placeholders"].get("image", ())
        if images is None or isinstance(images, ImageEmbeddingItems):
            return
        for i, place in enumerate(places):
            self.info.tally.add(self.uncompressed(images, i), place.get_num_embeds())

    def uncompressed(self, images: Any, index: int) -> int:
        """Rows that an image of a request has where nothing is compressed."""
        size = images.get_image_size(index)
        return self.info.uncompressed(size.height, size.width)

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        if self.info.settings is None:
            return super()._apply_hf_processor_main(mm_items, hf_kwargs)
        asked: Any = hf_kwargs.get(REQUEST)
        self.info.settings.of_request(asked)
        out = super()._apply_hf_processor_main(mm_items, stock_kwargs(hf_kwargs))
        if self.one_each in out:
            images = mm_items["image"]
            marks = [(asked or 0, fingerprint(images.get(i), asked)) for i in range(len(out[self.one_each]))]
            out[FIELD] = torch.tensor(marks, dtype=torch.long)
            if QUESTION in hf_kwargs:
                out[QUESTION] = [torch.tensor(hf_kwargs[QUESTION])] * len(marks)
        return out

    def rows(self, method: Compressor, mm_items: Any, out_mm_kwargs: Any, index: int) -> int:
        """Placeholders of an image."""
        size = mm_items["image"].get_image_size(index)
        plan, own = self.info.planned(method, size.height, size.width), self.info.uncompressed(size.height, size.width)
        if plan.shape.length != own:
            raise CountMismatchError(
                f"a picture of {size.width}x{size.height} has {own} tokens in vLLM and {plan.shape.length} here: send another size"
            )
        return length(plan)

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Mapping[str, Any]:
        fields = super()._get_mm_fields_config(hf_inputs, stock_kwargs(hf_processor_mm_kwargs))
        own = {name: MultiModalFieldConfig.batched("image", keep_on_cpu=True) for name in (FIELD, QUESTION) if name in hf_inputs}
        return {**fields, **own}

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any) -> Sequence[Any]:
        settings, token = self.info.settings, self.info.image_token
        stock = super()._get_prompt_updates(mm_items, stock_kwargs(hf_processor_mm_kwargs), out_mm_kwargs)
        if settings is None or "image" not in mm_items or isinstance(mm_items["image"], ImageEmbeddingItems):
            return stock
        method = settings.of_request(hf_processor_mm_kwargs.get(REQUEST))

        def replacement(index: int) -> Any:
            before, after = self.around
            ids = [*before, *[token] * self.rows(method, mm_items, out_mm_kwargs, index), *after]
            return PromptUpdateDetails.select_token_id(ids, token) if before or after else ids

        images = PromptReplacement(modality="image", target=[token], replacement=replacement)
        return [images, *(u for u in stock if u.modality != "image")]
