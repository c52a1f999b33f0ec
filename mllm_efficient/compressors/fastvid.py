"""FastVID: what attention points at in every frame, and of every segment of like frames a few frames that the rest is merged into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..errors import BadSettingError
from ..lazy import torch
from ..registry import register
from ..tokens import CompressedTokens, VisualTokens
from .math.cosine import cosines, finite
from .math.finite import require_finite
from .math.sums import group_sums
from .merger import Merger
from .over_frames import first_of, frames_of, require_whole_video, wide

if TYPE_CHECKING:
    from torch import Tensor

SEGMENTS = 8  # a video has no fewer, where it has as many frames
EVERY = 4  # frames of a segment to one that others are merged into
LEAST = 0.6  # what a token that others are merged into counts of the result at least
NEAREST = 4  # tokens that say how dense it is around one, itself the first


@dataclass(frozen=True)
class Segment:
    """Frames ``first`` to ``last`` of a video. anchors: of each of them how many of its tokens others are merged into."""

    first: int
    last: int
    anchors: tuple[int, ...]


@register("fastvid")
@dataclass(frozen=True, kw_only=True)
class FastVID(Merger):
    """Salient tokens of every frame, and the others merged around the densest of few frames of a segment.

    Source: FastVID (NeurIPS 2025, arXiv 2503.11187) and its code for LLaVA-OneVision. Rule: a video is cut where the cosine of the means
    of two frames is below ``threshold``, and at the least ones until there are 8 segments. K is shared out evenly among the frames;
    ``contextual`` of a frame's share, rounded down, are contextual tokens, the others those of its tokens with the largest attention. A
    segment has the contextual tokens of its frames in its last frame and every 4th before it: of the tokens there that are not salient
    those with the largest density x distance to a denser one (density: exp of minus the mean squared distance to the 4 nearest, itself
    among them, over the width; the densest have the largest distance). Every token of the segment that is not salient joins the most
    similar contextual token of each of these frames, by cosine, which becomes w of itself and 1 - w of the mean of what joined, w = 1 over
    1 plus their number, at least 0.6. It has its own place.
    K is exact: what does not divide goes to the first frames and to the last frames of a segment, and what a frame has no tokens for to
    the frames before it (the code drops both). The code draws noise to order equal densities; here the first is the denser. Its segments
    are those of SigLIP's pooled output for LLaVA-OneVision, and of the means, as here, for Qwen2.5-VL (threshold=0.84). A still image is
    one frame.
    Densities and scores are compared in float32, cosines to 2^-18; ties go to the lowest index. NaN or infinity raises. O(T P^2 D) for T
    frames of P tokens, and the cosines; the CPU waits for the cuts and for every frame that others are merged into.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    paper: ClassVar[str] = "arXiv 2503.11187"
    in_place = True

    contextual: float = 0.4
    threshold: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole_video(self)
        for name, value, most in (("contextual", self.contextual, "below 1"), ("threshold", self.threshold, "1")):
            number = not isinstance(value, bool) and isinstance(value, (int, float))
            if not number or not 0 <= value <= 1 or (value == 1 and name == "contextual"):
                raise BadSettingError(f"fastvid: {name}={value!r} is not a number from 0 to {most}")

    def flops(self, n: int, d: int, k: int) -> int:
        """The cosines of an image; of a video, whose segments are not known before, the most that they can be."""
        c = int(self.contextual * k)
        return 2 * (n - k + c) * c * d if k < n else 0

    def merge(self, v: VisualTokens, k: int) -> CompressedTokens:
        assert v.attention is not None
        attention = finite(v.attention, self.name, "attentions")
        require_finite(v.features, self.name, "visual tokens")
        if k == len(v):
            return CompressedTokens(v.features, places=torch.arange(k, device=v.features.device))
        frames, each = frames_of(v, self.name)
        shares = evenly(k, frames)
        context = [int(self.contextual * share) for share in shares]
        salient = [share - c for share, c in zip(shares, context)]
        kept = first_of(attention.view(frames, each), torch.tensor(salient, device=attention.device))
        x = v.features.view(frames, each, -1)
        segments = [segment(first, last, context, [each - s for s in salient]) for first, last in self._segments(x)]
        out, places = [v.features[kept.flatten()]], [kept.flatten().nonzero()[:, 0]]
        for part in segments:
            rest = (~kept[part.first : part.last + 1]).flatten().nonzero()[:, 0] + part.first * each
            chosen = [
                anchors(x[part.first + i], kept[part.first + i], count) + (part.first + i) * each
                for i, count in enumerate(part.anchors)
                if count
            ]
            places += chosen
            out += around(v.features, rest, chosen)
        where, order = torch.cat(places).sort()
        return CompressedTokens(torch.cat(out)[order], places=where)

    def _segments(self, x: Tensor) -> list[tuple[int, int]]:
        """(first, last) frame of each segment of x (T, P, D)."""
        means = torch.stack([wide(frame.detach()).mean(0) for frame in x])
        means = means / torch.linalg.vector_norm(means, dim=1, keepdim=True).clamp(min=1e-12)
        like = (means[1:] * means[:-1]).sum(1).float()
        cut = like < self.threshold
        cut[like.sort(stable=True).indices[: SEGMENTS - 1]] = True
        ends = [*cut.nonzero()[:, 0].tolist(), len(x) - 1]
        return list(zip([0, *(end + 1 for end in ends)], ends))


def evenly(k: int, parts: int) -> list[int]:
    """k in so many whole numbers that differ by 1 at most, the larger ones first."""
    return [k // parts + (i < k % parts) for i in range(parts)]


def segment(first: int, last: int, context: Sequence[int], room: Sequence[int]) -> Segment:
    """The segment of those frames, and where the contextual tokens (T,) of its frames are. room: (T,) tokens that are not salient."""
    frames = range(last, first - 1, -1)  # from the last on
    left, counts = sum(context[first : last + 1]), dict.fromkeys(frames, 0)
    few = frames[::EVERY]
    for frame, share in zip(few, evenly(left, len(few))):
        counts[frame] = min(share, room[frame])
    left -= sum(counts.values())
    for frame in frames:
        more = min(left, room[frame] - counts[frame])
        counts[frame], left = counts[frame] + more, left - more
    return Segment(first, last, tuple(counts[frame] for frame in range(first, last + 1)))


def anchors(x: Tensor, salient: Tensor, count: int) -> Tensor:
    """(count,) ascending indices of tokens of a frame (P, D): the densest that are far from denser ones, none of the salient (P,) bool."""
    rest = (~salient).nonzero()[:, 0]
    rows = wide(x[rest].detach())
    far = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist") / rows.shape[1] ** 0.5
    density = far.topk(min(NEAREST, len(rows)), largest=False).values.square().mean(1).neg().exp().float()
    index = torch.arange(len(rows), device=x.device)
    denser = (density > density[:, None]) | ((density == density[:, None]) & (index < index[:, None]))
    distance = torch.where(denser, far, far.max()).amin(1)
    best = (distance * density).float().sort(descending=True, stable=True).indices[:count]
    return rest[best].sort().values


def around(x: Tensor, rest: Tensor, chosen: Sequence[Tensor]) -> list[Tensor]:
    """What becomes of the contextual tokens ``chosen``, indices frame by frame, when all of ``rest`` (R,) of x (N, D) join them."""
    if not chosen:
        return []
    rows = x[rest].to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    like, out = cosines(rows.detach(), x[torch.cat(list(chosen))].detach().to(rows.dtype)), []
    for of_frame, some in zip(like.split([len(part) for part in chosen], dim=1), chosen):
        sums, parts = group_sums(rows, of_frame.argmax(1), len(some))
        parts = parts[:, None]
        own = (1 / (parts + 1).to(rows.dtype)).clamp(min=LEAST)
        out.append((own * x[some].to(rows.dtype) + (1 - own) * sums / parts.clamp(min=1)).to(x.dtype))
    return out
