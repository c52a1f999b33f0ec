"""What a vision tower attends to, its keys and its output: of the one layer whose output the model takes, attention of an early one too.

Attention is what the class token gives each patch, averaged over heads. A tower without a class token gives the mean attention that
a patch receives from all patches of its image, as the published ports to such towers do. Either is recomputed from queries and keys:
the tower stays on its fast kernel.
"""

from __future__ import annotations

import contextlib
import contextvars
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from mllm_efficient.errors import UnsupportedModelError
from mllm_efficient.lazy import torch

from ..running import at_hand, hooking, uncompiled
from .blocks import Block, has_class_token, layers_of

if TYPE_CHECKING:
    from torch import Tensor

Result = TypeVar("Result")
# A method that registers a hook, and what is then called with the module, its arguments and, of a forward hook, what it gives.
Watcher = tuple[Callable[..., Any], Callable[..., None]]
AT_ONCE = 2**24  # entries of an attention matrix in memory: 64 MB in float32
_capturing: contextvars.ContextVar[object | None] = contextvars.ContextVar("capturing", default=None)


def tower_of(model: Any) -> Any:
    """The part of a LLaVA's or InternVL's vision tower that holds embeddings and encoder."""
    tower = model.model.vision_tower
    return getattr(tower, "vision_model", tower)


@contextlib.contextmanager
def positions_at_hand(tower: Any) -> Iterator[None]:
    """The tower's position embeddings loaded: to interpolate them for a smaller image the model reads their weight, which an
    offloaded module has only while it is called itself."""
    with at_hand(getattr(tower.embeddings, "position_embedding", None)):
        yield


_compiled: weakref.WeakSet[Any] = weakref.WeakSet()  # towers whose compiled code does not run hooks


def watched(tower: Any, call: Callable[[], Result], layer: Any, strategy: str, needs: frozenset[str]) -> tuple[Result, dict[str, Tensor]]:
    """What ``call`` gives, in which the model runs its CLIP, SigLIP or InternViT tower, and what ``needs`` names of it.

    That is attention and early_attention (views, N) and keys (views, N, d), for ``clip_text`` the tower's output after its last
    norm, tower (views, N, D).

    layer, strategy: the model's ``vision_feature_layer`` and ``vision_feature_select_strategy``.
    """
    return watch(tower, call, lambda seen: _watchers(tower, seen, layer, strategy, needs), needs)


def watch(
    tower: Any, call: Callable[[], Result], watchers: Callable[[dict[str, Any]], Sequence[Watcher]], needs: frozenset[str]
) -> tuple[Result, dict[str, Any]]:
    """What ``call`` gives, and what the watchers put into the dictionary that they are made with.

    A tower that was compiled before is run uncompiled. Raises ``UnsupportedModelError`` for one that cannot be watched even so.
    """
    seen: dict[str, Any] = {}
    hooks = watchers(seen)
    if tower not in _compiled:
        with watching(hooks):
            out = call()
        if seen:
            return out, seen
    with uncompiled(), watching(hooks):
        out = call()
    if not seen:
        raise UnsupportedModelError(f"the vision tower cannot be watched for {', '.join(sorted(needs))}: use it as transformers loads it")
    _compiled.add(tower)
    return out, seen


@contextlib.contextmanager
def watching(watchers: Sequence[Watcher]) -> Iterator[None]:
    """The hooks are there inside, and look at the calls of the thread that asked alone."""
    token = object()

    def only(look: Callable[..., None]) -> Callable[..., None]:
        @torch.no_grad()
        def hook(*given: Any) -> None:
            if _capturing.get() is token:
                look(*given)

        return hook

    with hooking:
        handles = [register(only(look), with_kwargs=True) for register, look in watchers]
    reset = _capturing.set(token)
    try:
        yield
    finally:
        _capturing.reset(reset)
        with hooking:
            for handle in handles:
                handle.remove()


def _watchers(tower: Any, into: dict[str, Any], layer: Any, strategy: str, needs: frozenset[str]) -> list[Watcher]:
    layers, has_cls = layers_of(tower), has_class_token(tower)
    index = layer if isinstance(layer, int) else layer[-1]
    index = index - 1 if index >= 0 else len(layers) + index
    if not 0 <= index < len(layers):
        raise UnsupportedModelError(f"vision_feature_layer={layer} takes no attention layer's output")
    block, first = Block(layers[index]), 1 if has_cls and strategy == "default" else 0
    early = Block(layers[early_block(len(layers))])

    def attended(block: Block, args: tuple, kwargs: dict[str, Any] | None) -> tuple[Tensor, Tensor]:
        x = args[0] if args else (kwargs or {})["hidden_states"]
        k = block.keys(x).float()
        q = block.queries(x[:, :1] if has_cls else x).float()
        if not has_cls:
            return torch.stack([received(*view) for view in zip(q, k)]) / k.shape[2], k.mean(1)
        weights = (q @ k.transpose(-1, -2) * k.shape[-1] ** -0.5).softmax(-1)
        return weights.mean((1, 2))[:, first:], k.mean(1)[:, first:]

    def record(module: Any, args: tuple, kwargs: dict[str, Any] | None = None) -> None:
        into["attention"], into["keys"] = attended(block, args, kwargs)

    def record_early(module: Any, args: tuple, kwargs: dict[str, Any] | None = None) -> None:
        into["early_attention"], _ = attended(early, args, kwargs)

    def keep(module: Any, args: tuple, *rest: Any) -> None:
        output = rest[-1]
        hidden = output[0] if isinstance(output, tuple) else output
        into["tower"] = tower.post_layernorm(hidden)[:, first:]

    watchers: list[Watcher] = []
    if needs & {"attention", "keys"}:
        watchers.append((block.attention.register_forward_pre_hook, record))
    if "early_attention" in needs:
        watchers.append((early.attention.register_forward_pre_hook, record_early))
    if "clip_text" in needs:
        watchers.append((layers[index].register_forward_hook, keep))
    return watchers


def early_block(depth: int) -> int:
    """The index of the block a quarter of the way up: the sixth of CLIP's 24, the eighth of Qwen2.5-VL's 32."""
    return max(1, round(depth / 4)) - 1


def received(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """(n,) attention that every token gets from all n in sum, averaged over heads, from queries and keys (heads, n, d).

    As many queries at once as ``AT_ONCE`` allows: never all heads of a large image's matrix.
    """
    heads, n, d = q.shape
    scale = d**-0.5 if scale is None else scale
    total = k.new_zeros(n)
    for some in q.split(max(1, AT_ONCE // (heads * n)), dim=1):
        total += (some @ k.transpose(1, 2) * scale).softmax(-1).sum((0, 1))
    return total / heads
