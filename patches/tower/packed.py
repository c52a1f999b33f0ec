"""What the last block of a Qwen-VL tower attends to, and its keys: patches of all images in one sequence, without a class token."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mllm_efficient.errors import UnsupportedModelError
from mllm_efficient.lazy import torch

from .attention import Result, Watcher, received, watch

if TYPE_CHECKING:
    from torch import Tensor


def watched_last(tower: Any, call: Callable[[], Result], needs: frozenset[str]) -> tuple[Result, Tensor, Tensor]:
    """What ``call`` gives, in which the model runs its tower; (P,) attention that every patch receives in sum from those that its
    image, frame or window lets see it, averaged over heads; and (P, d) its key after rotation, averaged over heads.

    Patches are in the tower's order. Queries and keys are those that the tower itself computes.
    """
    attention = tower.blocks[-1].attn

    def watchers(seen: dict[str, Any]) -> list[Watcher]:
        def lengths(module: Any, args: tuple, kwargs: dict[str, Any] | None = None) -> None:
            seen.update(kwargs or {})

        def projected(module: Any, args: tuple, *rest: Any) -> None:
            seen["qkv"] = rest[-1]

        return [(attention.register_forward_pre_hook, lengths), (attention.qkv.register_forward_hook, projected)]

    out, seen = watch(tower, call, watchers, needs)
    if not {"qkv", "cu_seqlens", "position_embeddings"} <= seen.keys():
        raise UnsupportedModelError(
            f"this version of transformers does not hand {type(attention).__name__} what {' and '.join(sorted(needs))} are computed from"
        )
    with torch.no_grad():
        q, k, _ = seen["qkv"].unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
        q, k = (getattr(attention, name, torch.nn.Identity())(part) for name, part in (("q_norm", q), ("k_norm", k)))  # GLM-OCR's
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision  # each family has it beside its tower
        q, k = (part.transpose(0, 1).float() for part in rotate(q, k, *seen["position_embeddings"]))
        ends = seen["cu_seqlens"].tolist()
        together = [slice(*pair) for pair in itertools.pairwise(ends)]
        return out, torch.cat([received(q[:, part], k[:, part], attention.scaling) for part in together]), k.mean(0)


def window_order(grids: Sequence[tuple[int, int, int]], window: int) -> Tensor:
    """(N,) the merged tokens of all images in the order of a tower of windows: window by window, each row by row.

    grids: (frames, rows, columns) of each image in tokens. window: tokens along a side of a window.
    """
    out, before = [], 0
    for frames, rows, columns in grids:
        r, c = (torch.arange(n) // window for n in (rows, columns))
        of_window = (r[:, None] * -(-columns // window) + c).flatten().sort(stable=True).indices
        out += [before + frame * rows * columns + of_window for frame in range(frames)]
        before += frames * rows * columns
    return torch.cat(out)
