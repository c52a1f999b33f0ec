"""Folders of trained methods: where they are and what their ``config.json`` says. No torch.

A folder has ``config.json`` (method, sizes, the base model it was trained on), ``compressor.safetensors``, and, where the
language model was trained with it, ``base_delta/``: whole weights in ``model.safetensors``, or a LoRA as PEFT saves it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from ..compressors.base import RANDOM as RANDOM
from ..embedded import embedded
from ..errors import MllmEfficientError
from ..parsing import read_json

CONFIG, WEIGHTS, DELTA = "config.json", "compressor.safetensors", "base_delta"
COMPRESSION = "compression.json"  # in the folder of a model that was saved while it was wrapped
PART_KEYS, DELTA_KEYS = "compressor.", "base_delta."  # begin the names of trained weights among those of such a model
SERVED = "visual_token_compression"  # in a model's config: the method that vLLM serves it with


@dataclass(frozen=True)
class Folder:
    """A trained method on disk. config: its ``config.json``."""

    path: Path
    config: dict[str, Any]

    @property
    def delta(self) -> Path | None:
        """The weights of the language model that were trained with it."""
        path = self.path if self.config.get("delta") else self.path / DELTA
        return path if path.is_dir() else None


def open_folder(where: str) -> Folder:
    """A folder, or one of the hub by its id. Raises ``MllmEfficientError`` for what is none."""
    path = Path(where).expanduser()
    if not path.is_dir() and where.count("/") == 1 and not where.startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download

        try:
            path = Path(snapshot_download(where, allow_patterns=["*.json", "*.safetensors"]))
        except Exception as error:  # whatever the hub's library raises without network, access or such a repository
            raise MllmEfficientError(f"weights={where}: no such folder, and not on the hub either ({type(error).__name__})") from error
    try:
        config: Any = read_compression(path).get("trained") if (path / COMPRESSION).is_file() else read_json(path / CONFIG)
    except OSError:
        raise MllmEfficientError(f"weights={where}: no {CONFIG} there; mllm-efficient train writes such a folder") from None
    except ValueError:
        raise MllmEfficientError(f"weights={where}: {CONFIG} is not JSON that can be read") from None
    if not _describes_a_method(config):
        raise MllmEfficientError(f"weights={where}: {CONFIG} describes no trained method")
    return Folder(path, config)


def read_compression(path: Path) -> dict[str, Any]:
    """What ``compression.json`` in a folder says. Raises ``MllmEfficientError`` for one that is damaged."""
    try:
        about = read_json(path / COMPRESSION)
    except (OSError, ValueError) as error:
        raise MllmEfficientError(f"{path / COMPRESSION} cannot be read ({error})") from None
    if not isinstance(about, dict) or not isinstance(about.get("method"), dict):
        raise MllmEfficientError(f"{path / COMPRESSION} names no method")
    return about


def exported(path: Path) -> dict[str, Any] | None:
    """The method that a folder of ``mllm-efficient export`` is served with, without what requests may ask for; None for others."""
    try:
        served = read_json(path.expanduser() / CONFIG).get(SERVED)
    except (OSError, ValueError, AttributeError):
        return None
    return {k: v for k, v in served.items() if k != "allowed_tokens"} if isinstance(served, dict) else None


def _describes_a_method(config: Any) -> TypeGuard[dict[str, Any]]:
    if not isinstance(config, dict) or not isinstance(config.get("method"), str):
        return False
    sizes, base = config.get("sizes"), config.get("base")
    if not isinstance(sizes, dict) or not isinstance(base, dict):
        return False
    return all(isinstance(sizes.get(k), int) for k in ("inputs", "outputs")) and all(
        isinstance(base.get(k), dict) for k in ("sizes", "sample")
    )


_hashes: dict[Path, tuple[tuple[int, ...], str]] = {}


def contents_of(folder: Path) -> str:
    """A hash of every file of a method in its folder. Those whose inode, size and times are as before are not read again."""
    out = hashlib.sha256()
    for path in (folder / CONFIG, folder / COMPRESSION, folder / WEIGHTS, *sorted((folder / DELTA).rglob("*"))):
        try:
            if not path.is_file():
                continue
            found = path.stat()
            now = (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)  # nobody can set the last one back
            if _hashes.get(path, ((), ""))[0] != now:
                with path.open("rb") as file:
                    _hashes[path] = now, hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise MllmEfficientError(f"cannot read {path}: {error.strerror}") from None
        out.update(f"{path.relative_to(folder)}/{_hashes[path][1]}".encode())
    return out.hexdigest()


def shipped(name: str) -> Folder | None:
    """A method's weights for the embedded model, if it has any."""
    path = embedded("trained", name)
    return open_folder(str(path)) if (path / CONFIG).is_file() else None
