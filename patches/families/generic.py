"""Every model type of the table ``facts``: features shortened between the model's own tower and its own language model.

What no row knows is refused by name: how tokens lie on a grid (unless the call says it), the tower's attention, FLOPs, ``resize``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from mllm_efficient.errors import CountMismatchError, UnsupportedModelError
from mllm_efficient.lazy import torch
from mllm_efficient.tokens import Grid, Plane, VisualShape

from ..base import Adapter, Encoding, Item, runs_in
from ..controls import CONTROLS
from ..facts import FACTS, Facts
from ..rules import Rules, Settings, Size
from ..running import by_its_own_rule

if TYPE_CHECKING:
    from torch import Tensor

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
NO_ARGUMENTS = ("self", "kwargs", "return_dict", "output_hidden_states", "output_attentions")


class GenericAdapter(Adapter):
    """What the wrapper needs to know of one model of a type that has a row.

    facts: the row.
    """

    items_apart = False

    def __init__(self, model: Any):
        super().__init__(model)
        self.encode_keys = tuple(dict.fromkeys(name for modality in PIXELS for name in self._arguments(modality)))
        self._read_row()

    def _read_row(self) -> None:
        """What the row says of every model of the type."""
        gridded = bool(self.facts.grids)
        self.gives = frozenset({"text", "grid"} if gridded else {"text"})
        self.parts = frozenset({"frame"} if gridded else ())
        self.positions = "keep" if self.facts.mrope else "renumber"
        self.mrope = bool(self.facts.mrope)
        self.deepstack = self.facts.deepstack
        self.text_row = self.facts.text_row
        self.counts_by_rule = False
        if self.facts.control:
            self.control = self.facts.control

    @property
    def facts(self) -> Facts:
        return FACTS[self.config.model_type]

    def _encoder(self, modality: str) -> Any:
        return getattr(self.base, f"get_{modality}_features", None)

    def _arguments(self, modality: str) -> list[str]:
        encoder = self._encoder(modality)
        return [] if encoder is None else [n for n in inspect.signature(encoder).parameters if n not in NO_ARGUMENTS]

    # ------------------------------------------------------------------------------------------ images and their tokens

    def items(self, inputs: dict[str, Any]) -> list[Item]:
        return [item for modality in PIXELS if inputs.get(PIXELS[modality]) is not None for item in self._items(modality, inputs)]

    def _items(self, modality: str, inputs: dict[str, Any]) -> list[Item]:
        """Items that share the arguments of the call, each with its own span of the features that they make together."""
        call = {name: inputs[name] for name in self._arguments(modality) if inputs.get(name) is not None}
        shapes, start, out = self._shapes(modality, inputs), 0, []
        for shape in shapes:
            out.append(Item({"call": call, "span": (start, start + shape.length)}, shape))
            start += shape.length
        return out

    def _shapes(self, modality: str, inputs: dict[str, Any]) -> list[VisualShape]:
        grids = inputs.get(self.facts.grids.replace("image", modality)) if self.facts.grids else None
        if grids is not None:
            return [self.gridded(modality, *(int(side) for side in grid)) for grid in grids]
        if self.facts.grids:
            raise CountMismatchError(f"{PIXELS[modality]} without {self.facts.grids}: pass both as the processor gives them")
        runs = [run for row in inputs["input_ids"].tolist() for run in runs_in(row, self.placeholders[modality])]
        return [VisualShape((Plane(1, end - first, placed=False),), modality) for first, end in runs]

    def gridded(self, modality: str, frames: int, rows: int, columns: int) -> VisualShape:
        """An image or video of so many patches, ``merge`` x ``merge`` of which are a token."""
        merge, video = self.merge, modality == "video"
        grid = rows // merge, columns // merge
        return VisualShape(tuple(Plane(*grid, frame=i if video else None) for i in range(frames)), modality)

    @property
    def merge(self) -> int:
        """Patches along a side of a token."""
        if self.facts.merge:
            return self.facts.merge
        vision = self.config.vision_config
        names = ("spatial_merge_size", "merge_size", "merge_kernel_size")
        side = next((getattr(vision, name) for name in names if getattr(vision, name, None)), 1)
        return int(side if isinstance(side, int) else side[-1])

    def controls(self, size: Size, k: int) -> Iterable[Settings]:
        if not self.facts.control:
            return super().controls(size, k)
        return CONTROLS[self.facts.control](k, self.config.vision_config.patch_size * self.merge, self.settings)

    def encode(
        self, items: Sequence[Item], needs: frozenset[str] = frozenset(), grids: Sequence[Grid | None] | None = None
    ) -> list[Encoding]:
        """The model's own features, one run of the tower for each modality."""
        made: dict[str, tuple[Tensor, tuple[Tensor, ...]]] = {}
        out = []
        for item in items:
            modality = item.shape.modality
            if modality not in made:
                made[modality] = self._run(modality, item.arguments["call"])
                placeholders = sum(i.shape.length for i in items if i.shape.modality == modality)
                self._require_count(modality, len(made[modality][0]), placeholders)
            features, deep = made[modality]
            span = slice(*item.arguments["span"])
            out.append(Encoding(features[span], item.shape, tuple(layer[span] for layer in deep)))
        return out

    def _run(self, modality: str, call: dict[str, Any]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(all tokens, D) and the same of each deepstack layer."""
        out = self._encoder(modality)(**call, return_dict=True)
        layers = (getattr(out, "deepstack_features", None) or ()) if self.facts.deepstack else ()
        return joined(getattr(out, self.facts.read)), tuple(joined(layer) for layer in layers)

    def _require_count(self, modality: str, made: int, placeholders: int) -> None:
        if made != placeholders:
            raise CountMismatchError(
                f"the prompt has {placeholders} {modality} placeholders and the {modality}s give {made} tokens: use the processor that "
                "belongs to the model"
            )

    @property
    def recurrent(self) -> tuple[str, ...]:
        return super().recurrent or (("recurrence",) if self.facts.recurrent else ())

    def check_positions(self, rule: str) -> None:
        if rule == "keep" and not self.facts.gaps:
            raise UnsupportedModelError(f"positions='keep' has no effect on {self.name}, whose layers read no positions")
        if rule == "renumber" and self.facts.mrope and not self.facts.grids:
            raise UnsupportedModelError(f"positions='renumber' is not known for {self.name}, whose calls do not say the grid of a picture")

    def check_inside(self, method: Any) -> None:
        if self.facts.bidirectional:
            raise UnsupportedModelError(
                f"{method.name} drops tokens between layers under causal masks, and the tokens of an image of {self.name} see each other"
            )
        super().check_inside(method)

    def shape_at(self, item: Item, grid: Grid) -> VisualShape:
        raise UnsupportedModelError(f"resize is not known for {self.name}")

    # ------------------------------------------------------------------------------------------ what the language model takes

    def container(self, modality: str, features: list[Tensor], deep: list[tuple[Tensor, ...]]) -> Any:
        from .ragged import ragged_output

        beside = {name: BESIDE[name](self.base) for name in self.facts.beside}
        layers = [list(layer) for layer in deep] if self.facts.deepstack else None
        return ragged_output(features, self.facts.read, layers, **beside)

    def rope(
        self, ids: Tensor, mask: Tensor, types: Tensor, grids: dict[str, list[Any]], seconds: Any, items: Sequence[Item] = ()
    ) -> Tensor:
        """Positions (axes, B, L) by the model's own rule.

        grids: for each modality the (t, h, w) of each item in tokens, where the call says them; else what it says of ``items`` is
        passed on.
        """
        call: dict[str, Any] = {}
        if not self.facts.grids:
            call = {name: value for item in items for name, value in item.arguments["call"].items()}
        for modality, sizes in grids.items():
            if sizes and self.facts.grids:
                patches = [(t, h * self.merge, w * self.merge) for t, h, w in sizes]
                call[self.facts.grids.replace("image", modality)] = torch.tensor(patches, device=ids.device)
        if seconds:
            call["second_per_grid_ts"] = seconds
        return by_its_own_rule(self.base, call, ids, types, mask)


class ByRow(GenericAdapter):
    """The same of a configuration alone, for planning: nothing runs."""

    decoder = Rules.decoder
    decoder_layers = Rules.decoder_layers

    def __init__(self, name: str, config: Any, settings: Any = None):
        Rules.__init__(self, name, config, settings)
        self._read_row()


def visual_indicators(base: Any) -> Tensor:
    """Ovis2's embeddings of the tokens that mark where an image and its tiles begin and end."""
    table = base.visual_embeddings_table
    n = base.vision_tower.num_visual_indicator_tokens
    return table(torch.arange(len(table.weight) - n, len(table.weight), device=table.weight.device))


BESIDE = {"visual_indicator_features": visual_indicators, "router_logits": lambda base: None}


def joined(features: Any) -> Tensor:
    """(all tokens, D) of a list of tensors, or of one, with any number of dimensions in front of the last."""
    parts = [features] if isinstance(features, torch.Tensor) else list(features)
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
