"""Runs a method on what the model made of each image, as its plan says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from ..compressors.base import Compressor
from ..compressors.math.finite import Watch, require_finite
from ..compressors.merging import averaged
from ..errors import CountMismatchError
from ..plans import room_for
from ..tokens import CompressedTokens, Mark, Plane, VisualShape, VisualTokens, grids_of
from .plan import Group, Plan
from .prompt import require
from .stopwatch import Stopwatch


@dataclass(frozen=True)
class Context:
    """What a method may ask for beyond the tower's output. clip: a ``patches.tower.clip.Clip``.

    heads: gives the (heads, N) of ``VisualTokens`` for features (N, D).
    """

    generator: Generator
    text: Tensor | None = None
    clip_text: Tensor | None = None
    clip: Any = None
    heads: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class CompressedImage:
    """One item, compressed.

    features: (kept tokens + kept separators, D), deep: the same for each deepstack layer. keep: (length,) bool, the
    placeholders that stay. indices: (K,) of the kept tokens on the CPU, None where merged. kept_planes: of merged ones;
    of_merged: (K,) those of them that stay on the CPU, None for all. groups: (N,) on the CPU, the place in ``indices`` of the kept
    token that each is part of, None where none was merged into another. all_marks: whether the text between placeholders stays, wherever
    it belongs.
    """

    features: Tensor
    deep: tuple[Tensor, ...]
    keep: Tensor
    indices: Tensor | None
    kept_planes: tuple[Plane, ...] | None = None
    of_merged: Tensor | None = None
    groups: Tensor | None = None
    all_marks: bool = False

    def has_left(self) -> Callable[[Mark], bool]:
        """What says of a mark of the image whether it stays in the prompt."""
        slots = self.keep.nonzero()[:, 0].tolist()
        return lambda mark: self.all_marks or mark.left(slots)


def compress_images(
    method: Compressor, plans: Sequence[Plan], encodings: Sequence[Any], contexts: Sequence[Context]
) -> tuple[list[CompressedImage], float, list[Plan]]:
    """Every item compressed as on its own, the seconds that took (``Stopwatch``), for which the CPU waits once, and the plans as they
    were carried out, which differ where a plan was open.

    Raises ``NotFiniteError`` where NaN or infinity is among what a method works on; what it leaves alone may hold them.
    """
    clock = Stopwatch(encodings[0].features.device if encodings else None)
    with Watch() as watch:
        for p, e in zip(plans, encodings):
            if not p.untouched:
                require_finite(e.features, method.name, "visual tokens")
                for layer in e.deep:
                    require_finite(layer, method.name, "visual tokens of a later layer")
        parts = _compress(method, plans, encodings, contexts)
        for _, done, _ in (part for of_item in parts for part in of_item):
            if done.indices is None:
                require_finite(done.features, method.name, "merged tokens")
    clock.stop()
    watch.read()
    parts = _indices_on_cpu(parts)
    seconds = clock.seconds()
    plans = [_settled(method, p, part) if p.open else p for p, part in zip(plans, parts)]
    images = [_assemble(method, p, e, part) for p, e, part in zip(plans, encodings, parts)]
    return [replace(image, all_marks=p.all_marks) for p, image in zip(plans, images)], seconds, plans


def _settled(method: Compressor, p: Plan, parts: list[Part]) -> Plan:
    then: Plan = method.settled(p, [len(done) for _, done, _ in parts])  # type: ignore[attr-defined]
    return then


def rows_of(method: Compressor, p: Plan, encoding: Any, context: Context) -> Tensor:
    """(kept tokens, D) of one item without newline columns, on its device throughout: the CPU waits for nothing."""
    return layers_of(method, p, encoding, context)[0]


def layers_of(method: Compressor, p: Plan, encoding: Any, context: Context, beside: Sequence[Tensor] = ()) -> list[Tensor]:
    """``rows_of`` the features, then of each deep layer, then the rows of ``beside``.

    beside: (N, ...) each, what is true of a token wherever it is kept, such as its place; only of methods that select.
    """
    if p.untouched:
        return [encoding.features, *encoding.deep, *beside]
    ((*parts,),) = _compress(method, [p], [encoding], [context])
    layers = [torch.cat(of_layer) for of_layer in zip(*([done.features, *deep] for _, done, deep in parts))]
    places = []
    for group, done, _ in parts:
        if done.indices is not None:
            own = group.indices
            places.append(done.indices if own is None else own.to(done.indices.device)[done.indices])
    if not places:
        require(not beside, f"{method.name} merges tokens, which then have no place of their own")
        return layers
    stay = torch.cat(places)
    if len(parts) > 1:
        stay, order = stay.sort()
        layers = [layer[order] for layer in layers]
    return [*layers, *(rows[stay] for rows in beside)]


Part = tuple[Group, CompressedTokens, tuple[Tensor, ...]]


def _compress(method: Compressor, plans: Sequence[Plan], encodings: Sequence[Any], contexts: Sequence[Context]) -> list[list[Part]]:
    """The method's output for each group of each item, and what becomes of its deep features."""
    jobs = [jobs_of(p, e, c) for p, e, c in zip(plans, encodings, contexts)]
    flat = [job for of_item in jobs for job in of_item]
    together = method.compress_all([part for _, part, _ in flat], [group.k for group, _, _ in flat])
    require(len(together) == len(flat), f"{method.name} gave {len(together)} results for {len(flat)} groups of tokens")
    done = iter(together)
    return [[_part(method, *job, next(done), p.open) for job in of_item] for p, of_item in zip(plans, jobs)]


Job = tuple[Group, VisualTokens, list[Tensor]]


def jobs_of(p: Plan, encoding: Any, context: Context) -> list[Job]:
    """What the method gets of an item: for each group its tokens, and their features in each deepstack layer."""
    if not p.groups:
        return []
    tokens = _tokens(p, encoding, context)
    deep = [layer if not p.seen.separators else layer[p.seen.token_slots.to(layer.device)] for layer in encoding.deep]
    return [(group, _of_group(tokens, group), [_pick(layer, group) for layer in deep]) for group in p.groups]


def _part(method: Compressor, group: Group, part: VisualTokens, layers: list[Tensor], done: CompressedTokens, counted: bool) -> Part:
    """counted: whether the method says how many tokens are left."""
    require(counted or len(done) == group.kept, f"{method.name} gave {len(done)} tokens where {group.kept} were asked")
    if done.groups is not None and done.weights is not None:
        groups, weights, k = done.groups, done.weights, len(done)
        return group, done, tuple(averaged(layer, groups.to(layer.device), weights.to(layer.device), k) for layer in layers)
    if done.indices is not None:
        return group, done, tuple(layer[done.indices.to(layer.device)] for layer in layers)
    merged = (method.merge(replace(part, features=layer), group.k).features for layer in layers)  # type: ignore[attr-defined]
    return group, done, tuple(merged)


def _indices_on_cpu(items: list[list[Part]]) -> list[list[Part]]:
    """The same with every index, place and group on the CPU: one copy for the whole batch, because each makes the CPU wait."""
    all_parts = [done for parts in items for _, done, _ in parts]
    found = [t.detach() for done in all_parts for t in (_where(done), done.groups) if t is not None]
    if not found:
        return items
    joined = torch.cat([t.to(found[0].device, torch.long) for t in found]).cpu()
    on_cpu = iter(joined.split([len(t) for t in found]))

    def moved(done: CompressedTokens) -> CompressedTokens:
        where, groups = (None if t is None else next(on_cpu) for t in (_where(done), done.groups))
        if done.indices is None:
            return replace(done, places=where, groups=groups)
        return replace(done, indices=where, groups=groups)

    return [[(group, moved(done), deep) for group, done, deep in parts] for parts in items]


def _where(done: CompressedTokens) -> Tensor | None:
    """(K,) which tokens of its group the kept ones are, or in whose places merged ones stand."""
    return done.places if done.indices is None else done.indices


def _tokens(p: Plan, encoding: Any, context: Context) -> VisualTokens:
    features, shape = encoding.features, p.seen
    if shape.separators:
        features = features[shape.token_slots.to(features.device)]
    extra = {name: getattr(encoding, name) for name in ("attention", "early_attention", "keys")}
    extra |= {"text": context.text, "generator": context.generator, "grids": grids_of(shape.planes)}
    if context.clip is not None:
        extra |= {"clip_text": context.clip_text, "clip_patches": context.clip.patches(encoding.tower)}
    if context.heads is not None:
        extra["heads"] = context.heads(features)
    return VisualTokens(features, shape.grid, shape.tile(), shape.frame(), **extra)


def _of_group(v: VisualTokens, group: Group) -> VisualTokens:
    if group.indices is None:
        return v
    per_token = {name: getattr(v, name) for name in ("features", "tile", "frame", "attention", "early_attention", "keys", "clip_patches")}
    picked: dict[str, Any] = {name: _pick(value, group) for name, value in per_token.items() if value is not None}
    heads = None if v.heads is None or group.indices is None else v.heads[:, group.indices.to(v.heads.device)]
    return replace(v, **picked, grid=group.grid, grids=None if group.grid is None else (group.grid,), heads=heads)


def _pick(values: Tensor, group: Group) -> Tensor:
    return values if group.indices is None else values[group.indices.to(values.device)]


def _assemble(method: Compressor, p: Plan, encoding: Any, parts: list[Part]) -> CompressedImage:
    """Kept tokens, with the separators that stay, in the order of the placeholders they take. Indices are on the CPU."""
    shape = p.seen
    if p.untouched:
        return CompressedImage(encoding.features, encoding.deep, torch.ones(shape.length, dtype=torch.bool), torch.arange(shape.n))
    if not p.groups:
        return _smaller(p, encoding)
    taken, indices = _placeholders(method, shape, parts)
    keep = torch.zeros(shape.length, dtype=torch.bool)
    keep[taken] = True
    rows = [torch.cat(layers) if len(layers) > 1 else layers[0] for layers in zip(*((done.features, *deep) for _, done, deep in parts))]
    if p.separators:
        stay = torch.ones(shape.length, dtype=torch.bool)
        stay[shape.token_slots] = False
        stay = stay.nonzero()[:, 0]
        keep[stay], taken = True, torch.cat([taken, stay])
        rows = [torch.cat([r, full[stay.to(full.device)]]) for r, full in zip(rows, (encoding.features, *encoding.deep))]
    if all(_where(done) is not None for _, done, _ in parts) and (len(parts) > 1 or p.separators):  # others stay group after group
        order = taken.argsort()
        rows = [r[order.to(r.device)] for r in rows]
    merged = _merged_planes(parts) if indices is None else None
    done = CompressedImage(rows[0], tuple(rows[1:]), keep, indices, merged, groups=_groups(shape, parts, indices))
    if p.stay:
        return _of_those_that_stay(p, done)
    return done if p.after is None else _after_projector(p, done)


def _placeholders(method: Compressor, shape: VisualShape, parts: list[Part]) -> tuple[Tensor, Tensor | None]:
    """The placeholders that the tokens of all groups take, group after group, and the indices of those that were kept.

    Merged tokens without places take the first placeholders of their group; where rows are marked, those of the first rows and columns,
    as a smaller image has them. Raises ``CountMismatchError`` where a token was selected twice.
    """
    slots, indices = list[Tensor](), list[Tensor]()
    for group, done, _ in parts:
        own = torch.arange(shape.n) if group.indices is None else group.indices
        where = _where(done)
        if where is None:
            slots.append(shape.token_slots[own[room_for(done.grid, group.kept, group.grid if shape.marks else None)]])
            continue
        if len(where.unique()) != len(where):
            raise CountMismatchError(f"{method.name} selected the same visual token twice")
        if done.indices is not None:
            indices.append(own[done.indices])
        slots.append(shape.token_slots[own[where].sort().values])
    if not indices:
        return torch.cat(slots), None
    kept = torch.cat(indices)
    return torch.cat(slots), kept.sort().values if len(parts) > 1 and method.order == "raster" else kept


def _groups(shape: VisualShape, parts: list[Part], indices: Tensor | None) -> Tensor | None:
    """(N,) the place in ``indices`` of the token of the image that each is part of; None where no part says so."""
    if indices is None or all(done.groups is None for _, done, _ in parts):
        return None
    joined = torch.arange(shape.n)
    for group, done, _ in parts:
        own = torch.arange(shape.n) if group.indices is None else group.indices
        if done.groups is None or done.indices is None:
            raise CountMismatchError("a part of an image was merged, and another was not")
        joined[own] = own[done.indices[done.groups]]
    return places_in(joined, indices)


def places_in(tokens: Tensor, indices: Tensor) -> Tensor:
    """The place in ``indices`` of each of ``tokens``, -1 for one that is not among them."""
    place = torch.full((1 + int(torch.cat([tokens, indices]).max()),), -1)
    place[indices] = torch.arange(len(indices))
    return place[tokens]


def _after_projector(p: Plan, s: CompressedImage) -> CompressedImage:
    """What is left of a projector's tokens, as of the item's own, which that merged."""
    keep = _room(p)
    keep[keep.clone()] = s.keep
    merged = p.seen.planes if s.kept_planes is None else s.kept_planes
    return replace(s, keep=keep, indices=None, kept_planes=merged, of_merged=s.indices)


def _of_those_that_stay(p: Plan, s: CompressedImage) -> CompressedImage:
    """What was chosen among the tokens that the tower ran on, as tokens of the whole item."""
    assert s.indices is not None
    stay, keep = torch.tensor(p.stay), torch.zeros(p.shape.length, dtype=torch.bool)
    keep[p.shape.token_slots[stay[s.keep]]] = True
    return replace(s, keep=keep, indices=stay[s.indices])


def _merged_planes(parts: list[Part]) -> tuple[Plane, ...]:
    """The planes of merged tokens, each over what its tokens were over; without a grid, one row of them, of all groups where these mix."""
    if len(parts) > 1 and all(done.places is not None for _, done, _ in parts):
        return (Plane(1, sum(len(done) for _, done, _ in parts), placed=False),)
    out = []
    for group, done, _ in parts:
        over = group.plane or Plane(1, 1)
        rows, columns = done.grid or (1, len(done))
        out.append(replace(over, rows=rows, columns=columns, row_tiles=(), column_tiles=(), newline=False, placed=done.grid is not None))
    return tuple(out)


def _smaller(p: Plan, encoding: Any) -> CompressedImage:
    """A smaller image, or one after another projector, or what a method in the tower left."""
    after, rows = p.seen, [encoding.features, *encoding.deep]
    if encoding.kept is not None:
        indices, keep = encoding.kept.cpu(), torch.zeros(p.shape.length, dtype=torch.bool)
        keep[p.shape.token_slots[indices]] = True
        return CompressedImage(rows[0], tuple(rows[1:]), keep, indices)
    if after.separators and not p.separators:
        rows = [r[after.token_slots.to(r.device)] for r in rows]
    return CompressedImage(rows[0], tuple(rows[1:]), _room(p), None, after.planes)


def _room(p: Plan) -> Tensor:
    """(length,) bool, the placeholders that a smaller image's tokens take: of each plane the first, as far as there are enough."""
    after, shape = p.seen, p.shape
    keep = torch.zeros(shape.length, dtype=torch.bool)
    if p.separators:  # on such models it does not matter which placeholders stay
        require(after.length <= shape.length, "the smaller image has more newline columns than the full one has room for")
        keep[: after.length] = True
        return keep
    start = 0
    for full, plane in zip(shape.planes, after.planes):
        within = (full.rows, full.columns) if shape.marks else None
        room = room_for((plane.rows, plane.columns), min(len(plane), len(full)), within)
        keep[shape.token_slots[start : start + len(full)][room]] = True
        start += len(full)
    # Rounding can give a plane of the smaller image more tokens than the full one has there.
    rest = shape.token_slots[~keep[shape.token_slots]]
    keep[rest[: after.n - int(keep.sum())]] = True
    return keep
