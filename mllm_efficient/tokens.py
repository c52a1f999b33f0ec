"""What a compressor takes and gives: tensors of one image, no model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Generator, Tensor


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of one image, in raster order.

    features: (N, D), what the projector hands to the language model.
    grid: (rows, columns) with rows * columns = N, or None where tokens form no single grid.
    tile, frame: (N,) index of the anyres tile or video frame of each token, or None.
    attention: (N,) attention the tokens receive in the vision tower (from CLS where there is one, else their mean),
        averaged over heads; only for methods that list ``attention`` in ``needs``.
    keys: (N, d) attention keys of the same layer, averaged over heads; only if needed.
    text: (T, D) embeddings of the row's text tokens; only if needed.
    clip_text: (d,) text embedding in the tower's contrastive space; only if needed.
    generator: seeded by (the method's seed, the image's key); for methods that draw.
    """

    features: Tensor
    grid: tuple[int, int] | None = None
    tile: Tensor | None = None
    frame: Tensor | None = None
    attention: Tensor | None = None
    keys: Tensor | None = None
    text: Tensor | None = None
    clip_text: Tensor | None = None
    generator: Generator | None = None

    def __len__(self) -> int:
        return self.features.shape[0]


@dataclass(frozen=True)
class CompressedTokens:
    """features: (K, D); indices: (K,) of the kept tokens, or None where tokens were merged; grid of the K, if any."""

    features: Tensor
    indices: Tensor | None = None
    grid: tuple[int, int] | None = None

    def __len__(self) -> int:
        return self.features.shape[0]
