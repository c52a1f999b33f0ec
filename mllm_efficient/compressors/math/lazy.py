"""Greedy choice on a CPU: what a token scores only falls as others are chosen, so an old score is a bound, and few are looked at again.

Minoux 1978; for determinants Hemmi et al., NeurIPS 2022, arXiv 2206.05947. A GPU, which would wait for every answer, scores all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ...lazy import torch
from .cosine import IN_CACHE

if TYPE_CHECKING:
    from torch import Tensor

BEHIND, TOGETHER = 4, 16  # a token that lacks so many entries of its row gets them together with so many others
LEAST = 1e-6  # no more than this is nothing: of a relevance, or of what S_ii has left


Score = Callable[[np.ndarray, int], np.ndarray]
Take = Callable[[int, int], None]


def greedy(scores: np.ndarray, k: int, score: Score, take: Take, few: int) -> Tensor:
    """(K,) indices in the order of choice; each time the largest score, the lowest index of equal ones.

    scores: (N,) before any is chosen, used up. score(tokens, i): what some tokens score after i picks, never more than before.
    take(token, i): hears of pick i. few: tokens that are scored anew at first; twice as many whenever none of them is the best.
    """
    seen, picked = np.zeros(len(scores), dtype=np.int64), np.empty(k, dtype=np.int64)  # seen: after how many picks each was scored
    for i in range(k):
        many = few
        while seen[best := int(scores.argmax())] != i:
            some = largest(scores, many, best)
            some = some[(seen[some] != i) & (scores[some] != -np.inf)]
            scores[some] = score(some, i)
            seen[some] = i
            many *= 2
        picked[i], scores[best] = best, -np.inf
        take(best, i)
    return torch.from_numpy(picked)


def largest(scores: np.ndarray, many: int, best: int) -> np.ndarray:
    """Indices of the ``many`` largest of scores, or of all, ``best`` among them whichever of equal ones they are."""
    if many == 1:
        return np.array([best])
    if many >= len(scores):
        return np.arange(len(scores))
    some = np.argpartition(scores, -many)[-many:]
    if best not in some:
        some[0] = best
    return some


def parts_of_rows(count: int, width: int) -> list[np.ndarray]:
    """Numbers 0 to count - 1 in parts, each of as many rows of a width as caches hold."""
    parts = -(-count // max(1, IN_CACHE // width))
    return [np.arange(count)] if parts == 1 else np.array_split(np.arange(count), parts)


def most_coverage(alike: Tensor, saliency: Tensor, k: int) -> Tensor:
    """(K,) indices in the order of choice as ``scope`` picks them, from cosines (N, N) in whole steps and float64 saliency (N,)."""
    rows, weight = alike.numpy(), saliency.numpy()
    cover, covered = np.zeros_like(rows[0]), 0.0

    def score(tokens: np.ndarray, i: int) -> np.ndarray:
        gain = np.empty(len(tokens))
        for part in parts_of_rows(len(tokens), len(rows)):
            np.maximum(rows[tokens[part]], cover).sum(1, dtype=np.float64, out=gain[part[0] : part[-1] + 1])  # whole numbers, so exact
        gained: np.ndarray = (gain - covered) * weight[tokens]
        return gained

    def take(token: int, i: int) -> None:
        nonlocal covered
        np.maximum(cover, rows[token], out=cover)
        covered = cover.sum(dtype=np.float64)

    return greedy(score(np.arange(len(rows)), 0), k, score, take, few=4)


class Volume:
    """The picks of ``cdpruner`` from rows x (N, D), of whatever dtype, in float64 arithmetic, for which only rows in question are made.

    lengths: (N,) that make rows of length 1 of them, or of length 0 where ``own`` is 0 and not 1. relevance: (N,) in [0, 1].
    """

    def __init__(self, x: Tensor, lengths: Tensor, own: Tensor, relevance: Tensor, k: int):
        self.x, self.lengths, self.relevance, self.left, self.k = x, lengths.numpy(), relevance.numpy(), own.numpy(), k
        self.known = np.zeros(len(x), dtype=np.int64)  # how many entries of its row of the factor are there
        self.factor = np.empty((len(x), k))
        self.chosen = x.new_empty(k, x.shape[1], dtype=torch.float64)
        self.corner = np.zeros((k, k))  # the chosen ones' rows of the factor, which is triangular

        self.scores = self._scores(np.arange(len(x)))

    def picks(self) -> Tensor:
        """(K,) indices in the order of choice."""
        return greedy(self.scores, self.k, self._score, self._take, few=1)

    def _adds(self, tokens: np.ndarray) -> np.ndarray:
        adds: np.ndarray = (self.relevance[tokens] > LEAST) & (self.left[tokens] > LEAST)
        return adds

    def _scores(self, tokens: np.ndarray) -> np.ndarray:
        relevance = self.relevance[tokens]
        scores: np.ndarray = np.where(self._adds(tokens), relevance * relevance * self.left[tokens], relevance - 2)
        return scores.astype(np.float32)

    def _score(self, tokens: np.ndarray, i: int) -> np.ndarray:
        some = tokens[self._adds(tokens)]
        if len(some) == 1 and i - self.known[some[0]] > BEHIND:  # others will be asked for soon: one pass over the chosen rows for all
            others = largest(self.scores, TOGETHER, some[0])
            some = others[self._adds(others) & (self.known[others] == self.known[some[0]]) & (self.scores[others] != -np.inf)]
        known = self.known[some]
        for entries in set(known.tolist()):
            alike = some[known == entries]
            for part in parts_of_rows(len(alike), self.x.shape[1]):
                self._extend(alike[part], entries, i)
        return self._scores(tokens)

    def _extend(self, tokens: np.ndarray, known: int, i: int) -> None:
        """Entries ``known`` to i of some tokens' rows of the factor."""
        rows = self.x.index_select(0, torch.from_numpy(tokens)).double()
        dots = torch.mm(rows, self.chosen[known:i].T).numpy() / self.lengths[tokens, None]
        factor, corner = self.factor[tokens, :i], self.corner
        for a in range(known, i):
            factor[:, a] = (dots[:, a - known] - np.einsum("ta,a->t", factor[:, :a], corner[a, :a])) / corner[a, a]
        self.factor[tokens, known:i] = factor[:, known:]
        self.left[tokens] -= np.square(factor[:, known:]).sum(1)
        self.known[tokens] = i

    def _take(self, token: int, i: int) -> None:
        self.chosen[i].copy_(self.x[token]).div_(self.lengths[token])
        self.corner[i, :i] = self.factor[token, :i]
        self.corner[i, i] = max(self.left[token], LEAST) ** 0.5
