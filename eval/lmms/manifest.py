"""The entry point of group ``lmms_eval.models``, read in every lmms-eval process: it imports next to nothing."""

from __future__ import annotations

from typing import Any

NAME = "mllm_efficient"


def manifests() -> list[Any]:
    """``python -m lmms_eval --model mllm_efficient``."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest(model_id=NAME, chat_class_path="mllm_efficient.eval.lmms.adapter.MllmEfficient")]
