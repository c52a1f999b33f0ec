"""Encode, compress, shrink: the explicit path that everything else is a skin over.

The stock vision tower and projector run, each image's tokens are compressed, the surplus placeholder columns leave the
prompt, and the model gets the shorter prompt with the features as ``mm_encoder_outputs``. Model, cache, positions,
masks and ``generate`` stay stock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .compressors.base import Compressor, Resizer, generator_for
from .errors import CountMismatchError, UnsupportedModelError
from .layout import EncoderOutputs, Layout, lay_out, require, shrink
from .registry import build
from .report import CompressionReport, ImageReport
from .tokens import CompressedTokens, VisualTokens


@dataclass(frozen=True)
class Encoded:
    """The vision side of a call: ``tokens`` per image, (N, grid) of the uncompressed image, and what it was made for.

    made_for: the extra tensors the tokens carry, and the smaller grid the tower saw (``encoding_key``).
    """

    tokens: list[VisualTokens]
    images: list[tuple[int, tuple[int, int] | None]]
    made_for: tuple[frozenset[str], tuple[int, int] | None] = (frozenset(), None)


@dataclass(frozen=True)
class Prepared:
    """A call ready for the stock model: ``model.generate(**prepared.model_kwargs, max_new_tokens=20)``.

    report: what was done. layout: None where nothing was compressed. visual_keep_mask: (B, L) bool, False where a
    visual token left the prompt.
    """

    tensors: dict[str, Any]
    features: list[Tensor] | None
    pack: Callable[[list[Tensor]], dict[str, Any]]
    report: CompressionReport
    layout: Layout | None

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """A fresh set of arguments at each access, because ``generate`` with beams changes them in place."""
        out = dict(self.tensors)
        if self.features is not None:
            out["mm_encoder_outputs"] = EncoderOutputs(self.pack(self.features))
            out["mm_encoder_outputs"].layout = self.layout
        return out

    @property
    def visual_keep_mask(self) -> Tensor:
        ids = self.tensors["input_ids"]
        return torch.ones_like(ids, dtype=torch.bool) if self.layout is None else self.layout.keep.to(ids.device)


def pre_llm(compressor: Any) -> Compressor:
    """The one method of family P in what ``build`` made. Other families need a host that can run them."""
    built = build(compressor)
    stages = built if isinstance(built, tuple) else (built,)
    for stage in stages:
        if stage.family != "P":
            raise UnsupportedModelError(f"{stage.name} is of family {stage.family}, which this version does not run")
    return stages[0]


def check(adapter: Any, compressor: Compressor) -> None:
    """Raises where a model cannot run a method at all, before any call is made."""
    lacking = sorted(set(compressor.needs) - adapter.gives)
    if lacking:
        family = type(adapter.model).__name__
        raise UnsupportedModelError(f"{compressor.name} needs {', '.join(lacking)}, which {family} does not give")
    n, grid = adapter.full_size_grid()
    compressor.count(n, grid, fixed=adapter.fixed_count)


def encode(model: Any, compressor: Any, **inputs: Any) -> Encoded:
    """Runs the vision side as ``compressor`` needs it, for ``prepare(..., encoded=...)``.

    Methods with the same needs give the same result, so a comparison encodes each image once.
    """
    from .patches import adapter_for

    adapter, method = adapter_for(model), pre_llm(compressor)
    images = adapter.images(inputs)
    return _encode(adapter, method, inputs, images)


def _encode(adapter: Any, method: Compressor, inputs: dict[str, Any], images: list) -> Encoded:
    wanted = encoding_key(method, *images[0]) if images else (frozenset(), None)
    return Encoded(adapter.encode(inputs, wanted[0], grid=wanted[1]), images, wanted)


def encoding_key(method: Compressor, n: int, grid: tuple[int, int] | None) -> tuple[frozenset[str], tuple[int, int] | None]:
    """What the vision side does for a method on images of n tokens: (extra tensors, smaller grid). Equal keys, equal output."""
    k = method.count(n, grid)
    smaller = method.target(grid, k) if isinstance(method, Resizer) and grid is not None and k < n else None
    return frozenset(method.needs) & {"attention", "keys"}, smaller


def keeps_all(adapter: Any, method: Compressor, images: list) -> bool:
    """Whether the method leaves these images as they are, so that the call needs no change."""
    return method.full_is_identity and all(method.count(n, grid, fixed=adapter.fixed_count) == n for n, grid in images)


def prepare(
    model: Any,
    compressor: Any,
    *,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    image_keys: Sequence[int | str] | None = None,
    encoded: Encoded | None = None,
    past: Layout | None = None,
    **inputs: Any,
) -> Prepared:
    """Compresses the images of a call and removes their surplus columns from its prompt.

    Args:
        model: a supported transformers model, bare, wrapped by this package, or under PEFT.
        compressor: a method, specification string, dict or YAML file.
        input_ids, attention_mask, labels: (B, L); the processor's output.
        image_keys: one per image in prompt order, for methods that draw; default the image's index within its row.
        encoded: what ``encode`` returned for these images; without it the vision tower runs here.
        past: the layout of an earlier turn whose cache is passed along; ``input_ids`` then begins with its prompt.
        inputs: the rest of the processor's output (``pixel_values``) and anything else for the model.

    Raises:
        CountMismatchError: placeholders and image tokens differ; BadBudgetError, UnsupportedModelError.
    """
    from .patches import adapter_for

    adapter, method = adapter_for(model), pre_llm(compressor)
    keys = set(adapter.encode_keys)
    vision = {k: v for k, v in inputs.items() if k in keys}
    rest = {k: v for k, v in inputs.items() if k not in keys}
    if labels is not None:
        rest["labels"] = labels
    if encoded is None and vision.get("pixel_values") is None and past is None:
        return _untouched(adapter, input_ids, attention_mask, {**rest, **vision}, CompressionReport())
    check(adapter, method)
    images = encoded.images if encoded else adapter.images(vision) if vision.get("pixel_values") is not None else []
    counts = [method.count(n, grid, fixed=adapter.fixed_count) for n, grid in images]
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    require(mask.ndim == 2, f"attention_mask must be (batch, length), not {tuple(mask.shape)}")
    require(mask.shape == input_ids.shape, f"attention_mask {tuple(mask.shape)} and input_ids {tuple(input_ids.shape)} differ")
    require(rest.get("position_ids") is None, "position_ids cannot be given with compression: use positions='keep'")
    require(past is None or input_ids.shape[1] > past.full_length, "this turn adds no token to the cached prompt")
    start = past.full_length if past else 0
    ids_cpu, mask_cpu = input_ids.cpu(), mask.cpu().bool()
    if past is not None:
        same = input_ids.shape[0] == past.ids.shape[0] and torch.equal(ids_cpu[:, :start], past.ids)
        require(same, "the cache holds another prompt: pass input_ids that begin with the prompt of the earlier turn")
    spans = locate(ids_cpu[:, start:] == adapter.image_token_id, [n for n, _ in images])
    positions = method.positions or adapter.positions
    same_rule = past is None or past.positions == positions
    require(same_rule, f"the cache was made with positions={past and past.positions!r}, which a later turn cannot change")
    settings = {"stages": (method.to_dict(),), "positions": positions, "decoder_layers": adapter.decoder_layers}

    if encoded is not None and images:
        needs, smaller = encoding_key(method, *images[0])
        require(needs <= encoded.made_for[0], f"{method.name} needs {', '.join(sorted(needs))}, which this encoding does not hold")
        require(smaller == encoded.made_for[1], f"this encoding saw images of another size than {method.name} asks for")
    if past is None and keeps_all(adapter, method, images):
        found = (ImageReport(row, n, n, torch.arange(n), grid) for (row, _), (n, grid) in zip(spans, images))
        report = CompressionReport(tuple(found), **settings)
        if encoded is None:
            return _untouched(adapter, input_ids, attention_mask, {**rest, **vision}, report)
        tensors = {"input_ids": input_ids, "attention_mask": attention_mask, **rest}
        return Prepared(_given(tensors), [t.features for t in encoded.tokens], adapter.pack, report, None)

    if encoded is None and images:
        encoded = _encode(adapter, method, vision, images)
    tokens = encoded.tokens if encoded else []
    before = past.images.tolist() if past else [0] * len(ids_cpu)
    tokens = _with_context(adapter, method, tokens, spans, input_ids[:, start:], mask_cpu[:, start:], image_keys, before)
    compressed, seconds = _compress(method, tokens, counts)
    indices = _indices_on_cpu(compressed)
    keep = torch.ones_like(mask_cpu)
    if past is not None:
        keep[:, :start] = past.keep
    for (row, columns), index, k in zip(spans, indices, counts):
        kept = torch.zeros(len(columns), dtype=torch.bool)
        kept[index.sort().values if index is not None else torch.arange(k)] = True
        keep[row, columns + start] = kept
    found = (
        ImageReport(row, n, k, index, c.grid if index is None else t.grid, t.tile, method.tokens is not None and method.tokens > n)
        for (row, _), (n, _), k, index, t, c in zip(spans, images, counts, indices, tokens, compressed)
    )
    report = CompressionReport(tuple(found), compress_seconds=seconds, **settings)
    images_of = torch.tensor(before) + torch.bincount(torch.tensor([r for r, _ in spans], dtype=torch.long), minlength=len(ids_cpu))
    layout = lay_out(ids_cpu, mask_cpu, keep, past, images_of, positions)
    tensors = shrink(layout, input_ids, mask, rest, _pad_id(adapter))
    return Prepared(_given(tensors), [c.features for c in compressed] or None, adapter.pack, report, layout)


def _given(tensors: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in tensors.items() if v is not None}


def _untouched(adapter, input_ids, attention_mask, rest: dict[str, Any], report: CompressionReport) -> Prepared:
    tensors = {"input_ids": input_ids, "attention_mask": attention_mask, **rest}
    return Prepared(_given(tensors), None, adapter.pack, report, None)


def locate(placeholder: Tensor, lengths: list[int]) -> list[tuple[int, Tensor]]:
    """(row, columns) of every image: placeholders (B, L) bool are consumed in order by the feature lengths.

    Boundaries come from the lengths, never from runs of placeholders: two images side by side form one run.
    """
    where = placeholder.nonzero()
    if len(where) != sum(lengths):
        raise CountMismatchError(
            f"the prompt has {len(where)} image placeholders and its {len(lengths)} image(s) give {sum(lengths)} tokens: "
            "use the processor that belongs to the model, and one <image> per image"
        )
    out, start = [], 0
    for i, n in enumerate(lengths):
        rows, columns = where[start : start + n].T
        if len(rows) and rows[0] != rows[-1]:
            raise CountMismatchError(f"the tokens of image {i} would span two rows of the batch: one <image> per image in each row")
        out.append((int(rows[0]), columns))
        start += n
    return out


def _with_context(adapter, method, tokens, spans, ids: Tensor, mask: Tensor, image_keys, before: list[int]) -> list[VisualTokens]:
    """Adds what a method may ask for beyond the tower's output: a generator and the row's text.

    ``before``: images that each row had in earlier turns.
    """
    if image_keys is not None:
        require(len(image_keys) == len(tokens), f"{len(image_keys)} image_keys for {len(tokens)} images")
    out: list[VisualTokens] = []
    seen = list(before)
    for i, (t, (row, _)) in enumerate(zip(tokens, spans)):
        index = seen[row]
        seen[row] += 1
        t = replace(t, generator=generator_for(method, index if image_keys is None else image_keys[i]))
        if "text" in method.needs:
            here = ids[row][mask[row].to(ids.device) & (ids[row] != adapter.image_token_id)]
            t = replace(t, text=adapter.embed_text(here))
        out.append(t)
    return out


def _compress(method: Compressor, tokens: list[VisualTokens], counts: list[int]) -> tuple[list[CompressedTokens], float]:
    """Every image compressed on its own, and the seconds it took on the device."""
    cuda = bool(tokens) and tokens[0].features.is_cuda
    if cuda:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(tokens[0].features.device)
        begin.record(stream)
    started = time.perf_counter()
    if isinstance(method, Resizer):
        out = [CompressedTokens(t.features, grid=t.grid) for t in tokens]
    else:
        out = [method.compress(t, k) for t, k in zip(tokens, counts)]  # type: ignore[attr-defined]
    for c, k in zip(out, counts):
        require(len(c) == k, f"{method.name} gave {len(c)} tokens where {k} were asked")
    if not cuda:
        return out, time.perf_counter() - started
    end.record(stream)
    end.synchronize()
    return out, begin.elapsed_time(end) / 1000


def _indices_on_cpu(compressed: Iterable[CompressedTokens]) -> list[Tensor | None]:
    """Kept indices per image, checked: a method may not repeat a token or name one that is not there."""
    out = []
    for c in compressed:
        index = None if c.indices is None else c.indices.detach().to("cpu", torch.long)
        if index is not None and len(index.unique()) != len(index):
            raise CountMismatchError("a method selected the same visual token twice")
        out.append(index)
    return out


def _pad_id(adapter: Any) -> int:
    text = adapter.config.get_text_config()
    pad = getattr(text, "pad_token_id", None)
    return pad if isinstance(pad, int) and pad >= 0 and pad != adapter.image_token_id else 0


def describe(method: Compressor, n: int, grid: tuple[int, int] | None, *, fixed: bool = True) -> str:
    """``divprune keeps 56 of 576 tokens per image (removes 90.3%)``."""
    k = method.count(n, grid, fixed=fixed)
    return f"{method.name} keeps {k} of {n} tokens per image (removes {100 * (1 - k / n):.1f}%)"


__all__ = ["Encoded", "Prepared", "describe", "encode", "prepare"]
