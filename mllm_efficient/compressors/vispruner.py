"""VisPruner: tokens that the tower attends to, and of the others those that say what no other says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..errors import BadSettingError
from ..lazy import torch
from ..registry import register
from ..tokens import VisualTokens
from .math.cosine import finite, gram_flops, similarity
from .selector import Selector

if TYPE_CHECKING:
    from torch import Tensor

AT_ONCE = 8  # tokens that a round removes at most


@register("vispruner")
@dataclass(frozen=True, kw_only=True)
class VisPruner(Selector):
    """Important tokens by attention, then diverse ones by removal of duplicates.

    Source: VisPruner (Zhang et al., ICCV 2025, arXiv 2412.01818). Rule: the floor(r K) tokens with the largest attention of the
    class token stay. The others, in raster order, are thinned in rounds until K are left in all: every second one, from the
    first on, is compared with those between, and the up to 8 with the largest cosine to any of them go.
    r: share of important tokens; the paper's 0.5. Its cosines are of the tower's output, these are of the projected tokens.
    Ties: the lowest index is important, and the lowest index goes. The rest stays in raster order between rounds. NaN or
    infinity raises. O(N^2 D) once, then (N - K) / 8 rounds: of O(N) on a CPU, where every token has a list of the nearest; of
    O(N^2) elsewhere, which the images of a call that are of one size share on a CUDA device, without host synchronisation.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    paper: ClassVar[str] = "arXiv 2412.01818"
    shares_work = True

    r: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.r, bool) or not isinstance(self.r, (int, float)) or not 0 <= self.r <= 1:
            raise BadSettingError(f"vispruner: r={self.r!r} is not a share between 0 and 1")

    def flops(self, n: int, d: int, k: int) -> int:
        """The cosines of all tokens; none where importance alone fills the budget."""
        return gram_flops(n, d) if int(self.r * k) < k < n else 0

    def select(self, v: VisualTokens, k: int) -> Tensor:  # type: ignore[override]
        important = int(self.r * k)
        if important == k or k == len(v) or v.features.device.type != "cpu":
            return self.select_batch([v], k)[0]
        from .math.thinning import thinned

        order = self._order(v)
        alike, rest = self._alike(v), order[important:].sort().values
        return torch.cat([order[:important], thinned(alike, rest, k - important, AT_ONCE)])

    def _order(self, v: VisualTokens) -> Tensor:
        """All indices (N,), the largest attention first."""
        assert v.attention is not None
        return finite(v.attention, self.name, "attentions").sort(descending=True, stable=True).indices

    def _alike(self, v: VisualTokens) -> Tensor:
        """Cosines (N, N) in whole steps."""
        return similarity(v.features, self.name, "visual tokens")[0].round_()

    def batch_entries(self, n: int, d: int) -> int:
        return 3 * n * n

    def select_batch(self, parts: list[VisualTokens], k: int) -> Tensor:
        order = torch.stack([self._order(v) for v in parts])
        important, n = int(self.r * k), order.shape[1]
        if important == k or k == n:
            return order[:, :k]
        alike = torch.stack([self._alike(v) for v in parts])
        rest = order[:, important:].sort(1).values
        while rest.shape[1] > k - important:
            first, between = rest[:, ::2], rest[:, 1::2]
            gone = min(AT_ONCE, first.shape[1], rest.shape[1] - (k - important))
            pairs = alike.gather(1, first[..., None].expand(-1, -1, n)).gather(2, between[:, None].expand(-1, first.shape[1], -1))
            nearest = pairs.amax(2).sort(dim=1, descending=True, stable=True).indices
            rest = torch.cat([first.gather(1, nearest[:, gone:]), between], 1).sort(1).values
        return torch.cat([order[:, :important], rest], 1)
