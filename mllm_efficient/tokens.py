"""What a compressor takes and gives, and the shape of an image's tokens: pure data, no model."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .lazy import torch

if TYPE_CHECKING:
    from torch import Generator, Tensor

Box = tuple[float, float, float, float]
Grid = tuple[int, int]
Span = tuple[int, int]


@dataclass(frozen=True)
class Plane:
    """A rectangle of visual tokens in raster order: a base view, a tile, a map put together from tiles, a video frame.

    tile: number of its first tile; frame: index of its frame, or None. row_tiles, column_tiles: for a map put together
    from tiles, what each row and each column add to ``tile``. box: (top, left, bottom, right) of what the plane covers,
    in fractions of the picture; a little outside [0, 1] where tokens look at padding. newline: whether the host puts a
    newline column after every row. placed: whether a token's row and column say which part of the box it covers.
    """

    rows: int
    columns: int
    tile: int = 0
    frame: int | None = None
    row_tiles: tuple[int, ...] = ()
    column_tiles: tuple[int, ...] = ()
    box: Box = (0.0, 0.0, 1.0, 1.0)
    newline: bool = False
    placed: bool = True

    def __len__(self) -> int:
        return self.rows * self.columns

    def tiles(self) -> Tensor:
        """(rows * columns,) the tile of each token."""
        if not self.row_tiles:
            return torch.full((len(self),), self.tile)
        return (self.tile + torch.tensor(self.row_tiles)[:, None] + torch.tensor(self.column_tiles)).flatten()


@dataclass(frozen=True)
class Mark:
    """Text that a prompt has among the placeholders of one image: the break after a row, the name of a tile.

    before: the placeholder in front of which it stands, counted within the image; ``length`` for what comes after the last one.
    words: what each of its columns is, in a word; equal words are equal tokens. of: (first, last + 1) placeholders each: the mark
    stays in the prompt as long as of every one of these spans a placeholder stays. One span is what the mark belongs to; two are
    what it stands between.
    """

    before: int
    words: tuple[str, ...]
    of: tuple[Span, ...]

    def left(self, slots: Sequence[int]) -> bool:
        """Whether it stays where the placeholders ``slots`` (ascending) do."""
        return all(bisect.bisect_left(slots, first) < bisect.bisect_left(slots, last) for first, last in self.of)


def grids_of(planes: tuple[Plane, ...]) -> tuple[Grid, ...]:
    """(rows, columns) of all planes that have tokens."""
    return tuple((p.rows, p.columns) for p in planes if len(p))


@dataclass(frozen=True)
class VisualShape:
    """The tokens of one image or video, known before any pixel is looked at: its planes one after the other.

    modality: "image" or "video". closing: separators after the last plane. ``n`` counts tokens; ``length`` counts the
    placeholders of the prompt, which are the tokens, the newline columns and the closing separators. marks: text among the
    placeholders, in the order of the prompt; ``marked`` counts its columns.
    """

    planes: tuple[Plane, ...]
    modality: str = "image"
    closing: int = 0
    marks: tuple[Mark, ...] = ()

    @functools.cached_property
    def n(self) -> int:
        return sum(len(p) for p in self.planes)

    @property
    def separators(self) -> int:
        return sum(p.rows for p in self.planes if p.newline) + self.closing

    @property
    def length(self) -> int:
        return self.n + self.separators

    @property
    def marked(self) -> int:
        return sum(len(mark.words) for mark in self.marks)

    def marked_by(self, slots: Sequence[int]) -> int:
        """Columns of the marks that stay where the placeholders ``slots`` (ascending) do."""
        return sum(len(mark.words) for mark in self.marks if mark.left(slots))

    @property
    def grid(self) -> tuple[int, int] | None:
        """(rows, columns) where the tokens form a single grid."""
        filled = [p for p in self.planes if len(p)]
        return (filled[0].rows, filled[0].columns) if len(filled) == 1 else None

    def tile(self) -> Tensor | None:
        """(N,) the tile of each token, or None where there is one tile."""
        if len(self.planes) == 1 or len({p.tile for p in self.planes}) == 1:
            return None
        return torch.cat([p.tiles() for p in self.planes])

    def frame(self) -> Tensor | None:
        """(N,) the frame of each token, or None for an image."""
        if self.modality != "video":
            return None
        return torch.cat([torch.full((len(p),), p.frame or 0) for p in self.planes])

    @functools.cached_property
    def token_slots(self) -> Tensor:
        """(N,) the places of the tokens among the ``length`` placeholders."""
        is_token: list[Tensor] = []
        for p in self.planes:
            rows = torch.ones(p.rows, p.columns + p.newline, dtype=torch.bool)
            rows[:, p.columns :] = False
            is_token.append(rows.flatten())
        is_token.append(torch.zeros(self.closing, dtype=torch.bool))
        return torch.cat(is_token).nonzero()[:, 0]


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of one image, in raster order (newline and separator columns are not among them).

    features: (N, D), what the projector hands to the language model.
    grid: (rows, columns) with rows * columns = N, or None where tokens form no single grid.
    tile, frame: (N,) index of the anyres tile or video frame of each token, or None.
    attention: (N,) attention the tokens receive in the vision tower (from CLS where there is one, else their mean),
        averaged over heads; only for methods that list ``attention`` in ``needs``.
    keys: (N, d) attention keys of the same layer, averaged over heads; only if needed.
    early_attention: (N,) as ``attention``, in the block a quarter of the way up the tower (of a tower of windows the first that sees the
        whole image); only if needed.
    grids: (rows, columns) of the rectangles that the tokens fill, one after the other, or None where nothing is known of them.
    text: (T, D) embeddings of the row's text tokens; only if needed.
    clip_text: (d,), clip_patches: (N, d), of a method with a setting ``clip`` that names a CLIP model: the text of the row
        (the mean of its pieces' unit embeddings) and the tokens in CLIP's space; only if ``clip_text`` is needed.
    heads: (heads, N) products of text and visual tokens in the decoder's first layer, without rotary positions, mean over the text;
        only if needed.
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
    clip_patches: Tensor | None = None
    heads: Tensor | None = None
    generator: Generator | None = None
    early_attention: Tensor | None = None
    grids: tuple[Grid, ...] | None = None

    def __len__(self) -> int:
        return self.features.shape[0]


@dataclass(frozen=True)
class CompressedTokens:
    """features: (K, D); indices: (K,) of the kept tokens, or None where tokens were merged; grid of the K, if any.

    places: (K,) ascending, of merged ones the token that each took the others into and whose place it has, if each has one.
    groups: (N,) of a selection into whose tokens the others were merged: the place in ``indices`` of the kept token that each of the N
    is part of, a kept one of itself. weights: (N,) what each counts in the mean of its group. None where nothing was merged.
    """

    features: Tensor
    indices: Tensor | None = None
    grid: tuple[int, int] | None = None
    groups: Tensor | None = None
    weights: Tensor | None = None
    places: Tensor | None = None

    def __len__(self) -> int:
        return self.features.shape[0]

    @property
    def counts(self) -> Tensor | None:
        """(K,) of how many tokens each kept one is the mean, itself included."""
        return None if self.groups is None else counts_of(self.groups, len(self))


def counts_of(groups: Tensor, k: int) -> Tensor:
    """(k,) how many of groups (N,) are 0, 1 and so on; -1 is none of them."""
    return torch.zeros(k + 1, dtype=torch.long, device=groups.device).index_add(0, groups + 1, torch.ones_like(groups))[1:]


@dataclass(frozen=True)
class LayerTokens:
    """The visual tokens of one image between two decoder layers, and the text of its prompt up to the instruction's end.

    hidden: (n, d), text: (T, d), question: (d,): states about to enter the layer, of the visual tokens in raster order, of
        the text tokens, and of the instruction's last token.
    index: (n,) of each token among the N that entered the decoder. places: (n, 4) image within its row, plane,
        row and column of each.
    attention: (n,) attention of the instruction's last token, text_attention: (T, n) of every text token, averaged over
        heads, in the rater layer; only for methods that list them in ``needs``.
    keys: (n, w), text_keys: (T, w): keys of the rater layer as the cache has them, heads side by side; only if needed.
    entry: (N, d), text_entry: (T, d): what entered the decoder; only if needed.
    grids: (rows, columns) of the rectangles that the tokens fill, one after the other; None where they fill none.
    kernel, factor: of a method that routes, what was decided for the image (see ``Decision``).
    """

    hidden: Tensor
    text: Tensor
    question: Tensor
    index: Tensor
    places: Tensor
    attention: Tensor | None = None
    text_attention: Tensor | None = None
    keys: Tensor | None = None
    text_keys: Tensor | None = None
    entry: Tensor | None = None
    text_entry: Tensor | None = None
    grids: tuple[Grid, ...] | None = None
    kernel: Grid | None = None
    factor: Tensor | None = None

    def __len__(self) -> int:
        return self.hidden.shape[0]


@dataclass(frozen=True)
class ReducedTokens:
    """What a stage leaves of n tokens.

    indices: (k,) ascending, of the tokens that stay; of a merged token the one whose place in the prompt it takes.
    features: (k, d) of merged tokens, None where tokens stay as they are. places: (k, 4), grids: of merged tokens.
    """

    indices: Tensor
    features: Tensor | None = None
    places: Tensor | None = None
    grids: tuple[Grid, ...] | None = None

    def __len__(self) -> int:
        return self.indices.shape[0]


@dataclass(frozen=True)
class Decision:
    """What a method that routes decided at a stage, for each of its images.

    kernels: (rows, columns) to pool by, None where nothing may be done. experts: its number among those there are.
    chances: (images, experts) probabilities, with their gradient. factors: (images,) what the pooled tokens are multiplied
    with, None for nothing.
    """

    kernels: tuple[Grid | None, ...]
    experts: tuple[int | None, ...]
    chances: Tensor
    factors: Tensor | None = None
