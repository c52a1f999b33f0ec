"""The TokenFLEX projector as a module."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CountMismatchError, MllmEfficientError

POOLINGS = ("bilinear", "adaptive")
LAYERS = ("swiglu", "mlp")


class TokenFlexProjector(nn.Module):
    """Tower features on a grid -> side x side tokens of the language model's width, for any side.

    The grid is made a multiple of ``side`` by bilinear interpolation with aligned corners, averaged over equal windows,
    normalised, and projected by ``(silu(x W1) * (x W2)) W3`` with biases. 20.36 M parameters at 1152 -> 3584.

    Args:
        inputs, outputs: widths of the tower and of the language model. expansion: of the hidden width, times ``inputs``.
        pooling: "bilinear" as the released model does it, "adaptive" is the framework's adaptive average pooling, as the
            paper's text has it. Both are the same where ``side`` divides the grid.
        layers: "swiglu"; "mlp" is LLaVA's own linear-gelu-linear without a norm, hidden as wide as ``outputs``: a control.

    Source: TokenFLEX (arXiv 2504.03154), layer by layer as in the same team's released Ristretto model.
    """

    def __init__(self, inputs: int, outputs: int, *, expansion: int = 3, pooling: str = "bilinear", layers: str = "swiglu"):
        super().__init__()
        if not isinstance(expansion, int) or isinstance(expansion, bool) or expansion < 1:
            raise MllmEfficientError(f"expansion={expansion!r} of a TokenFLEX projector: a whole number from 1")
        if pooling not in POOLINGS or layers not in LAYERS:
            raise MllmEfficientError(f"a TokenFLEX projector has pooling {' or '.join(POOLINGS)} and layers {' or '.join(LAYERS)}")
        self.config: dict[str, Any] = {"expansion": expansion, "pooling": pooling, "layers": layers}
        self.inputs, self.outputs, self.pooling = inputs, outputs, pooling
        if layers == "swiglu":
            hidden = expansion * inputs
            self.norm = nn.LayerNorm(inputs)
            self.gate, self.up, self.down = nn.Linear(inputs, hidden), nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)
        else:
            self.linear_1, self.linear_2 = nn.Linear(inputs, outputs), nn.Linear(outputs, outputs)

    def pool(self, features: Tensor, side: int, grid: tuple[int, int] | None = None) -> Tensor:
        """(B, rows * columns, D) -> (B, side * side, D), row by row."""
        rows, columns = grid or _square(features.shape[1])
        if rows * columns != features.shape[1]:
            raise CountMismatchError(f"{features.shape[1]} features are no grid of {rows} x {columns}")
        if side < 1:
            raise CountMismatchError(f"side={side}: at least 1")
        plane = features.transpose(1, 2).unflatten(2, (rows, columns))
        if self.pooling == "adaptive":
            return F.adaptive_avg_pool2d(plane, side).flatten(2).transpose(1, 2)
        high, wide = (math.ceil(n / side) * side for n in (rows, columns))
        if (high, wide) != (rows, columns):
            plane = F.interpolate(plane, (high, wide), mode="bilinear", align_corners=True)
        return F.avg_pool2d(plane, (high // side, wide // side)).flatten(2).transpose(1, 2)

    def forward(self, features: Tensor, side: int | None = None, grid: tuple[int, int] | None = None) -> Tensor:
        """(B, N, inputs) -> (B, side * side, outputs). grid: (rows, columns) of N, a square if left out.

        Without a side every feature becomes a token: N of them.
        """
        x = features if side is None else self.pool(features, side, grid)
        if self.config["layers"] == "mlp":
            return self.linear_2(F.gelu(self.linear_1(x)))
        x = self.norm(x)
        return self.down(F.silu(self.gate(x)) * self.up(x))

    def extra_repr(self) -> str:
        return f"{self.inputs} -> {self.outputs}, {self.config}"


def _square(n: int) -> tuple[int, int]:
    side = math.isqrt(n)
    if side * side != n:
        raise CountMismatchError(f"{n} features form no square: give grid=(rows, columns)")
    return side, side
