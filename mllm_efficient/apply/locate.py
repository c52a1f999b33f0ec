"""Where the images and videos of a call stand in its prompt."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import CountMismatchError


@dataclass(frozen=True)
class PlacedImage:
    """An item with its place. index: among the items of the call. token: its placeholder. columns: (length,) of ``row``."""

    item: Any
    index: int
    token: int
    row: int
    columns: Tensor


def locate(ids: Tensor, placeholders: dict[str, int], items: list[Any]) -> list[PlacedImage]:
    """The items in prompt order. ids: (B, L). placeholders: the token of each modality.

    Placeholders of a modality are consumed in order by the lengths of its items. Boundaries come from the lengths,
    never from runs of placeholders: two images side by side form one run.

    Raises:
        CountMismatchError: a prompt has more or fewer placeholders than its images have tokens.
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
    return sorted(out, key=lambda image: (image.row, int(image.columns[0])))


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
