"""Each image by itself, so that nothing of one picture's data raises in a worker: that would end the engine for everybody."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mllm_efficient.compressors.math.finite import ADVICE
from mllm_efficient.errors import CountMismatchError, MllmEfficientError, NotFiniteError

from . import failures

try:
    from vllm.logger import init_logger
except ImportError:  # the arithmetic is tested without vLLM
    from logging import getLogger as init_logger

UNTOLD = "internal error, see the server's log"
logger = init_logger("vllm.mllm_efficient")


@dataclass(frozen=True)
class Image:
    """One image in a worker.

    mark: its fingerprint. features: (N, ...) that its rows are made of. room: rows that its prompt has. width: of a row.
    """

    mark: int
    features: Tensor
    room: int
    width: int


def each_alone(images: Sequence[Image], rows: Callable[[int], Tensor]) -> list[Tensor]:
    """The rows (room, width) of each image. Zeros for one that fails, which is logged and noted, so that its request ends with an error.

    rows: makes those of the i-th. The CPU waits for the device twice, whatever the number of images.
    """
    why: dict[int, Exception] = {}
    made: dict[int, Tensor] = {}
    for i, good in enumerate(_finite([image.features for image in images])):
        try:
            if not good:
                raise NotFiniteError(f"its features hold NaN or infinity: {ADVICE}")
            made[i] = rows(i)
            if made[i].shape != (images[i].room, images[i].width):
                raise CountMismatchError(f"{tuple(made[i].shape)} rows where its prompt has room for {(images[i].room, images[i].width)}")
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever it is, it is of this image
            why[i] = error
    for i, good in zip(made, _finite(list(made.values()))):
        if not good and i not in why:
            why[i] = NotFiniteError(f"its merged features hold NaN or infinity: {ADVICE}")
    for i, fault in why.items():
        reason = f"{type(fault).__name__}: {fault}"
        logger.error("visual tokens: an image cannot be used, its request ends with an error: %s", reason)
        # The note goes to a client: what others' errors say may be of the server's own affairs.
        said = reason if isinstance(fault, MllmEfficientError) else UNTOLD
        failures.note(images[i].mark, f"the picture cannot be used: {said}")
        made[i] = images[i].features.new_zeros(images[i].room, images[i].width)
    return [made[i] for i in range(len(images))]


def _finite(parts: Sequence[Tensor]) -> list[bool]:
    """Whether each holds finite numbers alone."""
    return torch.stack([part.isfinite().all() for part in parts]).tolist() if parts else []
