"""What the wrapper needs to know of a model, and what most families share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mllm_efficient.compressors.kinds import PROJECTOR
from mllm_efficient.lazy import torch
from mllm_efficient.tokens import Box, Grid, Plane, VisualShape

from .rules import DECODERS, ROUTER, Rules, Views

if TYPE_CHECKING:
    from torch import Tensor

    from mllm_efficient.plans import Plan


@dataclass(frozen=True)
class Item:
    """One image or video of a call: its own part of the vision arguments, and the shape of its tokens.

    before, age: what it knows of its prompt (``apply.conversation``): the last image of its shape before it; later turns with images.
    """

    arguments: dict[str, Any]
    shape: VisualShape
    before: Item | None = None
    age: int = 0


@dataclass(frozen=True)
class Encoding:
    """What the model made of one item.

    features: (length, D) in the model's order, newline columns and separators included. deep: the same for each layer
    that adds visual features of its own (deepstack). attention, early_attention: (N,), keys: (N, d), tower: (N, D), of the
    tokens alone; tower is the tower's output after its last norm. kept: (K,) the tokens that a method in the tower left, None where it
    merged or none was there. shape: of what was encoded, which for a smaller image is smaller than the item's.
    """

    features: Tensor
    shape: VisualShape
    deep: tuple[Tensor, ...] = ()
    attention: Tensor | None = None
    keys: Tensor | None = None
    early_attention: Tensor | None = None
    tower: Tensor | None = None
    kept: Tensor | None = None


class Adapter(Rules):
    """The base of all adapters: a family's other half, of a model that is there. A family's own stands before its ``Rules``.

    encode_keys: the vision arguments of a call. text_row: whether positions of M-RoPE have one more row in front, the places in the
    prompt.
    """

    encode_keys: tuple[str, ...] = ("pixel_values",)
    text_row: bool = True

    def __init__(self, model: Any):
        self.model = model
        super().__init__(type(model).__name__, model.config)

    @property
    def base(self) -> Any:
        """The model without its head; the model itself where it holds tower and decoder directly."""
        return getattr(self.model, "model", self.model)

    @property
    def placeholders(self) -> dict[str, int]:
        """The placeholder token of each modality."""
        video = getattr(self.config, "video_token_id", None)
        return {"image": self.config.image_token_id} | ({} if video is None else {"video": video})

    @property
    def decoder_layers(self) -> int:
        return self.config.get_text_config().num_hidden_layers

    def reduce_in_tower(self, method: Any, items: list[Item], plans: Sequence[Plan]) -> list[Encoding]:
        """Every image through a tower in which a method makes tokens fewer, as its plan says; those that keep all through the stock
        one. Views that are alike run together, unless the method looks at each to know how many go."""
        whole = [i for i, planned in enumerate(plans) if not planned.rounds]
        done = dict(zip(whole, self.encode([items[i] for i in whole])))
        alike: dict[Any, list[tuple[int, int]]] = {}
        for i, (item, planned) in enumerate(zip(items, plans)):
            for view, rounds in enumerate(planned.rounds):
                own = (i, view) if getattr(method, "by_content", False) else ()
                alike.setdefault((rounds, item.arguments["pixel_values"].shape[1:], own), []).append((i, view))
        out: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = {}
        for (rounds, _, _), views in alike.items():
            pixels = torch.cat([items[i].arguments["pixel_values"][view : view + 1] for i, view in views])
            tokens, kept = self.inside(method, items[views[0][0]], pixels, rounds)
            out |= zip(views, zip(tokens, [None] * len(views) if kept is None else kept))
        done |= {i: _of_views([out[i, v] for v in range(len(p.rounds))], items[i], p) for i, p in enumerate(plans) if p.rounds}
        return [done[i] for i in range(len(items))]

    def inside(self, method: Any, item: Item, pixels: Tensor, rounds: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        """(views, K, D) what the language model is given of views (views, C, H, W) of which a method in the tower takes ``rounds`` tokens
        off, and (views, K) which tokens stayed, None where they were merged. item: one of those whose views they are."""
        raise TypeError(f"{type(self).__name__} must define inside")

    items_apart = True  # whether an item's arguments are its own, so that it can be encoded without the others of a call

    def frames_apart(self, item: Item) -> list[Item]:
        """The parts of an item that the tower sees apart from each other; the item itself where it sees all of it together."""
        return [item]

    def vision_modules(self) -> list[Any]:
        """Every module that is not the decoder's nor the head, on which no encoding depends."""
        from .decoder.hooks import decoder_of

        out_of = [decoder_of(self.model), self.model.get_output_embeddings()]
        others = {id(module) for part in out_of if part is not None for module in part.modules()}
        return [module for module in self.model.modules() if id(module) not in others]

    def vision_tensors(self) -> list[Tensor]:
        """Parameters and buffers of ``vision_modules``."""
        own = (t for m in self.vision_modules() for t in (*m._parameters.values(), *m._buffers.values()))
        return [tensor for tensor in own if tensor is not None]

    @property
    def reached_inside(self) -> bool:
        """Whether the hooks of in-decoder methods are on the model."""
        from .decoder.hooks import attached

        return attached(self.model)

    def reach_inside(self) -> None:
        """Puts the hooks of in-decoder methods on the model; ``let_go_inside`` takes them off."""
        from .decoder.hooks import attach

        attach(self.model)

    def let_go_inside(self) -> None:
        from .decoder.hooks import detach

        detach(self.model)

    def check_inside(self, method: Any) -> None:
        from .decoder.hooks import check_decoder

        check_decoder(self, method)

    @property
    def decoder(self) -> str:
        """The class of the decoder's layers; of sharded ones, which have a class of their own, the one that they had."""
        from .decoder.hooks import decoder_of

        decoder = decoder_of(self.model)
        layers = getattr(decoder, "layers", None)
        classes = [cls.__name__ for cls in type(layers[0] if layers else decoder).__mro__]
        return next((name for name in classes if name in DECODERS.values()), classes[0])

    def as_tensors(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call with tensors for what some processors and callers give as lists."""
        return inputs

    def items(self, inputs: dict[str, Any]) -> list[Item]:
        """The images of a call in prompt order, then its videos, before any pixel is looked at.

        inputs: the vision arguments, and ``input_ids`` and ``attention_mask`` of the same prompt.
        """
        raise TypeError(f"{type(self).__name__} must define items")

    def item_of(self, shape: VisualShape) -> Item:
        """An item of which nothing but the shape is known."""
        return Item({}, shape)

    def unit(self, item: Item) -> Grid:
        return item.shape.planes[0].rows, item.shape.planes[0].columns

    def shape_at(self, item: Item, grid: Grid) -> VisualShape:
        raise TypeError(f"{type(self).__name__} must define shape_at")

    def encode(
        self, items: Sequence[Item], needs: frozenset[str] = frozenset(), grids: Sequence[Grid | None] | None = None
    ) -> list[Encoding]:
        """Stock features of every item, all that are alike in one call of the model.

        grids: the smaller ``unit`` grid each item is made to have first; None leaves the image as it is.
        """
        grids = [None] * len(items) if grids is None else grids
        together: dict[tuple[str, Grid | None], list[int]] = {}
        for i, (item, grid) in enumerate(zip(items, grids)):
            together.setdefault((item.shape.modality, grid), []).append(i)
        out: dict[int, Encoding] = {}
        for (modality, grid), members in together.items():
            out |= zip(members, self.run(modality, [items[i] for i in members], needs, grid))
        return [out[i] for i in range(len(items))]

    def run(self, modality: str, items: list[Item], needs: frozenset[str], grid: Grid | None) -> list[Encoding]:
        """Stock features of items of one modality, at one grid."""
        raise TypeError(f"{type(self).__name__} must define run")

    @property
    def projector_at(self) -> tuple[Any, str]:
        """The module that holds the projector, and its name there."""
        return self.model.model, "multi_modal_projector"

    @property
    def projector_widths(self) -> tuple[int, int]:
        """Widths of what the projector takes and of what it gives."""
        layers, vision = self.config.vision_feature_layer, self.config.vision_config
        return vision.hidden_size * (1 if isinstance(layers, int) else len(layers)), self.config.get_text_config().hidden_size

    def slot(self, method: Any) -> tuple[Any, str]:
        """The module that holds the part of a trained method, and its name there."""
        if method.kind == PROJECTOR:
            return self.projector_at
        from .decoder.hooks import decoder_of

        return decoder_of(self.model), ROUTER

    @property
    def router(self) -> Any:
        """The router that was put into the decoder, or None."""
        from .decoder.hooks import decoder_of

        return getattr(decoder_of(self.model), ROUTER, None)

    def widths(self, method: Any) -> tuple[int, int]:
        """Widths of what the part of a trained method takes and of what it gives."""
        width = self.config.get_text_config().hidden_size
        return self.projector_widths if method.kind == PROJECTOR else (width, width)

    def projected(self, item: Item, side: int) -> VisualShape:
        raise TypeError(f"{type(self).__name__} must define projected")

    def before_projector(self, items: list[Item]) -> Tensor:
        """(views of all items, N, D): what the model hands to its projector, without class tokens. The projector does not run."""
        raise TypeError(f"{type(self).__name__} must define before_projector")

    def encoding(self, features: Tensor, shape: VisualShape) -> Encoding:
        """Of an item that gave nothing else."""
        return Encoding(features, shape)

    def views_of(self, item: Item) -> int:
        """How many pictures the tower sees of an item: of an image its views, of a video its frames."""
        return len(item.arguments["pixel_values"])

    def embed_text(self, ids: Tensor) -> Tensor:
        """Embeddings (T, D) of text tokens (T,)."""
        return self.model.get_input_embeddings()(ids)

    def text_to_vision(self, text: Tensor, features: Tensor) -> Tensor:
        """(heads, N) products of text (T, D) and visual features (N, D) in the first decoder layer, mean over the text."""
        from .decoder.first import text_to_vision
        from .decoder.hooks import decoder_of

        return text_to_vision(decoder_of(self.model), text, features)

    def pack(self, features: Sequence[tuple[str, Tensor, tuple[Tensor, ...]]]) -> dict[str, Any]:
        """(modality, features, deep features) of each item in prompt order, as ``forward`` takes them in ``mm_encoder_outputs``."""
        out: dict[str, Any] = {}
        for modality in ("image", "video"):
            parts = [(f, deep) for m, f, deep in features if m == modality]
            if parts:
                out[modality] = self.container(modality, [f for f, _ in parts], list(zip(*(deep for _, deep in parts))))
        return out

    def container(self, modality: str, features: list[Tensor], deep: list[tuple[Tensor, ...]]) -> Any:
        """The output object of one modality. deep: for each layer the features of each item."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return BaseModelOutputWithPooling(pooler_output=features)

    def rope(
        self, ids: Tensor, mask: Tensor, types: Tensor, grids: dict[str, list[Any]], seconds: Any, items: Sequence[Item] = ()
    ) -> Tensor:
        """Positions (3, B, L) of a prompt on M-RoPE models."""
        raise TypeError(f"{type(self).__name__} has no M-RoPE")

    def example(self, images: Sequence[Views], pixels: Callable[..., Tensor]) -> dict[str, Any]:
        """The vision arguments of one prompt with these images, as the family's processor shapes them.

        pixels: gives a tensor of the shape that it is called with.
        """
        width, height = self.view_size
        return {"pixel_values": pixels(sum(image.views for image in images), self.tower_size.channels, height, width)}

    def joined(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """An argument of several calls as that of one."""
        return torch.cat(list(parts))

    def place(self, planes: tuple[Plane, ...], size: tuple[int, int], image_processor: Any) -> tuple[Plane, ...]:
        """The planes with boxes in fractions of the original image of ``size`` (width, height), its preprocessing undone."""
        return planes


def _of_views(views: Sequence[tuple[Tensor, Tensor | None]], item: Item, planned: Plan) -> Encoding:
    """One item of the tokens of its views, and which of them stayed, of each view's own."""
    starts = itertools.accumulate((len(plane) for plane in item.shape.planes), initial=0)
    kept = [start + own for start, (_, own) in zip(starts, views) if own is not None]
    return Encoding(torch.cat([tokens for tokens, _ in views]), planned.seen, kept=torch.cat(kept) if kept else None)


def runs_in(ids: Sequence[int], token: int) -> list[tuple[int, int]]:
    """(first, end) of every run of a token among ids."""
    runs, at = list[tuple[int, int]](), 0
    for found, group in itertools.groupby(ids):
        start, at = at, at + len(list(group))
        if found == token:
            runs.append((start, at))
    return runs


def smaller_pixels(pixels: Tensor, height: int, width: int) -> Tensor:
    """Images (images, channels, H, W) made smaller: bicubic with antialiasing, in float32."""
    return torch.nn.functional.interpolate(pixels.float(), (height, width), mode="bicubic", antialias=True).to(pixels.dtype)


def uncropped(planes: tuple[Plane, ...], size: tuple[int, int], processor: Any) -> tuple[Plane, ...]:
    """The planes on the original image of ``size`` (width, height), of which the model saw a centre crop."""
    if not getattr(processor, "do_center_crop", False):
        return planes
    wanted, crop = processor.size, processor.crop_size
    edge = wanted.get("shortest_edge")
    shown = [edge * side / min(size) for side in size] if edge else [wanted["width"], wanted["height"]]
    across, down = crop["width"] / shown[0], crop["height"] / shown[1]
    top, left = (1 - down) / 2, (1 - across) / 2

    def original(box: Box) -> Box:
        return top + box[0] * down, left + box[1] * across, top + box[2] * down, left + box[3] * across

    return tuple(replace(p, box=original(p.box)) for p in planes)
