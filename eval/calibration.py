"""Whether a model knows when it is right: confidence of answers against their correctness, with intervals over images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mllm_efficient.stats import draws, grouped, interval, points

BINS = 10


def confidences(logits: Sequence[Tensor], ids: Tensor, ends: set[int]) -> list[float]:
    """The geometric mean of the probabilities of each answer's tokens, its end among them.

    logits: of every step, (B, vocabulary). ids: (B, T) the tokens taken; what stands behind an end is padding.
    """
    taken = torch.stack([step.float().log_softmax(-1).gather(1, ids[:, i : i + 1])[:, 0] for i, step in enumerate(logits)], 1).cpu()
    ended = torch.isin(ids.cpu(), torch.tensor(sorted(ends), dtype=ids.dtype))
    inside = (ended.cumsum(1) - ended.long()) == 0
    return [float(p) for p in ((taken * inside).sum(1) / inside.sum(1)).exp()]


def calibration(records: Sequence[dict[str, Any]], seed: int = 0) -> dict[str, Any]:
    """``ece`` and ``aurc`` of a method's answers with their 95% intervals, in percent; None where an answer has no confidence.

    ece: expected calibration error over ``BINS`` bins of equal width (Guo et al., arXiv 1706.04599): how far confidence and accuracy are
    apart, on average. aurc: the area under the risk-coverage curve (Geifman and El-Yaniv, arXiv 1705.08500): the mean share of wrong
    answers among the k most confident, over all k; what a model is wrong on that knows it costs little. Lower is better.
    """
    names = ("ece", "ece_interval", "aurc", "aurc_interval")
    if not records or any(r.get("confidence") is None for r in records):
        return dict.fromkeys(names)
    confident = np.array([r["confidence"] for r in records])
    right = np.array([float(r["correct"]) for r in records])
    members = grouped([r["image"] for r in records])
    image = np.empty(len(records), dtype=int)
    for i, m in enumerate(members):
        image[m] = i
    weights = np.concatenate([np.ones((1, len(members))), draws(len(members), seed)])
    found = []
    for values in (_ece(confident, right, image, weights), _aurc(confident, right, image, weights)):
        found += [round(float(values[0]), 2), points(interval(values[1:], len(members)))]
    return dict(zip(names, found))


def _ece(confident: np.ndarray, right: np.ndarray, image: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(resamples,) in percent. weights: (resamples, images)."""
    bins = np.minimum((confident * BINS).astype(int), BINS - 1)
    apart, asked = np.zeros((weights.shape[1], BINS)), np.zeros(weights.shape[1])
    np.add.at(apart, (image, bins), confident - right)
    np.add.at(asked, image, 1)
    return 100 * np.abs(weights @ apart).sum(1) / (weights @ asked)


def _aurc(confident: np.ndarray, right: np.ndarray, image: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(resamples,) in percent. An answer that is drawn twice counts twice; answers of equal confidence stand in no order, so that
    each of them counts with the share of wrong ones among them."""
    levels, level = np.unique(-confident, return_inverse=True)  # the most confident first
    out = np.empty(len(weights))
    for i, row in enumerate(weights):
        times = np.bincount(level, row[image], len(levels))
        wrong = np.bincount(level, row[image] * (1 - right), len(levels))
        each = np.repeat(wrong / np.maximum(times, 1), times.astype(int))
        out[i] = 100 * (np.cumsum(each) / np.arange(1, len(each) + 1)).mean()
    return out
