"""What the last and an early block of a Qwen-VL tower attend to, and keys: patches of all images in one sequence, no class token."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mllm_efficient.errors import UnsupportedModelError
from mllm_efficient.lazy import torch

from .attention import Result, Watcher, early_block, received, watch

if TYPE_CHECKING:
    from torch import Tensor


def watched_blocks(tower: Any, call: Callable[[], Result], needs: frozenset[str]) -> tuple[Result, dict[str, Tensor]]:
    """What ``call`` gives, in which the model runs its tower, and of its last block attention (P,) and keys (P, d).

    Attention is what every patch receives in sum from those that its image, frame or window lets see it, averaged over heads; its key is
    after rotation, averaged over heads. early_attention is that of an early block. Patches are in the tower's order. Queries and keys are
    those that the tower itself computes.
    """
    blocks = {"": tower.blocks[-1].attn} if needs & {"attention", "keys"} else {}
    if "early_attention" in needs:
        blocks["early_"] = tower.blocks[early_of(tower)].attn

    def watchers(seen: dict[str, Any]) -> list[Watcher]:
        def of(name: str, attention: Any) -> list[Watcher]:
            def lengths(module: Any, args: tuple, kwargs: dict[str, Any] | None = None) -> None:
                seen.setdefault(name, {}).update(kwargs or {})

            def projected(module: Any, args: tuple, *rest: Any) -> None:
                seen.setdefault(name, {})["qkv"] = rest[-1]

            return [(attention.register_forward_pre_hook, lengths), (attention.qkv.register_forward_hook, projected)]

        return [watcher for block in blocks.items() for watcher in of(*block)]

    out, seen = watch(tower, call, watchers, needs)
    found: dict[str, Tensor] = {}
    for name, attention in blocks.items():
        found[f"{name}attention"], keys = _attended(attention, seen.get(name, {}), needs)
        if not name:
            found["keys"] = keys
    return out, found


def _attended(attention: Any, seen: dict[str, Any], needs: frozenset[str]) -> tuple[Tensor, Tensor]:
    """(P,) what every patch receives in sum, and (P, d) its key. seen: what a block's attention was given and projected."""
    if not {"qkv", "cu_seqlens", "position_embeddings"} <= seen.keys():
        raise UnsupportedModelError(
            f"this version of transformers does not hand {type(attention).__name__} what {' and '.join(sorted(needs))} are computed from"
        )
    with torch.no_grad():
        q, k, _ = seen["qkv"].unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
        q, k = (getattr(attention, name, torch.nn.Identity())(part) for name, part in (("q_norm", q), ("k_norm", k)))  # GLM-OCR's
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision  # each family has it beside its tower
        q, k = (part.transpose(0, 1).float() for part in rotate(q, k, *seen["position_embeddings"]))
        together = [slice(*pair) for pair in itertools.pairwise(seen["cu_seqlens"].tolist())]
        return torch.cat([received(q[:, part], k[:, part], attention.scaling) for part in together]), k.mean(0)


def early_of(tower: Any) -> int:
    """The index of the early block; of a tower of windows the first that sees the whole image."""
    return int(next(iter(getattr(tower, "fullatt_block_indexes", ())), early_block(len(tower.blocks))))


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
