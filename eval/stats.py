"""Accuracy, retention and paired bootstrap intervals over images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

RESAMPLES = 2000


class Hits:
    """Correct answers and questions of one method by image and category: two arrays (images, categories)."""

    def __init__(self, rows: Sequence[dict[str, Any]], images: Sequence[Any], tasks: Sequence[str]):
        at_image, at_task = {v: i for i, v in enumerate(images)}, {v: i for i, v in enumerate(tasks)}
        self.right = np.zeros((len(images), len(tasks)))
        self.asked = np.zeros((len(images), len(tasks)))
        for row in rows:
            where = at_image[row["image"]], at_task[row["task"]]
            self.asked[where] += 1
            self.right[where] += row["correct"]


def draws(images: int, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """How often each image is in each bootstrap resample: (resamples, images). One draw serves every method (paired)."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(images, np.full(images, 1 / images), size=resamples).astype(float)


def accuracy(hits: Hits, weights: np.ndarray) -> np.ndarray:
    """Percent right per resample: (resamples, categories + 2); the last two are macro and micro.

    Macro is the unweighted mean of the categories that have questions. A category without a question is NaN.
    """
    right, asked = weights @ hits.right, weights @ hits.asked
    with np.errstate(invalid="ignore", divide="ignore"):
        each = 100 * right / asked
        micro = 100 * right.sum(1) / asked.sum(1)
    have = hits.asked.sum(0) > 0
    macro = np.nanmean(each[:, have], axis=1) if have.any() else np.full(len(weights), np.nan)
    return np.concatenate([each, macro[:, None], micro[:, None]], 1)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The central 95 % of bootstrap values."""
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return round(float(low), 2), round(float(high), 2)
