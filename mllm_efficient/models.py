"""Loading models and processors for the commands, and describing where and how they run."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .errors import MllmEfficientError, UnsupportedModelError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

BUILTIN = "builtin"
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("int8", "int4")


@dataclass(frozen=True)
class ModelOptions:
    """The options every model command takes."""

    model: str = BUILTIN
    device: str = "auto"
    dtype: str = "auto"
    device_map: str | None = None
    attn_implementation: str | None = None
    quantization: str | None = None
    revision: str | None = None
    seed: int = 0
    trust_remote_code: bool = False


@dataclass
class Loaded:
    """A model in eval mode with its processor."""

    model: Any
    processor: Any
    options: ModelOptions

    @property
    def device(self):
        return self.model.device

    def prompt(self, question: str, images: int, videos: int = 0) -> str:
        """The chat prompt of a question about images, then videos. A question with their placeholders in it is taken as it is."""
        tokens = {"image": self.processor.image_token, "video": getattr(self.processor, "video_token", None)}
        wanted = {"image": images, "video": videos}
        if any(token and token in question for token in tokens.values()):
            for kind, token in tokens.items():
                found = question.count(token) if token else 0
                if found != wanted[kind]:
                    raise MllmEfficientError(f"the prompt has {found} {token} and {wanted[kind]} {kind}(s) are given")
            return question
        kinds = ["image"] * images + ["video"] * videos
        if not getattr(self.processor, "chat_template", None):
            return f"USER: {''.join(f'{tokens[kind]}{chr(10)}' for kind in kinds)}{question} ASSISTANT:"
        content = [*({"type": kind} for kind in kinds), {"type": "text", "text": question}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def inputs(
        self, prompts: Sequence[str], images: Sequence[Picture] = (), videos: Sequence[Sequence[Picture]] | None = None
    ) -> dict[str, Any]:
        """Left-padded model inputs on the model's device. videos: the frames of each, all of which the model is to see."""
        self.processor.tokenizer.padding_side = "left"
        call: dict[str, Any] = {"images": list(images) or None, "text": list(prompts), "return_tensors": "pt", "padding": True}
        if videos:
            import numpy as np

            call |= {"videos": [np.stack([np.asarray(frame) for frame in video]) for video in videos], "do_sample_frames": False}
        try:
            batch = self.processor(**call)
        except MllmEfficientError:
            raise
        except Exception as error:  # whatever a processor of any family raises for pictures and prompts that it does not take
            raise MllmEfficientError(f"the processor of {self.options.model} fails: {_first_line(error)}{self._cuts_off()}") from error
        batch = batch.to(self.device)
        for name in ("pixel_values", "pixel_values_videos"):
            if name in batch:
                batch[name] = batch[name].to(self.model.dtype)
        return dict(batch)

    def _cuts_off(self) -> str:
        """The usual cause of placeholders that are missing, where the tokenizer's settings have it."""
        settings = getattr(self.processor.tokenizer, "init_kwargs", {})
        if not settings.get("truncation"):
            return ""
        return f" (its tokenizer_config.json has truncation, to max_length={settings.get('max_length')}: remove both)"


def builtin_folder() -> Path:
    """The embedded model's folder inside the package."""
    return Path(str(files("mllm_efficient.eval.builtin") / "model"))


def load(options: ModelOptions) -> Loaded:
    """Loads a model by folder, hub id or ``builtin``. Raises ``MllmEfficientError`` with one line on any failure."""
    source = str(builtin_folder()) if options.model == BUILTIN else options.model
    looks_local = source.startswith((".", "/", "~")) or source.endswith("/") or source.count("/") > 1
    if looks_local:
        source = str(Path(source).expanduser())
    if looks_local and not Path(source).is_dir():
        raise MllmEfficientError(f"no model folder {source}")
    if options.revision and Path(source).is_dir():
        raise MllmEfficientError(f"--revision has no effect on the folder {source}: leave it out")
    if options.device_map and options.device != "auto":
        raise MllmEfficientError("--device has no effect with --device-map: give one of them")
    if options.dtype not in DTYPES:
        raise MllmEfficientError(f"dtype {options.dtype!r} is not one of {', '.join(DTYPES)}")
    device = pick_device(options)
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor, PretrainedConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(options.seed)
    common = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    settings: dict[str, Any] = {"dtype": options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)}
    if options.attn_implementation:
        settings["attn_implementation"] = options.attn_implementation
    if options.device_map:
        settings["device_map"] = options.device_map
    if options.quantization:
        settings["quantization_config"] = quantization_config(options.quantization, device)
        settings["device_map"] = options.device_map or device
    try:
        content, _ = PretrainedConfig.get_config_dict(source, revision=options.revision)
        _require_family(options.model, content)  # before gigabytes are read
        processor = AutoProcessor.from_pretrained(source, **common)
        model = AutoModelForImageTextToText.from_pretrained(source, use_safetensors=True, **settings, **common)
        if "device_map" not in settings:
            model = model.to(device)
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever the libraries below raise for damaged or unfitting files, or a full device
        raise MllmEfficientError(f"cannot load the model {options.model}: {_first_line(error)}") from error
    return Loaded(model.eval(), processor, options)


def _require_family(name: str, config: dict[str, Any]) -> None:
    """config: the content of ``config.json``, which transformers need not know."""
    from .patches import FAMILIES, advice_on
    from .patches.vllm import PREFIX

    made_for = [name.removeprefix(PREFIX) for name in config.get("architectures") or []]
    if made_for and not set(made_for) & set(FAMILIES):
        no_vision = "" if _has_vision(config) else " and takes no images"
        raise UnsupportedModelError(f"{name} is a {made_for[0]}, which is not supported{no_vision}{advice_on(made_for[0])}")


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
    from .patches import adapter_for

    try:
        return adapter_for(loaded.model)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{loaded.options.model}: {error}") from None


def fingerprint(loaded: Loaded) -> str:
    """What identifies the weights: commit of the hub, or a hash over the local folder's files."""
    commit = getattr(loaded.model.config, "_commit_hash", None)
    if commit:
        return str(commit)
    folder = builtin_folder() if loaded.options.model == BUILTIN else Path(loaded.options.model).expanduser()
    digest = hashlib.sha256()
    for file in [*sorted(folder.glob("*.safetensors")), folder / "config.json"]:
        if file.is_file():
            stat = file.stat()
            small = stat.st_size < 64 * 2**20
            digest.update(file.read_bytes() if small else f"{file.name}/{stat.st_size}/{stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def environment(loaded: Loaded) -> dict[str, Any]:
    """What a result depends on besides the method: versions, device, dtype, kernel, image backend, seed."""
    import torch

    versions = {"mllm_efficient": __version__, "python": platform.python_version()}
    versions |= {name: version(name) for name in ("torch", "transformers", "numpy", "pillow")}
    model, options = loaded.model, loaded.options
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "model": options.model,
        "weights": fingerprint(loaded),
        "device": f"{model.device} ({device}, {os.cpu_count()} cores)",
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config.get_text_config()._attn_implementation,
        "image_processor": type(loaded.processor.image_processor).__name__,
        "quantization": options.quantization,
        "seed": options.seed,
        "versions": versions,
    }
