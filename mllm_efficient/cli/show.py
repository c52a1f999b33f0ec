"""``mllm-efficient show``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ..errors import MllmEfficientError
from . import options

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

    from ..compressors.base import Compressor
    from ..loading.models import Loaded
    from ..media.overlay import Result, Subject

T = TypeVar("T")


@options.of_model
def show(
    *,
    settings: Any,
    output: Annotated[Path, typer.Option("--output", help="The .png, .pdf or .svg to write.")],
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
) -> int:
    """Draws which tokens of a picture or video each method keeps, or what its merged tokens are made of, as one figure.

    A method that cannot be drawn is named, and the others are drawn (exit code 1).
    """
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
    from ..eval.drawn import run_method
    from ..loading.models import environment, load
    from ..report import by_layer

    loaded = load(settings)
    methods, failed = _able(loaded, methods)
    subjects, rows = [], []
    if pictures:
        shown, more = _each(methods, lambda m: run_method(loaded, m, prompt, [picture for _, picture in pictures]))
        failed |= more
        for i, (path, picture) in enumerate(pictures):
            name = path.name if len(path.name) <= 32 else f"{path.name[:16]}…{path.name[-15:]}"
            note = name if len(pictures) > 1 else f"{picture.width} × {picture.height} pixels"
            subjects.append(viz.Subject([picture], [found[i] for found in shown.values()], note, question=_asked(shown, prompt)))
            rows += [_row(m, path, "image", found[i], output) for m, found in shown.items()]
    if video is not None:
        films, more = _each(methods, lambda m: run_method(loaded, m, prompt, clip[0], video=True)[0])
        failed |= more
        if films:
            subjects.append(replace(_film(clip[0], clip[1], list(films.values())), question=_asked(films, prompt)))
        rows += [_row(m, video, "video", result, output) for m, result in films.items()]
    if not rows:
        raise next(iter(failed.values()))
    model = settings.model
    name = "Embedded model" if is_embedded(model) else Path(model).resolve().name if Path(model).is_dir() else model
    figures.save(figures.figure(subjects, dim=dim, caption=f"{name}: {legend(subjects)}." if caption is None else caption), output)
    if json:
        meta = {**environment(loaded), "methods": [m.to_dict() for m in methods], "prompt": prompt, "frames": clip[1] or None}
        options.print_json(rows, meta)
        return _told(failed)
    for row in rows:
        options.say(
            f"{row['image']}: {row['method']} keeps {row['kept']} of {row['full']} tokens ({row['share']:.1%})"
            + (f" and {row['separators_kept']} of {row['separators_full']} separators" if row["separators_full"] else "")
            + (f": {by_layer(row['tokens_per_layer'])}" if row["tokens_per_layer"] else "")
        )
    print(output)
    return _told(failed)


def _told(failed: dict[Compressor, MllmEfficientError]) -> int:
    """Names what was not drawn; the exit code."""
    for method, error in failed.items():
        options.warn(f"not drawn: {method.spec()}: {error}")
    return 1 if failed else 0


def _able(loaded: Loaded, methods: Sequence[Compressor]) -> tuple[list[Compressor], dict[Compressor, MllmEfficientError]]:
    """The methods that the model can run, and why it cannot run the others."""
    able, failed = _each(methods, lambda m: options.announce(loaded, [m]))
    return list(able), failed


def _each(
    methods: Sequence[Compressor], run: Callable[[Compressor], T]
) -> tuple[dict[Compressor, T], dict[Compressor, MllmEfficientError]]:
    """What ``run`` gives for each method, and what it raises for the others."""
    done, failed = dict[Any, Any](), dict[Any, MllmEfficientError]()
    for method in methods:
        try:
            done[method] = run(method)
        except MllmEfficientError as error:
            failed[method] = error
    return done, failed


def _asked(methods: Iterable[Compressor], prompt: str) -> str:
    """The question, where one of the methods looks at it."""
    from ..compressors.base import query_aware

    return prompt if any(query_aware(type(stage)) for m in methods for stage in m.parts) else ""


def legend(subjects: Sequence[Subject]) -> str:
    """What the figure shows, in words: only what occurs in it."""
    results = [r for s in subjects for r in s.results]
    parts = ["kept tokens in colour, dropped ones faded"] if any(r.indices is not None and r.areas is None for r in results) else []
    parts += ["merged tokens in the mean colour of what they are made of, outlined"] if any(r.areas is not None for r in results) else []
    squares = any(r.kept_planes is not None and r.areas is None for r in results)
    parts += ["merged tokens in the mean colour of their area"] if squares else []
    seen = [[p.box for p in s.results[0].planes] for s in subjects]
    cropped = any(min(box[side] for box in boxes) > 0.005 for boxes in seen for side in (0, 1))
    return "; ".join([*parts, "hatched: outside what the model sees"] if cropped else parts)


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
        "indices": None if result.indices is None else list(result.indices),
        "areas": None if result.areas is None else list(result.areas), "output": str(output),
    }  # fmt: skip
