"""What a method may ask for beyond the tower's output: a generator for each image, and the text of its row up to the answer."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..compressors.base import Compressor, generator_for
from .compress import Context
from .in_llm import instruction_end
from .locate import PlacedImage

if TYPE_CHECKING:
    from .call import Call


def contexts_of(call: Call, placed: list[PlacedImage], asked: bool = False) -> list[Context]:
    """One for each image of a call. asked: whether the projector that the model holds is shown the text, whatever the method.

    Where labels say where the answer begins, as in training, the method is not shown what it could not know when it generates.
    """
    adapter, method, labels = call.adapter, call.token_method, call.loss_labels
    ids, mask = call.input_ids[:, call.start :], call.mask_cpu[:, call.start :]
    instruction, clip, needs = None, None, set(method.needs) | ({"text"} if asked else set())
    if {"text", "clip_text"} & needs:
        instruction = _instruction(call.visual[:, call.start :], mask, None if labels is None else labels[:, call.start :])
        clip = _clip(adapter, method) if placed else None
    out, number, clip_text = list[Context](), call.cached_images, dict[int, Tensor | None]()
    for i, image in enumerate(placed):
        key = number[image.row] if call.image_keys is None else call.image_keys[i]
        number[image.row] += 1
        words = None if instruction is None else ids[image.row][instruction[image.row].to(ids.device)]
        text = adapter.embed_text(words) if words is not None and "text" in needs else None
        if clip is not None and words is not None and image.row not in clip_text:
            clip_text[image.row] = _text_by_clip(adapter, clip, words)
        heads = functools.partial(adapter.text_to_vision, text) if text is not None and len(text) and "heads" in method.needs else None
        out.append(Context(generator_for(method, key), text, clip_text.get(image.row), clip, heads))
    return out


def _instruction(visual: Tensor, mask: Tensor, labels: Tensor | None) -> Tensor:
    """(B, L) bool, the columns of each row's text up to its answer: nothing of an image, no padding. All on the CPU."""
    last = instruction_end(mask, visual & mask, labels)
    return mask & ~visual & (torch.arange(mask.shape[1]) <= last[:, None])


def _clip(adapter: Any, method: Compressor) -> Any:
    """The CLIP that a method names, None for one that needs none."""
    if "clip_text" not in method.needs:
        return None
    from ..patches.tower.clip import clip_of

    return clip_of(adapter, str(method.clip))


def _text_by_clip(adapter: Any, clip: Any, ids: Tensor) -> Tensor | None:
    """(d,) the text of token ids in CLIP's space, None where there are no words."""
    from ..patches.tower.clip import words_of

    words = words_of(adapter, ids)
    return clip.text(words) if words else None
