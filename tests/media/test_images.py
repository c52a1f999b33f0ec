"""Image files come out upright, opaque and 8-bit, and every odd one is one clear line."""

from __future__ import annotations

import base64
import io
import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllm_efficient.cli import main
from mllm_efficient.errors import MllmEfficientError
from mllm_efficient.media.images import converting, find, load_image, size_of

from ..modes import FLOATS, RULE, levels, pixels_seen, write

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


# ------------------------------------------------------------------------------------------------ one rule for every mode


@pytest.mark.parametrize("name", RULE)
def test_every_mode_by_one_rule_however_it_comes(tmp_path, name):
    (mode, value), seen = RULE[name]
    picture = levels(mode, value)
    path = tmp_path / ("a.tif" if mode in ("CMYK", "I") else "a.png")
    picture.save(path)
    data = path.read_bytes()
    sources = [path, str(path), path.as_uri(), data, picture, "data:;base64," + base64.b64encode(data).decode()]
    sources += [np.asarray(picture)] if mode in ("I;16", "I", "RGBA") else []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = [load_image(source) for source in sources]
    assert {out.mode for out in found} == {"RGB"} and {out.getpixel((31, 31)) for out in found} == {seen}
    dark = [w for w in said if "is nearly black" in str(w.message)]
    assert len(dark) == (len(sources) if name == "16 bits, dark" else 0)
    if dark:
        assert "its values go to 4,000, and 65,535 is white (to stretch them, take --image-range auto" in str(dark[0].message)


def test_auto_stretches_lowest_to_highest():
    assert load_image(levels("I;16", 4000), "auto").getpixel((31, 31)) == (255,) * 3
    ramp = np.linspace(-1, 1, 1024, dtype=np.float32).reshape(32, 32)
    out = np.asarray(load_image(Image.fromarray(ramp), "auto"))[..., 0]
    assert np.array_equal(out, np.rint((ramp.astype(np.float64) + 1) * 127.5).astype(np.uint8))
    assert load_image(np.full((9, 9), 3.0), "auto").getpixel((0, 0)) == (0, 0, 0)
    with pytest.raises(MllmEfficientError, match="NaN or infinite"):
        load_image(np.full((9, 9), np.nan), "auto")
    with pytest.raises(MllmEfficientError, match=r"floating-point values, which have no fixed range: .*--image-range auto"):
        load_image(levels(*FLOATS))
    with pytest.raises(MllmEfficientError, match="image range 'half' is not one of full, auto"):
        load_image(levels("L", 3), "half")


def test_a_picture_object_is_turned_upright_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    halves().transpose(Image.Transpose.ROTATE_90).save(buffer, format="JPEG", exif=exif, quality=95)
    lying = Image.open(buffer)
    assert lying.size == (20, 40) and size_of(buffer.getvalue()) == (40, 20)
    assert near(load_image(lying).getpixel((5, 10)), RED)
    assert near(load_image(lying.convert("RGB")).getpixel((5, 10)), RED)  # as a task of lmms-eval hands it on


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("https://x.org/" + "a" * 5000, "is not fetched: download it"), ("s3://bucket/a.png", "is not fetched"),
        ("data:image/png;base64,%%", "is no data: URI"),
        ("data:image/png;base64," + "A" * 5000 + "*", "is no data: URI"), ("data:nothing", "no comma"), ("a" * 5000, "no image file"),
        ("/".join("ab" * 3000), "no image file"), ("~nobody-of-that-name/a.png", "no image file"),
        ("file://elsewhere/a.png", "on another machine"),
        ("a\0b", "no image file"), ("", "must be a path"), (3, "must be a path"), (b"\xff\xd8\xff\xe0" + b"0" * 50, "image of 54 bytes"),
        (np.zeros((3, 20, 20), np.uint8), r"array of shape \(3, 20, 20\)"), (np.zeros((20, 20, 3), np.float32), "array of float32"),
        (np.zeros((4, 20), np.uint8), "at least 8"),
    ],
)  # fmt: skip
def test_what_is_no_picture_is_one_short_line(source, says):
    with pytest.raises(MllmEfficientError, match=says) as caught:
        load_image(source)
    assert len(str(caught.value)) < 1200 and "\n" not in str(caught.value)
    assert max(map(len, str(caught.value).replace("/", " ").split())) <= 80


def test_home_is_the_users_folder(tmp_path, monkeypatch):
    halves().save(tmp_path / "a.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find("~/a.png") == tmp_path / "a.png" and load_image("~/a.png").size == (40, 20)


def commands(folder: Path, paths: Sequence[Path], image_range: str) -> dict[str, list[str]]:
    """Every command that takes pictures, on these. Each training step is of one record."""
    given = [word for path in paths for word in ("--image", str(path))]
    data, own = folder / "r.jsonl", ["--image-range", image_range]
    records = [{"image": path.name, "prompt": "what is it ?", "answer": "a ring"} for path in paths]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    source = f"{{path: {data}, image_range: {image_range}}}"
    recipe = ["output_dir=" + str(folder / "run"), "counts={36: 1}", f"data={source}", f"stages.0.data={source}", "independent_turns=false"]
    steps = [f"stages.{i}.{k}" for i in (0, 1) for k in (f"steps={len(paths)}", "batch_size=1")]
    sweep = ["--method", "uniform", "--keep", "0.5", "--output-tokens", "1", "--repeats", "1", "--output-dir", str(folder / "sweep")]
    return {
        "generate": ["generate", *given, "--prompt", "what is it ?", "--max-new-tokens", "1", *own],
        "show": ["show", *given, "--method", "divprune:keep=0.5", "--output", str(folder / "o.png"), *own],
        "eval": ["eval", "--data", str(data), "--max-new-tokens", "1", *own],
        "sweep": ["sweep", "--data", str(data), "--max-new-tokens", "1", *sweep, *own],
        "train": ["train", "--config", "tokenflex_builtin", *recipe, *steps],
    }


@pytest.mark.filterwarnings("ignore:.* is nearly black")
@pytest.mark.parametrize("command", ["generate", "show", "eval", "sweep", "train"])
@pytest.mark.parametrize("image_range", ["full", "auto"])
def test_commands_see_the_pixels_of_the_rule(capsys, tmp_path, monkeypatch, command, image_range):
    """The processor gets what ``load_image`` gives, of every mode; floating-point ones where they are stretched."""
    paths, seen = write(tmp_path, 144, floats=image_range == "auto"), pixels_seen(monkeypatch)
    wanted = {np.asarray(load_image(path, image_range)).tobytes() for path in paths}
    assert main(commands(tmp_path, paths, image_range)[command]) == 0, capsys.readouterr().err
    assert wanted <= set(seen) and len(set(seen) - wanted) == (command in ("eval", "sweep"))  # of which FLOPs are counted, or times taken


@pytest.mark.parametrize("command", ["generate", "show", "eval", "sweep", "train"])
def test_commands_refuse_floating_point_pictures_in_one_line(capsys, tmp_path, command):
    path = tmp_path / "f.tif"
    levels(*FLOATS, 144).save(path)
    assert main(commands(tmp_path, [path], "full")[command]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "f.tif has floating-point values, which have no fixed range" in line
    assert line.endswith("take --image-range auto or, in a recipe, data.image_range=auto")


def test_convert_of_other_code_follows_the_rule_while_asked_to():
    stock = Image.Image.convert
    with converting(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for (mode, value), wanted in RULE.values():
            assert levels(mode, value).convert("RGB").getpixel((31, 31)) == wanted
        with pytest.raises(MllmEfficientError, match="floating-point"):
            levels(*FLOATS).convert("RGB")
        assert levels("I;16", 32768).convert("RGB").getpixel((31, 31)) == (127,) * 3  # also behind an error
        assert levels("L", 7).convert("RGBA").getpixel((31, 31)) == (7, 7, 7, 255)
        with converting("auto"):
            assert levels(*FLOATS).convert("RGB").getpixel((31, 31)) == (255,) * 3
    assert Image.Image.convert is stock


def test_a_cut_file_is_an_error_whatever_pillow_was_told(tmp_path, monkeypatch):
    """Importing lmms_eval tells it to fill such files up with grey."""
    from PIL import ImageFile

    path = tmp_path / "cut.jpg"
    Image.effect_noise((64, 64), 60).save(path)
    path.write_bytes(path.read_bytes()[:-400])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(MllmEfficientError, match="cannot be read as an image"):
        load_image(path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES
