"""FLOPs: the command, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import mllm_efficient as me
from mllm_efficient.apply.plan import check
from mllm_efficient.cli import main
from mllm_efficient.loading.models import ModelOptions, load
from mllm_efficient.measure.flops import cost, load_shape, shape_of
from mllm_efficient.patches import adapter_for
from mllm_efficient.registry import runnable
from mllm_efficient.tokens import Plane, VisualShape

from ..families import FAMILIES, tiny
from .test_flops import (
    PAPER_TEXT,
    ROOT,
    SHAPES,
    means,
)

ROW = (
    "method", "convention", "text_tokens", "visual_tokens_full", "visual_tokens_kept", "vision_tflops", "compress_tflops", "prefill_tflops",
    "decode_tflops", "total_tflops", "ratio", "kv_cache_mb",
)  # fmt: skip


def flops(capsys, *arguments: str) -> dict[str, Any]:
    assert main(["flops", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_rows_begin_with_none_and_have_the_units_they_say(capsys):
    out = flops(capsys, "--model", "llava-1.5-7b", "--method", "divprune:keep=0.098", "--new-tokens", "20")
    none, pruned = out["rows"]
    closed = cost("llava-1.5-7b", method="divprune:keep=0.098", new_tokens=20)
    assert set(ROW) <= set(none) and none["method"] == "none" and none["ratio"] == 100
    assert (pruned["visual_tokens_full"], pruned["visual_tokens_kept"], pruned["text_tokens"]) == (576, 56, 64)
    for phase in ("vision", "compress", "prefill", "decode", "total"):
        assert pruned[f"{phase}_tflops"] == pytest.approx(getattr(closed, phase) / 1e12, rel=1e-12)
    assert pruned["kv_cache_mb"] == pytest.approx((64 + 56 + 19) * 32 * 2 * 4096 * 2 / 1e6)
    assert pruned["ratio"] == pytest.approx(100 * pruned["total_tflops"] / none["total_tflops"])
    assert pruned["flops_ratio"] == pytest.approx(pruned["ratio"] / 100) and none["flops_ratio"] == 1
    assert none["prefill_tflops"] == pytest.approx(8.504, abs=5e-4)


def test_the_divprune_row_of_the_paper(capsys):
    texts = ",".join(map(str, PAPER_TEXT))
    arguments = ("--text-tokens", texts, "--visual-tokens", "576", "--method", "divprune:keep=0.098", "--convention", "divprune")
    none, pruned = flops(capsys, "--model", "llava-1.5-7b", *arguments)["rows"]
    assert f"{none['prefill_tflops']:.4f} {pruned['prefill_tflops']:.4f} {pruned['ratio']:.2f}" == "3.2280 0.5122 15.63"
    assert pruned["total_tflops"] == pruned["prefill_tflops"] and pruned["vision_tflops"] == 0
    assert main(["flops", "--model", "llava-1.5-7b", *arguments]) == 0
    shown = capsys.readouterr().out
    assert "15.63%" in shown and "0.5122" in shown and "3.228" in shown


def test_lists_zip_and_one_value_is_for_all(capsys):
    call = ("--model", "llava-1.6-7b", "--method", "divprune:keep=0.1")
    out = flops(capsys, *call, "--text-tokens", "10,20", "--visual-tokens", "1152,2880")
    singles = [flops(capsys, *call, "--text-tokens", t, "--visual-tokens", n) for t, n in (("10", "1152"), ("20", "2880"))]
    for i, row in enumerate(out["rows"]):
        for field in ROW[2:]:
            assert row[field] == pytest.approx(sum(s["rows"][i][field] for s in singles) / 2), field
    assert out["rows"][0]["visual_tokens_full"] == 2016
    broadcast = flops(capsys, *call, "--text-tokens", "10", "--visual-tokens", "1152,2880")
    assert [p["text_tokens"] for p in broadcast["meta"]["prompts"]] == [10, 10]
    sized = flops(capsys, *call, "--image-size", "336x672,672x672", "--batch-size", "3")
    assert sized["meta"]["pictures"][0].startswith("336x672: 3 views of 336x336")
    assert sized["rows"][0]["total_tflops"] == pytest.approx(
        3 * means([cost("llava-1.6-7b", image_size=(336, 672)), cost("llava-1.6-7b", image_size=(672, 672))], "total")
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--text-tokens", "1,2,3", "--visual-tokens", "576,1152"), "--text-tokens has 3 and --visual-tokens has 2"),
        (("--text-tokens", "1,,2"), "not a list of whole numbers"),
        (("--visual-tokens", "0"), "whole numbers from 1"),
        (("--image-size", "672"), "not WIDTHxHEIGHT"),
        (("--convention", "flops"), "unknown convention 'flops'"),
        (("--convention", "divprune", "--measured"), "--measured"),
        (("--model", "llava-15"), "no shape or folder"),
        (("--method", "divprune"), "no budget"),
        (("--revision", "main"), "--revision"),
        (("--new-tokens", "-1"), "--new-tokens"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(capsys, arguments, says):
    model = () if "--model" in arguments else ("--model", "llava-1.5-7b")
    assert main(["flops", *model, *arguments]) == 2
    out = capsys.readouterr()
    assert out.out == "" and says in out.err and len(out.err.strip().splitlines()) == 1


@pytest.mark.parametrize("model", ["builtin", "llava-1.5-7b"])
def test_measured_stands_beside_the_closed_form(capsys, model):
    """The embedded model with its weights, a shape without."""
    out = flops(
        capsys, "--model", model, "--method", "divprune:keep=0.25", "--method", "resize:keep=0.25", "--measured", "--new-tokens", "3"
    )
    assert len(out["rows"]) == 3
    for row in out["rows"]:
        assert row["measured"]["difference_flops"] == 0
        assert row["measured"]["total_tflops"] == pytest.approx(row["total_tflops"]) and row["total_tflops"] > 0
    assert main(["flops", "--model", model, "--measured"]) == 0
    assert "difference" in capsys.readouterr().out


def test_measured_needs_a_real_picture(capsys):
    assert main(["flops", "--model", "llava-1.6-7b", "--visual-tokens", "2225", "--measured"]) == 2
    assert "use --image-size" in capsys.readouterr().err


def test_shapes_and_the_embedded_model_need_no_torch():
    """Every shape with every kind of method, and mergers on several planes."""
    methods = ["divprune:keep=0.1", "resize:keep=0.25", "pool:keep=0.25", "random:tokens=64", "uniform:prune=0.9"]
    code = f"""
import sys
from mllm_efficient.cli import main
methods = [part for m in {methods} for part in ("--method", m)]
for model in {["builtin", *SHAPES]}:
    assert main(["flops", "--model", model, "--new-tokens", "9", *methods]) == 0
for size in ("672x672", "1000x300"):
    call = ["flops", "--model", "llava-1.6-7b", "--image-size", size]
    assert main([*call, "--method", "pool:keep=0.3", "--method", "random:keep=0.3,per=tile"]) == 0
assert main(["flops", "--model", "llava-1.5-7b", "--convention", "divprune", "--json"]) == 0
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def test_a_picture_is_chosen_by_the_family():
    rules = load_shape("llava-1.5-7b").rules
    assert [p.shape for p in rules.prompt(1152, None, exact=True)] == [VisualShape((Plane(24, 24),))] * 2


# ------------------------------------------------------------------------------------------------ refusals

REFUSED_SOMEWHERE = (
    "sparsevlm:keep=0.9,recycle=0.3", "sparsevlm:keep=0.9", "fastv:layer=1,keep=0.9", "fastv:layer=1,keep=0.9,positions=renumber",
    "fastv:layer=1,keep=0.9,newline=keep", "dart:layer=1,keep=0.9", "pyramiddrop:ratios=0.9/0.8/0.7", "dpn:routing=fixed,kernel=2x2",
    "divprune:keep=0.5", "divprune:keep=0.5,order=picked", "divprune:keep=0.5,per=tile", "divprune:keep=0.5,per=frame",
    "divprune:keep=0.5,newline=keep", "divprune:keep=0.5,positions=keep", "pool:keep=0.5", "pool:keep=0.5,newline=keep", "spp:keep=0.5",
    "tome:keep=0.5", "tome:keep=0.5,at=tower", "tokenflex:tokens=4", "resize:keep=0.5", "resize:keep=0.5,per=tile", "uniform:keep=0.5",
    "fastervlm:keep=0.5", "vispruner:keep=0.5", "scope:keep=0.5", "visionzip:keep=0.5", "prumerge_plus:keep=0.5",
    "cdpruner:keep=0.5,relevance=llm", "cdpruner:keep=0.5,relevance=clip,clip=somewhere", "random:tokens=100000",
    "divprune:keep=0.5 | fastv:layer=1,keep=0.5", "pool:keep=0.5 | sparsevlm:keep=0.4,recycle=0.3",
    "tokenflex:tokens=4 | divprune:tokens=2", "divmerge:keep=0.5", "mmtok:keep=0.5", "apet:keep=0.5", "prunesid:keep=0.5",
    "otprune:keep=0.5", "divmerge:keep=0.5 | proportional", "hawk:keep=0.5", "vscan:keep=0.5", "evs:keep=0.5",
    "vidcom2:keep=0.5",
)  # fmt: skip


def refusal(host, spec: str) -> str | None:
    """The kind of error with which a host refuses a method; None where it takes it."""
    try:
        check(host, runnable(spec))
    except me.MllmEfficientError as error:
        return type(error).__name__
    return None


@pytest.mark.parametrize("name", [*FAMILIES, "llava"])
def test_flops_refuse_what_wrap_refuses(name):
    """The check that each of them makes, on the model and on its shape alone."""
    model = load(ModelOptions("builtin", "cpu")).model if name == "llava" else tiny(name)
    adapter, rules = adapter_for(model), shape_of(model.config, name).rules
    differ = {s: (refusal(adapter, s), refusal(rules, s)) for s in REFUSED_SOMEWHERE if refusal(adapter, s) != refusal(rules, s)}
    assert not differ


def test_flops_of_what_cannot_run_are_refused_by_name():
    with pytest.raises(me.MllmEfficientError, match="a merged token has no place in the positions of qwen2.5-vl-7b"):
        cost("qwen2.5-vl-7b", method="sparsevlm:keep=0.9,recycle=0.3")


def test_a_method_with_operations_that_the_counter_does_not_know_is_told_so(registered, capsys):
    @registered("farthest")
    @dataclass(frozen=True, kw_only=True)
    class Farthest(me.Selector):
        def score(self, v):
            return torch.cdist(v.features[None].float(), v.features[None].float())[0] @ torch.ones(len(v))

    methods = ["--method", "farthest:keep=0.5", "--method", "divprune:keep=0.5"]
    assert main(["flops", "--model", "builtin", "--measured", *methods, "--json"]) == 0
    out, err = capsys.readouterr()
    found = {r["method"]: r["measured"]["unknown_operations"] for r in json.loads(out)["rows"]}
    assert found == {"none": [], "farthest:keep=0.5": ["_euclidean_dist", "mv"], "divprune:keep=0.5": []}
    assert "farthest:keep=0.5 uses _euclidean_dist, mv, whose FLOPs torch's counter takes for 0: counted is too low" in err
