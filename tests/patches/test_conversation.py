"""What images know of others in their prompt: ``pixelprune:dedup=true`` and ``age=`` of methods that select."""

from __future__ import annotations

import pytest
import torch

import mllm_efficient as me
from mllm_efficient.compressors.pixelprune import repeated
from mllm_efficient.eval.builtin.hard.suite import samples
from mllm_efficient.patches import adapter_for

from ..families import VOCABULARY, noise, process, tiny
from .test_pixelprune import FAMILIES, document, inputs_of, reference, said_by_neighbours


def slow(pixels, before, tau):
    """Token by token; of those to the left and above, what is not there is new."""
    out, alone = torch.zeros(pixels.shape[:2], dtype=torch.bool), reference(pixels, tau).view(pixels.shape[:2])
    same = lambda r, c: bool(((pixels[r, c] - before[r, c]).abs() <= tau).all())  # noqa: E731
    for r, c in [(r, c) for r in range(pixels.shape[0]) for c in range(pixels.shape[1])][1:]:
        both_new = (c == 0 or not same(r, c - 1)) and (r == 0 or not same(r - 1, c))
        out[r, c] = alone[r, c] if both_new else same(r, c)
    return out.flatten()


def rebuilt(kept, dropped, before):
    """The whole picture (rows, columns, D) from the tokens that stay and the picture before, each from what is rebuilt already."""
    out, left = torch.full(before.shape, float("nan")), iter(kept)
    new = lambda r, c: not torch.equal(out[r, c], before[r, c])  # noqa: E731
    for r, c in [(r, c) for r in range(before.shape[0]) for c in range(before.shape[1])]:
        if not dropped[r * before.shape[1] + c]:
            out[r, c] = next(left)
        elif (c > 0 and not new(r, c - 1)) or (r > 0 and not new(r - 1, c)):
            out[r, c] = before[r, c]
        else:
            out[r, c] = said_by_neighbours(out, r, c)
    return out


@pytest.mark.parametrize("seed", range(20))
def test_the_rule_across_pictures_is_the_slow_one_and_loses_nothing(seed):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (2 + int(torch.randint(8, (1,), generator=generator)) for _ in range(2))
    before = torch.randint(0, 2, (rows, columns, 1), generator=generator).float().expand(-1, -1, 3).clone()
    pixels = before.clone()
    pixels[rows // 3 :, columns // 3 :] = torch.randint(0, 3, (1,), generator=generator).float()
    dropped = repeated(pixels, before, 0.0)
    assert torch.equal(dropped, slow(pixels, before, 0.0)) and not dropped[0]
    assert torch.equal(rebuilt(pixels.flatten(0, 1)[~dropped], dropped, before), pixels)
    near = pixels + 0.01 * torch.rand(pixels.shape, generator=generator)
    assert torch.equal(repeated(near, before, 0.02), slow(near, before, 0.02))
    assert repeated(before, before, 0.0).sum() == rows * columns - 1


def test_embedded_screenshots_are_rebuilt_from_what_is_left():
    """Picture after picture of a session, each from its own tokens and the picture before."""
    model, processor = me.builtin("qwen")
    adapter, fewer, seen = adapter_for(model), 0, 0
    for sample in samples("test", 12, ["screens"]):
        inputs = processor.image_processor(sample.pictures(), return_tensors="pt")
        items = adapter.items(dict(inputs))
        before = None
        for item in items:
            pixels = adapter.token_pixels(item).view(item.shape.planes[0].rows, item.shape.planes[0].columns, -1)
            dropped = repeated(pixels, before, 0.0)
            if before is not None:
                assert torch.equal(dropped, slow(pixels, before, 0.0))
                assert torch.equal(rebuilt(pixels.flatten(0, 1)[~dropped], dropped, before), pixels)
                fewer, seen = fewer + int((~dropped).sum()), seen + int((~repeated(pixels, None, 0.0)).sum())
            before = pixels
    assert 0 < fewer < 0.4 * seen


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_only_an_earlier_picture_of_its_size_and_row_counts(name):
    model, page, other = tiny(name), document(), document(48, 64)
    changed = page.copy()
    changed.paste(noise(5, 10, 9), (60, 12))
    text = "user : " + "I " * 4 + "what is the big ring ? assistant :"
    pictures = [[page, other, changed, page], [changed, noise(3, 40, 40), other, other]]
    inputs = process(name, [text] * 2, pictures)
    images = me.prepare(model, "pixelprune:dedup=true", **inputs).report.images
    alone = [[me.prepare(model, "pixelprune", **inputs_of(name, p)).report.images[0].kept for p in row] for row in pictures]
    kept = [[i.kept for i in images if i.row == row] for row in (0, 1)]
    assert kept[0][:2] == alone[0][:2] and kept[1][:3] == alone[1][:3]  # none of their size before
    assert 1 < kept[0][2] < alone[0][2] and kept[1][3] == 1
    with me.compressed(model, "pixelprune:dedup=true"):
        both = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, -4:]
        one = [model.generate(**process(name, [text], [row]), max_new_tokens=4, do_sample=False)[0, -4:] for row in pictures]
    assert torch.equal(both, torch.stack(one))
    encoded = me.encode(model, "pixelprune:dedup=true", **inputs)
    again = me.prepare(model, "pixelprune:dedup=true", encoded=encoded, **inputs).report.images
    assert [i.kept for i in again] == [i.kept for i in images]


@torch.no_grad()
def test_frames_are_compared_with_those_before():
    """A page twice, then noise: of the second frame the token that always stays."""
    name = "qwen3_vl"
    adapter = adapter_for(tiny(name))
    pages = [inputs_of(name, picture) for picture in (document(), document(), noise(4, 96, 64))]
    (grid,) = pages[0]["image_grid_thw"]
    video = {"pixel_values_videos": torch.cat([p["pixel_values"] for p in pages]), "video_grid_thw": grid[None] * torch.tensor([3, 1, 1])}
    (item,) = adapter.items(video)
    planned, alone = (me.PixelPrune(dedup=True).plan(adapter, i) for i in (item, adapter.items(pages[0])[0]))
    of_frame = (torch.tensor(planned.stay) // alone.shape.n).bincount().tolist()
    assert of_frame == [alone.kept, 1, alone.shape.n]


# ---------------------------------------------------------------------------------------------------------------- age


@pytest.mark.parametrize("name", ["llava_next", "qwen3_vl"])
@torch.no_grad()
def test_pictures_of_earlier_turns_have_smaller_budgets(name, monkeypatch):
    """Two pictures in the first turn, none in the second, one in the third and the last: the third is one turn with pictures back."""
    model, sizes = tiny(name), [(40, 40), (40, 40), (48, 30), (40, 40)]
    inputs = process(name, ["user : I I what ? what ? I what ? I what ?"], [[noise(i, *size) for i, size in enumerate(sizes)]])
    full, age = [i.shape.n for i in adapter_for(model).items(inputs)], (2, 2, 1, 0)

    def kept(spec):
        return [i.kept for i in me.prepare(model, spec, **inputs).report.images]

    assert kept("divprune:tokens=6,age=0.5") == [6] * 4  # nothing ends a turn
    monkeypatch.setattr(model.generation_config, "eos_token_id", VOCABULARY["?"])
    assert kept("divprune:tokens=6,age=0.5") == [2, 2, 3, 6]
    assert kept("uniform:keep=0.8,age=0.5") == [max(1, round(0.8 * 0.5**back * n)) for back, n in zip(age, full)]
    encoded = me.encode(model, "divprune:tokens=6,age=0.5", **inputs)
    assert [i.kept for i in me.prepare(model, "divprune:tokens=6,age=0.5", encoded=encoded, **inputs).report.images] == [2, 2, 3, 6]


def test_what_age_cannot_be():
    for age in (0, 1, True, -0.5, float("nan"), "half"):
        with pytest.raises(me.MllmEfficientError, match="age="):
            me.DivPrune(keep=0.5, age=age)
    with pytest.raises(me.MllmEfficientError, match="age= have no effect"):
        me.build("none:age=0.5")
    with pytest.raises(me.MllmEfficientError, match="dedup="):
        me.PixelPrune(dedup=1)
    assert me.build("divprune:keep=0.5,age=0.5").aged(2) == me.DivPrune(keep=0.125)
    assert me.DivPrune(prune=0.6, min_tokens=3, age=0.5).aged(1) == me.DivPrune(keep=0.2, min_tokens=3)
