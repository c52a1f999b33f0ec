"""``benchmarks/peers``: what they would do, how two sides are compared, and our side on a tiny model. Nothing is installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from mllm_efficient.loading.models import Loaded, ModelOptions

from ..families import FAMILIES, tiny

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "peers" / "openvino.py"


@pytest.fixture(scope="module")
def peer():
    spec = importlib.util.spec_from_file_location("peer_openvino", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_dry_run_names_the_pinned_packages_and_both_precisions(peer, tmp_path, capsys):
    assert peer.main(["--dry-run", "--dtype", "bfloat16", "--threads", "3", "--folder", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    env = f"{tmp_path}/env/bin/"
    assert lines[0] == f"{sys.executable} -m venv {tmp_path}/env"
    assert lines[1].startswith(f"{env}python -m pip install") and "openvino-genai==2026.4.1.0" in lines[1]
    assert "optimum-intel[openvino]==2.2.0" in lines[1] and "transformers==4.57.6" in lines[1]
    assert lines[-3].startswith(f"{env}optimum-cli export openvino") and "--weight-format fp32" in lines[-3]
    theirs, ours = lines[-2:]
    assert theirs.startswith(f"{env}python ") and "--serve openvino" in theirs and ours.startswith(f"{sys.executable} ")
    assert all(line.endswith("--dtype bfloat16 --threads 3") for line in (theirs, ours))
    assert list(tmp_path.iterdir()) == [] and peer.HINTS == {"float32": "f32", "bfloat16": "bf16"}


def test_sides_take_turns_and_are_compared_at_as_much_removed(peer):
    asked = []

    def side(name, ms):
        def ask(removed):
            asked.append((name, removed))
            return {"ms": ms * (100 - removed), "prompt": 1000 - 9 * removed}

        return ask

    found = peer.compare({"openvino": side("openvino", 1.0), "ours": side("ours", 1.5)}, (0, 80, 90), warmup=1, repeats=7)
    assert len(asked) == 6 * 8 and all(len(set(asked[i : i + 6])) == 6 for i in range(0, 48, 6)) and found["unequal_prompts"] == []
    rows = {(r["side"], r["removed"]): r for r in found["rows"]}
    assert rows["ours", 90]["ms"] == {"median": 15.0, "q1": 15.0, "q3": 15.0, "n": 7} and rows["ours", 90]["prompt_tokens"] == 190
    assert rows["ours", 80]["over_openvino"]["median"] == 1.5 and rows["openvino", 80]["over_whole"]["median"] == 0.2
    assert "over_openvino" not in rows["openvino", 80]


def test_prompts_that_are_not_alike_and_a_side_that_fails_are_seen(peer):
    def broken(removed):
        raise RuntimeError("gone")

    found = peer.compare({"openvino": lambda r: {"ms": 1.0, "prompt": 9}, "ours": lambda r: {"ms": 1.0, "prompt": 9 + r}}, (0, 80), 0, 2)
    assert found["unequal_prompts"] == [80]
    found = peer.compare({"openvino": lambda r: {"ms": 1.0, "prompt": 9}, "ours": broken}, (0,), 0, 2)
    assert found["rows"][1]["failed"] == "RuntimeError: gone" and found["rows"][1]["over_openvino"] is None


def test_a_side_is_a_process_that_answers(peer):
    program = "import sys, json\nfor line in sys.stdin: print(json.dumps({'ms': int(line) / 2, 'prompt': 1}), flush=True)"
    with peer.served([sys.executable, "-c", program], 1) as ask:
        assert [ask(80)["ms"], ask(90)["ms"]] == [40.0, 45.0]
    with pytest.raises(RuntimeError, match="ended: see above"), peer.served([sys.executable, "-c", "input()"], 1) as ask:
        ask(0)


def test_our_side_prunes_the_percentage_that_it_is_asked(peer, monkeypatch):
    loaded = Loaded(tiny("qwen2_5_vl"), FAMILIES["qwen2_5_vl"].processor("left"), ModelOptions("qwen2_5_vl"))
    monkeypatch.setattr("mllm_efficient.loading.models.load", lambda options: loaded)
    monkeypatch.setattr(peer, "SIDE", 160)
    once = peer.our_side(Path("model"), "float32", 1)
    whole, half, none = (once(removed) for removed in (0, 50, 0))
    images = (whole["prompt"] - half["prompt"]) * 2
    assert images >= 16 and none["prompt"] == whole["prompt"] and whole["prompt"] - once(75)["prompt"] == round(0.75 * images)
    assert half["ms"] > half["preprocess_ms"] > 0
