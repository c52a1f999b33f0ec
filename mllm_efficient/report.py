"""What a call did: tokens per image, indices, positions, time."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .errors import MllmEfficientError
from .tokens import counts_of

if TYPE_CHECKING:
    from torch import Tensor

    from .tokens import Plane


@dataclass(frozen=True)
class ImageReport:
    """One image or video: ``full`` tokens before, ``kept`` after; separators are counted apart.

    row: of the batch. indices: (K,) of the kept tokens, on the CPU, None where tokens were merged. grid: (rows, columns)
    of the tokens, or of the merged ones, where they form one grid. tile, frame: (N,) of each token before, or None.
    clamped: more tokens were asked than there are. modality: "image" or "video". planes: the rectangles that the N
    tokens form, one after the other, with what each covers of the picture; kept_planes: those of the merged tokens,
    None where tokens were selected; of_merged: (K,) of the merged tokens that are left, None for all of them.
    separators_full, separators_kept: columns of the prompt that belong to the image and are no tokens: newline columns, and text between
    its tokens such as row breaks and the names of tiles. per_layer: of an
    in-decoder method the tokens at each decoder layer, of which ``kept`` is the mean, rounded, and ``indices`` are those at
    the end; empty where all layers see the same. kernels: of a method that routes, the one chosen at each stage.
    groups: (N,) of a selection into which the other tokens were merged: the place in ``indices`` (in ``of_merged`` behind another
    projector, of whose tokens it then is) of the token that each is part of, -1 where that went inside the decoder; None where
    nothing was merged so. counts: (K,) how many tokens each holds, itself included.
    """

    row: int
    full: int
    kept: int
    indices: Tensor | None
    grid: tuple[int, int] | None = None
    tile: Tensor | None = None
    clamped: bool = False
    modality: str = "image"
    planes: tuple[Plane, ...] = ()
    kept_planes: tuple[Plane, ...] | None = None
    frame: Tensor | None = None
    separators_full: int = 0
    separators_kept: int = 0
    per_layer: tuple[int, ...] = ()
    kernels: tuple[str, ...] = ()
    of_merged: Tensor | None = None
    groups: Tensor | None = None

    @property
    def counts(self) -> Tensor | None:
        left = self.of_merged if self.indices is None else self.indices
        return None if self.groups is None or left is None else counts_of(self.groups, len(left))


def by_layer(per_layer: Sequence[float]) -> str:
    """``144, from layer 1 36``: tokens at each decoder layer in words."""
    changes = [f"{n:,.6g}" if i == 0 else f"from layer {i} {n:,.6g}" for i, n in enumerate(per_layer) if i == 0 or n != per_layer[i - 1]]
    return ", ".join(changes)


@dataclass(frozen=True)
class CacheUse:
    """What a call had of the vision cache. hits: pictures and frames found there, or seen earlier in the call; runs: of the tower, one
    for each of the others. bytes: kept after the call, of at most ``limit``."""

    hits: int
    runs: int
    bytes: int
    limit: int


@dataclass(frozen=True)
class CompressionReport:
    """One call. ``images`` in prompt order; ``stages`` are the methods that ran, as ``to_dict()`` gives them.

    ``tokens_per_layer``: visual tokens of the whole batch at each decoder layer. ``compress_seconds`` is the method's
    own time, without the vision tower (0.0 where nothing was compressed): the device's on CUDA, elsewhere the host's. An empty
    ``images`` is a text-only call, or one with ``compression=None``, which is ``off``. unwrapped: the method was taken off the
    model since, so that nothing is compressed now. vision_cache: of a model with ``cache=``; None where that was not asked, as in training.
    """

    images: tuple[ImageReport, ...] = ()
    stages: tuple[dict[str, Any], ...] = ()
    positions: str = "renumber"
    decoder_layers: int = 0
    compress_seconds: float = 0.0
    off: bool = False
    unwrapped: bool = False
    vision_cache: CacheUse | None = None

    @property
    def visual_tokens_full(self) -> int:
        return sum(i.full for i in self.images)

    @property
    def visual_tokens_kept(self) -> int:
        return sum(i.kept for i in self.images)

    @property
    def separators_full(self) -> int:
        """Newline columns, row breaks, names of tiles and the like beside the tokens before compression."""
        return sum(i.separators_full for i in self.images)

    @property
    def separators_kept(self) -> int:
        """Those that stayed."""
        return sum(i.separators_kept for i in self.images)

    @property
    def tokens_per_layer(self) -> list[int]:
        return [sum(i.per_layer[layer] if i.per_layer else i.kept for i in self.images) for layer in range(self.decoder_layers)]

    @property
    def layer_average(self) -> float:
        """Visual tokens of the whole batch at a decoder layer, on average."""
        layers = self.tokens_per_layer
        return sum(layers) / len(layers) if layers else float(self.visual_tokens_kept)

    def __str__(self) -> str:
        if self.unwrapped:
            return f"no compression: the model was unwrapped since. Of its last call before: {replace(self, unwrapped=False)}"
        if self.off:
            return "compression was off: every visual token stayed"
        if not self.images:
            return "no images: nothing was compressed"
        return f"kept {self.visual_tokens_kept} of {self.visual_tokens_full} visual tokens in {len(self.images)} image(s)"


_last: weakref.WeakKeyDictionary[Any, CompressionReport] = weakref.WeakKeyDictionary()


def remember(model: Any, report: CompressionReport) -> None:
    _last[model] = report


def forget(model: Any) -> None:
    """For a model that is wrapped anew."""
    _last.pop(model, None)


def taken_off(model: Any) -> None:
    """For a model that is unwrapped: calls from now on have no report, and the last one says so."""
    if model in _last:
        _last[model] = replace(_last[model], unwrapped=True)


def last_report(model: Any) -> CompressionReport:
    """The report of the model's last completed call while it was wrapped.

    After ``unwrap`` (or the end of ``compressed``) it can still be read, and says ``unwrapped``: no call since is in it. Concurrent
    callers read ``prepare(...).report`` or ``generate(return_dict_in_generate=True).compression`` instead.
    """
    from .patches import inner_model

    try:
        return _last[inner_model(model)]
    except KeyError:
        raise MllmEfficientError("no report yet: this model has made no call since it was wrapped") from None
