"""The model as it is trained: a method's parts in it, what moves and what does not, and the loss of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..apply.call import parse_call
from ..apply.context import contexts_of
from ..apply.encode import Encoded, encode_items, has_pixels
from ..apply.locate import locate
from ..apply.prepare import Prepared, prepare
from ..apply.projecting import asks
from ..apply.prompt import IGNORE
from ..compressors.base import Compressor
from ..compressors.none import NoCompression
from ..compressors.projector import Projector
from ..compressors.reducer import Reducer
from ..errors import MllmEfficientError, UnsupportedModelError
from ..patches.rules import ROUTER
from .config import RoutingConfig
from .routing import log_odds, mean_levels, reinforced, routing_loss, routing_sums
from .sampling import consistency

PROJECTOR = "multi_modal_projector"
NONE = NoCompression()


class TrainingModel(nn.Module):
    """A host with a method's part in it, called with a batch of the collator and, for a projector, a token count.

    All of the work is inside ``forward``, so that DDP and autocast wrap it as they wrap any model. own: the projector
    the host came with, which "distil" fits a new one to. routing: how a router learns.
    """

    def __init__(self, host: Any, adapter: Any, method: Compressor, own: nn.Module, routing: RoutingConfig | None = None):
        super().__init__()
        self.host = host  # the model, or the PEFT model around it
        self.outside = (adapter, (own,))  # no submodules of this one
        self.method, self.routing = method, routing or RoutingConfig()
        self.routed_as = {r: method.routed(r) for r in ("learned", "random")} if method.as_reducer is not None else {}  # type: ignore[attr-defined]
        self.carried: set[str] = set()  # weights of the host that came with the method's start

        self.kept: list[float] | None = None  # of a method that routes, the share of an image's tokens left after each stage

    @property
    def depth(self) -> int:
        layers: int = self.outside[0].decoder_layers
        return layers

    @property
    def routing_names(self) -> tuple[tuple[int, ...], list[str]]:
        """The layers of a method that routes, and its kernels."""
        method: Any = self.method
        return method.stages(self.depth), method.as_trained["kernels"].split("/")

    @property
    def routing_size(self) -> int:
        """Numbers of ``routing_sums``."""
        layers, kernels = self.routing_names
        return 1 + len(layers) * (1 + 2 * len(kernels))

    @property
    def trained_module(self) -> nn.Module:
        """The method's own part."""
        adapter = self.outside[0]
        return getattr(*adapter.slot(self.method))

    def parts(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """The named parameters of each part; a tied head is the embedding."""
        out: dict[str, list[tuple[str, nn.Parameter]]] = {n: [] for n in ("projector", "router", "language_model", "lora", "vision_tower")}
        for name, parameter in self.named_parameters():
            if f".{PROJECTOR}." in name:
                part = "projector"
            elif f".{ROUTER}." in name:
                part = "router"
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

    def forward(
        self, objective: str, count: int | None, batch: dict[str, Any], routing: str = "learned", seed: Sequence[int] | None = None,
        teacher: tuple[int, float] | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """``loss`` of a batch, and ``right`` and ``asked``: answer tokens guessed and in all.

        count: visual tokens per tile, of a projector. routing: of a method that routes, whose sums are ``routed``; seed: of the
        kernels that it draws, another for every step and process. teacher: a larger count, and how much ``consistency`` with it weighs.
        """
        projector = self.method.as_projector
        if projector is not None:
            method = replace(projector, tokens=count)
            return self.distil(method, batch) if objective == "distil" else self.answers(method, batch, teacher)
        return self.answers_routed(self.routed_as[routing], batch, seed)

    def distil(self, method: Projector, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Mean squared distance to the host's own tokens, pooled to the same count, over their variance."""
        adapter, (own,) = self.outside
        vision = {k: v for k, v in batch.items() if k in adapter.encode_keys}
        items = adapter.items({**vision, "input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]})
        if not items:
            raise MllmEfficientError("distil needs pictures, and a batch has none")
        grid, side = adapter.unit(items[0]), method.side(adapter.unit(items[0]))
        features = adapter.before_projector(items)
        with torch.no_grad():
            wanted = own.to(features.device)(features)
            plane = wanted.transpose(1, 2).unflatten(2, grid)
            wanted = F.adaptive_avg_pool2d(plane, side).flatten(2).transpose(1, 2)
        more = self._asked_of(method, batch, items)
        if any(method.together(item) for item in items):
            more["sets"] = sets = [adapter.views_of(item) for item in items]
            wanted = torch.stack([views.mean(0) for views in wanted.split(sets)])
        made = self.trained_module(features, side=side, grid=grid, **more)
        loss = F.mse_loss(made.float(), wanted.float()) / wanted.float().var()
        zero = torch.zeros((), device=loss.device)
        return {"loss": loss, "right": zero, "asked": zero}

    def _asked_of(self, method: Projector, batch: dict[str, Any], items: list[Any]) -> dict[str, Any]:
        """The text that a projector which asks is shown with each view of the batch's pictures; of packed turns the first one's."""
        adapter = self.outside[0]
        if not asks(adapter, method):
            return {}
        given = {k: v for k, v in batch.items() if k != "turns"}
        call = parse_call(adapter, method, dict.fromkeys(("attention_mask", "labels", "image_keys", "encoded", "past")) | given)
        texts = {image.index: context.text for image, context in zip(call.placed, contexts_of(call, call.placed, asked=True))}
        return {"text": [texts[i] for i, item in enumerate(items) for _ in range(adapter.views_of(item))]}

    def answers(self, method: Projector, batch: dict[str, Any], teacher: tuple[int, float] | None = None) -> dict[str, Tensor]:
        """Cross-entropy of the answers, the mean over their tokens, and consistency with the same weights at a larger count."""
        chosen, wanted = self._answered(method, batch)
        loss = F.cross_entropy(chosen, wanted) if len(wanted) else chosen.float().sum() * 0
        if teacher is not None and len(wanted):
            with torch.no_grad():
                larger, _ = self._answered(replace(method, tokens=teacher[0]), batch)
            loss = loss + teacher[1] * consistency(chosen, larger, wanted)
        some_idle = getattr(self.trained_module, "across", None) is not None  # without views or frames
        if some_idle or not has_pixels(batch):  # every process must have a gradient for the projector
            loss = loss + 0 * sum(p.float().sum() for p in self.trained_module.parameters() if p.requires_grad)
        return {"loss": loss, "right": (chosen.detach().argmax(-1) == wanted).sum(), "asked": torch.tensor(len(wanted))}

    def _answered(self, method: Projector, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Logits (A, V) and tokens (A,) of the answers, under a projector at its count."""
        batch = dict(batch)
        if batch.get("turns") is not None and asks(self.outside[0], method):  # every turn has tokens of its own
            rows, encoded = self._each_turn(method, batch, 1)
            batch = {"encoded": encoded, **rows}
        turns = batch.pop("turns", None)
        prepared = prepare(self.host, method, **batch)
        call = prepared.model_kwargs
        labels = call.pop("labels")
        if turns is not None:
            call |= independent(_reduced(turns, prepared), call["attention_mask"], self.outside[0])
        chosen, wanted, _ = self._asked(call, labels)
        return chosen, wanted

    def answers_routed(self, method: Reducer, batch: dict[str, Any], seed: Sequence[int] | None = None) -> dict[str, Tensor]:
        """Cross-entropy of the answers and the routing loss; every turn is a prompt of its own where the batch has ``turns``."""
        how, batch = self.routing, dict(batch)
        samples = how.samples if method.has_router and self.training else 1
        rows, encoded = self._each_turn(NONE, batch, samples)
        prepared = prepare(self.host, method, encoded=encoded, **rows)
        if prepared.staging is not None:
            generator = None if seed is None else torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
            prepared = replace(prepared, staging=replace(prepared.staging, estimator=how.estimator, generator=generator))
        call = prepared.model_kwargs
        labels = call.pop("labels")
        chosen, wanted, row_of = self._asked(call, labels)
        each = F.cross_entropy(chosen, wanted, reduction="none") if len(wanted) else chosen.float().sum(-1) * 0
        loss = each.mean() if len(wanted) else each.sum()
        out = {"right": (chosen.detach().argmax(-1) == wanted).sum(), "asked": torch.tensor(len(wanted))}
        if prepared.staging is not None:
            staging = prepared.staging
            if method.has_router and self.training:
                loss = loss + how.weight * routing_loss(mean_levels(staging, how.loss), how.target)
                if how.estimator == "reinforce":
                    loss = loss + reinforced(_by_row(each, row_of, len(labels)), log_odds(staging, len(labels)), samples)
            out["routed"] = routing_sums(staging)
        # every process must have a gradient for all that moves, whether or not its batch has pictures
        loss = loss + 0 * sum(p.float().sum() for p in self.parameters() if p.requires_grad)
        return {"loss": loss, **out}

    def _each_turn(self, method: Compressor, batch: dict[str, Any], samples: int) -> tuple[dict[str, Any], Encoded | None]:
        """``separated`` prompts of a batch, and what the vision side made for a method of its pictures, each seen once."""
        adapter = self.outside[0]
        rows, records = separated(batch, samples)
        vision = {k: v for k, v in batch.items() if k in adapter.encode_keys}
        tensors = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
        items = adapter.items({**vision, **tensors}) if has_pixels(batch) else []
        encoded = _for_rows(encode_items(adapter, method, items), tensors["input_ids"], adapter, records) if items else None
        return rows, encoded

    def _asked(self, call: dict[str, Any], labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (A, V) in float32 and tokens (A,) of the answers, and the row of each."""
        logits = self.host(**call, use_cache=False).logits[:, :-1]
        wanted = labels[:, 1:].to(logits.device)
        asked = wanted != IGNORE
        return logits[asked].float(), wanted[asked], asked.nonzero()[:, 0]


def _by_row(values: Tensor, row_of: Tensor, rows: int) -> Tensor:
    """(rows,) the mean of the values of each row, 0 where there are none."""
    total = values.new_zeros(rows).index_add(0, row_of, values)
    return total / torch.bincount(row_of, minlength=rows).clamp(min=1).to(values)


def separated(batch: dict[str, Any], samples: int) -> tuple[dict[str, Any], list[int]]:
    """The batch's prompts, ``samples`` of each one after the other, and the record of each.

    With ``turns`` every turn becomes a prompt: what all share (turn 0), then its own tokens.
    """
    ids, mask, labels, turns = (batch.get(k) for k in ("input_ids", "attention_mask", "labels", "turns"))
    assert ids is not None and mask is not None and labels is not None
    if turns is None:
        records = [r for r in range(len(ids)) for _ in range(samples)]
        return {"input_ids": ids[records], "attention_mask": mask[records], "labels": labels[records]}, records
    where, records = list[Tensor](), list[int]()
    for record, row in enumerate(turns):
        for turn in range(1, int(row.max()) + 1):
            where += [((row == 0) | (row == turn)).nonzero()[:, 0]] * samples
            records += [record] * samples
    columns = nn.utils.rnn.pad_sequence(where, batch_first=True, padding_value=-1)
    at, real = columns.clamp(min=0), columns >= 0
    pick = torch.tensor(records, device=ids.device)
    rows = {
        "input_ids": ids[pick].gather(1, at), "attention_mask": (mask[pick].gather(1, at) * real),
        "labels": labels[pick].gather(1, at).masked_fill(~real, IGNORE),
    }  # fmt: skip
    return rows, records


def _for_rows(encoded: Encoded, ids: Tensor, adapter: Any, records: list[int]) -> Encoded:
    """The images of a batch's records as the prompts made of them have them."""
    of = list[list[int]]([] for _ in range(len(ids)))
    for found in locate(ids.cpu(), adapter.placeholders, encoded.items):
        of[found.row].append(found.index)
    every = [i for record in records for i in of[record]]
    items, encodings, made_for = ([part[i] for i in every] for part in (encoded.items, encoded.encodings, encoded.made_for))
    return Encoded(items, encodings, made_for)


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
