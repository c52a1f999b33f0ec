"""``gpu_check``: every part on a CPU at tiny sizes, what a part says of wrong results, and that the others go on after one that fails."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import mllm_efficient as me
from mllm_efficient.apply.prepare import prepare
from mllm_efficient.measure import gpu_check, gpu_models, gpu_parts
from mllm_efficient.measure.gpu_parts import NOT_ON_CPU, Scale
from mllm_efficient.measure.timing import Clock
from mllm_efficient.measure.workload import Workload, make_inputs
from mllm_efficient.patches import adapter_for
from mllm_efficient.tokens import CompressedTokens

from .test_bench import write_config

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = {"llava": "LlavaForConditionalGeneration", "llava_next": "LlavaNextForConditionalGeneration"}


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    """What ``--scale`` takes: both families, some tokens, float32."""
    tiny, folder = yaml.safe_load((ROOT / "configs" / "doctor.yaml").read_text()), tmp_path_factory.mktemp("shapes")
    models = [write_config(folder / name, {**tiny[name]["config"], "architectures": [kind]}) for name, kind in ARCHITECTURES.items()]
    return {
        "models": models, "dtype": "float32", "keeps": [0.5, 0.25], "batch_sizes": [1, 2], "text_tokens": 8, "new_tokens": 4, "repeats": 2,
        "shapes": [[36, 16, 9, [6, 6]], [60, 16, 7, [6, 10]]], "batch": 3, "backend": "eager",
    }  # fmt: skip


@pytest.fixture(scope="module")
def file(sizes, tmp_path_factory):
    path = tmp_path_factory.mktemp("scale") / "scale.json"
    path.write_text(json.dumps(sizes))
    return path


@pytest.fixture(scope="module")
def scale(file):
    return gpu_parts.read_scale(file)


def run(name, scale, seconds=60.0):
    return gpu_check.run_part(gpu_check.parts_of(scale)[name], scale, "cpu", time.time() + seconds)


# --------------------------------------------------------------------------------------------- the parts


def test_the_parts_of_a_7b_check_are_these_the_most_telling_first():
    assert list(gpu_check.parts_of(Scale())) == [
        "ttft-llava-1.5-7b-sdpa", "ttft-llava-1.6-7b-sdpa", "kernel", "batches", "waits", "graph", "ttft-llava-1.5-7b-flash",
        "ttft-llava-1.6-7b-flash", "compiled",
    ]  # fmt: skip
    assert Scale().keeps == (0.5, 0.25, 0.1, 0.05) and Scale().batch_sizes == (1, 8) and Scale().dtype == "bfloat16"


@pytest.mark.parametrize(("name", "full"), [("llava", 16), ("llava_next", 80)])
def test_first_tokens_stand_beside_the_uncompressed_model(scale, name, full):
    found = run(f"ttft-{name}-sdpa", scale)
    assert found["status"] == "ok" and found["attention"] == "sdpa" and found["not_here"] == {}
    rows = found["rows"]
    expected = [(m, b) for b in (1, 2) for m in ("none", "divprune:keep=0.5", "divprune:keep=0.25")]
    assert [(r["method"], r["batch_size"]) for r in rows] == expected
    assert [r["visual_tokens_kept"] for r in rows[:3]] == [full, full // 2, full // 4]
    for row in rows:
        assert row["ttft_ms"]["n"] == 2 and row["ttft_ms"]["q1"] <= row["ttft_ms"]["median"] <= row["ttft_ms"]["q3"]
        assert row["baseline_ttft_ms"] == rows[3 * (row["batch_size"] - 1)]["ttft_ms"] and 0 < row["flops_ratio"] <= 1
        assert row["peak_memory_mb"] > 0 and row["kv_cache_mb"] > 0


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_flash_is_said_to_be_missing(scale, name, monkeypatch):
    assert run(f"ttft-{name}-flash", scale) == {"status": "not here", "reason": NOT_ON_CPU}
    monkeypatch.setattr(gpu_models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(gpu_parts.NotHere, match="not installed: flash_attn_interface or flash_attn"):
        gpu_models.flash("cuda")
    monkeypatch.setattr(gpu_models.importlib.util, "find_spec", lambda name: name == "flash_attn" or None)
    assert gpu_models.flash("cuda") == "flash_attention_2"


def test_the_kernel_part_names_what_a_cpu_cannot_show(scale, monkeypatch):
    found = run("kernel", scale)
    assert found["status"] == "ok" and found["not_here"] == {"fused kernel": NOT_ON_CPU, "targets_ms": NOT_ON_CPU}
    assert [row["loop_equals_naive"] for row in found["equal"]] == [True, True]
    assert [(row["n"], row["k"], row["select_ms"]["n"]) for row in found["rows"]] == [(36, 9, 10), (60, 7, 10)]
    monkeypatch.setattr(gpu_parts, "loop", lambda d, k: torch.arange(k))
    found = run("kernel", scale)
    assert found["status"] == "failed" and found["failed"][0] == "loop_equals_naive is false at 36 -> 9"


def test_batches_are_what_each_image_is_and_another_choice_is_seen(scale, registered):
    found = run("batches", scale)
    assert found["status"] == "ok" and found["not_here"] == {} and len(found["rows"]) == 6
    assert {row["method"] for row in found["rows"]} == {"scope", "visionzip", "divmerge"}
    assert any(row["shares_work"] for row in found["rows"])
    assert all(row["same_tokens"] and row["same_bits"] and row["largest_difference"] == 0 for row in found["rows"])

    @registered("first_of_many")
    @dataclass(frozen=True, kw_only=True)
    class FirstOfMany(me.Selector):
        shares_work = True

        def select(self, v, k):
            return torch.arange(k)

        def select_batch(self, parts, k):
            return torch.stack([torch.arange(k) + i for i in range(len(parts))])

    found = run("batches", replace(scale, alike=("first_of_many",)))
    assert found["status"] == "failed" and found["failed"][0] == (
        "first_of_many at 36 -> 9: a batch of 3 keeps other tokens than one image at a time"
    )


def test_merged_tokens_are_held_against_each_other_by_places_and_groups():
    x, groups = torch.zeros(2, 3), torch.tensor([0, 1, 1])
    one = CompressedTokens(x, indices=torch.tensor([0, 2]), groups=groups)
    assert gpu_parts._same_places(one, replace(one, features=x + 1))
    for other in (replace(one, groups=groups.flip(0)), replace(one, groups=None), replace(one, indices=torch.tensor([0, 1]))):
        assert not gpu_parts._same_places(one, other)


def test_the_host_s_reads_are_counted_and_its_waits_are_not_on_a_cpu(scale):
    found = run("waits", scale)
    assert found["status"] == "ok" and found["not_here"] == {"host_waits": NOT_ON_CPU}
    assert [row["method"] for row in found["rows"]] == list(scale.choosing)
    x = torch.arange(4.0)
    assert gpu_parts.host_reads(lambda: (x.sum() * 2).clamp(max=1)) == {}
    assert gpu_parts.host_reads(lambda: (x.max().item(), bool(x.min() > 0), x[x > 1])) == {"_local_scalar_dense": 2, "index": 1}


def test_waits_are_counted_among_a_profile_s_events():
    events = ["aten::mm", "cudaLaunchKernel", "cudaLaunchKernelExC", "cudaMemcpyAsync", "cudaStreamSynchronize", "cudaDeviceSynchronize"]
    events += ["Memcpy DtoH (Device -> Pageable)", "Memcpy HtoD (Pageable -> Device)", "cudaLaunchKernel"]
    assert gpu_parts.count_waits(events) == {"synchronisations": 1, "copies_to_host": 1, "launches": 3}
    with pytest.raises(RuntimeError, match="saw no kernel"):
        gpu_parts.count_waits(["aten::mm", "cudaStreamSynchronize"])


# ---------------------------------------------------------------------------------------------- decoding


def test_the_graph_part_decodes_what_generate_does(scale):
    found = run("graph", scale)
    assert found["status"] == "ok" and found["not_here"] == {"CUDA graph": NOT_ON_CPU}
    assert [(r["method"], r["prompt_tokens"]) for r in found["rows"]] == [("none", 24), ("divprune:keep=0.5", 16)]
    assert all(r["same_tokens_as_generate"] and r["static_tpot_ms"]["n"] == 2 for r in found["rows"])


@pytest.fixture
def decode(scale):
    loaded = gpu_models.built(scale, "cpu", scale.models[0])
    inputs = make_inputs(loaded, adapter_for(loaded.model), Workload(text_tokens=8, output_tokens=4), 2)
    with torch.no_grad():
        yield gpu_models.StaticDecode(loaded.model, prepare(loaded.model, me.build("divprune:tokens=5"), **inputs.call).model_kwargs, 4)


def test_a_step_asks_the_host_nothing_so_that_a_graph_can_hold_it(decode):
    assert gpu_parts.host_reads(decode.step) == {}


def test_a_recording_that_gives_other_tokens_or_none_is_seen(decode, scale):
    def wrong():
        decode.step()
        decode.token.add_(1)

    def broken():
        raise RuntimeError("no graph")

    row = gpu_models.timed_steps(decode, {"static": decode.step, "graph": wrong}, Clock(), scale, time.time())
    assert row["failed"] == ["graph gives other tokens than static"] and row["graph_over_static"]["n"] == 1
    row = gpu_models.timed_steps(decode, {"static": decode.step, "graph": broken}, Clock(), scale, time.time())
    assert row["failed"] == ["graph: RuntimeError: no graph"] and row["graph_tpot_ms"] is None and row["static_tpot_ms"]


@pytest.mark.slow
def test_compiled_decoding_compiles_and_says_where_it_breaks(scale, monkeypatch):
    found = run("compiled", scale)
    assert found["status"] == "ok", found
    assert [(r["method"], r["decode"]) for r in found["rows"]] == [
        (m, d) for m in ("none", "divprune:keep=0.5") for d in ("plain", "compiled")
    ]
    assert all(r["tpot_ms"]["n"] == 2 and r["over_plain"]["n"] == 2 for r in found["rows"])
    assert [r["first_call"]["graphs"] > 0 for r in found["rows"]] == [False, True, False, True]
    built = gpu_models.built

    def not_compiling(*given):
        loaded = built(*given)
        loaded.model.generation_config.disable_compile = True
        return loaded

    monkeypatch.setattr(gpu_models, "built", not_compiling)
    found = run("compiled", scale)
    assert found["failed"] == [f"{m}: nothing was compiled" for m in ("none", "divprune:keep=0.5")]


def test_rounds_are_as_many_as_there_is_time_for(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(gpu_models.time, "time", lambda: now[0])

    def rounds(arms, turn, warmup, repeats):
        now[0] += 4

    monkeypatch.setattr(gpu_models, "interleave", rounds)
    for until, expected in ((30.0, 4), (1000.0, 10), (5.0, 1)):  # two rounds of 4 s warm up, one is left for the memory
        now[0] = 0.0
        assert gpu_models.repeats_until([], lambda arm: {}, 10, until) == expected


# ------------------------------------------------------------------------------------------- all of them


def checked(scale, run, **more):
    settings = {"seconds": 480.0, "only": ["kernel", "batches", "waits"], **more}
    return gpu_check.check(scale, "cpu", run=run, **settings)


def test_the_others_go_on_where_one_fails_and_every_part_s_end_is_written(scale):
    written = []

    def parts(name, seconds):
        return {
            "kernel": gpu_check.failure("RuntimeError: boom"),
            "batches": {"status": "not here", "reason": "why"},
            "waits": {"status": "ok", "failed": [], "not_here": {"host_waits": NOT_ON_CPU}},
        }[name]

    found = checked(scale, parts, write=lambda result: written.append(json.loads(json.dumps(result))))
    assert found["failed"] == ["kernel"] and found["not_here"] == {"batches": "why", "waits: host_waits": NOT_ON_CPU}
    assert [list(result["parts"]) for result in written] == [["kernel"], ["kernel", "batches"], ["kernel", "batches", "waits"]]
    assert found["device"] == "cpu" and found["dtype"] == "float32" and {"torch", "transformers", "triton"} <= set(found["versions"])


def test_no_part_is_given_time_that_is_not_left(scale, monkeypatch):
    now, given = [0.0], []
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: now[0])

    def slow(name, seconds):
        given.append((name, seconds))
        now[0] += seconds
        return {"status": "ok", "failed": []}

    found = checked(scale, slow, seconds=100.0)
    assert given == [("kernel", 60.0), ("batches", 35.0)] and now[0] <= 100
    assert found["failed"] == ["waits"] and found["parts"]["waits"]["failed"] == ["no time left for it"]
    most = sum(min(part.seconds, 480) for part in gpu_check.parts_of(Scale()).values())
    assert gpu_check.SECONDS == 480 and most > 480  # what is not needed by one is there for the next


def test_an_error_in_a_part_is_its_result(scale, monkeypatch):
    monkeypatch.setattr(gpu_parts, "drawn_tokens", lambda *given: 1 / 0)
    assert run("batches", scale) == {"status": "failed", "failed": ["ZeroDivisionError: division by zero"]}


@pytest.mark.parametrize(("program", "seconds", "said"), [
    ("import time\ntime.sleep(60)", 1.0, "not done in its 1 s"),
    ("import os\nprint('the last words', flush=True)\nos._exit(3)", 60.0, "its process ended with code 3: ... the last words"),
])  # fmt: skip
def test_a_part_that_hangs_or_dies_is_ended(program, seconds, said, monkeypatch, tmp_path):
    (tmp_path / "part_of_a_test.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu_check, "__spec__", SimpleNamespace(name="part_of_a_test"))
    begin = time.monotonic()
    assert gpu_check.in_a_process("kernel", [], seconds) == gpu_check.failure(said)
    assert time.monotonic() - begin < 59  # it was ended, not waited for


def test_the_command_prints_what_it_writes(file, tmp_path, capsys):
    """Its part runs in a process of its own."""
    output = tmp_path / "check.json"
    assert gpu_check.main(["--device", "cpu", "--scale", str(file), "--only", "batches", "--output", str(output)]) == 0
    out, err = capsys.readouterr()
    printed = json.loads(out)
    assert list(printed["parts"]) == ["batches"] and printed["parts"]["batches"]["status"] == "ok" and printed["failed"] == []
    assert json.loads(output.read_text())["parts"] == printed["parts"] and "batches: ok" in err
    assert gpu_check.main(["--device", "cpu", "--scale", str(file), "--only", "batches", "--seconds", "1"]) == 1
    assert json.loads(capsys.readouterr().out)["parts"]["batches"]["failed"] == ["no time left for it"]


@pytest.mark.parametrize(("given", "said"), [
    (["--device", "cpu", "--only", "kernels"], "no part is called kernels: they are ttft-"),
    (["--device", "cuda:9"], "device 'cuda:9' cannot be used"),
    (["--device", "cpu", "--scale", "missing.json"], "--scale missing.json is not a JSON file of sizes"),
])  # fmt: skip
def test_what_cannot_run_is_one_line(given, said, capsys):
    assert gpu_check.main(given) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1


def test_sizes_have_names(tmp_path):
    path = tmp_path / "scale.json"
    path.write_text('{"model": []}')
    with pytest.raises(me.BadSettingError, match="no size is called model"):
        gpu_parts.read_scale(path)
