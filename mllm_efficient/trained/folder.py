"""Trained methods: saved, loaded, and their parts built for a model."""

from __future__ import annotations

import json
import shutil
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..compressors.base import Compressor
from ..compressors.projector import Projector
from ..compressors.reducer import Reducer
from ..errors import MllmEfficientError, NotFiniteError, UnsupportedModelError, shortened
from ..parsing import read_json
from ..registry import build, get_method
from .base_model import differs
from .files import (
    COMPRESSION,
    CONFIG,
    DELTA,
    DELTA_KEYS,
    RANDOM,
    WEIGHTS,
    Folder,
    contents_of,
    exported,
    open_folder,
    shipped,
)
from .relocated import method_in

FULL_DELTA, LORA_DELTA, LORA_CONFIG = "model.safetensors", "adapter_model.safetensors", "adapter_config.json"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that training writes
MARK = "_installed_as"  # attribute of a projector or router that was put into a model
_kept: weakref.WeakKeyDictionary[Any, dict[str, tuple[str, Parts]]] = weakref.WeakKeyDictionary()  # beside the state of their files


# ------------------------------------------------------------------------------------------------ folders


def save(folder: Path, method: Compressor, module: nn.Module, base: dict[str, Any], about: dict[str, Any] | None = None) -> None:
    """Writes a trained method. base: ``base_of`` the model it was trained on. about: what else to remember."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in method.to_dict().items() if k != "weights"}
    sizes = {"inputs": module.inputs, "outputs": module.outputs, **module.config}  # type: ignore[dict-item]
    _write(folder / WEIGHTS, module.state_dict())
    config = {**settings, "sizes": sizes, "version": __version__, **(about or {}), "base": base}
    (folder / CONFIG).write_text(json.dumps(config) + "\n")


def save_delta(folder: Path, weights: dict[str, Tensor]) -> None:
    """Writes whole weights of the language model, by their names in the model."""
    (folder / DELTA).mkdir(parents=True, exist_ok=True)
    _write(folder / DELTA / FULL_DELTA, weights)


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    odd = [name for name, value in tensors.items() if not value.isfinite().all()]
    if odd:
        raise MllmEfficientError(f"{odd[0]} holds NaN or infinity: the training diverged, and {path} is not written")
    save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, path)


def move(partial: Path, folder: Path) -> None:
    """A finished folder to its place, in place of what is there."""
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return _sound(path, load_file(path))
    except (OSError, SafetensorError) as error:
        raise MllmEfficientError(f"cannot read {path}: {str(error).splitlines()[0]}") from error


def _sound(path: Path, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights out of a file, all finite and of a dtype that training writes."""
    for name, value in found.items():
        if value.dtype not in DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise MllmEfficientError(f"{path}: {name} is of {str(value.dtype).removeprefix('torch.')}, and weights are of {known}")
        if not value.isfinite().all():
            raise NotFiniteError(f"{path}: {name} holds NaN or infinity: the training diverged, or the file is damaged")
    return found


def load(where: str | Path, **settings: Any) -> Compressor:
    """The method in a folder that ``mllm-efficient train`` or ``export`` wrote, at the budget it was saved with unless one is given.

    Raises:
        MllmEfficientError: no such folder, or settings the method does not take.
    """
    if (Path(where).expanduser() / COMPRESSION).is_file():
        own = method_in(Path(where).expanduser()).to_dict()
        given = {"keep", "tokens", "prune"} & set(settings)
        return build({**{k: v for k, v in own.items() if not given or k not in ("keep", "tokens", "prune")}, **settings})
    served = exported(Path(where))
    if served is not None:
        name = str(served["method"])
        inside = Path(where) / name
        if inside.is_dir():
            return load(inside, **settings)
        given = {"keep", "tokens", "prune"} & set(settings)
        return build({**{k: v for k, v in served.items() if not given or k not in ("keep", "tokens", "prune")}, **settings})
    config = open_folder(str(where)).config
    cls = get_method(config["method"])
    # what a router was trained under its method reads from the folder
    own = {} if issubclass(cls, Reducer) else {k: v for k, v in config.items() if k in cls.__dataclass_fields__}
    if {"keep", "tokens", "prune"} & set(settings):
        own = {k: v for k, v in own.items() if k not in ("keep", "tokens", "prune")}
    return build({"method": config["method"], **own, **settings, "weights": str(where)})


def located(adapter: Any, method: Compressor) -> Folder | None:
    """Where a method's weights are; None for random ones. Raises ``MllmEfficientError`` where there are none, or none that fit."""
    weights = weights_of(method)
    if weights == RANDOM:
        return None
    folder = shipped(method.name) if weights is None else open_folder(weights)
    odd = "" if folder is None else differs(folder.config["base"], adapter.model)
    if folder is None or (weights is None and odd):
        raise MllmEfficientError(
            f"{method.name} is trained, and no weights of it ship for this model: give {method.name}:weights=FOLDER, "
            "which mllm-efficient train writes (weights=random is for timing alone)"
        )
    name, sizes = folder.config["method"], folder.config["sizes"]
    if name != method.name:
        raise MllmEfficientError(f"weights={weights} is a {name}, not a {method.name}")
    have, want = (sizes["inputs"], sizes["outputs"]), adapter.widths(method)
    if have != want:
        part = "projector" if method.as_projector is not None else "router"
        raise MllmEfficientError(f"{folder.path} is a {part} {have[0]} -> {have[1]}, and {adapter.name} needs {want[0]} -> {want[1]}")
    if odd:
        raise MllmEfficientError(f"{folder.path} was trained on another model: {odd}")
    if method.as_projector is not None:
        _check_sizes(adapter, method, {k: v for k, v in sizes.items() if k not in ("inputs", "outputs")}, folder.path / WEIGHTS)
    return folder


# ------------------------------------------------------------------------------------------------ parts


@dataclass(frozen=True)
class Parts:
    """What a trained method puts into a model. module: its projector or router. delta: language-model weights by name."""

    module: nn.Module
    delta: dict[str, Tensor] = field(default_factory=dict)


def parts_of(adapter: Any, method: Any) -> Parts:
    """A trained method's parts on the model's device and in its dtype. Raises ``MllmEfficientError`` for weights that do not fit."""
    if method.as_projector is not None:
        like = _replaced(adapter, method.as_projector)
    else:
        like = next(adapter.slot(method)[0].layers[-1].parameters())
        if like.is_meta and any(hasattr(m, "_hf_hook") for m in adapter.slot(method)[0].layers[-1].modules()):
            like = torch.empty(0, dtype=adapter.model.dtype)  # offloaded layers: the router is small, and stays on the CPU
    folder = located(adapter, method)
    config = {} if folder is None else {k: v for k, v in folder.config["sizes"].items() if k not in ("inputs", "outputs")}
    if method.as_reducer is not None:
        sizes = method.sizes(adapter.decoder_layers)
        if folder is not None and method.has_router and config != sizes:
            raise MllmEfficientError(f"{folder.path} has routers for {config}, and {method.spec()} needs {sizes}")
        config = config or sizes
    if folder is not None and method.as_reducer is not None:
        _check_sizes(adapter, method, config, folder.path / WEIGHTS)
    with torch.device(like.device), torch.random.fork_rng(enabled=not like.is_meta):
        if not like.is_meta:
            torch.manual_seed(0)
        module = method.module(*adapter.widths(method), **config)
    if folder is not None:
        module.load_state_dict(_read(folder.path / WEIGHTS))
    dtype = like.dtype if like.dtype.is_floating_point else adapter.model.dtype
    delta = delta_weights(adapter.model, folder.delta) if folder is not None and folder.delta is not None else {}
    return Parts(module.to(dtype).eval().requires_grad_(like.requires_grad), delta)


def _replaced(adapter: Any, method: Projector) -> Tensor:
    """A weight of the model's own projector, whose place another can take."""
    owner, name = adapter.projector_at
    own = owner._modules[name]
    if type(own).__name__ == "ModulesToSaveWrapper" or any("lora_" in n for n, _ in own.named_parameters()):
        raise UnsupportedModelError(f"the projector belongs to a PEFT adapter, so {method.name} cannot take its place: unload it first")
    like = next(own.parameters())
    if like.is_meta and any(hasattr(m, "_hf_hook") for m in own.modules()):
        raise UnsupportedModelError(f"the projector is offloaded, so {method.name} cannot take its place: keep it on a device")
    return like


def _state_of(method: Compressor) -> str:
    """A hash of every file that a method's weights are in."""
    weights = weights_of(method)
    folder = Path(str(weights)).expanduser()
    return "" if weights in (None, RANDOM) or not folder.is_dir() else contents_of(folder)


def weights_of(method: Compressor) -> str | None:
    """The folder, hub id or "random" that a trained method names."""
    return method.weights


def mark(method: Compressor) -> str:
    """The method without its budget. A router's random weights depend on its settings."""
    if method.as_reducer is not None and weights_of(method) == RANDOM:
        settled: dict[str, Any] = method.settled  # type: ignore[attr-defined]
        return f"{method.name}:weights={RANDOM},at={settled['at']},kernels={settled['kernels']}"
    return f"{method.name}:weights={weights_of(method)}" if weights_of(method) else method.name


def held(adapter: Any) -> str | None:
    """``mark`` of the trained method whose projector or router a model holds."""
    parts = [adapter.router] if adapter.router is not None else []
    if adapter.projects:
        owner, name = adapter.projector_at
        parts += owner._modules[name].modules()
    return next((m.__dict__[MARK] for m in parts if MARK in m.__dict__), None)


def require_held(adapter: Any, method: Compressor) -> None:
    """Raises where a model holds the weights of another trained method than this one is of."""
    part, there = method.installs, held(adapter)
    # a projector without weights is the one held
    named = part is not None and (weights_of(part) is not None or part.as_reducer is not None)
    if part is not None and there is not None and named and there != mark(part):
        raise MllmEfficientError(f"the model holds {there}, so {method.spec()} cannot run on it: unwrap it first")


def module_of(adapter: Any, method: Projector) -> nn.Module:
    """The projector of a method, on the model's device and dtype: the one put into the model, else one kept beside it.

    A method that names no weights is the one that the model holds. Raises ``MllmEfficientError`` for weights that do not
    fit, or that bring a language model of their own and are not installed.
    """
    owner, name = adapter.projector_at
    if held(adapter) is not None:
        require_held(adapter, method)
        return getattr(owner, name)
    cache = _kept.setdefault(adapter.model, {})
    state, (made_of, made) = _state_of(method), cache.get(mark(method), ("", None))
    if made is None or made_of != state:
        made = parts_of(adapter, method)
        if made.delta:
            raise MllmEfficientError(f"{method.spec()} was trained with the language model: use wrap or compressed, which put both in")
        cache[mark(method)] = state, made
    like = next(getattr(owner, name).parameters())
    return made.module.to(like.device, like.dtype if like.dtype.is_floating_point else None)


def _check_sizes(adapter: Any, method: Any, config: dict[str, Any], path: Path) -> None:
    """Raises where what a folder's configuration describes is not what its weights are, before any memory is taken for it."""
    from safetensors import SafetensorError, safe_open

    try:
        with torch.device("meta"):
            own = {k: list(v.shape) for k, v in method.module(*adapter.widths(method), **config).state_dict().items()}
    except (TypeError, ValueError, RuntimeError, OverflowError, MemoryError) as error:
        raise MllmEfficientError(f"{path.parent / CONFIG}: no {method.name} has these sizes: {shortened(error, 160)}") from error
    try:
        with safe_open(path, "pt") as file:
            there = {k: list(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise MllmEfficientError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
    missing, extra = sorted(set(own) - set(there)), sorted(set(there) - set(own))
    odd = [k for k in own if k in there and own[k] != there[k]]
    if missing or extra or odd:
        wrong = {"lacks": missing, "has unknown": extra, "has a wrong size of": odd}
        raise MllmEfficientError(f"{path} " + " and ".join(f"{what} {', '.join(keys)}" for what, keys in wrong.items() if keys))


def delta_weights(model: Any, folder: Path) -> dict[str, Tensor]:
    """The weights that a ``base_delta`` puts in place of a model's own, by name, on its device and in its dtype."""
    own = dict(model.named_parameters())
    if any(".lora_" in name for name in own):
        raise UnsupportedModelError(f"the model has a LoRA, and {folder} brings weights of its own: merge or unload the LoRA first")
    if (folder / COMPRESSION).is_file():
        new, path = _among_the_base(folder), folder
    elif (folder / FULL_DELTA).is_file():
        new, path = _read(folder / FULL_DELTA), folder / FULL_DELTA
    else:
        new, path = _merged_lora(own, folder), folder / LORA_DELTA
    out = {}
    for name, value in new.items():
        old = own.get(name)
        if old is None or old.shape != value.shape:
            raise MllmEfficientError(f"{path}: {name} is no weight of this model, or of another size")
        if old.is_meta or not old.dtype.is_floating_point or type(old.data) is not Tensor:
            raise UnsupportedModelError(f"{name} is offloaded or quantized, and {path} would take its place: load the model without that")
        out[name] = value.to(old.device, old.dtype)
    return out


def _among_the_base(folder: Path) -> dict[str, Tensor]:
    """The weights of the language model that were trained under a method, out of a saved model's own files."""
    from safetensors import safe_open

    out = dict[str, Tensor]()
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, "pt") as content:
            names = [name for name in content.keys() if name.startswith(DELTA_KEYS)]  # noqa: SIM118
            out |= _sound(file, {name.removeprefix(DELTA_KEYS): content.get_tensor(name) for name in names})
    return out


def _merged_lora(own: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """W + alpha / r B A for every matrix of a LoRA, as PEFT saves one."""
    state = _read(folder / LORA_DELTA)
    try:
        config = read_json(folder / LORA_CONFIG)
        scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise MllmEfficientError(f"{folder / LORA_CONFIG} is not a LoRA's configuration ({error})") from None
    left, out = set(state), {}
    for key, a in state.items():
        other = key.replace(".lora_A.", ".lora_B.")
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") + ".weight"
        if not key.endswith(".lora_A.weight") or name not in own or other not in state:
            continue
        weight = own[name]
        product = state[other].to(weight.device, torch.float32) @ a.to(weight.device, torch.float32)
        out[name] = (weight.detach().float() + scale * product).to(weight.dtype)
        left -= {key, other}
    if left or not out:
        odd = f"{sorted(left)[0]} belongs to no weight of this model" if left else "there is nothing in it"
        raise MllmEfficientError(f"{folder / LORA_DELTA}: {odd}")
    return out
