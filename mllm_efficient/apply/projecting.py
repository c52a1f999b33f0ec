"""What a trained projector makes of images: at once, or for one that asks for the text of the prompt, when that is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..compressors.base import Compressor
from ..compressors.composed import projector_of
from ..compressors.projector import Projector, as_one
from ..trained.folder import module_of
from .plan import plan


def asks(adapter: Any, method: Compressor) -> bool:
    """Whether the tokens of a method's projector depend on the text of their row."""
    projector = projector_of(method)
    return projector is not None and bool(getattr(module_of(adapter, projector), "asks", False))


def project(adapter: Any, projector: Projector, items: Sequence[Any]) -> list[Any]:
    """Encodings of items; of a projector that asks, which no image can answer, ``features`` are (views, N, D), for ``answered``."""
    module, out = module_of(adapter, projector), dict[int, Any]()
    for modality in ("image", "video"):
        own = [i for i, item in enumerate(items) if item.shape.modality == modality]
        if own:
            out |= zip(own, through(adapter, projector, [items[i] for i in own], module))
    return [out[i] for i in range(len(items))]


def through(adapter: Any, projector: Projector, items: list[Any], module: Any) -> list[Any]:
    """Encodings of items of one modality, whose views all go through ``module`` together."""
    features, views, side = adapter.before_projector(items), [adapter.views_of(item) for item in items], side_of(adapter, projector, items)
    shapes = [as_one(item.shape, side) if projector.together(item) else adapter.projected(item, side) for item in items]
    asking = getattr(module, "asks", False)
    parts = features.split(views) if asking else _tokens(adapter, projector, items, module, features, views)
    return [adapter.encoding(part, shape) for part, shape in zip(parts, shapes)]


def answered(adapter: Any, method: Compressor, items: Sequence[Any], taken: Sequence[Any], text: Sequence[Tensor | None]) -> list[Any]:
    """What a projector that asks makes of the encodings ``taken``. text: (T, D) embeddings of each item's row."""
    projector, out = projector_of(method), list(taken)
    assert projector is not None
    for modality in ("image", "video"):
        own = [i for i, item in enumerate(items) if item.shape.modality == modality]
        views = [len(taken[i].features) for i in own]
        if own:
            features = torch.cat([taken[i].features for i in own])
            each = [text[i] for i, n in zip(own, views) for _ in range(n)]
            some, module = [items[i] for i in own], module_of(adapter, projector)
            for i, part in zip(own, _tokens(adapter, projector, some, module, features, views, text=each)):
                out[i] = replace(out[i], features=part)
    return out


def side_of(adapter: Any, projector: Projector, items: Sequence[Any]) -> int:
    """Tokens along a side of what each view of these becomes."""
    (side,) = {plan(adapter, projector, item).side for item in items}
    assert side is not None
    return side


def _tokens(
    adapter: Any, projector: Projector, items: Sequence[Any], module: Any, features: Tensor, views: Sequence[int], **call: Any
) -> list[Tensor]:  # fmt: skip
    """(tokens, D) of each item, from the features (views, N, D) of all."""
    together = [projector.together(item) for item in items]
    if any(together):
        call["sets"] = [n for whole, one in zip(views, together) for n in ([whole] if one else [1] * whole)]
    first = items[0]
    grid = adapter.unit(first) if first.shape.modality == "image" else adapter.taken(first)
    tokens = module(features, side=side_of(adapter, projector, items), grid=grid, **call)
    return [part.flatten(0, 1) for part in tokens.split([1 if one else n for n, one in zip(views, together)])]
