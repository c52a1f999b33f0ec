"""Counters of the front end in vLLM's own registry: what ``/metrics`` shows of visual tokens, and what ``/v1/models`` says of methods."""

from __future__ import annotations

import functools
from typing import Any

from . import failures

LABELS = ("model_name", "method")
FULL, KEPT, IMAGES, FAILED = (f"mllm_efficient:{name}" for name in ("visual_tokens_full", "visual_tokens_kept", "images", "images_failed"))
# What this process serves: the model's name and its method.
SERVED: dict[str, str] = {}


@functools.cache
def counters() -> dict[str, Any]:
    """The counters of this process, by name. Made once: the registry refuses a second of the same name."""
    from prometheus_client import Counter, Gauge

    said = {
        FULL: "Visual tokens of images before compression, as vLLM counts them.",
        KEPT: "Visual tokens of images in the prompt.",
        IMAGES: "Images in requests.",
    }
    out: dict[str, Any] = {name: Counter(name, what, LABELS) for name, what in said.items()}
    out[FAILED] = Gauge(FAILED, "Different images whose features could not be used, since the start.", multiprocess_mode="max")
    return out


class Tally:
    """The counters of one model."""

    def __init__(self, model: str, method: str):
        self.own = {name: counters()[name].labels(model, method) for name in (FULL, KEPT, IMAGES)}
        SERVED[model] = method

    def add(self, full: int, kept: int) -> None:
        """One image."""
        for name, count in ((FULL, full), (KEPT, kept), (IMAGES, 1)):
            self.own[name].inc(count)
        counters()[FAILED].set(failures.number())
