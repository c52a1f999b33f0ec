"""``show`` and the pictures it is made of: lit patches are where the indices say, pixel by pixel."""

from __future__ import annotations

import colorsys
import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import BatchFeature

import mllm_efficient as me
from mllm_efficient.cli import main, show
from mllm_efficient.compressors.words import title
from mllm_efficient.errors import MllmEfficientError
from mllm_efficient.eval.drawn import run_method
from mllm_efficient.loading.models import Loaded, ModelOptions
from mllm_efficient.media import figure as figures
from mllm_efficient.media import overlay as viz
from mllm_efficient.media import video
from mllm_efficient.report import CompressionReport, ImageReport
from mllm_efficient.tokens import Plane

TOP, BOTTOM = Plane(3, 4, box=(0.0, 0.1, 0.5, 0.9)), Plane(2, 5, tile=1, box=(0.5, 0.1, 1.0, 0.9))
LAYOUTS = {
    "whole picture": (Plane(4, 6),),
    "centre crop": (Plane(5, 5, box=(0.0, 0.25, 1.0, 0.75)),),
    "one row": (Plane(1, 9),),
    "over the border": (Plane(6, 7, box=(-0.06, -0.02, 1.06, 1.02)),),
    "two tiles": (TOP, BOTTOM),
}


def cell_of_pixel(planes, width, height):
    """(height, width) the token that each pixel's centre lies in, -1 outside of all planes."""
    out, start = np.full((height, width), -1), 0
    for plane in planes:
        top, left, bottom, right = plane.box
        row = np.searchsorted(np.linspace(top, bottom, plane.rows + 1) * height, np.arange(height) + 0.5) - 1
        column = np.searchsorted(np.linspace(left, right, plane.columns + 1) * width, np.arange(width) + 0.5) - 1
        inside = ((row >= 0) & (row < plane.rows))[:, None] & ((column >= 0) & (column < plane.columns))
        out[inside] = (start + row[:, None] * plane.columns + column)[inside]
        start += len(plane)
    return out


def patchwork(planes, width, height):
    """A picture where every token has a strong colour of its own, with the token of each pixel."""
    cells = cell_of_pixel(planes, width, height)
    n = cells.max() + 1
    palette = [colorsys.hsv_to_rgb(i / (n + 1), 0.75 + 0.25 * (i % 2), 0.6 + 0.1 * (i % 4)) for i in range(n)] + [(0.2, 0.5, 0.3)]
    return (np.array(palette) * 255).round().astype(np.uint8)[cells], cells


def hue(pixel):
    return colorsys.rgb_to_hsv(*(float(v) / 255 for v in pixel))[0]


# ------------------------------------------------------------------------------------------------ one panel


@pytest.mark.parametrize("dim", viz.DIMS)
@pytest.mark.parametrize("size", [(240, 160), (101, 67), (53, 131)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kept_patches_keep_their_exact_colours_and_no_other_pixel_does(layout, size, dim):
    planes = LAYOUTS[layout]
    picture, cells = patchwork(planes, *size)
    kept = list(range(0, sum(len(p) for p in planes), 3))
    out = viz.render(picture, planes, kept, dim=dim, lines=False)
    same = (out == picture).all(-1)
    assert out.shape == picture.shape and out.dtype == np.uint8
    assert (same == np.isin(cells, kept)).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_plane_and_any_choice(data):
    plane = Plane(data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9)), box=tuple(
        data.draw(st.floats(*bounds)) for bounds in [(-0.1, 0.3), (-0.1, 0.3), (0.5, 1.1), (0.5, 1.1)]
    ))  # fmt: skip
    picture, cells = patchwork((plane,), data.draw(st.integers(20, 90)), data.draw(st.integers(20, 90)))
    kept = sorted(data.draw(st.sets(st.integers(0, len(plane) - 1))))
    out = viz.render(picture, (plane,), kept, lines=False)
    assert ((out == picture).all(-1) == np.isin(cells, kept)).all()


def test_with_lines_a_kept_patch_among_dropped_ones_keeps_every_pixel():
    planes = LAYOUTS["two tiles"]
    picture, cells = patchwork(planes, 202, 155)
    for token in range(sum(len(p) for p in planes)):
        out = viz.render(picture, planes, [token])
        assert (out == picture).all(-1)[cells == token].all()


def test_lines_stand_at_the_edges_of_cells_alone():
    plane = Plane(4, 6)
    picture, _ = patchwork((plane,), 240, 160)
    for kept in (None, []):
        bare, ruled = (viz.render(picture, (plane,), kept, lines=lines) for lines in (False, True))
        expected = np.zeros((160, 240), bool)
        expected[40::40] = expected[:, 40::40] = True
        changed = (bare != ruled).any(-1)
        assert (changed & ~expected).sum() == 0 and changed.sum() > 0.97 * expected.sum()


def test_dropped_patches_keep_their_hue_and_lose_colour():
    plane = Plane(6, 7)
    picture, _ = patchwork((plane,), 140, 120)
    light, dark = (viz.render(picture, (plane,), [], dim=dim, lines=False) for dim in ("light", "dark"))
    assert (light.astype(int) > dark).all()
    for y, x in [(5, 5), (50, 70), (110, 130)]:
        spread = int(np.ptp(picture[y, x]))
        for out in (light, dark):
            assert abs(hue(out[y, x]) - hue(picture[y, x])) < 0.04
            assert 0 < np.ptp(out[y, x]) < 0.3 * spread


def test_what_the_model_never_saw_is_neither_lit_nor_dropped():
    plane = Plane(4, 4, box=(0.0, 0.25, 1.0, 0.75))
    picture = np.full((80, 160, 3), (200, 40, 40), np.uint8)
    out = viz.render(picture, (plane,), [0], lines=False)
    dropped = out[40, 80]
    outside = np.concatenate([out[:, :40], out[:, 120:]], 1).reshape(-1, 3)
    assert not (outside == (200, 40, 40)).all(-1).any() and not (outside == dropped).all(-1).any()
    assert len(np.unique(outside, axis=0)) == 2  # the hatching and what is between


def test_merged_cells_show_the_mean_of_their_area():
    noise = np.random.default_rng(0).integers(0, 256, (96, 120, 3), dtype=np.uint8)
    full, merged = Plane(8, 8, box=(0.0, 0.1, 1.0, 0.9)), Plane(4, 3, box=(0.0, 0.1, 1.0, 0.9))
    out = viz.render(noise, (full,), None, (merged,), lines=False)
    for r in range(4):
        for c in range(3):
            area = np.s_[24 * r : 24 * r + 24, 12 + 32 * c : 44 + 32 * c]
            assert (out[area] == noise[area].mean((0, 1)).round()).all()


@pytest.mark.parametrize("grid", [(4, 5), (9, 8), (1, 1)])
def test_cells_that_cut_pixels_take_their_parts_of_them(grid):
    noise = np.random.default_rng(1).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    plane = Plane(*grid, box=(0.05, 0.0, 0.95, 0.8))
    # ten by ten points in every pixel: cells of 13.5 x 12.8 pixels hold whole points
    points = np.repeat(np.repeat(noise, 10, 0), 10, 1)[30:570, :640].astype(float)
    expected = points.reshape(grid[0], 540 // grid[0], grid[1], 640 // grid[1], 3).mean((1, 3)).reshape(-1, 3)
    out = viz.render(noise, (Plane(9, 9),), None, (plane,), lines=False)
    cells = cell_of_pixel((plane,), 80, 60)
    for i, colour in enumerate(expected):
        assert abs(out[cells == i] - colour).max() < 0.51


def test_a_cell_over_the_border_shows_the_mean_of_what_is_inside():
    picture = np.zeros((40, 40, 3), np.uint8)
    picture[:20] = (250, 100, 0)
    out = viz.render(picture, (Plane(2, 1, box=(-1.0, 0.0, 1.0, 1.0)),), None, (Plane(2, 1, box=(-0.5, 0.0, 1.5, 1.0)),), lines=False)
    assert (out[0, 0] == (250, 100, 0)).all() and (out[39, 0] == 0).all()


def test_an_unknown_dim_is_refused():
    with pytest.raises(MllmEfficientError, match="light, dark"):
        viz.render(np.zeros((8, 8, 3), np.uint8), (Plane(2, 2),), dim="grey")


# ------------------------------------------------------------------------------------------------ views and figures


QUARTERS = tuple(Plane(2, 2, tile=i, box=(i // 2 / 2, i % 2 / 2, i // 2 / 2 + 0.5, i % 2 / 2 + 0.5)) for i in range(4))


@pytest.mark.parametrize(
    ("planes", "expected"),
    [
        ((Plane(24, 24),), [("", (0,))]),
        ((Plane(4, 4), Plane(6, 8, tile=1, box=(-0.01, 0, 1.01, 1))), [("base view", (0,)), ("tiles", (1,))]),
        ((*QUARTERS, Plane(2, 2, tile=4)), [("tiles", (0, 1, 2, 3)), ("thumbnail", (4,))]),
        ((Plane(4, 4), Plane(0, 8, tile=1)), [("", (0,))]),
        (QUARTERS, [("tiles", (0, 1, 2, 3))]),
    ],
    ids=["one plane", "base and map", "tiles and thumbnail", "a map of padding alone", "tiles alone"],
)
def test_planes_that_overlap_go_to_panels_of_their_own(planes, expected):
    assert [(v.name, v.members) for v in viz.views(planes)] == expected


def test_a_view_counts_indices_over_its_own_planes():
    result = viz.Result("x", 20, 3, (*QUARTERS, Plane(2, 2)), [1, 6, 17])
    tiles, thumbnail = viz.views(result.planes)
    assert tiles.of(result)[1] == [1, 6] and thumbnail.of(result)[1] == [1]
    merged = viz.Result("x", 20, 5, (*QUARTERS, Plane(2, 2)), None, tuple(Plane(1, 1, tile=i) for i in range(5)))
    assert [p.tile for p in thumbnail.of(merged)[2]] == [4]


def drawn(tmp_path, subjects, **options):
    figures.save(figures.figure(subjects, **options), tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as png:
        assert abs(png.info["dpi"][0] - 200) < 1 and png.mode == "RGB"
        return np.asarray(png)


def places(page, panel):
    """(top, left) of every place where the panel stands on the page, pixel by pixel."""
    height, width = panel.shape[:2]
    first = (page[: page.shape[0] - height + 1, : page.shape[1] - width + 1] == panel[0, 0]).all(-1)
    return [(y, x) for y, x in zip(*first.nonzero()) if (page[y : y + height, x : x + width] == panel).all()]


def test_every_panel_stands_on_the_page_pixel_for_pixel(tmp_path):
    plane = Plane(4, 6)
    picture, _ = patchwork((plane,), 240, 160)
    results = [viz.Result("A", 24, 2, (plane,), [3, 9]), viz.Result("B", 24, 6, (plane,), None, (Plane(2, 3),))]
    page = drawn(tmp_path, [viz.Subject([Image.fromarray(picture)], results)], long_edge=240, caption="Below")
    panels = [picture, viz.render(picture, (plane,), [3, 9]), viz.render(picture, (plane,), None, (Plane(2, 3),))]
    found = [places(page, panel) for panel in panels]
    assert all(len(f) == 1 for f in found)
    (y0, x0), (y1, x1), (y2, x2) = (f[0] for f in found)
    assert y0 == y1 == y2 and x0 < x1 < x2


def test_a_base_view_and_its_tiles_are_panels_with_the_grid_of_both_on_the_original(tmp_path):
    planes = (Plane(2, 2), Plane(4, 6, tile=1))
    picture, _ = patchwork(planes[1:], 240, 160)
    result = viz.Result("A", 28, 2, planes, [0, 27])
    page = drawn(tmp_path, [viz.Subject([Image.fromarray(picture)], [result])], long_edge=240)
    base, tiles = viz.render(picture, planes[:1], [0]), viz.render(picture, planes[1:], [23])
    ((base_y, base_x),), ((tiles_y, tiles_x),) = places(page, base), places(page, tiles)
    assert base_x == tiles_x and base_y + 160 < tiles_y
    assert places(page, viz.render(picture, planes[:1])) and places(page, viz.render(picture, planes[1:]))


@pytest.mark.parametrize("size", [(1600, 160), (160, 1600), (400, 300), (300, 400), (3000, 2000), (40, 40)], ids=str)
@pytest.mark.parametrize("methods", [1, 9])
def test_no_aspect_and_no_number_of_methods_makes_the_page_wide_or_a_panel_long(size, methods):
    result = viz.Result("DivPrune", 576, 56, (Plane(24, 24),), list(range(56)))
    subject = viz.Subject([Image.new("RGB", size, "teal")], [result] * methods)
    figure = figures.figure([subject])
    assert figure.get_size_inches()[0] * 200 <= figures.CONTENT + 2 * figures.MARGIN + 1
    assert len(figure.images) == methods + 1
    assert all(max(image.get_size()) <= 1600 for image in figure.images)


def test_a_film_strip_has_a_row_for_each_method_and_breaks_after_eight_frames(tmp_path):
    frames = [Image.new("RGB", (64, 48), (20 * i, 200 - 10 * i, 60)) for i in range(12)]
    planes = tuple(Plane(2, 2, frame=i) for i in range(12))
    page = drawn(tmp_path, [viz.Subject(frames, [viz.Result("A", 48, 12, planes, list(range(0, 48, 4)))], labels=["x"] * 12)], long_edge=64)
    originals = [places(page, np.asarray(f))[0] for f in frames]
    rows = sorted({y for y, _ in originals})
    assert len(rows) == 2 and [y for y, _ in originals] == [rows[0]] * 6 + [rows[1]] * 6
    lit = [places(page, viz.render(np.asarray(f), (Plane(2, 2),), [0])) for f in frames]
    assert all(len(found) == 1 and found[0][1] == x for found, (_, x) in zip(lit, originals))


def test_saving_replaces_a_file_makes_folders_and_leaves_nothing_else(tmp_path):
    figure = figures.figure([viz.Subject([Image.new("RGB", (32, 32))], [viz.Result("A", 4, 1, (Plane(2, 2),), [0])])])
    target = tmp_path / "new" / "folder" / "x.png"
    figures.save(figure, target)
    before = target.read_bytes()
    target.write_text("old")
    figures.save(figure, target)
    assert target.read_bytes() == before and [p.name for p in target.parent.iterdir()] == ["x.png"]
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for path, says in [("x.gif", "does not end in .png, .pdf, .svg"), ("folder.png", "is a folder"), ("file/x.png", "not a folder")]:
        with pytest.raises(MllmEfficientError, match=says):
            figures.save(figure, tmp_path / path)


def test_drawing_needs_no_model_and_leaves_pyplot_alone():
    code = (
        "import sys\nfrom mllm_efficient.cli import main\nassert main(['show', '--help']) == 0\nassert 'numpy' not in sys.modules\n"
        "from PIL import Image\nfrom mllm_efficient.media import figure as figures, overlay as viz\n"
        "from mllm_efficient.tokens import Plane\n"
        "picture = Image.new('RGB', (32, 32))\n"
        "figures.figure([viz.Subject([picture], [viz.Result('A $x_y', 4, 1, (Plane(2, 2),), [0])])], caption='\\u6f22 $')\n"
        "assert not {'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def scene(tmp_path):
    from mllm_efficient.eval.builtin.suite import samples

    path = tmp_path / "scene.png"
    samples("val", 7)[0].picture(144).save(path)
    return path


def run(capsys, *argv: object):
    assert main([str(a) for a in ("show", *argv)]) == 0
    return capsys.readouterr()


def fails(capsys, *argv: object) -> str:
    assert main([str(a) for a in ("show", *argv)]) == 2
    out, err = capsys.readouterr()
    lines = err.strip().splitlines()
    assert out == "" and len(lines) == 1 and lines[0].startswith("mllm-efficient: "), (out, err)
    return lines[0]


METHODS = ("divprune:keep=0.25", "random:keep=0.25", "pool:keep=0.25", "resize:keep=0.25", "none")


@pytest.mark.parametrize("size", [(144, 144), (300, 200), (200, 300), (600, 60)], ids=str)
def test_the_command_draws_what_prepare_keeps(capsys, tmp_path, size):
    from mllm_efficient.loading.models import load

    noise = np.random.default_rng(2).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    picture.save(tmp_path / "noise.png")
    options = [a for m in METHODS for a in ("--method", m)]
    out, err = run(capsys, "--image", tmp_path / "noise.png", *options, "--output", tmp_path / "o.png", "--json")
    assert err.splitlines()[0] == "divprune keeps 36 of 144 tokens per image (removes 75.0%)"
    rows, meta = (json.loads(out)[k] for k in ("rows", "meta"))
    assert [r["method"] for r in rows] == list(METHODS) and meta["methods"][0] == {"method": "divprune", "keep": 0.25}
    loaded = load(ModelOptions())
    inputs = loaded.inputs([loaded.prompt("Describe this.", 1)], [picture])
    for row in rows:
        (report,) = me.prepare(loaded.model, row["method"], **inputs).report.images
        assert row["indices"] == (None if report.indices is None else report.indices.tolist())
        assert (row["full"], row["kept"], row["share"], row["modality"]) == (144, report.kept, report.kept / 144, "image")
        assert row["image"] == str(tmp_path / "noise.png") and row["output"] == str(tmp_path / "o.png")
        (plane,) = row["planes"]
        assert (plane["rows"], plane["columns"]) == (12, 12)
        assert (row["kept_planes"] is None) == (row["indices"] is not None)
        # the processor scales the shorter side to 144 pixels and takes the centre
        short = min(size)
        crop = [
            (size[1] - short) / 2 / size[1],
            (size[0] - short) / 2 / size[0],
            (size[1] + short) / 2 / size[1],
            (size[0] + short) / 2 / size[0],
        ]
        assert plane["box"] == pytest.approx(crop, abs=0.02)
    assert sum(p["rows"] * p["columns"] for p in rows[2]["kept_planes"]) == rows[2]["kept"] == 36
    with Image.open(tmp_path / "o.png") as png:
        assert png.format == "PNG" and png.width > 600


def test_two_pictures_make_two_sections_and_stdout_is_the_file(capsys, scene, tmp_path):
    options = ["--image", scene, "--method", "random:tokens=9", "--dim", "dark", "--caption", ""]
    one, _ = run(capsys, *options, "--output", tmp_path / "a" / "one.png")
    two, err = run(capsys, *options, "--image", scene, "--output", tmp_path / "two.png")
    assert one.strip() == str(tmp_path / "a" / "one.png") and two.strip() == str(tmp_path / "two.png")
    assert "random:tokens=9 keeps 9 of 144 tokens (6.2%)" in err
    heights = [Image.open(p).height for p in (tmp_path / "a" / "one.png", tmp_path / "two.png")]
    assert heights[1] > 1.7 * heights[0]


def test_bad_input_is_one_line(capsys, scene, tmp_path):
    good = ("--image", scene, "--method", "random:keep=0.5")
    to = ("--output", tmp_path / "o.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "clip.mp4").write_bytes(b"\0\0\0\x18ftypmp42 no video")
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for i, size in enumerate([(20, 20), (20, 24)]):
        Image.new("RGB", size).save(mixed / f"{i}.png")
    for argv, says in [
        ((*good, "--output", tmp_path / "o.gif"), ".png"),
        ((*good, "--output", tmp_path), ".png"),
        (good, "--output"),
        (("--image", scene, *to), "--method"),
        (("--method", "random:keep=0.5", *to), "--image"),
        ((*good, *to, "--dim", "grey"), "light, dark"),
        ((*good, *to, "--method", "divprun"), "did you mean"),
        (("--image", tmp_path / "absent.png", *good[2:], *to), "no image file"),
        (("--video", tmp_path / "absent", *good[2:], *to), "no folder or file"),
        (("--video", tmp_path / "empty", *good[2:], *to), "ffmpeg"),
        (("--video", tmp_path / "clip.mp4", *good[2:], *to), "ffmpeg"),
        (("--video", scene, *good[2:], *to), "give it as --image"),
        (("--video", mixed, *good[2:], *to), "differ in size"),
    ]:
        assert says in fails(capsys, *argv), argv
    assert not (tmp_path / "o.png").exists()


# ------------------------------------------------------------------------------------------------ video


def grey_levels(frames):
    return [int(np.asarray(f)[0, 0, 0]) for f in frames]


@pytest.fixture
def stills():
    return [Image.new("RGB", (48, 32), (20 * i,) * 3) for i in range(12)]


def test_frames_are_spread_from_the_first_to_the_last():
    assert video.spread(5, 8) == [0, 1, 2, 3, 4] and video.spread(24, 8) == [0, 3, 7, 10, 13, 16, 20, 23]
    assert video.spread(9, 1) == [4] and video.spread(9, 2) == [0, 8]


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "folder"])
def test_every_kind_of_video_gives_its_frames_in_order(tmp_path, stills, kind):
    if kind == "folder":
        path = tmp_path / "frames"
        path.mkdir()
        for i, still in enumerate(stills):
            still.save(path / f"f{i}.png")  # f10 comes after f9
        (path / "notes.txt").write_text("no frame")
    else:
        path = tmp_path / f"clip.{kind}"
        stills[0].save(path, save_all=True, append_images=stills[1:], duration=50, **({"lossless": True} if kind == "webp" else {}))
    frames, numbers = video.load_frames(path, 4)
    assert numbers == [0, 4, 7, 11] and grey_levels(frames) == pytest.approx([0, 80, 140, 220], abs=3)
    assert {f.mode for f in frames} == {"RGB"} and len(video.load_frames(path, 50)[0]) == 12


def test_a_model_without_video_sees_the_frames_as_images(capsys, tmp_path, stills):
    stills[0].save(tmp_path / "clip.gif", save_all=True, append_images=stills[1:], duration=50)
    options = ["--method", "uniform:tokens=10", "--method", "pool:tokens=16", "--frames", 3, "--output", tmp_path / "o.png", "--json"]
    out, _ = run(capsys, "--video", tmp_path / "clip.gif", *options)
    rows, meta = (json.loads(out)[k] for k in ("rows", "meta"))
    assert [(r["modality"], r["full"], r["kept"]) for r in rows] == [("video", 432, 30), ("video", 432, 48)]
    assert [p["frame"] for p in rows[0]["planes"]] == [0, 1, 2] and meta["frames"] == [0, 6, 11]
    counts = np.bincount(np.array(rows[0]["indices"]) // 144)
    assert counts.tolist() == [10, 10, 10] and rows[1]["indices"] is None


def test_a_model_that_sees_two_frames_as_one_is_shown_with_the_first_of_each(stills):
    planes = [Plane(2, 2, frame=i) for i in range(4)]
    subject = show._film(stills[:7], [0, 1, 2, 3, 4, 5, 6], [viz.Result("A", 16, 4, planes, [0, 4, 8, 12])])
    assert grey_levels(subject.frames) == [0, 40, 80, 120] and subject.labels == ["frame 0", "frame 2", "frame 4", "frame 6"]


class Processor:
    """Takes videos, notes its calls."""

    image_token, video_token, chat_template = "<image>", "<video>", None
    image_processor, video_processor = "pictures", "videos"

    def __init__(self):
        self.tokenizer, self.calls = SimpleNamespace(), []

    def __call__(self, **call):
        self.calls.append(call)
        return BatchFeature({"pixel_values_videos": torch.zeros(1), "input_ids": torch.zeros(1, dtype=torch.long)})


@pytest.fixture
def report_of(monkeypatch):
    """What ``show`` makes of these reports of one call, and what its model's parts were given."""

    def run(pictures, *reports, video=False):
        processor, placed = Processor(), []
        adapter = SimpleNamespace(place=lambda planes, size, by: placed.append((size, by)) or planes)
        report = CompressionReport(reports)
        monkeypatch.setattr("mllm_efficient.apply.prepare.prepare", lambda *a, **k: SimpleNamespace(report=report, staging=None))
        monkeypatch.setattr("mllm_efficient.patches.adapter_for", lambda model: adapter)
        loaded = Loaded(SimpleNamespace(device="cpu", dtype=torch.bfloat16), processor, ModelOptions())
        (result,) = run_method(loaded, me.DivPrune(tokens=2), "What is this?", pictures, video=video)
        return result, processor.calls, placed

    return run


def test_a_video_goes_through_the_video_processor(report_of, stills):
    planes = (Plane(2, 2, frame=0), Plane(2, 2, frame=1))
    report = ImageReport(0, 8, 2, torch.tensor([1, 5]), planes=planes, modality="video")
    result, (call,), placed = report_of(stills[:3], report, video=True)
    assert (result.indices, tuple(result.planes), result.title) == ([1, 5], planes, "DivPrune")
    assert call["text"] == ["USER: <video>\nWhat is this? ASSISTANT:"] and call["images"] is None
    assert call["videos"][0].shape == (3, 32, 48, 3) and set(placed) == {((48, 32), "videos")}


def test_frames_reported_one_by_one_are_put_together(report_of, stills):
    kept = ImageReport(0, 4, 4, torch.arange(4), planes=(Plane(2, 2),))
    merged = ImageReport(0, 4, 1, None, planes=(Plane(2, 2),), kept_planes=(Plane(1, 1),))
    picked = ImageReport(0, 4, 1, torch.tensor([2]), planes=(Plane(2, 2),))
    result, _, _ = report_of(stills[:2], picked, kept, video=True)
    assert result.indices == [2, 4, 5, 6, 7] and [p.frame for p in result.planes] == [0, 1] and result.kept_planes is None
    result, _, _ = report_of(stills[:2], kept, merged, video=True)
    assert result.indices is None and [(len(p), p.frame) for p in result.kept_planes] == [(4, 0), (1, 1)]
    assert (result.full, result.kept) == (8, 5)


def test_merged_tokens_without_a_place_and_without_parts_are_refused(report_of, stills, monkeypatch):
    monkeypatch.setattr("mllm_efficient.apply.membership.areas", lambda *a, **k: [None])
    report = ImageReport(0, 8, 3, None, planes=(Plane(2, 2), Plane(2, 2)), kept_planes=(Plane(1, 3, placed=False),))
    with pytest.raises(MllmEfficientError, match="without a place"):
        report_of(stills[:1], report)


def test_tiles_of_another_projector_are_drawn_as_they_are(report_of, stills):
    """A base view and a map of tiles before, a base view and each tile by itself after."""
    left, right = ((0.0, x / 2, 1.0, (x + 1) / 2) for x in (0, 1))
    after = (Plane(2, 2), Plane(2, 2, tile=1, box=left), Plane(2, 2, tile=2, box=right))
    report = ImageReport(0, 24, 12, None, planes=(Plane(2, 4), Plane(4, 4, tile=1)), kept_planes=after)
    result, _, _ = report_of(stills[:1], report)
    assert tuple(result.planes) == tuple(result.kept_planes) == after and (result.full, result.kept, result.indices) == (24, 12, None)
    assert [(view.name, view.members) for view in viz.views(result.planes)] == [("base view", (0,)), ("tiles", (1, 2))]
    picked, _, _ = report_of(stills[:1], replace(report, kept=3, of_merged=torch.tensor([1, 6, 11])))
    assert [view.of(picked)[1] for view in viz.views(picked.planes)] == [[1], [2, 7]]


def test_a_prompt_with_placeholders_of_its_own_must_have_as_many_as_are_given():
    loaded = Loaded(None, SimpleNamespace(image_token="<image>", video_token="<video>"), ModelOptions())
    assert loaded.prompt("<image><video> ?", 1, 1) == "USER: <image>\n<video>\n? ASSISTANT:"
    with pytest.raises(MllmEfficientError, match=r"1 <image> and 2 image\(s\)"):
        loaded.prompt("<image> ?", 2)
    with pytest.raises(MllmEfficientError, match=r"0 <video> and 1 video\(s\)"):
        loaded.prompt("<image> ?", 1, 1)


def test_titles_name_the_settings_beside_the_budget():
    assert title(me.build("divprune:keep=0.1,metric=l2")) == "DivPrune (metric=l2)"
    assert title(me.build("random:tokens=9")) == "Random" and title(me.build("none")) == "Uncompressed"
    assert viz.Result("A", 2880, 56, ()).counts == "56 of 2,880 tokens (1.9%)"


def test_several_methods_never_fail_as_a_whole(capsys, scene, tmp_path):
    """What cannot be drawn or run is named, the others are drawn; merged tokens as areas of what they are made of."""
    methods = ["divmerge:keep=0.25", "tome:keep=0.25", "tome:keep=0.25,at=tower", "fastv:keep=0.1", "cdpruner:keep=0.25"]
    given = [word for spec in methods for word in ("--method", spec)]
    for ending, start in ((".pdf", b"%PDF"), (".svg", b"<?xml"), (".png", b"\x89PNG")):
        output = tmp_path / f"o{ending}"
        argv = [
            "show",
            "--image",
            str(scene),
            "--prompt",
            "What colour is it?",
            *given,
            "--output",
            str(output),
            "--json",
            "--device",
            "cpu",
        ]
        assert main(argv) == 1
        out, err = capsys.readouterr()
        rows = {row["method"].split(",relevance")[0]: row for row in json.loads(out)["rows"]}
        assert list(rows) == ["divmerge:keep=0.25", "tome:keep=0.25", "cdpruner:keep=0.25"] and output.read_bytes().startswith(start)
        assert "not drawn: tome:keep=0.25,at=tower: it merges" in err and "not drawn: fastv:keep=0.1: fastv: a layer average" in err
    assert len(set(rows["tome:keep=0.25"]["areas"])) == 36 and rows["tome:keep=0.25"]["indices"] is None
    kept = rows["divmerge:keep=0.25"]
    assert [kept["areas"][i] for i in kept["indices"]] == list(range(36)) and rows["cdpruner:keep=0.25"]["areas"] is None
    assert "What colour is it?" in (tmp_path / "o.svg").read_text()  # which one of the methods looks at
    assert main(["show", "--image", str(scene), "--method", "fastv:keep=0.1", "--output", str(tmp_path / "n.png"), "--device", "cpu"]) == 2
    assert not (tmp_path / "n.png").exists()


def test_areas_have_their_mean_colour_and_an_outline_of_their_own():
    picture = np.zeros((32, 48, 3), np.uint8)
    picture[:, :16], picture[:, 16:32], picture[:, 32:] = (200, 0, 0), (100, 0, 0), (0, 0, 90)
    plane = Plane(2, 3)
    drawn = viz.render(picture, [plane], areas=[0, 0, 1, 0, 0, -1])
    assert (drawn[4:28, 4:28] == (150, 0, 0)).all() and (drawn[4:12, 36:44] == (0, 0, 90)).all()  # over both columns of the first area
    assert (drawn[4:28, 31] != (150, 0, 0)).any(-1).all() and (drawn[20:, 36:].mean(-1) > 150).all()  # an outline; what went is faded
    framed = viz.render(picture, [plane], [4], areas=[0, 0, 1, 0, 0, -1])
    assert (framed != drawn).any(-1)[16:, 16:32].any() and not (framed != drawn).any(-1)[:, :16].any()
