"""The ways into a wrapped model other than ``generate``: ``forward`` of the model, and of its base model without the head."""

from __future__ import annotations

from typing import Any

import torch

from ..compressors.base import Compressor
from ..errors import CountMismatchError
from ..report import CompressionReport, remember
from .active import Active
from .encode import has_pixels, keeps_all
from .generate import within_generate
from .in_llm import report_of
from .locate import warn_without_pixels
from .outputs import call_of, held_back
from .prepare import prepare
from .prompt import UNCOMPRESSED_CACHE, continue_forward, holds_uncompressed, layout_on, leave_on
from .signatures import cache_of, parameters_of

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
ENTERED = "visual_entered"  # the keyword by which the base model knows a call that the model on top has seen
NO_IDS = (
    "images with inputs_embeds but no input_ids cannot be compressed, because placeholders are found by their ids: pass input_ids, "
    "which PEFT's prompt tuning never does (LoRA does)"
)


def enter(model: Any, module: Any, method: Compressor, args: tuple[Any, ...], kwargs: dict[str, Any], logits: str) -> Arguments:
    """The arguments of a ``forward`` as it shall run: compressed if it brings pixels, mapped if it goes on from a compressed cache.

    module: the model itself or its base model, whose ``forward`` is called. logits: the length that was asked for.
    """
    from ..patches import adapter_for

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
    back = held_back(given)
    prepared = prepare(model, method, **{**given, **back})
    remember(model, prepared.report)
    return (), {name: value for name, value in call_of(prepared, logits).items() if name not in back}


class EnterBase:
    """The pre-hook of the base model (``model.model``): compresses a call that does not come through the model on top."""

    def __init__(self, top: Any, active: Active):
        self.top, self.active = top, active

    @torch.compiler.disable(reason="compression chooses by values")
    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Arguments | None:
        if kwargs is None:  # another thread's call, between the two steps of registering this hook
            return None
        if ENTERED in kwargs:
            return args, {k: v for k, v in kwargs.items() if k != ENTERED}
        if within_generate(self.top) or kwargs.get("mm_encoder_outputs") is not None:
            return None
        method = self.active.of_call(self.top)
        return None if method is None else enter(self.top, module, method, args, kwargs, "short")


class MarkBase:
    """The hook after the base model: puts on the output which columns its states belong to, and the layout on the cache."""

    def __init__(self, top: Any, active: Active):
        self.top, self.active = top, active

    @torch.compiler.disable(reason="compression chooses by values")
    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> None:
        if output is None or within_generate(self.top) or self.active.here(self.top) is None:
            return
        kwargs = {**dict(zip(parameters_of(type(module).forward), args)), **kwargs}  # some models on top pass ids by place
        encoded = kwargs.get("mm_encoder_outputs")
        layout, staging = getattr(encoded, "layout", None), getattr(encoded, "staging", None)
        if encoded is not None and staging is not None:
            remember(self.top, report_of(staging, encoded.planned))
        if layout is not None:
            for part in output if isinstance(output, tuple) else output.values():
                leave_on(part, layout)
        if isinstance(output, tuple):
            return
        if layout is None and staging is None and not has_pixels(kwargs):
            return
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        kept = torch.ones_like(ids, dtype=torch.bool) if layout is None else layout.keep
        output.visual_keep_mask = kept.to(output.last_hidden_state.device)
        output.visual_input_ids, output.visual_attention_mask = ids, torch.ones_like(ids) if mask is None else mask
