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


class RaggedOutput(BaseModelOutputWithPooling):
    """An encoder output whose ``pooler_output`` stays ``Ragged`` whatever list is put there."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, Ragged(value) if name == "pooler_output" and type(value) in (list, tuple) else value)


def ragged_output(features: list[Tensor]) -> RaggedOutput:
    """The output object for features (K_i, D) of several images."""
    return RaggedOutput(pooler_output=features)
