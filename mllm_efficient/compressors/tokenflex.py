"""TokenFLEX: a projector whose token count is an argument."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import BadSettingError, MllmEfficientError, UnsupportedModelError, did_you_mean
from ..registry import register
from ..trained.files import RANDOM, open_folder
from .mixing import OVER, QUESTION, SIDE, attsets_flops, mixer_flops, pooling_flops
from .projector import Projector

if TYPE_CHECKING:
    from ..family import Family

SETTINGS = ("expansion", "pooling", "layers", "mixer", "mixer_side", "queries", "over")


@register("tokenflex")
@dataclass(frozen=True, kw_only=True)
class TokenFlex(Projector):
    """Pools the tower's grid to any square count, then a SwiGLU makes the tokens; one set of weights for every count.

    Trained with the count drawn anew for every batch (``mllm-efficient train``). ``me.TokenFlexProjector`` is the module.
    over: "views" makes the tokens of one place in all views of an image one, "frames" those in all frames of a video, which is refused
    without (AttSets, arXiv 1808.00758, so that their order does not count), with weights that were trained for it; "image" neither.
    Source: TokenFLEX (arXiv 2504.03154).
    """

    paper: ClassVar[str] = "arXiv 2504.03154"

    over: str = "image"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.over not in OVER:
            raise BadSettingError(f"tokenflex: over={self.over!r} is not one of {', '.join(OVER)}{did_you_mean(str(self.over), OVER)}")

    def together(self, item: Any) -> bool:
        return bool(self.over == {"image": "views", "video": "frames"}[item.shape.modality])

    def check_parts(self, adapter: Family) -> None:
        super().check_parts(adapter)
        part = {"views": "tile", "frames": "frame"}.get(self.over)
        if part is not None and part not in adapter.parts:
            raise UnsupportedModelError(f"tokenflex: over={self.over} has no effect on {adapter.name}, whose images have no {self.over}")

    def module(self, inputs: int, outputs: int, **config: Any) -> Any:
        from ..trained.projector import TokenFlexProjector

        unknown = sorted(set(config) - set(SETTINGS))
        if unknown:
            raise MllmEfficientError(
                f"a TokenFLEX projector has no setting {', '.join(unknown)}{did_you_mean(unknown[0], SETTINGS)}: "
                f"it has {', '.join(SETTINGS)}"
            )
        drawn = {"over": self.over} if self.weights == RANDOM and self.over != "image" else {}
        return TokenFlexProjector(inputs, outputs, **{**drawn, **config})

    def projector_flops(self, inputs: int, outputs: int, n: int) -> int:
        sizes = self._sizes
        if sizes.get("layers") == "mlp":
            return 2 * n * outputs * (inputs + outputs)
        return 2 * n * int(sizes.get("expansion", 3)) * inputs * (2 * inputs + outputs)

    @property
    def asks(self) -> bool:
        return bool(self._sizes.get("pooling") == QUESTION)

    def mixing_flops(self, inputs: int, outputs: int, grid: tuple[int, int], n: int | None) -> int:
        sizes = self._sizes
        mixed = mixer_flops(sizes.get("mixer", "none"), inputs, grid, int(sizes.get("mixer_side", SIDE)))
        return mixed + (0 if n is None else pooling_flops(sizes.get("pooling", "bilinear"), inputs, grid, n, outputs))

    def joining_flops(self, inputs: int, n: int) -> int:
        return attsets_flops(inputs, n)

    @property
    def _sizes(self) -> dict[str, Any]:
        """What the folder says of its projector; nothing of random weights and of those that ship."""
        return {} if self.weights in (None, RANDOM) else open_folder(str(self.weights)).config["sizes"]
