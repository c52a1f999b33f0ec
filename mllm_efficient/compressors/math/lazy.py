"""Greedy choice on a CPU: what a token scores only falls as others are chosen, so an old score is a bound, and few are looked at again.

Minoux 1978; for determinants Hemmi et al., NeurIPS 2022, arXiv 2206.05947. A GPU, which would wait for every answer, scores all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ...lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

FEW = 4  # tokens that are scored anew at first; twice as many whenever none of them is the best
LEAST = 1e-6  # no more than this is nothing: of a relevance, or of what S_ii has left


def greedy(scores: np.ndarray, k: int, score: Callable[[np.ndarray, int], np.ndarray], take: Callable[[int, int], None]) -> Tensor:
    """(K,) indices in the order of choice; each time the largest score, the lowest index of equal ones.

    scores: (N,) before any is chosen, used up. score(tokens, i): what some tokens score after i picks, never more than before.
    take(token, i): hears of pick i.
    """
    seen, picked = np.zeros(len(scores), dtype=np.int64), np.empty(k, dtype=np.int64)  # seen: after how many picks each was scored
    for i in range(k):
        many = FEW
        while seen[best := int(scores.argmax())] != i:
            some = np.argpartition(scores, -many)[-many:] if many < len(scores) else np.arange(len(scores))
            some = np.append(some[(seen[some] != i) & (some != best) & (scores[some] > -np.inf)], best)
            scores[some] = score(some, i)
            seen[some] = i
            many *= 2
        picked[i], scores[best] = best, -np.inf
        take(best, i)
    return torch.from_numpy(picked)


def most_coverage(alike: Tensor, saliency: Tensor, k: int) -> Tensor:
    """(K,) indices in the order of choice as ``scope`` picks them, from cosines (N, N) in whole steps and float64 saliency (N,)."""
    rows, weight = alike.numpy(), saliency.numpy()
    cover = np.zeros_like(rows[0])

    def score(tokens: np.ndarray, i: int) -> np.ndarray:
        gain = np.maximum(rows[tokens], cover).sum(1, dtype=np.float64)  # whole numbers, so exact
        return (gain - cover.sum(dtype=np.float64)) * weight[tokens]

    def take(token: int, i: int) -> None:
        np.maximum(cover, rows[token], out=cover)

    parts = np.array_split(np.arange(len(rows)), -(-len(rows) // 64))
    return greedy(np.concatenate([score(part, 0) for part in parts]), k, score, take)


class Volume:
    """The picks of ``cdpruner`` from rows x (N, D), of whatever dtype, in float64 arithmetic, for which only rows in question are made.

    divisors: two of (N, 1), what x is divided by to be of unit length. own: (N,) squared lengths then, 1 or 0.
    """

    def __init__(self, x: Tensor, divisors: tuple[Tensor, Tensor], own: Tensor, relevance: Tensor, k: int):
        self.x, self.divisors, self.relevance, self.k = x, divisors, relevance, k
        n = len(x)
        self.left, self.known = own.clone(), np.zeros(n, dtype=np.int64)  # known: how many entries of its row of the factor are there
        self.factor = x.new_empty(n, k, dtype=torch.float64)
        self.chosen = x.new_empty(k, x.shape[1], dtype=torch.float64)
        self.corner = x.new_zeros(k, k, dtype=torch.float64)  # the chosen ones' rows of the factor, which is triangular

    def picks(self) -> Tensor:
        """(K,) indices in the order of choice."""
        return greedy(self._scores(torch.arange(len(self.x))), self.k, self._score, self._take)

    def _rows(self, tokens: Tensor) -> Tensor:
        rows = self.x.index_select(0, tokens).to(torch.float64)
        for divisor in self.divisors:
            rows.div_(divisor[tokens])
        return rows

    def _scores(self, tokens: Tensor) -> np.ndarray:
        relevance, left = self.relevance[tokens], self.left[tokens]
        adds = (relevance > LEAST) & (left > LEAST)
        return torch.where(adds, relevance * relevance * left, relevance - 2).float().numpy()

    def _score(self, tokens: np.ndarray, i: int) -> np.ndarray:
        adds = ((self.relevance > LEAST) & (self.left > LEAST)).numpy()
        some = tokens[adds[tokens]]
        for known in np.unique(self.known[some]):
            self._extend(torch.from_numpy(some[self.known[some] == known]), int(known), i)
        self.known[some] = i
        return self._scores(torch.from_numpy(tokens))

    def _extend(self, tokens: Tensor, known: int, i: int) -> None:
        """Entries ``known`` to i of some tokens' rows of the factor."""
        entries = self.chosen[known:i] @ self._rows(tokens).T
        if known:
            entries -= self.corner[known:i, :known] @ self.factor[tokens, :known].T
        entries = torch.linalg.solve_triangular(self.corner[known:i, known:i], entries, upper=False)
        self.factor[tokens, known:i] = entries.T
        self.left[tokens] -= entries.square().sum(0)

    def _take(self, token: int, i: int) -> None:
        self.chosen[i] = self._rows(torch.tensor([token]))[0]
        self.corner[i, :i] = self.factor[token, :i]
        self.corner[i, i] = self.left[token].clamp(min=LEAST).sqrt()
