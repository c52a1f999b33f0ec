"""What a trained method knows its base model by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def base_of(model: Any, weights: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """What a base model is known by: its sizes and two values of every weight but the projector's, bare or under PEFT.

    weights: those to look at, by name, the model's own if None. Weights that are quantized or offloaded are left out.
    """
    from ..patches import inner_model

    inner = inner_model(model)
    text, vision = inner.config.get_text_config(), inner.config.vision_config
    names = ("hidden_size", "num_hidden_layers", "intermediate_size")
    sizes = {"model_type": inner.config.model_type}
    for part, config in (("text", text), ("vision", vision)):
        sizes |= {f"{part}.{name}": getattr(config, name, None) for name in names}
    sample = {}
    for name, weight in inner.named_parameters() if weights is None else weights.items():
        plain = type(weight.data) is Tensor and weight.is_floating_point() and not weight.is_meta and weight.numel()
        if plain and "lora_" not in name and "multi_modal_projector" not in name:
            flat, n = weight.detach().flatten(), weight.numel()
            sample[name.replace(".base_layer.", ".")] = [float(f"{v:.6g}") for v in flat[[n // 3, 2 * n // 3]].float().tolist()]
    return {"sizes": sizes, "sample": sample}


def differs(base: dict[str, Any], model: Any) -> str | None:
    """Why a model is not the base that ``base_of`` described, in whatever dtype it is loaded; None if it is."""
    now = base_of(model)
    if now["sizes"] != base["sizes"]:
        odd = [k for k in now["sizes"] if now["sizes"][k] != base["sizes"].get(k)]
        return f"{', '.join(odd)} is another" if odd else "its sizes are others"
    for name, values in base["sample"].items():
        for was, found in zip(values, now["sample"].get(name, values)):
            if abs(was - found) > 0.01 * abs(was) + 1e-4:  # bfloat16 is off by 0.4%
                return f"{name} is another"
    return None
