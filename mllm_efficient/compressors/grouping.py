"""Which tokens of an image are compressed together: all of them, those of each tile, of each frame, or of each grid."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from ..budget import apportion
from ..plans import Group, Plan
from ..tokens import Plane, VisualShape

if TYPE_CHECKING:
    from .base import Compressor

Corner = tuple[int, int]


def groups_of(method: Compressor, shape: VisualShape, k: int) -> tuple[Group, ...]:
    """The groups of a shape, k tokens of which are to stay where ``per`` asks for so many of the whole image."""
    if method.per == "image" or (method.per == "frame") != (shape.modality == "video"):
        return _of_image(method, shape, k)
    out = []
    for plane, corner in rectangles(shape, by_tile=method.per == "tile"):
        share = method.budget.count(len(plane), fixed=False)
        out.append(_of_plane(method, plane, corner, share))
    return tuple(out)


def plan_of(method: Compressor, shape: VisualShape, groups: tuple[Group, ...], clamped: bool = False) -> Plan:
    """The plan of a shape's groups, of which it is known how many tokens each keeps."""
    kept = sum(g.kept for g in groups)
    if kept == shape.n and method.full_is_identity:
        return replace(method.untouched_plan(shape), clamped=clamped)
    keeps_newlines = not method.merges and (method.newline == "keep" or kept == shape.n)
    separators, every = shape.separators if keeps_newlines else 0, method.newline == "keep"
    return Plan(shape, kept, groups, separators=separators, all_marks=every, clamped=clamped)


def _of_image(method: Compressor, shape: VisualShape, k: int) -> tuple[Group, ...]:
    planes = [p for p in shape.planes if len(p)]
    if len(planes) == 1:
        return (Group(planes[0], shape.n, k, method.yields(k, (planes[0].rows, planes[0].columns))),)
    if not (method.merges and "grid" in method.needs):
        return (Group(None, shape.n, k, method.yields(k, None)),)
    shares = apportion(k, [len(p) for p in planes])
    parts = zip(rectangles(shape, by_tile=False), shares)
    return tuple(_of_plane(method, plane, corner, share) for (plane, corner), share in parts)


def _of_plane(method: Compressor, plane: Plane, corner: Corner, share: int) -> Group:
    return Group(plane, len(plane), share, method.yields(share, (plane.rows, plane.columns)), False, corner)


def rectangles(shape: VisualShape, by_tile: bool) -> Iterator[tuple[Plane, Corner]]:
    """The planes of a shape, or the parts of them that come from one tile, with the ``corner`` of a ``Group``."""
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
