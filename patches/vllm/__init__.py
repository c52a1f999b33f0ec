"""Fewer image tokens in vLLM, as a plugin (entry point ``vllm.general_plugins``). No code of vLLM is changed; what is registered:

* the families of ``SERVED`` and ``BACKEND``, in vLLM's registry of models: subclasses of its own, under its names and under ours;
* for every architecture, in ``MODELS_CONFIG_MAP``, what is called with a server's configuration: vLLM's own step if there is one, then
  ours (``configuring``). Where settings are given it sets ``scheduler_cls``, unless that is set, and where they cannot be served it raises;
* on models with M-RoPE and settings, ``video_pruning_rate``, to a rate that removes nothing (``qwen``).

``vllm serve llava-hf/llava-1.5-7b-hf --hf-overrides '{"visual_token_compression": "divprune:tokens=64"}'``
"""

from __future__ import annotations

import os
import re

TESTED = (0, 33)
SWITCH = "MLLM_EFFICIENT_VLLM"
SERVED = {
    "LlavaForConditionalGeneration": "models:CompressedLlava",
    "LlavaNextForConditionalGeneration": "models:CompressedLlavaNext",
    "LlavaOnevisionForConditionalGeneration": "models:CompressedLlavaOnevision",
    "Qwen2_5_VLForConditionalGeneration": "qwen:CompressedQwen25VL",
    "Qwen3VLForConditionalGeneration": "qwen:CompressedQwen3VL",
    "Qwen3_5ForConditionalGeneration": "qwen:CompressedQwen35",
    "InternVLForConditionalGeneration": "internvl:CompressedInternVL",
}
BACKEND = {  # what vLLM runs by transformers itself: every family without a class here
    "TransformersMultiModalForCausalLM": "generic:TransformersMultiModalForCausalLM",
    "TransformersMultiModalMoEForCausalLM": "generic:TransformersMultiModalMoEForCausalLM",
}
PROJECTOR = "visual_projector"  # of a trained method, beside the model's own; in the config what builds it
MIDDLEWARE = "mllm_efficient.patches.vllm.naming.Named"  # says over HTTP why a picture could not be used, and the method
PREFIX = "MllmEfficient"  # of the architecture's name in an exported folder, which a vLLM without the plugin refuses


def register() -> None:
    """Registers the served families under vLLM's names and under our own. vLLM calls it in every one of its processes."""
    if os.environ.get(SWITCH, "1") == "0":
        return
    from vllm import ModelRegistry, __version__
    from vllm.logger import init_logger

    numbers = tuple(int(n) for n in re.findall(r"\d+", __version__)[:2])
    if numbers > TESTED:
        newest = ".".join(map(str, TESTED))
        init_logger("vllm.mllm_efficient").warning("vLLM %s is newer than %s, the newest that mllm-efficient knows", __version__, newest)
    for name, where in (SERVED | BACKEND).items():
        for registered in (name, PREFIX + name):
            ModelRegistry.register_model(registered, f"mllm_efficient.patches.vllm.{where}")
    from .configuring import settle

    own, whole = ([registered for name in names for registered in (name, PREFIX + name)] for names in (SERVED | BACKEND, BACKEND))
    settle(own, set(ModelRegistry.get_supported_archs()) - set(own), whole)
