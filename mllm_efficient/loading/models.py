"""Loading models and processors for the commands, and describing where and how they run."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..embedded import FIRST, model_source
from ..errors import MllmEfficientError, UnsupportedModelError
from ..patches.pictures import merged, read_settings
from . import lora as adapters
from .processor import apply, digest, image_settings, open_processor
from .prompts import PLAIN, TEMPLATE, has_template, model_inputs, note, question_prompt, rendered, require_pictures

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

BUILTIN = FIRST
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("int8", "int4")


@dataclass(frozen=True)
class ModelOptions:
    """The options every model command takes.

    model: a folder, hub id or an embedded model's name ("builtin", "builtin-qwen" ...); of a folder with an adapter (LoRA) its base is
    loaded and the adapter put on it. adapter: such a folder, for ``model``. processor_kwargs: settings of the image processor, such as
    ``{"max_pixels": 1003520}``.
    """

    model: str = BUILTIN
    device: str = "auto"
    dtype: str = "auto"
    device_map: str | None = None
    attn_implementation: str | None = None
    quantization: str | None = None
    revision: str | None = None
    seed: int = 0
    trust_remote_code: bool = False
    adapter: str | None = None
    processor_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Loaded:
    """A model in eval mode with its processor.

    in_memory: a user's object, whose weights need not be those of the folder it names. call: what each of its calls has to say beside
    what the processor makes.
    """

    model: Any
    processor: Any
    options: ModelOptions
    in_memory: bool = False
    call: Mapping[str, Any] = field(default_factory=dict)

    @property
    def device(self):
        return self.model.device

    @property
    def picture_settings(self) -> dict[str, Any]:
        """What is known of how its processor sees pictures: its own settings, or without one those of the model's folder."""
        if self.processor is not None:
            return image_settings(self.processor)
        folder = Path(adapters.resolved(self.options.model, self.options.adapter)[0]).expanduser()
        return merged(read_settings(folder), self.options.processor_kwargs)

    @property
    def notes(self) -> list[str]:
        """What to tell the reader of how this model is asked."""
        line = None if self.processor is None else note(self.processor, self.options.model)
        return [] if line is None else [line]

    def prompt(self, question: str, images: int, videos: int = 0) -> str:
        """The chat prompt of a question about images, then videos, which stand where its placeholders do, or in front."""
        return question_prompt(self.processor, question, images, videos, self.options.model)

    def conversation(self, messages: Sequence[Mapping[str, Any]], images: int) -> str:
        """The chat prompt of messages, ``{"type": "image"}`` where a picture stands. Raises where those are not ``images``."""
        text = rendered(self.processor, messages, name=self.options.model)
        require_pictures(self.processor, text, images)
        return text

    def inputs(
        self, prompts: Sequence[str], pictures: Sequence[Any] = (), videos: Sequence[Sequence[Picture]] | None = None
    ) -> dict[str, Any]:
        """Left-padded model inputs on the model's device, as ``prompts.model_inputs`` makes them."""
        try:
            batch = model_inputs(self.processor, prompts, pictures, videos)
        except MllmEfficientError:
            raise
        except Exception as error:  # whatever a processor of any family raises for pictures and prompts that it does not take
            raise MllmEfficientError(f"the processor of {self.options.model} fails: {_first_line(error)}{self._cuts_off()}") from error
        batch = {k: v.to(self.device) if hasattr(v, "to") else v for k, v in batch.items()}
        for name in ("pixel_values", "pixel_values_videos"):
            if name in batch:
                batch[name] = batch[name].to(self.model.dtype)
        return {**batch, **self.call} if "pixel_values" in batch else batch

    def _cuts_off(self) -> str:
        """The usual cause of placeholders that are missing, where the tokenizer's settings have it."""
        settings = getattr(self.processor.tokenizer, "init_kwargs", {})
        if not settings.get("truncation"):
            return ""
        return f" (its tokenizer_config.json has truncation, to max_length={settings.get('max_length')}: remove both)"


def builtin_folder() -> Path:
    """The first embedded model's folder inside the package."""
    return Path(model_source(BUILTIN))


def require_options(options: ModelOptions) -> tuple[str, str | None]:
    """Where the model and its adapter are read from. Raises ``MllmEfficientError`` for whatever can be known without torch."""
    base, adapter = adapters.resolved(options.model, options.adapter)
    source = model_source(base)
    looks_local = source.startswith((".", "/", "~")) or source.endswith("/") or source.count("/") > 1
    if looks_local:
        source = str(Path(source).expanduser())
    if looks_local and not Path(source).is_dir():
        raise MllmEfficientError(f"no model folder {source}{adapters.without_base(options.model)}")
    if options.revision and Path(source).is_dir():
        raise MllmEfficientError(f"--revision has no effect on the folder {source}: leave it out")
    if options.device_map and options.device != "auto":
        raise MllmEfficientError("--device has no effect with --device-map: give one of them")
    if options.dtype not in DTYPES:
        raise MllmEfficientError(f"dtype {options.dtype!r} is not one of {', '.join(DTYPES)}")
    if options.quantization is not None and options.quantization not in QUANTIZATIONS:
        raise MllmEfficientError(f"quantization {options.quantization!r} is not one of {', '.join(QUANTIZATIONS)}")
    return source, adapter


def load(options: ModelOptions) -> Loaded:
    """Loads a model by folder, hub id or an embedded one's name. Raises ``MllmEfficientError`` with one line on any failure."""
    source, adapter = require_options(options)
    device = pick_device(options)
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(options.seed)
    common = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    settings: dict[str, Any] = {"dtype": options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)}
    if options.attn_implementation:
        from ..patches.anchor import require_registered

        require_registered(options.attn_implementation)
        settings["attn_implementation"] = options.attn_implementation
    if options.device_map:
        settings["device_map"] = options.device_map
    if options.quantization:
        settings["quantization_config"] = quantization_config(options.quantization, device)
        settings["device_map"] = options.device_map or device
    try:
        content, _ = PretrainedConfig.get_config_dict(source, revision=options.revision)
        _require_family(options.model, content)  # before gigabytes are read
        config = AutoConfig.from_pretrained(source, **common)
        processor = open_processor(source, config, **common)
        apply(processor, config, options.processor_kwargs)
        model = AutoModelForImageTextToText.from_pretrained(source, config=config, use_safetensors=True, **settings, **common)
        if "device_map" not in settings:
            model = model.to(device)
        if adapter is not None:
            adapters.attach(model, adapter)
    except MllmEfficientError:
        raise
    except Exception as error:  # whatever the libraries below raise for damaged or unfitting files, or a full device
        away = "" if Path(source).is_dir() else adapters.without_base(options.model)
        raise MllmEfficientError(f"cannot load the model {options.model}: {_first_line(error)}{away}") from error
    return Loaded(model.eval(), processor, options)


def _require_family(name: str, config: dict[str, Any]) -> None:
    """config: the content of ``config.json``, which transformers need not know."""
    from ..patches import FAMILIES, advice_on, is_supported, require_present
    from ..patches.vllm import BACKEND, PREFIX

    kind = str(config.get("model_type"))
    made_for = [name.removeprefix(PREFIX) for name in config.get("architectures") or []]
    made_for = [next((cls for cls, known in FAMILIES.items() if known == kind), kind) if name in BACKEND else name for name in made_for]
    if made_for and not is_supported(made_for, kind):
        no_vision = "" if _has_vision(config) else " and takes no images"
        raise UnsupportedModelError(f"{name} is a {made_for[0]}, which is not supported{no_vision}{advice_on(made_for[0], kind)}")
    for cls in made_for:
        require_present(FAMILIES.get(cls, kind))


def _has_vision(config: Any) -> bool:
    """Whether a part of a configuration is about vision, however deep."""
    return isinstance(config, dict) and any("vision" in key or _has_vision(value) for key, value in config.items())


def pick_device(options: ModelOptions) -> str:
    """The device asked for, by torch's name. Raises ``MllmEfficientError`` where there is none such."""
    import torch

    if options.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise MllmEfficientError(f"device {options.device!r} cannot be used: {_first_line(error)}") from None
    return options.device


def quantization_config(kind: str, device: str) -> Any:
    """What transformers takes for "int8" or "int4" weights. Raises ``MllmEfficientError`` where the device cannot."""
    if kind not in QUANTIZATIONS:
        raise MllmEfficientError(f"quantization {kind!r} is not one of {', '.join(QUANTIZATIONS)}")
    try:
        version("torchao")
    except PackageNotFoundError:
        raise MllmEfficientError(f"{kind} weights need torchao: pip install torchao") from None
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    if kind == "int4" and not device.startswith("cuda"):
        raise MllmEfficientError("int4 weights need a CUDA device: use int8 here")
    return TorchAoConfig(Int8WeightOnlyConfig() if kind == "int8" else Int4WeightOnlyConfig())


def _first_line(error: Exception) -> str:
    """The first sentence of a library's message, without its advice on how to log in to a hub."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0]


def require_supported(loaded: Loaded):
    """The model's adapter, or one line naming the supported families."""
    from ..patches import adapter_for

    try:
        return adapter_for(loaded.model)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{loaded.options.model}: {error}") from None


def fingerprint(loaded: Loaded) -> str:
    """What identifies the weights: commit of the hub, or a hash over the local folder's files.

    Of a model in memory: a hash over its tensors and how it generates.
    """
    if loaded.in_memory:
        return _digest_of_tensors(loaded.model)
    commit = getattr(loaded.model.config, "_commit_hash", None)
    if commit:
        return str(commit)
    base, _ = adapters.resolved(loaded.options.model, loaded.options.adapter)
    folder = Path(model_source(base)).expanduser()
    digest = hashlib.sha256()
    for file in [*sorted(folder.glob("*.safetensors")), folder / "config.json"]:
        if file.is_file():
            stat = file.stat()
            small = stat.st_size < 64 * 2**20
            digest.update(file.read_bytes() if small else f"{file.name}/{stat.st_size}/{stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def _digest_of_tensors(model: Any) -> str:
    """A hash over name, shape, dtype and every bit of every tensor, and over how the model generates."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing holds no lock: a few tensors at a time
        parts = list(pool.map(_digest_of_tensor, *zip(*sorted(model.state_dict().items()))))
    generation = getattr(model, "generation_config", None)
    said = {} if generation is None else generation.to_diff_dict()
    said = {name: value for name, value in said.items() if name not in ("transformers_version", "_from_model_config")}
    return hashlib.sha256("".join([*parts, json.dumps(said, sort_keys=True, default=str)]).encode()).hexdigest()[:16]


def _digest_of_tensor(name: str, tensor: Any) -> str:
    import torch

    if hasattr(tensor, "dequantize") and type(tensor).__module__.startswith("torchao"):
        tensor = tensor.dequantize()
    digest = hashlib.sha256(f"{name}/{tuple(tensor.shape)}/{tensor.dtype}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def release() -> str:
    """The release of this package, ``MAJOR.MINOR.PATCH``: what results are compared by. The whole version names a commit."""
    return re.sub(r"[^0-9.].*", "", __version__).rstrip(".")


def environment(loaded: Loaded) -> dict[str, Any]:
    """What a result depends on besides the method: weights, versions, device, dtype, kernel, how prompts are made, seed."""
    import torch

    versions = {"mllm_efficient": release(), "python": platform.python_version()}
    versions |= {name: version(name) for name in ("torch", "transformers", "numpy", "pillow")}
    model, options = loaded.model, loaded.options
    _, adapter = adapters.resolved(options.model, options.adapter)
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "model": options.model,
        "weights": fingerprint(loaded),
        "adapter": None if adapter is None else {"name": Path(adapter).name, "weights": adapters.fingerprint(adapter)},
        "device": f"{model.device} ({device}, {os.cpu_count()} cores)",
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config.get_text_config()._attn_implementation,
        "image_processor": type(loaded.processor.image_processor).__name__,
        "processor_kwargs": dict(options.processor_kwargs),
        "processor": digest(loaded.processor),
        "prompt": TEMPLATE if has_template(loaded.processor) else PLAIN,
        "quantization": options.quantization,
        "seed": options.seed,
        "versions": versions,
    }
