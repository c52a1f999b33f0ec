"""The same FLOPs counted: torch's ``FlopCounterMode`` over the real model, encode, compress, prefill and decode apart.

Models of shipped shapes are built on the meta device, without weights or memory. The tower and the language model run
there; a method chooses by values, so it runs on the CPU, on random features of the right size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from ..apply.conversation import items_of
from ..apply.locate import written
from ..apply.signatures import with_cache
from ..compressors.base import Compressor
from ..compressors.composed import inside_of, or_random
from ..compressors.none import NoCompression
from ..errors import MllmEfficientError
from ..patches.rules import Size, Views
from ..tokens import VisualShape
from .shapes import ModelShape


@dataclass(frozen=True)
class Counted:
    """FLOPs of a call, as ``flops.Cost`` has them. unknown: operations of the method whose FLOPs torch's counter takes for 0.

    marks: text columns between the images' tokens that the method left in the longest prompt.
    """

    vision: int
    compress: int
    prefill: int
    decode: int
    unknown: tuple[str, ...] = ()
    marks: int = 0

    @property
    def total(self) -> int:
        return self.vision + self.compress + self.prefill + self.decode


def build_on_meta(shape: ModelShape) -> Any:
    """The model of a shape with weights on the meta device."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    from ..patches import require_present

    require_present(shape.family)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.for_model(**shape.config)).eval()


def count(
    model: Any,
    shape: ModelShape,
    method: Compressor,
    *,
    text_tokens: int = 64,
    visual_tokens: int | None = None,
    image_size: Size | None = None,
    images: int = 1,
    new_tokens: int = 0,
    batch_size: int = 1,
    processor: Any = None,
) -> Counted:
    """FLOPs of a call that ``flops.cost`` with the same arguments computes. model: on meta, or real and on a CPU. processor: the
    model's own, which then makes the images' tensors where their size is known.

    Raises ``MllmEfficientError`` for tokens that are of no known image.
    """
    from ..apply.encode import Encoded, encode_items, encoding_key
    from ..apply.prepare import prepare
    from ..apply.projecting import asks
    from ..patches import adapter_for
    from ..trained.install import installed

    inside = inside_of(method)
    if inside is None or model.device.type == "meta":
        method = or_random(method)
        inside = inside_of(method)
    adapter, meta = adapter_for(model), model.device.type == "meta"
    if meta and adapter.reads_values:
        raise MllmEfficientError(f"the tower of {shape.name} reads values, and a model without weights has none: count a model of a folder")
    inputs, method = _asked(adapter, shape, method, _images(shape, visual_tokens, image_size, images), text_tokens, batch_size, processor)
    items = items_of(adapter, inputs)
    prompt = {name: inputs[name] for name in ("input_ids", adapter.typed) if name in inputs}
    hooks = installed(model, method) if inside is not None else contextlib.nullcontext()
    with torch.no_grad(), hooks, OneDevice() if meta else contextlib.nullcontext():
        with flop_counter() as vision:
            encoded = encode_items(adapter, method, items)
        if meta:
            _require_no_values(method, asks(adapter, method))
            known = [replace(e, **_random(e)) for e in encoded.encodings]
            encoded = Encoded(items, known, [encoding_key(adapter, method, i) for i in items])
        unknown = Uncounted()
        with flop_counter() as compress, unknown:
            prepared = prepare(model, method, encoded=encoded, **prompt)
        choosing: list[FlopCounterMode] = []

        @contextlib.contextmanager
        def meter() -> Iterator[None]:
            choosing.append(flop_counter())
            with choosing[-1], unknown:
                yield

        if prepared.staging is not None:
            prepared = replace(prepared, staging=replace(prepared.staging, meter=meter))
        prefill, decode = _decoded(model, prepared, _text_id(adapter), new_tokens)
    inside_prefill, before = sum(c.get_total_flops() for c in choosing), compress.get_total_flops()
    seen, marks = tuple(sorted(unknown.seen)), _marks(prepared, items)
    return Counted(vision.get_total_flops(), before + inside_prefill, prefill - inside_prefill, decode, seen, marks)


def _marks(prepared: Any, items: Sequence[Any]) -> int:
    """Text columns between the images' tokens in the longest prompt: what is left beside text and features."""
    if not any(item.shape.marks for item in items):
        return 0
    rows = [0] * len(prepared.tensors["input_ids"])
    for image in prepared.report.images:
        rows[image.row] += image.separators_kept
    return max(rows)


def _images(shape: ModelShape, visual_tokens: int | None, image_size: Size | None, images: int) -> list[Views]:
    """The images of a prompt. Raises ``MllmEfficientError`` for tokens that are of no known image."""
    rules = shape.rules
    found = rules.prompt(visual_tokens, image_size, exact=True, images=images)
    if any(not image.whole or (rules.separators and image.size and not image.shape.separators) for image in found):
        raise MllmEfficientError(f"{visual_tokens} tokens are not yet a picture that {shape.name} can be given: use --image-size WxH")
    return found


def _require_no_values(method: Compressor, asked: bool) -> None:
    """Raises for a method that decides by what a model without weights has not. asked: whether its projector is shown the text."""
    inside = inside_of(method)
    if inside is not None and inside.has_router:
        raise MllmEfficientError(f"{inside.name} routes by what it sees, and a model without weights sees nothing: count a fixed kernel")
    if asked or {"text", "clip_text"} & set(method.needs):
        raise MllmEfficientError(f"{method.name} reads the prompt's embeddings, which a model without weights has not")


def _decoded(model: Any, prepared: Any, token_id: int, new_tokens: int) -> tuple[int, int]:
    """FLOPs of the prefill, and of every forward after it."""
    call = {k: v for k, v in prepared.model_kwargs.items() if k != "attention_mask"}
    # A cache from the start: position ids without one are searched for packed sequences, by value.
    cache, ids = _cache(model), prepared.tensors["input_ids"]
    with flop_counter() as prefill:
        model(**call, use_cache=True, **with_cache(model, cache), logits_to_keep=1)
    with flop_counter() as decode:
        for i in range(new_tokens - 1):
            token = torch.full((len(ids), 1), token_id, device=ids.device)
            model(input_ids=token, position_ids=torch.full_like(token, ids.shape[1] + i), use_cache=True, **with_cache(model, cache))
    return prefill.get_total_flops(), decode.get_total_flops()


class Uncounted(TorchDispatchMode):
    """Notes the operations that multiply and that ``FlopCounterMode`` does not know (torch 2.13). seen: their names."""

    NAMES = frozenset({
        "_cdist_forward", "_euclidean_dist", "mv", "addmv", "dot", "vdot", "_scaled_grouped_mm",
        "_native_multi_head_attention", "_transformer_encoder_layer_fwd", "ger", "addr",
    })  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.NAMES:
            self.seen.add(name)
        return func(*args, **(kwargs or {}))


def _inputs(adapter: Any, images: list[Views], text_tokens: int, batch: int, processor: Any = None) -> dict[str, Any]:
    """A call with these images in every prompt: noise on the model's device, prompts on the CPU."""
    device, dtype = adapter.model.device, adapter.model.dtype
    sizes: list[Any] = [adapter.example_size if adapter.fixed_count else p.size for p in images]

    def noise(*size: int) -> Tensor:
        return torch.zeros(size, device="meta", dtype=dtype) if device.type == "meta" else torch.rand(size).to(device, dtype)

    if processor is None or None in sizes:
        vision, shapes = adapter.example(images, noise), [p.shape for p in images]
    else:
        vision, shapes = _processed(adapter, processor, sizes)
        vision = {k: v.to(dtype) if v.is_floating_point() else v for k, v in vision.items()}
    placeholder, text = adapter.placeholders[images[0].shape.modality], [_text_id(adapter)] * text_tokens
    prompt: list[int] = []
    for one in shapes:  # some models tell images by the text between them
        prompt += [text.pop() for _ in range(min(adapter.text_between, len(text)))]
        prompt += written(one, placeholder, adapter)
    ids = torch.tensor([prompt + text] * batch)
    types = {adapter.typed: (ids == placeholder).long()} if adapter.typed else {}
    return {"input_ids": ids, **types, **{k: adapter.joined(k, [v] * batch) for k, v in vision.items()}}


def _asked(
    adapter: Any, shape: ModelShape, method: Any, pictures: list[Views], text_tokens: int, batch: int, processor: Any
) -> tuple[dict[str, Any], Compressor]:
    """The call that a method runs on, and what runs: where it sets the model's processor, nothing on fewer tokens."""
    if not method.sets_processor:
        return _inputs(adapter, pictures, text_tokens, batch, processor), method
    setting, seen = method.setting(shape.rules, pictures[0].size), [method.seen(shape.rules, picture) for picture in pictures]
    return _inputs(adapter.under(setting), seen, text_tokens, batch) | adapter.call_under(setting), NoCompression()


def _processed(adapter: Any, processor: Any, sizes: Sequence[Any]) -> tuple[dict[str, Tensor], list[VisualShape]]:
    """The vision arguments of one prompt with noise of these sizes, and the shape of each image."""
    from ..loading.prompts import model_inputs, question_prompt
    from .workload import QUESTION, noise

    prompt = question_prompt(processor, QUESTION, len(sizes))
    inputs = model_inputs(processor, [prompt], [[noise(size, i) for i, size in enumerate(sizes)]])
    vision = {k: v for k, v in inputs.items() if k in adapter.encode_keys}
    return vision, [item.shape for item in adapter.items(inputs)]


def _text_id(adapter: Any) -> int:
    """A token that stands for no image."""
    return next(i for i in range(5, 99) if i not in adapter.placeholders.values())


def _cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config.get_text_config())


def _random(encoding: Any) -> dict[str, Any]:
    """Features on the CPU for those on meta."""

    def like(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.rand(x.shape)

    return {
        "features": like(encoding.features), "deep": tuple(like(layer) for layer in encoding.deep),
        **{name: like(getattr(encoding, name)) for name in ("attention", "early_attention", "keys", "tower")},
        "kept": None if encoding.kept is None else torch.arange(len(encoding.kept)),
    }  # fmt: skip


class OneDevice(TorchDispatchMode):
    """What an operation is given on the CPU beside tensors on meta goes to meta.

    Prompts, grids and window indices stay on the CPU until they meet features, because models read their values, and features on meta;
    also where a model moves one beside the other.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and "device" in kwargs and args[0].is_meta == args[0].is_floating_point():
            kwargs = {**kwargs, "device": args[0].device}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if len({x.is_meta for x in tensors}) == 2:
            args, kwargs = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, (args, kwargs))
        return func(*args, **kwargs)


def flop_counter() -> FlopCounterMode:
    """A counter that knows the CPU's attention kernel and the experts' products too, for which torch 2.13 has no formula."""
    formulas = {"_scaled_dot_product_flash_attention_for_cpu": _attention, "_grouped_mm": _experts}
    found = {getattr(torch.ops.aten, name, None): formula for name, formula in formulas.items()}
    return FlopCounterMode(display=False, custom_mapping={kernel: formula for kernel, formula in found.items() if kernel is not None})


def _experts(tokens: tuple[int, ...], weights: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    """(n, d) sorted by expert, each through the (d, m) of its own of (experts, d, m)."""
    return 2 * tokens[0] * tokens[1] * weights[2]


def _attention(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    """Two products over (batch, heads, queries or keys, width), in full where the mask is causal."""
    b, h, q, d = query
    return 2 * b * h * q * key[-2] * (d + value[-1])
