"""Where the images and videos of a call stand in its prompt."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import CountMismatchError
from ..tokens import VisualShape


@dataclass(frozen=True)
class PlacedImage:
    """An item with its place. index: among the items of the call. token: its placeholder. columns: (length,) of ``row``.

    marks: of each mark of the item's shape the columns.
    """

    item: Any
    index: int
    token: int
    row: int
    columns: Tensor
    marks: tuple[Tensor, ...] = ()

    def marked(self, left: Callable[[Any], bool] | None = None) -> Tensor:
        """(M,) the columns of all marks, or of those of which ``left`` holds."""
        parts = [columns for mark, columns in zip(self.item.shape.marks, self.marks) if left is None or left(mark)]
        return torch.cat(parts) if parts else self.columns[:0]


def locate(ids: Tensor, placeholders: dict[str, int], items: list[Any]) -> list[PlacedImage]:
    """The items in prompt order. ids: (B, L). placeholders: the token of each modality.

    Placeholders of a modality are consumed in order by the lengths of its items. Boundaries come from the lengths,
    never from runs of placeholders: two images side by side form one run. The text between the placeholders of one item is what its
    shape says (``Mark``).

    Raises:
        CountMismatchError: a prompt has more or fewer placeholders than its images have tokens, or other text between them.
    """
    out = []
    for modality, token in read_as(placeholders, {item.shape.modality for item in items}).items():
        where = (ids == token).nonzero()
        of_kind = [(i, item) for i, item in enumerate(items) if item.shape.modality == modality]
        lengths = [item.shape.length for _, item in of_kind]
        if len(where) != sum(lengths):
            cut = "; max_length or truncation of the processor cuts prompts off: leave them out" if len(where) < sum(lengths) else ""
            raise CountMismatchError(
                f"the prompt has {len(where)} {modality} placeholders and its {len(of_kind)} {modality}(s) give {sum(lengths)} tokens: "
                f"use the processor that belongs to the model, and one <{modality}> per {modality}{cut}"
            )
        start = 0
        for n, ((i, item), length) in enumerate(zip(of_kind, lengths)):
            rows, columns = where[start : start + length].T
            if len(rows) and rows[0] != rows[-1]:
                raise CountMismatchError(
                    f"the tokens of {modality} {n} would span two rows of the batch: one <{modality}> per {modality} in each row"
                )
            out.append(PlacedImage(item, i, token, int(rows[0]), columns))
            start += length
    out = [replace(image, marks=_marks(image.item.shape, image.columns, ids.shape[1])) for image in out]
    return sorted(out, key=lambda image: (image.row, int(image.columns[0])))


def visual_in(ids: Tensor, placeholders: dict[str, int], placed: Sequence[PlacedImage] = ()) -> Tensor:
    """(B, L) bool, the columns of images among ids (B, L): placeholders, and the marks of those that were located."""
    found = torch.isin(ids, torch.tensor(list(placeholders.values()), device=ids.device))
    for image in placed:
        found[image.row, image.marked().to(ids.device)] = True
    return found


def written(shape: VisualShape, placeholder: int, adapter: Any) -> list[int]:
    """The token ids of an image of this shape, as a prompt without a tokenizer has them: marks are rare tokens, equal words equal ones."""
    words = sorted({word for mark in shape.marks for word in mark.words})
    special, last = set(adapter.placeholders.values()), adapter.config.get_text_config().vocab_size - 1
    rare = dict(zip(words, (i for i in range(last, -1, -1) if i not in special)))
    text: dict[int, list[int]] = {}
    for mark in shape.marks:
        text.setdefault(mark.before, []).extend(rare[word] for word in mark.words)
    slots = [[*text.get(slot, []), placeholder] for slot in range(shape.length)]
    return [token for slot in slots for token in slot] + text.get(shape.length, [])


def _marks(shape: VisualShape, columns: Tensor, length: int) -> tuple[Tensor, ...]:
    """The columns of each mark of an image whose placeholders are at ``columns`` of a prompt of ``length``."""
    if not shape.marks:
        return ()
    text = Counter[int]()  # columns in front of each placeholder, and after the last
    for mark in shape.marks:
        text[mark.before] += len(mark.words)
    found = (columns[1:] - columns[:-1] - 1).tolist()
    for slot, there in enumerate(found, start=1):
        if there != text[slot]:
            raise CountMismatchError(
                f"in front of token {slot} of an image the prompt has {there} text tokens where {text[slot]} belong: use the processor "
                "that belongs to the model, and its prompt as it is"
            )
    at = {slot: int(columns[slot]) - n if slot < shape.length else int(columns[-1]) + 1 for slot, n in text.items()}
    if min(at.values()) < 0 or at.get(shape.length, 0) + text[shape.length] > length:
        raise CountMismatchError("the prompt is cut within an image: max_length or truncation of the processor cuts prompts off")
    out = list[Tensor]()
    for mark in shape.marks:
        start = at[mark.before]
        at[mark.before] += len(mark.words)
        out.append(torch.arange(start, at[mark.before]))
    return tuple(out)


def read_as(placeholders: dict[str, int], present: set[str]) -> dict[str, int]:
    """The placeholders of a call with these modalities. Where two share a token, it is that of the one that is there."""
    taken = {placeholders[modality] for modality in present}
    return {m: token for m, token in placeholders.items() if m in present or token not in taken}


def warn_without_pixels(placeholders: dict[str, int], inputs: dict[str, Any]) -> None:
    """Warns of a prompt with placeholders that no image came with: the model reads them as words. The CPU waits once."""
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or inputs.get("mm_encoder_outputs") is not None or inputs.get("inputs_embeds") is not None:
        return
    for modality, token in read_as(placeholders, {"image"}).items():
        found = int((ids == token).sum())
        if found:
            name = "pixel_values" if modality == "image" else "pixel_values_videos"
            warnings.warn(
                f"the prompt has {found} {modality} placeholders and no {name} came with it, so the model reads them as words: "
                "pass everything that the processor returned",
                stacklevel=2,
            )
