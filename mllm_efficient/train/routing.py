"""What a router is told: how far the pooling should go, and which kernels answered well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def mean_levels(staging: Any, loss: str) -> list[Tensor]:
    """Mean level of what was decided, over the images: at every layer that pools, for "released" over all of them at once.

    A kernel's level is its number among those there are, for "removed" the share of the tokens that it takes away. See
    ``RoutingConfig`` for what is averaged.
    """
    each = []
    for number, stage in enumerate(staging.outcome["decided"]):
        levels = torch.arange(stage.chances.shape[1], device=stage.chances.device).to(stage.chances)
        if loss == "removed":
            levels = levels.new_tensor([1 - 1 / (rows * columns) for rows, columns in staging.method.experts(number)])
        if loss in ("expected", "removed"):
            each.append(stage.chances @ levels)
            continue
        used = torch.tensor([e or 0 for e in stage.experts], device=levels.device)
        used = stage.chances.argmax(1) if loss == "released" else used
        each.append(levels[used] * stage.chances.gather(1, used[:, None])[:, 0])
    return [torch.cat(each).mean()] if loss == "released" else [values.mean() for values in each]


def routing_loss(levels: Sequence[Tensor], target: float) -> Tensor:
    """The hinge max(0, target - level), the mean over layers."""
    return torch.stack([(target - level).clamp(min=0) for level in levels]).mean()


def log_odds(staging: Any, rows: int) -> Tensor:
    """(rows,) the log probability of all that was decided for a row."""
    out = None
    row = torch.tensor([image.row for image in staging.images])
    for stage in staging.outcome["decided"]:
        used = torch.tensor([e or 0 for e in stage.experts], device=stage.chances.device)
        odds = stage.chances.gather(1, used[:, None])[:, 0].clamp(min=1e-9).log()
        total = odds.new_zeros(rows).index_add(0, row.to(odds.device), odds)
        out = total if out is None else out + total
    assert out is not None
    return out


def reinforced(losses: Tensor, odds: Tensor, samples: int) -> Tensor:
    """The score-function estimator with the mean of a prompt's other samples as baseline (Kool et al., 2019); only its gradient counts.

    losses, odds: (prompts x samples,), the samples of a prompt one after the other.
    """
    given = losses.detach().view(-1, samples)
    others = (given.sum(1, keepdim=True) - given) / (samples - 1)
    term = ((given - others) * odds.view(-1, samples)).mean()
    return term - term.detach()


def routing_sums(staging: Any) -> Tensor:
    """(1 + stages x (1 + 2 kernels),) images, then of each stage: tokens left over all images' own, images by the kernel used and
    by the likeliest."""
    images, left = staging.images, staging.outcome["left"]
    out = [float(len(images))]
    for stage, counts in zip(staging.outcome["decided"], left):
        kernels = stage.chances.shape[1]
        out.append(sum(count / len(image.columns) for image, count in zip(images, counts)))
        likeliest = stage.chances.argmax(1).tolist()
        for chosen in (stage.experts, likeliest):
            out += [float(sum((e or 0) == k for e in chosen)) for k in range(kernels)]
    return torch.tensor(out)


def routing_log(sums: Sequence[float], layers: Sequence[int], kernels: Sequence[str]) -> dict[str, float]:
    """``routing_sums`` as a log has them: ``kept_8`` in percent, and shares of kernels, ``used_8_2x2`` and ``likeliest_8_2x2``."""
    images, rest, out = sums[0], list(sums[1:]), dict[str, float]()
    for layer in layers:
        part, rest = rest[: 1 + 2 * len(kernels)], rest[1 + 2 * len(kernels) :]
        out[f"kept_{layer}"] = round(100 * part[0] / images, 2)
        for what, shares in (("used", part[1 : 1 + len(kernels)]), ("likeliest", part[1 + len(kernels) :])):
            out |= {f"{what}_{layer}_{kernel}": round(share / images, 4) for kernel, share in zip(kernels, shares)}
    return out
