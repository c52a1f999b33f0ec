"""What a method will do to an image or video, known before any pixel is looked at: which tokens together, how many stay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..budget import apportion
from ..compressors.base import Compressor
from ..compressors.composed import Composed, inside_of, projector_of
from ..compressors.merger import Merger
from ..compressors.projector import Projector
from ..compressors.reducer import Reducer, spread_out
from ..compressors.resizer import Resizer
from ..errors import BadBudgetError, UnsupportedModelError
from ..lazy import torch
from ..tokens import Grid, Plane, VisualShape, grids_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Group:
    """Tokens that are compressed together.

    plane: the rectangle they form, if they form one. n: how many they are. k: the budget handed to the method. kept: the
    tokens it gives for that. whole: whether they are all of the image. corner: the number of the rectangle's first token
    in the image, and what lies between two of its rows.
    """

    plane: Plane | None
    n: int
    k: int
    kept: int
    whole: bool = True
    corner: tuple[int, int] = (0, 0)

    @property
    def indices(self) -> Tensor | None:
        """(n,) of its tokens in the image, None for all of them."""
        if self.whole or self.plane is None:
            return None
        first, stride = self.corner
        return (first + torch.arange(self.plane.rows)[:, None] * stride + torch.arange(self.plane.columns)).flatten()

    @property
    def grid(self) -> tuple[int, int] | None:
        return (self.plane.rows, self.plane.columns) if self.plane else None


@dataclass(frozen=True)
class Plan:
    """A method on one item of ``shape``.

    groups: of a method that works on tokens. rounds: of one in the tower the pairs that each block merges.
    smaller: the grid a smaller picture is given; side: tokens along a side of
    each tile under another projector; after: the shape that either gives. kept: tokens that are left. separators: newline
    columns and separators that are left. untouched: every token and separator stays as it is. clamped: more tokens were
    asked than there are. stages: of an in-decoder method (layer, tokens from there on); per_layer: its tokens at every layer, of
    which kept is the mean, rounded; entering: separators that the first layer sees.
    """

    shape: VisualShape
    kept: int
    groups: tuple[Group, ...] = ()
    smaller: tuple[int, int] | None = None
    side: int | None = None
    after: VisualShape | None = None
    separators: int = 0
    untouched: bool = False
    clamped: bool = False
    stages: tuple[tuple[int, int], ...] = ()
    per_layer: tuple[int, ...] = ()
    entering: int = 0
    rounds: tuple[int, ...] = ()

    @property
    def seen(self) -> VisualShape:
        """The shape of the tokens that ``groups`` are of: behind another projector that of what it gives."""
        return self.shape if self.after is None else self.after


def plan(adapter: Any, method: Compressor, item: Any) -> Plan:
    """The plan of a method for an item of the adapter. Raises ``BadBudgetError`` where the budget cannot be met."""
    if isinstance(method, Composed):
        return _in_turn(adapter, method, item)[-1]
    shape: VisualShape = item.shape
    if isinstance(method, Projector):
        return _projected(adapter, method, item)
    if isinstance(method, Reducer):
        return _reduced(adapter, method, shape)
    k = method.budget.count(shape.n, fixed=adapter.fixed_count)
    clamped = method.tokens is not None and method.tokens > shape.n
    whole = Plan(shape, shape.n, separators=shape.separators, untouched=True, clamped=clamped)
    if isinstance(method, Resizer):
        smaller = method.target(adapter.unit(item), k, lambda grid: adapter.shape_at(item, grid).n) if k < shape.n else None
        if smaller is None or smaller == adapter.unit(item):
            return whole
        after: VisualShape = adapter.shape_at(item, smaller)
        return Plan(shape, after.n, smaller=smaller, after=after, separators=after.separators if method.newline else 0, clamped=clamped)
    if method.in_tower:
        if k == shape.n:
            return whole
        after = VisualShape((Plane(1, k, placed=False),))
        return Plan(shape, k, after=after, rounds=method.in_blocks(shape.n, k, adapter.tower_blocks), clamped=clamped)
    groups = tuple(_groups(method, shape, k))
    kept = sum(g.kept for g in groups)
    clamped = method.tokens is not None and any(method.tokens > g.n for g in groups)
    if kept == shape.n and method.full_is_identity:
        return replace(whole, clamped=clamped)
    keeps_newlines = not method.merges and (method.newline == "keep" or kept == shape.n)
    return Plan(shape, kept, groups, separators=shape.separators if keeps_newlines else 0, clamped=clamped)


def _projected(adapter: Any, method: Projector, item: Any) -> Plan:
    shape: VisualShape = item.shape
    if shape.modality != "image":
        raise UnsupportedModelError(f"{method.name} projects pictures, and this call has a video")
    side = method.side(adapter.unit(item))
    after: VisualShape = adapter.projected(item, side)
    if after.n > shape.n:
        raise BadBudgetError(
            f"{method.name}: {side * side} tokens for each of {len(after.planes)} views are {after.n}: the prompt has room for {shape.n}"
        )
    return Plan(shape, after.n, side=side, after=after)


def _reduced(adapter: Any, method: Reducer, shape: VisualShape) -> Plan:
    whole = Plan(shape, shape.n, separators=shape.separators, untouched=True)
    return _inside(adapter, method, whole, grids_of(shape.planes), fixed=adapter.fixed_count)


def _inside(adapter: Any, method: Reducer, before: Plan, grids: tuple[Grid, ...] | None, fixed: bool) -> Plan:
    """What an in-decoder method does to the tokens that ``before`` leaves, which fill ``grids``."""
    depth, n = adapter.decoder_layers, before.kept
    layers, counts = method.stages(depth), method.counts(n, depth, fixed=fixed, grids=grids)
    per_layer = spread_out(n, layers, counts, depth)
    untouched = min(counts) == n and not method.merges
    return replace(
        before, kept=round(sum(per_layer) / depth), separators=before.separators if untouched or method.newline == "keep" else 0,
        untouched=before.untouched and untouched, clamped=before.clamped or (method.tokens is not None and method.tokens > n),
        stages=tuple(zip(layers, counts)), per_layer=per_layer, entering=before.separators,
    )  # fmt: skip


def _in_turn(adapter: Any, method: Composed, item: Any) -> list[Plan]:
    """The plan after each stage, all of the item's own shape."""
    first, *rest = method.stages
    out = [plan(adapter, first, item)]
    for stage, before in zip(rest, method.stages):
        done = out[-1]
        if isinstance(stage, Reducer):
            out.append(_inside(adapter, stage, done, _grids_left(before, done), fixed=adapter.fixed_count))
        else:  # on what a projector gives
            then = plan(adapter, stage, replace(item, shape=done.seen))
            out.append(replace(then, shape=done.shape, side=done.side, after=done.after, untouched=False))
    return out


def _grids_left(method: Compressor, p: Plan) -> tuple[Grid, ...] | None:
    """The rectangles that the tokens fill that a method leaves, None where they fill none."""
    if not p.groups:
        return grids_of(p.seen.planes)
    return tuple(method.target(g.grid, g.k) for g in p.groups) if isinstance(method, Merger) else None


def _groups(method: Compressor, shape: VisualShape, k: int) -> Iterator[Group]:
    if method.per == "image" or (method.per == "frame") != (shape.modality == "video"):
        planes = [p for p in shape.planes if len(p)]
        if len(planes) == 1:
            yield Group(planes[0], shape.n, k, method.yields(k, (planes[0].rows, planes[0].columns)))
        elif not (method.merges and "grid" in method.needs):
            yield Group(None, shape.n, k, method.yields(k, None))
        else:
            shares = apportion(k, [len(p) for p in planes])
            for (plane, corner), share in zip(_rectangles(shape, by_tile=False), shares):
                yield Group(plane, len(plane), share, method.yields(share, (plane.rows, plane.columns)), False, corner)
        return
    for plane, corner in _rectangles(shape, by_tile=method.per == "tile"):
        share = method.budget.count(len(plane), fixed=False)
        yield Group(plane, len(plane), share, method.yields(share, (plane.rows, plane.columns)), False, corner)


def _rectangles(shape: VisualShape, by_tile: bool) -> Iterator[tuple[Plane, tuple[int, int]]]:
    """The planes of a shape, or the parts of them that come from one tile, with their ``corner``."""
    start = 0
    for plane in shape.planes:
        if not by_tile or not plane.row_tiles:
            parts = [(plane, 0, 0)] if len(plane) else []
        else:
            bands = [_runs(plane.row_tiles), _runs(plane.column_tiles)]
            parts = [(_part(plane, rows, columns), rows[0], columns[0]) for rows in bands[0] for columns in bands[1]]
        for part, row, column in parts:
            yield part, (start + row * plane.columns + column, plane.columns)
        start += len(plane)


def _runs(tiles: tuple[int, ...]) -> list[tuple[int, int]]:
    """(first, last + 1) of each run of equal numbers."""
    ends = [i for i in range(1, len(tiles)) if tiles[i] != tiles[i - 1]]
    return list(zip([0, *ends], [*ends, len(tiles)]))


def _part(plane: Plane, rows: tuple[int, int], columns: tuple[int, int]) -> Plane:
    """The rectangle of a plane at rows and columns (first, last + 1)."""
    (r0, r1), (c0, c1) = rows, columns
    top, left, bottom, right = plane.box
    high, wide = (bottom - top) / plane.rows, (right - left) / plane.columns
    box = (top + r0 * high, left + c0 * wide, top + r1 * high, left + c1 * wide)
    tile = plane.tile + plane.row_tiles[r0] + plane.column_tiles[c0]
    return replace(plane, rows=r1 - r0, columns=c1 - c0, tile=tile, row_tiles=(), column_tiles=(), box=box, newline=False)


def position_rule(adapter: Any, method: Compressor) -> str:
    """ "renumber" or "keep": the method's own rule, else the family's. A merged token has no old position to keep."""
    return method.positions or ("renumber" if method.merges else adapter.positions)


def check(adapter: Any, method: Compressor) -> None:
    """Raises where a model cannot run a method at all, before any call is made."""
    if isinstance(method, Composed):
        return _check_in_turn(adapter, method)
    family, name = adapter.name, method.name
    if method.installs is not None and method.installs.family == "J" and not adapter.projects:
        raise UnsupportedModelError(f"{method.installs.name} takes the place of LLaVA's projector, which {family} has not")
    inside = isinstance(method, Reducer)
    if inside:
        adapter.check_inside(method)
    lacking = sorted(set(method.needs) - adapter.gives)
    if lacking and not inside:
        raise UnsupportedModelError(f"{name} needs {', '.join(lacking)}, which {family} does not give")
    if "clip_text" in method.needs and not inside and not isinstance(getattr(method, "clip", None), str):
        raise UnsupportedModelError(f"{name} needs clip_text and names no CLIP: give it a setting clip with a folder or hub id")
    if method.per != "image" and method.per not in adapter.parts:
        known = " and ".join(f"per={part!r}" for part in sorted(adapter.parts)) or "no per="
        raise UnsupportedModelError(f"{name}: per={method.per!r} has no effect on {family}, which knows {known}")
    if method.in_tower and (not adapter.tower_blocks or (usual := adapter.usual()) is None or len(usual.planes) > 1):
        raise UnsupportedModelError(
            f"{name}: at='tower' merges in a LLaVA-1.5's tower that gives the patches of one layer, which {family} has not: leave at= out"
        )
    if isinstance(method, Resizer) and method.per != "image":
        raise UnsupportedModelError(f"{name} makes whole pictures smaller: leave per= out")
    if method.newline == "keep":
        if not adapter.separators:
            raise UnsupportedModelError(f"{name}: newline='keep' has no effect on {family}, which has no newline columns")
        if method.merges and not isinstance(method, Resizer):
            raise UnsupportedModelError(f"{name} merges rows, and a newline column belongs to a row: leave newline= out")
    picked = getattr(method, "order", "raster") == "picked"
    if picked and (position_rule(adapter, method) == "keep" or method.newline == "keep"):
        raise UnsupportedModelError(f"{name}: order='picked' shuffles tokens, which {family} places by position: use positions='renumber'")
    if picked and method.per != "image":
        raise UnsupportedModelError(
            f"{name}: order='picked' is the order of one choice, and per={method.per!r} makes several: give one of them"
        )
    if adapter.deepstack and method.merges and not isinstance(method, Resizer) and not getattr(method, "channelwise", False):
        raise UnsupportedModelError(f"{name} merges by content, and the features that {family} adds in later layers cannot follow")
    usual = adapter.usual()
    if usual is not None and isinstance(method, Reducer):
        method.counts(usual.n, adapter.decoder_layers, fixed=adapter.fixed_count)
    elif usual is not None:
        k = method.budget.count(len(usual.planes[-1]) if method.family == "J" else usual.n, fixed=adapter.fixed_count)
        if method.in_tower and k < usual.n:
            method.in_blocks(usual.n, k, adapter.tower_blocks)


def _fills_rectangles(method: Compressor) -> bool:
    """Whether what a method leaves of an image are rectangles of tokens, each over its own part of the picture."""
    return isinstance(method, (Projector, Resizer)) or (isinstance(method, Merger) and type(method).target is not Merger.target)


def _check_in_turn(adapter: Any, method: Composed) -> None:
    projector, inside = projector_of(method), inside_of(method)
    for stage in method.stages:
        if not isinstance(stage, Reducer):
            check(adapter, stage)
    if inside is not None:
        adapter.check_inside(inside)
        before = method.stages[-2]
        if inside.routes and not _fills_rectangles(before):
            raise UnsupportedModelError(f"{inside.name} pools rectangles of tokens, and {before.name} leaves none: use one of them")
        if inside.newline == "keep" and not (before.newline == "keep" or (before.family == "P" and before.fraction == 1)):
            raise UnsupportedModelError(
                f"{inside.name}: newline='keep' has no effect behind {before.name}, which leaves none: leave it out"
            )
    behind = method.stages[1]
    if projector is not None and not isinstance(behind, Reducer):
        after, lacking = f"the tokens of {projector.name}", sorted({"attention", "keys", "clip_text"} & set(behind.needs))
        if isinstance(behind, Resizer) or behind.in_tower:
            does = "merges in the tower" if behind.in_tower else "makes the picture smaller"
            raise UnsupportedModelError(f"{behind.name} {does}, and {projector.name} gives as many tokens: use one of them")
        if lacking:
            raise UnsupportedModelError(f"{behind.name} needs {', '.join(lacking)} of the tower's tokens, which {after} have not")
        if behind.positions == "keep" or behind.newline == "keep":
            given = "positions" if behind.positions == "keep" else "newline"
            raise UnsupportedModelError(f"{behind.name}: {given}='keep' has no effect on {after}: leave it out")
    usual = adapter.usual()
    if usual is not None:
        plan(adapter, method, adapter.item_of(usual))


def _describe_in_turn(method: Composed, shape: VisualShape | None, adapter: Any) -> str:
    """``tokenflex keeps 144 of 576 tokens per image, then divprune 72 of them (removes 87.5%)``."""
    if shape is None:
        return ", then ".join(describe(stage, None, adapter) for stage in method.stages)
    said, plans = list[str](), _in_turn(adapter, method, adapter.item_of(shape))
    for stage, done in zip(method.stages, plans):
        if isinstance(stage, Reducer):
            said.append(describe(stage, None, adapter) if stage.routes else _in_stages(stage, done))
        else:
            said.append(
                f"{stage.name} {done.kept} of them" if said else f"{stage.name} keeps {done.kept} of {shape.n} tokens per {shape.modality}"
            )
    return f"{', then '.join(said)} (removes {100 * (1 - plans[-1].kept / shape.n):.1f}%)"


def describe(method: Compressor, shape: VisualShape | None, adapter: Any) -> str:
    """``divprune keeps 56 of 576 tokens per image (removes 90.3%)``; without a shape what it keeps of any image."""
    if isinstance(method, Composed):
        return _describe_in_turn(method, shape, adapter)
    if isinstance(method, Reducer) and method.routes:
        return (
            f"{method.name} pools the tokens of each image in front of layer {', '.join(map(str, method.stages(adapter.decoder_layers)))}"
        )
    if shape is None and isinstance(method, Reducer):
        layers = ", ".join(map(str, method.stages(adapter.decoder_layers)))
        return f"{method.name} drops tokens of each image at layer {layers}"
    if shape is None:
        each = {"image": "image or video", "tile": "tile", "frame": "frame"}[method.per]
        if method.tokens is not None:
            return f"{method.name} keeps up to {method.tokens} tokens per {each}"
        fraction = method.budget.fraction or 0.0
        if fraction == 1:
            return f"{method.name} keeps every token"
        return f"{method.name} keeps {100 * fraction:.1f}% of the tokens per {each} (removes {100 * (1 - fraction):.1f}%)"
    planned = plan(adapter, method, adapter.item_of(shape))
    if isinstance(method, Reducer):
        return _in_stages(method, planned)
    k = planned.kept
    return f"{method.name} keeps {k} of {shape.n} tokens per {shape.modality} (removes {100 * (1 - k / shape.n):.1f}%)"


def _in_stages(method: Reducer, planned: Plan) -> str:
    """``fastv keeps 576 tokens up to layer 2, then 115 (layer average 143.8)``."""
    counts = [planned.per_layer[0], *(count for _, count in planned.stages)]
    if min(counts) == counts[0]:
        return f"{method.name} keeps every token"
    spans = [f"{count} up to layer {layer}" for count, (layer, _) in zip(counts, planned.stages)]
    spans[0] = spans[0].replace(" up", " tokens up", 1)
    average = sum(planned.per_layer) / len(planned.per_layer)
    return f"{method.name} keeps {', then '.join([*spans, str(counts[-1])])} (layer average {average:.1f})"
