"""DivPrune: the subset of visual tokens whose closest pair is farthest apart."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..errors import BadSettingError, NotFiniteError
from ..lazy import torch
from ..registry import register
from ..tokens import VisualTokens
from .by_content import ByContent
from .math.cosine import parts_of
from .math.finite import ADVICE
from .math.precision import full_float32 as full_float32
from .math.whitening import whitened, whitening_flops

if TYPE_CHECKING:
    from torch import Tensor


METRICS = ("cosine", "l2", "l1", "whitened")


@register("divprune")
@dataclass(frozen=True, kw_only=True)
class DivPrune(ByContent):
    """Max-min diversity of the projected tokens (Alvar et al., CVPR 2025, arXiv 2503.02175), without a query.

    First the token whose nearest neighbour is farthest, then repeatedly the token farthest from those chosen, by
    distance to the nearest of them. O(N^2 D) for the distances, O(N) for each of the K picks (running minimum).

    metric: "cosine" (the paper's default), "l2", "l1", or "whitened": cosine of the tokens with what they have in common taken away
    (``math.whitening``, after WhitenedCSE, arXiv 2305.17746), in ``groups`` of neighbouring channels; left out: of 16. On
    the embedded benchmark it loses to plain cosines, 2 points at 18 of 144 tokens and 8 at 9 (docs/results.md).
    order: "raster", or "picked" (the order of choice: the published numbers used unsorted indices). Equal distances go to the
    lowest index; a zero row is at cosine distance 1 from everything; a picked token is never picked again, so duplicates give
    K different indices. Distances are in float32 at least, whatever the dtype, autocast or TF32 setting. NaN or infinity in
    the features raises.

    radius, spend: see ``ByContent``. The choice goes on to the last token then, which is O(N^2) and no product more.

    On a CUDA device all picks are one kernel, and the images of a call that are of one size share it. The last bit of a
    distance there may depend on how many images share a product, as the last bit of a feature does in the vision tower.
    """

    paper: ClassVar[str] = "arXiv 2503.02175"
    shares_work = True

    metric: str = "cosine"
    order: str = "raster"
    groups: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, values in (("metric", METRICS), ("order", ("raster", "picked"))):
            if getattr(self, field) not in values:
                raise BadSettingError(f"{self.name}: {field}={getattr(self, field)!r} is not one of {values}")
        if self.order == "picked" and self.positions == "keep":
            raise BadSettingError(f"{self.name}: order='picked' shuffles tokens, so positions='keep' has no meaning")

        if self.radius is not None and self.metric != "cosine":
            raise BadSettingError(f"{self.name}: radius= is a cosine distance, so metric={self.metric!r} has no meaning: leave it out")
        if self.groups is not None and (self.metric != "whitened" or isinstance(self.groups, bool) or self.groups < 1):
            raise BadSettingError(f"{self.name}: groups={self.groups!r} must be a whole number above 0, and needs metric=whitened")

    @property
    def full_is_identity(self) -> bool:
        return self.order == "raster"

    def flops(self, n: int, d: int, k: int) -> int:
        """The product of the rows with each other. The l2 and l1 distances are no matrix product, and the picks have none."""
        if self.metric == "whitened":
            return 2 * n * n * d + whitening_flops(n, d, self.groups, self.name)
        return 2 * n * n * d if self.metric == "cosine" else 0

    def select(self, v: VisualTokens, k: int) -> Tensor:  # type: ignore[override]
        return farthest_first(self._distances(v.features), k)

    def select_batch(self, parts: list[VisualTokens], k: int) -> Tensor:
        """One product and one choice for all."""
        return farthest_first(self._distances(torch.stack([v.features for v in parts])), k)

    def picks(self, v: VisualTokens, most: int) -> tuple[Tensor, Tensor]:
        d = self._distances(v.features)
        order = farthest_first(d.clone(), most)
        rows = d[order][:, order]
        before = torch.ones_like(rows, dtype=torch.bool).triu(1)  # [i, j]: i was chosen before j
        return order, rows.masked_fill(~before, float("inf")).amin(0)

    def _distances(self, x: Tensor) -> Tensor:
        if self.metric == "whitened":
            return distances(whitened(x, self.groups, self.name), name=self.name)
        return distances(x, self.metric, self.name)


def distances(x: Tensor, metric: str = "cosine", name: str = "divprune") -> Tensor:
    """Pairwise distances (N, N) of rows (N, D), or (B, N, N) of (B, N, D), in float32, or float64 for float64 input.

    name: of the method. Raises on NaN or infinity, for which the host waits once.
    """
    x, full = x.detach(), torch.float64 if x.dtype == torch.float64 else torch.float32
    if metric != "cosine" or not mixed_precision(x):
        x = x.to(full)
    with torch.autocast(x.device.type, enabled=False), full_float32(x.device.type):
        norm = torch.linalg.vector_norm(x, dim=-1, dtype=full)
        least, most = torch.stack([norm.min(), norm.max()]).tolist()
        ordinary = least > 2.0**-50 and most < 2.0**50  # no square overflows or vanishes, and nothing is NaN
        largest = None if ordinary else x.abs().amax(-1, keepdim=True).to(full)
        if largest is not None and not largest.isfinite().all():
            raise NotFiniteError(f"{name}: the visual tokens hold NaN or infinity: {ADVICE}")
        if metric != "cosine":
            return torch.cdist(x, x, p=1.0 if metric == "l1" else 2.0, compute_mode="donot_use_mm_for_euclid_dist")
        if largest is not None:  # rows scaled by powers of two, which is exact; zero rows get a norm of 1
            exponent = torch.frexp(largest)[1].clamp(min=-1022 if full == torch.float64 else -126)
            x = torch.ldexp(x.to(full), -exponent.to(full))
            norm = torch.linalg.vector_norm(x, dim=-1)
            norm = torch.where(norm == 0, torch.ones_like(norm), norm)
        similarity = products(x)
        for part in parts_of(similarity) if similarity.ndim == 2 else [slice(None)]:  # no second matrix of their lengths
            similarity[..., part, :].div_(norm[..., part, None] * norm[..., None, :])
        return torch.sub(1, similarity, out=similarity)


def products(x: Tensor) -> Tensor:
    """Products (N, N) of rows (N, D), or (B, N, N) of (B, N, D); in float32 where half precision can be multiplied so."""
    if mixed_precision(x):
        return (torch.bmm if x.ndim == 3 else torch.mm)(x, x.mT, out_dtype=torch.float32)
    return x @ x.mT


def mixed_precision(x: Tensor) -> bool:
    """Whether x is of half precision and its products, which are exact, can be added up and given in float32.

    CUDA devices can do so from Ampere on, torch from 2.8 on.
    """
    if not x.is_cuda or torch.version.hip or "dtype" not in torch.ops.aten.bmm.overloads():
        return False
    bfloat16 = x.dtype == torch.bfloat16
    float16 = x.dtype == torch.float16 and not getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False)
    return (bfloat16 or float16) and torch.cuda.get_device_capability(x.device) >= (8, 0)


def farthest_first(d: Tensor, k: int) -> Tensor:
    """K indices in the order of choice from distances d (N, N), which are used up; or (B, K) from (B, N, N).

    On a CUDA device one kernel where Triton works, else a loop with some launches per pick. No host synchronisation.
    """
    kernel = fused(d.device) if d.is_cuda else None
    if kernel is not None:
        return kernel(d, k) if d.ndim == 3 else kernel(d[None], k)[0]
    return torch.stack([loop(image, k) for image in d]) if d.ndim == 3 else loop(d, k)


@functools.cache
def fused(device: torch.device) -> Callable[[Tensor, int], Tensor] | None:
    """``loop`` for (B, N, N) in one kernel, tried once. None where Triton is missing or fails, which is said once."""
    try:
        from .math.farthest_triton import farthest_first as kernel

        kernel(torch.zeros(1, 1, 1, device=device), 1)
    except Exception as error:
        warnings.warn(f"divprune: the picks are a slower loop on {device}, Triton does not work there: {error}", stacklevel=2)
        return None
    return kernel


def loop(d: Tensor, k: int) -> Tensor:
    """K indices in the order of choice from distances d (N, N), which are used up."""
    n = d.shape[0]
    picked = torch.empty(k, dtype=torch.long, device=d.device)
    d.fill_diagonal_(float("inf"))
    nearest = d.amin(1) if n > 1 else d[0]
    nearest_chosen = torch.full((n,), float("inf"), dtype=d.dtype, device=d.device)
    for i in range(k):
        j = (nearest if i == 0 else nearest_chosen).argmax()
        picked[i] = j
        nearest_chosen = torch.minimum(nearest_chosen, d.index_select(0, j.view(1))[0])
        nearest_chosen.index_fill_(0, j.view(1), float("-inf"))
    return picked
