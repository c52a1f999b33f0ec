"""AnchorAttention: a sparse prefill for long prompts, as an attention function of transformers.

    me.anchor_attention()                                                     # registers it
    model = LlavaForConditionalGeneration.from_pretrained(..., attn_implementation="anchor")

Queries come in groups of ``block * step``. A query attends to the first group of keys and, causally, to its own; of the keys between
them to those that are within ``theta`` of an anchor for any block of its group. A block's anchor is the mean of its queries' largest
logits among the keys they attend to anyway, which the mean of its queries is compared with. So up to two groups (4,096 tokens by the
defaults) everything is computed, and at 8,192 at least 62.5% of causal attention: it is for long videos.

Source: AnchorAttention (arXiv 2505.23520). In its released ranges some kept keys of the first group count twice, and from the third
group on the block before a group's own is left out; here each key counts once and none is left out. The last queries that fill no group
are attended to fully there, and are a smaller group here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import BadSettingError

NAME = "anchor"
ELSE = ("sliding_window", "softcap", "position_bias", "s_aux")  # of a call that asks for more than causal attention


@dataclass(frozen=True)
class Anchor:
    """block: queries of which the mean is compared. step: blocks of a group. theta: in natural-log units of the scaled logits."""

    block: int = 128
    step: int = 16
    theta: float = 12.0

    def __post_init__(self) -> None:
        for name in ("block", "step"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise BadSettingError(f"anchor attention: {name}={value!r} is no whole number from 1")
        if isinstance(self.theta, bool) or not isinstance(self.theta, int | float) or math.isnan(self.theta):
            raise BadSettingError(f"anchor attention: theta={self.theta!r} is no number (12 keeps keys down to exp(-12) of the anchor)")

    @property
    def group(self) -> int:
        return self.block * self.step

    def kept(self, query: Tensor, key: Tensor, start: int, stop: int, scale: float) -> Tensor:
        """(B, H, start - group) bool: the keys from the first group's end to ``start`` that queries ``start`` to ``stop`` attend to."""
        rows = query[:, :, start:stop].float()
        own = rows @ key[:, :, start:stop].float().transpose(2, 3) * scale
        own = own.masked_fill(~causal(stop - start, rows.device), float("-inf"))
        most = torch.maximum(own.amax(-1), (rows @ key[:, :, : self.group].float().transpose(2, 3) * scale).amax(-1))
        means = torch.stack([part.mean(2) for part in rows.split(self.block, 2)], 2)
        anchors = torch.stack([part.mean(2) for part in most.split(self.block, 2)], 2)
        scores = means @ key[:, :, self.group : start].float().transpose(2, 3) * scale
        return (scores + self.theta >= anchors[..., None]).any(2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """(B, H, N, d) of a prompt without padding."""
        n, first = query.shape[2], 2 * self.group
        q, k, v = (x[:, :, :first] for x in (query, key, value))
        parts = [F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)]
        for start in range(first, n, self.group):
            stop = min(start + self.group, n)
            keep = self.kept(query, key, start, stop, scale)
            count = keep.sum(-1, keepdim=True)
            index = keep.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., : int(count.max())]
            k, v = (self._gathered(x, index, start, stop) for x in (key, value))
            there = torch.arange(index.shape[-1], device=index.device) < count
            seen = torch.cat([there.new_ones(*there.shape[:2], self.group), there], -1)[:, :, None].expand(-1, -1, stop - start, -1)
            seen = torch.cat([seen, causal(stop - start, seen.device).expand(*seen.shape[:2], -1, -1)], -1)
            parts.append(F.scaled_dot_product_attention(query[:, :, start:stop], k, v, attn_mask=seen, scale=scale))
        return torch.cat(parts, 2)

    def _gathered(self, x: Tensor, index: Tensor, start: int, stop: int) -> Tensor:
        """The first group of keys or values, the kept ones between, and the group's own."""
        between = x[:, :, self.group : start].gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1]))
        return torch.cat([x[:, :, : self.group], between, x[:, :, start:stop]], 2)

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
        scaling: float | None = None, is_causal: bool | None = None, **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """As transformers calls an attention function: (B, H, N, d) queries, keys of as many or fewer heads -> (B, N, H, d).

        Whatever is not a prefill under a causal mask with padding (decoding, towers, windows, weighted or packed tokens, dropout) is
        computed in full, by transformers' own function for SDPA.
        """
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        causally = getattr(module, "is_causal", True) if is_causal is None else is_causal
        plain = causally and not dropout and not any(kwargs.get(name) is not None for name in ELSE)
        n = query.shape[2]
        spans = spans_of(attention_mask, len(query), n) if plain and key.shape[2] == n > 2 * self.group else None
        if spans is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
            )
        times = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(times, 1) for x in (key, value))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if attention_mask is None:
            return self.attend(query, key, value, scale).transpose(1, 2).contiguous(), None
        out = torch.zeros_like(query)
        for row, (start, stop) in enumerate(spans):  # groups begin where a row does, so that padding changes no answer
            q, k, v = (x[row : row + 1, :, start:stop] for x in (query, key, value))
            out[row, :, start:stop] = self.attend(q, k, v, scale)[0]
        return out.transpose(1, 2).contiguous(), None


def causal(n: int, device: torch.device) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool, device=device).tril()


def spans_of(mask: Tensor | None, rows: int, n: int) -> list[tuple[int, int]] | None:
    """Where each row's tokens begin and end, if a mask (B, 1, N, N) is causal and hides padding alone; None for any other."""
    if mask is None:
        return [(0, n)] * rows
    if mask.dtype != torch.bool or mask.shape[1:] != (1, n, n):
        return None
    out = []
    for one in mask.expand(rows, -1, -1, -1)[:, 0]:
        real = one.diagonal().nonzero()[:, 0]
        if not len(real):
            return None
        start, stop = int(real[0]), int(real[-1]) + 1
        seen = one[start:stop]
        if not torch.equal(seen[:, start:stop], causal(stop - start, one.device)) or seen[:, :start].any() or seen[:, stop:].any():
            return None
        out.append((start, stop))
    return out


def require_registered(attn_implementation: str | None) -> None:
    """Registers AnchorAttention with its defaults where a model is to be loaded with it and nobody has."""
    if attn_implementation == NAME:
        from transformers import AttentionInterface

        if NAME not in AttentionInterface().valid_keys():
            anchor_attention()


def anchor_attention(block: int = 128, step: int = 16, theta: float = 12.0) -> str:
    """Registers AnchorAttention with transformers and returns its name, ``"anchor"``, for ``attn_implementation``; a later call resets it.

    Args:
        block, step: a group has ``block * step`` queries. Memory for logits is of a group times two groups, in float32.
        theta: how far below a block's anchor a key may be, in natural-log units; infinity keeps every key.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, Anchor(block, step, theta))
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
