"""Liger's forwards, which compute the loss from the states, with a loss for CPUs in the place of its kernel."""

from __future__ import annotations

import importlib
import types
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers.utils import ModelOutput

import mllm_efficient as me

from ..trainer_runs import BATCHES, SPECS, make, tiny

pytest.importorskip("liger_kernel", reason="Liger is not installed in this environment")
NAMES = ("llava", "internvl", "qwen2_5_vl")


def on_cpu(hidden_states, lm_head_weight, labels, hidden_size, num_items_in_batch=None, shift_labels=None, **_):
    """What Liger's fused kernel computes."""
    wanted = labels[:, 1:].flatten()
    total = cross_entropy((hidden_states[:, :-1] @ lm_head_weight.T).flatten(0, 1), wanted, reduction="sum")
    return total / ((wanted != -100).sum() if num_items_in_batch is None else num_items_in_batch)


@dataclass
class Output(ModelOutput):
    """In the place of Liger's output classes, whose fields are not those of transformers 5.24."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cache: Any = None  # which transformers 5.24 makes of past_key_values
    hidden_states: Any = None
    attentions: Any = None
    image_hidden_states: Any = None
    token_accuracy: Any = None
    predicted_tokens: Any = None


@pytest.fixture
def with_liger(monkeypatch):
    """Puts a family's ``lce_forward`` on a model, or skips where Liger's file does not load beside this transformers."""

    def put(name: str, model):
        try:
            module = importlib.import_module(f"liger_kernel.transformers.model.{name}")
        except ImportError as error:
            pytest.skip(f"Liger's {name} does not load beside transformers {transformers.__version__}: {error}")
        monkeypatch.setattr(module, "LigerForCausalLMLoss", on_cpu)
        try:
            types.MethodType(module.lce_forward, tiny(name).train())(**make(name, *BATCHES[0]))
        except TypeError:  # in stock
            (named,) = (key for key in vars(module) if key.startswith("Liger") and key.endswith("OutputWithPast"))
            monkeypatch.setattr(module, named, Output)
        model.forward = types.MethodType(module.lce_forward, model)
        return model.train()

    return put


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", NAMES)
def test_ligers_loss_is_the_models_own(name, spec, with_liger):
    model, batch = me.wrap(tiny(name), spec), make(name, *BATCHES[0])
    loss = model(**batch).loss
    out = with_liger(name, model)(**batch)
    assert out.logits is None
    torch.testing.assert_close(out.loss, loss)
    if spec != "none":
        assert out.visual_keep_mask.shape == batch["input_ids"].shape and (out.visual_labels != -100).any()
    every = int((batch["labels"][:, 1:] != -100).sum())
    torch.testing.assert_close(model(**batch, num_items_in_batch=every).loss, loss)
    out.loss.backward()
