"""Encode, compress, shrink: the explicit path that everything else is a skin over.

The stock vision tower and projector run, each image's tokens are compressed, the surplus placeholder columns leave the
prompt, and the model gets the shorter prompt with the features as ``mm_encoder_outputs``. Model, cache, positions,
masks and ``generate`` stay stock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..compressors.base import Compressor, generator_for
from ..compressors.composed import before_of, inside_of, projector_of, runnable, stages_of
from ..compressors.none import NoCompression
from ..errors import UnsupportedModelError
from ..report import CompressionReport, ImageReport
from ..trained.folder import held, module_of, require_held
from .active import active_on
from .compress import Context, Squeezed, squeeze_all
from .in_llm import instruction_end, report_of, staging_of, standing, standing_in
from .labels import count_for, entering, leaves_alone, of_text, stays_long, visual_in
from .locate import Located, locate
from .plan import Plan, check, plan, position_rule
from .positions import native, place
from .prompt import EncoderOutputs, Layout, lay_out, require, shrink, with_text_row

IN_TOWER = "in the tower"  # begins the key of an encoding whose tower merged


@dataclass(frozen=True)
class Encoded:
    """The vision side of a call, for ``prepare(..., encoded=...)``: what the host made of every item of the call.

    made_for: of each item the extra tensors it carries and how else it was seen (``encoding_key``).
    """

    items: list[Any]
    encodings: list[Any]
    made_for: list[tuple[frozenset[str], Any]]


@dataclass(frozen=True)
class Prepared:
    """A call ready for the stock model: ``model.generate(**prepared.model_kwargs, max_new_tokens=20)``.

    report: what was done. layout: None where no column left the prompt. staging: what is to be done inside the decoder,
    whose report is complete when a forward has run. visual_keep_mask: (B, L) bool, False where a visual token left the prompt.

    ``generate`` goes on from it by itself. A decode loop written by hand over the stock ``forward`` must pass
    ``position_ids=layout.positions_of(mask, 1)`` with the reduced mask where that is not None (kept positions, M-RoPE):
    the stock model does not know them. A wrapped model does.
    """

    tensors: dict[str, Any]
    features: list[tuple[str, Tensor, tuple[Tensor, ...]]] | None
    pack: Callable[[list[tuple[str, Tensor, tuple[Tensor, ...]]]], dict[str, Any]]
    planned: CompressionReport
    layout: Layout | None
    staging: Any = None

    @property
    def report(self) -> CompressionReport:
        return self.planned if self.staging is None else report_of(self.staging, self.planned)

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """A fresh set of arguments at each access, because ``generate`` with beams changes them in place."""
        out = dict(self.tensors)
        if self.features is not None:
            out["mm_encoder_outputs"] = EncoderOutputs(self.pack(self.features))
            out["mm_encoder_outputs"].layout = self.layout
            out["mm_encoder_outputs"].staging, out["mm_encoder_outputs"].planned = self.staging, self.planned
        return out

    @property
    def visual_keep_mask(self) -> Tensor:
        ids = self.tensors["input_ids"]
        return torch.ones_like(ids, dtype=torch.bool) if self.layout is None else self.layout.keep.to(ids.device)


def encode(model: Any, compressor: Any, **inputs: Any) -> Encoded:
    """Runs the vision side as ``compressor`` needs it, for ``prepare(..., encoded=...)``.

    inputs: the processor's output, ``input_ids`` included. Methods with the same needs give the same result, so a
    comparison encodes each image once.
    """
    from ..patches import adapter_for

    adapter, method = adapter_for(model), runnable(compressor)
    return encode_items(adapter, method, adapter.items(inputs))


def encode_items(adapter: Any, method: Compressor, items: list[Any]) -> Encoded:
    """``encode`` of items that the adapter found. The host runs once on all that are alike."""
    keys = [encoding_key(adapter, method, i) for i in items]
    needs = keys[0][0] if keys else frozenset()
    require_installed(adapter, method)
    projector = projector_of(method)
    if items and projector is not None:
        (side,) = {plan(adapter, projector, item).side for item in items}
        return Encoded(items, adapter.project(items, module_of(adapter, projector), side), keys)
    if items and keys[0][1][0] == IN_TOWER:
        (rounds,) = {rounds for _, (_, rounds, _) in keys}
        return Encoded(items, adapter.merge_in_tower(items, rounds), keys)
    return Encoded(items, adapter.encode(items, needs, [grid for _, (grid, _) in keys]), keys)


def encoding_key(adapter: Any, method: Compressor, item: Any) -> tuple[frozenset[str], Any]:
    """What the vision side does for a method on an item: (extra tensors, smaller grid or other projector). Equal keys, equal output."""
    before, projector = before_of(method), projector_of(method)
    seen = plan(adapter, before or NoCompression(), item)
    other: Any = (seen.smaller, held(adapter)) if projector is None else (projector.name, projector.weights, seen.side)
    if seen.rounds:
        other = (IN_TOWER, seen.rounds, held(adapter))
    of_tower = frozenset() if before is None else frozenset(before.needs) & {"attention", "keys", "clip_text"}
    return of_tower, other


def keeps_all(adapter: Any, method: Any, inputs: dict[str, Any]) -> bool:
    """Whether a method leaves the images of a call as they are, so that the call needs no change."""
    return all(plan(adapter, runnable(method), item).untouched for item in adapter.items(inputs))


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
    """Compresses the images and videos of a call and removes their surplus columns from its prompt.

    Args:
        model: a supported transformers model, bare, wrapped by this package, or under PEFT.
        compressor: a method, specification string, dict or YAML file.
        input_ids, attention_mask, labels: (B, L); the processor's output.
        image_keys: one per image or video in prompt order, for methods that draw; default its index within its row.
        encoded: what ``encode`` returned for these images; without it the vision tower runs here.
        past: the layout of an earlier turn whose cache is passed along; ``input_ids`` then begins with its prompt.
        inputs: the rest of the processor's output (``pixel_values``) and anything else for the model.

    Raises:
        CountMismatchError: placeholders and image tokens differ; BadBudgetError, UnsupportedModelError.
    """
    from ..patches import adapter_for

    adapter, whole = adapter_for(model), runnable(compressor)
    method, inside = before_of(whole) or NoCompression(), inside_of(whole)
    of_tokens = stages_of(method)[-1]
    inputs = adapter.as_tensors(inputs)
    vision = {k: v for k, v in inputs.items() if k in adapter.encode_keys}
    rest = {k: v for k, v in inputs.items() if k not in adapter.encode_keys}
    if labels is not None:
        rest["labels"] = labels
    if encoded is None and not has_pixels(vision) and past is None:
        return _stock(adapter, input_ids, attention_mask, {**rest, **vision}, CompressionReport())
    check(adapter, whole)
    require_installed(adapter, whole)
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
    positions = position_rule(adapter, method)
    rule = inside.positions or positions if inside is not None else positions
    same_rule = past is None or past.positions == positions
    require(same_rule, f"the cache was made with positions={past and past.positions!r}, which a later turn cannot change")
    new_ids, new_mask = ids_cpu[:, start:], mask_cpu[:, start:]
    items = encoded.items if encoded else adapter.items({**vision, "input_ids": new_ids, "attention_mask": new_mask})
    found = locate(new_ids, adapter.placeholders, items)
    plans = [plan(adapter, method, f.item) for f in found]
    require(image_keys is None or len(image_keys) == len(found), f"{len(image_keys or ())} image_keys for {len(found)} images")
    alone = inside is not None and method.name == NoCompression.name
    settings = {"stages": tuple(stage.to_dict() for stage in stages_of(whole)), "positions": rule, "decoder_layers": adapter.decoder_layers}
    if encoded is not None:
        for f in found:
            needs, smaller = encoding_key(adapter, method, f.item)
            have, seen = encoded.made_for[f.index]
            require(needs <= have, f"{method.name} needs {', '.join(sorted(needs))}, which this encoding does not hold")
            require(smaller == seen, f"this encoding saw images of another size or projector than {method.name} asks for")
    inner = [plan(adapter, inside, f.item) for f in found] if inside is not None and alone else plans
    ends = [plan(adapter, whole, f.item) for f in found]
    if past is None and leaves_alone(adapter, whole, [f.item for f in found]):
        report = CompressionReport(tuple(_image(f, p, None, end) for f, p, end in zip(found, plans, ends)), **settings)
        if encoded is None:
            return _stock(adapter, input_ids, attention_mask, {**rest, **vision}, report)
        every = [(p.shape.modality, encoded.encodings[f.index].features, encoded.encodings[f.index].deep) for f, p in zip(found, plans)]
        tensors = {"input_ids": input_ids, "attention_mask": attention_mask, **rest}
        if adapter.mrope:
            places, _ = native(adapter, input_ids, mask, [(f, p, None) for f, p in zip(found, plans)], "keep")
            tensors["position_ids"] = with_text_row(places, mask)
        return Prepared(_given(tensors), every, adapter.pack, report, None)

    long = stays_long(adapter, whole)
    if labels is not None:
        visual = visual_in(adapter, ids_cpu)
        rest["labels"] = entering(labels, mask_cpu, visual, repacked=False) if long else of_text(labels, visual)
    require(rest.get("shift_labels") is None, "shift_labels cannot be compressed: pass labels, which the model shifts itself")
    if encoded is None:
        encoded = encode_items(adapter, method, items)
    staging: Any = None
    if inside is not None and long:
        _recount(rest, labels)
        tensors = {"input_ids": input_ids, "attention_mask": attention_mask, **rest}
        here = [standing(f, p) for f, p in zip(found, inner)]
        staging = staging_of(inside, rule, mask_cpu, here, adapter, input_ids, rest.get("labels"), image_keys)
        every = [(f.item.shape.modality, e.features, e.deep) for f, e in ((f, encoded.encodings[f.index]) for f in found)]
        report = CompressionReport(tuple(_image(f, p, None, p) for f, p in zip(found, inner)), **settings)
        return Prepared(_given(tensors), every, adapter.pack, report, None, staging)
    require(inside is None or past is None or not found, "new images on a cache that holds a conversation: start with an empty cache")
    before = past.images.tolist() if past else [0] * len(ids_cpu)
    given = rest.get("labels")
    contexts = _contexts(
        adapter, of_tokens, found, input_ids[:, start:], new_mask, image_keys, before, None if given is None else given[:, start:]
    )
    squeezed, seconds = squeeze_all(of_tokens, plans, [encoded.encodings[f.index] for f in found], contexts)
    keep = torch.ones_like(mask_cpu)
    if past is not None:
        keep[:, :start] = past.keep
    for f, s in zip(found, squeezed):
        keep[f.row, f.columns + start] = s.keep
    images_of = torch.tensor(before) + torch.bincount(torch.tensor([f.row for f in found], dtype=torch.long), minlength=len(ids_cpu))
    layout = lay_out(ids_cpu, mask_cpu, keep, past, images_of, positions)
    tensors = shrink(layout, input_ids, mask, rest, _pad_id(adapter))
    _recount(tensors, labels)
    short = tensors["input_ids"], tensors["attention_mask"]
    layout, positions_of = place(adapter, layout, input_ids, mask, *short, past, list(zip(found, plans, squeezed)))
    if positions_of is not None:
        tensors["position_ids"] = positions_of
    images = tuple(_image(f, p, s, end) for f, p, s, end in zip(found, plans, squeezed, ends))
    report = CompressionReport(images, compress_seconds=seconds, **settings)
    features = [(p.shape.modality, s.features, s.deep) for p, s in zip(plans, squeezed)]
    if inside is None or not found:
        return Prepared(_given(tensors), features or None, adapter.pack, report, layout)
    left = [standing_in(layout, f, p, s) for f, p, s in zip(found, plans, squeezed)]
    staging = staging_of(inside, rule, layout.mask.bool(), left, adapter, short[0], tensors.get("labels"), image_keys)
    return Prepared(_given(tensors), features or None, adapter.pack, report, layout, staging)


def _recount(tensors: dict[str, Any], labels: Tensor | None) -> None:
    """Puts the number of labels that enter the loss in the place of a count of all ``labels`` (B, L) of this call."""
    if labels is not None and tensors.get("num_items_in_batch") is not None:
        tensors["num_items_in_batch"] = count_for(tensors["num_items_in_batch"], labels, tensors["labels"])


def look(model: Any, compressor: Any, **inputs: Any) -> CompressionReport:
    """What a method does to the images of a call, without an answer. In-decoder methods take a prefill for that."""
    from ..trained.install import installed

    method = runnable(compressor)
    with torch.no_grad(), installed(model, method):
        prepared = prepare(model, method, **inputs)
        if prepared.staging is not None:
            model(**prepared.model_kwargs, use_cache=False, logits_to_keep=1)
    return prepared.report


def require_installed(adapter: Any, method: Compressor) -> None:
    """A baseline on a trained method's weights is nothing but another name where the model does not hold them.

    And nothing of an in-decoder method happens in a decoder without its hooks.
    """
    active = active_on(adapter.model)
    if active is not None:
        active.of_call(adapter.model)  # raises where the weights are those of another thread's block
    inside, part = inside_of(method), method.installs
    if inside is not None and not adapter.reached_inside:
        raise UnsupportedModelError(f"{inside.name} works inside the decoder, which prepare does not reach: use wrap or compressed")
    require_held(adapter, method)
    if part is not None and projector_of(method) is None and held(adapter) is None:
        raise UnsupportedModelError(f"{method.spec()} needs the weights in the model: use wrap or compressed")


def has_pixels(inputs: dict[str, Any]) -> bool:
    """Whether a call brings images or videos."""
    from ..patches.base import PIXELS

    return any(inputs.get(name) is not None for name in PIXELS)


def _image(f: Located, p: Plan, s: Squeezed | None, end: Plan) -> ImageReport:
    """What stands in the prompt after ``p``; end: the plan of all stages."""
    inside = bool(p.stages) and not p.untouched  # what stays is known when the decoder has run
    indices = (None if inside else torch.arange(p.shape.n)) if s is None else s.indices
    kept_planes = None if s is None else s.kept_planes
    one = kept_planes is not None and len(kept_planes) == 1
    return ImageReport(
        f.row, p.shape.n, p.kept, indices,
        (kept_planes[0].rows, kept_planes[0].columns) if one and kept_planes else p.shape.grid if kept_planes is None else None,
        p.shape.tile(), end.clamped, p.shape.modality, p.shape.planes, kept_planes, p.shape.frame(), p.shape.separators, end.separators,
        p.per_layer, of_merged=None if s is None else s.of_merged,
    )  # fmt: skip


def _given(tensors: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in tensors.items() if v is not None}


def _stock(adapter, input_ids, attention_mask, rest: dict[str, Any], report: CompressionReport) -> Prepared:
    """The call as it came."""
    tensors = {"input_ids": input_ids, "attention_mask": attention_mask, **rest}
    return Prepared(_given(tensors), None, adapter.pack, report, None)


def _contexts(
    adapter, method, found: list[Located], ids: Tensor, mask: Tensor, image_keys, before: list[int], labels: Tensor | None
) -> list[Context]:
    """What a method may ask for beyond the tower's output: a generator and the row's text up to the answer.

    ``before``: images that each row had in earlier turns. ``labels``: (B, L) of the same columns; an answer in a prompt, as
    in training, is not shown to the method, which could not know it when it generates.
    """
    from ..patches.tower.clip import words_of

    out: list[Context] = []
    seen = list(before)
    question = _question(adapter, ids.cpu(), mask, labels) if {"text", "clip_text"} & set(method.needs) else None
    clip = _clip(adapter, method) if found else None
    said: dict[int, Tensor | None] = {}
    for i, f in enumerate(found):
        index = seen[f.row]
        seen[f.row] += 1
        row = None if question is None else ids[f.row][question[f.row].to(ids.device)]
        text = adapter.embed_text(row) if row is not None and "text" in method.needs else None
        if clip is not None and row is not None and f.row not in said:
            words = words_of(adapter, row)
            said[f.row] = clip.text(words) if words else None
        out.append(Context(generator_for(method, index if image_keys is None else image_keys[i]), text, said.get(f.row), clip))
    return out


def _clip(adapter: Any, method: Compressor) -> Any:
    """The CLIP that a method names, None for one that needs none."""
    if "clip_text" not in method.needs:
        return None
    from ..patches.tower.clip import clip_of

    return clip_of(adapter, str(getattr(method, "clip", None)))


def _question(adapter: Any, ids: Tensor, mask: Tensor, labels: Tensor | None) -> Tensor:
    """(B, L) bool, the columns of each row's text up to its answer: no placeholder, no padding. All on the CPU."""
    visual = torch.isin(ids, torch.tensor(list(adapter.placeholders.values())))
    last = instruction_end(mask, visual & mask, labels)
    return mask & ~visual & (torch.arange(mask.shape[1]) <= last[:, None])


def _pad_id(adapter: Any) -> int:
    text = adapter.config.get_text_config()
    pad = getattr(text, "pad_token_id", None)
    return pad if isinstance(pad, int) and pad >= 0 and pad not in adapter.placeholders.values() else 0


__all__ = ["Encoded", "Prepared", "check", "encode", "has_pixels", "keeps_all", "prepare"]
