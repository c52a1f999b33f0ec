"""HAWK: the tokens that the words of the question ask for in the decoder's first layer, head by head."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import BadSettingError, CountMismatchError
from ..lazy import torch
from ..registry import register
from ..tokens import VisualTokens
from .math.cosine import finite
from .selector import Selector

if TYPE_CHECKING:
    from torch import Tensor

NAME = "head_weights"  # of the tensor in a file of safetensors


@register("hawk")
@dataclass(frozen=True, kw_only=True)
class Hawk(Selector):
    """The K tokens with the largest products of text queries and visual keys in layer 0, the heads weighed.

    Source: HAWK (CVPR 2026, arXiv 2604.07812) and its code. Rule: queries of the text and keys of the visual tokens by the first decoder
    layer's own norm and projections, before rotary positions; the products' mean over the text, brought to unit length over the
    image's tokens in every head; the sum over heads, weighed. Nothing of the decoder runs for it.
    head_weights: a file of one weight for each query head, a JSON list or safetensors with a tensor "head_weights"; the paper finds
    them by leaving heads out on other data, for each model. None is every head alike.
    All text of the row up to the answer asks, where the code takes what comes after the last image. Scores that are equal in float32 go
    to the lowest index; NaN, infinity or no text raises. O((N + T) D w + N w) for keys and queries of width w.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"text", "heads"})
    paper: ClassVar[str] = "arXiv 2604.07812"

    head_weights: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_weights is not None and not isinstance(self.head_weights, str):
            raise BadSettingError(f"hawk: head_weights={self.head_weights!r} is no file of weights")

    def text_flops(self, n: int, d: int, text: int, decoder: Any) -> int:
        """Queries of the text, keys of the tokens, and their products."""
        queries, keys = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
        return int(2 * d * (text * queries + n * keys) + 2 * n * queries)

    def score(self, v: VisualTokens) -> Tensor:
        if v.text is None or v.heads is None or len(v.text) == 0:
            raise CountMismatchError("hawk: the text of the row asks for tokens, and this row has none")
        full = torch.float32 if v.heads.device.type == "mps" else torch.float64
        heads = finite(v.heads, self.name, "products of text and visual tokens").to(full)
        norm = torch.linalg.vector_norm(heads, dim=1, keepdim=True)
        heads = heads / torch.where(norm == 0, 1, norm)
        weights = (1 / len(heads),) * len(heads) if self.head_weights is None else read_weights(self.head_weights)
        if len(weights) != len(heads):
            raise BadSettingError(
                f"hawk: {self.head_weights} has weights of {len(weights)} heads, and the model's first layer has {len(heads)}"
            )
        return (heads * torch.tensor(weights, dtype=full, device=heads.device)[:, None]).sum(0).float()  # in which copies tie


@functools.lru_cache(maxsize=8)
def read_weights(path: str) -> tuple[float, ...]:
    """The weights in a file, read once. Raises ``BadSettingError`` for one that holds none."""
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return tuple(load_file(path)[NAME].float().flatten().tolist())
        return tuple(float(weight) for weight in json.loads(Path(path).read_text()))
    except Exception as error:  # whatever the readers raise for a file that is not one
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadSettingError(f"hawk: head_weights={path} is no JSON list or safetensors with {NAME!r} ({reason})") from None
