"""What a picture is to a model: how often its tower runs, on how many patches, and the tokens that come out. No torch.

The same as the adapters in ``patches`` find from pixels, here from a size in pixels or a number of tokens alone.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace

from ..compressors.reducer import Reducer
from ..errors import MllmEfficientError
from ..patches.rules import DECODERS, check_reducer
from ..tokens import Plane, VisualShape
from .shapes import ModelShape

Grid = tuple[int, int]
Size = tuple[int, int]  # (width, height) in pixels
RULES = {
    "llava": "grids:Fixed",
    "llava_next": "anyres:Anyres",
    "llava_onevision": "anyres:OneVision",
    "llava_next_video": "anyres:Video",
    "qwen2_vl": "grids:Dynamic",
    "qwen2_5_vl": "grids:Dynamic",
    "qwen3_vl": "grids:Dynamic",
    "internvl": "grids:Tiled",
}


@dataclass(frozen=True)
class Picture:
    """One picture or video, as the model takes it.

    shape: its tokens. unit: the grid that ``resize`` makes smaller, that of the picture or of each tile in tokens.
    views: runs of the tower, each on ``patches`` (rows, columns). projected: tokens of a view that the projector takes.
    size: in pixels, where it was given. whole: whether the shape is known token by token; if not, N alone is right.
    says: all this in words.
    """

    shape: VisualShape
    unit: Grid
    views: int
    patches: Grid
    projected: int
    says: str
    size: Size | None = None
    whole: bool = True


class Pictures:
    """The rule of a family, to ``plan`` what an adapter is. The attributes are those of ``patches.base.Adapter``."""

    fixed_count = False
    parts: frozenset[str] = frozenset()
    separators = False
    deepstack = False
    projects = False
    positions = "renumber"
    gives = frozenset({"text", "grid"})

    def __init__(self, model: ModelShape):
        self.model, self.name, self.patch = model, model.name, model.tower.patch
        if "attention" in self.gives and model.tower.class_token:
            self.gives = self.gives | {"clip_text"}

    @property
    def decoder_layers(self) -> int:
        return self.model.decoder.layers

    @property
    def tower_blocks(self) -> int:
        """As of an adapter."""
        return 0

    @property
    def mrope(self) -> bool:
        return self.positions == "keep"

    @property
    def deep_layers(self) -> int:
        return len(self.model.vision["deepstack_visual_indexes"]) if self.deepstack else 0

    @property
    def decoder(self) -> str:
        """The class of the decoder's layers, or the text model's kind where that is not known."""
        kind = str(self.model.config["text_config"]["model_type"])
        return DECODERS.get(kind.removesuffix("_text"), kind)

    def check_inside(self, method: Reducer) -> None:
        """As of an adapter."""
        check_reducer(self, method)

    def item_of(self, shape: VisualShape) -> Picture:
        """The usual picture, of this shape."""
        return replace(self.typical()[0], shape=shape)

    def unit(self, picture: Picture) -> Grid:
        return picture.unit

    def shape_at(self, picture: Picture, grid: Grid) -> VisualShape:
        return self.smaller(picture, grid).shape

    def projected(self, picture: Picture, side: int) -> VisualShape:
        """The picture with side x side tokens for every view."""
        return VisualShape(tuple(Plane(side, side, tile=i) for i in range(picture.views)))

    def usual(self) -> VisualShape | None:
        return self.typical()[0].shape if self.fixed_count else None

    def typical(self) -> list[Picture]:
        """What a call has where nothing is said of it."""
        raise TypeError(f"{type(self).__name__} must define typical")

    def of_size(self, size: Size) -> Picture:
        """A picture of (width, height) pixels."""
        raise TypeError(f"{type(self).__name__} must define of_size")

    def of_tokens(self, n: int, exact: bool) -> list[Picture]:
        """Pictures with n tokens in all. exact: whether the vision cost will be asked for."""
        raise TypeError(f"{type(self).__name__} must define of_tokens")

    def together(self, picture: Picture, n: int) -> list[Picture]:
        """n of a picture in one prompt."""
        return [picture] * n

    def smaller(self, picture: Picture, unit: Grid) -> Picture:
        """The picture with a smaller ``unit``."""
        raise TypeError(f"{type(self).__name__} must define smaller")

    def unknown(self, n: int, like: Picture, says: str) -> Picture:
        """n tokens of whose places nothing is known, with the vision cost of another picture."""
        return replace(like, shape=VisualShape((Plane(1, n),)), whole=False, says=says)


def pictures_of(model: ModelShape) -> Pictures:
    """The rule of a model's family."""
    module, _, name = RULES[model.family].partition(":")
    return getattr(importlib.import_module(f"{__package__}.{module}"), name)(model)


def chosen(rules: Pictures, tokens: int | None, size: Size | None, exact: bool, images: int = 1) -> list[Picture]:
    """The pictures of one prompt: by size, by number of tokens, or the usual. Both must agree. images: how many, all alike.

    Raises ``MllmEfficientError`` for a number or size that the model cannot have.
    """
    if images < 1:
        raise MllmEfficientError(f"{images} images: at least 1")
    if images > 1:
        if tokens is not None:
            raise MllmEfficientError("visual tokens are of all pictures of a prompt together: give them or the number of images")
        return rules.together(rules.typical()[0] if size is None else rules.of_size(size), images)
    if size is None:
        return rules.typical() if tokens is None else rules.of_tokens(tokens, exact)
    picture = rules.of_size(size)
    if tokens not in (None, picture.shape.n):
        raise MllmEfficientError(f"a picture of {size[0]}x{size[1]} has {picture.shape.n} tokens on {rules.model.name}, not {tokens}")
    return [picture]
