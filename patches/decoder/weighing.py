"""Attention that counts a merged token as so many: an attention mask with the logarithm of how many each holds added to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mllm_efficient.apply.signatures import cache_of
from mllm_efficient.errors import UnsupportedModelError

from .rating import causal_mask, window_of

if TYPE_CHECKING:
    from .passes import Pass
    from .staging import Staging

KERNELS = ("sdpa", "eager")


@dataclass(frozen=True)
class Weights:
    """What a cache remembers of the prompts in it. mask: (S, P) bool, without padding. more: (S, P) float32 added to the logits."""

    mask: Tensor
    more: Tensor


def weights_of(staging: Staging) -> Weights:
    """What is added for the images of a call."""
    more = torch.zeros(staging.mask.shape)
    for image in staging.images:
        if image.held is not None:
            more[image.row, image.columns] = image.held.float().log()
    return Weights(staging.mask, more)


def require_kernel(config: Any) -> None:
    """Raises ``UnsupportedModelError`` for an attention kernel that takes no mask of numbers."""
    kernel = getattr(config, "_attn_implementation", None)
    if kernel not in KERNELS:
        raise UnsupportedModelError(
            f"proportional adds to the attention mask, which kernel {kernel!r} does not take: load the model with "
            "attn_implementation='sdpa'"
        )


def weigh(this: Pass, index: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> None:
    """Puts what is added to the columns of the prompts into the mask of layer ``index`` in a forward, where anything is."""
    if this.state.weights is not None:
        key = ("weighed", window_of(layer), hidden.device)
        kwargs["attention_mask"] = this.once(key, lambda: weighed(this, index, layer, hidden, cache_of(kwargs)))


def weighed(this: Pass, index: int, layer: Any, hidden: Tensor, cache: Any) -> Tensor:
    config, weights = this.decoder.config, this.state.weights
    assert weights is not None
    require_kernel(config)
    prompt, more = (this.rows(part.to(hidden.device), hidden) for part in (weights.mask, weights.more))
    new, window = this.new.to(hidden.device), window_of(layer)
    mask = causal_mask(config, hidden, torch.cat([prompt, new], 1), cache, index, window)
    keys, first = (None, 0) if cache is None else cache.get_mask_sizes(hidden.shape[1], index)
    more = torch.cat([more, more.new_zeros(new.shape)], 1)
    return added(mask, more, hidden.shape[1], window, hidden.dtype, keys, first)


def added(
    mask: Tensor | None, more: Tensor, queries: int, window: int | None, dtype: torch.dtype, keys: int | None = None, first: int = 0
) -> Tensor:
    """(B, 1, queries, keys) of numbers: what is added to the logits of queries, which are the last of the columns.

    mask: of booleans or numbers, None for all that are causal. more: (B, columns). keys: how many the layer's cache gives, from
    column ``first`` on: a sliding window's has lost the first ones, a static one has room for later ones, which get 0.
    """
    columns, keys = more.shape[1], more.shape[1] if keys is None else keys
    if mask is None:
        key = torch.arange(first, first + keys, device=more.device)
        query = torch.arange(columns - queries, columns, device=more.device)[:, None]
        mask = ((key <= query) if window is None else (key <= query) & (key > query - window))[None, None]
    more = torch.nn.functional.pad(more, (0, max(0, first + keys - columns)))[:, None, None, first : first + keys].to(dtype)
    least = torch.finfo(dtype).min
    return torch.where(mask, more, least) if mask.dtype == torch.bool else torch.where(mask == 0, more, mask.to(dtype))
