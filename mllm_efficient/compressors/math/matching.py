"""Bipartite soft matching on a CPU, from the products of the tokens alone: ``tome`` after the projector.

The product of a sum with a token is the sum of the products, so that one product of all rows serves all rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...lazy import torch
from .cosine import at_least_float32, similarity, steps
from .lazy import parts_of_rows
from .sums import group_sums

if TYPE_CHECKING:
    from torch import Tensor

CANCELS = 1 / 32  # a sum shorter than this share of its parts has lost digits that count: its products are made anew


def grouped(x: Tensor, rounds: Sequence[int], name: str) -> Tensor:
    """(N,) the merged token that each of the rows (N, D) becomes a part of, counted in raster order. rounds: pairs merged in each.

    NaN and infinity raise (``require_finite``).
    """
    given = x = x.detach()
    todo = list(rounds)
    group = np.arange(len(x))
    with np.errstate(invalid="ignore", over="ignore"):  # of NaN or infinity, where the answer is read later (``finite.Watch``)
        while todo:
            into, done = _rounds(x, todo, name)
            group = into[group]
            del todo[:done]
            if todo:
                x = group_sums(given.to(at_least_float32(given)), torch.from_numpy(group), int(group.max()) + 1)[0]
    return torch.from_numpy(group)


def _rounds(x: Tensor, rounds: Sequence[int], name: str) -> tuple[np.ndarray, int]:
    """(n,) what each of the rows x (n, D) becomes a part of, and after how many rounds: all, or those until a sum cancels."""
    alike, lengths = (each.numpy() for each in similarity(x, name, "visual tokens"))
    into, left = np.arange(len(alike)), np.arange(len(alike))
    done, cancelled = 0, False
    while done < len(rounds) and not cancelled:
        gone, target = _match(alike, left, rounds[done])
        into[gone] = target
        cancelled = _merge(alike, lengths, gone, target)
        left = np.setdiff1d(left, gone, assume_unique=True)
        done += 1
    while (into[into] != into).any():  # a token of B may have gone to another in a later round
        into = into[into]
    place = np.cumsum(np.bincount(left, minlength=len(into))) - 1
    return place[into], done


def _match(alike: np.ndarray, left: np.ndarray, pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that merge in a round, and those that they merge into; of ``left``, the first and every second are A, the others B."""
    a, b = left[::2], left[1::2]
    best, partner = np.empty(len(a), dtype=alike.dtype), np.empty(len(a), dtype=np.int64)
    for part in parts_of_rows(len(a), len(alike)):
        near = np.take(np.take(alike, a[part], 0), b, 1)
        np.rint(near, out=near)
        partner[part] = at = near.argmax(1)
        best[part] = near[np.arange(len(at)), at]
    strongest = np.argsort(-best, kind="stable")[:pairs]
    return a[strongest], b[partner[strongest]]


def _merge(alike: np.ndarray, lengths: np.ndarray, gone: np.ndarray, target: np.ndarray) -> bool:
    """Puts the products of the sums, added up in float64, in the places of their tokens of B. Whether one of the sums is short.

    alike: (N, N) cosines in steps. lengths: (N,) of the sums.
    """
    targets, inverse = np.unique(target, return_inverse=True)
    members, owner = np.concatenate([targets, gone]), np.concatenate([np.arange(len(targets)), inverse])
    order = np.argsort(owner, kind="stable")
    members, owner = members[order], owner[order]
    starts = np.searchsorted(owner, np.arange(len(targets)))
    whole = np.bincount(owner, weights=lengths[members])
    shares = lengths[members] / np.where(whole > 0, whole, 1)[owner]
    rows = np.empty((len(targets), len(alike)))  # products of the sums with unit rows
    for part in parts_of_rows(len(targets), len(alike)):
        some = slice(starts[part[0]], starts[part[-1] + 1] if part[-1] + 1 < len(targets) else len(members))
        np.add.reduceat(alike[members[some]] * shares[some, None], starts[part] - starts[part[0]], axis=0, out=rows[part[0] : part[-1] + 1])
    both = np.add.reduceat((rows[:, members] * shares).T, starts, axis=0)  # and with each other
    length = np.sqrt(np.maximum(both.diagonal(), 0) / steps(torch.from_numpy(alike).dtype))
    scale = np.where(length > 0, 1 / np.where(length > 0, length, 1), 0)
    rows *= scale[:, None]
    rows[:, targets] = both * scale * scale[:, None]
    alike[targets], alike[:, targets] = rows, rows.T
    lengths[targets] = length * whole
    return bool(((length < CANCELS) & (whole > 0)).any())
