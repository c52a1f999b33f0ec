"""``mllm-efficient generate``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..errors import MllmEfficientError
from . import options


@options.of_model
def generate(
    *,
    settings: Any,
    prompt: Annotated[str, typer.Option("--prompt", help="The question; pictures stand where it says <image>, or in front.")],
    image: Annotated[list[str] | None, typer.Option("--image", help="Image file, file: or data: URI. Repeatable.")] = None,
    method: Annotated[str, typer.Option("--method", help="Specification or YAML file, such as divprune:keep=0.1.")] = "none",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 64,
    image_range: options.ImageRange = "full",
    json: options.Json = False,
    imports: options.Import = None,
) -> None:
    """Answers one question about one or more images and says what it cost."""
    import time

    from ..media.images import load_image

    if not image:
        raise MllmEfficientError("no image: give at least one --image FILE")
    compressor = options.one_method(method)
    pictures = [load_image(path, image_range) for path in image]

    from ..apply import wrap as wrapper
    from ..loading.models import environment, load
    from ..measure.native import asked

    loaded = load(settings)
    text = loaded.prompt(prompt, len(pictures))
    if text == prompt:
        options.say("the prompt is in the model's chat template already: taken as it is")
    options.announce(loaded, [compressor])
    way = asked(loaded, compressor, [pictures])
    inputs = way.loaded.inputs([text], pictures)
    with wrapper.compressed(loaded.model, way.method):
        start = time.perf_counter()
        out = loaded.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, return_dict_in_generate=True)
        seconds = time.perf_counter() - start
    new = out.sequences[0, inputs["input_ids"].shape[1] :]
    answer = loaded.processor.decode(new, skip_special_tokens=True).strip()
    report = way.told(out.compression)
    row = {
        "method": compressor.spec(), "answer": answer, "images": len(pictures),
        "visual_tokens_full": report.visual_tokens_full, "visual_tokens_kept": report.visual_tokens_kept,
        "tokens_per_layer": report.tokens_per_layer,
        "new_tokens": len(new), "seconds": round(seconds, 3), "compress_seconds": round(report.compress_seconds, 5),
    }  # fmt: skip
    if json:
        options.print_json([row], {**environment(loaded), "methods": [compressor.to_dict()], "prompt": prompt})
        return
    print(answer)
    options.say(f"{row['visual_tokens_kept']} of {row['visual_tokens_full']} visual tokens, {len(new)} new tokens in {seconds:.2f} s")
