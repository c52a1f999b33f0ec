"""A running OpenAI-compatible server (vLLM, SGLang ...) asked the same tasks. What it compresses is its own affair."""

from __future__ import annotations

import base64
import io
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_efficient.compressors.none import NoCompression
from mllm_efficient.errors import MllmEfficientError
from mllm_efficient.measure.arms import BASELINE, METHOD
from mllm_efficient.measure.probing import KEY
from mllm_efficient.patches.pictures import read_object

from ..sweep import Cell
from .asking import RAISE, Answer, Asker, Content, before, line

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

TIMEOUT = 600.0  # seconds for one answer


@dataclass(frozen=True)
class ServerCell(Cell):
    """A server as an arm. url: up to and with ``/v1``. model: what it calls the model. root: where it has it from, if it says so."""

    name: str = ""
    url: str = ""
    model: str = ""
    root: str = ""

    @property
    def is_onevision(self) -> bool:
        """Whether the model is a LLaVA-OneVision, by its config.json if that lies here, else by its name."""
        kind = read_object(Path(self.root) / "config.json").get("model_type") if self.root else None
        return kind == "llava_onevision" if kind else "onevision" in f"{self.root} {self.model}".lower()

    @property
    def spec(self) -> str:
        return self.name


def server_cells(given: Sequence[str], model: str | None) -> list[ServerCell]:
    """``"URL"`` or ``"NAME=URL"`` each; the first is the baseline of the others. Asks each server for its model.

    Raises ``MllmEfficientError`` for one that does not answer, or that has several models where ``model`` names none of them.
    """
    cells: list[ServerCell] = []
    for i, text in enumerate(given):
        name, url = text.split("=", 1) if "=" in text.split("://")[0] else (f"server{i + 1}" if len(given) > 1 else "server", text)
        if not url.startswith(("http://", "https://")):
            raise MllmEfficientError(f"--server {text!r} is not a URL, such as http://localhost:8000/v1 or NAME=URL")
        if name in [c.name for c in cells]:
            raise MllmEfficientError(f"--server: the name {name!r} is given twice")
        try:
            roots = {m.id: str(getattr(m, "root", None) or "") for m in client(url).models.list().data}
            names = list(roots)
        except Exception as error:
            raise MllmEfficientError(
                f"--server {url}: no answer to /models ({type(error).__name__}: {error}); the URL ends in /v1"
            ) from None
        if model is None and len(names) != 1:
            raise MllmEfficientError(f"--server {url} has the models {', '.join(names) or '(none)'}: name one with --server-model")
        if model is not None and model not in names:
            raise MllmEfficientError(f"--server {url} has no model {model!r} (it has {', '.join(names)})")
        cells.append(
            ServerCell(
                NoCompression(), METHOD if cells else BASELINE, name=name, url=url, model=model or names[0], root=roots[model or names[0]]
            )
        )
    return cells


def served(cells: Sequence[ServerCell]) -> dict[str, Any]:
    """What is known of how servers answer, by the names that a model here has for it."""
    from importlib.metadata import version

    from mllm_efficient import __version__

    unknown = dict.fromkeys(("weights", "device", "dtype", "attention", "image_processor", "quantization"), "the server's")
    return {
        "model": ", ".join(dict.fromkeys(c.model for c in cells)), **unknown,
        "servers": {c.name: {"url": c.url, "model": c.model} for c in cells},
        "versions": {"mllm_efficient": __version__, "openai": version("openai")},
    }  # fmt: skip


def tiling_note(cells: Iterable[Any], askers: Iterable[Any]) -> str | None:
    """What to say beside the numbers of servers (``ServerCell``) that do not see several pictures of a prompt as transformers does."""
    names = [c.name for c in cells if c.is_onevision]
    if not names or not any(a.several for a in askers):
        return None
    return (
        f"{', '.join(names)}: vLLM tiles every one of several pictures of a LLaVA-OneVision prompt (up to anyres_max_9), transformers "
        "tiles none: these prompts have more visual tokens than the same ones on a model here"
    )


def client(url: str) -> Any:
    """The OpenAI client, without its silent repetitions."""
    try:
        from openai import OpenAI
    except ImportError:
        raise MllmEfficientError('--server needs the OpenAI client: pip install "mllm-efficient[eval]"') from None
    return OpenAI(base_url=url, api_key=os.environ.get(KEY, "none"), max_retries=0, timeout=TIMEOUT)


@dataclass
class ServerAsker(Asker):
    """Sends ``batch_size`` requests at a time. Visual tokens are known where the server says them in ``usage`` (vLLM:
    ``--enable-prompt-tokens-details``)."""

    url: str = ""
    model: str = ""
    several: bool = False  # whether a prompt had more than one picture

    def __post_init__(self) -> None:
        self.client = client(self.url)

    @property
    def settings(self) -> dict[str, Any]:
        return {"server": self.url, "model": self.model}

    @property
    def identity(self) -> Any:
        return self.settings

    def prompt(self, content: Content) -> list[dict[str, Any]]:
        self.several |= len(content.pictures) > 1
        return content.messages

    def answers(self, batch: Sequence[tuple[Content, Any]], settings: dict[str, Any]) -> list[Answer]:
        with ThreadPoolExecutor(len(batch)) as pool:
            return list(pool.map(lambda one: self._answer(one[0], settings), batch))

    def _answer(self, content: Content, settings: dict[str, Any]) -> Answer:
        """One answer. A request that fails is not sent again, and keeps no other from its answer."""
        try:
            return self._sent(content, settings)
        except Exception as error:
            if self.on_error == RAISE:
                raise
            return Answer("", line(f"{type(error).__name__}: {error}"))

    def _sent(self, content: Content, settings: dict[str, Any]) -> Answer:
        pictures = iter(content.pictures)
        messages = [
            {"role": m["role"], "content": [_image(next(pictures)) if p["type"] == "image" else p for p in m["content"]]}
            for m in content.messages
        ]
        how = {"max_tokens": settings["max_new_tokens"], "temperature": settings.get("temperature", 1.0) if settings["do_sample"] else 0.0}
        if settings["do_sample"] and settings.get("top_p") is not None:
            how["top_p"] = settings["top_p"]
        if settings["until"]:
            how["stop"] = settings["until"]
        start = time.perf_counter()
        reply = self.client.chat.completions.create(model=self.model, messages=messages, **how)
        seconds, usage = round(time.perf_counter() - start, 4), reply.usage
        details = getattr(usage, "prompt_tokens_details", None)
        by_kind = getattr(details, "multimodal_tokens", None) or {}
        return Answer(
            before(reply.choices[0].message.content or "", settings["until"]), visual_tokens_kept=by_kind.get("image"),
            prompt_tokens=getattr(usage, "prompt_tokens", None), output_tokens=getattr(usage, "completion_tokens", None), latency_s=seconds,
        )  # fmt: skip


def _image(picture: Picture) -> dict[str, Any]:
    data = io.BytesIO()
    picture.save(data, "PNG")
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"}}
