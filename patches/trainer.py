"""transformers' Trainer around a wrapped model: what it counts is what enters the loss, and what it compares has one length.

Trainer divides the losses of a step by the labels it counts in the step's batches, over all accumulation steps and processes,
before the model sees the first of them; and for label smoothing, ``compute_loss_func`` and ``compute_metrics`` it sets the
model's logits beside the batch's labels. Neither can be put right from inside ``forward``. So four of Trainer's methods are
wrapped, for all trainers derived from it: batches reach the count, and everything after it, with the labels that
``mask_labels`` leaves, the model gives logits of the prompt's length where Trainer reads them, and methods that read the
question know where the answer begins even when Trainer keeps the labels to itself. For a model that is not
wrapped by this package the methods do what they did; ``release`` takes the wrapping off again.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from mllm_efficient.apply.active import active_on
from mllm_efficient.apply.labels import mask_labels
from mllm_efficient.apply.outputs import holds, reading
from mllm_efficient.errors import UnsupportedModelError

from .running import hooking

ASKED_BY_TRAINER = "accepts_loss_kwargs"
_TRAINER = "transformers.trainer"


class AskedByTrainer:
    """``accepts_loss_kwargs`` of a wrapped model's class: the stock class's own, if it has one.

    Every Trainer asks a model for it before it counts anything, and Trainer is not imported for those who only generate. So this
    is where its methods get wrapped.
    """

    def __init__(self, stock: type):
        self.stock = stock

    def __get__(self, model: Any, owner: Any = None) -> Any:
        watch_if_there()
        return getattr(self.stock, ASKED_BY_TRAINER)  # AttributeError where it has none, as before


def watch_if_there() -> None:
    """Wraps Trainer's methods, once, if something has imported it."""
    trainer = getattr(sys.modules.get(_TRAINER), "Trainer", None)
    if trainer is None:
        return
    with hooking:
        for name, around in AROUND.items():
            stock: Any = trainer.__dict__.get(name)
            if stock is not None and not hasattr(stock, "visual"):
                setattr(trainer, name, _wrapped(stock, around))


def release() -> None:
    """Gives Trainer its own methods back."""
    trainer = getattr(sys.modules.get(_TRAINER), "Trainer", None)
    with hooking:
        for name in AROUND:
            own: Any = getattr(trainer, "__dict__", {}).get(name)
            if hasattr(own, "visual"):
                setattr(trainer, name, own.__wrapped__)


def _wrapped(stock: Any, around: Callable) -> Callable:
    @functools.wraps(stock)
    def method(self, *args, **kwargs):
        model = _wrapped_inside(getattr(self, "model", None))
        return stock(self, *args, **kwargs) if model is None else around(stock, self, model, *args, **kwargs)

    method.visual = True  # type: ignore[attr-defined]
    return method


def _wrapped_inside(model: Any) -> Any:
    """The model that ``wrap`` was called on, out of whatever is around it; None if there is none."""
    while _is_module(model) and active_on(model) is None:
        around = next((name for name in ("module", "_orig_mod") if hasattr(model, name)), None)
        inner = model.get_base_model() if hasattr(model, "get_base_model") else getattr(model, around) if around else None
        model = None if inner is model else inner
    return model if _is_module(model) else None


def _is_module(model: Any) -> bool:
    return isinstance(model, nn.Module)


def _masked(model: Any, batch: Any) -> Any:
    """A batch with the labels that enter the loss; the caller's own batch is left alone."""
    if not hasattr(batch, "keys") or batch.get("labels") is None:
        return batch
    labels = mask_labels(model, batch)
    if labels is batch["labels"]:
        return batch
    batch = copy.copy(batch)
    batch["labels"] = labels
    return batch


def _count(stock: Callable, trainer: Any, model: Any, batch_samples: list, *args, **kwargs) -> Any:
    batch_samples[:] = [_masked(model, batch) for batch in batch_samples]
    return stock(trainer, batch_samples, *args, **kwargs)


def _inputs(stock: Callable, trainer: Any, model: Any, *args, **kwargs) -> Any:
    inputs = _masked(model, stock(trainer, *args, **kwargs))
    holds(inputs.get("labels") if hasattr(inputs, "keys") else None)
    return inputs


def _step(stock: Callable, trainer: Any, model: Any, *args, **kwargs) -> Any:
    with reading(trainer.label_smoother is not None or trainer.compute_loss_func is not None):
        return stock(trainer, *args, **kwargs)


def _evaluation(
    stock: Callable, trainer: Any, model: Any, dataloader: Any, description: str, prediction_loss_only=None, *args, **kwargs
) -> Any:
    only = trainer.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
    with reading(not only or trainer.label_smoother is not None or trainer.compute_loss_func is not None):
        return stock(trainer, dataloader, description, prediction_loss_only, *args, **kwargs)


AROUND: dict[str, Callable[..., Any]] = {
    "_get_num_items_in_batch": _count,
    "_prepare_inputs": _inputs,
    "training_step": _step,
    "evaluation_loop": _evaluation,
}


def refuse_virtual_tokens(model: Any) -> None:
    """Raises ``UnsupportedModelError`` for a PEFT model that puts virtual tokens in front of the prompt."""
    for config in getattr(model, "peft_config", {}).values():
        if getattr(config, "is_prompt_learning", False):
            kind = str(getattr(config.peft_type, "value", config.peft_type)).lower().replace("_", " ")
            raise UnsupportedModelError(
                f"PEFT's {kind} puts its own embeddings or cache in place of input_ids, and image placeholders are found by their ids: "
                "use LoRA or another adapter of weights"
            )
