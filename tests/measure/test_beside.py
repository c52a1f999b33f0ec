"""The scripts in ``benchmarks/`` run, at tiny shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parents[2]


def run(*argv: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *argv], cwd=ROOT, env=env, check=True, capture_output=True, timeout=300)


@pytest.mark.slow
def test_two_checkouts_beside_each_other(tmp_path):
    file = tmp_path / "beside.json"
    run(
        "benchmarks/beside.py", "--before", str(ROOT), "--threads", "1", "--repeats", "2", "--warmup", "0", "--shape", "40x16x5",
        "--method", "scope", "--method", "tome", "--output", str(file),
    )  # fmt: skip
    found = json.loads(file.read_text())
    assert [(r["method"], r["n"], r["d"], r["k"]) for r in found["rows"]] == [("scope", 40, 16, 5), ("tome", 40, 16, 5)]
    for row in found["rows"]:
        assert row["failed"] == [] and all(row[name]["n"] == 2 for name in row if name.endswith("ms") or "over" in name)
    assert found["meta"]["before"] == found["meta"]["now"]


def test_a_large_image(tmp_path):
    file = tmp_path / "large.json"
    run("benchmarks/large.py", "--size", "60", "16", "6", "--threads", "1", "--method", "vispruner", "--output", str(file))
    (row,) = json.loads(file.read_text())["rows"]
    assert (row["method"], row["n"], row["k"]) == ("vispruner", 60, 6) and row["over_product"] == row["ms"] / row["product_ms"]
