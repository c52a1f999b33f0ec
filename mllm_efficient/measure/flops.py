"""FLOPs of a call in closed form: vision tower, projector, compressor, prefill and decoding. No weights, no torch.

Convention ``exact``: 2 x multiply-adds of matrix products, convolutions and attention, causal attention counted in full,
which is what torch's ``FlopCounterMode`` counts on the same model, to the last FLOP. Norms, activations, sorting and
interpolation are not counted. The papers' conventions are in ``conventions``.

    >>> baseline = cost(load_shape("llava-1.5-7b"), text_tokens=64)
    >>> pruned = cost(load_shape("llava-1.5-7b"), text_tokens=64, method="divprune:keep=0.098")
    >>> pruned.visual_tokens_kept, round(pruned.ratio(baseline), 1)
    (56, 22.1)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..apply.plan import check
from ..compressors.base import Compressor
from ..compressors.composed import before_of, compose, inside_of, or_random, stages_of
from ..compressors.in_tower import Run
from ..compressors.reducer import Reducer
from ..errors import MllmEfficientError
from ..patches.rules import Size, Views
from ..patches.sizes import Decoder, ProjectorSize, Tower
from ..registry import runnable
from .conventions import CONVENTIONS, EXACT, prefill_macs
from .keeping import Kept, keep
from .shapes import ModelShape, load_shape, shape_names, shape_of

__all__ = [
    "Cost", "cost", "decode_flops", "kv_cache_bytes", "load_shape", "prefill_flops", "projector_flops", "shape_names", "shape_of",
    "tower_flops", "vision_flops",
]  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """One call of one method, in FLOPs (multiply-adds under a paper's convention) and bytes, the whole batch together.

    text_tokens, visual_tokens_full, visual_tokens_kept, separators (newline columns, row breaks and the like that stay): per prompt.
    vision: tower and projector, and what the tower does for the method alone. compress: the method's own products.
    prefill: with the head for one position. decode: every forward after it, so ``new_tokens - 1``, because the prefill
    gives the first token. Under a paper's convention all but ``prefill`` are 0. kv_cache_bytes: after the last forward.
    pictures: what was compressed, in words. visual_per_layer: of a method inside the decoder, visual tokens at each layer.
    """

    method: str
    convention: str
    text_tokens: int
    visual_tokens_full: int
    visual_tokens_kept: int
    separators: int
    vision: int
    compress: int
    prefill: int
    decode: int
    kv_cache_bytes: int
    pictures: str = ""
    visual_per_layer: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        return self.vision + self.compress + self.prefill + self.decode

    def ratio(self, baseline: Cost) -> float:
        """Percent of another cost: total of total under ``exact``, prefill of prefill under a paper's convention."""
        if self.convention == EXACT:
            return 100 * self.total / baseline.total
        return 100 * self.prefill / baseline.prefill


def cost(
    shape: ModelShape | str,
    *,
    text_tokens: int = 64,
    visual_tokens: int | None = None,
    image_size: Size | None = None,
    images: int = 1,
    method: Compressor | str | dict[str, Any] = "none",
    new_tokens: int = 0,
    batch_size: int = 1,
    convention: str = EXACT,
    visual_per_layer: Sequence[int] | None = None,
    marks: int | None = None,
) -> Cost:
    """What a call costs on a model with a method.

    Args:
        shape: a model's shape, or its name for ``load_shape``.
        text_tokens: every token of a prompt that is not visual.
        visual_tokens: N of a prompt before compression, for images of the family's own kind; image_size: (width,
            height) in pixels instead, for models whose count depends on it. Without both the model's usual image.
        images: images of a prompt, all alike; not with ``visual_tokens``, which says it.
        method: as ``me.build`` takes it.
        new_tokens: tokens generated; the prefill gives the first.
        batch_size: prompts alike.
        convention: "exact", "divprune" or "sparsevlm".
        visual_per_layer, marks: visual tokens in each decoder layer, and text between them that stays, instead of the method's own.

    Raises:
        MllmEfficientError: numbers that the model or the convention cannot have. BadBudgetError, UnsupportedModelError.
    """
    _check(convention, text_tokens, visual_tokens, new_tokens, batch_size)
    model, compressor = load_shape(shape) if isinstance(shape, str) else shape, runnable(method)
    rules, decoder, before, inside = model.rules, model.decoder, before_of(compressor), inside_of(compressor)
    if inside is not None and model.name != "builtin":  # what ships is of the embedded model
        drawn = or_random(inside)
        inside, compressor = drawn.as_reducer, compose([drawn] if before is None else [before, drawn])
    check(rules, compressor)
    pictures = rules.prompt(visual_tokens, image_size, convention == EXACT, images)
    kept = [keep(rules, compressor, p) for p in pictures]
    kept = kept if marks is None else [replace(k, marks=0 if i else marks) for i, k in enumerate(kept)]
    tokens, separators = sum(k.tokens for k in kept), sum(k.separators + k.marks for k in kept)
    lengths = _lengths(model, kept, text_tokens, visual_per_layer)
    vision = compress = decode = 0
    if convention == EXACT:
        vision = _seeing_flops(model, compressor, kept, batch_size)
        compress = _before_flops(model, before, kept, [p.shape.n for p in pictures], text_tokens) if before is not None else 0
        compress += choosing_flops(decoder, inside, kept, text_tokens) if inside is not None else 0
        prefill = prefill_flops(decoder, lengths, lengths[-1] if rules.heads_all else 1) + 2 * tokens * model.projector.inside
        decode = sum(decode_flops(decoder, [n + i for n in lengths]) for i in range(new_tokens - 1))
    else:
        prefill = prefill_macs(decoder, lengths, convention)
    shown = range(decoder.layers if inside is not None and visual_per_layer is None else 0)
    parts = {"vision": vision, "compress": compress, "prefill": prefill, "decode": decode}
    parts["kv_cache_bytes"] = kv_cache_bytes(decoder, [n + max(new_tokens - 1, 0) for n in lengths])
    return Cost(
        compressor.spec(), convention, text_tokens, sum(p.shape.n for p in pictures), tokens, separators,
        **{name: batch_size * part for name, part in parts.items()}, pictures=_words(pictures),
        visual_per_layer=tuple(sum(k.per_layer[i] for k in kept) for i in shown),
    )  # fmt: skip


def _seeing_flops(model: ModelShape, method: Compressor, kept: Sequence[Kept], batch: int) -> int:
    """Tower and projector of all images of a prompt, of which there are ``batch`` in a call, and what the method adds there."""
    patches = sum(k.picture.views * k.picture.patches[0] * k.picture.patches[1] for k in kept)
    among = batch * patches if model.rules.packed else 0
    return sum(vision_flops(model, k.picture, method, k, among) + _extra_flops(model.tower, method, k) for k in kept)


def _check(convention: str, text_tokens: int, visual_tokens: int | None, new_tokens: int, batch_size: int) -> None:
    _require(convention in CONVENTIONS, f"unknown convention {convention!r}: one of {', '.join(CONVENTIONS)}")
    _require(new_tokens == 0 or convention == EXACT, f"new tokens have no effect under {convention!r}, which counts the prefill alone")
    _require(text_tokens >= 0, f"{text_tokens} text tokens: at least 0")
    _require(visual_tokens is None or visual_tokens > 0, f"{visual_tokens} visual tokens: at least 1")
    _require(new_tokens >= 0 and batch_size > 0, "new tokens are at least 0 and a batch has at least one prompt")


def _lengths(model: ModelShape, kept: Sequence[Kept], text: int, visual_per_layer: Sequence[int] | None) -> list[int]:
    """Tokens of the prompt in each decoder layer."""
    layers = model.decoder.layers
    if visual_per_layer is None:
        lengths = [text + sum(k.at(layer) for k in kept) for layer in range(layers)]
    else:
        given = len(visual_per_layer)
        _require(given == layers, f"visual tokens of {given} layers given, and {model.name} has {layers}")
        lengths = [text + sum(k.separators + k.marks for k in kept) + n for n in visual_per_layer]
    _require(min(lengths) > 0, "a prompt without tokens")
    return lengths


def _before_flops(model: ModelShape, method: Compressor, kept: Sequence[Kept], tokens: Sequence[int], text: int) -> int:
    """The products of a method that runs before the decoder. tokens: N of each image."""
    features = model.projector.outputs if model.projector.inside else model.decoder.width
    width = model.tower.width // model.tower.heads if "keys" in method.needs else features
    of_tokens = stages_of(method)[-1]
    layers = 1 + model.rules.deep_layers if of_tokens.merges else 1  # those of later layers are merged as the features are
    total = layers * sum(of_tokens.flops(n, width, k) for one in kept for n, k in one.groups)
    total += sum(of_tokens.merge_flops(n, features, k) for one in kept for n, k in one.groups)
    if method.as_projector is not None and method.as_projector.asks:
        total += sum(_joined(model, one.picture, method.as_projector, one.side) for one in kept)
    total += sum(of_tokens.text_flops(n, model.decoder.width, text, model.decoder) for one in kept for n, _ in one.groups)
    if "clip_text" in method.needs and any(one.groups for one in kept):
        total += clip_flops(str(getattr(of_tokens, "clip", None)), model.tower.width, tokens, text)
    return total


def choosing_flops(decoder: Decoder, method: Reducer, kept: Sequence[Kept], text: int) -> int:
    """What an in-decoder method computes to choose, beside the layers: the keys and attention it is shown, its own products.

    Keys of every token of the prompt in one layer, queries of the instruction's last token or of all text tokens.
    """
    wide, narrow, total = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim, 0
    for number, (layer, _) in enumerate(kept[0].stages):
        shrinks = [(k, k.per_layer[layer - 1], k.stages[number][1]) for k in kept if k.stages[number][1] < k.per_layer[layer - 1]]
        n = text + sum(k.at(layer - 1) for k in kept)
        queries = text * ("text_attention" in method.needs) + ("attention" in method.needs)
        if shrinks and (queries or "keys" in method.needs):
            made = narrow * n + wide * queries if decoder.plain else (2 * narrow + wide) * n
            total += 2 * made * decoder.width + 2 * queries * wide * n
        total += len(kept) * method.router_flops(decoder.width)
        total += sum(method.choice_flops(before, after, text, decoder.width, k.per_layer[0]) for k, before, after in shrinks)
    return total


def prefill_flops(decoder: Decoder, lengths: Sequence[int], positions: int = 1) -> int:
    """A prefill with ``lengths[i]`` tokens in layer i, and the head for ``positions`` of them."""
    layers = sum(layer.flops(n, n, positions) for layer, n in zip(decoder.each, lengths))
    return 2 * lengths[0] * decoder.before + layers + positions * head_flops(decoder)


def decode_flops(decoder: Decoder, cached: Sequence[int]) -> int:
    """One new token after ``cached[i]`` tokens in layer i, of which a sliding window sees the last, with the head."""
    layers = sum(layer.flops(1, n + 1) for layer, n in zip(decoder.each, decoder.cached(cached)))
    return 2 * decoder.before + layers + head_flops(decoder)


def head_flops(decoder: Decoder) -> int:
    """Logits of one position. A tied head costs what its own would."""
    return 2 * decoder.width * decoder.vocabulary


def kv_cache_bytes(decoder: Decoder, cached: Sequence[int]) -> int:
    """Bytes of a cache after ``cached[i]`` tokens in layer i, in the model's dtype. A sliding window keeps the last."""
    return decoder.cache_bytes(cached)


def vision_flops(model: ModelShape, picture: Views, method: Compressor | None = None, kept: Kept | None = None, among: int = 0) -> int:
    """Tower and projector of one image or video; the method's own projector, if it brings one. among: as in ``tower_flops``."""
    other = None if method is None or method.installs is None else method.installs.as_projector
    if other is not None and kept is not None:
        project = 0 if other.asks and kept.side is not None else _joined(model, picture, other, kept.side)
    elif kept is not None and kept.rounds and method is not None:
        inside = next(stage for stage in stages_of(method) if stage.in_tower)
        return sum(_view_inside(model, picture, inside, rounds) for rounds in kept.rounds)
    else:
        project = picture.views * projector_flops(model.projector, picture.projected)
    if picture.also:
        return sum(_view_flops(model, picture, patches) for patches in (picture.patches, *picture.also))
    return picture.views * tower_flops(model.tower, picture.patches, among, picture.projected) + project


def _joined(model: ModelShape, picture: Views, other: Any, side: int | None) -> int:
    """All views of a picture through a trained projector; one that asks for the text runs when that is known, after the tower."""
    inputs, outputs, n = model.projector.inputs, model.projector.outputs, picture.projected if side is None else side**2
    grid = model.rules.taken(picture) if picture.shape.modality == "video" else picture.patches  # type: ignore[attr-defined]
    mixing, one = other.mixing_flops(inputs, outputs, grid, None if side is None else n), side is not None and other.together(picture)
    joining = picture.views * other.joining_flops(inputs, n) if one else 0
    return picture.views * mixing + joining + (1 if one else picture.views) * other.projector_flops(inputs, outputs, n)


def _view_flops(model: ModelShape, picture: Views, patches: tuple[int, int]) -> int:
    """One view of a picture whose views are not alike, through tower and projector."""
    tokens = math.prod(patches) * picture.projected // math.prod(picture.patches)
    return tower_flops(model.tower, patches, tokens=tokens) + projector_flops(model.projector, tokens)


def tower_flops(tower: Tower, patches: tuple[int, int], among: int = 0, tokens: int = 0) -> int:
    """One view of (rows, columns) patches. All layers run, whichever layer's output is used.

    among: patches of all images of the call, where attention is computed over them all and masked; 0 where over its own. tokens: that
    become of them, which says whether the tower's merger runs.
    """
    d, n = tower.width, patches[0] * patches[1]
    total = 2 * n * d * tower.channels * tower.frames * tower.patch**2
    n += tower.class_token
    everything, windows = n * (among or n), _window_pairs(tower, patches) if tower.window else 0
    for layer in range(tower.layers):
        pairs = windows if tower.window and layer not in tower.full_layers else everything
        total += 2 * n * (4 * d * d + tower.mlp_matrices * d * tower.mlp_width) + 4 * d * pairs
        if tower.merger is not None and layer == tower.merger.after and n > tokens * tower.merger.side**2:
            area = tower.merger.side**2
            total += 8 * n * d * d + 4 * d * n * area + 2 * (n // area) * (area + 1) * d * tower.merger.hidden
            n //= area
            everything = n * n
    total += 2 * (n // tower.pooled) * n * d if tower.pooled else 0
    if tower.pooling_head:  # one query over all tokens, then an MLP on it
        total += 4 * d * d * (1 + n) + 4 * n * d + 4 * d * tower.mlp_width
    return total


def _view_inside(model: ModelShape, picture: Views, method: Any, rounds: tuple[int, ...]) -> int:
    """One view through a tower in whose blocks a method takes ``rounds`` tokens off, and the projector. No further blocks run."""
    tower, patches = model.tower, picture.patches[0] * picture.patches[1]
    d, run = tower.width, Run(rounds, int(tower.class_token), patches // picture.projected)
    total, n = 2 * patches * d * tower.channels * tower.frames * tower.patch**2, patches + tower.class_token
    for block in range(len(rounds)):
        total += 8 * n * d * d + 4 * d * n * n
        choosing, inner, after = method.block_flops(n, d, tower.heads, run, block)
        total += choosing + 2 * inner * tower.mlp_matrices * d * tower.mlp_width
        n = after
    return total + projector_flops(model.projector, picture.projected - sum(rounds))


def _window_pairs(tower: Tower, patches: tuple[int, int]) -> int:
    """Pairs of patches that share a window; those at the edges are smaller."""
    rows, columns = ([min(tower.window, side - at) for at in range(0, side, tower.window)] for side in patches)
    return sum((r * c) ** 2 for r in rows for c in columns)


def projector_flops(projector: ProjectorSize, n: int) -> int:
    """n visual tokens through the projector (Qwen-VL: the merger)."""
    taken = projector.hidden // 2 if projector.gated else projector.hidden
    return projector.copies * 2 * n * (projector.before + projector.inputs * projector.hidden + taken * projector.outputs)


def _extra_flops(tower: Tower, method: Compressor, kept: Kept) -> int:
    """What a method that needs the tower's attention or keys adds to it.

    Keys of one layer, queries of the class token or of all tokens, and their products, computed once more; the products alone
    where the tower's own queries and keys are at hand.
    """
    if not kept.groups:
        return 0
    last, early = bool(set(method.needs) & {"attention", "keys"}), "early_attention" in method.needs
    rows, columns = kept.picture.patches
    n = rows * columns + tower.class_token
    if not tower.fused:
        queries = 1 if tower.class_token else n
        return (last + early) * kept.picture.views * 2 * tower.width * (n * tower.width + queries * tower.width + queries * n)
    looked_at = [tower.layers - 1] * last + [next(iter(tower.full_layers), max(1, round(tower.layers / 4)) - 1)] * early
    windowed = [tower.window and block not in tower.full_layers for block in looked_at]
    pairs = sum(_window_pairs(tower, kept.picture.patches) if narrow else n * n for narrow in windowed)
    return kept.picture.views * 2 * tower.width * pairs


def clip_flops(where: str, width: int, tokens: Sequence[int], text_tokens: int) -> int:
    """What a method that needs ``clip_text`` has the model compute: the prompt's text in CLIP's space, and every visual token.

    where: the CLIP model. width: of the tower. tokens: N of each image. The text counts as many tokens of CLIP as of the
    language model, and two around them, in pieces as long as CLIP's text tower allows.
    """
    from transformers import CLIPConfig

    try:
        config = CLIPConfig.from_pretrained(where)
    except Exception as error:  # whatever transformers and the hub's library raise
        raise MllmEfficientError(f"clip={where}: no CLIP model there ({type(error).__name__})") from None
    if config.vision_config.hidden_size != width:
        raise MllmEfficientError(
            f"clip={where} belongs to a tower {config.vision_config.hidden_size} wide, and this model's is {width} wide"
        )
    text, into = config.text_config, config.projection_dim
    n, d = text.max_position_embeddings, text.hidden_size
    pieces = -(-(text_tokens + 2) // n)
    layer = 2 * n * (4 * d * d + 2 * d * text.intermediate_size) + 4 * d * n * n
    return pieces * (text.num_hidden_layers * layer + 2 * d * into) + sum(tokens) * 2 * (width + 1) * into


def _words(pictures: list[Views]) -> str:
    first = pictures[0].says
    return first if len(pictures) == 1 else f"{len(pictures)} pictures, each {first}"


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise MllmEfficientError(message)
