"""What methods leave of pictures and videos, as figures, reports and the demo draw it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mllm_efficient.apply import prepare
from mllm_efficient.compressors.base import Compressor
from mllm_efficient.compressors.words import title
from mllm_efficient.errors import MllmEfficientError
from mllm_efficient.loading.models import Loaded
from mllm_efficient.loading.processor import NEEDS_VIDEO, for_pictures_alone
from mllm_efficient.measure.native import asked
from mllm_efficient.media.overlay import Result

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


def run_method(
    loaded: Loaded, method: Compressor, prompt: str, pictures: Sequence[Picture], video: bool = False, keys: Sequence[str] | None = None
) -> list[Result]:  # fmt: skip
    """What a method keeps of each picture of one prompt, or of one video, planes placed on the picture itself.

    A model that takes no videos is given the frames as images of one prompt. keys: of the pictures, for methods that draw. Raises
    ``MllmEfficientError`` for merged tokens of which neither place nor parts are known.
    """
    from mllm_efficient.patches import adapter_for

    processor = getattr(loaded.processor, "video_processor", None) if video else None
    if video and for_pictures_alone(loaded.processor):
        raise MllmEfficientError(NEEDS_VIDEO)
    if processor is not None and method.sets_processor:
        raise MllmEfficientError(f"{method.spec()} sets the processor of pictures, and a video has another: leave --video out")
    way = asked(loaded, method, [pictures])
    if processor is not None:
        inputs = loaded.inputs([loaded.prompt(prompt, 0, 1)], videos=[pictures])
    else:
        inputs = way.loaded.inputs([loaded.prompt(prompt, len(pictures))], pictures)
    if keys is not None:
        inputs["image_keys"] = list(keys)
    reports = way.told(prepare.look(loaded.model, way.method, **inputs)).images
    made_of = _areas(loaded.model, way.method, reports, inputs)
    adapter, by = adapter_for(loaded.model), processor or way.loaded.processor.image_processor
    if video:
        return [_result(method, reports, made_of, lambda planes: adapter.place(planes, pictures[0].size, by), video)]
    return [
        _result(method, [report], [areas], lambda planes, p=p: adapter.place(planes, p.size, by))
        for report, areas, p in zip(reports, made_of, pictures)
    ]


def _areas(model: Any, method: Compressor, reports: Sequence[Any], inputs: dict[str, Any]) -> list[list[int] | None]:
    """Of each image what each of its tokens is part of, where merged tokens are no rectangles of the picture; None elsewhere."""
    from mllm_efficient.apply.membership import areas

    found: list[list[int] | None] = [None if r.groups is None or r.indices is None else r.groups.tolist() for r in reports]
    if all(r.kept_planes is None or all(p.placed for p in r.kept_planes) for r in reports):
        return found
    made = areas(model, method, **inputs)
    return [of if of is not None or a is None or len(a) != r.full else a.tolist() for of, a, r in zip(found, made, reports)]


def _result(
    method: Compressor, reports: Sequence[Any], made_of: Sequence[Sequence[int] | None], place: Any, video: bool = False
) -> Result:  # fmt: skip
    """What is drawn of a picture, or of a video whose frames may be reported one by one. place: puts planes on the picture.

    made_of: of each report what ``Result.areas`` is. Raises ``MllmEfficientError`` for merged tokens of which neither place nor parts are
    known.
    """
    planes: list[Any] = []
    kept_planes: list[Any] = []
    indices: list[int] = []
    outlined: list[int] | None = [] if all(found is not None for found in made_of) else None
    for i, (report, areas) in enumerate(zip(reports, made_of)):
        if outlined is not None and areas is not None:
            outlined += [a if a < 0 else a + max(outlined, default=-1) + 1 for a in areas]
        start, left = sum(map(len, kept_planes)), report.indices if report.kept_planes is None else report.of_merged
        after = report.planes if report.kept_planes is None else report.kept_planes
        if outlined is not None:
            after = report.planes
        if not all(p.placed for p in after):
            raise MllmEfficientError("it merges tokens to ones without a place on the picture, and not of tokens that can be told")
        drawn = report.planes if len(after) == len(report.planes) else after  # another projector's tiles, which no map puts together
        for found, into in ((drawn, planes), (after, kept_planes)):
            into += [replace(p, frame=i) if video and p.frame is None else p for p in place(found)]
        indices += [start + j for j in (range(sum(map(len, after))) if left is None else left.tolist())]
    full, kept, merged = sum(r.full for r in reports), sum(r.kept for r in reports), any(r.indices is None for r in reports)
    all_of_it = merged and all(r.of_merged is None for r in reports if r.indices is None)
    layers = [sum(each) for each in zip(*(r.per_layer for r in reports))] if all(r.per_layer for r in reports) else []
    separators = sum(r.separators_full for r in reports), sum(r.separators_kept for r in reports)
    if outlined is not None:
        return Result(title(method), full, kept, planes, None if merged else indices, None, layers, separators, outlined)
    return Result(title(method), full, kept, planes, None if all_of_it else indices, kept_planes if merged else None, layers, separators)
