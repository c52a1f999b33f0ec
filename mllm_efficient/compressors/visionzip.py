"""VisionZip: dominant tokens by attention, the others merged around evenly spaced ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import BadSettingError
from ..lazy import torch
from ..registry import register
from ..tokens import CompressedTokens, VisualTokens
from .math.cosine import cosines, finite
from .math.sums import group_sums
from .merger import Merger


@register("visionzip")
@dataclass(frozen=True, kw_only=True)
class VisionZip(Merger):
    """Dominant and contextual tokens.

    Source: VisionZip (Yang et al., CVPR 2025, arXiv 2412.04467). Rule: the K - C tokens with the largest attention of the class
    token stay (dominant). Of the rest, in raster order, C evenly spaced ones are targets; every other one goes to the target
    whose attention key is most similar by cosine, and a contextual token is its target plus the mean of what went to it.
    contextual: C / K, rounded, and at most K - 1; the paper's 10 of 64 (its 54 dominant ones are 53 patches and the class
    token, which the models here do not hand to the language model: all K are patches). Paper and code merge the tower's
    output, this merges projected tokens (so do the ports to Qwen2.5-VL); they stand in raster order, a contextual one in its target's
    place, whose M-RoPE position it keeps as in those ports. Deepstack features are merged by the same targets.
    Ties go to the lowest index. NaN or infinity raises. O(N log N + N C d) for keys of width d.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention", "keys"})
    paper: ClassVar[str] = "arXiv 2412.04467"
    in_place = True
    channelwise = True

    contextual: float = 10 / 64

    def __post_init__(self) -> None:
        super().__post_init__()
        share = self.contextual
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 1:
            raise BadSettingError(f"visionzip: contextual={share!r} is not a share from 0 to below 1")

    def targets(self, k: int) -> int:
        """C of a budget of k tokens."""
        return min(round(self.contextual * k), k - 1)

    def flops(self, n: int, d: int, k: int) -> int:
        """The cosines of keys, of width d, of what is merged with the targets', and the means."""
        c = self.targets(k)
        return 2 * (n - k) * c * d if k < n else 0

    def merge(self, v: VisualTokens, k: int) -> CompressedTokens:
        assert v.attention is not None and v.keys is not None
        n, c = len(v), self.targets(k)
        order = finite(v.attention, self.name, "attentions").sort(descending=True, stable=True).indices
        dominant = order[: k - c]
        if c == 0 or k == n:
            kept = order[:k].sort().values
            return CompressedTokens(v.features[kept], places=kept)
        rest = order[k - c :].sort().values
        spaced = torch.arange(c, device=rest.device) * (len(rest) // c)
        is_target = torch.zeros(len(rest), dtype=torch.bool, device=rest.device).index_fill_(0, spaced, True)
        others = rest[(~is_target).to(torch.uint8).sort(descending=True, stable=True).indices[: len(rest) - c]]
        targets = rest[spaced]
        keys = finite(v.keys, self.name, "keys")
        goes_to = cosines(keys[others], keys[targets]).argmax(1)
        full = v.features.to(torch.float64 if v.features.dtype == torch.float64 else torch.float32)
        group = torch.full((n,), c, device=rest.device).index_copy_(0, others, goes_to)  # what stays is a group of its own
        sums, parts = group_sums(full, group, c + 1)
        merged = full[targets] + sums[:c] / parts[:c].clamp(min=1)[:, None]
        places = torch.cat([dominant, targets])
        places, order = places.sort()
        rows = torch.cat([full[dominant], merged])[order]
        return CompressedTokens(rows.to(v.features.dtype), places=places)
