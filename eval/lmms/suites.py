"""Named lists of tasks and published tables, in ``configs/suites`` and ``configs/references``."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from mllm_efficient.errors import MllmEfficientError, did_you_mean

SUITES, REFERENCES = "suites", "references"


def names(kind: str) -> list[str]:
    """What there is of a kind."""
    return sorted(f.name.removesuffix(".yaml") for f in (files("mllm_efficient.configs") / kind).iterdir() if f.name.endswith(".yaml"))


def read(kind: str, name: str) -> dict[str, Any]:
    """A suite or a reference. Raises ``MllmEfficientError`` naming those there are."""
    import yaml

    if name not in names(kind):
        raise MllmEfficientError(
            f"unknown {kind.removesuffix('s')} {name!r}{did_you_mean(name, names(kind))} (there are {', '.join(names(kind))})"
        )
    return yaml.safe_load((files("mllm_efficient.configs") / kind / f"{name}.yaml").read_text())
