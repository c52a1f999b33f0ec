"""Rounds of removal on a CPU, for which every token has a list of those that are most like it: ``vispruner``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...lazy import torch
from .lazy import parts_of_rows

if TYPE_CHECKING:
    from torch import Tensor

LISTED = 8  # tokens on a list


def thinned(alike: Tensor, rest: Tensor, leave: int, at_once: int) -> Tensor:
    """What is left of ``rest`` (n,), ascending indices, when ``leave`` of them are: every second one, from the first on, is
    compared with those between, and the ``at_once`` most alike to any of them go, the lowest index of equal ones; and again.

    alike: (N, N) cosines in whole steps, used up.
    """
    alike.fill_diagonal_(float("-inf"))
    listed = alike.topk(min(LISTED, len(alike)), dim=1)
    rows, values, tokens = alike.numpy(), listed.values.numpy(), listed.indices.numpy()
    left, between = rest.numpy(), np.zeros(len(rows), dtype=bool)
    while len(left) > leave:
        first, others = left[::2], left[1::2]
        between[:] = False
        between[others] = True
        found = between[tokens[first]]
        at = found.argmax(1)
        nearest = values[first, at]
        gone_by = ~found[np.arange(len(first)), at]
        if gone_by.any():
            lost = first[gone_by]
            best = [np.take(rows[lost[part]], others, 1).max(1) for part in parts_of_rows(len(lost), len(rows))]
            nearest[gone_by] = np.concatenate(best)
            for part in parts_of_rows(len(lost), len(rows)):
                _list_anew(rows, left, lost[part], values, tokens)
        # NaN may be among them where the answer whether there is any is read later (``finite.Watch``).
        order = np.nan_to_num(nearest).astype(np.int64) * len(first) - np.arange(len(first))  # no two are equal
        gone = min(at_once, len(first), len(left) - leave)
        stays = np.ones(len(left), dtype=bool)
        stays[2 * np.argpartition(-order, gone - 1)[:gone]] = False
        left = left[stays]
    return torch.from_numpy(left)


def _list_anew(rows: np.ndarray, left: np.ndarray, some: np.ndarray, values: np.ndarray, tokens: np.ndarray) -> None:
    """Lists of some tokens, of those that are left alone."""
    count = min(tokens.shape[1], len(left))
    near = rows[some][:, left]
    best, row = np.argpartition(-near, count - 1, axis=1)[:, :count], np.arange(len(some))[:, None]
    value = near[row, best]
    order = np.argsort(-value, axis=1)
    tokens[some, :count], values[some, :count] = left[best[row, order]], value[row, order]
