"""LLaVA-1.5: ``LlavaForConditionalGeneration`` with a CLIP or SigLIP tower."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mllm_efficient.errors import CountMismatchError, UnsupportedModelError
from mllm_efficient.tokens import VisualTokens

_hooking = threading.Lock()  # registering and removing hooks is not atomic
_capturing: contextvars.ContextVar[object | None] = contextvars.ContextVar("capturing", default=None)


class LlavaAdapter:
    """What the wrapper needs to know of one LLaVA-1.5 model."""

    gives = frozenset({"attention", "keys", "text", "grid"})
    fixed_count = True  # every image has the same number of tokens
    positions = "renumber"  # 1-D RoPE: kept tokens close up
    encode_keys = ("pixel_values", "vision_feature_layer", "vision_feature_select_strategy", "image_sizes")

    def __init__(self, model: Any):
        self.model, self.config = model, model.config
        tower = model.model.vision_tower
        self.tower = getattr(tower, "vision_model", tower)
        if not hasattr(self.tower, "encoder") or not hasattr(self.tower, "embeddings"):
            raise UnsupportedModelError(f"LLaVA with a {type(tower).__name__} tower is not supported: CLIP and SigLIP are")
        self.has_cls = hasattr(self.tower.embeddings, "class_embedding")

    @property
    def image_token_id(self) -> int:
        return self.config.image_token_id

    @property
    def decoder_layers(self) -> int:
        return self.config.text_config.num_hidden_layers

    def _settings(self, inputs: dict[str, Any]) -> tuple[Any, str]:
        layer, strategy = (inputs.get(k) for k in ("vision_feature_layer", "vision_feature_select_strategy"))
        return (
            self.config.vision_feature_layer if layer is None else layer,
            self.config.vision_feature_select_strategy if strategy is None else strategy,
        )

    def images(self, inputs: dict[str, Any]) -> list[tuple[int, tuple[int, int] | None]]:
        """(token count, grid or None) of every image, before any pixel is looked at."""
        pixels = inputs["pixel_values"]
        if not isinstance(pixels, Tensor) or pixels.ndim != 4:
            raise CountMismatchError("pixel_values must be one tensor (images, channels, height, width)")
        if inputs.get("image_sizes") is not None:
            raise UnsupportedModelError("image_sizes belongs to Pixtral towers, which are not supported: leave it out")
        patch = self.config.vision_config.patch_size
        rows, cols = pixels.shape[-2] // patch, pixels.shape[-1] // patch
        n = rows * cols + self.has_cls - (self._settings(inputs)[1] == "default")
        return [(n, (rows, cols) if n == rows * cols else None)] * len(pixels)

    def full_size_grid(self) -> tuple[int, tuple[int, int]]:
        """(tokens, grid) of an image at the model's own size."""
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size
        drop = self.config.vision_feature_select_strategy == "default"
        return side * side + self.has_cls - drop, (side, side)

    def encode(
        self, inputs: dict[str, Any], needs: frozenset[str] = frozenset(), grid: tuple[int, int] | None = None
    ) -> list[VisualTokens]:
        """Visual tokens of every image, from the stock ``get_image_features``.

        ``grid`` makes the images smaller first, so that the tower yields that many rows and columns.
        """
        call = {k: inputs[k] for k in self.encode_keys if inputs.get(k) is not None}
        pixels = call.pop("pixel_values")
        grids = [g for _, g in self.images(inputs)]
        if grid is not None:
            patch = self.config.vision_config.patch_size
            size = (grid[0] * patch, grid[1] * patch)
            pixels = torch.nn.functional.interpolate(pixels.float(), size, mode="bicubic", antialias=True).to(pixels.dtype)
            call["interpolate_pos_encoding"] = True
            grids = [grid] * len(pixels)
        capture: dict[str, Tensor] = {}
        hook = self._capture(capture, *self._settings(inputs)) if needs & {"attention", "keys"} else contextlib.nullcontext()
        with hook:
            features = self.model.model.get_image_features(pixel_values=pixels, return_dict=True, **call).pooler_output
        tokens = [VisualTokens(f, grid=g) for f, g in zip(features, grids)]
        if not capture:
            return tokens
        attention, keys = (capture[k].to(tokens[0].features.device) for k in ("attention", "keys"))
        return [replace(t, attention=attention[i], keys=keys[i]) for i, t in enumerate(tokens)]

    @contextlib.contextmanager
    def _capture(self, into: dict[str, Tensor], layer: Any, strategy: str) -> Iterator[None]:
        """Fills in attention (images, N) and keys (images, N, d) of the layer whose output the model takes.

        Recomputed for the queries needed from the attention's own projections: the tower stays on its fast kernel.
        Only the thread that asked records.
        """
        layers = self.tower.encoder.layers
        index = layer if isinstance(layer, int) else layer[-1]
        index = index - 1 if index >= 0 else len(layers) + index
        if not 0 <= index < len(layers):
            raise UnsupportedModelError(f"vision_feature_layer={layer} takes no attention layer's output")
        attention, token = layers[index].self_attn, object()
        first = 1 if self.has_cls and strategy == "default" else 0

        @torch.no_grad()
        def record(module, args, kwargs=None):
            # Another thread's call can come between the two steps of registering this hook, and then passes no kwargs.
            if _capturing.get() is not token:
                return
            x = args[0] if args else (kwargs or {})["hidden_states"]
            heads = module.num_heads
            k = module.k_proj(x).unflatten(-1, (heads, -1)).transpose(1, 2).float()
            q = module.q_proj(x[:, :1] if self.has_cls else x).unflatten(-1, (heads, -1)).transpose(1, 2).float()
            weights = (q @ k.transpose(-1, -2) * k.shape[-1] ** -0.5).softmax(-1)
            into["attention"] = weights.mean((1, 2))[:, first:]
            into["keys"] = k.mean(1)[:, first:]

        with _hooking:
            handle = attention.register_forward_pre_hook(record, with_kwargs=True)
        reset = _capturing.set(token)
        try:
            yield
        finally:
            _capturing.reset(reset)
            with _hooking:
                handle.remove()

    def embed_text(self, ids: Tensor) -> Tensor:
        """Embeddings (T, D) of text tokens (T,)."""
        return self.model.get_input_embeddings()(ids)

    def pack(self, features: list[Tensor]) -> dict[str, Any]:
        """Features in the container that ``forward`` and ``generate`` take as ``mm_encoder_outputs``."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return {"image": BaseModelOutputWithPooling(pooler_output=list(features))}
