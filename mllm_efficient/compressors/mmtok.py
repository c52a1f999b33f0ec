"""MMTok: the tokens that together cover the words of the question and the other tokens best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import BadSettingError, CountMismatchError
from ..lazy import torch
from ..registry import register
from ..tokens import VisualTokens
from .math.cosine import cosines, finite
from .selector import Selector

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 512  # that are worked on in float64 at a time


@register("mmtok")
@dataclass(frozen=True, kw_only=True)
class MMTok(Selector):
    """Maximum coverage of the text and of the image at once.

    Source: MMTok (Dong et al., ICLR 2026, arXiv 2508.18264). Rule: a text token is covered by the visual tokens as the softmax over
    them of their cosines with it, divided by ``text_temperature``, says; a visual token alike, of its cosines with all of them, itself
    included, and ``vision_temperature``. What is chosen covers each as well as the best of the chosen does; one token after the other,
    the one that adds most to the mean cover of the text plus ``alpha`` times the mean cover of the image.
    The paper's cosines between visual tokens are of the tower's output, these are of the projected tokens, as those with the text are.
    All text of the row up to the answer is the question. Gains that differ by rounding alone, and so those of copies, go to the lowest
    index. NaN, infinity or no text raises. O(N^2 D), then for every pick one pass over the rows whose cover it improves: those are
    ever fewer, about N ln K in all. One N x N matrix. On a GPU the CPU waits once for every pick.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"text"})
    paper: ClassVar[str] = "arXiv 2508.18264"

    alpha: float = 0.5
    text_temperature: float = 0.02
    vision_temperature: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, zero in (("alpha", True), ("text_temperature", False), ("vision_temperature", False)):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not (0 < value < float("inf") or (zero and value == 0)):
                raise BadSettingError(f"mmtok: {name}={value!r} is not a number {'of at least' if zero else 'above'} 0")

    def flops(self, n: int, d: int, k: int) -> int:
        """The cosines of all tokens with each other."""
        return 2 * n * n * d

    def text_flops(self, n: int, d: int, text: int, decoder: Any) -> int:
        """The cosines with the text."""
        return 2 * text * n * d

    def select(self, v: VisualTokens, k: int) -> Tensor:  # type: ignore[override]
        if v.text is None or len(v.text) == 0:
            raise CountMismatchError("mmtok: tokens are to cover the text of their row, and this row has none")
        x, text = finite(v.features, self.name, "visual tokens"), finite(v.text.to(v.features.device), self.name, "text")
        return most_cover([(shares(text, x, self.text_temperature), 1.0), (shares(x, x, self.vision_temperature), self.alpha)], k)


def shares(of: Tensor, by: Tensor, temperature: float) -> Tensor:
    """(M, N): for each row of ``of`` (M, D) how much each row of ``by`` (N, D) covers it, 1 in all.

    In multiples of 2^-30 (2^-38 in float64), of which sums in float64 are exact.
    """
    steps = 2.0**38 if by.dtype == torch.float64 else 2.0**30
    out = by.new_empty(len(of), len(by))
    for start in range(0, len(of), ROWS):
        rows = slice(start, start + ROWS)
        out[rows] = (cosines(of[rows], by).double() / temperature).softmax(1).mul_(steps).round_().div_(steps)
    return out


def most_cover(parts: list[tuple[Tensor, float]], k: int) -> Tensor:
    """(k,) indices in the order of choice. parts: shares (M, N), and what the mean cover of their rows counts."""
    n, device = parts[0][0].shape[1], parts[0][0].device
    cover = [share.new_zeros(len(share)) for share, _ in parts]
    gains = [sum_of(share, None) for share, _ in parts]
    picked, taken = torch.empty(k, dtype=torch.long, device=device), torch.zeros(n, dtype=torch.bool, device=device)
    for i in range(k):
        gain = torch.stack([g * (weight / len(share)) for g, (share, weight) in zip(gains, parts)]).sum(0)
        picked[i] = j = gain.float().masked_fill(taken, float("-inf")).argmax()
        taken.index_fill_(0, j.view(1), True)
        for (share, _), covered, g in zip(parts, cover, gains):
            better = share.index_select(1, j.view(1))[:, 0]
            rows = (better > covered).nonzero()[:, 0]
            for some in rows.split(ROWS):
                g -= sum_of(share[some], covered[some]) - sum_of(share[some], better[some])
            covered[rows] = better[rows]
    return picked


def sum_of(share: Tensor, covered: Tensor | None) -> Tensor:
    """(N,) in float64: what each column has more than the rows (M,) are covered already."""
    if covered is None:
        return share.sum(0, dtype=torch.float64)
    return (share.double() - covered[:, None]).clamp_(min=0).sum(0)
