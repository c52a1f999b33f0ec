"""``mllm-efficient demo``: a page in the browser, for this machine alone."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import MllmEfficientError
from . import options

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..compressors.base import Compressor
    from ..eval.demo import Answer, Demo

HOST, UPLOAD = "127.0.0.1", "10mb"
FORGET = (3600, 3600)  # seconds: how often files of the page are looked at, and how old those are that are deleted
SCENES = 6
ENDINGS = [".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"]
# Nothing is asked of the network, whatever the page's template names: scripts, fonts and pictures come from this server alone.
POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; connect-src 'self' data: blob:; font-src 'self' data:; "
    "form-action 'none'; base-uri 'self'"
)
HEAD = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'


@options.of_model
def demo(
    *,
    settings: Any,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Of this machine; others cannot reach the page.")] = 7860,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Of an answer.")] = 32,
    imports: options.Import = None,
) -> None:
    """A page in the browser: a picture, a question, two methods side by side, a budget to move. No network, this machine alone."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError:
        raise MllmEfficientError("the demo needs gradio: pip install 'mllm-efficient[demo]'") from None

    from ..eval.demo import Demo
    from ..loading.models import load

    loaded = load(settings)
    for line in loaded.notes:
        options.say(line)
    page = build(gradio, Demo(loaded, max_new_tokens), settings.model)
    options.say(f"the demo is at http://{HOST}:{port} (Ctrl+C ends it)")
    try:
        page.launch(**how(gradio), server_port=port)
    except OSError as error:
        raise MllmEfficientError(f"port {port} cannot be used ({error}): give another --port") from None


def how(gradio: Any) -> dict[str, Any]:
    """What the page is served with: loopback alone, no share, no network, small uploads."""
    fonts = ["system-ui", "sans-serif"]
    theme = gradio.themes.Soft(font=fonts, font_mono=["ui-monospace", "monospace"])
    return {
        "server_name": HOST, "share": False, "quiet": True, "show_error": True, "max_file_size": UPLOAD, "ssr_mode": False, "theme": theme,
        "head": HEAD, "footer_links": [], "enable_monitoring": False, "max_threads": 4,
    }  # fmt: skip


def build(gradio: Any, demo: Demo, model: str) -> Any:
    """The page's blocks."""
    names = [name for name in demo.methods() if name not in ("none", "proportional", "dpn")]
    usual = [n for n in ("divprune", "random") if n in names] + names
    with gradio.Blocks(title="mllm-efficient", analytics_enabled=False, delete_cache=FORGET) as page:
        gradio.Markdown(
            f"## Fewer visual tokens, side by side\nModel: **{'the embedded one (a tiny self-test)' if model == 'builtin' else model}**"
        )
        picture = gradio.State(scene(0)[0])
        with gradio.Row():
            with gradio.Column(scale=1):
                shown = gradio.Image(scene(0)[0], label="Picture", interactive=False, height=240, elem_id="picture", buttons=[])
                upload = gradio.File(label=f"Your picture (up to {UPLOAD})", file_types=ENDINGS, elem_id="upload")
                scenes = gradio.Dropdown([f"scene {i}" for i in range(SCENES)], value="scene 0", label="Or a sample", elem_id="scene")
            with gradio.Column(scale=2):
                question = gradio.Textbox(scene(0)[1], label="Question", max_length=500, elem_id="question")
                keep = gradio.Slider(0.02, 1, 0.25, step=0.01, label="Share of the visual tokens that is kept", elem_id="keep")
                with gradio.Row():
                    first = gradio.Dropdown(names, value=usual[0], label="Method", elem_id="first")
                    second = gradio.Dropdown(names, value=usual[1], label="Beside it", elem_id="second")
                ask = gradio.Button("Ask", variant="primary", elem_id="ask")
                table = gradio.Markdown(elem_id="table")
        with gradio.Row():
            left = gradio.Image(label="Method", interactive=False, elem_id="left", buttons=[])
            right = gradio.Image(label="Beside it", interactive=False, elem_id="right", buttons=[])

        def uploaded(path: str | None) -> Any:
            return (gradio.skip(), gradio.skip()) if path is None else _or_error(gradio, lambda: (read(path), read(path)))

        def sampled(name: str) -> Any:
            image, asked = scene(int(name.split()[1]))
            return image, image, asked

        def answered(image: Image, asked: str, share: float, one: str, other: str) -> Any:
            table, *drawn = _or_error(gradio, lambda: compared(demo, image, asked, share, (one, other)))
            return table, *(gradio.update(value=pixels, label=name) for pixels, name in zip(drawn, (one, other)))

        upload.upload(uploaded, upload, [picture, shown], api_visibility="private")
        scenes.input(sampled, scenes, [picture, shown, question], api_visibility="private")
        inputs, outputs = [picture, question, keep, first, second], [table, left, right]
        for event in (ask.click, keep.release, question.submit):
            event(answered, inputs, outputs, api_visibility="private", concurrency_limit=1)
    return page


def read(path: str) -> Image:
    """An uploaded picture. Raises ``MllmEfficientError`` where it is none; its path is not told."""
    from ..media.images import load_image

    try:
        return load_image(path, "full")
    except MllmEfficientError as error:
        raise MllmEfficientError(str(error).replace(path, "the file")) from None


def scene(index: int) -> tuple[Image, str]:
    """A picture of the embedded benchmark and its question."""
    from ..eval.builtin.sample import sample

    return sample(index)


def compared(demo: Demo, picture: Image, question: str, keep: float, names: tuple[str, str]) -> tuple[str, Any, Any]:
    """The table in Markdown, and what each method keeps, drawn."""
    from ..registry import with_budget

    base, found = demo.compare(picture, question, names, keep)
    left, right = (None if isinstance(a, str) else draw(demo, picture, question, with_budget(n, keep=keep)) for n, a in zip(names, found))
    lines = ["| | answer | same | tokens | FLOPs | seconds |", "|---|---|---|---:|---:|---:|", _line("uncompressed", base, base)]
    lines += [f"| {n} | {_safe(a)} | | | | |" if isinstance(a, str) else _line(n, a, base) for n, a in zip(names, found)]
    return "\n".join(lines), left, right


def _line(name: str, answer: Answer, base: Answer) -> str:
    cost = "" if answer.flops_ratio is None else f"{100 * answer.flops_ratio:.0f}%"
    same = "" if answer is base else "yes" if answer.agrees_with(base) else "**no**"
    return f"| {name} | {_safe(answer.text)} | {same} | {answer.kept} of {answer.full} | {cost} | {answer.seconds:.2f} |"


def _safe(text: str) -> str:
    """A text of the model's in a cell of Markdown: no line breaks, no markup."""
    return "".join(f"&#{ord(c)};" if c in "|<>&*_`[]()#!\\~$" else c for c in " ".join(text.split()))


def draw(demo: Demo, picture: Image, question: str, method: Compressor) -> Any:
    """What a method keeps of a picture, as pixels; None where it cannot be drawn."""
    import numpy as np

    from ..eval.drawn import run_method
    from ..media.overlay import fit, render, views

    try:
        (result,) = run_method(demo.loaded, method, question, [picture])
    except MllmEfficientError:
        return None
    panel = fit(picture, max(384, min(768, max(picture.size))))
    shown = [render(panel, *view.of(result), areas=view.areas_of(result)) for view in views(result.planes)]
    return np.concatenate(shown, axis=1) if shown else None


def _or_error(gradio: Any, run: Any) -> Any:
    """What ``run`` gives; an error of the user's as a message on the page."""
    try:
        return run()
    except MllmEfficientError as error:
        raise gradio.Error(str(error), print_exception=False) from None
