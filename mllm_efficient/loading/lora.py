"""Folders of LoRA and the like: the base model that one belongs to, and its weights on that model."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..errors import MllmEfficientError
from ..patches.pictures import read_object

CONFIG = "adapter_config.json"


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter instead of a model."""
    return (Path(folder).expanduser() / CONFIG).is_file()


def base_of_folder(folder: str | Path) -> str | None:
    """The base model of an adapter's folder, by folder or hub id; None for a folder or name that is no adapter.

    Raises ``MllmEfficientError`` where the folder does not say.
    """
    if not is_adapter(folder):
        return None
    base = read_object(Path(folder).expanduser() / CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise MllmEfficientError(f"{folder}/{CONFIG} does not name its base model: give --model BASE --adapter {folder}")
    beside = Path(folder).expanduser() / base
    return str(beside) if not Path(base).expanduser().exists() and beside.is_dir() else base


def resolved(model: str, adapter: str | None) -> tuple[str, str | None]:
    """(base, adapter) of ``--model`` and ``--adapter``. Raises where both are adapters, or ``adapter`` is none."""
    if adapter is not None and not is_adapter(adapter):
        raise MllmEfficientError(f"--adapter {adapter}: no folder with an {CONFIG}")
    base = base_of_folder(model)
    if base is None:
        return model, adapter
    if adapter is not None:
        raise MllmEfficientError(f"--model {model} is an adapter of {base} itself: give --model {base} --adapter {adapter}")
    return base, model


def without_base(folder: str, weights: bool = True) -> str:
    """What to do where the base model of an adapter's folder is not here, to go after an error's message; empty for other models.

    weights: whether the command takes ``--adapter``.
    """
    base = base_of_folder(folder)
    if base is None:
        return ""
    there = f"give a folder of it: --model FOLDER{f' --adapter {folder}' if weights else ''}"
    return f" ({folder} is an adapter of {base}: {there})"


def attach(model: Any, folder: str) -> None:
    """Puts an adapter's weights beside the model's, in place; the model stays of its class.

    Raises ``MllmEfficientError`` without PEFT, for prompt learning, and where weights and model do not belong together.
    """
    try:
        version("peft")
    except PackageNotFoundError:
        raise MllmEfficientError(f"the adapter {folder} needs PEFT: pip install peft") from None
    path = Path(folder).expanduser()
    try:
        info = model.load_adapter(str(path))
    except Exception as error:  # whatever PEFT raises for its kinds, sizes and files
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise MllmEfficientError(f"the adapter {folder} cannot be put on this model: {reason}") from error
    odd = sorted(getattr(info, "missing_keys", None) or []) + sorted(getattr(info, "unexpected_keys", None) or [])
    if odd:
        raise MllmEfficientError(f"the adapter {folder} does not belong to this model: {len(odd)} weights have no match, such as {odd[0]}")
    model.eval()


def fingerprint(folder: str) -> str:
    """A hash of an adapter's settings and weights."""
    path, digest = Path(folder).expanduser(), hashlib.sha256()
    digest.update(json.dumps(read_object(path / CONFIG), sort_keys=True).encode())
    for file in sorted([*path.glob("adapter_model*.safetensors"), *path.glob("adapter_model*.bin")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
