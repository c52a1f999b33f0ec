"""Whether a model knows when it is right: confidence of answers against their correctness, with intervals over images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mllm_efficient.stats import blocks, grouped, interval, points

BINS = 10
COLUMNS = ("ece", "ece_interval", "aurc", "aurc_interval")


class Watched:
    """A logits processor that changes nothing and remembers how probable each token was that ``generate`` took (not in beams).

    One step's distribution is held at a time: those of a long answer would be gigabytes.
    """

    def __init__(self) -> None:
        self._columns: list[Tensor] = []
        self._last: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._take(input_ids[:, -1:])
        self._last = scores.float().log_softmax(-1)
        return scores

    def _take(self, ids: Tensor) -> None:
        if self._last is not None:
            self._columns.append(self._last.gather(1, ids.to(self._last.device))[:, 0])

    def confidences(self, answers: Sequence[Tensor], last: Tensor) -> list[float]:
        """The geometric mean of the probabilities of each answer's tokens.

        answers: (T,) each, up to and with their ends. last: (B,) the last token of each row, padding or not.
        """
        self._take(last[:, None])
        self._last = None
        log_p = torch.stack(self._columns, 1).cpu()
        return [round(float(row[: len(ids)].mean().exp()), 6) for row, ids in zip(log_p, answers)]


@dataclass(frozen=True)
class Calibrated:
    """ece, aurc: (1 + RESAMPLES,) in percent, first of all answers, then of every resample of ``clusters`` images."""

    ece: np.ndarray
    aurc: np.ndarray
    clusters: int


def calibrated(records: Sequence[dict[str, Any]], seed: int = 0, name: str = "") -> Calibrated | None:
    """How a method's confidence fits its answers; None where an answer has no confidence. Those that failed are left out.

    records: with ``image``, ``confidence`` and ``correct``, a truth or a share in [0, 1]. name: of what is drawn from (``stats.picks``).

    ece: expected calibration error over ``BINS`` bins of equal width (Guo et al., arXiv 1706.04599): how far confidence and accuracy are
    apart, on average. aurc: the area under the risk-coverage curve (Geifman and El-Yaniv, arXiv 1705.08500): the mean share of wrong
    answers among the k most confident, over all k; what a model is wrong on that knows it costs little. Lower is better.
    """
    answered = [r for r in records if r.get("error") is None]
    if not answered or any(r.get("confidence") is None for r in answered):
        return None
    confident = np.array([r["confidence"] for r in answered])
    right = np.array([float(r["correct"]) for r in answered])
    members = grouped([r["image"] for r in answered])
    image = np.empty(len(answered), dtype=int)
    for i, m in enumerate(members):
        image[m] = i
    parts = [
        (_ece(confident, right, image, weights), _aurc(confident, right, image, weights))
        for weights in chain([np.ones((1, len(members)))], blocks(len(members), seed, name))
    ]
    ece, aurc = (np.concatenate(part) for part in zip(*parts))
    return Calibrated(ece, aurc, len(members))


def columns(found: Sequence[Calibrated | None]) -> dict[str, Any]:
    """``ece`` and ``aurc`` with their 95% intervals, in percent, of one or as the mean of several; None where one is lacking."""
    known = [c for c in found if c is not None]
    if not known or len(known) < len(found):
        return dict.fromkeys(COLUMNS)
    out: list[Any] = []
    for values in (np.mean([c.ece for c in known], 0), np.mean([c.aurc for c in known], 0)):
        out += [round(float(values[0]), 2), points(interval(values[1:], min(c.clusters for c in known)))]
    return dict(zip(COLUMNS, out))


def calibration(records: Sequence[dict[str, Any]], seed: int = 0) -> dict[str, Any]:
    """``columns`` of one method's answers."""
    return columns([calibrated(records, seed)])


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
