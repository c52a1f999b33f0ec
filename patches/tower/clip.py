"""CLIP's own space beside a LLaVA's CLIP tower: embeddings of the prompt's words, and of the tower's patches."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from mllm_efficient.errors import MllmEfficientError

_loaded: weakref.WeakKeyDictionary[Any, dict[str, Clip]] = weakref.WeakKeyDictionary()
_tokenizers: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


class Clip:
    """The text tower and the two projections of a CLIP model, in float32.

    where: a folder or hub id with weights in safetensors and a tokenizer. width: of the tower whose patches will be given.
    """

    def __init__(self, where: str, width: int, device: torch.device):
        from transformers import AutoTokenizer, CLIPModel

        try:
            whole = CLIPModel.from_pretrained(where, use_safetensors=True, dtype=torch.float32)
            self.tokenizer = AutoTokenizer.from_pretrained(where)
        except Exception as error:  # whatever transformers and the hub's library raise for a folder that is not one
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise MllmEfficientError(f"clip={where}: no CLIP model with a tokenizer there ({reason})") from None
        config = whole.config
        have = config.vision_config.hidden_size
        if have != width:
            raise MllmEfficientError(f"clip={where} belongs to a tower {have} wide, and this model's is {width} wide: give its own")
        self.length = config.text_config.max_position_embeddings
        self.text_model, self.text_projection, self.visual_projection = (
            part.to(device).eval().requires_grad_(False) for part in (whole.text_model, whole.text_projection, whole.visual_projection)
        )

    @torch.no_grad()
    def text(self, words: str) -> Tensor:
        """(d,), the mean of the unit embeddings of the text's pieces, each as long as the text tower allows."""
        device = self.text_projection.weight.device
        ids = torch.tensor(self.tokenizer(words)["input_ids"], device=device)
        pieces = -(-len(ids) // self.length)
        padded = ids.new_zeros(2, pieces * self.length)
        padded[0, : len(ids)], padded[1, : len(ids)] = ids, 1
        rows, mask = padded.view(2, pieces, self.length)
        with torch.autocast(device.type, enabled=False):
            pooled = self.text_model(input_ids=rows, attention_mask=mask).pooler_output
            return torch.nn.functional.normalize(self.text_projection(pooled), dim=-1).mean(0)

    @torch.no_grad()
    def patches(self, tower: Tensor) -> Tensor:
        """(N, d) of what the tower's last norm makes of its patches (N, width)."""
        weight = self.visual_projection.weight
        with torch.autocast(weight.device.type, enabled=False):
            return self.visual_projection(tower.to(weight.device, weight.dtype)).to(tower.device)


def clip_of(adapter: Any, where: str) -> Clip:
    """The CLIP at ``where`` for a model's tower, read once. Raises ``MllmEfficientError`` for one that does not fit."""
    of_model = _loaded.setdefault(adapter.model, {})
    if where not in of_model:
        of_model[where] = Clip(where, adapter.config.vision_config.hidden_size, adapter.model.device)
    return of_model[where]


def words_of(adapter: Any, ids: Tensor) -> str:
    """Token ids (T,) as text, by the tokenizer that lies beside the model's weights."""
    model = adapter.model
    if model not in _tokenizers:
        from transformers import AutoTokenizer

        where = model.name_or_path
        try:
            _tokenizers[model] = AutoTokenizer.from_pretrained(where)
        except Exception:  # whatever transformers and the hub's library raise for a place without a tokenizer
            raise MllmEfficientError(
                f"relevance='clip' reads the words of the question, and there is no tokenizer at {where!r}: "
                "load the model from a folder or hub id that has one"
            ) from None
    return str(_tokenizers[model].decode(ids.tolist(), skip_special_tokens=True)).strip()
