"""Benchmarks: turns are interleaved, TTFT holds vision and method, the baseline is the bare model, and the sums are right.

Nothing here asserts how long anything takes. Where times matter, a clock that only the model's own parts move says them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

import mllm_efficient as me
from mllm_efficient.apply.stopwatch import Stopwatch
from mllm_efficient.cli import main
from mllm_efficient.loading.models import Loaded, ModelOptions
from mllm_efficient.measure import bench as bench_module
from mllm_efficient.measure import memory, random_model, selection
from mllm_efficient.measure.arms import BASELINE, METHOD, REFERENCE, TEXT_ONLY, Arm, arms_for, free_choice
from mllm_efficient.measure.bench import Bench, Settings
from mllm_efficient.measure.machine import busy, machine
from mllm_efficient.measure.overhead import overhead_row
from mllm_efficient.measure.rows import ceiling, rows_of, table
from mllm_efficient.measure.shapes import shape_config, shape_names
from mllm_efficient.measure.timing import Clock, Series, clock_for, interleave, orders, paired, spread
from mllm_efficient.measure.workload import Workload, make_inputs, text_ids
from mllm_efficient.patches import adapter_for
from mllm_efficient.registry import BUILTIN

from .families import FAMILIES as HOSTS
from .families import tiny

N, LAYERS = 36, 2
TINY = {
    "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "image_token_index": 99, "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default", "image_seq_length": N, "tie_word_embeddings": True,
    "text_config": {
        "model_type": "llama", "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "tie_word_embeddings": True,
    },
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 48, "patch_size": 8,
    },
}  # fmt: skip
PHASES = ("vision_ms", "compress_ms", "prefill_ms", "ttft_ms", "tpot_ms", "e2e_ms", "tokens_per_s")
CONTRACT = (
    "method", "batch_size", "preprocess_ms", *PHASES, "peak_memory_mb", "kv_cache_mb", "visual_tokens_kept", "flops_ratio"
)  # fmt: skip


def write_config(folder, config) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def shape(tmp_path_factory) -> str:
    """A folder with nothing but the config.json of a tiny LLaVA of 36 tokens per image."""
    return write_config(tmp_path_factory.mktemp("shape"), TINY)


@pytest.fixture
def loaded(shape):
    return random_model.random_model(ModelOptions(model=shape))


class Hand(Clock):
    """A clock that stands still unless somebody moves it."""

    def __init__(self):
        self.seconds = 0.0
        super().__init__(lambda: self.seconds)


@pytest.fixture
def charged(loaded, registered):
    """A model and a clock: the tower takes 7 s, the method ``slow`` 5 s an image, the decoder 1 s a token of a row."""
    clock = Hand()

    def tower(module, args, kwargs):
        clock.seconds += 7

    def decoder(module, args, kwargs):
        clock.seconds += kwargs["inputs_embeds"].shape[1]

    loaded.model.model.vision_tower.register_forward_pre_hook(tower, with_kwargs=True)
    loaded.model.model.language_model.register_forward_pre_hook(decoder, with_kwargs=True)

    @registered("slow")
    @dataclass(frozen=True, kw_only=True)
    class Slow(me.Selector):
        def score(self, v):
            clock.seconds += 5
            return v.features.sum(1)

    return loaded, clock


def run(loaded, *methods, clock=None, quantized=None, **settings):
    """Rows by (method, quantization), and meta, of a small benchmark."""
    workload = settings.pop("workload", Workload(text_tokens=10, output_tokens=3))
    bench = Bench(
        loaded,
        [me.build(m) for m in methods],
        Settings(workload, **{"repeats": 2, "warmup": 1, **settings}),
        clock=clock,
        quantized=quantized,
    )
    rows, meta = bench.run()
    return rows, meta


# ------------------------------------------------------------------------------------------------ timing


@pytest.mark.parametrize(("warmup", "repeats"), [(0, 1), (0, 3), (2, 2)])
def test_repeats_are_interleaved_and_the_first_rounds_thrown_away(warmup, repeats):
    clock, order = Hand(), []
    arms = [Series(name) for name in "ABC"]

    def turn(arm):
        order.append(arm.name)
        clock.seconds += len(order)
        return {"turn": len(order)}

    interleave(arms, turn, warmup=warmup, repeats=repeats)
    rounds = ["".join(order[3 * r : 3 * r + 3]) for r in range(warmup + repeats)]
    assert len(order) == 3 * len(rounds) and all(sorted(r) == list("ABC") for r in rounds)
    assert all(back == there[::-1] for there, back in zip(rounds[::2], rounds[1::2]))
    assert arms[1].values("turn") == [3 * r + rounds[r].index("B") + 1 for r in range(warmup, warmup + repeats)]


@pytest.mark.parametrize("repeats", [4, 7, 10, 30])
@pytest.mark.parametrize("seed", range(5))
def test_equal_arms_on_a_machine_that_becomes_slower_are_equal(repeats, seed):
    """0.4% from turn to turn: by itself in every round, and on and on."""
    for again in (True, False):
        ms = np.empty((12, repeats))
        for round_, order in enumerate(orders(12, repeats, seed)):
            for place, arm in enumerate(order):
                ms[arm, round_] = 1.004 ** (place if again else 12 * round_ + place)
        for arm in ms[1:]:
            ratio = paired(arm, ms[0])
            assert ratio["low"] <= 1 <= ratio["high"]
    fixed = paired(1.004 ** np.full(repeats, 11.0), np.ones(repeats))
    assert fixed["low"] > 1.04  # what one order for all rounds gives


def test_an_arm_that_fails_is_left_out_and_the_others_go_on():
    order, steps = [], []

    def turn(arm):
        order.append(arm.name)
        if arm.name == "B" and order.count("B") == 2:
            raise RuntimeError("no\n more   memory")
        return {"ms": 1.0}

    arms = [Series(name) for name in "AB"]
    interleave(arms, turn, warmup=0, repeats=4, done=lambda: steps.append(1))
    assert sorted("".join(order)) == sorted("ABABAA") and len(steps) == 8
    assert arms[1].failed == "RuntimeError: no more memory" and arms[1].values("ms") == [] and len(arms[0].values("ms")) == 4


def test_an_interrupt_is_no_failure_of_an_arm():
    def turn(arm):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interleave([Series("A")], turn, warmup=0, repeats=1)


def test_a_clock_measures_what_moves_it():
    clock = Hand()

    def work():
        clock.seconds += 0.25
        return "done"

    assert clock.run(work) == (250.0, "done")
    assert type(clock_for([])) is Clock


def test_medians_and_quartiles():
    assert spread([1.0, 2.0, 3.0, 4.0, 10.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0, "n": 5}
    assert spread([]) is None


def test_ratios_are_paired_by_repeat():
    drift = [10.0, 100.0, 1000.0, 20.0, 5.0]  # the machine gets slower and faster, both arms alike
    assert paired([v / 2 for v in drift], drift) == {"median": 0.5, "low": 0.5, "high": 0.5, "n": 5}
    noisy = paired([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    assert noisy["median"] == 2 and 1 <= noisy["low"] < 2 < noisy["high"] <= 3
    assert paired([], [1.0]) is None
    with pytest.raises(ValueError, match="not pairs"):
        paired([1.0], [1.0, 2.0])


# ---------------------------------------------------------------------------------------- phases and arms


def test_ttft_holds_vision_and_method_and_is_measured_by_itself(charged):
    loaded, clock = charged
    rows, _ = run(loaded, "slow:tokens=9", clock=clock)
    none, slow, free = rows[0], rows[1], rows[2]
    assert [r["method"] for r in rows] == ["none", "slow:tokens=9", "random:tokens=9", "resize:tokens=9"]
    at = {"n": 2}
    for row, method, kept in ((none, 0, 36), (slow, 5, 9), (free, 0, 9)):
        expected = {
            "vision_ms": 7, "compress_ms": method, "prefill_ms": 10 + kept,
            "ttft_ms": 7 + method + 10 + kept, "tpot_ms": 1, "e2e_ms": 7 + method + 10 + kept + 2,
        }  # fmt: skip
        assert {k: row[k] for k in expected} == {k: {"median": 1000 * v, "q1": 1000 * v, "q3": 1000 * v, **at} for k, v in expected.items()}
        assert row["tokens_per_s"]["median"] == pytest.approx(3 / expected["e2e_ms"], abs=1e-4)
        assert row["visual_tokens_kept"] == kept and row["visual_tokens_full"] == 36
    assert none["ttft_ratio"]["median"] == 1 and none["ideal_reached"] is None
    assert slow["ttft_ratio"]["median"] == pytest.approx(31 / 53, abs=1e-5)
    assert slow["ideal_reached"] == pytest.approx(slow["flops_ratio"] * 53 / 31, abs=1e-3)
    assert slow["free_choice_reached"]["median"] == pytest.approx(26 / 31, abs=1e-5)
    assert free["free_choice_reached"] is None


def test_the_baseline_is_the_bare_model_and_arms_take_turns(charged):
    from mllm_efficient.apply.wrap import method_of

    loaded, clock = charged
    seen = []

    def tower(module, args, kwargs):
        method = method_of(loaded.model)
        seen.append(method and method.name)

    loaded.model.model.vision_tower.register_forward_pre_hook(tower, with_kwargs=True)
    run(loaded, "uniform:tokens=9", clock=clock, repeats=2, warmup=0)
    # Each turn runs the tower twice: for the phases, which wrap nothing, and in generate. At the end generate for the memory.
    arms = [None, "uniform", "random", "resize"]
    rounds = [seen[1:8:2], seen[9:16:2]]
    assert seen[:16:2] == [None] * 8 and seen[16:] == arms
    assert sorted(map(str, rounds[0])) == sorted(map(str, arms)) and rounds[1] == rounds[0][::-1]  # drawn, and taken backwards
    assert method_of(loaded.model) is None


def test_a_batch_makes_tokens_for_every_row(charged):
    loaded, clock = charged
    rows, _ = run(loaded, clock=clock, batch_sizes=(1, 4))
    assert [r["batch_size"] for r in rows] == [1, 4]
    assert rows[1]["tokens_per_s"]["median"] == pytest.approx(4 * rows[0]["tokens_per_s"]["median"], abs=1e-3)
    assert rows[0]["visual_tokens_kept"] == rows[1]["visual_tokens_kept"] == 36
    assert rows[1]["kv_cache_mb"] == pytest.approx(4 * rows[0]["kv_cache_mb"], abs=2e-3)


def test_the_cache_is_as_large_as_its_keys_and_values(loaded):
    rows, _ = run(loaded, "uniform:tokens=9", workload=Workload(text_tokens=100, output_tokens=5))
    for row in rows[:3]:
        tokens = 100 + row["visual_tokens_kept"] + 4  # the last token is not fed back
        assert row["kv_cache_mb"] == pytest.approx(LAYERS * 2 * 2 * 8 * 4 * tokens / 1e6, abs=5e-4)


def test_one_output_token_has_no_time_per_further_token(loaded):
    rows, _ = run(loaded, workload=Workload(text_tokens=5, output_tokens=1), repeats=1)
    assert rows[0]["tpot_ms"] is None and rows[0]["ttft_ms"]["n"] == 1


def arms_of(loaded, *methods):
    adapter = adapter_for(loaded.model)
    item = adapter.items(make_inputs(loaded, adapter, Workload(text_tokens=5), 1).call)[0]
    return arms_for(adapter, item, [me.build(m) for m in methods])


def test_every_budget_has_a_free_choice_and_a_smaller_picture(loaded):
    arms, left_out = arms_of(loaded, "divprune:keep=0.25", "uniform:tokens=9", "pool:tokens=20", "none", "divprune:keep=1.0")
    assert [(a.name, a.role, a.kept) for a in arms] == [
        ("none", BASELINE, 36),
        ("divprune:keep=0.25", METHOD, 9),
        ("uniform:tokens=9", METHOD, 9),
        ("pool:tokens=20", METHOD, 20),
        ("divprune:keep=1.0", METHOD, 36),
        ("random:tokens=9", REFERENCE, 9),
        ("resize:tokens=9", REFERENCE, 9),
        ("random:tokens=20", REFERENCE, 20),
        ("resize:tokens=20", REFERENCE, 16),
    ]
    assert left_out == {} and free_choice(arms[1], arms).name == "random:tokens=9"
    assert not arms[0].wrapped and all(a.wrapped for a in arms[1:])


def test_references_that_are_there_already_are_not_added(loaded):
    arms, _ = arms_of(loaded, "random:keep=0.25", "resize:tokens=9", "divprune:keep=0.25", "divprune:keep=0.25")
    assert [a.name for a in arms] == ["none", "random:keep=0.25", "resize:tokens=9", "divprune:keep=0.25"]


def test_a_reference_that_cannot_run_is_left_out_with_the_reason(tmp_path):
    config = shrunk("llava-1.6-7b")
    loaded = random_model.random_model(ModelOptions(model=write_config(tmp_path / "next", config)))
    arms, left_out = arms_of(loaded, "divprune:tokens=1")
    assert [a.name for a in arms] == ["none", "divprune:tokens=1", "random:tokens=1"]
    assert "smallest picture" in left_out["resize:tokens=1"]


def test_rows_have_what_the_contract_says(loaded):
    rows, meta = run(loaded, "divprune:tokens=9", repeats=3)
    for row in rows:
        assert set(CONTRACT) <= set(row)
        assert row["failed"] is None and row["preprocess_ms"] is None
        for name in PHASES:
            assert set(row[name]) == {"median", "q1", "q3", "n"} and row[name]["n"] == 3
            assert 0 <= row[name]["q1"] <= row[name]["median"] <= row[name]["q3"]
    assert rows[0]["flops_ratio"] == 1 and rows[0]["compress_ms"]["median"] == 0
    assert rows[2]["flops_ratio"] < rows[1]["flops_ratio"] < 1  # a free choice costs less than one that looks
    assert rows[1]["method_ms"]["median"] <= rows[1]["compress_ms"]["median"]
    wanted = {
        "versions", "device", "dtype", "attention", "seed", "weights", "workload", "methods", "ceiling", "machine", "machine_after",
        "clock", "peak_memory", "meaning", "order", "repeats", "warmup", "weights_mb",
    }  # fmt: skip
    assert wanted <= set(meta) and json.dumps(meta, allow_nan=False)
    assert meta["weights"] == "random, seed 0" and meta["methods"][1] == {"method": "divprune", "tokens": 9}
    assert {"cpu", "threads", "load_average", "cpu_count"} <= set(meta["machine"])
    assert len(table(rows)[0]) == len(table(rows)[1][0])


def test_a_failing_arm_is_one_failed_row(loaded, registered):
    @registered("broken")
    @dataclass(frozen=True, kw_only=True)
    class Broken(me.Selector):
        def score(self, v):
            raise RuntimeError("CUDA out of memory, or what else breaks")

    rows, meta = run(loaded, "broken:tokens=9", "uniform:tokens=9")
    bad = next(r for r in rows if r["method"] == "broken:tokens=9")
    assert "out of memory" in bad["failed"] and all(bad[name] is None for name in (*PHASES, "peak_memory_mb", "ttft_ratio"))
    assert all(r["failed"] is None and r["ttft_ms"]["n"] == 2 for r in rows if r is not bad)
    assert len(meta["failed"]) == 1 and "broken" in meta["failed"][0]
    assert any("failed" in cell for line in table(rows)[1] for cell in line)


def test_quantized_weights_are_a_second_set_of_arms(loaded):
    pytest.importorskip("torchao")
    int8 = random_model.random_model(replace(loaded.options, quantization="int8"))
    linear = sum(
        p.numel() for m in loaded.model.modules() if isinstance(m, torch.nn.Linear) for n, p in m.named_parameters() if n == "weight"
    )
    linear -= loaded.model.lm_head.weight.numel()
    saved = memory.weights_mb(loaded.model) - memory.weights_mb(int8.model)
    assert 0.8 * 3 * linear < 1e6 * saved < 3 * linear  # four bytes become one, and each row gets a scale
    rows, _ = run(loaded, "uniform:tokens=9", quantized=int8, repeats=1, warmup=0)
    names = ["none", "uniform:tokens=9", "random:tokens=9", "resize:tokens=9"]
    assert [(r["method"], r["quantization"]) for r in rows] == [(n, q) for q in (None, "int8") for n in names]
    assert all(r["failed"] is None for r in rows) and rows[5]["ideal_reached"] is None and rows[5]["ttft_ratio"] is not None


# ----------------------------------------------------------------------------------------------- ceiling


def arm_with(role=BASELINE, name="none", kept=36, **samples) -> Arm:
    return Arm(name=name, samples=samples, method=me.build("none"), role=role, model=None, kept=kept)


def test_the_ceiling_is_what_the_text_alone_takes_with_the_tower_still_running():
    base = arm_with(e2e_ms=[1000.0, 2000.0], ttft_ms=[500.0, 1000.0], vision_ms=[100.0, 200.0], prefill_ms=[380.0, 760.0])
    text = arm_with(TEXT_ONLY, "text-only", e2e_ms=[400.0, 800.0], ttft_ms=[25.0, 50.0])
    found = ceiling(base, text, batch_size=1, output_tokens=32)
    assert (found["prefill_share"], found["vision_share"], found["gain_at_most"], found["gain_at_most_without_vision"]) == (
        0.38,
        0.1,
        2.0,
        2.5,
    )
    assert found["ttft_gain_at_most"] == 4.0
    assert found["line"].startswith("prefill is 38% of your end-to-end time; with all visual tokens free you gain at most 2.0x")
    text.failed = "gone"
    assert ceiling(base, text, batch_size=1, output_tokens=32) is None


def test_a_ceiling_below_1_is_not_measurable():
    base = arm_with(e2e_ms=[10.0], ttft_ms=[8.0], vision_ms=[2.0], prefill_ms=[3.0])
    text = arm_with(TEXT_ONLY, "text-only", e2e_ms=[9.0], ttft_ms=[5.0])
    found = ceiling(base, text, batch_size=1, output_tokens=4)
    assert found["gain_at_most"] < 1 and "you gain at most not measurable (to the first token 1.1x; 1.1x end to end" in found["line"]


def test_the_ceiling_is_measured_on_the_text_only_prompt(charged):
    loaded, clock = charged
    _, meta = run(loaded, clock=clock)
    (found,) = meta["ceiling"]
    assert found["text_only_ttft_ms"]["median"] == 10_000 and found["text_only_e2e_ms"]["median"] == 12_000
    assert found["gain_at_most"] == pytest.approx(55 / 19, abs=1e-4) and found["prefill_share"] == pytest.approx(46 / 55, abs=1e-4)


def test_a_failed_baseline_leaves_the_other_rows():
    base, other = arm_with(), arm_with(METHOD, "uniform:tokens=9", 9, ttft_ms=[1.0], e2e_ms=[2.0])
    base.failed = "OutOfMemoryError: batch 8"
    rows = rows_of([base, other], batch_size=8, images=1, full=36, flops_ratio=lambda arm: 0.5)
    assert rows[0]["failed"] and rows[1]["ttft_ms"]["median"] == 1 and rows[1]["ttft_ratio"] is None and rows[1]["ideal_reached"] is None


# ------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("limit", [1, 2, 7, 8, 16])
def test_the_largest_batch_is_found_by_doubling_and_halving(limit):
    for capacity in range(20):
        tried = []

        def fits(batch, capacity=capacity, tried=tried):
            tried.append(batch)
            return batch <= capacity

        assert memory.largest_batch(fits, limit) == min(capacity, limit)
        assert max(tried) <= limit and len(tried) == len(set(tried))


def test_only_a_lack_of_memory_does_not_fit():
    def raises(error):
        def work():
            raise error

        return work

    assert memory.fits_in_memory(lambda: None)
    assert not memory.fits_in_memory(raises(torch.OutOfMemoryError("full")))
    assert not memory.fits_in_memory(raises(RuntimeError("CUDA error: out of memory")))
    with pytest.raises(RuntimeError, match="shape"):
        memory.fits_in_memory(raises(RuntimeError("shape mismatch")))


def test_peak_memory_says_what_it_is(loaded, monkeypatch):
    peak, what, out = memory.peak_memory([], lambda: torch.ones(5_000_000).sum().item())
    assert out == 5_000_000
    assert (peak is None) == (what == memory.NOT_MEASURED)
    if peak is not None:
        assert peak > 20 and "VmHWM" in what
    monkeypatch.setattr(memory, "_reset_high_water_mark", lambda: False)
    rows, meta = run(loaded, repeats=1)
    assert rows[0]["peak_memory_mb"] is None and "null" in meta["peak_memory"] and rows[0]["kv_cache_mb"] > 0


def test_the_search_for_the_largest_batch_on_a_gpu(loaded, monkeypatch):
    """On a stand-in for a device that holds 5 rows of 36 visual tokens, or more of fewer."""
    sizes = []
    bench = Bench(loaded, [me.build("uniform:tokens=9")], Settings(Workload(text_tokens=10, output_tokens=2)))
    bench.settings = replace(bench.settings, max_batch=16)

    def generate(laps, arm, **more):
        rows = len(laps.inputs.call["input_ids"])
        sizes.append(rows)
        if rows * arm.kept > 5 * 36:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench_module.Laps, "generate", generate)
    found, errors = bench.largest_batches()
    assert errors == {} and found == {
        ("none", None): 5,
        ("uniform:tokens=9", None): 16,
        ("random:tokens=9", None): 16,
        ("resize:tokens=9", None): 16,
    }


# ---------------------------------------------------------------------------------------- random weights


def shrunk(name: str) -> dict:
    """A shipped shape with its own tokens and tiny layers."""
    config = shape_config(name)
    text, vision = config["text_config"], config["vision_config"]
    text |= {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    if "mrope_section" in text.get("rope_parameters", {}):
        text["rope_parameters"]["mrope_section"] = [2, 3, 3]
    if "depth" in vision:
        vision |= {
            "depth": 1,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 32,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [0],
        }
    else:
        vision |= {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config["vision_feature_layer"] = -1
    return config


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


def test_random_weights_take_dtype_and_attention(shape):
    model = random_model.random_model(ModelOptions(model=shape, dtype="bfloat16", attn_implementation="eager")).model
    assert model.dtype == torch.bfloat16 and model.config.get_text_config()._attn_implementation == "eager"


def test_every_shipped_shape_is_a_supported_model():
    for name in shape_names():
        with torch.device("meta"):
            from transformers import AutoModelForImageTextToText

            model = AutoModelForImageTextToText.from_config(random_model.config_of(name))
        assert adapter_for(model).decoder_layers > 0


def test_text_holds_no_placeholder(loaded):
    ids = text_ids(adapter_for(loaded.model), 5000, 0)
    assert 99 not in ids and 0 not in ids and ids.max() < 100


# ------------------------------------------------------------------------------- overhead and selection


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


# ----------------------------------------------------------------------------------------------- command


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
    assert [line.split()[0] for line in out.splitlines()[4:8]] == ["none", "divprune:tokens=9", "random:tokens=9", "resize:tokens=9"]


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
    specs = [n for n in BUILTIN if me.get_method(n).kind == "pre_llm" and n not in ("none", "resize")]
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
