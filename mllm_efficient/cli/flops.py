"""``mllm-efficient flops``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import MllmEfficientError
from . import options

if TYPE_CHECKING:
    from ..patches.rules import Size


def flops(
    model: Annotated[
        str, typer.Option("--model", help="A shape such as llava-1.5-7b, a folder, a hub id, builtin, builtin-qwen or builtin-video.")
    ] = "builtin",
    method: Annotated[list[str] | None, typer.Option("--method", help="Specification or YAML file. Repeatable.")] = None,
    text_tokens: Annotated[str, typer.Option("--text-tokens", help="Tokens of the prompt that are not visual; a list zips.")] = "64",
    visual_tokens: Annotated[
        str | None,
        typer.Option("--visual-tokens", help="Visual tokens before compression; a list zips. Default: a usual picture."),
    ] = None,
    image_size: Annotated[
        str | None, typer.Option("--image-size", help="WxH in pixels, where the count depends on it; a list zips.")
    ] = None,
    images: Annotated[int, typer.Option("--images", min=1, help="Pictures of a prompt; not with --visual-tokens.")] = 1,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=0, help="Tokens generated; the prefill gives the first.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 1,
    convention: Annotated[str, typer.Option("--convention", help="exact, or a paper's: divprune, sparsevlm.")] = "exact",
    measured: Annotated[bool, typer.Option("--measured", help="Count with torch on the real model too (no weights for a shape).")] = False,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    min_pixels: options.MinPixels = None,
    max_pixels: options.MaxPixels = None,
    processor_kwargs: options.ProcessorKwargs = None,
    columns: options.Columns = None,
    json: options.Json = False,
    imports: options.Import = None,
) -> int:
    """What methods cost without running anything: FLOPs by phase, the ratio to no compression, KV-cache size.

    Lists such as --text-tokens 15,23,83 give one prompt for each number; rows are means over them, and the ratio is the
    mean of the ratios.
    """
    from ..eval.costs import Prompts, flops_of, require_convention, zipped
    from ..loading.models import ModelOptions
    from ..loading.processor import processor_settings
    from ..measure.shapes import load_shape

    options.import_files(imports)
    options.check_columns(columns, "flops")
    visuals = None if visual_tokens is None else _numbers(visual_tokens, "--visual-tokens", 1)
    sizes = None if image_size is None else [_size(part) for part in image_size.split(",")]
    pairs = zipped(_numbers(text_tokens, "--text-tokens", 0), visuals, sizes)
    methods = [options.one_method(m) for m in method or ()]
    prompts = Prompts(pairs, images, new_tokens, batch_size, convention, measured)
    require_convention(prompts)
    given = processor_settings(min_pixels, max_pixels, processor_kwargs)
    shape = load_shape(model, revision, trust_remote_code, given)
    settings = ModelOptions(shape.name, "cpu", revision=revision, trust_remote_code=trust_remote_code, processor_kwargs=given)
    return options.finish(flops_of(shape, methods, prompts, settings=settings, progress=options.progress()), json, columns)


def _numbers(text: str, option: str, least: int) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= least for part in parts):
        raise MllmEfficientError(f"{option} {text!r} is not a list of whole numbers from {least}, such as 15,23,83")
    return [int(part) for part in parts]


def _size(text: str) -> Size:
    width, _, height = text.strip().lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise MllmEfficientError(f"--image-size {text!r} is not WIDTHxHEIGHT in pixels, such as 672x448")
    return int(width), int(height)
