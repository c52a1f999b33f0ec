"""Every decoder that in-decoder methods may work in: what they are shown of a layer is what its own eager attention has."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import mllm_efficient as me
from mllm_efficient.measure import counter
from mllm_efficient.measure.flops import cost, shape_of
from mllm_efficient.patches import checkup, rules, sizes, tiny
from mllm_efficient.patches.decoder.rating import heads_of

TEXT_KINDS = {"gemma3": "gemma3_text"}  # where a text model's type is not the name of its family
OF_VLM = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # decoders that come with their tower alone: tests of those families
KINDS = [kind for kind in rules.DECODERS if kind not in OF_VLM]


def config_of(kind: str):
    config = tiny.tiny_config(AutoConfig.for_model(TEXT_KINDS.get(kind, kind)))
    config.pad_token_id = 0
    return config


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_attention_and_keys_are_those_of_the_layer(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(kind), dtype=torch.float32, attn_implementation="eager").eval()
    for weight in model.parameters():
        weight += torch.randn_like(weight) * 0.2
    decoder = model.get_decoder()
    assert type(decoder.layers[0]).__name__ == rules.DECODERS[kind]
    seen: dict[int, tuple] = {}
    for i, layer in enumerate(decoder.layers):
        layer.register_forward_pre_hook(
            lambda m, args, kwargs, i=i: seen.update({i: (args[0] if args else kwargs["hidden_states"], kwargs["position_embeddings"])}),
            with_kwargs=True,
        )
    ids = torch.randint(tiny.TEXT, 160, (2, 9))
    out = model(ids, output_attentions=True, use_cache=False)
    columns = torch.tensor([[8, 3], [8, 5]])
    for i, layer in enumerate(decoder.layers):
        hidden, tables = seen[i]
        before = {name: value for name, value in vars(layer.self_attn).items() if not name.startswith("_")}
        heads = heads_of(layer, hidden, tables)
        wanted = out.attentions[i].mean(1).gather(1, columns[..., None].expand(-1, -1, 9))
        torch.testing.assert_close(heads.attention(columns, torch.ones(2, 9, dtype=torch.bool)), wanted, rtol=1e-5, atol=1e-6)
        assert heads.keys.shape[:3:2] == (2, 9)
        assert {name: value for name, value in vars(layer.self_attn).items() if not name.startswith("_")} == before
        assert layer.self_attn.config._attn_implementation == "eager"


@pytest.mark.parametrize("kind", KINDS)
def test_the_doctor_finds_nothing(kind, monkeypatch):
    text = {name: value for name, value in config_of(kind).to_dict().items() if name != "transformers_version"}
    given = copy.deepcopy(checkup._models()["llava"])
    given["config"]["text_config"] = text
    monkeypatch.setattr(checkup, "_models", lambda: {"llava": given})
    patient = checkup.Patient("llava", "cpu", None)
    patient.model.lm_head.weight.data[:8] = 0  # answers hold no placeholder
    assert patient.identity(me.build("fastv:layer=1,ratio=0.5")) == ""
    for spec in ("sparsevlm:ratio=0.5", "dart:layer=1,ratio=0.5,positions=keep"):
        assert patient.cache(me.build(spec)) == ""
        assert patient.batch(me.build(spec)) == ""


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in sizes.MLP_MATRICES])
def test_what_methods_are_shown_costs_what_is_counted(kind):
    text = {name: value for name, value in config_of(kind).to_dict().items() if name != "transformers_version"}
    given = copy.deepcopy(checkup._models()["llava"]["config"])
    config = AutoConfig.for_model(**{**given, "text_config": text})
    model = AutoModelForImageTextToText.from_config(config).eval()
    shape = shape_of(config)
    for spec in ("fastv:layer=1,ratio=0.5", "sparsevlm:ratio=0.5", "dart:layer=1,ratio=0.5"):
        found, closed = (f(model, shape, me.build(spec)) for f in (counter.count, lambda _, shape, method: cost(shape, method=method)))
        assert found == counter.Counted(closed.vision, closed.compress, closed.prefill, closed.decode), spec
