"""``mllm-efficient show``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import MllmEfficientError
from . import options

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

    from ..compressors.base import Compressor
    from ..loading.models import Loaded
    from ..media.overlay import Result, Subject


@options.of_model
def show(
    *,
    settings: Any,
    output: Annotated[Path, typer.Option("--output", help="The PNG to write.")],
    method: Annotated[list[str], typer.Option("--method", help="Specification or YAML file. Repeatable.")],
    image: Annotated[
        list[str] | None, typer.Option("--image", help="Image file, file: or data: URI. Repeatable: all in one prompt, each drawn.")
    ] = None,
    video: Annotated[Path | None, typer.Option("--video", help="Folder of frames, or an animated GIF, WebP or APNG.")] = None,
    frames: Annotated[int, typer.Option("--frames", min=1, help="How many frames of the video, evenly spread.")] = 8,
    prompt: Annotated[str, typer.Option("--prompt", help="The question, for methods that look at it.")] = "Describe this.",
    image_range: options.ImageRange = "full",
    dim: Annotated[str, typer.Option("--dim", help="How dropped tokens look: light or dark.")] = "light",
    caption: Annotated[str | None, typer.Option("--caption", help="Small print below, instead of the legend; '' for none.")] = None,
    json: options.Json = False,
    imports: options.Import = None,
) -> None:
    """Draws which tokens of a picture or video each method keeps, as one figure for papers and slides."""
    from ..media import figure as figures
    from ..media import overlay as viz
    from ..media.images import load_image, name_of
    from ..media.video import load_frames

    if not image and video is None:
        raise MllmEfficientError("nothing to show: give --image FILE or --video FOLDER")
    if dim not in viz.DIMS:
        raise MllmEfficientError(f"--dim {dim} is not one of {', '.join(viz.DIMS)}")
    figures.check_target(output)
    methods = list(dict.fromkeys(options.one_method(m) for m in method))
    pictures = [(Path(name_of(path)), load_image(path, image_range)) for path in image or ()]
    clip = load_frames(video, frames, image_range) if video is not None else ([], [])

    from ..embedded import is_embedded
    from ..loading.models import environment, load
    from ..report import by_layer

    loaded = load(settings)
    options.announce(loaded, methods)
    subjects, rows = [], []
    shown = [_run(loaded, m, prompt, [picture for _, picture in pictures]) for m in methods] if pictures else []
    for i, (path, picture) in enumerate(pictures):
        results = [of_pictures[i] for of_pictures in shown]
        name = path.name if len(path.name) <= 32 else f"{path.name[:16]}…{path.name[-15:]}"
        note = name if len(pictures) > 1 else f"{picture.width} × {picture.height} pixels"
        subjects.append(viz.Subject([picture], results, note))
        rows += [_row(m, path, "image", result, output) for m, result in zip(methods, results)]
    if video is not None:
        results = [_run(loaded, m, prompt, clip[0], video=True)[0] for m in methods]
        subjects.append(_film(clip[0], clip[1], results))
        rows += [_row(m, video, "video", result, output) for m, result in zip(methods, results)]
    model = settings.model
    name = "Embedded model" if is_embedded(model) else Path(model).resolve().name if Path(model).is_dir() else model
    figures.save(figures.figure(subjects, dim=dim, caption=f"{name}: {legend(subjects)}." if caption is None else caption), output)
    if json:
        meta = {**environment(loaded), "methods": [m.to_dict() for m in methods], "prompt": prompt, "frames": clip[1] or None}
        options.print_json(rows, meta)
        return
    for row in rows:
        options.say(
            f"{row['image']}: {row['method']} keeps {row['kept']} of {row['full']} tokens ({row['share']:.1%})"
            + (f" and {row['separators_kept']} of {row['separators_full']} separators" if row["separators_full"] else "")
            + (f": {by_layer(row['tokens_per_layer'])}" if row["tokens_per_layer"] else "")
        )
    print(output)


def title(method: Compressor) -> str:
    """``DivPrune (metric=l2)``: the method's name and its settings beside the budget."""
    from ..compressors.base import BUDGET_FIELDS

    if len(method.parts) > 1:
        return ", then ".join(title(stage) for stage in method.parts)
    name = "No compression" if method.name == "none" else type(method).__name__
    settings = ", ".join(f"{k}={v}" for k, v in method.to_dict().items() if k != "method" and k not in BUDGET_FIELDS)
    return f"{name} ({settings})" if settings else name


def legend(subjects: Sequence[Subject]) -> str:
    """What the figure shows, in words: only what occurs in it."""
    results = [r for s in subjects for r in s.results]
    parts = ["kept tokens in colour, dropped ones faded"] if any(r.indices is not None for r in results) else []
    parts += ["merged tokens in the mean colour of their area"] if any(r.kept_planes is not None for r in results) else []
    seen = [[p.box for p in s.results[0].planes] for s in subjects]
    cropped = any(min(box[side] for box in boxes) > 0.005 for boxes in seen for side in (0, 1))
    return "; ".join([*parts, "hatched: outside what the model sees"] if cropped else parts)


def _run(loaded: Loaded, method: Compressor, prompt: str, pictures: list[Picture], video: bool = False) -> list[Result]:
    """What a method keeps of each picture of one prompt, or of one video, planes placed on the picture itself.

    A model that takes no videos is given the frames as images of one prompt.
    """
    from ..apply.prepare import look
    from ..loading.processor import NEEDS_VIDEO
    from ..patches import adapter_for

    processor = getattr(loaded.processor, "video_processor", None) if video else None
    if video and processor is None and getattr(loaded.processor, "video_token", None):
        raise MllmEfficientError(NEEDS_VIDEO)
    if processor is not None:
        inputs = loaded.inputs([loaded.prompt(prompt, 0, 1)], videos=[pictures])
    else:
        inputs = loaded.inputs([loaded.prompt(prompt, len(pictures))], pictures)
    reports = look(loaded.model, method, **inputs).images
    adapter, by = adapter_for(loaded.model), processor or loaded.processor.image_processor
    if video:
        return [_result(method, reports, lambda planes: adapter.place(planes, pictures[0].size, by), video)]
    return [_result(method, [report], lambda planes, p=p: adapter.place(planes, p.size, by)) for report, p in zip(reports, pictures)]


def _result(method: Compressor, reports: Sequence[Any], place: Any, video: bool = False) -> Result:
    """What is drawn of a picture, or of a video whose frames may be reported one by one. place: puts planes on the picture."""
    from ..media.overlay import Result

    planes: list[Any] = []
    kept_planes: list[Any] = []
    indices: list[int] = []
    for i, report in enumerate(reports):
        start, left = sum(map(len, kept_planes)), report.indices if report.kept_planes is None else report.of_merged
        after = report.planes if report.kept_planes is None else report.kept_planes
        if not all(p.placed for p in after):
            raise MllmEfficientError(f"{method.name} merges tokens to ones without a place on the picture: show cannot draw it")
        drawn = report.planes if len(after) == len(report.planes) else after  # another projector's tiles, which no map puts together
        for found, into in ((drawn, planes), (after, kept_planes)):
            into += [replace(p, frame=i) if video and p.frame is None else p for p in place(found)]
        indices += [start + j for j in (range(sum(map(len, after))) if left is None else left.tolist())]
    full, kept, merged = sum(r.full for r in reports), sum(r.kept for r in reports), any(r.indices is None for r in reports)
    all_of_it = merged and all(r.of_merged is None for r in reports if r.indices is None)
    layers = [sum(each) for each in zip(*(r.per_layer for r in reports))] if all(r.per_layer for r in reports) else []
    separators = sum(r.separators_full for r in reports), sum(r.separators_kept for r in reports)
    return Result(title(method), full, kept, planes, None if all_of_it else indices, kept_planes if merged else None, layers, separators)


def _film(frames: list[Picture], numbers: list[int], results: list[Result]) -> Subject:
    """The frames that have tokens of their own. A model may see several frames as one: the first of them is shown."""
    from ..media.overlay import Subject

    steps = len({p.frame for p in results[0].planes})
    shown = range(0, len(frames), math.ceil(len(frames) / steps))
    labels = [f"frame {numbers[i]}" for i in shown]
    return Subject([frames[i] for i in shown], results, f"{len(shown)} frames" if len(shown) > 1 else "1 frame", labels)


def _row(method: Compressor, path: Path, modality: str, result: Result, output: Path) -> dict[str, Any]:
    def plain(planes: Sequence[Any] | None) -> list[dict[str, Any]] | None:
        names = ("rows", "columns", "tile", "frame")
        return None if planes is None else [{**{k: getattr(p, k) for k in names}, "box": list(p.box)} for p in planes]

    return {
        "method": method.spec(), "image": str(path), "modality": modality, "full": result.full, "kept": result.kept,
        "share": result.kept / result.full, "separators_full": result.separators[0], "separators_kept": result.separators[1],
        "tokens_per_layer": list(result.per_layer) or None,
        "planes": plain(result.planes), "kept_planes": plain(result.kept_planes),
        "indices": None if result.indices is None else list(result.indices), "output": str(output),
    }  # fmt: skip
