"""``benchmarks/serving.py`` without servers: what the FLOPs allow, and where a process says its time went."""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest

from mllm_efficient.measure.flops import cost
from mllm_efficient.measure.random_model import config_of

pytestmark = pytest.mark.once
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch):
    """The two files as modules, with what they set in the environment undone after the test."""
    for name in ("SERVING_PARTS", "PYTHONPATH", "VLLM_CPU_OMP_THREADS_BIND"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import serving
    import serving_parts

    return serving, serving_parts


def row(method, rate, failed=None):
    return {
        "method": method, "failed": failed, "prompt_tokens": {"median": 32 * (576 + 65)}, "requests_per_s": {"median": rate},
        "requests_ratio": {"median": rate / 0.5, "low": 1, "high": 2}, "ttft_p50_ms": {"median": 1}, "ttft_p99_ms": {"median": 2},
    }  # fmt: skip


def test_the_ratio_is_held_against_that_of_the_flops(scripts):
    serving, _ = scripts
    options = Namespace(requests=32, model="bench-0.3b", output_tokens=16)
    rows = [row("none", 0.5), row("divprune:tokens=64", 1.5), row("resize:tokens=64", 1.0, "it ended")]
    parts = {"none": {"tower": 100.0, "decoder": 900.0}, "divprune:tokens=64": {"tower": 100.0, "method": 30.0, "decoder": 200.0}}
    parts["resize:tokens=64"] = {}
    made = serving.beside_flops(rows, [SimpleNamespace(length=576)], config_of("bench-0.3b"), options, parts)
    none, ours = (cost("bench-0.3b", method=m, text_tokens=65, new_tokens=16).total for m in ("none", "divprune:tokens=64"))
    assert [r["ideal"] for r in made[:2]] == [1, none / ours]
    assert made[1]["reached"] == pytest.approx(3 / (none / ours)) and made[2]["reached"] is None
    assert sum(made[1]["excess_ms"].values()) == pytest.approx(330 - 1000 * ours / none)
    assert made[1]["excess_ms"]["method"] == 30 and sum(made[0]["excess_ms"].values()) == 0
    assert "81% reached" in serving.line(made[1]) and serving.line(made[2]).endswith("failed: it ended")


def test_a_process_says_what_its_parts_took(scripts, tmp_path):
    """A child that works in one part and outside of it; the reader adds its rest up from the system's clock."""
    _, parts = scripts
    work = "import sys, pathlib, time; from serving_parts import Ledger, part_of\n" + (
        "def burn(s):\n t = time.thread_time()\n while time.thread_time() < t + s: pass\n"
        "ledger = Ledger(pathlib.Path(sys.argv[1]), 8123); part_of(burn, ledger, lambda s: 'tower')(0.3); burn(0.5)\n"
        "print('done', flush=True); sys.stdin.read()"
    )
    probe = parts.Probe(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", work, str(probe.folder)], cwd=BENCHMARKS, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout.readline() == "done\n"
        found = probe.so_far("http://127.0.0.1:8123")
        assert probe.so_far("http://127.0.0.1:8124") == {}
        child.stdin.close()
    assert found["tower"] >= 0.3 and found[parts.FRONT] >= 0.45  # the system counts in hundredths
    assert probe.so_far("http://127.0.0.1:8123") == {}  # it has ended


def test_a_class_that_names_its_process_takes_what_it_took(scripts):
    """vLLM asks a model's signature which arguments it has."""
    import inspect

    class Model:
        def __init__(self, *, vllm_config, prefix=""):
            self.config = vllm_config

    _, parts = scripts
    ledger = SimpleNamespace(who=parts.FRONT)
    parts.named(Model, ledger, parts.WORKER)
    assert [*inspect.signature(Model.__init__).parameters] == ["self", "vllm_config", "prefix"]
    assert Model(vllm_config=1).config == 1 and ledger.who == parts.WORKER
