"""What a method will do to an image or video, known before any pixel is looked at: which tokens together, how many stay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .budget import apportion
from .compressors.base import Compressor, Projector, Resizer
from .compressors.reducer import Reducer, spread_out
from .errors import BadBudgetError, UnsupportedModelError
from .lazy import torch
from .tokens import Plane, VisualShape, grids_of

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

    groups: of a method that works on tokens. smaller: the grid a smaller picture is given; side: tokens along a side of
    each tile under another projector; after: the shape that either gives. kept: tokens that are left. separators: newline
    columns and separators that are left. untouched: every token and separator stays as it is. clamped: more tokens were
    asked than there are. stages: of an in-decoder method (layer, tokens from there on); per_layer: its tokens at every layer, of
    which kept is the mean, rounded.
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


def plan(adapter: Any, method: Compressor, item: Any) -> Plan:
    """The plan of a method for an item of the adapter. Raises ``BadBudgetError`` where the budget cannot be met."""
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
    depth = adapter.decoder_layers
    layers, counts = method.stages(depth), method.counts(shape.n, depth, fixed=adapter.fixed_count, grids=grids_of(shape.planes))
    per_layer = spread_out(shape.n, layers, counts, depth)
    untouched = min(counts) == shape.n and not method.merges
    separators = shape.separators if untouched or method.newline == "keep" else 0
    return Plan(
        shape, round(sum(per_layer) / depth), separators=separators, untouched=untouched,
        clamped=method.tokens is not None and method.tokens > shape.n, stages=tuple(zip(layers, counts)), per_layer=per_layer,
    )  # fmt: skip


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
    family, name = adapter.name, method.name
    if method.installs is not None and method.installs.family == "J" and not adapter.projects:
        raise UnsupportedModelError(f"{method.installs.name} takes the place of LLaVA's projector, which {family} has not")
    inside = isinstance(method, Reducer)
    if inside:
        adapter.check_inside(method)
    lacking = sorted(set(method.needs) - adapter.gives)
    if lacking and not inside:
        raise UnsupportedModelError(f"{name} needs {', '.join(lacking)}, which {family} does not give")
    if method.per != "image" and method.per not in adapter.parts:
        known = " and ".join(f"per={part!r}" for part in sorted(adapter.parts)) or "no per="
        raise UnsupportedModelError(f"{name}: per={method.per!r} has no effect on {family}, which knows {known}")
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
        method.budget.count(len(usual.planes[-1]) if method.family == "J" else usual.n, fixed=adapter.fixed_count)


def describe(method: Compressor, shape: VisualShape | None, adapter: Any) -> str:
    """``divprune keeps 56 of 576 tokens per image (removes 90.3%)``; without a shape what it keeps of any image."""
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
    from .patches.base import Item

    planned = plan(adapter, method, Item({}, shape))
    if isinstance(method, Reducer):
        return _in_stages(method, planned)
    k = planned.kept
    return f"{method.name} keeps {k} of {shape.n} tokens per {shape.modality} (removes {100 * (1 - k / shape.n):.1f}%)"


def _in_stages(method: Reducer, planned: Plan) -> str:
    """``fastv keeps 576 tokens up to layer 2, then 115 (layer average 143.8)``."""
    if planned.untouched:
        return f"{method.name} keeps every token"
    counts = [planned.shape.n, *(count for _, count in planned.stages)]
    spans = [f"{count} up to layer {layer}" for count, (layer, _) in zip(counts, planned.stages)]
    spans[0] = spans[0].replace(" up", " tokens up", 1)
    average = sum(planned.per_layer) / len(planned.per_layer)
    return f"{method.name} keeps {', then '.join([*spans, str(counts[-1])])} (layer average {average:.1f})"
