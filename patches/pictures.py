"""The settings of a model's image processor, as the files in its folder say them. No torch, no transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm_efficient.errors import MllmEfficientError
from mllm_efficient.parsing import read_json

Settings = Mapping[str, Any]
FILES = ("processor_config.json", "preprocessor_config.json")  # the first counts where both say it, as in transformers
ASPECT_RATIO, PINPOINTS = "vision_aspect_ratio", "image_grid_pinpoints"
MODE = "downsample_mode"
SHARED = (ASPECT_RATIO, PINPOINTS, MODE)  # what the model's own config has as well: both must say the same
OF_PIXELS = ("min_pixels", "max_pixels", "size")


def settings_of(files: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings that the contents of ``FILES`` say, in their order; ``{}`` for one that is not there."""
    whole, images = files
    found = dict(whole.get("image_processor") or images)
    if ASPECT_RATIO in whole:
        found[ASPECT_RATIO] = whole[ASPECT_RATIO]
    return found


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings in a model's folder; ``{}`` where it has no processor. Raises ``MllmEfficientError`` for a file that is no JSON."""
    return settings_of([read_object(folder / name) for name in FILES])


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object in a file; ``{}`` where there is no file."""
    if not path.is_file():
        return {}
    try:
        content = read_json(path)
    except OSError as error:
        raise MllmEfficientError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise MllmEfficientError(f"{path} is not a JSON object")
    return content


def merged(settings: Settings, given: Settings) -> dict[str, Any]:
    """Settings with those that a user gives on top."""
    out = dict(settings)
    if "size" in given:  # which the file may have said in the older way, and that would go before
        out = {k: v for k, v in out.items() if k not in OF_PIXELS}
    return {**out, **given}
