"""Where the embedded model and the trained parts for it lie inside the package: the one place that knows."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def embedded(*parts: str) -> Path:
    """A folder of what ships for offline use: ``embedded("model")``, ``embedded("trained", "tokenflex")``."""
    return Path(str(files("mllm_efficient.eval.builtin"))).joinpath(*parts)
