"""The slow reference of every family. Nothing here imports the package under test.

It takes one row without padding and without a cache, puts the stock features of what stays between the text by hand, and computes
the whole sequence afresh for every new token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .families import (
    EVERY,
    MARKED,
    VOCABULARY,
)


@dataclass(frozen=True)
class Visual:
    """One image or video of a row, as the stock model makes it.

    features: (length, D) with newline columns and separators. columns: (length,) where they stand in the row.
    newline: (length,) bool. planes: (rows, columns) of each rectangle of tokens. parts: (N,) the tile or frame of each
    token. deep: the same as features for every layer that adds visual features. grid: (t, h, w) of an M-RoPE family.
    marks: columns of text between the tokens, each with the groups of columns of each of which one must stay for it to stay.
    """

    modality: str
    features: Tensor
    columns: Tensor
    newline: Tensor
    planes: tuple[tuple[int, int], ...]
    parts: Tensor
    deep: tuple[Tensor, ...] = ()
    grid: tuple[int, int, int] | None = None
    marks: tuple[tuple[int, tuple[tuple[int, ...], ...]], ...] = ()

    @property
    def tokens(self) -> Tensor:
        """(N, D), what is compressed."""
        return self.features[~self.newline]

    @property
    def n(self) -> int:
        return int((~self.newline).sum())

    @property
    def separators(self) -> int:
        return int(self.newline.sum()) + len(self.marks)

    def left_of(self, kept: Kept) -> int:
        """Newline columns and text between tokens that stay."""
        return int((self.newline & kept.stay).sum()) + len(left_marks(self, kept))


@dataclass(frozen=True)
class Kept:
    """What stays of a ``Visual``: stay (length,) bool, the features that stand in those slots, and those of later layers.

    shape: (t, h, w) in tokens if the tokens were merged to a smaller grid. marks: whether all text between tokens stays.
    """

    stay: Tensor
    features: Tensor
    deep: tuple[Tensor, ...] = ()
    shape: tuple[int, int, int] | None = None
    marks: bool = False


@dataclass(frozen=True)
class Row:
    """A row ready for the bare language model. embeds (1, L, D), positions (1, L) or (3, 1, L), next: of the first new token."""

    embeds: Tensor
    positions: Tensor
    next: int
    visual: Tensor
    deep: tuple[Tensor, ...]
    columns: Tensor
    ids: Tensor | None = None


def canvas(model: Any, image_size: Tensor, tiled: bool) -> tuple[int, int]:
    """(rows, columns) of the tiles of a picture, (0, 0) where it has its base view alone."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    config = model.config
    return (
        get_anyres_image_grid_shape(image_size.tolist(), config.image_grid_pinpoints, config.vision_config.image_size) if tiled else (0, 0)
    )


def packed(name: str, model: Any, image_size: Tensor, tiling: tuple[int, int]) -> Tensor:
    """(length, 3) out of the stock packing: the canvas row and column each token comes from, and 1 for newline columns."""
    vision = model.config.vision_config
    side = vision.image_size // vision.patch_size
    marks = torch.zeros(1 + tiling[0] * tiling[1], side * side, 3)
    for tile in range(len(marks) - 1):
        for place in range(side * side):
            top, left = tile // tiling[1] * side, tile % tiling[1] * side
            marks[tile + 1, place, :2] = torch.tensor([top + place // side, left + place % side])
    settings = (
        {"vision_aspect_ratio": model.config.vision_aspect_ratio}
        if name == "llava_onevision"
        else {"vision_feature_select_strategy": "full"}
    )
    return model.model.pack_image_features([marks], image_size[None], image_newline=torch.tensor([0.0, 0.0, 1.0]), **settings)[0][0]


def anyres(name: str, model: Any, inputs: dict[str, Any]) -> list[tuple[Tensor, tuple, Tensor]]:
    """newline, planes and parts of every anyres image, from the stock packing of marked features."""
    vision, out = model.config.vision_config, []
    side = vision.image_size // vision.patch_size
    sizes = inputs["image_sizes"]
    tiled = [n == 1 for n in inputs["batch_num_images"].tolist() for _ in range(n)] if "batch_num_images" in inputs else [True] * len(sizes)
    for size, is_tiled in zip(sizes, tiled):
        tiling = canvas(model, size, is_tiled)
        marks = packed(name, model, size, tiling)
        newline = marks[:, 2] == 1
        planes, parts = [(side, side)], [0] * (side * side)
        if is_tiled:
            rows = int(newline.sum())
            planes.append((rows, (len(marks) - side * side) // rows - 1))
            # A token of a map that was shrunk belongs to the tile its middle lies in.
            places = marks[side * side :][~newline[side * side :]].tolist()
            parts += [1 + int((row + 0.5) // side) * tiling[1] + int((column + 0.5) // side) for row, column, _ in places]
        out.append((newline, tuple(planes), torch.tensor(parts)))
    return out


@torch.no_grad()
def visuals(name: str, model: Any, inputs: dict[str, Any]) -> list[Visual]:
    """The images and videos of a row (or of each row of an unpadded batch of one) in prompt order, in full."""
    family, ids = EVERY[name], inputs["input_ids"][0]
    found: dict[str, list[Visual]] = {"image": [], "video": []}
    where = {"image": (ids == family.image_token).nonzero()[:, 0]}
    where["video"] = (ids == family.video_token).nonzero()[:, 0] if family.video else torch.zeros(0, dtype=torch.long)

    def add(modality, features, newline, planes, parts, deep=(), grid=None):
        before = sum(len(v.features) for v in found[modality])
        columns = where[modality][before : before + len(features)]
        found[modality].append(Visual(modality, features, columns, newline, tuple(planes), parts, tuple(deep), grid))

    if family.mrope:
        for modality, pixels, thw in (("image", "pixel_values", "image_grid_thw"), ("video", "pixel_values_videos", "video_grid_thw")):
            if pixels not in inputs:
                continue
            out = getattr(model.model, f"get_{modality}_features")(inputs[pixels], inputs[thw], return_dict=True)
            deep = getattr(out, "deepstack_features", None) or []
            for i, (features, (t, h, w)) in enumerate(zip(out.pooler_output, inputs[thw].tolist())):
                plane = (h // 2, w // 2)
                parts = torch.arange(t).repeat_interleave(plane[0] * plane[1])
                add(modality, features, torch.zeros(len(features), dtype=torch.bool), [plane] * t, parts, [d[i] for d in deep], (t, h, w))
    elif name == "mistral3":
        if "pixel_values" in inputs:
            call = {k: inputs[k] for k in ("pixel_values", "image_sizes")}
            made = model.model.get_image_features(**call, return_dict=True).pooler_output
            for features, size in zip(made, inputs["image_sizes"].tolist()):
                plane = (size[0] // 8, size[1] // 8)
                add("image", features, torch.zeros(len(features), dtype=torch.bool), [plane], torch.zeros(len(features), dtype=torch.long))
            found["image"] = [replace(v, marks=row_breaks(ids, v)) for v in found["image"]]
    elif name == "idefics3":
        if "pixel_values" in inputs:
            call = {k: inputs[k] for k in ("pixel_values", "pixel_attention_mask")}
            made = torch.cat(list(model.model.get_image_features(**call, return_dict=True).pooler_output))
            n, at = 9, 0
            for tiles, marks in named_tiles(ids, family.image_token):
                features = made[at : at + n * tiles]
                at += n * tiles
                parts = torch.arange(tiles).repeat_interleave(n)
                add("image", features, torch.zeros(len(features), dtype=torch.bool), [(3, 3)] * tiles, parts)
                found["image"][-1] = replace(found["image"][-1], marks=marks)
            assert at == len(made)
    elif name == "minicpmv4_6":
        if "pixel_values" in inputs:
            call = {k: inputs[k] for k in ("pixel_values", "target_sizes")}
            made = iter(zip(model.model.get_image_features(**call, return_dict=True).pooler_output, inputs["target_sizes"].tolist()))
            for crops, marks in slices(ids, family.image_token):
                own = [next(made) for _ in range(crops)]
                features = torch.cat([part for part, _ in own])
                parts = torch.cat([torch.full((len(part),), i) for i, (part, _) in enumerate(own)])
                planes = [(h // 4, w // 4) for _, (h, w) in own]
                add("image", features, torch.zeros(len(features), dtype=torch.bool), planes, parts)
                found["image"][-1] = replace(found["image"][-1], marks=marks)
    elif family.typed:
        if "pixel_values" in inputs:
            call = {k: inputs[k] for k in ("pixel_values", "image_position_ids") if k in inputs}
            for i, features in enumerate(model.model.get_image_features(**call, return_dict=True).pooler_output):
                n = len(features)
                grid = (math.isqrt(n), math.isqrt(n))
                if "image_position_ids" in inputs:  # (column, row) of each patch, -1 for padding; a token has two on a side
                    grid = tuple(int(side + 1) // 2 for side in inputs["image_position_ids"][i].amax(0).flip(0))
                add("image", features, torch.zeros(n, dtype=torch.bool), [grid], torch.zeros(n, dtype=torch.long))
    elif family.in_prompt:
        if "pixel_values" in inputs:
            tiles = model.model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True).pooler_output
            side, at = int(tiles.shape[1] ** 0.5), 0
            starts, ends = ((ids == VOCABULARY[token]).nonzero()[:, 0].tolist() for token in ("<img>", "</img>"))
            for start, end in zip(starts, ends):
                count = int((ids[start:end] == family.image_token).sum()) // tiles.shape[1]
                features = tiles[at : at + count].flatten(0, 1)
                parts = torch.arange(count).repeat_interleave(tiles.shape[1])
                add("image", features, torch.zeros(len(features), dtype=torch.bool), [(side, side)] * count, parts)
                at += count
            assert at == len(tiles)
    else:
        if "pixel_values" in inputs:
            call = {k: inputs[k] for k in ("pixel_values", "image_sizes", "batch_num_images") if k in inputs}
            full = model.model.get_image_features(**call, return_dict=True).pooler_output
            for features, (newline, planes, parts) in zip(full, anyres(name, model, inputs)):
                add("image", features, newline, planes, parts)
        if "pixel_values_videos" in inputs:
            frames = inputs["pixel_values_videos"].shape[1]
            for features in model.model.get_video_features(inputs["pixel_values_videos"], return_dict=True).pooler_output:
                features = features.reshape(-1, features.shape[-1])  # transformers 5.19 gives frames apart
                side = math.isqrt(len(features) // frames)
                newline = torch.arange(len(features)) >= frames * side * side
                add("video", features, newline, [(side, side)] * frames, torch.arange(frames).repeat_interleave(side * side))
    for modality, items in found.items():
        assert sum(len(v.features) for v in items) == len(where[modality])
    return sorted(found["image"] + found["video"], key=lambda v: int(v.columns[0]))


def row_breaks(ids: Tensor, visual: Visual) -> tuple[tuple[int, tuple[tuple[int, ...], ...]], ...]:
    """Each break of an image stays between a row that stays and one after it."""
    columns, out = visual.columns.tolist(), []
    for column in range(columns[0], columns[-1]):
        if int(ids[column]) == MARKED["[IMG_BREAK]"]:
            row = column - visual.planes[0][1]
            out.append((column, (tuple(c for c in columns if row <= c < column), tuple(c for c in columns if c > column))))
    assert len(out) == visual.planes[0][0] - 1 and int(ids[columns[-1] + 1]) == MARKED["[IMG_END]"]
    return (*out, (columns[-1] + 1, ()))


def named_tiles(ids: Tensor, image_token: int) -> list[tuple[int, tuple[tuple[int, tuple[tuple[int, ...], ...]], ...]]]:
    """The tiles and marks of each Idefics3 image: a tile's name and the token in front of it stay with the tile, the line break after a
    row between it and a later row, the one in front of the whole image with any tile, and the last token always."""
    text = {id: token for token, id in MARKED.items()}
    words, out, at = [text[int(i)] for i in ids], [], 0
    rows: list[list[tuple[int, ...]]] = [[]]
    names: list[tuple[int, tuple[int, ...]]] = []
    lines: list[int] = []
    while at < len(words):
        if words[at] in ("\n", "\n\n") and names:
            lines.append(at)
            rows.append([])
        elif words[at] == "<fake_token_around_image>" and words[at + 1].startswith(("<row", "<global")):
            stop = at + 2
            while stop < len(words) and int(ids[stop]) == image_token:
                stop += 1
            tile = tuple(range(at + 2, stop))
            rows[-1].append(tile)
            names += [(at, tile), (at + 1, tile)]
            at = stop - 1
        elif words[at] == "<fake_token_around_image>":
            marks: list[tuple[int, tuple[tuple[int, ...], ...]]] = [(column, (tile,)) for column, tile in names]
            for i, line in enumerate(lines):
                before, after = sum(rows[i], ()), sum((tile for row in rows[i + 1 : -1] for tile in row), ())
                every = sum((tile for row in rows[:-1] for tile in row), ())
                marks.append((line, (before, after) if i < len(lines) - 1 else (every,)))
            out.append((sum(map(len, rows)), (*sorted(marks), (at, ()))))
            rows, names, lines = [[]], [], []
        at += 1
    return out


def slices(ids: Tensor, image_token: int) -> list[tuple[int, tuple[tuple[int, tuple[tuple[int, ...], ...]], ...]]]:
    """Crops and marks of each MiniCPM-V image: what opens and closes a crop stays with it, a line break between its row and a later one.

    What is around an image of a single crop is no mark: it stays in any case.
    """
    opens = {VOCABULARY["<img>"]: True, VOCABULARY["<|vision_start|>"]: False}
    images: list[list[tuple[int, ...]]] = []
    lines: list[dict[int, int]] = []
    for at, token in enumerate(ids.tolist()):
        if token in opens:
            stop = at + 1
            while int(ids[stop]) == image_token:
                stop += 1
            if opens[token]:
                images.append([])
                lines.append({})
            images[-1].append(tuple(range(at + 1, stop)))
        elif token == MARKED["\n"]:
            lines[-1][at] = len(images[-1])
    out = []
    for crops, breaks in zip(images, lines):
        marks: list[tuple[int, tuple[tuple[int, ...], ...]]] = []
        for crop in crops:
            marks += [(crop[0] - 1, (crop,)), (crop[-1] + 1, (crop,))]
        starts = [1, *breaks.values(), len(crops)]
        for i, line in enumerate(breaks):
            marks.append((line, (sum(crops[starts[i] : starts[i + 1]], ()), sum(crops[starts[i + 1] :], ()))))
        out.append((len(crops), tuple(sorted(marks)) if len(crops) > 1 else ()))
    return out


def left_marks(visual: Visual, kept: Kept) -> list[int]:
    """Columns of the text between tokens that stays."""
    there = set(visual.columns[kept.stay].tolist())
    return [column for column, groups in visual.marks if kept.marks or all(there & set(group) for group in groups)]


def everything(visual: Visual) -> Kept:
    """All of it."""
    return Kept(torch.ones(len(visual.features), dtype=torch.bool), visual.features, visual.deep)


def chosen(visual: Visual, indices: Tensor, newline: str | None = None) -> Kept:
    """The tokens with these indices among the N; newline columns go unless they are all kept or nothing is removed."""
    if len(indices) == visual.n:
        return everything(visual)
    stay = visual.newline.clone() if newline == "keep" else torch.zeros_like(visual.newline)
    stay[(~visual.newline).nonzero()[:, 0][indices]] = True
    return Kept(stay, visual.features[stay], tuple(d[stay] for d in visual.deep), marks=newline == "keep")


def merged(
    visual: Visual, features: Tensor, counts: Sequence[int], shape: tuple[int, int, int] | None = None, deep: Sequence[Tensor] = (),
    grids: Sequence[tuple[int, int]] = (),
) -> Kept:  # fmt: skip
    """New tokens in place of all of them. counts: how many there are for each plane, whose first slots they take; where text stands
    between rows, those of the first rows and columns of the (rows, columns) that they fill, ``grids``."""
    slots, start, taken = (~visual.newline).nonzero()[:, 0], 0, []
    for i, ((rows, columns), count) in enumerate(zip(visual.planes, counts)):
        own = slots[start : start + rows * columns]
        if visual.marks and grids:
            taken.append(own.view(rows, columns)[: grids[i][0], : grids[i][1]].flatten())
        else:
            taken.append(own[:count])
        start += rows * columns
    stay = torch.zeros_like(visual.newline)
    stay[torch.cat(taken)] = True
    assert int(stay.sum()) == len(features)
    return Kept(stay, features, tuple(deep), shape)


def rope_index(name: str, model: Any, ids: Tensor, inputs: dict[str, Any], grids: dict[str, Tensor]) -> Tensor:
    """Positions (3, L) of a row without padding, by the stock model."""
    family = EVERY[name]
    types = (ids == family.image_token).int() + 2 * (ids == family.video_token).int()
    seconds = {"second_per_grid_ts": inputs["second_per_grid_ts"]} if "second_per_grid_ts" in inputs else {}
    return model.model.get_rope_index(ids[None], mm_token_type_ids=types[None], **grids, **seconds)[0][:, 0]


@torch.no_grad()
def splice(name: str, model: Any, inputs: dict[str, Any], found: Sequence[Visual], kept: Sequence[Kept], positions: str) -> Row:
    """One row with what is kept in place of its placeholders. positions: "keep" or "renumber"."""
    ids = inputs["input_ids"][0]
    stays = torch.ones(len(ids), dtype=torch.bool)
    embeds = model.get_input_embeddings()(ids).clone()
    visual = torch.zeros(len(ids), dtype=torch.bool)
    layers = len(found[0].deep) if found else 0
    deep = [torch.zeros_like(embeds) for _ in range(layers)]
    for item, left in zip(found, kept):
        stays[item.columns] = left.stay
        here = item.columns[left.stay]
        embeds[here], visual[here] = left.features, True
        for layer, features in zip(deep, left.deep):
            layer[here] = features
        stays[[column for column, _ in item.marks]] = False
        stays[left_marks(item, left)] = True
    columns = stays.nonzero()[:, 0]
    if not EVERY[name].mrope:
        at = columns if positions == "keep" else torch.arange(len(columns))
        following = len(ids) if positions == "keep" else len(columns)
        at = at[None]
    elif positions == "renumber" or not found:
        at, following = torch.arange(len(columns)).expand(3, 1, -1), len(columns)
    else:
        grids = {k: inputs[k] for k in ("image_grid_thw", "video_grid_thw") if k in inputs}
        if any(left.shape for left in kept):  # the prompt of a smaller picture
            small = {"image": [], "video": []}
            for item, left in zip(found, kept):
                t, h, w = left.shape or (item.grid[0], item.grid[1] // 2, item.grid[2] // 2)
                small[item.modality].append([t, 2 * h, 2 * w])
            grids = {f"{modality}_grid_thw": torch.tensor(small[modality]) for modality in small if small[modality]}
            full = rope_index(name, model, ids[columns], inputs, grids)
            at, following = full[:, None], int(full.max()) + 1
        else:
            full = rope_index(name, model, ids, inputs, grids)
            at, following = full[:, None, columns], int(full.max()) + 1
    return Row(
        embeds[columns][None], at, following, visual[columns][None], tuple(d[columns][visual[columns]] for d in deep), columns, ids[columns]
    )


def seen(model: Any, row: Row) -> Any:
    """The mask of a row: all of it; with Gemma, what each column of it sees, for layers with and without a sliding window."""
    if not model.config.model_type.startswith("gemma"):
        return torch.ones(row.embeds.shape[:2], dtype=torch.long)
    visual = row.visual[0]
    before = torch.cat([torch.zeros(1, dtype=torch.bool), visual[:-1]])
    image = (visual & ~before).cumsum(0)  # the number of the run of visual columns that it is in
    query, key = torch.meshgrid(torch.arange(len(visual)), torch.arange(len(visual)), indexing="ij")
    causal = key <= query
    both_ways = causal | (visual[query] & visual[key] & (image[query] == image[key]))
    near = both_ways & (query - key < model.config.text_config.sliding_window)
    full = causal if model.config.model_type == "gemma4" else both_ways  # Gemma 4 lets images see both ways in sliding layers alone
    return {"full_attention": additive(full), "sliding_attention": additive(near)}


def of_ids(model: Any, row: Row) -> dict[str, Tensor]:
    """What layers of Gemma 4 read of the ids themselves, where placeholders count as padding."""
    if model.config.model_type != "gemma4":
        return {}
    assert row.ids is not None
    ids = torch.where(row.visual, model.config.text_config.pad_token_id, row.ids[None])
    return {"per_layer_inputs": model.model.language_model.get_per_layer_inputs(ids, None)}


def additive(seen: Tensor) -> Tensor:
    """(1, 1, L, L): 0 where a column is seen."""
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]


def logits(model: Any, row: Row) -> Tensor:
    """Logits (L, vocabulary) of the bare language model and head, without a cache."""
    deep = dict(visual_pos_masks=row.visual, deepstack_visual_embeds=list(row.deep)) if row.deep else {}
    hidden = model.get_decoder()(
        inputs_embeds=row.embeds,
        position_ids=row.positions,
        attention_mask=seen(model, row),
        **of_ids(model, row),
        use_cache=False,
        **deep,
    ).last_hidden_state
    return model.lm_head(hidden)[0]


@torch.no_grad()
def greedy(model: Any, row: Row, new: int = 6) -> list[int]:
    """The ``new`` greedy tokens after a row, the whole sequence computed afresh for each of them."""
    out: list[int] = []
    for _ in range(new):
        token = logits(model, row)[-1].argmax()
        out.append(int(token))
        row = extended(model, row, token[None])
    return out


def extended(model: Any, row: Row, ids: Tensor) -> Row:
    """The row with text behind it."""
    more = torch.arange(row.next, row.next + len(ids)).expand(*row.positions.shape[:-1], -1)
    return replace(
        row,
        embeds=torch.cat([row.embeds, model.get_input_embeddings()(ids)[None]], 1),
        positions=torch.cat([row.positions, more], -1),
        next=row.next + len(ids),
        visual=torch.cat([row.visual, torch.zeros(1, len(ids), dtype=torch.bool)], 1),
        ids=None if row.ids is None else torch.cat([row.ids, ids]),
    )
