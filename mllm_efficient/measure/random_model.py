"""Models of any shape with random weights, made on the device: latency does not ask what the weights are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..embedded import model_source
from ..errors import MllmEfficientError, UnsupportedModelError, did_you_mean
from ..loading.lora import base_of_folder, without_base
from ..loading.models import (
    DTYPES,
    Loaded,
    ModelOptions,
    environment,
    pick_device,
    quantization_config,
)
from ..patches.anchor import require_registered
from ..patches.pictures import SHARED, read_object
from ..patches.rules import rules_class
from .depth import shallower
from .shapes import shape_config, shape_names

SCALE = 0.02
BLOCK = 2**22 - 3  # values drawn for a tensor; a larger one repeats them, at a distance that no row length divides


def config_of(source: str) -> Any:
    """The transformers config of a shape's name, of an embedded model, of a config.json or of a folder that has one."""
    from transformers import AutoConfig

    from ..patches import FAMILIES

    given, source = source, base_of_folder(source) or source
    source = model_source(source)
    try:
        if source in shape_names():
            config = AutoConfig.for_model(**shape_config(source))
        elif Path(source).expanduser().exists():
            _require_present(Path(source).expanduser())
            config = AutoConfig.from_pretrained(str(Path(source).expanduser()))
        else:
            known = shape_names()
            hint = did_you_mean(source, known)
            away = without_base(given, weights=False)
            raise MllmEfficientError(f"--random-weights: no shape {source!r}{hint}: a config.json or one of {', '.join(known)}{away}")
    except MllmEfficientError:
        raise
    except Exception as error:  # whatever transformers raises for a file that is no configuration
        raise MllmEfficientError(f"--random-weights: {source} is not a model's configuration: {str(error).splitlines()[0]}") from error
    made_for = set(getattr(config, "architectures", None) or ())
    if not made_for & set(FAMILIES):
        what = ", ".join(made_for) or type(config).__name__
        raise UnsupportedModelError(f"{source} describes a {what}: the model must be one of {', '.join(FAMILIES)}")
    return config


def _require_present(path: Path) -> None:
    """Raises ``UnsupportedModelError`` for a config.json, or a folder with one, of a family that this transformers does not have."""
    from ..patches import FAMILIES, require_present

    try:
        kind = str(read_object(path / "config.json" if path.is_dir() else path).get("model_type"))
    except MllmEfficientError:  # transformers says more of a damaged file
        return
    if kind in FAMILIES.values():
        require_present(kind)


def random_model(options: ModelOptions, layers: int | None = None) -> Loaded:
    """A model of the shape ``options.model``, without a processor, its weights drawn from ``options.seed``.

    layers: of the language model, and at most as many of the tower; None for all. dtype "auto" is bfloat16 on an accelerator and float32 on
    a CPU. Nothing is downloaded, and nothing is made on the CPU for another device. Raises ``MllmEfficientError`` for options that say
    where weights come from.
    """
    for name in ("device_map", "revision", "trust_remote_code", "adapter"):
        if getattr(options, name):
            raise MllmEfficientError(f"--{name.replace('_', '-')} has no effect with --random-weights: leave it out")
    if options.dtype not in DTYPES:
        raise MllmEfficientError(f"dtype {options.dtype!r} is not one of {', '.join(DTYPES)}")
    device = pick_device(options)
    quantization = quantization_config(options.quantization, device) if options.quantization else None
    config = config_of(options.model)
    if layers is not None:
        config = shallower(config, layers)
    rules_class(config.model_type)(options.model, config).require_counting(options.processor_kwargs)
    for name in SHARED:
        if name in options.processor_kwargs:
            setattr(config, name, options.processor_kwargs[name])
    usual = "float32" if torch.device(device).type == "cpu" else "bfloat16"
    options = replace(options, dtype=usual if options.dtype == "auto" else options.dtype)
    try:
        model = _build(config, device, getattr(torch, options.dtype), options)
        if quantization is not None:
            _quantize(model, quantization)
    except Exception as error:  # whatever the libraries below raise for odd sizes, kernels that are not there, or a full device
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MllmEfficientError(f"cannot build {options.model} with random weights: {reason}") from error
    return Loaded(model.eval(), None, options)


def _build(config: Any, device: str, dtype: torch.dtype, options: ModelOptions) -> Any:
    from transformers import AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    require_registered(options.attn_implementation)
    more = {"attn_implementation": options.attn_implementation} if options.attn_implementation else {}
    with torch.device(device), no_init_weights():
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, **more)
    model.tie_weights()  # which no_init_weights leaves out
    generator = torch.Generator(device).manual_seed(options.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.fill_(1)  # norms
            elif parameter.ndim == 1 and name.endswith("bias"):
                parameter.zero_()
            else:
                _draw(parameter.view(-1), generator)
    model.generation_config.eos_token_id = None
    return model.requires_grad_(False)


def _draw(flat: torch.Tensor, generator: torch.Generator) -> None:
    """Normal values; a long tensor repeats its first ``BLOCK`` of them, which costs a copy instead of a draw."""
    done = min(BLOCK, len(flat))
    flat[:done].normal_(0, SCALE, generator=generator)
    while done < len(flat):
        more = min(done, len(flat) - done)
        flat[done : done + more] = flat[:more]
        done += more


def _quantize(model: Any, quantization: Any) -> None:
    """Weights of the linear layers but the head, as transformers does when it loads."""
    from torchao.quantization import quantize_

    def chosen(module: torch.nn.Module, name: str) -> bool:
        return isinstance(module, torch.nn.Linear) and "lm_head" not in name

    quantize_(model, quantization.quant_type, filter_fn=chosen)


def describe(loaded: Loaded) -> dict[str, Any]:
    """``environment`` of a model that may have random weights and no processor."""
    if loaded.processor is not None:
        return environment(loaded)
    stub = replace(loaded, processor=SimpleNamespace(image_processor=None))
    return {**environment(stub), "weights": f"random, seed {loaded.options.seed}", "image_processor": None}
