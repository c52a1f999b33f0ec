"""Encode, compress, shorten: the explicit path that ``wrap`` and ``generate`` take too.

The stock vision tower and projector run, each image's tokens are compressed, the placeholder columns of those that went leave the
prompt, and the model gets the shorter prompt with the features as ``mm_encoder_outputs``. Model, cache, positions, masks and
``generate`` stay stock. ``prepare`` shows the steps in their order, with the record that each hands to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..compressors.composed import stages_of
from ..registry import runnable
from ..report import CacheUse, CompressionReport, ImageReport
from .call import Call, parse_call
from .compress import CompressedImage, Context, compress_images
from .context import contexts_of
from .encode import Encoded, caches, encode, encode_items, encoding_key, has_pixels, keeps_all
from .in_llm import report_of, shortened_image, staging_of, whole_image
from .labels import count_for, leaves_alone
from .locate import PlacedImage
from .plan import Plan, check
from .positions import native, place
from .projecting import answered, asks
from .prompt import EncoderOutputs, Layout, lay_out, require, take_columns, with_text_row

Features = list[tuple[str, Tensor, tuple[Tensor, ...]]]


@dataclass(frozen=True)
class Prepared:
    """A call ready for the stock model: ``model.generate(**prepared.model_kwargs, max_new_tokens=20)``.

    report: what was done. layout: None where no column left the prompt. staging: what is to be done inside the decoder,
    whose report is complete when a forward has run. visual_keep_mask: (B, L) bool, False where a visual token left the prompt, or the
    text of a row or tile all of whose tokens left.
    features: (modality, (n, D), the same of each deepstack layer) of each image; pack: makes ``mm_encoder_outputs`` of them.

    ``generate`` goes on from it by itself. A decode loop written by hand over the stock ``forward`` must pass
    ``position_ids=layout.positions_of(mask, 1)`` with the reduced mask where that is not None (kept positions, M-RoPE):
    the stock model does not know them. A wrapped model does.
    """

    tensors: dict[str, Any]
    features: Features | None
    pack: Callable[[Features], dict[str, Any]]
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


@dataclass(frozen=True)
class ImagePlan:
    """What is to be done to one image. pre_llm: by the stages before the decoder, on its tokens; whole: by all stages together."""

    pre_llm: Plan
    whole: Plan


@dataclass(frozen=True)
class Compressed:
    """What the images of a call became before the decoder.

    encodings: what the model made of each, in prompt order. images: what is left of each; None where the prompt stays whole,
    because tokens go inside the decoder alone. seconds: that compressing took. use: of the vision cache. plans: as they were carried out,
    None where as they were made.
    """

    encodings: list[Any]
    images: list[CompressedImage] | None
    seconds: float = 0.0
    use: CacheUse | None = None
    plans: list[ImagePlan] | None = None


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
    """Compresses the images and videos of a call and removes the columns of tokens that went from its prompt.

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

    inputs |= {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    inputs |= {"image_keys": image_keys, "encoded": encoded, "past": past}
    call = parse_call(adapter_for(model), runnable(compressor), inputs)
    if not call.has_images:
        return _as_it_came(call, CompressionReport())
    placed = call.placed
    plans = plan_images(call, placed)
    if call.past is None and leaves_alone(call.method, (p.whole for p in plans)):
        return _uncompressed(_with_kept(call, placed), placed, plans)
    compressed = encode_and_compress(call, placed, plans)
    return assemble(call, placed, plans, compressed)


def plan_images(call: Call, placed: list[PlacedImage]) -> list[ImagePlan]:
    """What the method will do to each image, before any pixel is looked at. Raises ``BadBudgetError`` where it cannot be done."""
    out = []
    for image in placed:
        *before, whole = call.method.plans(call.adapter, image.item)
        if call.in_llm is None:
            pre_llm = whole
        else:
            pre_llm = before[-1] if before else call.pre_llm.plan(call.adapter, image.item)
        out.append(ImagePlan(pre_llm, whole))
    return out


def encode_and_compress(call: Call, placed: list[PlacedImage], plans: list[ImagePlan]) -> Compressed:
    """Runs the vision side, unless the caller has, and the stage that compresses tokens before the decoder.

    Raises:
        CountMismatchError: new images for a stage in the decoder on a cache that holds a conversation.
        NotFiniteError: NaN or infinity among what is compressed.
    """
    call.loss_labels  # noqa: B018  (raises on labels that do not fit, before the tower runs)
    encoded = call.encoded
    if encoded is None:
        items = [image.item for image in sorted(placed, key=lambda image: image.index)]
        encoded = encode_items(call.adapter, call.pre_llm, items)
    encodings = [encoded.encodings[image.index] for image in placed]
    if call.whole_prompt:
        return Compressed(encodings, None, use=encoded.use)
    fresh = call.in_llm is None or call.past is None or not placed
    require(fresh, "new images on a cache that holds a conversation: start with an empty cache")
    encodings, contexts = with_text(call, placed, encodings)
    images, seconds, done = compress_images(call.token_method, [p.pre_llm for p in plans], encodings, contexts)
    then = [p if d is p.pre_llm else ImagePlan(d, d) for p, d in zip(plans, done)]  # a method that settles plans has no later stage
    return Compressed(encodings, images, seconds, encoded.use, then)


def with_text(call: Call, placed: list[PlacedImage], encodings: list[Any]) -> tuple[list[Any], list[Context]]:
    """The encodings of images in prompt order, those of a projector that asks for the text finished, and what a method may ask for.

    Raises ``CountMismatchError`` where such a projector finds a row without text.
    """
    asked = asks(call.adapter, call.pre_llm)
    contexts = contexts_of(call, placed, asked)
    if asked:
        items, text = [image.item for image in placed], [context.text for context in contexts]
        encodings = answered(call.adapter, call.pre_llm, items, encodings, text)
    return encodings, contexts


def assemble(call: Call, placed: list[PlacedImage], plans: list[ImagePlan], compressed: Compressed) -> Prepared:
    """The arguments of the stock model: the prompt that is left, its positions and labels, and what the decoder is to do."""
    if compressed.images is None:
        return _for_decoder_alone(call, placed, plans, compressed)
    plans = compressed.plans or plans
    layout = _layout_of(call, placed, compressed.images)
    rest = call.rest if call.loss_labels is None else {**call.rest, "labels": call.loss_labels}
    tensors = take_columns(layout, call.input_ids, call.mask, rest, _pad_id(call.adapter))
    _recount(tensors, call.labels)
    short = tensors["input_ids"], tensors["attention_mask"]
    known = [(image, p.pre_llm, done) for image, p, done in zip(placed, plans, compressed.images)]
    layout, position_ids = place(call.adapter, layout, call.input_ids, call.mask, *short, call.past, known)
    if position_ids is not None:
        tensors["position_ids"] = position_ids
    staging = None
    if call.in_llm is not None and placed:
        left = [shortened_image(layout, *one) for one in known]
        mask, labels = layout.mask.bool(), tensors.get("labels")
        staging = staging_of(call.in_llm, call.final_positions, mask, left, call.adapter, short[0], labels, call.image_keys)
    report = _report(call, [_image(*one, p.whole) for one, p in zip(known, plans)], compressed.seconds, compressed.use)
    features = [(p.shape.modality, done.features, done.deep) for _, p, done in known]
    return Prepared(_given(tensors), features or None, call.adapter.pack, report, layout, staging)


def look(model: Any, compressor: Any, **inputs: Any) -> CompressionReport:
    """What a method does to the images of a call, without an answer. In-decoder methods take a prefill for that."""
    from ..trained.install import installed

    method = runnable(compressor)
    with torch.no_grad(), installed(model, method):
        prepared = prepare(model, method, **inputs)
        if prepared.staging is not None:
            model(**prepared.model_kwargs, use_cache=False, logits_to_keep=1)
    return prepared.report


# ------------------------------------------------------------------------------------------------ calls whose prompt stays as it is


def _as_it_came(call: Call, report: CompressionReport) -> Prepared:
    return Prepared(_given({**call.tensors(call.labels), **call.vision}), None, call.adapter.pack, report, None)


def _with_kept(call: Call, placed: list[PlacedImage]) -> Call:
    """The call with the features of its images where the model has a cache for them, as nothing else would ask it."""
    if call.encoded is not None or caches(call.adapter) is None:
        return call
    items = [image.item for image in sorted(placed, key=lambda image: image.index)]
    return replace(call, encoded=encode_items(call.adapter, call.pre_llm, items))


def _uncompressed(call: Call, placed: list[PlacedImage], plans: list[ImagePlan]) -> Prepared:
    """A call all of whose visual tokens stay; with the features, where the vision side has run already."""
    use = None if call.encoded is None else call.encoded.use
    report = _report(call, [_image(image, p.pre_llm, None, p.whole) for image, p in zip(placed, plans)], use=use)
    if call.encoded is None:
        return _as_it_came(call, report)
    tensors = call.tensors(call.labels)
    if call.adapter.mrope:
        known = [(image, p.pre_llm, None) for image, p in zip(placed, plans)]
        places, _ = native(call.adapter, call.input_ids, call.mask, known, "keep")
        tensors["position_ids"] = with_text_row(places, call.mask) if call.adapter.text_row else places
    features = _all_features(placed, [call.encoded.encodings[image.index] for image in placed])
    return Prepared(_given(tensors), features, call.adapter.pack, report, None)


def _for_decoder_alone(call: Call, placed: list[PlacedImage], plans: list[ImagePlan], compressed: Compressed) -> Prepared:
    """A call all of whose visual tokens enter the decoder, inside which some go."""
    assert call.in_llm is not None
    tensors = call.tensors(call.loss_labels)
    _recount(tensors, call.labels)
    images = [whole_image(image, p.whole) for image, p in zip(placed, plans)]
    labels, rule = tensors.get("labels"), call.final_positions
    staging = staging_of(call.in_llm, rule, call.mask_cpu, images, call.adapter, call.input_ids, labels, call.image_keys)
    report = _report(call, [_image(image, p.whole, None, p.whole) for image, p in zip(placed, plans)], use=compressed.use)
    return Prepared(_given(tensors), _all_features(placed, compressed.encodings), call.adapter.pack, report, None, staging)


def _all_features(placed: list[PlacedImage], encodings: list[Any]) -> Features:
    return [(image.item.shape.modality, e.features, e.deep) for image, e in zip(placed, encodings)]


# ------------------------------------------------------------------------------------------------ parts of what is assembled


def _layout_of(call: Call, placed: list[PlacedImage], images: list[CompressedImage]) -> Layout:
    """Which columns of the prompt are left."""
    ids, mask, past, start = call.ids_cpu, call.mask_cpu, call.past, call.start
    keep = torch.ones_like(mask)
    if past is not None:
        keep[:, :start] = past.keep
    for image, done in zip(placed, images):
        keep[image.row, image.marked() + start] = False
        keep[image.row, image.marked(done.has_left()) + start] = True
        keep[image.row, image.columns + start] = done.keep
    new_images = torch.bincount(torch.tensor([image.row for image in placed], dtype=torch.long), minlength=len(ids))
    return lay_out(ids, mask, keep, past, torch.tensor(call.cached_images) + new_images, call.positions)


def _recount(tensors: dict[str, Any], labels: Tensor | None) -> None:
    """Puts the number of labels that enter the loss in the place of a count of all ``labels`` (B, L) of this call."""
    if labels is not None and tensors.get("num_items_in_batch") is not None:
        tensors["num_items_in_batch"] = count_for(tensors["num_items_in_batch"], labels, tensors["labels"])


def _report(call: Call, images: list[ImageReport], seconds: float = 0.0, use: CacheUse | None = None) -> CompressionReport:
    stages = tuple(stage.to_dict() for stage in stages_of(call.method))
    return CompressionReport(tuple(images), stages, call.final_positions, call.adapter.decoder_layers, seconds, vision_cache=use)


def _image(image: PlacedImage, p: Plan, done: CompressedImage | None, whole: Plan) -> ImageReport:
    """What stands in the prompt after ``p``; whole: the plan of all stages."""
    decided_inside = bool(p.stages) and not p.untouched  # what stays is known when the decoder has run
    indices = (None if decided_inside else torch.arange(p.shape.n)) if done is None else done.indices
    kept_planes = None if done is None else done.kept_planes
    grid = p.shape.grid
    if kept_planes is not None:
        grid = (kept_planes[0].rows, kept_planes[0].columns) if len(kept_planes) == 1 else None
    return ImageReport(
        row=image.row, full=p.shape.n, kept=p.kept, indices=indices, grid=grid, tile=p.shape.tile(), clamped=whole.clamped,
        modality=p.shape.modality, planes=p.shape.planes, kept_planes=kept_planes, frame=p.shape.frame(),
        separators_full=p.shape.separators + p.shape.marked, separators_kept=whole.separators + _marks_left(p, done), per_layer=p.per_layer,
        of_merged=None if done is None else done.of_merged, groups=None if done is None else done.groups,
    )  # fmt: skip


def _marks_left(p: Plan, done: CompressedImage | None) -> int:
    """Columns of text between an image's tokens that stay; inside the decoder all do."""
    left = None if done is None else done.has_left()
    return sum(len(mark.words) for mark in p.shape.marks if left is None or left(mark))


def _given(tensors: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in tensors.items() if v is not None}


def _pad_id(adapter: Any) -> int:
    text = adapter.config.get_text_config()
    pad = getattr(text, "pad_token_id", None)
    return pad if isinstance(pad, int) and pad >= 0 and pad not in adapter.placeholders.values() else 0


__all__ = [
    "Compressed", "Encoded", "ImagePlan", "Prepared", "assemble", "check", "encode", "encode_and_compress", "encode_items", "encoding_key",
    "has_pixels", "keeps_all", "look", "plan_images", "prepare",
]  # fmt: skip
