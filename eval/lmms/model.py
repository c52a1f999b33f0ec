"""A loaded model as what answers requests: prompts, pictures, stop strings, counts."""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_efficient.errors import MllmEfficientError
from mllm_efficient.loading.prompts import PLAIN, TEMPLATE, has_template, plain, require_pictures
from mllm_efficient.media.images import RANGES

from .asking import FORMATS, PADDINGS, Answer, Asker, Content, before

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

LLAVA_V1 = "llava_v1"
SYSTEM_V1 = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


@dataclass
class ModelAsker(Asker):
    """A loaded model under one method, or several composed ones; ``installed`` must be entered around ``ask``.

    image_padding: "pad" fills a picture up to a square with the processor's mean colour, as the original LLaVA does; "crop"
    leaves it to the processor, which cuts the sides off. None: "pad" where the processor would cut, else nothing. A family
    whose processor keeps the whole picture takes neither.
    prompt_format: "template", the processor's chat template (without one the plain ``USER: ... ASSISTANT:``), or "llava_v1",
    the original LLaVA-1.5's conversation with its system prompt.
    """

    loaded: Any = None
    method: Any = None
    image_padding: str | None = None
    prompt_format: str = "template"

    def __post_init__(self) -> None:
        from mllm_efficient.apply.plan import check
        from mllm_efficient.compressors.composed import stages_of
        from mllm_efficient.loading.models import environment, require_supported
        from mllm_efficient.measure.native import Control
        from mllm_efficient.registry import runnable

        self.adapter = require_supported(self.loaded)
        self.method = runnable(self.method)
        check(self.adapter, self.method)
        self.parts, self.control = stages_of(self.method), Control(self.loaded)
        processor = self.loaded.processor
        cuts = type(processor).__name__ == "LlavaProcessor" and bool(getattr(processor.image_processor, "do_center_crop", False))
        if self.image_padding is not None and not cuts:
            whole = f"{self.adapter.name}, whose processor keeps the whole picture"
            raise MllmEfficientError(f"image padding {self.image_padding!r} has no effect on {whole}: leave it out")
        if self.image_padding not in (None, *PADDINGS):
            raise MllmEfficientError(f"image padding {self.image_padding!r} is not one of {', '.join(PADDINGS)}")
        if self.image_range not in RANGES:
            raise MllmEfficientError(f"image range {self.image_range!r} is not one of {', '.join(RANGES)}")
        if self.prompt_format not in FORMATS:
            raise MllmEfficientError(f"prompt format {self.prompt_format!r} is not one of {', '.join(FORMATS)}")
        if self.prompt_format == LLAVA_V1 and type(processor).__name__ != "LlavaProcessor":
            raise MllmEfficientError(f"the prompt format llava_v1 is LLaVA-1.5's, not {self.adapter.name}'s: leave it out")
        self.padding = self.image_padding or ("pad" if cuts else "whole")
        self.format = LLAVA_V1 if self.prompt_format == LLAVA_V1 else TEMPLATE if has_template(processor) else PLAIN
        self._environment = environment(self.loaded)

    @property
    def how(self) -> dict[str, Any]:
        """What answers depend on besides the method and the request, for reports."""
        how = {**self._environment, "image_padding": self.padding, "prompt": self.format, "default_max_new_tokens": self.max_new_tokens}
        return how if self.image_range == "full" else how | {"image_range": self.image_range}

    @property
    def settings(self) -> dict[str, Any]:
        known = {k: v for k, v in self.how.items() if k not in ("model", "default_max_new_tokens")}
        return {**known, "method": self.identity}

    @functools.cached_property
    def identity(self) -> list[dict[str, Any]]:
        """What the method does: its settings, its code and the weights that it brings."""
        return [{**m.to_dict(), "code": _code(type(m)), "weights_hash": _weights(self.adapter, m)} for m in self.parts]

    def installed(self) -> Any:
        """A context in which the model holds what the method needs."""
        from mllm_efficient.apply.wrap import compressed
        from mllm_efficient.compressors.none import NoCompression

        return compressed(self.loaded.model, NoCompression() if self.method.sets_processor else self.method)

    def prompt(self, content: Content) -> str:
        if self.format != LLAVA_V1:
            return self.loaded.conversation(content.messages, len(content.pictures))
        text = plain(self.loaded.processor, content.messages, system=SYSTEM_V1)
        require_pictures(self.loaded.processor, text, len(content.pictures))
        return text

    def pictured(self, content: Content) -> list[Picture]:
        """The pictures as the processor gets them."""
        return [self._square(p) for p in content.pictures] if self.padding == "pad" else content.pictures

    def _square(self, picture: Picture) -> Picture:
        from PIL import ImageOps

        mean = self.loaded.processor.image_processor.image_mean
        side = max(picture.size)
        return picture if picture.width == picture.height else ImageOps.pad(picture, (side, side), color=tuple(int(255 * m) for m in mean))

    def answers(self, batch: Sequence[tuple[Content, Any]], settings: dict[str, Any]) -> list[Answer]:
        import torch

        from mllm_efficient.apply.prepare import prepare
        from mllm_efficient.measure.native import sizes_of

        from ..calibration import Watched

        start = self._now()
        pictures = [self.pictured(content) for content, _ in batch]
        asked = self.control.asked(self.method, [sizes_of(own) for own in pictures])
        inputs = asked.loaded.inputs([prompt for _, prompt in batch], pictures)
        keys = [key for content, _ in batch for key in content.keys]
        with torch.no_grad():
            prepared = asked.shown(prepare(self.loaded.model, asked.method, image_keys=keys or None, **inputs))
            call, until = prepared.model_kwargs, settings["until"]
            how = {k: v for k, v in settings.items() if k != "until"}
            stops = Stops(until, call["input_ids"].shape[1], self.loaded.processor) if until else None
            if stops is not None:
                how["stopping_criteria"] = [stops]
            watched = Watched() if how.get("num_beams", 1) == 1 else None
            if watched is not None:
                how["logits_processor"] = [watched]
            out = self.loaded.model.generate(**call, **how)
        short, long = (t["attention_mask"].sum(1).tolist() for t in (call, inputs))
        new = out[:, call["input_ids"].shape[1] :].cpu()
        seconds, report = round(self._now() - start, 4), prepared.report
        rows = self._ended(new, stops if watched is not None else None)
        sure = [None] * len(rows) if watched is None else watched.confidences(rows, new[:, -1])
        found = []
        for i, ids in enumerate(rows):
            images = [image for image in report.images if image.row == i]
            layers = [sum(column) for column in zip(*(image.per_layer for image in images if image.per_layer))]
            found.append(
                Answer(
                    before(self.loaded.processor.decode(ids, skip_special_tokens=True), until), None,
                    sum(image.full for image in images), sum(image.kept for image in images), layers or None,
                    int(short[i]), int(long[i]), len(ids), seconds, len(batch), confidence=sure[i],
                )
            )  # fmt: skip
        return found

    def _ended(self, new: Any, stops: Stops | None) -> list[Any]:
        """Each row up to its end; what ``generate`` puts after an answer while others go on is no part of it."""
        from ..agreement import cut
        from ..harness import endings

        ends = endings(self.loaded.model)
        rows = [cut(row, ends) if ends else row for row in new]
        return rows if stops is None else [row[: stops.ended.get(i, len(row))] for i, row in enumerate(rows)]

    def _now(self) -> float:
        import torch

        if self.loaded.device.type == "cuda":
            torch.cuda.synchronize(self.loaded.device)
        return time.perf_counter()


class Stops:
    """Ends a row of ``generate`` once its answer holds a stop string. ended: the number of new tokens it then had, by row.

    transformers' own criterion also looks into the prompt, and not every tokenizer's vocabulary is one it can take apart.
    """

    def __init__(self, stops: Sequence[str], prompt_length: int, processor: Any):
        self.stops, self.start, self.processor = stops, prompt_length, processor
        self.ended: dict[int, int] = {}

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        import torch

        texts = self.processor.batch_decode(input_ids[:, self.start :], skip_special_tokens=True)
        done = [any(stop in text for stop in self.stops) for text in texts]
        for row in (i for i, is_done in enumerate(done) if is_done):
            self.ended.setdefault(row, input_ids.shape[1] - self.start)
        return torch.tensor(done, device=input_ids.device)


def _code(cls: type) -> str:
    """A hash of the file that a method is written in, or of nothing where there is none."""
    try:
        text = inspect.getsource(sys.modules[cls.__module__])
    except (KeyError, OSError, TypeError):
        text = ""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _weights(adapter: Any, method: Any) -> str | None:
    """A hash of the weights that a method brings: its trained ones, or a CLIP of its own."""
    from mllm_efficient.trained.folder import located

    folder = None if method.installs is None else located(adapter, method.installs)
    clip = method.clip
    path = folder.path if folder is not None else Path(clip).expanduser() if isinstance(clip, str) else None
    if path is None or not path.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file():
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]
