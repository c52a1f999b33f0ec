"""The contract of a row of ``facts``, checked on a tiny model of random weights.

* ``identity``: features that all stay and go in by ``mm_encoder_outputs`` give the logits of the plain model, bit for bit.
* ``chosen``: a prompt without the columns of some visual tokens gives the logits of the plain model on the whole prompt with those
  columns masked and positions given by hand; where layers carry a state along, of the language model on the columns that stay.
* ``batch``: two prompts with different pictures, padded, are answered as one by one, also with beams.
* ``inside``: a method in the decoder that keeps everything changes no bit, and one that does not answers with a cache as without one,
  unless the type refuses such methods.
* ``count``: a prompt with too few placeholders raises.
* ``long``: a tensor of the full prompt's length beside a shortened one raises.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mllm_efficient.errors import CountMismatchError, UnsupportedModelError

from . import tiny
from .examples import example
from .facts import Facts
from .running import by_its_own_rule

NEW = 3  # tokens that are decoded
CLOSE: dict[str, Any] = {"rtol": 1e-3, "atol": 2e-4}
CHOICE = "uniform:keep=0.5"


class Subject:
    """A tiny model and two prompts for it: one with two pictures, one with one.

    Args:
        config: of the real model, made small here.
        facts: the row that is checked.
    """

    def __init__(self, config: Any, facts: Facts):
        from transformers import AutoModelForImageTextToText

        from . import adapter_for

        self.facts = facts
        config = tiny.tiny_config(config, facts.tiny)
        torch.manual_seed(0)
        self.model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for name, weight in self.model.named_parameters():  # larger than at the start of a training: answers are no loops
                if weight.is_floating_point():
                    weight += torch.randn_like(weight) * (0.2 if "language_model" in name and weight.ndim == 2 else 0.05)
        settings = self.model.generation_config
        settings.eos_token_id, settings.pad_token_id, settings.do_sample, settings.max_length = None, tiny.PAD, False, None
        self.adapter = adapter_for(self.model)
        self.prompts = [self.prompt(2, 0), self.prompt(1, 1)]

    def prompt(self, pictures: int, seed: int) -> dict[str, Any]:
        """A call with words before, between and after the pictures."""
        vision = example(self.model, self.facts.example, pictures, seed)
        with torch.no_grad():
            made = getattr(self.adapter.base.get_image_features(**vision, return_dict=True), self.facts.read)
        lengths = [len(part.reshape(-1, part.shape[-1])) for part in made]
        if isinstance(made, Tensor) and made.ndim == 2:
            lengths = [len(made) // pictures] * pictures
        image, words = self.adapter.placeholders["image"], iter(range(tiny.TEXT + seed, tiny.TEXT + 50))
        ids = [tiny.BOS, next(words), next(words)]
        for n in lengths:
            ids += [image] * n + [next(words), next(words)]
        ids += [next(words) for _ in range(3 + 2 * seed)]
        row = torch.tensor([ids], device=self.model.device)
        call = {"input_ids": row, "attention_mask": torch.ones_like(row), **vision}
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in self.names:
                call[name] = (row == image).long()
        return call

    @property
    def names(self) -> tuple[str, ...]:
        from mllm_efficient.apply.signatures import parameters_of

        return parameters_of(type(self.adapter.base).forward) + parameters_of(type(self.model).forward)

    # ------------------------------------------------------------------------------------------ checks

    @torch.no_grad()
    def identity(self) -> str:
        from mllm_efficient.apply.prepare import encode, prepare

        for call in self.prompts:
            before = self.model(**call).logits
            whole = prepare(self.model, "none", encoded=encode(self.model, "none", **call), **call)
            if "mm_encoder_outputs" not in whole.model_kwargs:
                return "features did not go in by mm_encoder_outputs"
            if not torch.equal(self.model(**whole.model_kwargs).logits, before):
                return "features that all stay change the logits"
        return ""

    @torch.no_grad()
    def chosen(self) -> str:
        from mllm_efficient.apply.prepare import prepare

        if self.facts.gaps and not self.facts.mrope:
            call = self.prompts[0]
            counted = torch.arange(call["input_ids"].shape[1], device=self.model.device)[None]
            if not torch.allclose(self.model(**call, position_ids=counted).logits, self.model(**call).logits, **CLOSE):
                return "positions are not counted on one by one"
        rules = ["renumber", "keep"] if self.facts.gaps and not self.facts.mrope else ["keep"] if self.facts.gaps else ["renumber"]
        for rule in rules:
            for call in self.prompts:
                prepared = prepare(self.model, f"{CHOICE},positions={rule}", **call)
                given = self.model(**prepared.model_kwargs).logits[0]
                separators = any(image.separators_full for image in prepared.report.images)
                keep = prepared.visual_keep_mask[0] if separators else self.columns(call, prepared.report)
                if len(given) != int(keep.sum()):
                    return f"{len(given)} columns of {int(keep.sum())}"
                wanted = self.by_hand(call, keep, rule) if self.facts.recurrent else self.masked(call, keep, rule)
                if not torch.allclose(given, wanted, **CLOSE):
                    return f"positions={rule}: logits are off by up to {float((given - wanted).abs().max()):.2g}"
        return ""

    def columns(self, call: dict[str, Any], report: Any) -> Tensor:
        """(L,) bool, the columns that stay by the report alone."""
        visual = (call["input_ids"][0] == self.adapter.placeholders["image"]).nonzero()[:, 0].cpu()
        keep = torch.ones(call["input_ids"].shape[1], dtype=torch.bool)
        start = 0
        for image in report.images:
            own = visual[start : start + image.full]
            keep[own] = False
            keep[own[image.indices]] = True
            start += image.full
        if start != len(visual):
            raise CountMismatchError(f"the report speaks of {start} tokens, and there are {len(visual)}")
        return keep

    def positions(self, call: dict[str, Any], keep: Tensor, rule: str) -> Tensor:
        """Positions (1, L) or (axes, 1, L) of the whole prompt, of which those of the columns that stay count."""
        if self.facts.mrope:
            names = [n for n in self.adapter.encode_keys if n in call]
            return by_its_own_rule(self.adapter.base, {n: call[n] for n in names}, call["input_ids"], call["mm_token_type_ids"])
        if rule == "keep":
            return torch.arange(len(keep))[None]
        return (keep.long().cumsum(0) - 1).clamp(min=0)[None]

    def masked(self, call: dict[str, Any], keep: Tensor, rule: str) -> Tensor:
        """Logits of the plain model on the whole prompt, at the columns that stay; the others are masked."""
        whole = {**call, "attention_mask": keep[None].long()}
        if self.facts.gaps:
            whole["position_ids"] = self.positions(call, keep, rule)
        return self.model(**whole).logits[0, keep]

    def by_hand(self, call: dict[str, Any], keep: Tensor, rule: str) -> Tensor:
        """Logits of the language model alone on the embeddings of the columns that stay."""
        ids = call["input_ids"]
        embeds = self.model.get_input_embeddings()(ids)
        vision = {n: call[n] for n in self.adapter.encode_keys if n in call}
        made = getattr(self.adapter.base.get_image_features(**vision, return_dict=True), self.facts.read)
        features = torch.cat([part.reshape(-1, part.shape[-1]) for part in made])
        embeds[ids == self.adapter.placeholders["image"]] = features.to(embeds)
        more = {"position_ids": self.positions(call, keep, rule)[..., keep]} if self.facts.gaps else {}
        out = self.model.get_decoder()(inputs_embeds=embeds[:, keep], attention_mask=torch.ones(1, int(keep.sum())).long(), **more)
        return out.logits[0] if hasattr(out, "logits") else self.model.get_output_embeddings()(out.last_hidden_state)[0]

    @torch.no_grad()
    def batch(self) -> str:
        from mllm_efficient.apply.wrap import compressed

        with compressed(self.model, CHOICE):
            for beams in (1, 2):
                together = self.answers(self.padded(), beams)
                alone = torch.cat([self.answers(call, beams) for call in self.prompts])
                if not torch.equal(together, alone):
                    return f"answers with {beams} beam(s) in a batch and alone differ: {together.tolist()} and {alone.tolist()}"
        return ""

    def answers(self, call: dict[str, Any], beams: int) -> Tensor:
        return self.model.generate(**call, max_new_tokens=NEW, num_beams=beams)[:, -NEW:]

    def padded(self) -> dict[str, Any]:
        """Both prompts, padded on the left."""
        longest = max(call["input_ids"].shape[1] for call in self.prompts)
        out: dict[str, Any] = {}
        for name, value in self.prompts[0].items():
            parts = [call[name] for call in self.prompts]
            if value.shape == self.prompts[0]["input_ids"].shape:
                parts = [torch.nn.functional.pad(part, (longest - part.shape[1], 0)) for part in parts]
            out[name] = self.together(name, parts)
        return out

    def together(self, name: str, parts: list[Tensor]) -> Tensor:
        """What a processor makes of the vision arguments of two prompts."""
        if len({tuple(part.shape[1:]) for part in parts}) == 1:
            return torch.cat(parts)
        if self.facts.example == "targets":
            return torch.cat(parts, -1)
        shape = [max(sides) for sides in zip(*(part.shape[1:] for part in parts))]
        pads = [[n for side, most in zip(reversed(part.shape[1:]), reversed(shape)) for n in (0, most - side)] for part in parts]
        nothing = -1 if name == "image_position_ids" else 0
        return torch.cat([torch.nn.functional.pad(part, pad, value=nothing) for part, pad in zip(parts, pads)])

    @torch.no_grad()
    def inside(self) -> str:
        from mllm_efficient.apply.wrap import compressed
        from mllm_efficient.registry import build

        call, layer = self.prompts[0], max(1, self.adapter.deep_layers)
        whole, half = (build(f"fastv:layer={layer},ratio={ratio}") for ratio in (1.0, 0.5))
        try:
            self.adapter.check_inside(half)
        except UnsupportedModelError:
            return ""
        before = self.model(**call).logits
        with compressed(self.model, whole):
            if not torch.equal(self.model(**call).logits, before):
                return "a method in the decoder that keeps everything changes the logits"
        with compressed(self.model, half):
            with_cache, without = (self.model.generate(**call, max_new_tokens=NEW, use_cache=use)[:, -NEW:] for use in (True, False))
        return "" if torch.equal(with_cache, without) else f"{with_cache.tolist()} with a cache, {without.tolist()} without"

    @torch.no_grad()
    def count(self) -> str:
        from mllm_efficient.apply.prepare import prepare

        call = dict(self.prompts[0])
        first = int((call["input_ids"][0] == self.adapter.placeholders["image"]).nonzero()[0])
        stays = [i for i in range(call["input_ids"].shape[1]) if i != first]
        length = call["input_ids"].shape[1]
        call = {
            k: v[:, stays] if v.ndim == 2 and v.shape[1] == length and k not in self.adapter.encode_keys else v for k, v in call.items()
        }
        try:
            prepare(self.model, CHOICE, **call)
        except CountMismatchError:
            return ""
        return "a prompt with a placeholder too few is not refused"

    @torch.no_grad()
    def long(self) -> str:
        from mllm_efficient.apply.prepare import prepare
        from mllm_efficient.apply.wrap import compressed

        call = self.prompts[0]
        beside = next((n for n in ("token_type_ids", "mm_token_type_ids") if n in call), "attention_mask")
        with compressed(self.model, CHOICE):
            short = prepare(self.model, CHOICE, **call).model_kwargs
            try:
                self.model(**{**short, beside: call[beside]})
            except CountMismatchError:
                return ""
        return f"{beside} of the full prompt's length is taken beside a shortened prompt"


EXAMPLES = {  # what the tower takes beside pixels, and the example that gives it
    "image_grid_thw": "patches", "image_grid_hw": "patches_hw", "image_sizes": "sizes", "spatial_shapes": "shapes",
    "target_sizes": "targets", "image_position_ids": "positions", "pixel_attention_mask": "padded",
    "high_res_pixel_values": "two_resolutions",
}  # fmt: skip
CARRIES_STATE = ("linear_attention", "conv", "mamba", "recurrent")


def guess(model: Any) -> Facts:
    """The row that a model's class and configuration suggest."""
    base = getattr(model, "model", model)
    encoder = getattr(base, "get_image_features", None)
    if encoder is None:
        raise UnsupportedModelError(f"{type(model).__name__} is not supported: it has no get_image_features to shorten the output of")
    takes = inspect.signature(encoder).parameters
    example = next((kind for name, kind in EXAMPLES.items() if name in takes), "square")
    text, vision = model.config.get_text_config(), getattr(model.config, "vision_config", None)
    kinds = getattr(text, "layer_types", None) or ()
    return Facts(
        grids="image_grid_thw" if "image_grid_thw" in takes else "",
        mrope=3 if hasattr(base, "get_rope_index") else 0,
        deepstack=bool(getattr(vision, "deepstack_visual_indexes", None)),
        recurrent=any(word in kind for kind in kinds for word in CARRIES_STATE),
        example=example,
        tiny={"text_config": {"num_hidden_layers": 4}} if kinds else {},
    )


CHECKS: dict[str, Callable[[Subject], str]] = {
    "identity": Subject.identity, "chosen": Subject.chosen, "batch": Subject.batch, "inside": Subject.inside,
    "count": Subject.count, "long": Subject.long,
}  # fmt: skip


def keeps(config: Any, facts: Facts) -> dict[str, str]:
    """What each check says of a model type, "" where it holds. Raises what the tiny model raises where it cannot be built."""
    subject = Subject(config, facts)
    out = {}
    for name, check in CHECKS.items():
        try:
            out[name] = check(subject)
        except Exception as error:  # whatever a host raises that does not fit is a finding
            out[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return out
