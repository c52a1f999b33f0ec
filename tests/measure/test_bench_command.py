"""Benchmarks: random weights, overhead, selection, and the command."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForImageTextToText

import mllm_efficient as me
from mllm_efficient.apply.stopwatch import Stopwatch
from mllm_efficient.cli import main
from mllm_efficient.loading.models import Loaded, ModelOptions
from mllm_efficient.measure import random_model, selection
from mllm_efficient.measure.depth import shallower
from mllm_efficient.measure.flops import cost
from mllm_efficient.measure.machine import busy, machine
from mllm_efficient.measure.overhead import overhead_row
from mllm_efficient.measure.shapes import shape_config, shape_names, shape_of
from mllm_efficient.measure.timing import clock_for
from mllm_efficient.measure.workload import Workload, make_inputs, text_ids
from mllm_efficient.patches import adapter_for, transformers_version
from mllm_efficient.patches.facts import FACTS
from mllm_efficient.registry import BUILTIN

from ..families import FAMILIES as HOSTS
from ..families import tiny
from .test_bench import (  # noqa: F401  (fixtures)
    charged,
    loaded,
    run,
    shape,
    shrunk,
    write_config,
)


def internvl() -> dict:
    return {
        "model_type": "internvl", "architectures": ["InternVLForConditionalGeneration"], "image_token_id": 499, "downsample_ratio": 0.5,
        "vision_config": {
            "model_type": "internvl_vision", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": [56, 56], "patch_size": [14, 14],
        },
        "text_config": {
            "model_type": "qwen2", "vocab_size": 500, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1,
        },
    }  # fmt: skip


def cohere2_vision() -> dict:
    vision = {**internvl()["vision_config"], "model_type": "siglip_vision_model", "image_size": 56, "patch_size": 14}
    return {
        "model_type": "cohere2_vision", "architectures": ["Cohere2VisionForConditionalGeneration"], "image_token_id": 499,
        "alignment_intermediate_size": 40, "vision_config": vision, "text_config": {**internvl()["text_config"], "model_type": "cohere2"},
    }  # fmt: skip


TILED = {"internvl": internvl, "cohere2_vision": cohere2_vision}
FAMILIES = ("llava-1.6-7b", "llava-next-video-7b", "llava-onevision-7b", "qwen2.5-vl-7b", *TILED)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_inputs_without_a_processor_fit_every_family(tmp_path, name, images):
    config = TILED[name]() if name in TILED else shrunk(name)
    loaded = random_model.random_model(ModelOptions(model=write_config(tmp_path / "m", config)))
    size = (112, 168) if name in TILED else (400, 300)
    workload = Workload(size, images, text_tokens=12, output_tokens=2)
    inputs = make_inputs(loaded, adapter_for(loaded.model), workload, 2)
    assert inputs.lengths[1] == 12 and inputs.call["input_ids"].shape[0] == inputs.text_only["input_ids"].shape[0] == 2
    assert torch.equal(inputs.call["input_ids"][0], inputs.call["input_ids"][1])
    rows, meta = run(loaded, "uniform:keep=0.1", workload=workload, repeats=1, warmup=0)
    assert meta["failed"] == [] and rows[0]["visual_tokens_full"] == inputs.visual_tokens
    assert rows[1]["visual_tokens_kept"] == images * round(0.1 * inputs.visual_tokens / images)
    assert 0 < rows[1]["flops_ratio"] < 1 and "null" not in meta["ideal"]


def test_random_weights_are_seeded_finite_and_tied(shape, monkeypatch):
    monkeypatch.setattr(random_model, "BLOCK", 101)  # so that tensors repeat their first values
    one, same, other = (random_model.random_model(ModelOptions(model=shape, seed=s)).model for s in (0, 0, 1))
    assert one.lm_head.weight is one.get_input_embeddings().weight and not one.training
    for (name, a), b in zip(one.named_parameters(), same.parameters()):
        assert a.isfinite().all() and torch.equal(a, b) and a.dtype == torch.float32 and not a.requires_grad
        if a.ndim > 1:
            assert 0.01 < a.std() < 0.03, name
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    flat = one.lm_head.weight.flatten()
    assert torch.equal(flat[:101], flat[101:202])


LIKE_OTHERS = ("bench-0.3b", "llava-1.5-13b", "lightonocr-1b", *(["gemma-4-e4b"] if transformers_version() < (5, 24) else []))


@pytest.mark.parametrize("name", [name for name in shape_names() if name not in LIKE_OTHERS])
def test_a_shape_of_fewer_layers_is_a_model_of_the_same_widths(name):
    whole = random_model.config_of(name)
    for layers in (1, 2, 6):
        config = shallower(whole, layers)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        own, full = shape_of(model.config, name), shape_of(whole, name)
        assert own.decoder.layers == layers and own.tower.layers == min(layers, full.tower.layers)
        assert (own.decoder.width, own.decoder.vocabulary, own.tower.width) == (
            full.decoder.width,
            full.decoder.vocabulary,
            full.tower.width,
        )
        counted = [cost(s, image_size=None if s.rules.fixed_count else (448, 448)).total for s in (own, full)]
        assert counted[0] < counted[1]
    with pytest.raises(me.MllmEfficientError, match=rf"the language model has {full.decoder.layers}, so give 1 to"):
        shallower(whole, full.decoder.layers + 1)


def test_bench_of_fewer_layers(shape, capsys):
    argv = ["bench", "--model", str(shape), "--random-weights", "--layers", "1", "--json", *SMALL]
    assert main(argv) == 0
    few = json.loads(capsys.readouterr().out)
    assert main([a for a in argv if a not in ("--layers", "1")]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert 0 < few["rows"][0]["kv_cache_mb"] < whole["rows"][0]["kv_cache_mb"] and "--layers 1" in few["meta"]["command"]
    assert "--layers has no effect without --random-weights" in fails(capsys, "--layers", "1")


def test_random_weights_take_dtype_and_attention(shape):
    model = random_model.random_model(ModelOptions(model=shape, dtype="bfloat16", attn_implementation="eager")).model
    assert model.dtype == torch.bfloat16 and model.config.get_text_config()._attn_implementation == "eager"


def test_every_shipped_shape_is_a_supported_model():
    for name in shape_names():
        if FACTS[shape_config(name)["model_type"]].refusal(transformers_version()):
            continue
        with torch.device("meta"):
            from transformers import AutoModelForImageTextToText

            model = AutoModelForImageTextToText.from_config(random_model.config_of(name))
        assert adapter_for(model).decoder_layers > 0


def test_text_holds_no_placeholder(loaded):
    ids = text_ids(adapter_for(loaded.model), 5000, 0)
    assert 99 not in ids and 0 not in ids and ids.max() < 100


def test_the_overhead_is_a_paired_ratio_of_bare_and_wrapped(charged):
    loaded, clock = charged
    inputs = make_inputs(loaded, adapter_for(loaded.model), Workload(text_tokens=10), 1)
    for spec, kept in (("divprune:keep=1.0", 36), ("random:keep=0.5", 18)):
        row = overhead_row(loaded.model, inputs, me.build(spec), clock=clock, batch_size=1, repeats=3)
        assert row["bare_ms"]["median"] == row["wrapped_ms"]["median"] == 1000 * (7 + 10 + kept) and row["method"] == spec
        assert row["overhead"] == 0 and row["ratio"]["n"] == 3 and row["failed"] is None
        assert (row["method_ms"]["median"] > 0) == (kept < 36) and row["overhead_ms"]["median"] == pytest.approx(
            -row["method_ms"]["median"]
        )


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "qwen2_5_vl", "internvl"])
def test_the_overhead_of_any_family_is_timed(name):
    loaded = Loaded(tiny(name), HOSTS[name].processor("left"), ModelOptions(name))
    inputs = make_inputs(loaded, adapter_for(loaded.model), Workload(text_tokens=20), 1)
    row = overhead_row(loaded.model, inputs, me.build("random:keep=0.5"), clock=clock_for([]), batch_size=1, repeats=1, warmup=0)
    assert row["failed"] is None and row["wrapped_ms"]["n"] == 1


def test_work_on_cuda_is_timed_by_the_device_and_elsewhere_by_the_host():
    for device in (None, torch.device("cpu"), torch.device("meta")):
        assert Stopwatch(device).clock == "host" and Stopwatch(device).stop().seconds() >= 0


def test_the_naive_loop_chooses_what_divprune_chooses():
    for n, d, k in ((50, 16, 1), (50, 16, 7), (64, 8, 64)):
        x = torch.randn(n, d, generator=torch.Generator().manual_seed(n))
        assert torch.equal(selection.naive(x, k), me.DivPrune(tokens=k).select(x))
    assert torch.equal(selection.product(x), x @ x.T)


def test_selection_rows_hold_ratios_of_one_run():
    rows = selection.selection_rows(((40, 16, 5), (30, 8, 3)), repeats=3, warmup=0)
    assert [(r["n"], r["d"], r["k"]) for r in rows] == [(40, 16, 5), (30, 8, 3)]
    for row in rows:
        assert row["failed"] is None and all(row[name]["n"] == 3 for name in (*selection.STEPS, *selection.RATIOS))
    assert (576, 4096, 57) in selection.SHAPES and (2880, 4096, 282) in selection.SHAPES


def test_a_gpu_has_rows_of_a_batch_and_of_the_loop_without_the_kernel_and_a_table_in_microseconds(monkeypatch):
    """The steps are run here on the CPU, as if they were its own."""
    monkeypatch.setattr(selection, "STEPS", selection.STEPS | selection.STEPS_ON_CUDA)
    monkeypatch.setattr(selection, "RATIOS", selection.RATIOS | selection.RATIOS_ON_CUDA)
    (row,) = selection.selection_rows(((40, 16, 5),), repeats=2, warmup=0)
    assert row["failed"] is None and all(row[name]["n"] == 2 for name in (*selection.STEPS, *selection.RATIOS))
    monkeypatch.undo()
    header, ((_, *cells),) = selection.selection_table([row])
    assert header[2] == "select ms" and cells[1] == f"{row['select_ms']['median']:.3f}" and len(header) == 1 + 5 + 3
    row["select_ms"]["median"] = 0.2344
    header, ((_, *cells),) = selection.selection_table([{**row, "device": "cuda"}])
    assert header[2] == "select us" and cells[1] == "234" and {"batch us", "torch loop us"} < set(header)
    assert len(cells) == len(header) - 1 == 7 + 5
    assert len(selection.STEPS_ON_CUDA["batch_ms"](torch.randn(40, 16), torch.empty(0), 5)) == selection.BATCH == 8


def fails(capsys, *argv) -> str:
    assert main(["bench", *map(str, argv)]) == 2
    out, err = capsys.readouterr()
    lines = err.strip().splitlines()
    assert out == "" and lines[-1].startswith("mllm-efficient: ") and "Traceback" not in err, err
    return lines[-1]


SMALL = ("--text-tokens", "30", "--output-tokens", "2", "--repeats", "2", "--warmup", "0")


def test_bench_prints_the_ceiling_first(capsys, shape):
    assert main(["bench", "--model", shape, "--random-weights", "--method", "divprune:tokens=9", *SMALL]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].startswith("prefill is ") and "with all visual tokens free you gain at most" in out.splitlines()[0]
    assert "divprune keeps 9 of 36 tokens per image (removes 75.0%)" in err and "beside them random:tokens=9, resize:tokens=9" in err
    lines = out.splitlines()[[set(line.strip()) == {"─"} for line in out.splitlines()].index(True) + 1 :]
    assert [line.split()[0] for line in lines[:4]] == ["none", "divprune:tokens=9", "random:tokens=9", "resize:tokens=9"]


def test_bench_json_and_file_hold_the_same(capsys, shape, tmp_path):
    file = tmp_path / "new" / "bench.json"
    argv = ["--model", shape, "--random-weights", "--method", "uniform:keep=0.25", "--batch-size", "1,2", "--json"]
    assert main(["bench", *argv, *SMALL, "--output", str(file)]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == json.loads(file.read_text()) and "prefill is" in err
    said = json.loads(out)
    assert [(r["method"], r["batch_size"]) for r in said["rows"]][::4] == [("none", 1), ("none", 2)]
    assert said["meta"]["command"].startswith("mllm-efficient bench --model") and "--batch-size 1,2" in said["meta"]["command"]
    assert len(said["meta"]["ceiling"]) == 2


def test_bench_of_a_model_with_a_processor_measures_preprocessing(capsys):
    argv = ["--model", "builtin", "--method", "divprune:tokens=36", "--image-size", "200x100", "--text-tokens", "40", "--json", *SMALL[2:]]
    assert main(["bench", *argv]) == 0
    said = json.loads(capsys.readouterr().out)
    assert all(r["preprocess_ms"]["n"] == 2 and r["visual_tokens_full"] == 144 for r in said["rows"])
    workload = said["meta"]["workload"]
    assert (workload["text_tokens"], workload["image_size"], workload["prompt_tokens"]) == (40, [200, 100], 184)
    assert said["meta"]["image_processor"] and said["meta"]["preprocess"] == "by the model's processor"


def test_a_failed_arm_is_exit_code_1(capsys, shape, tmp_path):
    (tmp_path / "bad.py").write_text(
        "from dataclasses import dataclass\nimport mllm_efficient as me\n@me.register('bad_bench')\n@dataclass(frozen=True, kw_only=True)\n"
        "class Bad(me.Selector):\n    def score(self, v):\n        raise RuntimeError('broken')\n"
    )
    argv = ["--import", str(tmp_path / "bad.py"), "--model", shape, "--random-weights", "--method", "bad_bench:tokens=9", "--json", *SMALL]
    assert main(["bench", *argv]) == 1
    out, err = capsys.readouterr()
    rows = {r["method"]: r for r in json.loads(out)["rows"]}
    assert rows["bad_bench:tokens=9"]["failed"] == "RuntimeError: broken" and rows["none"]["failed"] is None
    assert "failed: bad_bench:tokens=9 at batch 1: RuntimeError: broken" in err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--batch-size", "1,x"], "such as 1,8"),
        (["--batch-size", "0"], "such as 1,8"),
        (["--image-size", "336"], "WIDTHxHEIGHT"),
        (["--image-size", "336x0"], "WIDTHxHEIGHT"),
        (["--images", "0"], "--images"),
        (["--method", "divprun:keep=0.1"], "did you mean 'divprune'"),
        (["--method", "divprune:tokens=577"], "more than the 576"),
        (["--image-size", "500x300"], "no effect with random weights: this tower takes 336x336"),
        (["--text-tokens", "2", "--images", "2"], "at least 3"),
        (["--max-batch"], "needs a CUDA device"),
        (["--max-batch-limit", "4"], "no effect without --max-batch"),
        (["--overhead", "--selection"], "give one of them"),
        (["--overhead", "--method", "divprune:keep=0.1"], "--method has no effect with --overhead"),
        (["--selection"], "runs no model"),
        (["--device-map", "auto"], "--device-map has no effect with --random-weights"),
        (["--revision", "main"], "--revision has no effect with --random-weights"),
        (["--dtype", "float8"], "float8"),
        (["--device", "cuda:9"], "cannot be used"),
        (["--quantized", "int3"], "int3"),
        (["--quantized", "int4"], "int4 weights need a CUDA device"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_bad_usage_is_one_line(capsys, tmp_path, monkeypatch, argv, says):
    config = shrunk("llava-1.5-7b")
    assert says in fails(capsys, "--model", write_config(tmp_path / "m", config), "--random-weights", *argv, *SMALL[2:])


def test_a_bad_model_is_one_line(capsys, tmp_path):
    assert "did you mean 'llava-1.5-7b'" in fails(capsys, "--model", "llava-1.5-7", "--random-weights")
    assert "add --random-weights" in fails(capsys, "--model", "llava-1.5-7b")
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    assert "BertModel" in fails(capsys, "--model", tmp_path, "--random-weights")
    (tmp_path / "config.json").write_text("no json")
    assert "not a model's configuration" in fails(capsys, "--model", tmp_path, "--random-weights")
    assert "at least" in fails(capsys, "--model", "builtin", "--text-tokens", "1")


def test_an_output_that_cannot_be_written_is_said_before_anything_runs(capsys, shape, tmp_path):
    (tmp_path / "file").write_text("")
    argv = ("--model", shape, "--random-weights", "--output")
    assert "cannot be written" in fails(capsys, *argv, tmp_path / "file" / "x.json")
    fails(capsys, *argv, tmp_path / "x.json", "--method", "divprune:tokens=37")
    assert not (tmp_path / "x.json").exists()


def test_the_overhead_command(capsys, shape):
    assert main(["bench", "--model", shape, "--random-weights", "--overhead", "--batch-size", "1,2", *SMALL]) == 0
    assert "wrapped/bare [95%]" in capsys.readouterr().out
    assert main(["bench", "--model", shape, "--random-weights", "--overhead", "--json", *SMALL]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["rows"][0]["ratio"]["n"] == 2 and said["meta"]["workload"]["prompt_tokens"] == 66


def test_the_cost_of_methods_is_over_the_product_of_one_run(capsys, monkeypatch):
    """Every method on the same tokens at the shapes' budgets, in turn with the product."""
    monkeypatch.setattr(selection.cost_of_methods, "__defaults__", (lambda: None, ((40, 16, 5, (5, 8)), (30, 8, 4, (5, 6)))))
    no_product = ("none", "resize", "native", "flowcut", "pixelprune")  # they set the processor, or work in the tower or before it
    specs = [n for n in BUILTIN if me.get_method(n).kind == "pre_llm" and n not in no_product]
    assert main(["bench", "--selection", "--repeats", "2", "--warmup", "0", "--json", *(w for s in specs for w in ("--method", s))]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(r["method"], r["n"], r["k"]) for r in rows] == [(s, n, k) for n, k in ((40, 5), (30, 4)) for s in specs]
    assert all(r["ms"]["n"] == r["over_product"]["n"] == 2 and r["failed"] is None for r in rows)
    assert main(["bench", "--selection", "--repeats", "2", "--warmup", "0", "--method", "vispruner:r=0.2"]) == 0
    assert "vispruner:r=0.2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "spec, says", [("fastv", "fastv does not work on tokens before"), ("resize", "resize does not"), ("divprune:keep=0.5", "keep")]
)
def test_what_has_no_selection_to_time_is_refused(capsys, spec, says):
    assert main(["bench", "--selection", "--method", spec]) == 2
    assert says in capsys.readouterr().err


def test_the_selection_command(capsys, monkeypatch):
    monkeypatch.setattr(selection, "SHAPES", ((40, 16, 5),))
    monkeypatch.setattr(selection.selection_rows, "__defaults__", (((40, 16, 5),),))
    assert main(["bench", "--selection", "--repeats", "2", "--warmup", "0"]) == 0
    assert "40 x 16 -> 5" in capsys.readouterr().out
    threads = torch.get_num_threads()
    argv = ["--repeats", "2", "--warmup", "0", "--dtype", "bfloat16", "--threads", str(threads + 1), "--json"]
    assert main(["bench", "--selection", *argv]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["meta"]["machine"]["threads"] == threads + 1 and torch.get_num_threads() == threads
    assert said["meta"]["dtype"] == "bfloat16" and {"versions", "machine", "seed", "command"} <= set(said["meta"])


def test_help_imports_no_torch():
    code = "import sys\nfrom mllm_efficient.cli import main\nassert main(['bench', '--help']) == 0\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--max-batch" in done.stdout


def test_a_busy_machine_is_said():
    state = machine()
    assert busy({**state, "load_average": [3.0, 1.0, 1.0], "cpus_usable": 2}) is not None
    assert busy({**state, "load_average": [0.2, 1.0, 1.0], "cpus_usable": 2}) is None
    assert busy({**state, "load_average": None}) is None
