"""Trained methods as folders: written by ``mllm-efficient train``, read by ``me.load``, put into a model and taken out again.

A folder has ``config.json`` (method, sizes, the base model's fingerprint), ``compressor.safetensors``, and, where the
language model was trained with it, ``base_delta/``: whole weights in ``model.safetensors``, or a LoRA as PEFT saves it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import __version__
from .compressors.base import Compressor, Projector
from .compressors.reducer import Reducer
from .errors import MllmEfficientError, UnsupportedModelError

CONFIG, WEIGHTS, DELTA = "config.json", "compressor.safetensors", "base_delta"
FULL_DELTA, LORA_DELTA, LORA_CONFIG = "model.safetensors", "adapter_model.safetensors", "adapter_config.json"
RANDOM = "random"
MARK = "_installed_as"  # attribute of a projector that stands in a model's own one's place
_loaded: weakref.WeakKeyDictionary[Any, dict[tuple[str, str], nn.Module]] = weakref.WeakKeyDictionary()


def base_fingerprint(model: Any) -> str:
    """Names a base model by its sizes and its norms, in whatever dtype it is loaded, bare or under PEFT."""
    from .patches import inner_model

    inner = inner_model(model)
    text, vision = inner.config.get_text_config(), inner.config.vision_config
    sizes = [getattr(c, name, None) for c in (text, vision) for name in ("hidden_size", "num_hidden_layers", "intermediate_size")]
    digest = hashlib.sha256(json.dumps([inner.config.model_type, *sizes]).encode())
    for name, parameter in sorted(inner.named_parameters()):
        if "norm" in name and parameter.ndim == 1 and not parameter.is_meta and "multi_modal_projector" not in name:
            digest.update(parameter.detach().to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Folder:
    """A trained method on disk. config: its ``config.json``."""

    path: Path
    config: dict[str, Any]

    @property
    def delta(self) -> Path | None:
        """The weights of the language model that were trained with it."""
        path = self.path / DELTA
        return path if path.is_dir() else None

    def state(self) -> dict[str, Tensor]:
        return _read(self.path / WEIGHTS)


def save(folder: Path, method: Compressor, module: nn.Module, base: str, about: dict[str, Any]) -> None:
    """Writes a trained method. base: ``base_fingerprint`` of the model it was trained on. about: what else to remember."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in method.to_dict().items() if k != "weights"}
    sizes = {"inputs": module.inputs, "outputs": module.outputs, **module.config}  # type: ignore[dict-item]
    config = {**settings, "sizes": sizes, "base": {"fingerprint": base, **about.pop("base", {})}, "version": __version__, **about}
    save_file({k: v.detach().contiguous().cpu() for k, v in module.state_dict().items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")


def save_delta(folder: Path, weights: dict[str, Tensor]) -> None:
    """Writes whole weights of the language model, by their names in the model."""
    from safetensors.torch import save_file

    (folder / DELTA).mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().contiguous().cpu() for k, v in weights.items()}, folder / DELTA / FULL_DELTA)


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
        config = json.loads((path / CONFIG).read_text())
    except OSError:
        raise MllmEfficientError(f"weights={where}: no {CONFIG} there; mllm-efficient train writes such a folder") from None
    except ValueError:
        raise MllmEfficientError(f"weights={where}: {CONFIG} is not JSON") from None
    if not isinstance(config, dict) or not {"method", "sizes", "base"} <= set(config):
        raise MllmEfficientError(f"weights={where}: {CONFIG} describes no trained method")
    return Folder(path, config)


def load(where: str | Path, **settings: Any) -> Compressor:
    """The method in a folder that ``mllm-efficient train`` wrote, at the budget it was saved with unless one is given.

    Raises:
        MllmEfficientError: no such folder, or settings the method does not take.
    """
    from .registry import build, get_method

    config = open_folder(str(where)).config
    cls = get_method(config["method"])
    names = {f for f in cls.__dataclass_fields__ if f not in ("weights",)}
    own = {k: v for k, v in config.items() if k in names}
    if {"keep", "tokens", "prune"} & set(settings):
        own = {k: v for k, v in own.items() if k not in ("keep", "tokens", "prune")}
    built = build({"method": config["method"], **own, **settings, "weights": str(where)})
    assert isinstance(built, Compressor)
    return built


def located(adapter: Any, method: Compressor) -> Folder | None:
    """Where a method's weights are; None for random ones. Raises ``MllmEfficientError`` where there are none."""
    given = getattr(method, "weights", None)
    if given == RANDOM:
        return None
    folder = open_folder(given) if given else _shipped(adapter, method)
    if folder is None:
        raise MllmEfficientError(
            f"{method.name} is trained, and no weights of it ship for this model: give {method.name}:weights=FOLDER, "
            "which mllm-efficient train writes (weights=random is for timing alone)"
        )
    if folder.config["method"] != method.name:
        raise MllmEfficientError(f"weights={given} is a {folder.config['method']}, not a {method.name}")
    return folder


def _shipped(adapter: Any, method: Compressor) -> Folder | None:
    """What ships for the embedded model, if this is it."""
    from importlib.resources import files

    path = Path(str(files("mllm_efficient.eval.builtin") / "trained" / method.name))
    if not (path / CONFIG).is_file():
        return None
    folder = open_folder(str(path))
    return folder if folder.config["base"]["fingerprint"] == base_fingerprint(adapter.model) else None


def held(adapter: Any) -> str | None:
    """The name and weights of the trained method whose projector a model holds."""
    if not adapter.projects:
        return None
    owner, name = adapter.projector_at
    return next((m.__dict__[MARK] for m in owner._modules[name].modules() if MARK in m.__dict__), None)


def module_of(adapter: Any, method: Projector) -> nn.Module:
    """The projector of a method, on the model's device and dtype: the one put into the model, else one kept beside it.

    Raises ``MllmEfficientError`` for weights that do not fit the model, or that bring a language model of their own and
    are not installed.
    """
    key = method.weights or ""
    owner, name = adapter.projector_at
    if held(adapter) is not None:
        if held(adapter) != _mark(method):
            raise MllmEfficientError(f"the model holds {held(adapter)}, so {method.spec()} cannot run on it: unwrap it first")
        return getattr(owner, name)
    cache = _loaded.setdefault(adapter.model, {})
    if (method.name, key) not in cache:
        folder = located(adapter, method)
        if folder is not None and folder.delta is not None:
            raise MllmEfficientError(f"{method.spec()} was trained with the language model: use wrap or compressed, which put both in")
        cache[method.name, key] = _build(adapter, method, folder)
    return cache[method.name, key]


def _build(adapter: Any, method: Projector, folder: Folder | None) -> nn.Module:
    inputs, outputs = adapter.projector_widths
    like = next(getattr(*adapter.projector_at).parameters())
    config = {} if folder is None else {k: v for k, v in folder.config["sizes"].items() if k not in ("inputs", "outputs")}
    if folder is not None:
        sizes = folder.config["sizes"]
        if (sizes["inputs"], sizes["outputs"]) != (inputs, outputs):
            have, want = f"{sizes['inputs']} -> {sizes['outputs']}", f"{inputs} -> {outputs}"
            raise MllmEfficientError(f"{folder.path} is a projector {have}, and {adapter.name} needs {want}")
        base, this = folder.config["base"]["fingerprint"], base_fingerprint(adapter.model)
        if base != this:
            raise MllmEfficientError(f"{folder.path} was trained on another model (fingerprint {base}, this one is {this})")
    floating = like.dtype if like.dtype.is_floating_point else torch.float32
    with torch.device(like.device), torch.random.fork_rng(enabled=not like.is_meta):
        if not like.is_meta:
            torch.manual_seed(0)
        module = method.module(inputs, outputs, **config)
    if folder is not None:
        _fill(module, folder.state(), folder.path / WEIGHTS)
    return module.to(floating).eval().requires_grad_(False)


def _fill(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Loads a state; every key must be there and none may be left over."""
    own = module.state_dict()
    missing, extra = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    odd = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing or extra or odd:
        wrong = {"lacks": missing, "has unknown": extra, "has a wrong size of": odd}
        raise MllmEfficientError(f"{path} " + " and ".join(f"{what} {', '.join(keys)}" for what, keys in wrong.items() if keys))
    module.load_state_dict(state)


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise MllmEfficientError(f"cannot read {path}: {str(error).splitlines()[0]}") from error


class Undo:
    """What ``install`` changed; calling it puts everything back, on the device and in the dtype the model has by then."""

    def __init__(self) -> None:
        self.parts = list[tuple[dict[str, Any], str, Any]]()

    def put(self, store: dict[str, Any], name: str, value: Any) -> None:
        self.parts.append((store, name, store[name]))
        store[name] = value

    def __call__(self) -> None:
        for store, name, old in reversed(self.parts):
            now = store[name]
            if isinstance(old, nn.Module):
                like = next(now.parameters())
                old.to(like.device)
            elif old.device != now.device:
                old.data = old.data.to(now.device)
            store[name] = old
        self.parts.clear()


def _mark(method: Projector) -> str:
    return f"{method.name}:weights={method.weights}" if method.weights else method.name


def install(adapter: Any, method: Compressor, module: nn.Module | None = None) -> Undo:
    """Puts a trained method's parts into a model: its projector, and the language-model weights trained with it.

    Weights are swapped by reference. module: a projector to put in instead of the folder's, for training. A method
    without trained parts changes nothing.
    """
    undo, part = Undo(), method.installs
    if part is None:
        return undo
    method = part
    if held(adapter) is not None:
        raise UnsupportedModelError(f"the model holds {held(adapter)} already: unwrap it first")
    owner, name = adapter.projector_at
    if type(owner._modules[name]).__name__ == "ModulesToSaveWrapper":
        raise UnsupportedModelError(f"the projector belongs to a PEFT adapter (modules_to_save), so {method.name} cannot take its place")
    folder = None if module is not None else located(adapter, method)
    module = module or _build(adapter, method, folder)
    try:
        undo.put(owner._modules, name, module)
        if folder is not None and folder.delta is not None:
            for full_name, value in delta_weights(adapter.model, folder.delta).items():
                path, _, leaf = full_name.rpartition(".")
                undo.put(adapter.model.get_submodule(path)._parameters, leaf, nn.Parameter(value, requires_grad=False))
            _tie(adapter.model, undo)
    except BaseException:
        undo()
        raise
    module.__dict__[MARK] = _mark(method)
    return undo


@contextlib.contextmanager
def inside(adapter: Any) -> Iterator[None]:
    """The hooks of in-decoder methods on the model."""
    adapter.reach_inside()
    try:
        yield
    finally:
        adapter.let_go_inside()


@contextlib.contextmanager
def installed(model: Any, method: Compressor | None) -> Iterator[None]:
    """What a method puts into a model, inside the block: the parts of a trained one, the hooks of one in the decoder.

    Nothing for a method that has none or a model that holds them.
    """
    from .patches import adapter_for

    adapter = adapter_for(model)
    if isinstance(method, Reducer):
        with inside(adapter):
            yield
        return
    if method is None or method.installs is None or held(adapter) is not None:
        yield
        return
    undo = install(adapter, method)
    try:
        yield
    finally:
        undo()


def delta_weights(model: Any, folder: Path) -> dict[str, Tensor]:
    """The weights that a ``base_delta`` puts in place of a model's own, by name, on its device and in its dtype."""
    own = dict(model.named_parameters())
    if (folder / FULL_DELTA).is_file():
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


def _merged_lora(own: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """W + alpha / r B A for every matrix of a LoRA, as PEFT saves one."""
    state = _read(folder / LORA_DELTA)
    try:
        config = json.loads((folder / LORA_CONFIG).read_text())
        scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    except (OSError, ValueError, KeyError) as error:
        raise MllmEfficientError(f"{folder / LORA_CONFIG} is not a LoRA's configuration ({error})") from None
    out = {}
    for key, a in state.items():
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") + ".weight"
        b = state.get(key.replace(".lora_A.", ".lora_B."))
        if name not in own or b is None:
            raise MllmEfficientError(f"{folder / LORA_DELTA}: {key} belongs to no weight of this model")
        weight = own[name]
        product = b.to(weight.device, torch.float32) @ a.to(weight.device, torch.float32)
        out[name] = (weight.detach().float() + scale * product).to(weight.dtype)
    return out


def _tie(model: Any, undo: Undo) -> None:
    """A head that is tied to the embedding follows it."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and any(store is embedding._parameters and old is head._parameters["weight"] for store, _, old in undo.parts)
    if tied:
        undo.put(head._parameters, "weight", embedding._parameters["weight"])


def or_random(method: Compressor) -> Compressor:
    """The method with random weights where it has none: for shapes without weights, whose cost does not depend on them."""
    return replace(method, weights=RANDOM) if isinstance(method, Projector) and method.weights is None else method
