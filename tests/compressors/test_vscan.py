"""VScan equals a slow transcription of its rule, on grids of any shape, and asks towers for an early block's attention.

As in test_attentive.py: plain loops in float64, attention of few values in every second case, and the lowest index wins.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import ClassVar

import numpy as np
import pytest
import torch

import mllm_efficient as me
from mllm_efficient.patches import adapter_for
from mllm_efficient.patches.tower import packed
from mllm_efficient.patches.tower.attention import early_block

from ..families import FAMILIES, make, tiny
from ..families_reference import Kept, greedy, splice, visuals
from ..pairs import for_all
from .test_attentive import by_attention
from .test_merging import slow_merge

BOTH = frozenset({"attention", "early_attention"})


def drawn(seed):
    """Grids, features, early and late attention, K and the window's side."""
    draw = np.random.default_rng(seed)
    grids = tuple(tuple(int(n) for n in draw.integers(1, 9, 2)) for _ in range(1 if seed % 3 else int(draw.integers(2, 4))))
    n = sum(r * c for r, c in grids)
    x = draw.normal(size=(n, 5))
    early, late = (draw.integers(0, 4, n) / 8 if seed % 2 else draw.random(n) for _ in range(2))
    return grids, x, early, late, int(draw.integers(1, n + 1)), int(draw.integers(1, 5))


def slow_vscan(grids, early, late, k, side):
    """Every window's tokens one by one, the best first; then whatever has the most late attention."""
    home, windows = [], 0
    for rows, columns in grids:
        down, across = max(1, rows // side), max(1, columns // side)
        for r in range(rows):
            for c in range(columns):
                home.append(windows + min(r // side, down - 1) * across + min(c // side, across - 1))
        windows += down * across
    share, limit = k // 2, -(-(k // 2) // windows)
    taken, chosen = [0] * windows, []
    for i in by_attention(early):
        if len(chosen) < share and taken[home[i]] < limit:
            taken[home[i]] += 1
            chosen.append(i)
    return sorted(chosen + [i for i in by_attention(late) if i not in chosen][: k - len(chosen)])


def tokens(grids, x, early, late):
    grid = grids[0] if len(grids) == 1 else None
    return me.VisualTokens(torch.tensor(x), grid, attention=torch.tensor(late), early_attention=torch.tensor(early), grids=grids)


@pytest.mark.once
@for_all("seed", range(200))
def test_vscan_is_the_slow_scan(seed):
    grids, x, early, late, k, side = drawn(seed)
    out = me.VScan(tokens=k, window=side).compress(tokens(grids, x, early, late), k)
    kept = slow_vscan(grids, early, late, k, side)
    assert out.indices.tolist() == kept and len(set(kept)) == k
    rows, _ = slow_merge(x, kept, "mean")
    np.testing.assert_allclose(out.features.numpy(), np.stack(rows), rtol=1e-12, atol=1e-12)


@pytest.mark.once
def test_the_published_budget_takes_as_many_from_every_window():
    """96 of LLaVA-1.5's 24 x 24: 3 from each of 16 windows of 6 x 6 by early attention, 48 by late attention."""
    draw = torch.Generator().manual_seed(0)
    early, late = torch.rand(576, generator=draw), torch.rand(576, generator=draw)
    kept = me.VScan(tokens=96).select(me.VisualTokens(torch.randn(576, 4), (24, 24), attention=late, early_attention=early))
    windows = early.view(4, 6, 4, 6).permute(0, 2, 1, 3).reshape(16, 36)
    place = torch.arange(576).view(4, 6, 4, 6).permute(0, 2, 1, 3).reshape(16, 36)
    local = place.gather(1, windows.topk(3).indices).flatten()
    rest = late.index_fill(0, local, 0).topk(48).indices
    assert kept.tolist() == sorted([*local.tolist(), *rest.tolist()])


@pytest.mark.once
def test_without_a_grid_there_are_no_windows():
    v = me.VisualTokens(torch.randn(9, 4), attention=torch.rand(9), early_attention=torch.rand(9))
    with pytest.raises(me.CountMismatchError, match="these tokens come with none: give VisualTokens a grid"):
        me.VScan(tokens=4).select(v)
    with pytest.raises(me.BadSettingError, match="window=0 is not a whole number of at least 1"):
        me.VScan(tokens=4, window=0)
    for name in ("attention", "early_attention"):
        spoilt = dataclasses.replace(v, grid=(3, 3), **{name: torch.tensor([float("nan")] * 9)})
        with pytest.raises(me.NotFiniteError, match="vscan: the attentions hold NaN"):
            me.VScan(tokens=4).select(spoilt)


# ------------------------------------------------------------------------------------------------ what towers give


@pytest.mark.once
def test_the_early_block_is_a_quarter_of_the_way_up():
    assert [early_block(n) for n in (24, 32, 27, 12, 6, 4, 2, 1)] == [5, 7, 6, 2, 1, 0, 0, 0]


def asked(model, inputs, needs):
    adapter = adapter_for(model)
    return adapter.encode(adapter.items(inputs), frozenset(needs))


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "internvl"])
def test_early_attention_is_what_a_model_of_that_layer_gives(name):
    """Of towers of two blocks the first is early, whichever's output the model takes; test_towers.py has attention of any layer."""
    model, inputs = tiny(name), make(name, "two images")
    model.config.vision_feature_layer = -2
    expected = asked(model, inputs, {"attention"})
    model.config.vision_feature_layer = -1
    for found, first in zip(asked(model, inputs, BOTH), expected):
        assert torch.equal(found.early_attention, first.attention) and not torch.equal(found.attention, first.attention)
        assert found.early_attention.shape == (found.shape.n,)


@pytest.mark.parametrize("name, full", [("qwen2_vl", None), ("qwen3_vl", None), *(("qwen2_5_vl", full) for full in (None, 0, 1))])
def test_early_attention_is_what_a_tower_that_ends_there_gives(name, full):
    model, inputs = tiny(name), make(name, "video and image")
    tower = model.model.visual
    if full is not None:
        tower.fullatt_block_indexes = model.config.vision_config.fullatt_block_indexes = [full]
    at = packed.early_of(tower)
    assert at == (tower.fullatt_block_indexes[0] if name == "qwen2_5_vl" else 0)
    found, short = asked(model, inputs, {"early_attention"}), copy.deepcopy(model)
    del short.model.visual.blocks[at + 1 :]
    for e, last in zip(found, asked(short, inputs, {"attention"})):
        assert torch.equal(e.early_attention, last.attention) and e.attention is None and e.keys is None


def test_windows_are_laid_over_every_tile_and_frame(registered):
    got = []

    @registered("asking")
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Asking(me.Selector):
        needs: ClassVar[frozenset] = BOTH

        def score(self, v):
            got.append(v)
            return v.early_attention

    for name, row in (("llava_next", "one image"), ("internvl", "one image"), ("qwen3_vl", "video")):
        model, inputs = tiny(name), make(name, row)
        (item,) = adapter_for(model).items(inputs)
        me.prepare(model, "asking:keep=0.5", **inputs)
        assert got[-1].grids == tuple((p.rows, p.columns) for p in item.shape.planes) and len(got[-1].grids) > 1
        assert sum(r * c for r, c in got[-1].grids) == len(got[-1])


def reference(name, model, inputs):
    """The row with what vscan keeps of the stock features, the others merged into it, put together by hand."""
    found, left = visuals(name, model, inputs), []
    encodings = {modality: [e for e in asked(model, inputs, BOTH) if e.shape.modality == modality] for modality in ("image", "video")}
    for visual in found:
        e = encodings[visual.modality].pop(0)
        k = max(1, round(0.4 * visual.n))
        kept = slow_vscan(visual.planes, e.early_attention.tolist(), e.attention.tolist(), k, 2)
        stay = torch.zeros(len(visual.features), dtype=torch.bool)
        stay[(~visual.newline).nonzero()[:, 0][kept]] = True
        rows, groups = slow_merge(visual.tokens.double().numpy(), kept, "mean")
        deep = [torch.stack([d[[i for i, g in enumerate(groups) if g == j]].mean(0) for j in kept]) for d in visual.deep]
        left.append(Kept(stay, torch.tensor(np.stack(rows)).float(), tuple(deep)))
    return splice(name, model, inputs, found, left, "keep" if FAMILIES[name].mrope else "renumber")


@pytest.mark.parametrize("name, row", [("llava_next", "two images"), ("internvl", "two images"), ("qwen3_vl", "video and image")])
def test_greedy_equals_the_slow_reference(name, row):
    model, inputs = tiny(name), make(name, row)
    expected = greedy(model, reference(name, model, inputs))
    with me.compressed(model, "vscan:keep=0.4,window=2"):
        assert model.generate(**inputs, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :].tolist() == expected


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl"])
def test_a_batch_equals_its_rows_with_the_second_stage(name):
    model, rows = tiny(name), ("one image", "two images", "text only")
    with me.compressed(model, "vscan:keep=0.5,window=2 | fastv:layer=1,ratio=0.333333"):
        batch = make(name, *rows)
        together = model.generate(**batch, max_new_tokens=4)[:, batch["input_ids"].shape[1] :]
        for row, kind in enumerate(rows):
            one = make(name, kind)
            assert torch.equal(model.generate(**one, max_new_tokens=4)[0, one["input_ids"].shape[1] :], together[row]), kind
