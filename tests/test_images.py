"""Image files come out upright, opaque and 8-bit, and every odd one is one clear line."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mllm_efficient.errors import MllmEfficientError
from mllm_efficient.images import load_image

RED, BLUE = (220, 30, 30), (30, 40, 200)


def halves() -> Image.Image:
    """Red on the left, blue on the right."""
    picture = Image.new("RGB", (40, 20), RED)
    picture.paste(BLUE, (20, 0, 40, 20))
    return picture


def near(pixel, colour, tolerance=12) -> bool:  # JPEG and CMYK round trips move a colour by a few levels
    return max(abs(a - b) for a, b in zip(pixel, colour)) <= tolerance


def test_rgb_is_unchanged(tmp_path):
    halves().save(tmp_path / "a.png")
    assert np.array_equal(load_image(tmp_path / "a.png"), halves())


def test_exif_rotation_is_undone(tmp_path):
    turned = halves().transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate 90 degrees clockwise to view
    turned.save(tmp_path / "a.jpg", exif=exif, quality=95)
    out = load_image(tmp_path / "a.jpg")
    assert out.size == (40, 20)
    assert near(out.getpixel((5, 10)), RED) and near(out.getpixel((35, 10)), BLUE)


def test_transparent_pixels_are_white(tmp_path):
    picture = halves().convert("RGBA")
    picture.paste((0, 0, 0, 0), (0, 0, 20, 20))
    picture.save(tmp_path / "a.png")
    out = load_image(tmp_path / "a.png")
    assert out.getpixel((5, 5)) == (255, 255, 255) and out.getpixel((35, 5)) == BLUE


def test_grey_with_alpha(tmp_path):
    Image.new("LA", (20, 20), (100, 0)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").getpixel((3, 3)) == (255, 255, 255)


def test_palette_and_its_transparency(tmp_path):
    halves().quantize(8).save(tmp_path / "a.png")
    assert near(load_image(tmp_path / "a.png").getpixel((5, 5)), RED)
    palette = halves().quantize(8)
    palette.save(tmp_path / "b.png", transparency=palette.getpixel((0, 0)))
    out = load_image(tmp_path / "b.png")
    assert out.getpixel((5, 5)) == (255, 255, 255) and near(out.getpixel((35, 5)), BLUE)


def test_cmyk(tmp_path):
    halves().convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    out = load_image(tmp_path / "a.jpg")
    assert out.mode == "RGB" and near(out.getpixel((5, 5)), RED, 20) and near(out.getpixel((35, 5)), BLUE, 20)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    out = np.asarray(load_image(tmp_path / "a.png"))[..., 0].astype(int)
    assert np.abs(out - ramp.astype(int) // 257).max() <= 1


def test_bilevel(tmp_path):
    Image.new("1", (20, 20), 1).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("size", "says"),
    [((7, 40), "at least 8"), ((40, 7), "at least 8"), ((1000, 9), "above 100:1"), ((9, 1000), "above 100:1")],
)
def test_odd_sizes_are_refused(tmp_path, size, says):
    Image.new("RGB", size).save(tmp_path / "a.png")
    with pytest.raises(MllmEfficientError, match=says):
        load_image(tmp_path / "a.png")


@pytest.mark.parametrize("size", [(9500, 9500), (14000, 14000)])  # above Pillow's warning and above its error
def test_more_than_89_megapixels_is_refused(tmp_path, size):
    Image.new("1", size).save(tmp_path / "a.png")
    with pytest.raises(MllmEfficientError, match="megapixels"):
        load_image(tmp_path / "a.png")


def test_missing_folder_text_truncated_and_empty_files(tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    halves().save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    for name in ("absent.png", "text.png", "empty.png", "cut.png", "."):
        with pytest.raises(MllmEfficientError) as caught:
            load_image(tmp_path / name)
        assert "\n" not in str(caught.value)
