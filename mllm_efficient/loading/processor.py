"""A model's processor: opened without what videos alone need, and with a user's own pixel budgets."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from ..errors import MllmEfficientError, did_you_mean
from ..patches.pictures import ASPECT_RATIO, SHARED, settings_of

OF_THE_MODEL = ("patch_size", "temporal_patch_size", "merge_size")  # of the tower: another value does not fit it
OF_A_CALL = ("device", "return_tensors", "data_format", "input_data_format", "disable_grouping")
ALWAYS = ("crop_to_patches",)  # what InternVL's processor says anew in every call, whatever its file has
NEEDS_VIDEO = 'videos need torchvision: pip install "mllm-efficient[video]"'


def for_pictures_alone(processor: Any) -> bool:
    """Whether the family takes videos and the processor was opened without what they need."""
    return bool(getattr(processor, "video_token", None)) and getattr(processor, "video_processor", None) is None


def why_no_videos(processor: Any) -> str:
    """Of a processor without a video processor: what to install, or that its model takes none."""
    return NEEDS_VIDEO if for_pictures_alone(processor) else "this model's processor takes no videos"


def open_processor(source: str, config: Any, **common: Any) -> Any:
    """A folder's or hub model's processor. Without torchvision one that takes videos too is opened for pictures alone.

    config: the model's, of transformers. common: what ``from_pretrained`` takes.
    """
    from transformers import AutoProcessor

    if find_spec("torchvision") is not None:
        return AutoProcessor.from_pretrained(source, **common)
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    cls = PROCESSOR_MAPPING.get(type(config), None)
    if cls is None or "video_processor" not in cls.get_attributes():
        return AutoProcessor.from_pretrained(source, **common)
    return _without_videos(cls).from_pretrained(source, **common)


@functools.cache
def _without_videos(cls: Any) -> Any:
    """The processor class without a video processor, which alone needs torchvision."""
    from transformers import ProcessorMixin

    class PicturesAlone(ProcessorMixin):
        """Stands between the class and ``ProcessorMixin``, which wants every part that the class's ``__init__`` names."""

        def __init__(self, *args: Any, **kwargs: Any):
            parts = dict(zip(super().get_attributes(), args)) | kwargs
            super().__init__(**{k: v for k, v in parts.items() if k != "video_processor"})

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

        @classmethod
        def _get_arguments_from_pretrained(cls, *args: Any, **kwargs: Any) -> list[Any]:
            found = iter(super()._get_arguments_from_pretrained(*args, **kwargs))
            return [None if name == "video_processor" else next(found) for name in super().get_attributes()]

    return type(cls.__name__, (cls, PicturesAlone), {})


def image_settings(processor: Any) -> dict[str, Any]:
    """What a processor makes of pictures, as ``patches.rules`` takes it."""
    if processor is None or processor.image_processor is None:
        return {}
    images = {k: v for k, v in processor.image_processor.to_dict().items() if v is not None and k not in ALWAYS}
    ratio = getattr(processor, ASPECT_RATIO, None)
    return settings_of([{"image_processor": images, **({} if ratio is None else {ASPECT_RATIO: ratio})}, {}])


def digest(processor: Any) -> str:
    """A hash of what a processor makes of pictures and conversations."""
    whole = [image_settings(processor), getattr(processor, "chat_template", None)]
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()[:16]


def processor_settings(min_pixels: int | None, max_pixels: int | None, pairs: Sequence[str] | None = None) -> dict[str, Any]:
    """The image processor's settings of ``--min-pixels``, ``--max-pixels`` and ``--processor-kwargs``, values read as JSON where they are.

    Raises ``MllmEfficientError`` for a text without ``=`` and for a setting that is given twice.
    """
    out: dict[str, Any] = {k: v for k, v in (("min_pixels", min_pixels), ("max_pixels", max_pixels)) if v is not None}
    for pair in pairs or ():
        key, equals, text = (part.strip() for part in pair.partition("="))
        if not equals or not key:
            raise MllmEfficientError(f"--processor-kwargs {pair[:80]!r} is not KEY=VALUE, such as max_patches=6")
        if key in out:
            raise MllmEfficientError(f"--processor-kwargs: {key} is given twice")
        try:
            out[key] = json.loads(text, parse_constant=str)
        except (ValueError, RecursionError):
            out[key] = text
    return out


def apply(processor: Any, config: Any, given: Mapping[str, Any]) -> None:
    """Puts settings on a processor, and on the model's config what it shares with the processor.

    Raises ``MllmEfficientError`` for a setting that the processor does not know or that does not fit it.
    """
    if not given:
        return
    images, name = processor.image_processor, type(processor.image_processor).__name__
    known = _known(images) | ({ASPECT_RATIO} if hasattr(processor, ASPECT_RATIO) else set())
    for key in given:
        if key in OF_THE_MODEL:
            raise MllmEfficientError(f"the processor's {key} belongs to the model's tower: leave it out")
        if key in ALWAYS:
            raise MllmEfficientError(
                f"{key} has no effect: {type(processor).__name__} always tiles; max_patches=1 is a picture in one piece"
            )
        if key not in known:
            raise MllmEfficientError(f"{name} has no setting {key!r}{did_you_mean(key, sorted(known))} (it has {', '.join(sorted(known))})")
    _require_order(images, given)
    own = {k: v for k, v in given.items() if k != ASPECT_RATIO}
    try:
        processor.image_processor = type(images).from_dict(images.to_dict(), **own)
        if ASPECT_RATIO in given:
            setattr(processor, ASPECT_RATIO, given[ASPECT_RATIO])
            int(given[ASPECT_RATIO].removeprefix("anyres_max_"))
        _try(processor.image_processor)
    except Exception as error:  # whatever a processor raises for values of another kind
        said = ", ".join(f"{k}={json.dumps(v)}" for k, v in given.items())
        raise MllmEfficientError(f"{name} cannot take {said[:120]}: {type(error).__name__}: {str(error)[:120]}") from None
    for key in SHARED:
        if key in given and hasattr(config, key):
            setattr(config, key, given[key])


def _known(images: Any) -> set[str]:
    """The settings that an image processor takes and that its own code reads."""
    valid = set(getattr(getattr(images, "valid_kwargs", None), "__annotations__", {}))
    read = set(inspect.signature(images._preprocess).parameters) if hasattr(images, "_preprocess") else valid
    from transformers.processing_utils import ImagesKwargs

    special = valid - set(ImagesKwargs.__annotations__)
    return ((valid & read) | special | ({"do_convert_rgb"} & valid)) - {*OF_A_CALL, *OF_THE_MODEL, *ALWAYS}


def _require_order(images: Any, given: Mapping[str, Any]) -> None:
    """Raises for budgets that are no whole numbers, or whose least is above their most."""
    for low, high, now in (("min_pixels", "max_pixels", _pixels(images)), ("min_patches", "max_patches", _patches(images))):
        least, most = given.get(low, now[0]), given.get(high, now[1])
        for key, value in ((low, least), (high, most)):
            if key in given and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise MllmEfficientError(f"{key} must be a whole number above 0, not {value!r}")
        if (low in given or high in given) and least is not None and most is not None and least > most:
            raise MllmEfficientError(f"{low}={least} is more than {high}={most}")


def _pixels(images: Any) -> tuple[int | None, int | None]:
    size = dict(getattr(images, "size", None) or {})
    return size.get("shortest_edge"), size.get("longest_edge")


def _patches(images: Any) -> tuple[int | None, int | None]:
    return getattr(images, "min_patches", None), getattr(images, "max_patches", None)


def _try(images: Any) -> None:
    """Processes one small picture."""
    from PIL import Image

    images(Image.new("RGB", (32, 32)), return_tensors="pt")
