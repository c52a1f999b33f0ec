"""The vision side of a call: what a method needs of the tower and projector, run once and kept for other methods with the same needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..compressors.base import Compressor
from ..compressors.composed import before_of, inside_of, projector_of
from ..compressors.fit import OF_TOWER
from ..compressors.none import NoCompression
from ..errors import UnsupportedModelError
from ..registry import runnable
from ..report import CacheUse
from ..trained.folder import held, module_of, require_held
from .active import active_on
from .conversation import items_of
from .plan import plan
from .projecting import project
from .prompt import require
from .vision_cache import Part, VisionCache, key_of, state_of, together, usable

if TYPE_CHECKING:
    from .locate import PlacedImage

PIXELS = ("pixel_values", "pixel_values_videos")  # arguments by which a call brings images and videos
IN_TOWER = "in the tower"  # begins the key of an encoding in whose tower tokens became fewer


@dataclass(frozen=True)
class Encoded:
    """The vision side of a call, for ``prepare(..., encoded=...)``: what the model made of every item of the call.

    made_for: of each item the extra tensors it carries and how else it was seen (``encoding_key``). use: of the vision cache.
    """

    items: list[Any]
    encodings: list[Any]
    made_for: list[tuple[frozenset[str], Any]]
    use: CacheUse | None = None


def encode(model: Any, compressor: Any, **inputs: Any) -> Encoded:
    """Runs the vision side as ``compressor`` needs it, for ``prepare(..., encoded=...)``.

    Args:
        model: a supported transformers model.
        compressor: a method, specification string, dict or YAML file. Methods with the same needs give the same result, so
            a comparison encodes each image once.
        inputs: the processor's output, ``input_ids`` included.
    """
    from ..patches import adapter_for

    adapter, method = adapter_for(model), runnable(compressor)
    return encode_items(adapter, method, items_of(adapter, inputs))


def encode_items(adapter: Any, method: Compressor, items: list[Any]) -> Encoded:
    """``encode`` of items that the adapter found. The model runs once on all that are alike, or where ``wrap`` has a cache, on each that
    is not kept there."""
    keys = [encoding_key(adapter, method, i) for i in items]
    require_installed(adapter, method)
    cache = caches(adapter)
    if cache is not None and items:
        return _through(cache, adapter, method, items, keys)
    return Encoded(items, _run(adapter, method, items, keys), keys)


def caches(adapter: Any) -> VisionCache | None:
    """The cache that this call may use, if any."""
    active = active_on(adapter.model)
    cache = None if active is None else active.cache_here(adapter.model)
    return cache if cache is not None and usable(adapter) else None


def _run(adapter: Any, method: Compressor, items: list[Any], keys: Sequence[tuple[frozenset[str], Any]]) -> list[Any]:
    """The encodings of items, of which ``keys`` say how they are seen."""
    needs = keys[0][0] if keys else frozenset()
    projector = projector_of(method)
    if items and projector is not None:
        return project(adapter, projector, items)
    inside = before_of(method)
    if inside is not None and any(other[0] == IN_TOWER for _, other in keys):
        return list(adapter.reduce_in_tower(inside, items, [plan(adapter, inside, item) for item in items]))
    return list(adapter.encode(items, needs, [other[0] for _, other in keys]))


def _through(cache: VisionCache, adapter: Any, method: Compressor, items: list[Any], keys: list[tuple[frozenset[str], Any]]) -> Encoded:
    """``_run`` of what the cache does not hold, one after the other.

    Frames of a video are kept apart where the tower sees them apart, and nothing else is asked of it than their tokens.
    """
    projector, inside = projector_of(method), before_of(method)
    state = state_of(adapter, None if projector is None else module_of(adapter, projector))
    out, hits, runs = list[Any](), 0, 0
    for item, key in zip(items, keys):
        in_tower = projector is None and key[1][0] == IN_TOWER
        whole = projector is not None or in_tower or key[0]
        found = [item] if whole else adapter.frames_apart(item)
        how = sorted(key[0]), key[1], inside.to_dict() if in_tower and inside is not None else None
        parts = [Part(part, key_of(part, how, state)) for part in found]
        made, use = cache.encoded(parts, lambda part, key=key: _run(adapter, method, [part], [key])[0])  # type: ignore[misc]
        out.append(made[0] if len(made) == 1 else together(made, adapter.shape_at(item, key[1][0]) if key[1][0] else item.shape))
        hits, runs = hits + use.hits, runs + use.runs
    return Encoded(items, out, keys, CacheUse(hits, runs, cache.bytes, cache.limit))


def encoding_key(adapter: Any, method: Compressor, item: Any) -> tuple[frozenset[str], Any]:
    """What the vision side does for a method on an item: (extra tensors, smaller grid or other projector). Equal keys, equal output."""
    before, projector = before_of(method), projector_of(method)
    seen = plan(adapter, before or NoCompression(), item)
    other: Any = (seen.smaller, held(adapter))
    if projector is not None:
        other = projector.name, projector.weights, seen.side, projector.together(item)
    if seen.rounds or seen.stay:
        assert before is not None
        other = (IN_TOWER, before.name, seen.rounds or seen.stay, getattr(before, "by_content", False), held(adapter))
    of_tower = frozenset() if before is None else frozenset(before.needs) & OF_TOWER
    return of_tower, other


def require_encoding(adapter: Any, method: Compressor, encoded: Encoded, image: PlacedImage) -> None:
    """Raises ``CountMismatchError`` where an image was encoded for a method with other needs than this one before the decoder."""
    needs, seen = encoding_key(adapter, method, image.item)
    needs_then, seen_then = encoded.made_for[image.index]
    require(needs <= needs_then, f"{method.name} needs {', '.join(sorted(needs))}, which this encoding does not hold")
    require(seen == seen_then, f"this encoding saw images of another size or projector than {method.name} asks for")


def require_installed(adapter: Any, method: Compressor) -> None:
    """A baseline on a trained method's weights is nothing but another name where the model does not hold them.

    And nothing of an in-decoder method happens in a decoder without its hooks.
    """
    active = active_on(adapter.model)
    if active is not None:
        active.of_call(adapter.model)  # raises where the weights are those of another thread's block
    inside, part = inside_of(method), method.installs
    if inside is not None and not adapter.reached_inside:
        raise UnsupportedModelError(f"{inside.name} works inside the decoder, which prepare does not reach: use wrap or compressed")
    require_held(adapter, method)
    if part is not None and projector_of(method) is None and held(adapter) is None:
        raise UnsupportedModelError(f"{method.spec()} needs the weights in the model: use wrap or compressed")


def has_pixels(inputs: dict[str, Any]) -> bool:
    """Whether a call brings images or videos."""
    return any(inputs.get(name) is not None for name in PIXELS)


def keeps_all(adapter: Any, method: Any, inputs: dict[str, Any]) -> bool:
    """Whether a method leaves the images of a call as they are, so that the call needs no change."""
    return all(plan(adapter, runnable(method), item).untouched for item in items_of(adapter, inputs))
