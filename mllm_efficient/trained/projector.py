"""The TokenFLEX projector as a module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compressors.mixing import MIXERS, OVER, POOLINGS, QUERIES, QUESTION, SIDE, SIDED
from ..errors import CountMismatchError, MllmEfficientError, did_you_mean
from . import mixers, poolings

LAYERS = ("swiglu", "mlp")


class TokenFlexProjector(nn.Module):
    """Tower features on a grid -> side x side tokens of the language model's width, for any side.

    The grid is made a multiple of ``side`` by bilinear interpolation with aligned corners, averaged over equal windows,
    normalised, and projected by ``(silu(x W1) * (x W2)) W3`` with biases. 20.36 M parameters at 1152 -> 3584.

    Args:
        inputs, outputs: widths of the tower and of the language model. expansion: of the hidden width, times ``inputs``.
        pooling: "bilinear" as the released model does it ("avg" is another name), "adaptive" is the framework's adaptive average
            pooling, as the paper's text has it. Both are the same where ``side`` divides the grid. Learned ones are "tap", "attsets",
            "ggem", "regional_gem" and "prefix", ordered tokens of which any number of ``queries`` (64) can be asked for (``poolings``), and
            "question", whose tokens depend on the text of the prompt.
        mixer: what the grid goes through before it is pooled: "none", "pool", "raft", "strip", "shift", "csw" or "dwconv" (``mixers``).
        mixer_side: of the grid that "raft" and "strip" have weights for, 12; other grids are resampled, or clipped at its end.
        over: "image" gives every view its tokens; "views" and "frames" have weights that make the tokens of one place in several views
            of a picture, or frames of a video, to one (``poolings.AttSets``), where ``sets`` asks for it.
        layers: "swiglu"; "mlp" is LLaVA's own linear-gelu-linear without a norm, hidden as wide as ``outputs``: a control.

    Source: TokenFLEX (arXiv 2504.03154), layer by layer as in the same team's released Ristretto model.
    """

    def __init__(
        self, inputs: int, outputs: int, *, expansion: int = 3, pooling: str = "bilinear", layers: str = "swiglu", mixer: str = "none",
        mixer_side: int | None = None, queries: int | None = None, over: str = "image",
    ):  # fmt: skip
        super().__init__()
        pooling = "bilinear" if pooling == "avg" else pooling
        if not isinstance(expansion, int) or isinstance(expansion, bool) or expansion < 1:
            raise MllmEfficientError(f"expansion={expansion!r} of a TokenFLEX projector: a whole number from 1")
        for what, value, known in (
            ("pooling", pooling, POOLINGS),
            ("layers", layers, LAYERS),
            ("mixer", mixer, MIXERS),
            ("over", over, OVER),
        ):
            if value not in known:
                raise MllmEfficientError(f"{what}={value!r} of a TokenFLEX projector: {', '.join(known)}{did_you_mean(str(value), known)}")
        self.config: dict[str, Any] = {"expansion": expansion, "pooling": pooling, "layers": layers}
        self.inputs, self.outputs, self.pooling = inputs, outputs, pooling
        self._before(mixer, mixer_side, queries)
        self.across = None if over == "image" else poolings.AttSets(inputs)
        self.config |= {} if over == "image" else {"over": over}
        if layers == "swiglu":
            hidden = expansion * inputs
            self.norm = nn.LayerNorm(inputs)
            self.gate, self.up, self.down = nn.Linear(inputs, hidden), nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)
        else:
            self.linear_1, self.linear_2 = nn.Linear(inputs, outputs), nn.Linear(outputs, outputs)

    def _before(self, mixer: str, mixer_side: int | None, queries: int | None) -> None:
        """Builds what is in front of the layers: a mixer and a learned pooling, if there are any."""
        for what, value, used in (("mixer_side", mixer_side, mixer in SIDED), ("queries", queries, self.pooling == "prefix")):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise MllmEfficientError(f"{what}={value!r} of a TokenFLEX projector: a whole number from 1")
            if value is not None and not used:
                raise MllmEfficientError(
                    f"{what}={value} has no effect: it is of {'mixer=raft and strip' if what == 'mixer_side' else 'pooling=prefix'}"
                )
        self.mixer = self.pooler = None
        if mixer != "none":
            self.mixer = mixers.MIXERS[mixer](self.inputs, mixer_side or SIDE)
            self.config |= {"mixer": mixer} | ({"mixer_side": mixer_side or SIDE} if mixer in SIDED else {})
        if self.pooling in poolings.POOLERS:
            self.pooler = poolings.POOLERS[self.pooling](self.inputs, queries or QUERIES)
            self.config |= {"queries": queries or QUERIES} if self.pooling == "prefix" else {}
        if self.asks:
            self.pooler = poolings.Question(self.inputs, self.outputs)

    @property
    def asks(self) -> bool:
        """Whether the pooled tokens depend on the text of the prompt."""
        return bool(self.pooling == QUESTION)

    def pool(
        self, features: Tensor, side: int, grid: tuple[int, int] | None = None, text: Sequence[Tensor | None] | None = None
    ) -> Tensor:  # fmt: skip
        """(B, rows * columns, D) -> (B, side * side, D), row by row, or of ordered tokens the first ones. text: as of ``forward``."""
        if side < 1:
            raise CountMismatchError(f"side={side}: at least 1")
        plane = self.mixed(features, grid)
        rows, columns = plane.shape[2:]
        if self.asks:
            assert self.pooler is not None
            asked: Tensor = self.pooler(plane, side, _each_asked(text, len(plane)))
            return asked
        if self.pooler is not None:
            pooled: Tensor = self.pooler(plane, side)
            return pooled
        if self.pooling == "adaptive":
            return F.adaptive_avg_pool2d(plane, side).flatten(2).transpose(1, 2)
        high, wide = (math.ceil(n / side) * side for n in (rows, columns))
        if (high, wide) != (rows, columns):
            plane = F.interpolate(plane, (high, wide), mode="bilinear", align_corners=True)
        return F.avg_pool2d(plane, (high // side, wide // side)).flatten(2).transpose(1, 2)

    def joined(self, tokens: Tensor, sets: Sequence[int]) -> Tensor:
        """(B, n, D) pooled tokens of views -> (sets, n, D): each place of a set's views made one, in whatever order they are."""
        if self.across is None:
            raise CountMismatchError("the weights of this projector are for views by themselves: train some with settings.over=views")
        if sum(sets) != len(tokens) or min(sets, default=1) < 1:
            raise CountMismatchError(f"sets={list(sets)} are not {len(tokens)} views")
        return torch.stack([self.across.aggregate(views.transpose(0, 1)) for views in tokens.split(list(sets))])

    def mixed(self, features: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """(B, rows * columns, D) -> (B, D, rows, columns), through the mixer if there is one."""
        rows, columns = grid or _square(features.shape[1])
        if rows * columns != features.shape[1]:
            raise CountMismatchError(f"{features.shape[1]} features are no grid of {rows} x {columns}")
        plane = features.transpose(1, 2).unflatten(2, (rows, columns))
        return plane if self.mixer is None else self.mixer(plane)

    def forward(
        self, features: Tensor, side: int | None = None, grid: tuple[int, int] | None = None, count: int | None = None,
        text: Sequence[Tensor | None] | None = None, sets: Sequence[int] | None = None,
    ) -> Tensor:  # fmt: skip
        """(B, N, inputs) -> (B, side * side, outputs). grid: (rows, columns) of N, a square if left out.

        Without a side every feature becomes a token: N of them. count: of ordered tokens (pooling="prefix"), the first so many.
        text: (T, outputs) embeddings of what is asked about each of the B (pooling="question"). sets: how many of the B, in their order,
        become one each (``over``): (sets, side * side, outputs). Raises ``CountMismatchError``.
        """
        if text is not None and (side is None or not self.asks):
            raise CountMismatchError("text= is of pooling='question', and beside a side")
        if count is not None:
            if not isinstance(self.pooler, poolings.Prefix) or side is not None:
                raise CountMismatchError(f"count={count} is of ordered tokens, pooling='prefix', and without a side")
            x = self.pooler.first(self.mixed(features, grid), count)
        elif side is not None:
            x = self.pool(features, side, grid, text)
            x = x if sets is None else self.joined(x, sets)
        else:
            x = features if self.mixer is None else self.mixed(features, grid).flatten(2).transpose(1, 2)
        if self.config["layers"] == "mlp":
            return self.linear_2(F.gelu(self.linear_1(x)))
        x = self.norm(x)
        return self.down(F.silu(self.gate(x)) * self.up(x))

    def extra_repr(self) -> str:
        return f"{self.inputs} -> {self.outputs}, {self.config}"


def _each_asked(text: Sequence[Tensor | None] | None, pictures: int) -> list[Tensor]:
    """The text of each picture, none of them empty."""
    asked = [words for words in text or () if words is not None and len(words)]
    if len(asked) != pictures:
        raise CountMismatchError(
            f"pooling='question' makes tokens by the text of their row, and {pictures - len(asked)} of {pictures} views have none: "
            "ask something in every row, and give text= where the projector is called by itself"
        )
    return asked


def _square(n: int) -> tuple[int, int]:
    side = math.isqrt(n)
    if side * side != n:
        raise CountMismatchError(f"{n} features form no square: give grid=(rows, columns)")
    return side, side
