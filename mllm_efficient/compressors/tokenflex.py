"""TokenFLEX: a projector whose token count is an argument."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import MllmEfficientError, did_you_mean
from ..registry import register
from ..trained.files import RANDOM, open_folder
from .mixing import SIDE, mixer_flops, pooling_flops
from .projector import Projector

SETTINGS = ("expansion", "pooling", "layers", "mixer", "mixer_side", "queries")


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

        unknown = sorted(set(config) - set(SETTINGS))
        if unknown:
            raise MllmEfficientError(
                f"a TokenFLEX projector has no setting {', '.join(unknown)}{did_you_mean(unknown[0], SETTINGS)}: "
                f"it has {', '.join(SETTINGS)}"
            )
        return TokenFlexProjector(inputs, outputs, **config)

    def projector_flops(self, inputs: int, outputs: int, n: int) -> int:
        sizes = self._sizes
        if sizes.get("layers") == "mlp":
            return 2 * n * outputs * (inputs + outputs)
        return 2 * n * int(sizes.get("expansion", 3)) * inputs * (2 * inputs + outputs)

    def mixing_flops(self, inputs: int, grid: tuple[int, int], n: int | None) -> int:
        sizes = self._sizes
        mixed = mixer_flops(sizes.get("mixer", "none"), inputs, grid, int(sizes.get("mixer_side", SIDE)))
        return mixed + (0 if n is None else pooling_flops(sizes.get("pooling", "bilinear"), inputs, grid, n))

    @property
    def _sizes(self) -> dict[str, Any]:
        """What the folder says of its projector; nothing of random weights and of those that ship."""
        return {} if self.weights in (None, RANDOM) else open_folder(str(self.weights)).config["sizes"]
