"""Benchmarks: turns are interleaved, TTFT holds vision and method, the baseline is the bare model, and the sums are right.

Nothing here asserts how long anything takes. Where times matter, a clock that only the model's own parts move says them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

import mllm_efficient as me
from mllm_efficient.loading.models import ModelOptions
from mllm_efficient.measure import bench as bench_module
from mllm_efficient.measure import memory, random_model
from mllm_efficient.measure.arms import BASELINE, METHOD, REFERENCE, TEXT_ONLY, Arm, arms_for, free_choice
from mllm_efficient.measure.bench import Bench, Settings
from mllm_efficient.measure.rows import ceiling, rows_of, table
from mllm_efficient.measure.shapes import shape_config
from mllm_efficient.measure.timing import Clock, Series, clock_for, interleave, orders, paired, spread
from mllm_efficient.measure.workload import Workload, make_inputs
from mllm_efficient.patches import adapter_for

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


# ------------------------------------------------------------------------------- overhead and selection


# ----------------------------------------------------------------------------------------------- command
