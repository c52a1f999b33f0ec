"""What is served: a method out of the model's config, the counts that requests may ask for, and what cannot be served and why."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

from mllm_efficient import __version__
from mllm_efficient.compressors.base import Compressor, parameters
from mllm_efficient.errors import BadBudgetError, MllmEfficientError, UnsupportedModelError
from mllm_efficient.registry import BUILTIN, build, get_method
from mllm_efficient.trained.files import SERVED as KEY  # in the model's config and in --hf-overrides

REQUEST = "visual_tokens"  # in a request's mm_processor_kwargs
ALLOWED = "allowed_tokens"
OF_IMAGES = frozenset({"grid"})  # what vLLM gives of an image besides its projected features
OF_PIXELS = ("qwen2_5_vl", "qwen3_vl")  # model types whose towers of vLLM run on the patches that stay
OF_TEXT = ("llava", "llava_next", "llava_onevision", "internvl", *OF_PIXELS)  # whose front end hands a prompt's text to the model
OF_TOWER = {"llava": frozenset({"attention", "keys"})}  # by model type, what the plugin reads in vLLM's tower
EIGHT_BITS = "int-quantized"  # weights and activations, as compressed-tensors calls their format


@dataclass(frozen=True)
class Settings:
    """A method and the counts of tokens that a request may ask for instead of its budget."""

    method: Compressor
    allowed: tuple[int, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Everything that the tokens of an image depend on besides the image; goes into vLLM's hash of it."""
        content = json.dumps([__version__, self.method.to_dict(), self.allowed], sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def methods(self) -> list[Compressor]:
        """The method at its own budget and at every other that a request may ask for."""
        return [self.method, *map(self.of_request, self.allowed)]

    def of_request(self, tokens: Any) -> Compressor:
        """The method at a request's budget. Raises ``BadBudgetError`` (HTTP 400) for one that is not allowed."""
        if tokens is None:
            return self.method
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens not in self.allowed:
            known = f"{', '.join(map(str, self.allowed))} are allowed" if self.allowed else f"this server allows none ({ALLOWED} of {KEY})"
            raise BadBudgetError(f"{REQUEST}={tokens!r}: {known}")
        # The bounds are those of a fraction; what a request may ask for is in the list of the server.
        return replace(self.method, keep=None, prune=None, min_tokens=None, max_tokens=None, tokens=tokens)


def settings_of(config: Any) -> Settings | None:
    """The settings in a model's config, None without any. Raises ``MllmEfficientError`` for what cannot be served."""
    given = getattr(config, KEY, None)
    if given is None:
        return None
    allowed: Any = ()
    if isinstance(given, dict):
        given = dict(given)
        allowed = given.pop(ALLOWED, ())
    elif not isinstance(given, str):
        raise MllmEfficientError(f"{KEY} must be a specification such as 'divprune:tokens=64' or an object, not {given!r}")
    method = build(given)
    require_served(method, getattr(config, "model_type", ""))
    if not isinstance(allowed, (list, tuple)) or not all(isinstance(a, int) and not isinstance(a, bool) and a > 0 for a in allowed):
        raise MllmEfficientError(f"{KEY}: {ALLOWED} must be a list of counts, such as [64, 144], not {allowed!r}")
    out = Settings(method, tuple(allowed))
    for count in out.allowed:
        out.of_request(count)
    return out


def require_served(method: Compressor, kind: str = "llava") -> None:
    """Raises ``UnsupportedModelError`` saying why a method cannot be served and which can. kind: the model's type."""
    why = _why_not(method, kind)
    if why is not None:
        raise UnsupportedModelError(f"{KEY}: {method.name} {why}; {', '.join(servable(kind))} can be served")


def servable(kind: str = "llava") -> list[str]:
    """The names of this package's methods that can be served as they are by default, on models of a type."""
    built = []
    for name in sorted(BUILTIN):
        cls: Any = get_method(name)
        known = parameters(cls)
        budget = {"tokens": 64} if "tokens" in known and not cls.by_pixels else {}
        try:
            method = cls(**budget, **({"weights": "random"} if cls.trained else {}))
        except MllmEfficientError:  # needs a setting of its own, and none of those is served
            continue
        built += [name] if method.name != "none" and _why_not(method, kind) is None else []
    return built


def _why_not(method: Compressor, kind: str) -> str | None:
    """Why a method cannot be served on models of a type; None where it can."""
    why: str | None
    of_tower = OF_TOWER.get(kind, frozenset())
    if len(method.parts) > 1:
        why = "runs several methods one after the other, and vLLM one"
    elif method.as_reducer is not None:
        why = "works inside the decoder, and vLLM gives every layer the same tokens"
    elif "clip_text" in method.needs or ("text" in method.needs and kind not in OF_TEXT):
        why = "looks at the question, and vLLM keeps an image's tokens by the image alone"
    elif method.as_projector is not None and method.as_projector.asks:
        why = "makes tokens by the question, and vLLM keeps an image's tokens by the image alone: train one with another pooling"
    elif getattr(method, "over", "image") != "image":
        why = "with over= joins views or frames, which vLLM's towers hand over one by one here"
    elif method.by_pixels and kind not in OF_PIXELS:
        why = f"looks at pixels, of which the towers of {' and '.join(OF_PIXELS)} alone run without those that go"
    elif method.in_tower and not method.by_pixels:
        why = (
            "merges in the tower, which vLLM runs as it is: leave at= out"
            if method.merges
            else "drops in the tower, which vLLM runs as it is"
        )
    elif method.as_resizer is not None:
        why = "makes the picture itself smaller: mllm-efficient export writes a smaller LLaVA-1.5, elsewhere send a smaller picture"
    elif method.counts_by_content:
        why = "with radius= or spend= decides how many tokens stay behind the tower, and vLLM reserves their places before"
    elif method.sets_processor:
        why = "sets the model's own image processor: give vllm serve that setting as --mm-processor-kwargs"
    elif getattr(method, "age", None) is not None or getattr(method, "dedup", False):
        why = (
            f"looks at other pictures of the prompt ({'dedup' if method.by_pixels else 'age'}=), and vLLM keeps an image's tokens by itself"
        )
    elif getattr(method, "on", None) is not None:
        why = "is the baseline of trained weights"
    elif nowhere := set(method.needs) - OF_IMAGES - {"text"} - frozenset().union(*OF_TOWER.values()):
        why = f"needs {', '.join(sorted(nowhere))}, which is read in none of vLLM's towers"
    elif lacking := ", ".join(sorted(set(method.needs) - OF_IMAGES - {"text"} - of_tower)):
        why = f"needs {lacking}, which is read in vLLM's towers of LLaVA-1.5 alone"
    elif method.positions == "keep":
        why = "with positions='keep' leaves gaps between positions, which vLLM has on Qwen-VL alone and there by itself: leave it out"
    elif method.newline == "keep":
        why = "with newline='keep' leaves newline columns, which are not counted as tokens here"
    else:
        why = None
    return why


def is_projector(settings: Settings | None) -> bool:
    return settings is not None and settings.method.as_projector is not None


def untested(config: Any) -> list[str]:
    """What of vLLM's configuration no test has run with the plugin."""
    parallel, images, lora = config.parallel_config, config.model_config.multimodal_config, config.lora_config
    scheme = (getattr(config.model_config.hf_config, "quantization_config", None) or {}).get("format")
    found = {
        "pipeline parallel": parallel.pipeline_parallel_size > 1,
        "encoder data-parallel": images is not None and images.mm_encoder_tp_mode == "data",
        f"quantization ({config.model_config.quantization})": config.model_config.quantization is not None and scheme != EIGHT_BITS,
        "LoRA of tower and connector": lora is not None and lora.enable_tower_connector_lora,
        "an external KV connector": config.kv_transfer_config is not None,
        "an external encoder cache": config.ec_transfer_config is not None,
        "speculative decoding": config.speculative_config is not None and getattr(config.speculative_config, "method", "") != "ngram",
    }
    return [name for name, used in found.items() if used]
