"""The table of model types: every row keeps its contract, every type of transformers stands in it, and each check can fail."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig

import mllm_efficient as me
from mllm_efficient import cli, patches
from mllm_efficient.patches import checkup, contract, facts
from mllm_efficient.patches.families.generic import GenericAdapter

HERE = patches.transformers_version()
newest = pytest.mark.skipif(HERE != patches.NEWEST_TESTED, reason="the table is of the newest transformers")


def subject(model_type: str, **other: object) -> contract.Subject:
    return contract.Subject(AutoConfig.for_model(model_type), replace(facts.FACTS[model_type], **other))


@pytest.mark.parametrize("model_type", facts.FACTS)
def test_a_row_keeps_its_contract(model_type):
    rows = checkup.check_row(model_type)
    refused = facts.FACTS[model_type].refusal(HERE)
    if refused or (rows[0].holds is None and HERE < patches.NEWEST_TESTED):
        assert all(row.holds is None and row.why for row in rows)
        return
    assert [(row.check, row.why) for row in rows] == [(name, "") for name in checkup.ROW_CHECKS]
    assert all(row.holds for row in rows)


@newest
def test_at_least_sixty_types_are_compressed_rightly():
    held = [model_type for model_type, row in facts.FACTS.items() if not row.refusal(HERE)]
    assert len(held) >= 60


@newest
def test_every_type_that_takes_features_is_in_the_table():
    models = Path(transformers.__file__).parent / "models"
    takes = {path.parent.name for path in models.glob("*/modeling_*.py") if "mm_encoder_outputs" in path.read_text()}
    folders = {"shieldgemma2": "gemma3", "pp_chart2table": "got_ocr2"}  # types that are run by the code of others
    assert takes == {folders.get(t, t) for t in (*facts.FACTS, *facts.REFUSED)}
    assert not set(facts.FACTS) & set(facts.REFUSED)
    assert all(facts.REFUSED.values())


def test_a_model_that_raises_by_itself_is_said_to(monkeypatch):
    monkeypatch.setitem(facts.FACTS, "gemma3", replace(facts.FACTS["gemma3"], broken=HERE))
    rows = checkup.check_row("gemma3")
    assert all(row.holds is None and "in transformers" in row.why and "itself" in row.why for row in rows)
    monkeypatch.setitem(facts.FACTS, "gemma3", replace(facts.FACTS["gemma3"], broken=None, since=(99, 0)))
    assert {row.why for row in checkup.check_row("gemma3")} == {
        f"transformers {'.'.join(map(str, HERE))} has it otherwise: 99.0 or newer is needed"
    }


@newest
def test_llama4_still_raises_by_itself():
    """When this fails, a release has mended it, and the row's ``broken`` ends there."""
    config = contract.tiny.tiny_config(AutoConfig.for_model("llama4"), facts.FACTS["llama4"].tiny)
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    with pytest.raises(AttributeError, match="image_outputs"):
        model(input_ids=torch.tensor([[1, 100, 101]]))


# ------------------------------------------------------------------------------------------------ each check can fail


def test_wrong_facts_are_found():
    deep = subject("qwen3_vl_moe", deepstack=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(facts.FACTS, "qwen3_vl_moe", deep.facts)
        deep.adapter = GenericAdapter(deep.model)
        with pytest.raises(AttributeError, match="deepstack"):
            deep.identity()
    flat = subject("glm4v", mrope=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(facts.FACTS, "glm4v", flat.facts)
        flat.adapter = GenericAdapter(flat.model)
        assert flat.chosen() == "positions are not counted on one by one"


def test_a_wrong_choice_is_found(monkeypatch):
    patient = subject("idefics3")
    assert patient.chosen() == ""
    columns = patient.columns

    def shifted(call, report):
        return columns(call, report).roll(1)

    monkeypatch.setattr(patient, "columns", shifted)
    assert "logits are off" in patient.chosen()


def test_token_types_of_the_full_length_are_refused_where_a_model_takes_them():
    """Gemma 3 takes them in silence when the prompt is shortened and answers otherwise."""
    patient = subject("gemma3")
    call = patient.prompts[0]
    assert patient.long() == ""
    short = me.prepare(patient.model, "uniform:keep=0.5", **call).model_kwargs
    assert short["token_type_ids"].shape == short["input_ids"].shape
    with torch.no_grad():
        right = patient.model(**short).logits
        gone = patient.model(**{k: v for k, v in short.items() if k != "token_type_ids"}).logits
    assert not torch.allclose(right, gone, atol=1e-3)  # without them, attention over the picture is causal


# ------------------------------------------------------------------------------------------------ types without a row


def unknown(monkeypatch, model_type: str) -> contract.Subject:
    """A tiny model whose row is taken out of the table."""
    patient = subject(model_type)
    monkeypatch.delitem(facts.FACTS, model_type)
    return patient


def test_an_unknown_type_is_tried(monkeypatch):
    patient = unknown(monkeypatch, "qwen3_vl_moe")
    with pytest.raises(me.UnsupportedModelError, match="Qwen3VLMoeForConditionalGeneration is not supported"):
        me.wrap(patient.model, "uniform:keep=0.5")
    plain = patient.model.generate(**patient.prompts[0], max_new_tokens=2)
    row = contract.guess(patient.model)
    assert (row.grids, row.mrope, row.deepstack, row.example) == ("image_grid_thw", 3, True, "patches")
    monkeypatch.setattr(contract, "guess", lambda model: replace(row, tiny=patient.facts.tiny))
    me.wrap(patient.model, "uniform:keep=0.5", unknown="try")
    assert patient.model.generate(**patient.prompts[0], max_new_tokens=2).shape == plain.shape
    assert me.last_report(patient.model).images[0].kept == 2
    me.unwrap(patient.model)


def test_a_type_that_does_not_hold_is_refused_with_the_row_that_is_missing(monkeypatch):
    patient = unknown(monkeypatch, "idefics2")
    monkeypatch.setattr(contract, "guess", lambda model: facts.Facts(grids="image_grid_thw", example="padded"))
    with pytest.raises(me.UnsupportedModelError) as caught:
        me.wrap(patient.model, "uniform:keep=0.5", unknown="try")
    assert "does not hold" in str(caught.value) and "Facts(grids='image_grid_thw', example='padded')" in str(caught.value)
    assert "idefics2" not in facts.FACTS
    with pytest.raises(me.MllmEfficientError, match="neither 'refuse' nor 'try'"):
        me.wrap(patient.model, "uniform:keep=0.5", unknown="yes")


def test_a_refused_type_says_why(monkeypatch):
    patient = unknown(monkeypatch, "idefics2")
    monkeypatch.setitem(facts.REFUSED, "idefics2", "a reason")
    for how in ("refuse", "try"):
        with pytest.raises(me.UnsupportedModelError, match="Idefics2ForConditionalGeneration is not supported: a reason"):
            me.wrap(patient.model, "uniform:keep=0.5", unknown=how)


# ------------------------------------------------------------------------------------------------ what no row knows is refused by name


def test_what_a_row_does_not_know_is_refused_by_name():
    patient = subject("idefics2")
    for spec, said in {
        "pool:keep=0.3": "pool needs grid, which Idefics2ForConditionalGeneration does not give",
        "visionzip:keep=0.3": "needs attention",
        "divprune:keep=0.3,per=tile": "per='tile' has no effect",
    }.items():
        with pytest.raises(me.UnsupportedModelError, match=said):
            me.wrap(patient.model, spec)


@newest
@pytest.mark.parametrize(
    ("model_type", "rule", "says"),
    [
        ("inkling2", "keep", "read no positions"),
        ("nemotron_h_omni", "keep", "read no positions"),
        ("hy_v4_vl", "renumber", "do not say the grid"),
    ],
)
def test_a_rule_of_positions_that_cannot_take_effect_is_refused(model_type, rule, says):
    patient = subject(model_type)
    for run in (me.wrap, lambda model, spec: me.prepare(model, spec, **patient.prompts[0])):
        with pytest.raises(me.UnsupportedModelError, match=says):
            run(patient.model, f"divprune:keep=0.5,positions={rule}")


@newest
def test_decoders_that_take_methods_inside_are_these():
    """A type that no longer takes them fails here: the contract lets refusals pass."""
    inside = set()
    for model_type, row in facts.FACTS.items():
        if not row.refusal(HERE) and row.example != "large":
            patient = subject(model_type)
            with contextlib.suppress(me.UnsupportedModelError):
                patient.adapter.check_inside(me.build(f"fastv:layer={max(1, patient.adapter.deep_layers)},ratio=0.5"))
                inside.add(model_type)
    assert inside == set(
        "aya_vision cohere2_vision cosmos3_omni deepseek_vl deepseek_vl_hybrid exaone4_5 got_ocr2 idefics2 idefics3 "
        "internvl janus lighton_ocr llava llava_next llava_next_video llava_onevision mistral3 ovis2 pp_chart2table "
        "qianfan_ocr qwen2_5_vl qwen2_vl qwen3_vl smolvlm video_llama_3 video_llava vipllava".split()
    )


@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "exaone4_5"])
def test_a_type_whose_calls_say_the_grid_runs_methods_that_need_one(model_type):
    patient = subject(model_type)
    prepared = me.prepare(patient.model, "pool:keep=0.5", **patient.prompts[0])
    assert [image.kept for image in prepared.report.images] == [2, 4]


def test_the_command_checks_every_row(monkeypatch, capsys):
    monkeypatch.setattr(checkup, "_models", lambda: {})
    monkeypatch.setattr(checkup, "FACTS", {"idefics3": facts.FACTS["idefics3"]})
    monkeypatch.setattr(checkup, "REFUSED", {"emu3": "a reason"})
    assert cli.main(["doctor", "--all", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(r["model_type"], r["check"], r["holds"]) for r in rows] == [
        *(("idefics3", name, True) for name in checkup.ROW_CHECKS), *(("emu3", name, None) for name in checkup.ROW_CHECKS),
    ]  # fmt: skip
    assert cli.main(["doctor", "--all"]) == 0
    assert "emu3: a reason" in capsys.readouterr().out
