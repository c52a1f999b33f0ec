"""vLLM's towers of Qwen2.5-VL and Qwen3-VL on some of an image's patches, each where it stands in the whole picture.

The front end sees the pixels, says which tokens stay (``STAY``) and sends their patches alone. The towers take what they know of a grid as
an argument (``encoder_metadata``), so nothing of them is copied or replaced.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mllm_efficient.compressors.base import Compressor
from mllm_efficient.errors import UnsupportedModelError

from ..base import Item
from .settings import KEY

STAY = "visual_tokens_stay"  # of each image (N,) bool, its tokens that stay; ``pixel_values`` are of their patches


# ------------------------------------------------------------------------------------------------------- front end


def cut(adapter: Any, method: Compressor, found: Any, whole: bool) -> None:
    """Says in what the processor made of images which of their tokens stay, and leaves out the pixels of the others.

    whole: they are the server's own, by which it measures memory, so that all stay: a picture of a request may have that many.
    """
    pixels, grids = found["pixel_values"], found["image_grid_thw"]
    with torch.device("cpu"):
        stay = torch.cat([torch.ones(i.shape.n, dtype=torch.bool) if whole else _stay(adapter, method, i) for i in adapter.items(found)])
    of_patches = stay.repeat_interleave(adapter.merge**2)
    if len(of_patches) != len(pixels):
        raise UnsupportedModelError(f"vLLM gave {len(pixels)} patches for grids of {grids.tolist()}, which have {len(of_patches)}")
    found[STAY], found["pixel_values"] = stay, pixels[of_patches.to(pixels.device)]


def _stay(adapter: Any, method: Compressor, item: Item) -> Tensor:
    """(N,) bool."""
    planned = method.plan(adapter, item)
    out = torch.full((item.shape.n,), planned.untouched)
    out[list(planned.stay)] = True
    return out


def split_of(found: Any, merge: int) -> tuple[Tensor, Tensor]:
    """(images,) the tokens of each image, and its patches that stay."""
    tokens = found["image_grid_thw"].prod(-1) // merge**2
    return tokens, torch.tensor([int(part.sum()) * merge**2 for part in found[STAY].split(tokens.tolist())])


def places_of(data: Mapping[str, Any], merge: int) -> Tensor:
    """(3, K) time, row and column in an image of its tokens that stay; of one that came as embeddings, of all.

    data: what a worker has of the image.
    """
    _, height, width = (int(v) // part for v, part in zip(data["image_grid_thw"].data.flatten().tolist(), (1, merge, merge)))
    where = data[STAY].data.cpu().nonzero()[:, 0] if STAY in data else torch.arange(height * width)
    return torch.stack([torch.zeros_like(where), where // width, where % width])


# ----------------------------------------------------------------------------------------------------------- model


def require_tower(visual: Any, method: Compressor) -> None:
    """Raises where a tower, or what it is given, is not as ``run_on`` needs it."""
    if "encoder_metadata" not in inspect.signature(visual.forward).parameters:
        raise UnsupportedModelError(
            f"{KEY}: {method.name} tells the tower where its patches stand, and that of this vLLM takes no encoder_metadata: 0.32 does"
        )
    norm = type(getattr(visual, "input_norm", None)).__name__
    if getattr(method, "tau", 0) and norm not in ("NoneType", "IdentityInputNorm"):
        raise UnsupportedModelError(f"{KEY}: {method.name} compares pixels after normalisation, and the tower makes it ({norm}): use tau=0")


def run_on(visual: Any, pixels: Tensor, grids: Sequence[Sequence[int]], stay: Sequence[Tensor]) -> list[Tensor]:
    """(K, D and deep layers) of each image what the tower and its mergers make of the tokens that stay, which see each other alone.

    pixels: (patches, d) of them. grids: (1, rows, columns) of each whole image in patches. stay: (N,) bool of each image.
    """
    whole = visual.prepare_encoder_metadata(grids)
    every, each = torch.cat(list(stay)).cpu(), visual.spatial_merge_size**2
    kept = [int(part.sum()) for part in stay]
    ends = functools.partial(_ends, visual, pixels.device)
    if "window_index" in whole:
        of_windows = [torch.diff(visual.get_window_index_thw(*grid)[1].cpu(), prepend=torch.zeros(1, dtype=torch.int32)) for grid in grids]
        order = whole["window_index"].cpu()  # in which the tower has tokens, window by window
        left = every[order]
        index = (every.cumsum(0) - 1)[order[left]]
        windows = [int(part.sum()) for part in left.split((torch.cat(of_windows) // each).tolist())]
        call = {"window_index": index.to(pixels.device), "reverse_indices": index.argsort().to(pixels.device)}
        call |= ends([n * each for n in kept], "cu_seqlens", "max_seqlen_full", "sequence_lengths_full")
        call |= ends([n * each for n in windows if n], "cu_window_seqlens", "max_seqlen_window", "sequence_lengths_window")
    else:
        left, call = every, ends([n * each for n in kept], "cu_seqlens", "max_seqlen", "sequence_lengths")
    patches = left.repeat_interleave(each)
    for name in ("rotary_pos_emb_cos", "rotary_pos_emb_sin", "pos_embeds"):
        if name in whole:
            call[name] = whole[name][patches.to(whole[name].device)]
    return list(visual(pixels, grid_thw=grids, encoder_metadata=call).split(kept))


def _ends(visual: Any, device: Any, lengths: Sequence[int], *names: str) -> dict[str, Any]:
    """Under these names what vLLM's attention asks of parts of these lengths: where they end, the longest, and what one backend wants."""
    from vllm.model_executor.layers.attention import MMEncoderAttention

    backend, ends = visual.attn_backend, np.cumsum([0, *lengths]).astype(np.int32)
    most = torch.tensor(MMEncoderAttention.compute_max_seqlen(backend, ends), dtype=torch.int32)
    sequences = MMEncoderAttention.maybe_compute_seq_lens(backend, ends, device)
    padded = {"fp8_padded_hidden_size": visual.fp8_padded_hidden_size}
    found = MMEncoderAttention.maybe_recompute_cu_seqlens(backend, ends, visual.hidden_size, visual.tp_size, device, **padded)
    return dict(zip(names, (found, most, sequences)))
