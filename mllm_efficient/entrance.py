"""The ways into a wrapped model other than ``generate``: ``forward`` of the model, and of its base model without the head."""

from __future__ import annotations

from typing import Any

import torch

from .active import Active
from .compressors.base import Compressor
from .errors import CountMismatchError, UnsupportedModelError
from .generation import within_generate
from .host import cache_of, parameters_of
from .layout import UNCOMPRESSED_CACHE, continue_forward, holds_uncompressed, layout_on, leave_on
from .locate import warn_without_pixels
from .report import CompressionReport, remember
from .shrink import has_pixels, keeps_all, prepare
from .staged import report_of

ENTERED = "visual_entered"  # the keyword by which the base model knows a call that the model on top has seen
NO_IDS = (
    "images came with inputs_embeds and without input_ids, whose columns compression counts: pass input_ids too "
    "(PEFT's prompt tuning cannot: use LoRA)"
)


def enter(model: Any, module: Any, method: Compressor, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a ``forward`` as it shall run: compressed if it brings pixels, mapped if it goes on from a compressed cache.

    module: the model itself or its base model, whose ``forward`` is called.
    """
    from .patches import adapter_for

    given = {**dict(zip(parameters_of(type(module).forward), args)), **kwargs}
    cache = cache_of(given)
    layout, has_images, adapter = layout_on(cache), has_pixels(given), adapter_for(model)
    if layout is not None:
        if has_images:
            raise CountMismatchError("new images on a compressed cache: use generate with the whole conversation")
        return (), continue_forward(layout, cache, given)
    if not has_images:
        if cache is None or int(cache.get_seq_length()) == 0:  # a later step of a decode loop is no call of its own
            warn_without_pixels(adapter.placeholders, given)
            remember(model, CompressionReport())
        return args, kwargs
    if given.get("input_ids") is None:
        raise CountMismatchError(NO_IDS)
    if holds_uncompressed(cache):
        if keeps_all(adapter, method, given):
            return args, kwargs
        raise CountMismatchError(UNCOMPRESSED_CACHE)
    prepared = prepare(model, method, **given)
    remember(model, prepared.report)
    return (), prepared.model_kwargs


class EnterBase:
    """The pre-hook of the base model (``model.model``): compresses a call that does not come through the model on top."""

    def __init__(self, top: Any, active: Active):
        self.top, self.active = top, active

    def __call__(self, module: Any, args: tuple, kwargs: dict[str, Any] | None = None):
        if kwargs is None:  # another thread's call, between the two steps of registering this hook
            return None
        if ENTERED in kwargs:
            return args, {k: v for k, v in kwargs.items() if k != ENTERED}
        if within_generate(self.top) or kwargs.get("mm_encoder_outputs") is not None:
            return None
        method = self.active.of_call(self.top)
        return None if method is None else enter(self.top, module, method, args, kwargs)


class MarkBase:
    """The hook behind the base model: puts ``visual_keep_mask`` on the output and the layout on the cache."""

    def __init__(self, top: Any, active: Active):
        self.top, self.active = top, active

    def __call__(self, module: Any, args: tuple, kwargs: dict[str, Any], output: Any = None) -> None:
        if output is None or within_generate(self.top) or self.active.here(self.top) is None:
            return
        encoded = kwargs.get("mm_encoder_outputs")
        layout, staging = getattr(encoded, "layout", None), getattr(encoded, "staging", None)
        if encoded is not None and staging is not None:
            remember(self.top, report_of(staging, encoded.planned))
        if layout is not None:
            for part in output if isinstance(output, tuple) else output.values():
                leave_on(part, layout)
        if isinstance(output, tuple):
            return
        if layout is not None:
            output.visual_keep_mask = layout.keep.to(output.last_hidden_state.device)
        elif has_pixels(kwargs) or staging is not None:
            output.visual_keep_mask = torch.ones_like(kwargs["input_ids"], dtype=torch.bool)


def refuse_prompt_learning(model: Any) -> None:
    """Raises ``UnsupportedModelError`` for a model under PEFT's prompt or prefix tuning, which gives it embeddings or a cache."""
    config = getattr(model, "peft_config", {}).get(getattr(model, "active_adapter", None))
    if config is not None and getattr(config, "is_prompt_learning", False):
        kind = str(getattr(config.peft_type, "value", config.peft_type)).lower().replace("_", " ")
        raise UnsupportedModelError(
            f"PEFT's {kind} puts virtual tokens in front of the prompt, where compression cannot count them: use LoRA"
        )
