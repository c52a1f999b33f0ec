"""What a server's configuration gets where settings are given: a scheduler that ends requests whose images failed.

Settings of a model that vLLM runs by a class of its own, which knows nothing of them, are an error: it would serve all tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mllm_efficient.errors import UnsupportedModelError

from . import failures
from .settings import KEY, settings_of

ADVICE = "add --model-impl transformers, or serve a folder that mllm-efficient export wrote"
SCHEDULER = "mllm_efficient.patches.vllm.scheduler.scheduler"


def settle(architectures: Sequence[str], others: Iterable[str], whole: Sequence[str] = ()) -> None:
    """Registers what vLLM calls with the configuration of a model of these architectures, before it starts any process.

    others: those that vLLM runs without this package. whole: those among the first that get whole pictures, whatever is in them.
    """
    from vllm.logger import init_logger

    try:
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    except ImportError as error:  # must not keep vLLM from serving other models
        said = init_logger("vllm.mllm_efficient")
        said.warning("requests whose pictures cannot be used will be answered from zeros: this vLLM takes no scheduler (%s)", error)
        return
    for name in (*architectures, *others):
        known: Any = MODELS_CONFIG_MAP.get(name)
        if not getattr(known, "of_mllm_efficient", False):
            MODELS_CONFIG_MAP[name] = _over(known, name, name in architectures, name in whole)


def _over(known: Any, name: str, served: bool, whole: bool) -> Any:
    """vLLM's own part of a configuration, if there is one, and ours after it. served, whole: as ``settle`` has them."""
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
            if not served:
                raise UnsupportedModelError(f"{KEY}: vLLM runs {name} by a class of its own, which keeps all tokens: {ADVICE}")
            if whole:
                refuse_whole(vllm_config.model_config.hf_config)
            failures.share()
            if vllm_config.scheduler_config.scheduler_cls is None:
                vllm_config.scheduler_config.scheduler_cls = SCHEDULER

    return Settled


def refuse_whole(config: Any) -> None:
    """Raises for a method that looks at pixels or at the question: vLLM has transformers run the model, which gets whole pictures alone."""
    settings = settings_of(config)
    if settings is not None and (settings.method.by_pixels or "text" in settings.method.needs):
        looks = "pixels" if settings.method.by_pixels else "the question"
        raise UnsupportedModelError(
            f"{KEY}: {settings.method.name} looks at {looks}, which vLLM's own classes alone are served with: leave --model-impl "
            "transformers out"
        )
