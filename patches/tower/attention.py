"""What a CLIP or SigLIP tower attends to, its keys and its output: of the one layer whose output the model takes."""

from __future__ import annotations

import contextlib
import contextvars
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from mllm_efficient.errors import UnsupportedModelError
from mllm_efficient.lazy import torch

from ..running import at_hand, hooking, uncompiled

if TYPE_CHECKING:
    from torch import Tensor

Result = TypeVar("Result")
_capturing: contextvars.ContextVar[object | None] = contextvars.ContextVar("capturing", default=None)


def tower_of(model: Any) -> Any:
    """The part of a LLaVA's vision tower that holds embeddings and encoder."""
    tower = model.model.vision_tower
    return getattr(tower, "vision_model", tower)


@contextlib.contextmanager
def positions_at_hand(tower: Any) -> Iterator[None]:
    """The tower's position embeddings loaded: to interpolate them for a smaller image the model reads their weight, which an
    offloaded module has only while it is called itself."""
    with at_hand(getattr(tower.embeddings, "position_embedding", None)):
        yield


def has_class_token(tower: Any) -> bool:
    return hasattr(tower.embeddings, "class_embedding")


_compiled: weakref.WeakSet[Any] = weakref.WeakSet()  # towers whose compiled code does not run hooks


def watched(tower: Any, call: Callable[[], Result], layer: Any, strategy: str, needs: frozenset[str]) -> tuple[Result, dict[str, Tensor]]:
    """What ``call`` gives, in which the model runs its tower, and what ``needs`` names of it (see ``captured``).

    A tower that was compiled before is run uncompiled. Raises ``UnsupportedModelError`` for one that cannot be watched even so.
    """
    seen: dict[str, Tensor] = {}
    if tower not in _compiled:
        with captured(tower, seen, layer, strategy, needs):
            out = call()
        if seen:
            return out, seen
    with uncompiled(), captured(tower, seen, layer, strategy, needs):
        out = call()
    if not seen:
        raise UnsupportedModelError(f"the vision tower cannot be watched for {', '.join(sorted(needs))}: use it as transformers loads it")
    _compiled.add(tower)
    return out, seen


@contextlib.contextmanager
def captured(tower: Any, into: dict[str, Tensor], layer: Any, strategy: str, needs: frozenset[str]) -> Iterator[None]:
    """Fills in attention (views, N) and keys (views, N, d) when the tower runs inside, for ``clip_text`` the tower's output
    after its last norm, tower (views, N, D).

    layer, strategy: the model's ``vision_feature_layer`` and ``vision_feature_select_strategy``. Recomputed for the queries needed from the
    attention's own projections: the tower stays on its fast kernel. Only the thread that asked records.
    """
    layers, has_cls = tower.encoder.layers, has_class_token(tower)
    index = layer if isinstance(layer, int) else layer[-1]
    index = index - 1 if index >= 0 else len(layers) + index
    if not 0 <= index < len(layers):
        raise UnsupportedModelError(f"vision_feature_layer={layer} takes no attention layer's output")
    attention, token = layers[index].self_attn, object()
    first = 1 if has_cls and strategy == "default" else 0

    @torch.no_grad()
    def record(module, args, kwargs=None):
        # Another thread's call can come between the two steps of registering this hook, and then passes no kwargs.
        if _capturing.get() is not token:
            return
        x = args[0] if args else (kwargs or {})["hidden_states"]
        heads = module.num_heads
        k = module.k_proj(x).unflatten(-1, (heads, -1)).transpose(1, 2).float()
        q = module.q_proj(x[:, :1] if has_cls else x).unflatten(-1, (heads, -1)).transpose(1, 2).float()
        weights = (q @ k.transpose(-1, -2) * k.shape[-1] ** -0.5).softmax(-1)
        into["attention"] = weights.mean((1, 2))[:, first:]
        into["keys"] = k.mean(1)[:, first:]

    @torch.no_grad()
    def keep(module, args, output):
        if _capturing.get() is token:
            hidden = output[0] if isinstance(output, tuple) else output
            into["tower"] = tower.post_layernorm(hidden)[:, first:]

    handles = []
    with hooking:
        if needs & {"attention", "keys"}:
            handles.append(attention.register_forward_pre_hook(record, with_kwargs=True))
        if "clip_text" in needs:
            handles.append(layers[index].register_forward_hook(keep))
    reset = _capturing.set(token)
    try:
        yield
    finally:
        _capturing.reset(reset)
        with hooking:
            for handle in handles:
                handle.remove()
