"""Pictures of Pillow's unusual modes, and what the package's one rule makes of each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

RULE = {  # mode and value, and what is seen at the other corner
    "16 bits that fit in 8": (("I;16", 200), (200,) * 3),
    "16 bits, dark": (("I;16", 4000), (15,) * 3),
    "16 bits, half": (("I;16", 32768), (127,) * 3),
    "16 bits, white": (("I;16", 65535), (255,) * 3),
    "32 bits that fit in 8": (("I", 200), (200,) * 3),
    "32 bits that fit in 16": (("I", 32768), (127,) * 3),
    "32 bits": (("I", 2**30), (127,) * 3),
    "transparent red": (("RGBA", (255, 0, 0, 0)), (255,) * 3),
    "red": (("RGBA", (255, 0, 0, 255)), (255, 0, 0)),
    "transparent grey": (("LA", (10, 0)), (255,) * 3),
    "palette": (("P", 0), (0, 0, 0)),
    "cmyk": (("CMYK", (0, 0, 0, 255)), (0, 0, 0)),
}
FLOATS = ("F", 0.5)  # refused but where lowest to highest value are stretched
DTYPES = {"I;16": np.uint16, "I": np.int32, "F": np.float32}


def levels(mode: str, value, side: int = 32) -> Image.Image:
    """A picture of one value, with black in a corner where it holds numbers of many bits."""
    if mode not in DTYPES:
        return Image.new(mode, (side, side), value)
    array = np.full((side, side), value, DTYPES[mode])
    array[: side // 2, : side // 2] = 0
    return Image.fromarray(array)


def write(folder: Path, side: int, floats: bool) -> list[Path]:
    """One file of each kind. floats: also one of floating-point values."""
    out = []
    for i, (mode, value) in enumerate([*(given for given, _ in RULE.values()), *([FLOATS] if floats else [])]):
        out.append(folder / f"{i}.{'tif' if mode in ('CMYK', 'I', 'F') else 'png'}")
        levels(mode, value, side).save(out[-1])
    return out


def pixels_seen(monkeypatch) -> list[bytes]:
    """The pixels of all pictures that will have reached the embedded model's processor."""
    from mllm_efficient.loading.models import ModelOptions, load

    kind, found = type(load(ModelOptions(device="cpu")).processor.image_processor), list[bytes]()
    real = kind.preprocess

    def spy(self, images, *args, **kwargs):
        flat = [i for part in (images if isinstance(images, list) else [images]) for i in (part if isinstance(part, list) else [part])]
        found.extend(np.asarray(i).tobytes() for i in flat if hasattr(i, "getpixel"))
        return real(self, images, *args, **kwargs)

    monkeypatch.setattr(kind, "preprocess", spy)
    return found
