"""Servers under load: the same requests for all in turn, totals checked, and what has no effect is refused."""

from __future__ import annotations

import json

import pytest
import torch

import mllm_efficient as me
from mllm_efficient.cli import main
from mllm_efficient.eval.builtin.suite import samples
from mllm_efficient.loading.models import ModelOptions, builtin_folder, load
from mllm_efficient.measure.launching import Launch
from mllm_efficient.measure.serving import Load, Served, measure, runs, table, uncompressed
from mllm_efficient.patches import adapter_for
from mllm_efficient.patches.base import smaller_pixels
from mllm_efficient.patches.vllm.shapes import Shapes
from mllm_efficient.trained.export import export

from ..vllm_models import needs_vllm

LOAD = Load((144, 144), text_tokens=10, output_tokens=4, concurrency=(1, 8), repeats=3, warmup=1, seed=5)


class Tool:
    """Stands in for vLLM's benchmark tool: a server takes a tenth of a second for each prompt token."""

    def __init__(self, **lengths):
        self.lengths, self.calls = lengths, []

    def __call__(self, url, model, tokenizer, **asked):
        self.calls.append((url, asked["concurrency"], asked["seed"]))
        n, length = asked["requests"], self.lengths[url] + asked["text_tokens"]
        times = {f"p{p}_{name}_ms": length + p for p in (50, 99) for name in ("ttft", "tpot", "e2el")}
        return {
            "completed": n, "total_output_tokens": n * asked["output_tokens"], "total_input_tokens": n * length,
            "request_throughput": 10 / length, "output_throughput": 40 / length, **times,
        }  # fmt: skip


def arms(**counts):
    return [
        Served(name=name, role="method" if i else "baseline", url=name, model="m", tokenizer="t", full=144, kept=k, length=k)
        for i, (name, k) in enumerate(counts.items())
    ]


def test_servers_take_turns_on_the_same_requests():
    tool = Tool(none=144, pruned=36)
    rows = measure(arms(none=144, pruned=36), LOAD, tool)
    assert [(r["method"], r["concurrency"], r["requests"]) for r in rows] == [
        ("none", 1, 16), ("pruned", 1, 16), ("none", 8, 32), ("pruned", 8, 32)
    ]  # fmt: skip
    one = [(url, seed) for url, c, seed in tool.calls if c == 1]
    assert sorted(one) == [(url, 5 + turn) for url in ("none", "pruned") for turn in (1, 2, 3, 4)]
    assert [{url for url, _ in one[i : i + 2]} for i in range(0, 8, 2)] == [{"none", "pruned"}] * 4  # in an order that is drawn
    assert len(tool.calls) == runs(arms(none=144, pruned=36), LOAD) == 16
    pruned = rows[3]
    assert pruned["requests_per_s"]["n"] == 3 and pruned["prompt_tokens"]["median"] == 32 * 46
    assert pruned["requests_ratio"] == {"median": round(154 / 46, 5), "low": round(154 / 46, 5), "high": round(154 / 46, 5), "n": 3}
    assert rows[2]["visual_tokens_kept"] == 144 and pruned["ttft_ratio"]["median"] < 1
    header, lines = table(rows)
    assert all(len(line) == len(header) for line in lines) and "3.35 [3.35, 3.35]" in lines[3]


def test_prompts_of_another_length_than_the_method_leaves_fail_the_arm():
    rows = measure(arms(none=144, pruned=36), LOAD, Tool(none=144, pruned=144))
    assert rows[0]["failed"] is None and "2464 tokens where 736 are left of 2464" in rows[1]["failed"]
    header, lines = table(rows)
    assert all(len(line) == len(header) for line in lines)


@pytest.mark.parametrize(
    "change, says",
    [({"completed": 15}, "1 of 16 requests failed"), ({"total_output_tokens": 63}, "63 tokens were generated where 64 were asked")],
)
def test_requests_that_fail_or_stop_early_fail_the_arm(change, says):
    tool = Tool(none=144, pruned=36)

    def ask(url, *args, **asked):
        return {**tool(url, *args, **asked), **(change if url == "pruned" else {})}

    rows = measure(arms(none=144, pruned=36), Load((144, 144), concurrency=(1,), output_tokens=4), ask)
    assert says in rows[1]["failed"] and rows[0]["failed"] is None and rows[1]["requests_ratio"] is None


def test_a_server_that_compresses_nothing_is_named():
    given = [*arms(none=144), *(Served(name=n, role="method", url=n, model="m", tokenizer="t") for n in ("same", "less"))]
    rows = measure(given, LOAD, Tool(none=144, same=144, less=36))
    assert uncompressed(rows) == ["same"]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--concurrency", "8"], "--concurrency has no effect without --server or --backend vllm"),
        (["--serve-args=-x"], "--serve-args has no effect without"),
        (["--backend", "vllm", "--batch-size", "8"], "--batch-size has no effect with --backend vllm"),
        (["--backend", "sglang"], "--backend 'sglang' is not one of transformers, vllm"),
        (["--backend", "vllm", "--server", "http://x/v1"], "give one of the two"),
        (["--backend", "vllm", "--server-model", "x"], "--server-model has no effect with --backend vllm"),
        (["--server", "http://x/v1", "--method", "divprune:tokens=9"], "--method has no effect with --server"),
        (["--server", "http://x/v1", "--overhead"], "--overhead has no effect with --server"),
        (["--backend", "vllm", "--concurrency", "0"], "--concurrency '0' is not one or several whole numbers"),
    ],
)
def test_what_has_no_effect_is_refused(capsys, arguments, says):
    assert main(["bench", *arguments]) == 2
    assert says in capsys.readouterr().err


def plans(tmp_path, *methods, model="builtin", random_weights=False, images=1):
    options = ModelOptions(model, device="cpu")
    return Launch(options, [me.build(m) for m in methods], random_weights=random_weights, image_size=None, images=images).plans(tmp_path)


def test_what_each_server_is_started_with(tmp_path):
    none, divprune, smaller, pool = plans(tmp_path, "divprune:tokens=36", "resize:tokens=36", "pool:tokens=18", images=2)
    assert none.source == divprune.source == pool.source == str(builtin_folder()) and none.arguments == ()
    assert json.loads(divprune.arguments[1]) == {"visual_token_compression": me.DivPrune(tokens=36).to_dict()}
    assert [(p.full, p.kept, p.length) for p in (none, divprune, smaller, pool)] == [
        (288, 288, 288), (288, 72, 72), (288, 72, 72), (288, 32, 32)
    ]  # fmt: skip
    assert json.loads((tmp_path / "arm2" / "config.json").read_text())["vision_config"]["image_size"] == 72


def test_a_shape_is_served_without_weights(tmp_path):
    none, smaller = plans(tmp_path, "resize:tokens=64", model="bench-0.3b", random_weights=True)
    assert none.arguments == smaller.arguments == ("--load-format", "dummy") and (none.kept, smaller.kept) == (576, 64)
    import transformers

    for plan in (none, smaller):
        assert not list((tmp_path / plan.source).glob("*.safetensors"))
        processor = transformers.AutoProcessor.from_pretrained(plan.source)
        text = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w5 w9"}]}], add_generation_prompt=True
        )
        inputs = processor(text=[text], images=[samples("test", 1)[0].picture(100)], return_tensors="pt")
        assert int((inputs["input_ids"] == 7999).sum()) == plan.length
    assert json.loads((tmp_path / "arm1" / "config.json").read_text())["vision_config"]["image_size"] == 112


@pytest.mark.parametrize(
    "method, model, says",
    [
        ("fastv:ratio=0.5", "builtin", "inside the decoder"),
        ("divprune:tokens=200", "builtin", "tokens=200"),
        ("divprune:tokens=64", "qwen2.5-vl-7b", "give --server NAME=URL for each"),
        ("tokenflex:tokens=36", "bench-0.3b", "tokenflex needs its weights"),
        ("resize:tokens=640", "llava-1.6-7b", "makes the picture itself smaller"),
    ],
)
def test_what_cannot_be_served_is_told_before_anything_starts(tmp_path, method, model, says):
    with pytest.raises(me.MllmEfficientError, match=says):
        plans(tmp_path, method, model=model, random_weights=model != "builtin")
    assert list(tmp_path.iterdir()) == []


def test_an_exported_smaller_model_is_resize_in_transformers(tmp_path):
    """The same features of the same smaller pixels, bit for bit; the processor makes pictures of that size."""
    loaded = load(ModelOptions(device="cpu"))
    export(load(ModelOptions(device="cpu")), me.Resize(tokens=36), tmp_path / "r")
    small = load(ModelOptions(str(tmp_path / "r"), device="cpu"))
    assert json.loads((tmp_path / "r" / "config.json").read_text())["architectures"] == ["LlavaForConditionalGeneration"]
    inputs = loaded.inputs([loaded.prompt("What is it?", 1)], [samples("test", 1)[0].picture(144)])
    adapter = adapter_for(loaded.model)
    own = adapter.encode(adapter.items(inputs), frozenset(), [(6, 6)])[0].features
    with torch.no_grad():
        theirs = small.model.model.get_image_features(pixel_values=smaller_pixels(inputs["pixel_values"], 72, 72), return_dict=True)
    assert torch.equal(theirs.pooler_output[0], own)
    again = small.inputs([small.prompt("What is it?", 1)], [samples("test", 1)[0].picture(144)])
    assert again["pixel_values"].shape[-2:] == (72, 72) and Shapes(small.model.config).adapter.usual().n == 36
    assert inputs["input_ids"].shape[1] - again["input_ids"].shape[1] == 144 - 36


def test_a_smaller_model_takes_no_other_counts(tmp_path, capsys):
    assert main(["export", "--method", "resize:tokens=36", "--allowed-tokens", "16", "--output-dir", str(tmp_path / "r")]) == 2
    assert "requests cannot ask for other counts of a smaller model" in capsys.readouterr().err and not (tmp_path / "r").exists()


@needs_vllm
@pytest.mark.slow
def test_bench_starts_servers_and_checks_their_prompts(tmp_path, capsys):
    arguments = ["--method", "divprune:tokens=36", "--concurrency", "2", "--requests", "4", "--repeats", "2", "--warmup", "0"]
    arguments += ["--output-tokens", "4", "--text-tokens", "8", "--serve-args", "--enforce-eager", "--output", str(tmp_path / "b.json")]
    assert main(["bench", "--backend", "vllm", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    none, pruned = found["rows"]
    assert none["prompt_tokens"]["median"] - pruned["prompt_tokens"]["median"] == 4 * (144 - 36)
    assert none["requests_per_s"]["n"] == 2 and pruned["requests_ratio"]["low"] > 0 and found["meta"]["caches"].startswith("off")
    assert json.loads((tmp_path / "b.json").read_text())["meta"]["servers"]["none"].startswith("vllm serve ")
