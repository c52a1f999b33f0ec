"""Frames of a video: from a folder of images, an animation that Pillow reads, or any file that PyAV decodes."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MllmEfficientError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

EXTRACT = "extract frames first (ffmpeg -i clip.mp4 -vf fps=1 frames/%04d.png) and give their folder"


def load_frames(path: Path, count: int, image_range: str = "full") -> tuple[list[Picture], list[int]]:
    """At most ``count`` frames of a video, first and last among them, and their numbers in it.

    path: a folder of images (sorted by name, numbers in names by value) or an animation that Pillow reads; other video
    files through PyAV where it is installed. image_range: of frames with more than 8 bits. Raises ``MllmEfficientError`` with what
    to do otherwise.
    """
    read = _folder if path.is_dir() else _animation
    frames, numbers = read(path, count, image_range)
    for number, frame in zip(numbers, frames):
        if frame.size != frames[0].size:
            raise MllmEfficientError(f"frames {numbers[0]} and {number} of {path} differ in size: a video has one size")
    return frames, numbers


def spread(total: int, count: int) -> list[int]:
    """``count`` of the numbers 0 to total - 1 at even steps, ends included; all where there are no more."""
    if count >= total:
        return list(range(total))
    return [total // 2] if count == 1 else [round(i * (total - 1) / (count - 1)) for i in range(count)]


def _folder(path: Path, count: int, image_range: str) -> tuple[list[Picture], list[int]]:
    from PIL import Image

    from .images import load_image

    kinds = set(Image.registered_extensions())
    names = [p for p in path.iterdir() if p.is_file() and p.suffix.lower() in kinds and not p.name.startswith(".")]
    if not names:
        raise MllmEfficientError(f"the folder {path} has no images: {EXTRACT}")
    names.sort(key=lambda p: [(not part.isdecimal(), int(part) if part.isdecimal() else part) for part in re.split(r"(\d+)", p.name)])
    numbers = spread(len(names), count)
    return [load_image(names[i], image_range) for i in numbers], numbers


def _animation(path: Path, count: int, image_range: str) -> tuple[list[Picture], list[int]]:
    from PIL import Image, UnidentifiedImageError

    from .images import load_image, to_rgb

    if not path.is_file():
        raise MllmEfficientError(f"no folder or file {path}")
    try:
        load_image(path, image_range)  # for its clear messages about a damaged or oversized file
    except MllmEfficientError as error:
        if isinstance(error.__context__, UnidentifiedImageError):
            return _decoded(path, count)
        raise
    with Image.open(path) as animation:
        total = getattr(animation, "n_frames", 1)
        if total < 2:
            raise MllmEfficientError(f"{path} is a single picture: give it as --image")
        frames, numbers = [], spread(total, count)
        for number in numbers:
            try:
                animation.seek(number)
                frames.append(to_rgb(animation, image_range))
            except (OSError, SyntaxError, ValueError, EOFError) as error:
                raise MllmEfficientError(f"frame {number} of {path} cannot be read: {error}") from None
    return frames, numbers


def _decoded(path: Path, count: int) -> tuple[list[Picture], list[int]]:
    """Frames of a video file through PyAV: counted in a first pass, kept in a second."""
    try:
        av: Any = importlib.import_module("av")
    except ImportError:
        raise MllmEfficientError(f"Pillow cannot read {path}: {EXTRACT}, or pip install av") from None
    try:
        with av.open(str(path)) as container:
            total = sum(1 for _ in container.decode(video=0))
        numbers = spread(total, count)
        with av.open(str(path)) as container:
            frames = [frame.to_image() for i, frame in enumerate(container.decode(video=0)) if i in set(numbers)]
    except (av.FFmpegError, IndexError, OSError) as error:
        raise MllmEfficientError(f"{path} cannot be decoded ({error}): {EXTRACT}") from None
    if not frames:
        raise MllmEfficientError(f"{path} has no frames: {EXTRACT}")
    return frames, numbers
