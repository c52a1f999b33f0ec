"""A model and a method as one folder, which ``vllm serve`` serves compressed and transformers opens as the model it was."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..apply.plan import check
from ..compressors.base import Compressor
from ..compressors.projector import Projector
from ..compressors.resizer import Resizer
from ..errors import MllmEfficientError
from ..loading.lora import resolved
from ..loading.models import Loaded, require_supported
from ..loading.processor import NEEDS_VIDEO, for_pictures_alone
from ..patches.vllm import BACKEND, PREFIX, PROJECTOR
from ..patches.vllm import SERVED as FAMILIES
from ..patches.vllm.settings import ALLOWED, Settings, require_served
from ..writing import writing
from .base_model import base_of
from .files import CONFIG, SERVED
from .folder import move, parts_of, save

TOWER, INNER = "vision_tower.", "vision_model."  # vLLM's towers of these types have the second after the first
WITH_INNER = ("clip_vision_model", "siglip_vision_model")


def export(loaded: Loaded, method: Compressor, folder: Path, allowed: Sequence[int] = ()) -> None:
    """Writes the folder: weights, processor, and the method in ``config.json`` under an architecture of our own, which a vLLM
    without the plugin refuses. Language-model weights that a trained method brings are merged into ``loaded``'s. Of ``resize`` the
    folder is a plain model with a smaller picture and interpolated position embeddings, which needs no plugin; ``loaded`` becomes it.

    allowed: counts that requests may ask for. Raises ``MllmEfficientError`` for a method or family that vLLM does not serve, and for
    a folder that holds something.
    """
    adapter = require_supported(loaded)
    base, lora = resolved(loaded.options.model, loaded.options.adapter)
    if lora is not None:
        raise MllmEfficientError(f"{lora} is an adapter of {base}, and a served folder has whole weights: merge it with PEFT first")
    if for_pictures_alone(loaded.processor):
        raise MllmEfficientError(f"a served folder of {adapter.name} has a video processor: {NEEDS_VIDEO}")
    if adapter.name not in FAMILIES and method.as_projector is not None:
        raise MllmEfficientError(f"{method.name} is not served on {adapter.name}: on {', '.join(FAMILIES)} it is")
    plain = method.as_resizer if adapter.usual() is not None else None
    if plain is None:
        require_served(method, loaded.model.config.model_type)
    elif allowed:
        raise MllmEfficientError(f"{method.name}: requests cannot ask for other counts of a smaller model: leave the allowed ones out")
    check(adapter, method)
    settings = None if plain is not None else Settings(method, tuple(allowed))
    for count in allowed:
        assert settings is not None
        settings.of_request(count)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise MllmEfficientError(f"{folder} holds something already: name a folder that is empty or not there")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with writing(folder):
            _write(loaded, adapter, method, plain, allowed, partial)
        partial.chmod(0o755)
        move(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(loaded: Loaded, adapter: Any, method: Compressor, plain: Resizer | None, allowed: Sequence[int], folder: Path) -> None:
    """The content of a served folder."""
    extra: dict[str, Any] = {}
    if plain is not None:
        _smaller(loaded, adapter, plain)
    else:
        own = {k: v for k, v in method.to_dict().items() if k != "weights"}
        extra = {"architectures": [PREFIX + served_as(adapter)], SERVED: {**own, **({ALLOWED: list(allowed)} if allowed else {})}}
    if method.as_projector is not None:
        extra[PROJECTOR] = _projector(loaded, adapter, method.as_projector, folder)
    loaded.model.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)
    if adapter.name in FAMILIES:  # others are loaded by transformers itself, under its own names
        _named_for_vllm(folder, adapter.config.vision_config.model_type in WITH_INNER)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **extra}, indent=2) + "\n")


def served_as(adapter: Any) -> str:
    """The architecture under which vLLM serves a model: its own, or that of the backend which has transformers run it."""
    if adapter.name in FAMILIES:
        return str(adapter.name)
    text = adapter.config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return next(name for name in BACKEND if ("MoE" in name) == any(getattr(text, n, None) for n in names))


def _smaller(loaded: Loaded, adapter: Any, method: Resizer) -> None:
    """Makes the model one of the smaller picture, and the processor with it."""
    shape = adapter.usual()
    full = shape.planes[-1].rows  # the picture is square
    side, _ = grid = method.target((full, full), method.budget.count(shape.n))
    adapter.become_smaller(grid)
    images = loaded.processor.image_processor
    for name in ("size", "crop_size"):
        given = getattr(images, name, None)
        if given:
            setattr(images, name, {k: None if v is None else v * side // full for k, v in dict(given).items()})


def _projector(loaded: Loaded, adapter: Any, method: Projector, folder: Path) -> dict[str, Any]:
    """Writes the projector for vLLM, beside the model's own, and as a trained folder; what builds it."""
    from safetensors.torch import save_file

    parts = parts_of(adapter, method)
    for name, value in parts.delta.items():
        loaded.model.get_parameter(name).data.copy_(value)
    save(folder / method.name, method, parts.module, base_of(loaded.model))
    tensors = {f"{PROJECTOR}.{k}": v.detach().cpu().contiguous() for k, v in parts.module.state_dict().items()}
    save_file(tensors, folder / f"{PROJECTOR}.safetensors", metadata={"format": "pt"})
    about: Any = parts.module
    return dict(about.config)


def _named_for_vllm(folder: Path, inner: bool) -> None:
    """Renames the tower's weights as vLLM looks for them, and lists the projector's in the index where there is one.

    inner: whether vLLM's tower has ``INNER`` in its names.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    renamed: dict[str, str] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, "pt") as content:
            names = {k: name_for_vllm(k) if inner else k for k in content.keys()}  # noqa: SIM118
            tensors: dict[str, Tensor] = {}
            if any(k != v for k, v in names.items()):
                tensors = {v: content.get_tensor(k) for k, v in names.items()}
        if tensors:
            save_file(tensors, file, metadata={"format": "pt"})
        renamed |= names
    index = folder / "model.safetensors.index.json"
    if index.exists():
        listed = json.loads(index.read_text())
        listed["weight_map"] = {renamed[k]: v for k, v in listed["weight_map"].items()}
        extra = folder / f"{PROJECTOR}.safetensors"
        if extra.exists():
            with safe_open(extra, "pt") as content:
                listed["weight_map"] |= dict.fromkeys(content.keys(), extra.name)
        index.write_text(json.dumps(listed, indent=2) + "\n")


def name_for_vllm(key: str) -> str:
    """What a weight of a CLIP or SigLIP tower is called in hub checkpoints, which vLLM reads alone; transformers reads both names."""
    head, found, tail = key.partition(TOWER)
    return key if not found or tail.startswith(INNER) else f"{head}{TOWER}{INNER}{tail}"
