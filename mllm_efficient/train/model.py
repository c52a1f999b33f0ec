"""The model as it is trained: a method's parts in it, what moves and what does not, and the loss of a batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compressors.base import Projector
from ..errors import MllmEfficientError, UnsupportedModelError
from ..layout import IGNORE
from ..shrink import Prepared, has_pixels, prepare

PROJECTOR = "multi_modal_projector"


class TrainingModel(nn.Module):
    """A host with a method's projector in the place of its own, called with a batch of the collator and a token count.

    All of the work is inside ``forward``, so that DDP and autocast wrap it as they wrap any model. own: the projector
    the host came with, which "distil" fits the new one to.
    """

    def __init__(self, host: Any, adapter: Any, method: Projector, own: nn.Module):
        super().__init__()
        self.host = host  # the model, or the PEFT model around it
        self.outside = (adapter, method, (own,))  # no submodules of this one

    @property
    def projector(self) -> nn.Module:
        adapter = self.outside[0]
        return getattr(*adapter.projector_at)

    def parts(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """The named parameters of each part; a tied head is the embedding."""
        out: dict[str, list[tuple[str, nn.Parameter]]] = {"projector": [], "language_model": [], "lora": [], "vision_tower": []}
        for name, parameter in self.named_parameters():
            if f".{PROJECTOR}." in name:
                part = "projector"
            elif ".lora_" in name:
                part = "lora"
            elif ".vision_tower." in name:
                part = "vision_tower"
            elif name.endswith("image_newline"):  # has no place among the tokens of these methods
                continue
            else:
                part = "language_model"
            out[part].append((name, parameter))
        return out

    def freeze_but(self, train: tuple[str, ...]) -> None:
        """Lets the named parts move. Raises for one that the model has not."""
        self.requires_grad_(False)
        for part, members in self.parts().items():
            if part in train and not members:
                raise MllmEfficientError(f"the model has no {part} to train")
            for _, parameter in members:
                parameter.requires_grad_(part in train)

    def trained_state(self) -> dict[str, Tensor]:
        """The weights that move, by name."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def forward(self, objective: str, count: int, batch: dict[str, Any]) -> dict[str, Tensor]:
        """``loss`` of a batch at ``count`` visual tokens per tile, and ``right`` and ``asked``: answer tokens guessed and in all."""
        return self.distil(count, batch) if objective == "distil" else self.answers(count, batch)

    def distil(self, count: int, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Mean squared distance to the host's own tokens, pooled to the same count, over their variance."""
        adapter, method, (own,) = self.outside
        vision = {k: v for k, v in batch.items() if k in adapter.encode_keys}
        items = adapter.items({**vision, "input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]})
        if not items:
            raise MllmEfficientError("distil needs pictures, and a batch has none")
        grid, side = adapter.unit(items[0]), replace(method, tokens=count).side(adapter.unit(items[0]))
        features = adapter.before_projector(items)
        with torch.no_grad():
            wanted = own.to(features.device)(features)
            plane = wanted.transpose(1, 2).unflatten(2, grid)
            wanted = F.adaptive_avg_pool2d(plane, side).flatten(2).transpose(1, 2)
        made = self.projector(features, side=side, grid=grid)
        loss = F.mse_loss(made.float(), wanted.float()) / wanted.float().var()
        zero = torch.zeros((), device=loss.device)
        return {"loss": loss, "right": zero, "asked": zero}

    def answers(self, count: int, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Cross-entropy of the answers, the mean over their tokens."""
        adapter, method, _ = self.outside
        batch = dict(batch)
        turns = batch.pop("turns", None)
        prepared = prepare(self.host, replace(method, tokens=count), **batch)
        call = prepared.model_kwargs
        labels = call.pop("labels")
        if turns is not None:
            call |= independent(_reduced(turns, prepared), call["attention_mask"], adapter)
        logits = self.host(**call, use_cache=False).logits[:, :-1]
        wanted = labels[:, 1:].to(logits.device)
        asked = wanted != IGNORE
        chosen, wanted = logits[asked].float(), wanted[asked]
        loss = F.cross_entropy(chosen, wanted) if len(wanted) else logits.float().sum() * 0
        if not has_pixels(batch):  # every process must have a gradient for the projector
            loss = loss + 0 * sum(p.float().sum() for p in self.projector.parameters() if p.requires_grad)
        right = (chosen.detach().argmax(-1) == wanted).sum()
        return {"loss": loss, "right": right, "asked": asked.sum()}


def _reduced(turns: Tensor, prepared: Prepared) -> Tensor:
    """(B, R) the turn of each column that is left."""
    return turns if prepared.layout is None else turns.gather(1, prepared.layout.columns.to(turns.device))


def independent(turns: Tensor, mask: Tensor, adapter: Any) -> dict[str, Tensor]:
    """Attention and positions under which every turn sees turn 0 (what all share) and itself alone.

    turns: (B, R), 0 in the shared beginning of a row, then the number of the turn. mask: (B, R), 1 for what is no padding.
    Returns ``attention_mask`` (B, 1, R, R), bool, and ``position_ids`` (B, R), as single conversations would have them.
    """
    if adapter.config.get_text_config()._attn_implementation != "sdpa":
        raise UnsupportedModelError("independent_turns needs attn_implementation=sdpa: other kernels take no mask of this kind")
    if adapter.mrope:
        raise UnsupportedModelError(f"independent_turns is not for {adapter.name}, whose positions have three rows")
    real = mask.bool()
    steps = torch.arange(turns.shape[1], device=turns.device)
    same = (turns[:, :, None] == turns[:, None, :]) | (turns[:, None, :] == 0)
    seen = (steps[:, None] >= steps) & same & real[:, None, :]
    seen |= torch.eye(len(steps), dtype=torch.bool, device=turns.device)  # padding sees itself, so that no row is empty
    shared = ((turns == 0) & real).cumsum(1)
    begins = torch.cat([torch.ones_like(turns[:, :1], dtype=torch.bool), turns[:, 1:] != turns[:, :-1]], 1)
    since = steps - torch.where(begins, steps, torch.zeros_like(steps)).cummax(1).values
    positions = torch.where(turns == 0, shared - 1, shared[:, -1:] + since)
    return {"attention_mask": seen[:, None], "position_ids": positions.clamp(min=0)}
