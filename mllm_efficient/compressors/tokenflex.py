"""TokenFLEX: a projector whose token count is an argument."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import MllmEfficientError
from ..registry import register
from ..trained.files import RANDOM, open_folder
from .projector import Projector


@register("tokenflex")
@dataclass(frozen=True, kw_only=True)
class TokenFlex(Projector):
    """Pools the tower's grid to any square count, then a SwiGLU makes the tokens; one set of weights for every count.

    Trained with the count drawn anew for every batch (``mllm-efficient train``). ``me.TokenFlexProjector`` is the module.
    Source: TokenFLEX (arXiv 2504.03154).
    """

    paper: ClassVar[str] = "arXiv 2504.03154"

    def module(self, inputs: int, outputs: int, **config: Any) -> Any:
        from ..trained.projector import TokenFlexProjector

        unknown = sorted(set(config) - {"expansion", "pooling", "layers"})
        if unknown:
            raise MllmEfficientError(f"a TokenFLEX projector has no setting {', '.join(unknown)}: expansion, pooling and layers are some")
        return TokenFlexProjector(inputs, outputs, **config)

    def projector_flops(self, inputs: int, outputs: int, n: int) -> int:
        sizes = {} if self.weights in (None, RANDOM) else open_folder(str(self.weights)).config["sizes"]
        if sizes.get("layers") == "mlp":
            return 2 * n * outputs * (inputs + outputs)
        return 2 * n * int(sizes.get("expansion", 3)) * inputs * (2 * inputs + outputs)
