"""Which visual tokens look at given parts of a picture."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mllm_efficient.tokens import Plane

ROUNDING = 1e-9  # of a picture's side
Fractions = tuple[float, float, float, float]  # top, left, bottom, right


def cells_over(plane: Plane, boxes: Iterable[Fractions]) -> np.ndarray:
    """bool (rows, columns) of a plane's cells that overlap any of the boxes. A touching edge, up to rounding, is no overlap."""
    top, left, bottom, right = plane.box
    y, x = np.linspace(top, bottom, plane.rows + 1), np.linspace(left, right, plane.columns + 1)
    inside = np.zeros((plane.rows, plane.columns), dtype=bool)
    for first, start, last, end in boxes:
        rows = (y[:-1] < min(last, 1) - ROUNDING) & (y[1:] > max(first, 0) + ROUNDING)
        columns = (x[:-1] < min(end, 1) - ROUNDING) & (x[1:] > max(start, 0) + ROUNDING)
        inside |= rows[:, None] & columns
    return inside
