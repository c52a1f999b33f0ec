"""Sums of rows by group, added in an order that no device and no batch changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def group_sums(rows: Tensor, group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """(groups, D) sums of rows (N, D) and (groups,) how many each has, 0 of both where it has none. group: (N,) of each row.

    Rows of a group are added from the first on, as ``index_add`` does on a CPU; on a CUDA device it adds them in whatever order
    threads arrive.
    """
    parts = torch.zeros(groups, dtype=torch.long, device=rows.device).index_add(0, group, torch.ones_like(group))
    if rows.device.type != "cuda":
        return rows.new_zeros(groups, rows.shape[1]).index_add(0, group, rows), parts
    order = group.sort(stable=True).indices
    return torch.segment_reduce(rows[order], "sum", lengths=parts, axis=0, unsafe=True), parts
