"""What a server's configuration gets where settings are given: a scheduler that ends requests whose images failed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import failures
from .settings import KEY

SCHEDULER = "mllm_efficient.patches.vllm.scheduler.scheduler"


def settle(architectures: Sequence[str]) -> None:
    """Registers what vLLM calls with the configuration of a model of these architectures, before it starts any process."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    for name in architectures:
        known: Any = MODELS_CONFIG_MAP.get(name)
        if getattr(known, "of_mllm_efficient", False):
            continue
        MODELS_CONFIG_MAP[name] = _over(known)


def _over(known: Any) -> Any:
    """vLLM's own part of a configuration, if there is one, and ours after it."""
    from vllm.model_executor.models.config import VerifyAndUpdateConfig

    base: Any = VerifyAndUpdateConfig if known is None else known

    class Settled(base):
        of_mllm_efficient = True

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            if known is not None:
                known.verify_and_update_config(vllm_config)
            if getattr(vllm_config.model_config.hf_config, KEY, None) is None:
                return
            failures.share()
            if vllm_config.scheduler_config.scheduler_cls is None:
                vllm_config.scheduler_config.scheduler_cls = SCHEDULER

    return Settled
