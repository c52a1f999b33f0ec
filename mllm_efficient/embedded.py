"""Where the embedded models and the trained parts for the first lie inside the package: the one place that knows."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from .errors import MllmEfficientError, did_you_mean

FIRST = "builtin"
FOLDERS = {FIRST: "model", "builtin-qwen": "qwen", "builtin-video": "video"}


def embedded(*parts: str) -> Path:
    """A folder of what ships for offline use: ``embedded("model")``, ``embedded("trained", "tokenflex")``."""
    return Path(str(files("mllm_efficient.eval.builtin"))).joinpath(*parts)


def model_source(name: str) -> str:
    """The folder of an embedded model by its name, ``builtin``, ``builtin-qwen`` or ``builtin-video``; another name as it is.

    Raises ``MllmEfficientError`` for a name of their kind that none has.
    """
    if name in FOLDERS:
        return str(embedded(FOLDERS[name]))
    if name.startswith(f"{FIRST}-") and not Path(name).is_dir():
        raise MllmEfficientError(f"no embedded model {name!r}{did_you_mean(name, list(FOLDERS))} (there are {', '.join(FOLDERS)})")
    return name


def is_embedded(name: str) -> bool:
    """Whether a model's name is that of an embedded one."""
    return name in FOLDERS


def model_name(source: str) -> str:
    """The other way round: the name of an embedded model's folder; another source as it is."""
    return next((name for name, folder in FOLDERS.items() if Path(source) == embedded(folder)), source)
