"""Features of different lengths for models that want one tensor.

Joining them to a batch of one gives right answers until ``generate`` repeats the images of each prompt (beams, several
answers): it then counts one image, and mixes up rows without an error. Here the list stays a list, which ``generate``
repeats image by image, and becomes a tensor where the model first touches it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling


class Ragged(list):
    """A list of (K_i, D) tensors that is (1, sum of K_i, D) to a model that takes it for a tensor."""

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.cat(list(self))[None].to(*args, **kwargs)

    def flatten(self, *dims: int) -> Tensor:
        return torch.cat(list(self))

    def reshape(self, *shape: int) -> Tensor:
        return torch.cat(list(self)).reshape(*shape)

    view = reshape

    def size(self, dim: int) -> int:
        return int(torch.cat(list(self))[None].size(dim))

    def numel(self) -> int:
        return sum(part.numel() for part in self)

    @property
    def shape(self) -> torch.Size:
        return torch.cat(list(self))[None].shape


class RaggedOutput(BaseModelOutputWithPooling):
    """An encoder output whose ``pooler_output`` stays ``Ragged`` whatever list is put there.

    ``generate`` repeats that part alone, so a model that reads another one finds the same list there.
    """

    read = "pooler_output"

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "pooler_output" and type(value) in (list, tuple):
            value = Ragged(value)
            if self.read != name:
                super().__setattr__(self.read, value)
        super().__setattr__(name, value)


class ReadFromLastState(RaggedOutput):
    """The same for a model that reads ``last_hidden_state``."""

    read = "last_hidden_state"


def ragged_output(features: list[Tensor], read: str = "pooler_output", deepstack: list[list[Tensor]] | None = None, **beside: Any) -> Any:
    """The output object for features (K_i, D) of several images.

    Args:
        read: the part that the model reads.
        deepstack: for each later layer the features of each image; None for a model without such layers.
        beside: further parts of the output, as they are.
    """
    out = RaggedOutput() if read == "pooler_output" else ReadFromLastState()
    out.pooler_output = features
    for name, value in (beside if deepstack is None else {**beside, "deepstack_features": deepstack}).items():
        setattr(out, name, value)
    return out
