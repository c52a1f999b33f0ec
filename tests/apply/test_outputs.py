"""What a wrapped forward gives back beside its logits, logits of the prompt's own length, and outputs that have no logits."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers.utils import ModelOutput

import mllm_efficient as me

from ..trainer_runs import BATCHES, NAMES, SIDES, SPECS, make, predicted, tiny

ROWS = BATCHES[0]
SHORT = ("divprune:keep=0.3", "pool:keep=0.3")


def calls(name: str, spec: str, side: str, **settings):
    """A batch, and what a model with short logits and one with full ones give for it."""
    batch = make(name, *ROWS, side=side)
    with torch.no_grad():
        return batch, me.wrap(tiny(name), spec)(**batch, **settings), me.wrap(tiny(name), spec, logits="full")(**batch, **settings)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", NAMES)
def test_full_logits_predict_each_word_as_the_row_alone_does(name, spec, side):
    """As a loss by hand on the full prompt's ids reads them: the logits of one column for the id of the next."""
    batch, short, full = calls(name, spec, side)
    ids = batch["input_ids"]
    assert full.logits.shape[:2] == ids.shape and full.logits.isfinite().all() and torch.equal(full.loss, short.loss)
    assert torch.equal(full.visual_keep_mask, short.visual_keep_mask)
    labels = me.mask_labels(me.wrap(tiny(name), spec), batch)
    if spec == "none":
        assert torch.equal(full.logits, tiny(name)(**batch).logits)
        return
    for row, kind in enumerate(ROWS):
        asked = labels[row, 1:] != -100
        logits, words = predicted(name, spec, kind)
        assert torch.equal(labels[row, 1:][asked], words)
        torch.testing.assert_close(full.logits[row, :-1][asked], logits, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("spec", SPECS[:-1])
@pytest.mark.parametrize("name", NAMES)
def test_ids_labels_and_mask_have_the_logits_length(name, spec, side):
    """The loss follows from an output alone, and pooling by its mask reads a row's real columns."""
    batch, short, full = calls(name, spec, side)
    for out in (short, full):
        length = out.logits.shape[1]
        for part in (out.visual_input_ids, out.visual_labels, out.visual_attention_mask):
            assert part.shape == (len(ROWS), length)
        loss = cross_entropy(out.logits[:, :-1].flatten(0, 1), out.visual_labels[:, 1:].flatten())
        torch.testing.assert_close(loss, out.loss)
        learned = out.visual_labels != -100
        assert torch.equal(out.visual_labels[learned], out.visual_input_ids[learned])
        assert out.visual_attention_mask[learned].all()
    real = batch["attention_mask"].bool()
    assert torch.equal(full.visual_labels, me.mask_labels(me.wrap(tiny(name), spec), batch))
    assert torch.equal(full.visual_input_ids, batch["input_ids"])
    assert torch.equal(full.visual_attention_mask.bool(), real & full.visual_keep_mask)
    for row in range(len(ROWS)):
        kept = batch["input_ids"][row][real[row] & full.visual_keep_mask[row]]
        assert torch.equal(short.visual_input_ids[row][short.visual_attention_mask[row].bool()], kept)


@pytest.mark.parametrize("spec", SHORT)
def test_without_labels_there_are_none(spec):
    batch = make("llava", *ROWS)
    del batch["labels"]
    assert me.wrap(tiny("llava"), spec)(**batch).visual_labels is None


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("spec", SPECS)
def test_logits_to_keep_counts_columns_of_the_full_prompt(spec, side):
    batch = make("llava", *ROWS, side=side)
    del batch["labels"]
    model = me.wrap(tiny("llava"), spec, logits="full")
    with torch.no_grad():
        every = model(**batch)
        for keep in (1, 4, batch["input_ids"].shape[1], torch.tensor([0, 5, -1])):
            out = model(**batch, logits_to_keep=keep)
            at = keep if torch.is_tensor(keep) else slice(-keep, None)
            torch.testing.assert_close(out.logits, every.logits[:, at], atol=1e-6, rtol=1e-5)  # the head sums in another order
            if spec != "none":
                assert torch.equal(out.visual_input_ids, batch["input_ids"][:, at])
        torch.testing.assert_close(model(**batch, return_dict=False)[0], every.logits)


@pytest.mark.parametrize("spec", SHORT)
def test_short_logits_refuse_columns_that_are_not_the_prompts_last(spec):
    """Rows padded on the right end in different columns once they are shorter, and a number of columns then means others."""
    model = me.wrap(tiny("llava"), spec)
    rows = ("one image", "two images")
    left, right = ({k: v for k, v in make("llava", *rows, side=side).items() if k != "labels"} for side in SIDES)
    with torch.no_grad():
        short, last = model(**left), model(**left, logits_to_keep=3)
        torch.testing.assert_close(last.logits, short.logits[:, -3:], atol=1e-6, rtol=1e-5)
        assert torch.equal(last.visual_input_ids, left["input_ids"][:, -3:])
        both = {**right, "attention_mask": right["attention_mask"].clone()}
        both["attention_mask"][1, -2:] = 0  # as after a generation that ended early
        for call, keep in ((right, 22), (both, 3), (left, 40), (left, torch.tensor([3]))):
            with pytest.raises(me.CountMismatchError, match="logits_to_keep names columns of the full prompt"):
                model(**call, logits_to_keep=keep)


@pytest.mark.parametrize("spec", SPECS)
def test_gradients_are_those_of_the_short_loss(spec):
    batch = make("llava", *ROWS)
    models = [me.wrap(tiny("llava"), spec, logits=length) for length in ("short", "full")]
    short, full = (model(**batch) for model in models)
    if spec != "none":
        cross_entropy(full.logits[:, :-1].flatten(0, 1), full.visual_labels[:, 1:].flatten()).backward()
    else:
        full.loss.backward()
    short.loss.backward()
    for (name, one), (_, other) in zip(*(model.named_parameters() for model in models)):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-4)


def test_another_length_of_logits_is_refused():
    with pytest.raises(me.MllmEfficientError, match="logits='long': .* 'short' or 'full'"):
        me.wrap(tiny("llava"), SHORT[0], logits="long")


def test_shift_labels_are_refused():
    batch = make("llava", *ROWS)
    labels = batch.pop("labels")
    with pytest.raises(me.CountMismatchError, match="shift_labels cannot be compressed: pass labels"):
        me.wrap(tiny("llava"), SHORT[0])(**batch, shift_labels=labels)


# ------------------------------------------------------------------------------------------------ outputs without logits


@dataclass
class PerLabel(ModelOutput):
    """What a fused language-model head gives: values of labels 1 and on, no logits."""

    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None
    nothing: torch.Tensor | None = None


def fused(model):
    """The model with a head that gives no logits, as TRL's trainers put on."""
    import types

    def forward(self, *args, labels=None, **kwargs):
        states = self.model(*args, **kwargs).last_hidden_state[:, :-1]
        chances = self.lm_head(states).log_softmax(-1)
        mask = labels[:, 1:] != -100
        each = chances.gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0].masked_fill(~mask, 0)
        return PerLabel(loss=-each.sum() / mask.sum(), log_probs=each, label_mask=mask)

    model.forward = types.MethodType(forward, model)
    return model


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", NAMES)
def test_values_of_labels_stand_where_the_labels_do_in_the_full_prompt(name, spec, side):
    batch = make(name, *ROWS, side=side)
    with torch.no_grad():
        out = fused(me.wrap(tiny(name), spec))(**batch)
    labels = me.mask_labels(me.wrap(tiny(name), spec), batch)
    assert out.log_probs.shape == out.label_mask.shape == (len(ROWS), batch["input_ids"].shape[1] - 1) and out.nothing is None
    if spec == "none":
        return
    assert torch.equal(out.label_mask, labels[:, 1:] != -100) and not out.log_probs[~out.label_mask].any()
    assert torch.equal(out.visual_labels[:, 1:], labels[:, 1:]) and torch.equal(out.visual_input_ids, batch["input_ids"])
    for row, kind in enumerate(ROWS):
        logits, words = predicted(name, spec, kind)
        wanted = logits.log_softmax(-1).gather(1, words[:, None])[:, 0]
        torch.testing.assert_close(out.log_probs[row][out.label_mask[row]], wanted, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_logits_may_be_none(spec):
    """Liger's forward computes the loss from the states where it trains."""
    import types

    model = me.wrap(tiny("llava"), spec)
    stock = type(model).forward

    def forward(self, *args, **kwargs):
        out = stock(self, *args, **kwargs)
        out.logits = None
        return out

    batch = make("llava", *ROWS)
    with torch.no_grad():
        loss = model(**batch).loss
        for settings in ("short", "full"):
            other = me.wrap(tiny("llava"), spec, logits=settings)
            other.forward = types.MethodType(forward, other)
            out = other(**batch)
            assert torch.equal(out.loss, loss) and out.logits is None and out.visual_keep_mask.shape == batch["input_ids"].shape


# ------------------------------------------------------------------------------------------------ prompt learning


@pytest.mark.parametrize("order", ["peft then wrap", "wrap then peft"])
@pytest.mark.parametrize("kind", ["prompt", "prefix", "p-tuning"])
def test_virtual_tokens_are_refused_in_one_true_sentence(kind, order):
    import peft

    config = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig, "p-tuning": peft.PromptEncoderConfig}[kind]
    settings = {"encoder_hidden_size": 8} if kind == "p-tuning" else {}
    config = config(task_type="CAUSAL_LM", num_virtual_tokens=3, num_layers=2, token_dim=32, num_attention_heads=2, **settings)
    batch = make("llava", *ROWS)
    if order == "peft then wrap":
        with pytest.raises(me.UnsupportedModelError, match="placeholders are found by their ids: use LoRA"):
            me.wrap(peft.get_peft_model(tiny("llava"), config), SHORT[0])
        return
    model = peft.get_peft_model(me.wrap(tiny("llava"), SHORT[0]), config)
    with pytest.raises(me.CountMismatchError, match=r"PEFT's (prompt|prefix) tuning never does \(LoRA does\)"):
        model(**batch)
