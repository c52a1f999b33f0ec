"""CDPruner: the subset of visual tokens that is most diverse, conditioned on how relevant each is to the question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import BadSettingError, CountMismatchError
from ..lazy import torch
from ..registry import register
from ..tokens import VisualTokens
from .math.cosine import parts_of, unit
from .math.finite import require_finite
from .selector import Selector

if TYPE_CHECKING:
    from torch import Tensor

LEAST = 1e-6  # no more than this is nothing: of a relevance, or of what S_ii has left
WHAT = "visual tokens or the text"


@register("cdpruner")
@dataclass(frozen=True, kw_only=True)
class CDPruner(Selector):
    """Conditional diversity: a greedy determinantal point process over relevance to the question and cosine similarity.

    Source: CDPruner (Zhang et al., NeurIPS 2025, arXiv 2506.10967). Greedy MAP inference with an incremental Cholesky
    factor: Chen et al., NeurIPS 2018, arXiv 1709.05135.
    Rule: S_ij is the cosine of projected tokens i and j, r_i the relevance of token i scaled to [0, 1] by the smallest and
    the largest of the image, L = diag(r) S diag(r). One token after the other, the one that enlarges det(L of the chosen)
    most. As det(L) is the product of r_i^2 times det(S), the factor is of S alone and token i scores r_i^2 s_i, where s_i is
    what S_ii has left: no number is divided by a relevance.
    relevance: "llm" is the cosine of a projected token with the mean embedding of the row's text tokens. "clip", what the
    paper's LLaVA runs use, is the negated cosine of a patch with the text in CLIP's space, the mean over pieces of 77 tokens: the
    patch through the tower's last norm and CLIP's projection, the text through its text tower. (Negated as in the released
    code: after the layer before the last, patches far from what is asked have the larger cosines.) clip: a folder or hub
    id of the CLIP model that the tower is from, with its text tower and tokenizer. All text of the row up to the answer is
    the question, whatever a chat template adds; no other row and no padding enters.

    Scores that are equal in float32 go to the lowest index. Where relevance differs by no more than 1e-6, every r_i is 1.
    A token with r_i of at most 1e-6, as the least relevant one has, or with s_i of at most 1e-6, as a duplicate has, adds
    nothing to any determinant; such tokens come after all others, by relevance. A zero row is similar to nothing, itself
    included. NaN, infinity or no text raises.
    O(N K^2 + N K D) at most, no N x N matrix; in float64 where the device has it. A CPU brings up to date only tokens whose last
    score was larger than the best (arXiv 2206.05947). No host synchronisation in the picks elsewhere; on a CUDA device the images of a
    call that are of one size share the loop.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"text"})  # with relevance="clip" {"clip_text"}
    paper: ClassVar[str] = "arXiv 2506.10967"
    shares_work = True

    relevance: str = "llm"
    clip: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.relevance not in ("llm", "clip"):
            raise BadSettingError(f"cdpruner: relevance={self.relevance!r} is not one of 'llm', 'clip'")
        if self.relevance == "llm" and self.clip is not None:
            raise BadSettingError("cdpruner: clip= has no effect without relevance=clip: give both or neither")
        if self.relevance == "clip":
            if not isinstance(self.clip, str) or not self.clip:
                raise BadSettingError("cdpruner: relevance='clip' needs clip=DIR, the CLIP model that the tower is from")
            object.__setattr__(self, "needs", frozenset({"clip_text"}))

    def to_dict(self) -> dict[str, Any]:
        """As every method's, and always with the relevance: results under another one are those of another method."""
        return {**super().to_dict(), "relevance": self.relevance}

    def flops(self, n: int, d: int, k: int) -> int:
        """The question's row and one row of S for every pick but the last, and their products with the factor: a CPU, which makes
        only the entries of S in question, has fewer.

        Under relevance="clip" the host counts the question's, in CLIP's space (``measure.flops.clip_flops``).
        """
        return 2 * n * d * (k - (self.relevance == "clip")) + n * (k - 1) * max(0, k - 2)

    def select(self, v: VisualTokens, k: int) -> Tensor:  # type: ignore[override]
        if v.features.device.type != "cpu":
            return self.select_batch([v], k)[0]
        from .math.lazy import Volume

        given, text = self._question(v)
        text = text.to(v.features.device, torch.float64)
        require_finite(text, self.name, WHAT)
        x = v.features.detach()
        if self.relevance == "clip":
            lengths, along = measured(x, None, self.name)[0], -measured(given, text[:, None], self.name)[1]
        else:
            lengths, along = measured(x, unit(text.mean(0, keepdim=True)).T, self.name)
        own = (lengths > 0).double()
        return Volume(x, torch.where(lengths == 0, 1, lengths), own, scaled(along), k).picks()

    def select_batch(self, parts: list[VisualTokens], k: int) -> Tensor:
        """The picks of all in one loop."""
        x, relevance = (torch.stack(each) for each in zip(*(self._conditioned(v) for v in parts)))
        return most_volume(x, relevance, k)

    def batch_entries(self, n: int, d: int) -> int:
        return n * d

    def _question(self, v: VisualTokens) -> tuple[Tensor, Tensor]:
        """Rows (N, d) that are compared with the text, and the text (T, d), or (d,) of CLIP's."""
        given, text = (v.features, v.text) if self.relevance == "llm" else (v.clip_patches, v.clip_text)
        if text is None or given is None or len(text) == 0:
            raise CountMismatchError("cdpruner: the relevance of a token is to the text of its row, and this row has none")
        return given.detach(), text.detach()

    def _conditioned(self, v: VisualTokens) -> tuple[Tensor, Tensor]:
        """Unit rows (N, D) of the tokens, and their relevance (N,) in [0, 1]."""
        given, text = self._question(v)
        # In float32 what is left of S_ii would be rounding once K reaches the rank, and rounding differs with the batch's size.
        full = torch.float32 if v.features.device.type == "mps" else torch.float64
        x, given, text = (t.detach().to(v.features.device, full) for t in (v.features, given, text))
        for part in {id(part): part for part in (x, given, text)}.values():
            require_finite(part, self.name, WHAT)
        with torch.autocast(x.device.type, enabled=False):
            x = unit(x)
            if self.relevance == "clip":
                return x, scaled(-(unit(given) @ text[:, None])[:, 0])
            return x, scaled((x @ unit(text.mean(0, keepdim=True)).T)[:, 0])


def measured(x: Tensor, against: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
    """Lengths (N,) of rows (N, D), and products (N,) of the rows at unit length with ``against`` (D, 1), 0 without; in float64.

    Part after part, so that the rows are never all there in float64. NaN and infinity raise; so do float64 rows longer than 1e154.
    """
    lengths, along = (x.new_zeros(len(x), 1, dtype=torch.float64) for _ in range(2))
    with torch.autocast(x.device.type, enabled=False):
        for part in parts_of(x):
            rows = x[part].to(torch.float64)
            torch.linalg.vector_norm(rows, dim=1, keepdim=True, out=lengths[part])
            if against is not None:
                torch.mm(rows, against, out=along[part])
    require_finite(lengths, name, WHAT)
    return lengths[:, 0], along.div_(torch.where(lengths == 0, 1, lengths))[:, 0]


def scaled(relevance: Tensor) -> Tensor:
    """Relevance (N,) to [0, 1], the least at 0 and the largest at 1; all at 1 where they are equal but for rounding."""
    least, most = relevance.aminmax()
    spread = most - least
    return torch.where(spread > LEAST, (relevance - least) / spread.clamp(min=LEAST), 1)


def most_volume(x: Tensor, relevance: Tensor, k: int) -> Tensor:
    """(B, K) indices in the order of choice from unit rows x (B, N, D) and relevance (B, N) in [0, 1]: greedy MAP of r S r."""
    images, n, width = x.shape
    picked = torch.empty(images, k, dtype=torch.long, device=x.device)
    factor = x.new_zeros(images, k, n)  # the rows of the transposed Cholesky factor of S that belong to the chosen
    left = (x * x).sum(-1)  # what is left of S_ii
    weight, taken = relevance * relevance, torch.zeros(images, n, dtype=torch.bool, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        for i in range(k):
            adds = (relevance > LEAST) & (left > LEAST)
            score = torch.where(adds, weight * left, relevance - 2).float()  # what adds nothing is below all that does
            j = score.masked_fill(taken, float("-inf")).argmax(1, keepdim=True)  # in float32, for copies to tie
            picked[:, i : i + 1] = j
            taken.scatter_(1, j, True)
            if i == k - 1:
                break
            row = x.gather(1, j[..., None].expand(-1, 1, width)) @ x.mT
            if i:
                row = row - factor[:, :i].gather(2, j[:, None].expand(-1, i, 1)).mT @ factor[:, :i]
            root = left.gather(1, j)
            factor[:, i] = torch.where(root > LEAST, row[:, 0] / root.clamp(min=LEAST).sqrt(), 0)
            left = left - factor[:, i] ** 2
    return picked
