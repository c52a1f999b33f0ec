"""Which labels of a prompt enter a loss where its visual tokens are compressed, and what that loss is divided by.

One rule for all methods: labels on visual placeholders and on the text between those of one image, on padding and on the first token
of a row are ignored. A placeholder that went has no logits and one that stayed is no word; in front of a row's first token there is
nothing, or padding. Where nothing is compressed labels pass untouched.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..compressors.base import Compressor
from ..compressors.composed import before_of, inside_of
from ..compressors.none import NoCompression
from ..errors import CountMismatchError
from .active import method_of
from .conversation import items_of
from .encode import has_pixels
from .locate import locate, visual_in
from .plan import Plan
from .prompt import IGNORE, require

_said = set[str]()


def of_text(labels: Tensor, visual: Tensor) -> Tensor:
    """Labels (B, L) without those on visual placeholders, which ``visual`` (B, L) marks. Says once that it took some away."""
    visual = visual.to(labels.device)
    require(labels.shape == visual.shape, f"labels {tuple(labels.shape)} and input_ids {tuple(visual.shape)} differ")
    if "visual" not in _said and bool((visual & (labels != IGNORE)).any()):
        _said.add("visual")
        warnings.warn("labels on visual placeholders are ignored in the loss, because visual tokens are compressed", stacklevel=2)
    return labels.masked_fill(visual, IGNORE)


def entering(labels: Tensor, mask: Tensor, visual: Tensor, repacked: bool) -> Tensor:
    """The labels (B, L) that enter the loss of a compressed prompt; -100 elsewhere.

    mask: (B, L) bool, where there is no padding. visual: (B, L) bool, the placeholders. repacked: whether the decoder gets the
    prompt without what is masked; else a token after a hole in the mask is a first one too.
    """
    mask = mask.to(labels.device)
    first = mask.cumsum(1) == 1
    if not repacked:
        first[:, 1:] |= ~mask[:, :-1]
    return of_text(labels, visual).masked_fill(~mask | first, IGNORE)


def count_for(given: Any, labels: Tensor, entered: Tensor) -> Any:
    """What the sum of a call's losses is divided by, for a caller who passed ``num_items_in_batch``.

    given: the caller's count. labels: (B, L) the caller's. entered: (B, R) those that enter the loss. A count of all labels of this
    call becomes that of the entering ones. Any other count of labels that do not all enter was made over several calls, and
    what it should have been cannot be known here.

    Raises:
        CountMismatchError: labels of this call were counted that enter no loss.
    """
    total, in_loss = torch.stack([(one[:, 1:] != IGNORE).sum() for one in (labels, entered.to(labels.device))]).tolist()
    if total == in_loss:
        return given
    number = float(given.flatten()[0] if torch.is_tensor(given) else given)
    if number == in_loss:
        return given
    if number == total:
        return torch.full_like(given, in_loss) if torch.is_tensor(given) else in_loss
    raise CountMismatchError(
        f"num_items_in_batch={number:g} counts labels that enter no loss, {total - in_loss} of them in this call (visual tokens, padding): "
        "set batch['labels'] = me.mask_labels(model, batch) before counting"
    )


def leaves_alone(method: Compressor, plans: Iterable[Plan]) -> bool:
    """Whether a method leaves every image of a call as it is, so that the call is the stock model's. plans: of each, after all stages."""
    before = before_of(method) or NoCompression()
    if inside_of(method) is not None and before.name != NoCompression.name:
        return False
    return all(p.untouched for p in plans)


def stays_long(adapter: Any, whole: Compressor) -> bool:
    """Whether every column of a prompt reaches the decoder, inside which alone it gets shorter."""
    before = before_of(whole)
    return inside_of(whole) is not None and (before is None or before.name == NoCompression.name) and not adapter.mrope


def mask_labels(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """The labels (B, L) of a batch that enter the loss of a wrapped model, -100 elsewhere, for loops that count them.

    batch: the processor's output with ``labels``. transformers' Trainer does this by itself. The labels of a model that is not
    wrapped, and of a batch in which nothing is compressed, come back as they are.
    """
    from ..patches import adapter_for

    labels: Tensor = batch["labels"]
    ids, method = batch.get("input_ids"), method_of(model)
    if method is None or ids is None or not has_pixels(dict(batch)):
        return labels
    adapter, mask = adapter_for(model), batch.get("attention_mask")
    items = items_of(adapter, dict(batch))
    if leaves_alone(method, (method.plans(adapter, item)[-1] for item in items)):
        return labels
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    visual = visual_in(ids, adapter.placeholders, locate(ids.cpu(), adapter.placeholders, items))
    return entering(labels, mask, visual, not stays_long(adapter, method))
