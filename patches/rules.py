"""What is known of a family from its kind, sizes and settings alone: no torch, no transformers, no pixels.

What a processor's settings make of a picture's size (pixels, tiles, canvases), and what a model can be asked at all: the same for
an adapter (``wrap``) and for a shape (``flops``). Settings are those of the image processor, as ``preprocessor_config.json`` has
them or ``processor_config.json`` under ``image_processor``, with ``vision_aspect_ratio`` of the processor itself. Where a model's
files say nothing, the family's released checkpoints count.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_efficient.errors import MllmEfficientError, UnsupportedModelError
from mllm_efficient.parsing import read_json

if TYPE_CHECKING:
    from mllm_efficient.compressors.reducer import Reducer

Size = tuple[int, int]  # (width, height) in pixels
Grid = tuple[int, int]  # (rows, columns)
Settings = Mapping[str, Any]

FILES = ("processor_config.json", "preprocessor_config.json")  # the first counts where both say it, as in transformers
ASPECT_RATIO, PINPOINTS = "vision_aspect_ratio", "image_grid_pinpoints"
SHARED = (ASPECT_RATIO, PINPOINTS)  # what the model's own config has as well: both must say the same
PIXELS = {"qwen2_vl": (3136, 12845056), "qwen2_5_vl": (3136, 12845056), "qwen3_vl": (65536, 16777216)}
USUAL_PIXELS = (56 * 56, 28 * 28 * 1280)  # of a processor whose file leaves them out
USUAL_TILES = (1, 12)
MOST_ASPECT = 200
OF_PIXELS = ("min_pixels", "max_pixels", "size")
# What of the settings decides how many tokens a picture has.
COUNTING = {
    "llava_next": (PINPOINTS,), "llava_next_video": (PINPOINTS,), "llava_onevision": SHARED,
    "qwen2_vl": OF_PIXELS, "qwen2_5_vl": OF_PIXELS, "qwen3_vl": OF_PIXELS, "internvl": ("min_patches", "max_patches"),
}  # fmt: skip


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


def require_counting(family: str, given: Settings, name: str) -> None:
    """Raises for settings that do not change how many tokens a picture has."""
    known = COUNTING.get(family, ())
    for key in given:
        if key not in known:
            has = f"{', '.join(known)} have" if known else "every picture has the same number"
            raise MllmEfficientError(f"{key} has no effect on the tokens of a picture on {name} ({has}): leave it out")


# ------------------------------------------------------------------------------------------------ Qwen-VL: one grid of any size


def pixel_limits(family: str, settings: Settings) -> tuple[int, int]:
    """(fewest, most) pixels of a picture after resizing. ``min_pixels`` and ``max_pixels`` go before ``size``, as in the processor."""
    size = settings.get("size") or {}
    usual = USUAL_PIXELS if any(k not in OF_PIXELS for k in settings) else PIXELS[family]
    fewest = settings.get("min_pixels") or size.get("shortest_edge") or usual[0]
    most = settings.get("max_pixels") or size.get("longest_edge") or usual[1]
    if fewest > most:
        raise MllmEfficientError(f"min_pixels={fewest} is more than max_pixels={most}")
    return fewest, most


def grid_of(size: Size, step: int, limits: tuple[int, int], name: str) -> Grid:
    """Tokens of a picture, each of step x step pixels: the nearest multiple on both sides, scaled into the limits."""
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


# ------------------------------------------------------------------------------------------------ InternVL: tiles and a thumbnail


def tile_limits(settings: Settings) -> tuple[int, int]:
    """(fewest, most) tiles of a picture."""
    fewest, most = settings.get("min_patches") or USUAL_TILES[0], settings.get("max_patches") or USUAL_TILES[1]
    if fewest > most:
        raise MllmEfficientError(f"min_patches={fewest} is more than max_patches={most}")
    return fewest, most


def tiles_of(size: Size, tile: Size, limits: tuple[int, int]) -> Grid:
    """(rows, columns) of tiles: the canvas whose shape is nearest the picture's. Of equally near ones a larger one is taken while
    the picture has more than half its pixels."""
    width, height = size
    best, nearest = (1, 1), math.inf
    for rows, columns in _canvases(*limits):
        apart = abs(width / height - columns / rows)
        if apart < nearest or (apart == nearest and width * height > 0.5 * tile[0] * tile[1] * rows * columns):
            best, nearest = (rows, columns), apart
    return best


@functools.cache
def _canvases(fewest: int, most: int) -> list[Grid]:
    """(rows, columns) with so many tiles, smallest canvas first, among equals the narrowest."""
    every = [(n // columns, columns) for n in range(fewest, most + 1) for columns in range(1, n + 1) if n % columns == 0]
    return every


def views_of(size: Size, tile: Size, settings: Settings) -> int:
    """Tiles of a picture, and the thumbnail beside several."""
    limits = tile_limits(settings)
    rows, columns = tiles_of(size, tile, limits) if limits[1] > 1 else (1, 1)
    return rows * columns + (rows * columns > 1)


# ------------------------------------------------------------------------------------------------ LLaVA-NeXT and -OneVision: anyres


def canvas_of(size: Size, pinpoints: Sequence[Sequence[int]]) -> Size:
    """(height, width) of the pinpoint that shows most of the picture, among equals the smallest."""
    width, height = size

    def rank(canvas: Sequence[int]) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - canvas[0] * canvas[1]

    rows, columns = max(pinpoints, key=rank)
    return rows, columns


def most_tiles(ratio: str) -> int:
    """The 9 of "anyres_max_9": a map of more than about so many tiles is shrunk."""
    return int(ratio.removeprefix("anyres_max_"))


# ------------------------------------------------------------------------------------------------ what a decoder can be asked

# kind of a text model: the class of its layers, in which in-decoder methods work
DECODERS = {
    "llama": "LlamaDecoderLayer", "mistral": "MistralDecoderLayer", "qwen2": "Qwen2DecoderLayer", "qwen3": "Qwen3DecoderLayer",
    "qwen2_vl": "Qwen2VLDecoderLayer", "qwen2_5_vl": "Qwen2_5_VLDecoderLayer", "qwen3_vl": "Qwen3VLTextDecoderLayer",
}  # fmt: skip


def check_reducer(host: Any, method: Reducer) -> None:
    """Raises ``UnsupportedModelError`` for a decoder that an in-decoder method cannot work in.

    host: whatever says ``name``, ``decoder`` (the class of its layers), ``mrope``, ``deep_layers`` and ``decoder_layers``.
    """
    if host.decoder not in DECODERS.values():
        kind = host.decoder
        raise UnsupportedModelError(f"{method.name} works inside the decoders of Llama, Qwen and Mistral, and this one is of {kind}")
    if not host.mrope:
        return
    if method.merges:
        raise UnsupportedModelError(f"{method.name} merges tokens, and a merged token has no place in the positions of {host.name}")
    if method.positions == "renumber":
        raise UnsupportedModelError(
            f"{method.name}: positions='renumber' has no meaning inside {host.name}, whose positions have three rows"
        )
    first, deep = method.stages(host.decoder_layers)[0], host.deep_layers
    if first < deep:
        raise UnsupportedModelError(
            f"{method.name} drops tokens at layer {first}, and {host.name} adds visual features up to layer {deep}: drop there or later"
        )
