"""The method of a saved model, its trained part wherever the folder is by now."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..compressors.base import Compressor
from ..registry import build
from ..spec import text_fields, write
from .files import read_compression


def method_in(folder: Path) -> Compressor:
    """The method that a saved model was wrapped with, its trained part the one of the folder, wherever that is by now."""
    return relocated(build(read_compression(folder)["method"]), str(folder))


def relocated(method: Compressor, weights: str | None) -> Compressor:
    """A method whose trained part, if it has any, is in another folder; None names none."""
    return method.map_parts(lambda stage: _relocated(stage, weights))


def _relocated(method: Compressor, weights: str | None) -> Compressor:
    part = method.installs
    if part is method:
        return dataclasses.replace(method, weights=weights)  # type: ignore[call-arg]
    if part is None:
        return method
    kept = {k: v for k, v in _relocated(part, weights).to_dict().items() if k not in ("method", "keep", "tokens", "prune")}
    return dataclasses.replace(method, on=write(part.name, kept, text_fields(type(part))))  # type: ignore[call-arg]
