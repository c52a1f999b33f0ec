"""What AnchorAttention computes, what of full attention's weight that covers, and its time, on long prompts of the embedded model.

    python benchmarks/anchor.py

Prompts of many pictures. Queries and keys are those of the model's own layers under full attention. ``computed``: pairs over those of
causal attention. ``recall``: the share of full attention's weight that lies on them, mean over queries, and the lowest of a head.
Time: median of five calls of the last layer's attention, over that of full attention (SDPA, causal) in the same process.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mllm_efficient as me
from mllm_efficient.patches.anchor import Anchor, causal

PICTURES = (14, 56)
SETTINGS = (Anchor(), Anchor(32, 4, 12.0), Anchor(32, 4, 4.0), Anchor(32, 4, 2.0))


def layers(pictures: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values (1, H, N, d) of every layer, on a prompt of so many pictures."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    model, processor = me.builtin(device="cpu")
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def recording(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append((query, key, value))
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("recording", recording)
    model.set_attn_implementation({"text_config": "recording"})
    images, text = [me.sample(7 * i)[0] for i in range(pictures)], me.sample(0)[1]
    with torch.no_grad():
        model(**processor(images=images, text=f"USER: {'<image>' * pictures}\n{text} ASSISTANT:", return_tensors="pt"))
    return found


def seen(how: Anchor, query: Tensor, key: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Of every group of queries its range, and (H, rows, keys up to its end) bool, which keys each row attends to."""
    n, group, scale = query.shape[2], how.group, query.shape[-1] ** -0.5
    for start in range(0, n, group):
        stop = min(start + group, n)
        mask = causal(stop, query.device)[start:].expand(query.shape[1], -1, -1).clone()
        if start > group:
            mask[:, :, group:start] = how.kept(query, key, start, stop, scale)[0, :, None]
        yield start, stop, mask


def measured(how: Anchor, query: Tensor, key: Tensor) -> tuple[float, Tensor]:
    """The share of pairs that are computed, and the recall of each head (H,)."""
    pairs, recall, n = 0, torch.zeros(query.shape[1]), query.shape[2]
    for start, stop, mask in seen(how, query, key):
        logits = query[0, :, start:stop] @ key[0, :, :stop].transpose(1, 2) * query.shape[-1] ** -0.5
        weights = logits.masked_fill(~causal(stop, query.device)[start:], float("-inf")).softmax(-1)
        recall += (weights * mask).sum((1, 2))
        pairs += int(mask.sum())
    return pairs / (query.shape[1] * n * (n + 1) / 2), recall / n


def timed(call: Any, *args: Any, **kwargs: Any) -> float:
    call(*args, **kwargs)
    spent = []
    for _ in range(5):
        began = time.perf_counter()
        call(*args, **kwargs)
        spent.append(time.perf_counter() - began)
    return statistics.median(spent)


def main() -> int:
    print("| tokens | block, step, theta | computed | recall, mean | recall, lowest head | time / full |\n|---|---|---|---|---|---|")
    for pictures in PICTURES:
        found = layers(pictures)
        query, key, value = found[-1]
        full = timed(F.scaled_dot_product_attention, query, key, value, is_causal=True)
        for how in SETTINGS:
            results = [measured(how, q, k) for q, k, _ in found]
            computed, recall = statistics.mean(r[0] for r in results), torch.stack([r[1] for r in results])
            ratio = timed(how.attend, query, key, value, query.shape[-1] ** -0.5) / full
            cells = (
                f"{how.block}, {how.step}, {how.theta:g}",
                f"{100 * computed:.1f}%",
                f"{100 * recall.mean():.2f}%",
                f"{100 * recall.min():.1f}%",
            )
            print(f"| {query.shape[2]:,} | {' | '.join(cells)} | {ratio:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    with torch.no_grad():
        raise SystemExit(main())
