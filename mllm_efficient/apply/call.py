"""A call of a model, parsed: what belongs to the images, what to the prompt, and where each image stands in it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..compressors.base import Compressor
from ..compressors.composed import before_of, inside_of, stages_of
from ..compressors.none import NoCompression
from ..compressors.reducer import Reducer
from .conversation import ends_of, in_conversation
from .encode import has_pixels, require_encoding, require_installed
from .labels import entering, of_text, stays_long
from .locate import PlacedImage, locate, visual_in
from .plan import check, position_rule, refuse_processor
from .prompt import TYPES, Layout, require

if TYPE_CHECKING:
    from .encode import Encoded


@dataclass(frozen=True)
class Call:
    """One call and the method that it is compressed with.

    adapter: of the model. method: all stages. input_ids, attention_mask, labels: (B, L), as the caller gave them. vision: the
    arguments that the vision tower takes. rest: every other argument for the model, labels not among them. image_keys: one per
    image, for methods that draw. encoded: what the vision side made of the images, where that has run. past: the layout of the
    earlier turns whose cache is passed along.
    """

    adapter: Any
    method: Compressor
    input_ids: Tensor
    attention_mask: Tensor | None
    labels: Tensor | None
    vision: dict[str, Any]
    rest: dict[str, Any]
    image_keys: Sequence[int | str] | None = None
    encoded: Encoded | None = None
    past: Layout | None = None

    @cached_property
    def pre_llm(self) -> Compressor:
        """The stages before the decoder, ``NoCompression`` where there are none."""
        return before_of(self.method) or NoCompression()

    @cached_property
    def in_llm(self) -> Reducer | None:
        """The stage inside the decoder."""
        return inside_of(self.method)

    @cached_property
    def token_method(self) -> Compressor:
        """The stage that compresses tokens: the last one before the decoder."""
        return stages_of(self.pre_llm)[-1]

    @cached_property
    def positions(self) -> str:
        """The rule of the prompt that enters the decoder, "renumber" or "keep"."""
        return position_rule(self.adapter, self.pre_llm)

    @cached_property
    def final_positions(self) -> str:
        """The rule of the last stage, which the report names."""
        return (self.in_llm.positions if self.in_llm is not None else None) or self.positions

    @property
    def has_images(self) -> bool:
        """Whether there is anything to compress, or a compressed cache to go on from."""
        return self.encoded is not None or self.past is not None or has_pixels(self.vision)

    @cached_property
    def mask(self) -> Tensor:
        """(B, L), 1 where there is no padding."""
        return torch.ones_like(self.input_ids) if self.attention_mask is None else self.attention_mask

    @cached_property
    def ids_cpu(self) -> Tensor:
        return self.input_ids.cpu()

    @cached_property
    def mask_cpu(self) -> Tensor:
        """(B, L) bool."""
        return self.mask.cpu().bool()

    @property
    def start(self) -> int:
        """The first column that the cache does not hold."""
        return self.past.full_length if self.past else 0

    @property
    def cached_images(self) -> list[int]:
        """Images that each row had in earlier turns."""
        return self.past.images.tolist() if self.past else [0] * len(self.ids_cpu)

    @cached_property
    def whole_prompt(self) -> bool:
        """Whether every column reaches the decoder, inside which alone the prompt gets shorter."""
        return stays_long(self.adapter, self.method)

    @cached_property
    def loss_labels(self) -> Tensor | None:
        """(B, L) the labels that may enter the loss of a compressed prompt. Warns once where it takes some away."""
        require(self.rest.get("shift_labels") is None, "shift_labels cannot be compressed: pass labels, which the model shifts itself")
        if self.labels is None:
            return None
        entire = self.whole_prompt
        return entering(self.labels, self.mask_cpu, self.visual, repacked=False) if entire else of_text(self.labels, self.visual)

    @cached_property
    def placed(self) -> list[PlacedImage]:
        """The images and videos that are new in this call, in prompt order. Raises ``CountMismatchError`` as ``place_images`` does."""
        return place_images(self)

    @cached_property
    def visual(self) -> Tensor:
        """(B, L) bool, the columns of images: every placeholder, and the text between those of one new image."""
        found = visual_in(self.ids_cpu, self.adapter.placeholders)
        found[:, self.start :] |= visual_in(self.ids_cpu[:, self.start :], self.adapter.placeholders, self.placed)
        return found

    def tensors(self, labels: Tensor | None) -> dict[str, Any]:
        """The arguments of the model beside the images, with these labels, the prompt as long as it came."""
        out = {"input_ids": self.input_ids, "attention_mask": self.attention_mask, **self.rest}
        return out if labels is None else {**out, "labels": labels}


def parse_call(adapter: Any, method: Compressor, inputs: dict[str, Any]) -> Call:
    """Sorts the arguments of ``prepare``. Raises where the model cannot run the method or the arguments do not fit together."""
    fields = {name: inputs.pop(name) for name in ("input_ids", "attention_mask", "labels", "image_keys", "encoded", "past")}
    inputs = adapter.as_tensors(inputs)
    vision = {k: v for k, v in inputs.items() if k in adapter.encode_keys}
    rest = {k: v for k, v in inputs.items() if k not in adapter.encode_keys}
    call = Call(adapter, method, vision=vision, rest=rest, **fields)
    if call.has_images:
        refuse_processor(method)
        check(adapter, method)
        require_installed(adapter, method)
        _require_prompt(call)
        if adapter.sees_both_ways:
            _warn_without_types(call)
        _require_same_conversation(call)
    return call


def _warn_without_types(call: Call) -> None:
    """Warns of images without the argument that tells the model to let their tokens see each other: it does without a word."""
    if (has_pixels(call.vision) or call.encoded is not None) and call.rest.get(call.adapter.typed) is None:
        warnings.warn(
            f"images without {call.adapter.typed}: tokens of an image see only those before them, which {call.adapter.name} was not "
            "trained for; pass everything that the processor returned",
            stacklevel=2,
        )


def _require_prompt(call: Call) -> None:
    ids, mask = call.input_ids, call.mask
    require(mask.ndim == 2, f"attention_mask must be (batch, length), not {tuple(mask.shape)}")
    require(mask.shape == ids.shape, f"attention_mask {tuple(mask.shape)} and input_ids {tuple(ids.shape)} differ")
    for name in TYPES:
        given = call.rest.get(name)
        fits = given is None or given.shape == ids.shape
        require(fits, f"{name} {() if given is None else tuple(given.shape)} and input_ids {tuple(ids.shape)} differ")
    require(call.rest.get("position_ids") is None, "position_ids cannot be given with compression: use positions='keep'")


def _require_same_conversation(call: Call) -> None:
    """The prompt goes on from the one in the cache, by the same rule of positions."""
    past, ids = call.past, call.ids_cpu
    if past is None:
        return
    require(ids.shape[1] > past.full_length, "this turn adds no token to the cached prompt")
    same = ids.shape[0] == past.ids.shape[0] and torch.equal(ids[:, : call.start], past.ids)
    require(same, "the cache holds another prompt: pass input_ids that begin with the prompt of the earlier turn")
    same_rule = past.positions == call.positions
    require(same_rule, f"the cache was made with positions={past.positions!r}, which a later turn cannot change")


def place_images(call: Call) -> list[PlacedImage]:
    """The images and videos of a call in prompt order, each with the columns of its placeholders.

    Raises:
        CountMismatchError: placeholders, image tokens, ``image_keys`` or what was encoded do not fit together.
    """
    new = {"input_ids": call.ids_cpu[:, call.start :], "attention_mask": call.mask_cpu[:, call.start :]}
    items = call.encoded.items if call.encoded else call.adapter.items({**call.vision, **new})
    placed = locate(new["input_ids"], call.adapter.placeholders, items)
    placed = in_conversation(placed, new["input_ids"], ends_of(call.adapter.model))
    keys = call.image_keys
    require(keys is None or len(keys) == len(placed), f"{len(keys or ())} image_keys for {len(placed)} images")
    if call.encoded is not None:
        for image in placed:
            require_encoding(call.adapter, call.pre_llm, call.encoded, image)
    return placed
